"""Rows of state: where the values that a graph carries between rounds lie.

A round leaves its next states behind as one array per state, a *bank*, with all its rows; a sequence keeps its place in
it, not a copy. Where rows of one bank meet again in the same order, a slice of it is the next round's input as it stands.
On a device a bank is a *block* of the slots that a graph has there (banks.py), and lives as long as anyone holds rows of it.
Pure numpy; knows the contract, no engine, no clock.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from contract.bundle import Graph

Array = np.ndarray[Any, Any]

_BEFORE = (slice(None),) * 32  # the axes before the one that is cut: numpy has 32 at most
_FEW = 3  # rows of a run that are cheaper sliced than picked one by one: a slice costs as much as picking about three


class Home(ABC):
    """What keeps blocks: the slots of a graph on a device."""

    row_bytes: int  # of all states of one row

    @abstractmethod
    def fetch(self, rows: Sequence[Rows]) -> tuple[Array, ...]:
        """Rows of its blocks as arrays in this process's memory, in order: one copy of each state for all of them."""

    @abstractmethod
    def settle(self, rows: Sequence[Rows]) -> list[Rows]:
        """The same single rows so that none keeps others' slots from being used."""


class Block(ABC):
    """Rows that lie on a device. `count` of them; never changed once made."""

    __slots__ = ("count", "home", "place")
    count: int
    home: Home
    place: int  # by which rows are brought in order, so that those that lie together are together


Bank = tuple[Array, ...] | Block


class Rows:
    """`count` rows from `start` of a bank: one array per state of the graph, in the contract's order, or a block. `axes` says where
    rows lie in each. Never changed once made. No dataclass, since one is made for each row of each round."""

    __slots__ = ("axes", "bank", "count", "start")

    def __init__(self, axes: tuple[int, ...], bank: Bank, start: int, count: int) -> None:
        self.axes = axes
        self.bank = bank
        self.start = start
        self.count = count

    @property
    def whole(self) -> bool:
        """Whether these are all rows of the bank; its arrays have the same number."""
        if isinstance(self.bank, Block):
            return self.bank.count == self.count
        return not self.bank or self.bank[0].shape[self.axes[0]] == self.count

    @property
    def bytes(self) -> int:
        """What they take."""
        if isinstance(self.bank, Block):
            return self.count * self.bank.home.row_bytes
        return sum(array.nbytes for array in self.arrays())

    def arrays(self) -> tuple[Array, ...]:
        """The rows themselves: views, or a copy of what lies on a device."""
        if isinstance(self.bank, Block):
            return self.bank.home.fetch([self])
        return self.bank if self.whole else _cut(self.axes, self.bank, self.start, self.start + self.count)

    def pick(self, rows: Sequence[int]) -> Rows:
        """Other rows in another order: what beam search makes of its hypotheses. Copies, but of what lies on a device only names
        the places: the next round gathers them in any case."""
        if isinstance(self.bank, Block):
            base = self.bank
            if isinstance(base, Picked):
                return Rows(self.axes, Picked(base.base, [base.rows[self.start + row] for row in rows]), 0, len(rows))
            return Rows(self.axes, Picked(base, [self.start + row for row in rows]), 0, len(rows))
        indices = np.asarray(rows, np.intp) + self.start
        return Rows(self.axes, tuple([a.take(indices, axis) for axis, a in zip(self.axes, self.bank, strict=True)]), 0, len(rows))


class Picked(Block):
    """Rows of a block in another order, some of them several times."""

    __slots__ = ("base", "rows")

    def __init__(self, base: Block, rows: Sequence[int]) -> None:
        self.base = base
        self.rows = rows
        self.count = len(rows)
        self.home = base.home
        self.place = base.place


def fresh(graph: Graph, rows: int) -> Rows:
    """The state of sequences that have read nothing."""
    return Rows(graph.state_axes, tuple(s.fresh(rows) for s in graph.states), 0, rows)


def here(parts: Sequence[Rows]) -> Sequence[Rows]:
    """The same rows in this process's memory: those of each device are copied all at once."""
    far: dict[Home, list[int]] = {}
    for at, part in enumerate(parts):
        if isinstance(part.bank, Block):
            far.setdefault(part.bank.home, []).append(at)
    if not far:
        return parts
    near = list(parts)
    for home, places in far.items():
        bank = home.fetch([parts[at] for at in places])
        start = 0
        for at in places:
            near[at] = Rows(parts[at].axes, bank, start, parts[at].count)
            start += parts[at].count
    return near


def settle(parts: Sequence[Rows]) -> list[Rows]:
    """The same rows, so that none of them keeps others from being freed: arrays of their own, or on a device slots of their own."""
    settled = list(parts)
    far: dict[Home, list[int]] = {}
    for at, part in enumerate(parts):
        if part.whole:
            continue
        if isinstance(part.bank, Block):
            far.setdefault(part.bank.home, []).append(at)
        else:
            settled[at] = Rows(part.axes, tuple([array.copy() for array in part.arrays()]), 0, part.count)
    for home, places in far.items():
        for at, rows in zip(places, home.settle([parts[at] for at in places]), strict=True):
            settled[at] = rows
    return settled


def stack(parts: Sequence[Rows]) -> tuple[Array, ...]:
    """One array per state, with the parts' rows in order; without copying where they lie so already. None of them on a device.

    Cheapest where parts of one bank stand together, in its order: then it is a few slices.
    """
    axes = parts[0].axes
    runs: list[tuple[tuple[Array, ...], int, int]] = []  # of a bank's rows: from, to
    bank, start, end = parts[0].bank, parts[0].start, parts[0].start
    for part in parts:
        if part.bank is not bank or part.start != end:
            runs.append((bank, start, end))  # type: ignore[arg-type]  # no blocks here
            bank, start = part.bank, part.start
            end = start
        end += part.count
    runs.append((bank, start, end))  # type: ignore[arg-type]
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
