"""A sequence: one caller's work advancing in time; and how several become one round's tensors, and part again.

`stack` and `carried` go before a run, `split` after it. Pure numpy; knows the contract, no engine, no clock, no gRPC.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Listed
from typing import Any

import numpy as np

from contract.bundle import Graph, Tensor
from server.errors import ServeError
from server.inputs import Sizes, check_values
from server.states import Bank, Block, Rows
from server.tickets import Ticket

Array = np.ndarray[Any, Any]
Inputs = Mapping[str, Array]
Outputs = Mapping[str, Array]
Packed = tuple[bytes, ...]
"""Inputs as they came over the wire, in the graph's order, one row's after another's: looked at and turned into numbers once a
round, for all its rows together. Only where `Graph.packed` says that they can be, and of the right lengths; values are checked in
the round."""


class Sequence(Ticket):
    """Pending inputs on one graph, the state so far, and what to do when the steps are done; and its place in the queue.

    `then(self, outputs)` is called once all pending steps ran, from the thread that ran them: it answers the caller, or
    calls `go_on` with what comes next (another graph, the next token) and the engine takes it up at once. `failed` is
    called instead, once, where that can't be. Both must be quick and must not block.
    """

    __slots__ = (
        "apart", "cells", "done", "engine", "failed", "going", "inputs", "named", "parts", "queued", "rounds", "run", "since", "state",
        "steps", "then",
    )  # fmt: skip

    def __init__(
        self,
        graph: str,
        inputs: Inputs | Packed,
        sizes: Sizes,
        then: Callable[[Sequence, Views], None],
        failed: Callable[[ServeError], None],
        state: Rows | None = None,
    ) -> None:
        self.order = 0.0  # of the ticket: it is queued nowhere yet
        self.count = 1
        self.apart: Listed[Rows | None] = ()  # its rows' states where they lie apart, until its first round leaves them side by side
        self.deadline = None
        self.gone = self.running = self.waiting = False
        self.engine: Any = None  # that has it, where a model has several
        self.remaining = 0
        self.then = then
        self.failed = failed
        self.queued = 0.0  # seconds waited for rounds
        self.run = 0.0  # seconds in rounds
        self.rounds = 0
        self.since = 0.0
        self.go_on(graph, inputs, sizes, state)

    def go_on(self, graph: str, inputs: Inputs | Packed, sizes: Sizes, state: Rows | None = None, cells: Listed[int] | None = None) -> None:
        """Set what runs next: `sizes.steps` steps of `inputs`, from `state` (None: fresh).

        `cells` gives each row's own length of the ragged inputs, where there are any.
        """
        self.graph = graph
        self.inputs = inputs
        self.rows = sizes.rows
        self.steps = sizes.steps
        self.named = sizes.named
        self.state = state
        self.cells = cells
        self.done = 0
        self.going = True
        self.parts: list[Part] = []

    def over(self) -> None:
        """Nothing comes after: it lets go of whom it told, who may know it, so that no ring is left for the garbage collector."""
        self.then = self.failed = _told

    def outputs(self, graph: Graph) -> Views:
        """What all rounds of the pending steps gave."""
        return Views(graph, self.parts, self.rows, self.steps if graph.padded else None)


def _told(*_: object) -> None:
    """Whoever a sequence belonged to was told of its end."""


class Results:
    """The outputs that one round gave all its rows."""

    __slots__ = ("_bytes", "arrays", "rows")

    def __init__(self, arrays: Listed[Array], rows: int) -> None:
        self.arrays = arrays
        self.rows = rows
        self._bytes: dict[int, bytes] = {}

    def bytes(self, output: int, row: int) -> bytes:
        """One row of an output whose first axis is the batch, as it lies in memory. Turned into bytes once for all rows."""
        whole = self._bytes.get(output)
        if whole is None:
            whole = self._bytes[output] = self.arrays[output].tobytes()
        size = len(whole) // self.rows
        return whole[row * size : (row + 1) * size]


Part = tuple[Results, int, int, int]
"""Where a sequence's share of a round lies: its first row, its first ragged cell, how many of these."""


