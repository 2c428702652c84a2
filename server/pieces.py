"""Which waiting tickets a round takes along, and by how many steps: what is left of a sequence, in pieces.

A round runs as many steps as fit every ticket in it. Were that the shortest remainder of a mixed lot, one that is nearly done
would cut everyone's round, and each row would pass through some twenty rounds instead of four. So a remainder is taken as the sum
of whole chunks and of powers of two (45 = 32 + 8 + 4 + 1), which may run in any order, and a round is of those who have its
piece; or of those who have the same rest, which then runs whole. Whoever is first always runs; by which of its pieces, what is
expected to bring most row-steps a second decides.

What can't be cut runs whole, with its equals. Where its graph takes rows of different lengths, filled up at the end, others go
along as long as that is expected to take less time than to run each length by itself.

Pure: tickets and expected costs in, a choice out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Listed
from typing import TypeVar

from server.tickets import Ticket

# What a round costs besides its rows' steps: onnxruntime's call and this server's own Python, on the machine of docs/log.md.
ROUND_S = 70e-6
ROW_S = 11e-6
WORTH = 0.1  # of the time that lengths take by themselves, to be saved: who is short waits for who is long

T = TypeVar("T", bound=Ticket)


def pieces(remaining: int, chunk: int) -> list[int]:
    """How many steps a round may advance a ticket by, the most first: a chunk, the rest, the powers of two that it is the sum of."""
    rest = remaining % chunk
    found = [chunk] if remaining >= chunk else []
    if rest:
        found.append(rest)
        found += [bit for at in range(rest.bit_length() - 1, -1, -1) if (bit := 1 << at) & rest and bit != rest]
    return found


def choose(first: T, line: Listed[T], most: int, chunk: int, each: Callable[[int], float], part: int | None = None) -> tuple[list[T], int]:
    """The round of `first`: its tickets, of at most `most` rows, and its steps. `line` is who waits with it, in order; `each` tells
    the seconds that a step of a row takes in a round of so many rows. With more than `part` rows, a worker's part of all that is
    here, nobody is filled up: a worker that has nothing to do is better for them."""
    if not first.shared:
        return [first], min(chunk, first.remaining) if first.cut else first.remaining
    if not first.cut:
        equals, rows = _filled(first, [t for t in line if t.remaining == first.remaining], most)
        return _uneven(equals, rows, line, most if part is None else part, each) if first.padded else (equals, first.remaining)
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
        gained = rows * piece / _cost(rows, piece, each)
        if gained > most_gained:
            best, steps, most_gained = chosen, piece, gained
        if rows >= most or len(chosen) == len(line):  # all there can be: of fewer steps it brings less
            break
    return best, steps


def _filled(first: T, having: Listed[T], most: int) -> tuple[list[T], int]:
    """`first` and, in order, whoever of them still fits; and how many rows that is."""
    chosen, rows = _fitting((t for t in having if t is not first and t.shared), most - first.rows)
    return [first, *chosen], first.rows + rows


def _uneven(equals: list[T], rows: int, line: Listed[T], most: int, each: Callable[[int], float]) -> tuple[list[T], int]:
    """The round of `equals`, of so many rows, and whoever of other lengths it is worth filling up for, nearest lengths first: each
    time the next shorter or the next longer, whichever saves more; and of all these rounds the one that saves most."""
    steps = longest = equals[0].remaining
    others: dict[int, list[T]] = {}
    for t in line:
        if t.remaining != steps and t.shared:
            others.setdefault(t.remaining, []).append(t)
    if not others or rows >= most or not each(rows):  # where nothing is known of costs, nobody is filled up for
        return equals, steps
    shorter = sorted(n for n in others if n < steps)
    longer = sorted((n for n in others if n > steps), reverse=True)
    best, chosen = equals, equals
    apart = _cost(rows, steps, each)  # of all who were chosen, each length by itself
    most_saved = 0.0
    while (shorter or longer) and rows < most:
        tried = []
        for side in (shorter, longer):
            if side:
                more, added = _fitting(others[side[-1]], most - rows)
                alone = apart + _cost(added, side[-1], each) if added else apart
                tried.append((alone - _cost(rows + added, max(longest, side[-1]), each), alone, added, more, side))
        saved, apart, added, more, side = max(tried, key=_saved)
        length = side.pop()
        if not added:
            continue
        chosen, rows, longest = [*chosen, *more], rows + added, max(longest, length)
        if saved > max(most_saved, WORTH * apart):
            best, steps, most_saved = chosen, longest, saved
        elif saved < 0:
            break
    return best, steps


def _saved(tried: tuple[float, float, int, list[T], list[int]]) -> float:
    return tried[0]


def _cost(rows: int, steps: int, each: Callable[[int], float]) -> float:
    """Seconds that a round is expected to take."""
    return ROUND_S + rows * (ROW_S + steps * each(rows))


def _fitting(tickets: Iterable[T], most: int) -> tuple[list[T], int]:
    """In order, whoever still fits; and how many rows that is."""
    chosen: list[T] = []
    rows = 0
    for t in tickets:
        if rows >= most:
            break
        if rows + t.rows <= most:
            chosen.append(t)
            rows += t.rows
    return chosen, rows
