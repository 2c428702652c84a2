"""A graph whose rows of state stay on its device between rounds: bound where they lie, and where they are to lie next.

For each state a graph has two banks of slots in one piece of memory (slots.py). A round's next states are left in an interval of
slots, a *block*: [before, rows, after] end to end, as the graph writes them. Where the same rows meet again, or rows that happen
to lie side by side, the block is bound as the next round's input as it stands; else the rows are first gathered into one, on
the device, by a model of one node a state (gather.py). Rows that have read nothing are gathered from one row that never changes.
Nothing of it crosses to this process's memory but what is fetched: for a store, an export, or for want of room.

A block is let go of when the last who holds rows of it has let go: Python counts that, as it does for banks on the host. So a state
is a value here too: forks share it, what fails leaves it as it was, and a retried turn finds it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from contract.bundle import BATCH, TIME, BundleError, Graph, State, Tensor
from server import gather, states
from server.devices import Device, Placement
from server.graph import Array, Binding, Loaded, Memory, OnnxGraph
from server.slots import Slots
from server.states import Bank, Block, Home, Picked, Rows

log = logging.getLogger(__name__)

CROWDED = 0.75  # share of slots taken, beyond which rows that nobody uses leave for this process's memory
GRAPHS = 64  # CUDA graphs that one graph keeps: each has scratch memory of its own
ROUNDS = 4  # of as many rows as a round may have, that slots are kept for beside the sessions: read, gathered, written, by two at once


class Held(Block):
    """A block in its slots."""

    __slots__ = ("start",)
    home: Banks

    def __init__(self, home: Banks, start: int, count: int) -> None:
        self.home = home
        self.start = self.place = start
        self.count = count

    def __del__(self) -> None:
        self.home.dead.append((self.start, self.count))


class Banks(Home):
    """The states of one graph's rows on one device."""

    def __init__(self, graph: Graph, device: Device, placement: Placement, rows: int) -> None:
        """Room in each of two banks for `placement.sessions` rows, half as many again that others of their round still keep, and some
        rounds of `rows`, if `placement.room` allows."""
        self.axes = graph.state_axes
        self.device = device
        self._states = graph.states
        self._before = [math.prod(int(a) for a in s.axes[: s.batch_axis]) for s in graph.states]
        self._after = [math.prod(int(a) for a in s.axes[s.batch_axis + 1 :]) for s in graph.states]
        self.row_bytes = sum(s.bytes_per_row for s in graph.states)
        self.flat = max(self._before) == 1  # a row lies in one piece, so any rows side by side are a block
        befores = sorted(set(self._before))
        self._group = [befores.index(b) for b in self._before]
        self._befores = befores
        each = max(8, min(placement.room // (2 * max(1, self.row_bytes)), placement.sessions * 3 // 2 + ROUNDS * rows))
        self.slots = Slots(each)
        try:
            self._memory = [
                Memory(device, s.numpy_dtype, 2 * each * before * after)
                for s, before, after in zip(graph.states, self._before, self._after, strict=True)
            ]
        except Exception as e:  # onnxruntime raises its own types, all of them straight from Exception
            size = 2 * each * self.row_bytes >> 20
            raise BundleError(
                str(device), [f"{size} MiB for its states don't fit on {device}: lower --device-state-mb ({e})"[:300]]
            ) from None
        self._mover = Loaded(gather.model([(s.dtype, g) for s, g in zip(graph.states, self._group, strict=True)]), device)
        self._lock = threading.Lock()  # of the slots
        self.dead: deque[tuple[int, int]] = deque()  # blocks that nobody holds any more, told from whatever thread let go
        self.brought = self.fetched = 0  # bytes of state that went from this process's memory to the device, and back
        self.bound = self.gathered = self.refused = 0  # rounds by how their rows were found; and those for which there was no room
        row = self.bring(states.fresh(graph, 1).arrays(), 1)
        assert row is not None, "there are at least 16 slots"
        self._fresh = row
        self.brought = 0

    def fresh(self, rows: int) -> Rows:
        """Rows that have read nothing."""
        return Rows(self.axes, self._fresh, 0, 1) if rows == 1 else Rows(self.axes, Picked(self._fresh, [0] * rows), 0, rows)

    def take(self, count: int, after: int | None = None) -> Held | None:
        """Slots for a block; None where there is no room. `after`: where the rows lie now, see Slots.take."""
        with self._lock:
            self._bury()
            start = self.slots.take(count, after)
        return None if start is None else Held(self, start, count)

    def bring(self, arrays: Sequence[Array], count: int) -> Held | None:
        """Rows from this process's memory; None where there is no room."""
        block = self.take(count)
        if block is None:
            return None
        binding = self._mover.bind()
        for i, (array, before) in enumerate(zip(arrays, self._before, strict=True)):
            binding.feed(f"data{i}", array.reshape(before * count, -1))
        for group, before in enumerate(self._befores):
            binding.feed(f"at{group}", np.arange(before * count))
        self._into(binding, block.start, count)
        self._mover.run(binding)
        with self._lock:
            self.brought += count * self.row_bytes
        return block

    def find(self, rows: Sequence[Rows]) -> Places:
        """Where rows lie that are all of these banks."""
        starts: list[int] = []
        counts: list[int] = []
        at: list[int] = []
        for part in rows:
            block = part.bank
            first = part.start
            if type(block) is Held:
                if part.count == 1:
                    starts.append(block.start)
                    counts.append(block.count)
                    at.append(first)
                    continue
                picked: Sequence[int] = range(first, first + part.count)
            else:
                assert isinstance(block, Picked), "rows of another kind of block"
                picked = block.rows[first : first + part.count]
                block = block.base
                assert isinstance(block, Held)
            starts += [block.start] * part.count
            counts += [block.count] * part.count
            at += picked
        return Places(self.flat, np.array(starts), np.array(counts), np.array(at))

    def gathering(self, places: Places, count: int) -> tuple[Held, Binding] | None:
        """A new block of `count` for those rows, the last ones being the last again where there are fewer, and the run that gathers
        them into it, for `gather`. None: no room."""
        block = self.take(count)
        if block is None:
            return None
        binding = self._from(places.padded(count))
        self._into(binding, block.start, count)
        return block, binding

    def gather(self, binding: Binding) -> None:
        self._mover.run(binding)
        self.gathered += 1

    def fetch(self, rows: Sequence[Rows]) -> tuple[Array, ...]:
        places = self.find(rows)
        count = len(places)
        binding = self._from(places)
        found = []
        for i, (state, before, after) in enumerate(zip(self._states, self._before, self._after, strict=True)):
            array = np.empty((before * count, after), state.numpy_dtype)
            binding.give(f"out{i}", array)
            found.append(array.reshape(shape_of(state, count)))
        self._mover.run(binding)
        with self._lock:
            self.fetched += count * self.row_bytes
        return tuple(found)

    def settle(self, rows: Sequence[Rows]) -> list[Rows]:
        assert all(r.count == 1 for r in rows), "a session is one row"
        with self._lock:
            self._bury()
            crowded = self.slots.taken > CROWDED * self.slots.count
            pieces = [] if crowded else self.slots.take_last(len(rows))
            blocks = [[Held(self, start + i, 1) for i in range(count)] for start, count in pieces]
        settled: list[Rows] = []
        for some in blocks:
            self._move(self.find(rows[len(settled) : len(settled) + len(some)]), some[0].start, len(some), apart=True)
            settled += [Rows(self.axes, block, 0, 1) for block in some]
        if left := rows[len(settled) :]:
            arrays = tuple(zip(self.axes, self.fetch(left), strict=True))
            settled += [Rows(self.axes, tuple([a.take([i], axis) for axis, a in arrays]), 0, 1) for i in range(len(left))]
        return settled

    def take_in(self, binding: Binding, start: int, count: int) -> None:
        """Bind a block as what a graph of these states starts from."""
        for state, memory, before, after in zip(self._states, self._memory, self._before, self._after, strict=True):
            binding.take(state.input, memory, start * before * after, shape_of(state, count))

    def leave_in(self, binding: Binding, start: int, count: int) -> None:
        """Bind a block as where it leaves what comes next."""
        for state, memory, before, after in zip(self._states, self._memory, self._before, self._after, strict=True):
            binding.leave(state.output, memory, start * before * after, shape_of(state, count))

    def _bury(self) -> None:
        while self.dead:
            self.slots.free(*self.dead.popleft())

    def _move(self, places: Places, start: int, count: int, apart: bool = False) -> None:
        """Copy rows into slots on the device: as one block, or `apart` as blocks of one row each."""
        binding = self._from(places, apart)
        self._into(binding, start, count)
        self._mover.run(binding)

    def _from(self, places: Places, apart: bool = False) -> Binding:
        binding = self._mover.bind()
        for i, (memory, before, after) in enumerate(zip(self._memory, self._before, self._after, strict=True)):
            binding.take(f"data{i}", memory, 0, (self.slots.count * before, after))
        for group, before in enumerate(self._befores):
            binding.feed(f"at{group}", places.cells(before, apart))
        return binding

    def _into(self, binding: Binding, start: int, count: int) -> None:
        for i, (memory, before, after) in enumerate(zip(self._memory, self._before, self._after, strict=True)):
            binding.leave(f"out{i}", memory, start * before * after, (count * before, after))


class Places:
    """Where rows lie, in order: the first slot of each one's block, how many rows that has, and which of them it is."""

    __slots__ = ("_at", "_counts", "_flat", "_starts")

    def __init__(self, flat: bool, starts: Array, counts: Array, at: Array) -> None:
        self._flat = flat
        self._starts = starts
        self._counts = counts
        self._at = at

    def __len__(self) -> int:
        return len(self._at)

    def block(self, count: int) -> int | None:
        """The first slot of a block of `count` that begins with just these rows; None where they lie otherwise."""
        first = int(self._starts[0]) + int(self._at[0])
        n = len(self)
        if self._flat:
            slots = self._starts + self._at
            return first if slots[-1] - first == n - 1 and (n < 3 or bool((slots[1:] - slots[:-1] == 1).all())) else None
        if self._at[0] or self._counts[0] != count or not (self._starts == self._starts[0]).all():
            return None
        return first if bool((self._at == np.arange(n)).all()) else None

    def padded(self, count: int) -> Places:
        n = len(self)
        if n == count:
            return self
        more = np.minimum(np.arange(count), n - 1)
        return Places(self._flat, self._starts[more], self._counts[more], self._at[more])

    def cells(self, before: int, apart: bool) -> Array:
        """Of an array whose rows lie behind `before` others, the pieces [before, rows] to pick; `apart` [rows, before]."""
        if before == 1:
            return self._starts + self._at
        found = (self._starts * before + self._at)[:, None] + self._counts[:, None] * np.arange(before)
        return np.ascontiguousarray(found if apart else found.T).reshape(-1)


def shape_of(state: State, rows: int) -> tuple[int, ...]:
    return tuple(rows if axis == BATCH else int(axis) for axis in state.axes)


class BoundGraph(OnnxGraph):
    """A graph with states, whose rows stay on the device. Answers are those of OnnxGraph on that device, bit for bit: only the
    places differ."""

    def __init__(self, graph: Graph, file: Path, device: Device, placement: Placement, rows: int) -> None:
        super().__init__(graph, file, device, placement)
        if fault := unbound(graph):
            raise BundleError(str(file), [fault])
        self.banks = Banks(graph, device, placement, rows)
        self._turn: contextlib.AbstractContextManager[Any] = contextlib.nullcontext() if device.near else threading.Lock()
        self._sizes = _SIZES if placement.buckets and all(t.batch_axis is not None and not t.ragged for t in graph.inputs) else ()
        self._known = all(_known(t) for t in graph.outputs)
        self._captures = placement.captured and self._known
        self._captured: dict[tuple[int, int, int], _Captured | None] = {}  # None: seen once

    def fresh(self, rows: int) -> Rows:
        return self.banks.fresh(rows)

    @property
    def about(self) -> list[tuple[str, str, float]]:
        banks, slots = self.banks, self.banks.slots
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
        start = places.block(size)
        if start is not None and start + size > banks.slots.count:
            start = None
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

    def check_captured(self) -> str | None:
        """Whether captured rounds answer as others do; why not, in which case none is captured any more. At least twice as many
        as it takes to capture one, to and fro."""
        if not self._captures:
            return None
        why = None
        try:
            feeds = {t.name: _sample(t) for t in self.graph.inputs}
            mine, theirs = self.fresh(1), states.fresh(self.graph, 1)
            for n in range(8):
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
        return super().advance(feeds, carried)

    def _capture(self, feeds: dict[str, Array], key: tuple[int, int, int]) -> _Captured | None:
        """The round between two blocks as a CUDA graph; None where it isn't one: seen for the first time, or there are too many."""
        if key not in self._captured:
            if len(self._captured) < 16 * GRAPHS:
                self._captured[key] = None
            return None
        captured = self._captured[key]
        if captured is None:
            number = sum(c is not None for c in self._captured.values()) + 1
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
    texts = [t.name for t in (*graph.inputs, *graph.outputs) if t.dtype == "string"]
    return f"{texts[0]!r} is text, which can't be bound to a place in memory" if texts else None


def _known(tensor: Tensor) -> bool:
    return all(isinstance(axis, int) or axis in (BATCH, TIME) for axis in tensor.axes)


def _length(axis: str | int, rows: int, steps: int) -> int:
    return axis if isinstance(axis, int) else rows if axis == BATCH else steps


def _sample(tensor: Tensor) -> Array:
    shape = [_length(axis, 1, 1) for axis in tensor.axes]
    return np.full(shape, 1 if tensor.role == "lengths" else tensor.low or 0, tensor.numpy_dtype)


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
