"""Rows of state: where the values that a graph carries between rounds lie.

A round leaves its next states behind as one array per state, a *bank*, with all its rows; a sequence keeps its place in
it, not a copy. Where the same sequences meet again in the same order, the bank is the next round's input as it stands.
Pure numpy; knows the contract, no engine, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from contract.bundle import Graph

Array = np.ndarray[Any, Any]

_BEFORE = (slice(None),) * 32  # the axes before the one that is cut: numpy has 32 at most


@dataclass(frozen=True, slots=True)
class Rows:
    """`count` rows from `start` of a bank: one array per state of the graph, in the contract's order."""

    bank: tuple[Array, ...]
    start: int
    count: int

    def arrays(self, graph: Graph) -> tuple[Array, ...]:
        """The rows themselves, as views."""
        if self._whole(graph):
            return self.bank
        return tuple(
            [
                array[(*_BEFORE[: s.batch_axis], slice(self.start, self.start + self.count))]
                for s, array in zip(graph.states, self.bank, strict=True)
            ]
        )

    def own(self, graph: Graph) -> Rows:
        """The same rows with arrays of their own, that keep no others from being freed."""
        if self._whole(graph):
            return self
        return Rows(tuple([array.copy() for array in self.arrays(graph)]), 0, self.count)

    def _whole(self, graph: Graph) -> bool:
        """Whether these are all rows of the bank; its arrays have the same number."""
        return not self.bank or self.bank[0].shape[graph.states[0].batch_axis] == self.count

    def pick(self, graph: Graph, rows: Sequence[int]) -> Rows:
        """Other rows in another order: what beam search makes of its hypotheses. Copies."""
        indices = np.asarray(rows, np.intp) + self.start
        return Rows(tuple(a.take(indices, s.batch_axis) for s, a in zip(graph.states, self.bank, strict=True)), 0, len(rows))


def fresh(graph: Graph, rows: int) -> Rows:
    """The state of sequences that have read nothing."""
    return Rows(tuple(s.fresh(rows) for s in graph.states), 0, rows)


def stack(graph: Graph, parts: Sequence[Rows]) -> tuple[Array, ...]:
    """One array per state, with the parts' rows in order; without copying where they lie so already."""
    first = parts[0]
    end = first.start
    for part in parts:
        if part.bank is not first.bank or part.start != end:
            break
        end += part.count
    else:
        return Rows(first.bank, first.start, end - first.start).arrays(graph)
    split = [part.arrays(graph) for part in parts]
    return tuple(np.concatenate(arrays, s.batch_axis) for s, arrays in zip(graph.states, zip(*split, strict=True), strict=True))