class Views(Mapping[str, Array]):
    """A sequence's outputs by name: all steps' where a tensor has a time axis, the last round's where it has none.

    Views of whole rounds, made when they are asked for.
    """

    __slots__ = ("_graph", "_parts", "_rows", "_steps")

    def __init__(self, graph: Graph, parts: list[Part], rows: int, steps: int | None = None) -> None:
        self._graph = graph
        self._parts = parts
        self._rows = rows
        self._steps = steps  # its own, where the round may have run more

    def __getitem__(self, name: str) -> Array:
        place = self._graph.place[name]
        tensor = self._graph.outputs[place]
        if len(self._parts) == 1 or tensor.time_axis is None:
            return self._share(tensor, place, self._parts[-1])
        return np.concatenate([self._share(tensor, place, part) for part in self._parts], tensor.time_axis)

    def __iter__(self) -> Iterator[str]:
        return iter(self._graph.place)

    def __len__(self) -> int:
        return len(self._graph.place)

    def row(self, row: int) -> Views:
        """One row's share of them. Not of ragged outputs."""
        return Views(self._graph, [(results, first + row, 0, 0) for results, first, _, _ in self._parts], 1, self._steps)

    def data(self, tensor: Tensor) -> tuple[bytes, tuple[int, ...]]:
        """A numeric output's values as bytes in C order, and its shape."""
        place = self._graph.place[tensor.name]
        if len(self._parts) == 1 and self._rows == 1 and tensor.batch_axis == 0 and not tensor.ragged and self._steps is None:
            results, row, _, _ = self._parts[0]
            return results.bytes(place, row), (1, *results.arrays[place].shape[1:])
        array = self[tensor.name]
        return array.tobytes(), array.shape

    def _share(self, tensor: Tensor, place: int, part: Part) -> Array:
        results, row, cell, cells = part
        array = results.arrays[place]
        if self._steps is not None and tensor.time_axis is not None and array.shape[tensor.time_axis] != self._steps:
            array = array[(slice(None),) * tensor.time_axis + (slice(0, self._steps),)]
        if results.rows == self._rows:
            return array
        axis = tensor.batch_axis
        assert axis is not None  # validate() refuses outputs without
        lo, n = (cell, cells) if tensor.ragged else (row, self._rows)
        return array[(slice(None),) * axis + (slice(lo, lo + n),)] if axis else array[lo : lo + n]


def order(graph: Graph, sequences: Listed[Sequence]) -> Listed[Sequence]:
    """The same sequences so that stacking their states copies least: rows of one bank together, as they lie in it."""
    if not graph.states or len(sequences) < 2:
        return sequences
    return sorted(sequences, key=_where)


def _where(s: Sequence) -> tuple[int, int]:
    state = s.apart[0] if s.apart else s.state
    if state is None:
        return (0, 0)
    bank = state.bank
    return (id(bank.home), bank.place + state.start) if isinstance(bank, Block) else (id(bank), state.start)


def stack(graph: Graph, sequences: Listed[Sequence], steps: int) -> dict[str, Array]:
    """The inputs of one round: each sequence's next `steps`, side by side; nothing padded, but where the graph says that it may be.

    Raises InvalidInput where packed inputs have values that the contract forbids, of whichever sequence.
    """
    feeds: dict[str, Array] = {}
    own = [min(steps, s.steps) for s in sequences] if graph.padded else None  # each one's steps
    if graph.packed is not None and all(type(s.inputs) is tuple for s in sequences):
        for place, tensor in enumerate(graph.inputs):
            feeds[tensor.name] = _packed(tensor, place, sequences, steps)
    else:
        for place, tensor in enumerate(graph.inputs):
            if tensor.role == "lengths":
                rows = [s.rows for s in sequences]
                feeds[tensor.name] = (
                    np.full(sum(rows), steps, tensor.numpy_dtype) if own is None else np.repeat(np.array(own, tensor.numpy_dtype), rows)
                )
            elif tensor.role == "row":
                cells = np.concatenate([_cells(s) for s in sequences])
                feeds[tensor.name] = np.repeat(np.arange(len(cells), dtype=tensor.numpy_dtype), cells)
            else:
                parts = [_part(tensor, place, s, steps) for s in sequences]
                if own is not None and tensor.time_axis is not None and min(own) < steps:
                    parts = [_filled(tensor, part, steps) for part in parts]
                axis = tensor.batch_axis
                feeds[tensor.name] = parts[0] if len(parts) == 1 or axis is None else np.concatenate(parts, axis)
    return feeds


