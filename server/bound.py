"""A graph whose rows of state stay on its device between rounds: bound where they lie, and where they are to lie next.

Where the same rows meet again as a round left them, or rows that happen to lie side by side, their slots are bound as the next round's
input as they stand, and the same slots of the other bank as its output; else the rows are first gathered into a block, on the device
(banks.py). Rows that have read nothing are gathered from one row that never changes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from contract.bundle import BATCH, TIME, BundleError, Graph, Tensor
from server import states
from server.banks import Banks
from server.devices import Device, Placement
from server.graph import Array, OnnxGraph
from server.states import Bank, Block, Rows

GRAPHS = 64  # CUDA graphs that one graph keeps: each has scratch memory of its own


class BoundGraph(OnnxGraph):
    """A graph with states, whose rows stay on the device. Answers are those of OnnxGraph on that device, bit for bit: only the
    places differ."""

    def __init__(self, graph: Graph, file: Path, device: Device, placement: Placement, rows: int) -> None:
        # A captured round's inputs and outputs have one form each; and a session that captures runs one round at a time.
        same = all(_known(t) for t in (*graph.inputs, *graph.outputs))
        super().__init__(graph, file, device, placement if same else replace(placement, captured=False))
        if fault := unbound(graph):
            raise BundleError(str(file), [fault])
        self.banks = Banks(graph, device, placement, rows)
        block = self.banks.bring(self._row.arrays(), 1)
        assert block is not None, "there are at least 16 slots"
        self.banks.brought = 0
        self._fresh = Rows(graph.state_axes, block, 0, 1)  # not of the banks: they and their blocks would keep each other from being freed
        self._turn: contextlib.AbstractContextManager[Any] = contextlib.nullcontext() if device.near else threading.Lock()
        self._sizes = _SIZES if placement.buckets and all(t.batch_axis is not None and not t.ragged for t in graph.inputs) else ()
        self._captures = self.loaded.captured
        self._captured: dict[tuple[int, int, int], _Captured | None] = {}  # None: seen once

    def fresh(self, rows: int) -> Rows:
        return self._fresh if rows == 1 else self._fresh.pick([0] * rows)

    @property
    def about(self) -> list[tuple[str, str, float]]:
        banks, slots = self.banks, self.banks.tidy()
        return [
            ("seqserve_device_slots", "taken", slots.taken), ("seqserve_device_slots", "free", slots.count - slots.taken),
            ("seqserve_device_rounds_total", "bound", banks.bound), ("seqserve_device_rounds_total", "gathered", banks.gathered),
            ("seqserve_device_rounds_total", "no_room", banks.refused),
            ("seqserve_device_state_bytes_total", "to", banks.brought), ("seqserve_device_state_bytes_total", "from", banks.fetched),
            *super().about,
        ]  # fmt: skip

    def keeps(self, rows: Rows) -> bool:
        return isinstance(rows.bank, Block) and rows.bank.home is self.banks

    def size(self, rows: int) -> int:
        """The rows that a round of so many is made up to."""
        return next((size for size in self._sizes if size >= rows), rows)

    def advance(self, feeds: dict[str, Array], carried: Sequence[Rows]) -> tuple[Sequence[Array], Bank, float]:
        """As OnnxGraph's. What can be done before the device is free is done before."""
        banks = self.banks
        near = self._device_rows(carried)
        if near is None:
            return self._unbound(feeds, carried)
        places = banks.find(near)
        rows = len(places)
        size = self.size(rows)
        start = banks.block(places, size)
        target = banks.take(size, start)
        if target is None:
            return self._unbound(feeds, carried)
        made_up = {t.name: _made_up(feeds[t.name], t, size) for t in self.graph.inputs} if size > rows else feeds
        gathering = None
        if start is None:
            gathering = banks.gathering(places, size)
            if gathering is None:
                return self._unbound(feeds, carried)
            start = gathering[0].start
        steps = next((feeds[t.name].shape[t.time_axis] for t in self.graph.inputs if t.time_axis is not None), 1)
        captured = self._capture(made_up, (start, target.start, size)) if self._captures and gathering is None and steps == 1 else None
        run = captured or _Run(self, made_up, start, target.start, size, steps)
        with self._turn:
            clock = time.thread_time if self.device.near else time.perf_counter
            began = clock()
            if gathering is not None:
                banks.gather(gathering[1])
            else:
                banks.bound += 1
            outputs = run(made_up)
            seconds = clock() - began
            self._ran(seconds)
        if size > rows:
            outputs = [_cut(array, t, rows) for array, t in zip(outputs, self.graph.outputs, strict=True)]
        return outputs, target, seconds

    def check_captured(self, draw: Callable[[], dict[str, Array]]) -> str | None:
        """Whether captured rounds of one row and step answer as others do, with inputs as drawn: what a node takes on the CPU is recorded
        as it was. Why not, in which case none is captured any more. At least twice as many as it takes to capture one, to and fro."""
        if not self._captures:
            return None
        why = None
        try:
            mine, theirs = self.fresh(1), states.fresh(self.graph, 1)
            for n in range(8):
                feeds = draw()
                found, bank, _ = self.advance(dict(feeds), [mine])
                wanted, other, _ = super().advance(dict(feeds), [theirs])
                mine, theirs = Rows(self.banks.axes, bank, 0, 1), Rows(self.banks.axes, other, 0, 1)
                pairs = [*zip(found, wanted, strict=True), *zip(mine.arrays(), theirs.arrays(), strict=True)]
                if not all(np.allclose(a, b, 1e-4, 2e-5) for a, b in pairs):
                    why = f"round {n + 1} of one row came to something else"
                    break
        except Exception as e:  # onnxruntime raises its own types, all of them straight from Exception
            why = str(e)[:300]
        if why is not None:
            self._captures = False
            self._captured.clear()
        return why

    def _device_rows(self, carried: Sequence[Rows]) -> Sequence[Rows] | None:
        """The same rows, all in these banks: those from elsewhere are brought, through this process's memory. None: no room."""
        banks = self.banks
        away = [at for at, rows in enumerate(carried) if not isinstance(rows.bank, Block) or rows.bank.home is not banks]
        if not away:
            return carried
        from_there = states.here([carried[at] for at in away])
        block = banks.bring(states.stack(from_there), sum(rows.count for rows in from_there))
        if block is None:
            return None
        near = list(carried)
        start = 0
        for at in away:
            near[at] = Rows(banks.axes, block, start, carried[at].count)
            start += carried[at].count
        return near

    def _unbound(self, feeds: dict[str, Array], carried: Sequence[Rows]) -> tuple[Sequence[Array], Bank, float]:
        """For want of room this round's states lie in this process's memory, where there is as much as it has."""
        self.banks.refused += 1
        with self._turn if self.loaded.captured else contextlib.nullcontext():  # its session has one stream, and one handle of cuDNN
            return super().advance(feeds, carried)

    def _capture(self, feeds: dict[str, Array], key: tuple[int, int, int]) -> _Captured | None:
        """The round between two blocks as a CUDA graph; None where it isn't one: seen for the first time, or there are too many."""
        if key not in self._captured:
            if len(self._captured) < 16 * GRAPHS:
                self._captured[key] = None
            return None
        captured = self._captured[key]
        if captured is None:
            number = sum(c is not None for c in list(self._captured.values())) + 1  # another worker may add to it
            if number > GRAPHS:
                return None
            captured = self._captured[key] = _Captured(self, feeds, *key, number)
        return captured


