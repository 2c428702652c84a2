"""Which waiting tickets a round takes along, and by how many steps: what is left of a sequence, in pieces.

A round runs as many steps as fit every ticket in it. Were that the shortest remainder of a mixed lot, one that is nearly done
would cut everyone's round, and each row would pass through some twenty rounds instead of four. So a remainder is taken as the sum
of whole chunks and of powers of two (45 = 32 + 8 + 4 + 1), which may run in any order, and a round is of those who have its
piece; or of those who have the same rest, which then runs whole. Whoever is first always runs; by which of its pieces, what is
expected to bring most row-steps a second decides.

Pure: tickets and expected costs in, a choice out.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Listed
from typing import TypeVar

from server.tickets import Ticket

# What a round costs besides its rows' steps: onnxruntime's call and this server's own Python, on the machine of docs/log.md.
ROUND_S = 70e-6
ROW_S = 11e-6

T = TypeVar("T", bound=Ticket)


def pieces(remaining: int, chunk: int) -> list[int]:
    """How many steps a round may advance a ticket by, the most first: a chunk, the rest, the powers of two that it is the sum of."""
    rest = remaining % chunk
    found = [chunk] if remaining >= chunk else []
    if rest:
        found.append(rest)
        found += [bit for at in range(rest.bit_length() - 1, -1, -1) if (bit := 1 << at) & rest and bit != rest]
    return found


def choose(first: T, line: Listed[T], most: int, chunk: int, each: Callable[[int], float]) -> tuple[list[T], int]:
    """The round of `first`: its tickets, of at most `most` rows, and its steps. `line` is who waits with it, in order; `each` tells
    the seconds that a step of a row takes in a round of so many rows."""
    if not first.shared:
        return [first], min(chunk, first.remaining) if first.cut else first.remaining
    if not first.cut:
        return _filled(first, [t for t in line if t.remaining == first.remaining], most)[0], first.remaining
    best: list[T] = []
    steps, most_gained = 0, -1.0
    for piece in pieces(first.remaining, chunk):
        if piece == chunk:
            having = [t for t in line if t.remaining >= chunk]
        elif piece & (piece - 1):
            having = [t for t in line if t.remaining % chunk == piece]
        else:
            having = [t for t in line if t.remaining % chunk & piece]
        chosen, rows = _filled(first, having, most)
        gained = rows * piece / (ROUND_S + rows * (ROW_S + piece * each(rows)))
        if gained > most_gained:
            best, steps, most_gained = chosen, piece, gained
        if rows >= most or len(chosen) == len(line):  # all there can be: of fewer steps it brings less
            break
    return best, steps


def _filled(first: T, having: Listed[T], most: int) -> tuple[list[T], int]:
    """`first` and, in order, whoever of them still fits; and how many rows that is."""
    chosen, rows = [first], first.rows
    for t in having:
        if rows >= most:
            break
        if t is not first and rows + t.rows <= most and t.shared:
            chosen.append(t)
            rows += t.rows
    return chosen, rows
