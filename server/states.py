"""Rows of state: where the values that a graph carries between rounds lie.

A round leaves its next states behind as one array per state, a *bank*, with all its rows; a sequence keeps its place in
it, not a copy. Where rows of one bank meet again in the same order, a slice of it is the next round's input as it stands.
Pure numpy; knows the contract, no engine, no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from contract.bundle import Graph

Array = np.ndarray[Any, Any]

_BEFORE = (slice(None),) * 32  # the axes before the one that is cut: numpy has 32 at most
_FEW = 3  # rows of a run that are cheaper sliced than picked one by one: a slice costs as much as picking about three


class Rows:
    """`count` rows from `start` of a bank: one array per state of the graph, in the contract's order. `axes` says where
    rows lie in each. Never changed once made. No dataclass, since one is made for each row of each round."""

    __slots__ = ("axes", "bank", "count", "start")

    def __init__(self, axes: tuple[int, ...], bank: tuple[Array, ...], start: int, count: int) -> None:
        self.axes = axes
        self.bank = bank
        self.start = start
        self.count = count

    @property
    def whole(self) -> bool:
        """Whether these are all rows of the bank; its arrays have the same number."""
        return not self.bank or self.bank[0].shape[self.axes[0]] == self.count

    def arrays(self) -> tuple[Array, ...]:
        """The rows themselves, as views."""
        return self.bank if self.whole else _cut(self.axes, self.bank, self.start, self.start + self.count)

    def own(self) -> Rows:
        """The same rows with arrays of their own, that keep no others from being freed."""
        if self.whole:
            return self
        return Rows(self.axes, tuple([array.copy() for array in self.arrays()]), 0, self.count)

    def pick(self, rows: Sequence[int]) -> Rows:
        """Other rows in another order: what beam search makes of its hypotheses. Copies."""
        indices = np.asarray(rows, np.intp) + self.start
        return Rows(self.axes, tuple([a.take(indices, axis) for axis, a in zip(self.axes, self.bank, strict=True)]), 0, len(rows))


def fresh(graph: Graph, rows: int) -> Rows:
    """The state of sequences that have read nothing."""
    return Rows(graph.state_axes, tuple(s.fresh(rows) for s in graph.states), 0, rows)


def stack(parts: Sequence[Rows]) -> tuple[Array, ...]:
    """One array per state, with the parts' rows in order; without copying where they lie so already.

    Cheapest where parts of one bank stand together, in its order: then it is a few slices.
    """
    axes = parts[0].axes
    runs: list[tuple[tuple[Array, ...], int, int]] = []  # of a bank's rows: from, to
    bank, start, end = parts[0].bank, parts[0].start, parts[0].start
    for part in parts:
        if part.bank is not bank or part.start != end:
            runs.append((bank, start, end))
            bank, start = part.bank, part.start
            end = start
        end += part.count
    runs.append((bank, start, end))
    if len(runs) == 1:
        return Rows(axes, bank, start, end - start).arrays()
    pieces = _pieces(axes, runs)
    if len(pieces) == 1:
        return pieces[0]
    return tuple([np.concatenate(arrays, axis) for axis, arrays in zip(axes, zip(*pieces, strict=True), strict=True)])


def _pieces(axes: tuple[int, ...], runs: list[tuple[tuple[Array, ...], int, int]]) -> list[tuple[Array, ...]]:
    """Runs as arrays: short ones of the same bank are picked together."""
    pieces: list[tuple[Array, ...]] = []
    at = 0
    while at < len(runs):
        bank, start, end = runs[at]
        at += 1
        if end - start <= _FEW:
            picked = list(range(start, end))
            while at < len(runs) and runs[at][0] is bank and runs[at][2] - runs[at][1] <= _FEW:
                picked += range(runs[at][1], runs[at][2])
                at += 1
            if len(picked) > end - start:
                pieces.append(tuple([a.take(picked, axis) for axis, a in zip(axes, bank, strict=True)]))
                continue
        pieces.append(_cut(axes, bank, start, end))
    return pieces


def _cut(axes: tuple[int, ...], bank: tuple[Array, ...], start: int, end: int) -> tuple[Array, ...]:
    return tuple([array[(*_BEFORE[:axis], slice(start, end))] for axis, array in zip(axes, bank, strict=True)])
