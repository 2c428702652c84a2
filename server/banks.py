"""The slots of a graph's states on a device: who has which, and rows of state moved into them, out of them and among them.

For each state there are two banks of slots in one piece of memory (slots.py). A round's next states are left in an interval of slots, a
*block*: [before, rows, after] end to end, as the graph writes them. Rows are moved by a model of one node a state (gather.py), on the
device, or to and from this process's memory: for a store, an export, or for want of room.

A block is let go of when the last who holds rows of it has let go: Python counts that, as it does for banks on the host. So a state
is a value here too: forks share it, what fails leaves it as it was, and a retried turn finds it.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence

import numpy as np

from contract.bundle import BATCH, BundleError, Graph, State
from server import gather
from server.devices import Device, Placement
from server.graph import Array, Binding, Loaded, Memory
from server.slots import Slots
from server.states import Block, Home, Picked, Rows

ALIGNED = 16  # bytes: kernels read up to so many at once, from where a tensor begins, and CUDA takes a device away from who misses
PLACES = 2**31 - 1  # values that CUDA's Gather can tell apart: it counts in 32 bits
CROWDED = 0.75  # share of slots taken, beyond which rows that nobody uses leave for this process's memory
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
        values = [before * after for before, after in zip(self._before, self._after, strict=True)]
        sizes = [n * s.numpy_dtype.itemsize for n, s in zip(values, graph.states, strict=True)]
        self.grain = max(ALIGNED // math.gcd(ALIGNED, size) for size in sizes)  # slots: what blocks begin at a multiple of
        wanted = placement.sessions * 3 // 2 * self.grain + ROUNDS * rows
        most = min(placement.room // (2 * max(1, self.row_bytes)), PLACES // (2 * max(1, *values)))
        each = max(self._whole(8), min(most - most % self.grain, self._whole(wanted)))
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

    def take(self, count: int, after: int | None = None) -> Held | None:
        """Slots for a block; None where there is no room. `after`: where the rows lie now, see Slots.take."""
        with self._lock:
            self._bury()
            start = self.slots.take(self._whole(count), after)
        return None if start is None else Held(self, start, count)

    def block(self, places: Places, count: int) -> int | None:
        """The first slot of `count` that can be bound as a block, of which those rows are the first; None where they lie otherwise."""
        start = places.block(count)
        return None if start is None or start % self.grain or start + count > self.slots.count else start

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
            pieces = [] if crowded else self.slots.take_last(len(rows) * self.grain)
            blocks = [[Held(self, at, 1) for at in range(start, start + count, self.grain)] for start, count in pieces]
        settled: list[Rows] = []
        for some in blocks:
            places = self.find(rows[len(settled) : len(settled) + len(some)])
            self._move(places.each(self.grain), some[0].start, len(some) * self.grain, apart=True)
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

    def tidy(self) -> Slots:
        """The slots, less those that nobody holds any more."""
        with self._lock:
            self._bury()
        return self.slots

    def _bury(self) -> None:
        while self.dead:
            start, count = self.dead.popleft()
            self.slots.free(start, self._whole(count))

    def _whole(self, count: int) -> int:
        """So many slots, made up to where the next block may begin."""
        return -(-count // self.grain) * self.grain

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

    def each(self, times: int) -> Places:
        """Each row so many times."""
        if times == 1:
            return self
        return Places(self._flat, *(np.repeat(part, times) for part in (self._starts, self._counts, self._at)))

    def cells(self, before: int, apart: bool) -> Array:
        """Of an array whose rows lie behind `before` others, the pieces [before, rows] to pick; `apart` [rows, before]."""
        if before == 1:
            return self._starts + self._at
        found = (self._starts * before + self._at)[:, None] + self._counts[:, None] * np.arange(before)
        return np.ascontiguousarray(found if apart else found.T).reshape(-1)


def shape_of(state: State, rows: int) -> tuple[int, ...]:
    return tuple(rows if axis == BATCH else int(axis) for axis in state.axes)
