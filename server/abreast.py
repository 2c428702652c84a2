"""Turns of several sessions, run as one sequence of as many rows: what arrives together, of one model, goes through the queue, the
round and out of it at once, and each turn has only its own bytes and state apart.

Rows change nothing for each other, so neither does this. Where such a sequence fails, each turn runs alone, so that only the culprit
is told. Pure but for what it is given to call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Listed
from typing import Generic, TypeVar

from contract.bundle import Graph
from server.errors import ServeError
from server.inputs import Sizes
from server.sequence import Packed, Sequence, Views
from server.states import Block, Rows

MOST = 32  # turns of one sequence: with more it is hardly less work, and a round has less to choose from

T = TypeVar("T")


class Abreast(Generic[T]):
    """Turns under way as one sequence. `ran` is told of all of them, `apart` of each that is to run alone."""

    __slots__ = ("_apart", "_ran", "works")

    def __init__(self, works: Listed[T], ran: Callable[[Listed[T], Sequence, Views], None], apart: Callable[[T], None]) -> None:
        self.works = works
        self._ran = ran
        self._apart = apart

    def sequence(self, graph: str, parts: Listed[tuple[Packed, Sizes]], states: Listed[Rows | None]) -> Sequence:
        """What is to be queued: of each turn, in order, what it brings and the session's state."""
        inputs, sizes = packed(parts)
        together = side_by_side(states)
        sequence = Sequence(graph, inputs, sizes, self.ran, self.failed, together)
        sequence.count = len(parts)
        if together is None and any(rows is not None for rows in states):
            sequence.apart = states
        return sequence

    def ran(self, sequence: Sequence, outputs: Views) -> None:
        self._ran(self.works, sequence, outputs)

    def failed(self, error: ServeError) -> None:
        """Together they fail for one; whose fault that was is seen when each runs alone."""
        for work in self.works:
            self._apart(work)


def sharable(graph: Graph) -> bool:
    """Whether turns on that graph may run as rows of one sequence."""
    return graph.shared and graph.packed is not None and not graph.constants and not graph.ragged and not graph.padded


def lots(works: Listed[T], share: int, workers: int) -> Iterator[Listed[T]]:
    """Turns that may run together as they are to: as many to a lot as leave each worker its part, of `share` or more."""
    most = min(MOST, max(share, -(-len(works) // workers)))
    for at in range(0, len(works), most):
        yield works[at : at + most]


def packed(parts: Listed[tuple[Packed, Sizes]]) -> tuple[Packed, Sizes]:
    """One-row inputs of as many steps each, as the rows of one."""
    inputs = tuple([b"".join(tensors) for tensors in zip(*[inputs for inputs, _ in parts], strict=True)])
    return inputs, Sizes(len(parts), parts[0][1].steps)


def side_by_side(states: Listed[Rows | None]) -> Rows | None:
    """Single rows as one piece, where they lie so; None where they don't, or where one has read nothing."""
    first = states[0]
    if first is None:
        return None
    bank, at = first.bank, first.start
    for rows in states:
        if rows is None or rows.bank is not bank or rows.start != at:
            return None
        at += 1
    return Rows(first.axes, bank, first.start, len(states))


def home(rows: Rows | None) -> object:
    """On what device a state lies; None where it is in this process's memory or is none yet."""
    return rows.bank.home if rows is not None and isinstance(rows.bank, Block) else None