def carried(graph: Graph, sequences: Listed[Sequence], fresh: Callable[[int], Rows]) -> list[Rows]:
    """Each sequence's state, one that has read nothing where it has none yet; nothing where the graph has no states."""
    if not graph.states:
        return []
    found: list[Rows] = []
    for s in sequences:
        if s.apart:
            found += [rows if rows is not None else fresh(1) for rows in s.apart]
        else:
            found.append(s.state if s.state is not None else fresh(s.rows))
    return found


def split(graph: Graph, sequences: Listed[Sequence], outputs: Listed[Array], bank: Bank, steps: int) -> None:
    """Give each sequence its rows of a round's outputs and next states."""
    axes = graph.state_axes
    shared = Results(outputs, sum([s.rows for s in sequences]))
    timed = graph.timed
    start = cell = 0
    for s in sequences:
        rows = s.rows
        cells = int(_cells(s).sum()) if s.cells is not None else 0
        s.done += steps
        s.state = Rows(axes, bank, start, rows)
        s.apart = ()
        part = (shared, start, cell, cells)
        if timed and s.parts:
            s.parts.append(part)
        else:
            s.parts = [part]
        start += rows
        cell += cells


def _packed(tensor: Tensor, place: int, sequences: Listed[Sequence], steps: int) -> Array:
    """All rows of the sequences, from bytes to numbers at once."""
    size = tensor.packed
    parts: list[bytes] = []
    rows = 0
    for s in sequences:
        assert isinstance(s.inputs, tuple)
        part = s.inputs[place]
        rows += s.rows
        if s.steps == steps or tensor.time_axis is None:
            parts.append(part)
        elif s.rows == 1:
            parts.append(part[s.done * size : (s.done + steps) * size])
        else:
            whole = s.steps * size
            parts += [part[at + s.done * size : at + (s.done + steps) * size] for at in range(0, s.rows * whole, whole)]
    array = np.frombuffer(parts[0] if len(parts) == 1 else b"".join(parts), tensor.numpy_dtype)
    check_values(tensor, array)
    return array.reshape((rows, steps, *tensor.axes[2:]) if tensor.time_axis == 1 else (rows, *tensor.axes[1:]))


def _part(tensor: Tensor, place: int, s: Sequence, steps: int) -> Array:
    if isinstance(s.inputs, tuple):
        return _packed(tensor, place, (s,), steps)
    array = s.inputs[tensor.name]
    axis = tensor.time_axis
    if axis is None or steps == s.steps:
        return array
    return array[(slice(None),) * axis + (slice(s.done, s.done + steps),)]


def _filled(tensor: Tensor, part: Array, steps: int) -> Array:
    """An input with steps added at its end, of values that the contract allows: what they are is never looked at."""
    axis = tensor.time_axis
    assert axis is not None
    more = steps - part.shape[axis]
    if not more:
        return part
    shape = [more if place == axis else size for place, size in enumerate(part.shape)]
    return np.concatenate((part, np.full(shape, tensor.allowed, tensor.numpy_dtype)), axis)


def _cells(s: Sequence) -> Array:
    assert s.cells is not None, "a ragged graph needs each row's length"
    return np.asarray(s.cells, np.int64)