class _Run:
    """One round, bound: inputs where the caller has them, states in their blocks, outputs in arrays of this process. All of it is
    made ready before the device is free, but for the states to start from: what a node takes on the CPU onnxruntime copies when it is
    bound, and these may yet have to be gathered."""

    __slots__ = ("_banks", "_binding", "_given", "_loaded", "_size", "_start")

    def __init__(self, graph: BoundGraph, feeds: dict[str, Array], start: int, target: int, size: int, steps: int) -> None:
        self._loaded = graph.loaded
        self._binding = graph.loaded.bind()
        for name, array in feeds.items():
            self._binding.feed(name, array)
        self._banks, self._start, self._size = graph.banks, start, size
        self._given: list[Array | None] = []
        for tensor in graph.graph.outputs:
            if _known(tensor):
                array = np.empty([_length(axis, size, steps) for axis in tensor.axes], tensor.numpy_dtype)
                self._binding.give(tensor.name, array)
                self._given.append(array)
            else:
                self._binding.ask(tensor.name)
                self._given.append(None)
        graph.banks.leave_in(self._binding, target, size)

    def __call__(self, feeds: dict[str, Array]) -> list[Array]:
        self._banks.take_in(self._binding, self._start, self._size)
        self._loaded.run(self._binding)
        return [array if array is not None else self._binding.given(place) for place, array in enumerate(self._given)]


class _Captured:
    """The same of one step as a CUDA graph: inputs and outputs have places of their own on the device."""

    __slots__ = ("_binding", "_inputs", "_loaded", "_number", "_outputs")

    def __init__(self, graph: BoundGraph, feeds: dict[str, Array], start: int, target: int, size: int, number: int) -> None:
        self._loaded = graph.loaded
        self._number = number
        self._binding = graph.loaded.bind()
        self._inputs = [(t.name, self._binding.fix(t.name, feeds[t.name].shape, t.numpy_dtype)) for t in graph.graph.inputs]
        graph.banks.take_in(self._binding, start, size)
        shapes = [[_length(axis, size, 1) for axis in t.axes] for t in graph.graph.outputs]
        pairs = zip(graph.graph.outputs, shapes, strict=True)
        self._outputs = [self._binding.fix_output(t.name, shape, t.numpy_dtype) for t, shape in pairs]
        graph.banks.leave_in(self._binding, target, size)

    def __call__(self, feeds: dict[str, Array]) -> list[Array]:
        for name, fixed in self._inputs:
            fixed.write(feeds[name])
        self._loaded.replay(self._binding, self._number)
        return [fixed.read() for fixed in self._outputs]


_SIZES = tuple(sorted({1, 2, 3} | {m << e for e in range(2, 15) for m in (1, 2, 3)}))


def unbound(graph: Graph) -> str | None:
    """Why a graph can't have its states on a device, or None where it can."""
    if not graph.states:
        return "it has no states"
    if both := {t.name for t in graph.outputs} & {s.output for s in graph.states}:
        return f"{min(both)!r} is an output and a state, which would have to lie in two places"
    texts = [t.name for t in (*graph.inputs, *graph.outputs) if t.dtype == "string"]
    return f"{texts[0]!r} is text, which can't be bound to a place in memory" if texts else None


def _known(tensor: Tensor) -> bool:
    return all(isinstance(axis, int) or axis in (BATCH, TIME) for axis in tensor.axes)


def _length(axis: str | int, rows: int, steps: int) -> int:
    return axis if isinstance(axis, int) else rows if axis == BATCH else steps


def _made_up(array: Array, tensor: Tensor, size: int) -> Array:
    """The last row again and again: values that the model can take."""
    axis = tensor.batch_axis
    assert axis is not None
    made: Array = array.take(np.minimum(np.arange(size), array.shape[axis] - 1), axis)
    return made


def _cut(array: Array, tensor: Tensor, rows: int) -> Array:
    axis = tensor.batch_axis
    assert axis is not None
    cut: Array = array[(slice(None),) * axis + (slice(0, rows),)]
    return cut
