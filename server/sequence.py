"""A sequence: one caller's work advancing in time; and how several become one round's tensors, and part again.

`stack` and `split` are inverses around a run. Pure numpy; knows the contract, no engine, no clock, no gRPC.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Listed
from typing import Any

import numpy as np

from contract.bundle import Graph, Tensor
from server.errors import ServeError
from server.inputs import Sizes
from server.rounds import Ticket
from server.states import Rows, fresh
from server.states import stack as stack_states

Array = np.ndarray[Any, Any]
Outputs = dict[str, Array]


class Sequence:
    """Pending inputs on one graph, the state so far, and what to do when the steps are done.

    `then(self, outputs)` is called once all pending steps ran, from the thread that ran them: it answers the caller, or
    calls `go_on` with what comes next (another graph, the next token) and the engine takes it up at once. `failed` is
    called instead, once, where that can't be. Both must be quick and must not block.
    """

    __slots__ = (
        "_kept", "_last", "cells", "done", "failed", "going", "graph", "inputs", "named", "queued", "rounds", "rows", "run",
        "since", "state", "steps", "then", "ticket",
    )  # fmt: skip

    def __init__(
        self,
        graph: str,
        inputs: Mapping[str, Array],
        sizes: Sizes,
        then: Callable[[Sequence, Outputs], None],
        failed: Callable[[ServeError], None],
        state: Rows | None = None,
    ) -> None:
        self.then = then
        self.failed = failed
        self.ticket: Ticket | None = None
        self.queued = 0.0  # seconds waited for rounds
        self.run = 0.0  # seconds in rounds
        self.rounds = 0
        self.since = 0.0
        self.go_on(graph, inputs, sizes, state)

    def go_on(
        self, graph: str, inputs: Mapping[str, Array], sizes: Sizes, state: Rows | None = None, cells: Listed[int] | None = None
    ) -> None:
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
        self._kept: dict[str, list[Array]] = {}
        self._last: Outputs = {}

    def take(self, graph: Graph, outputs: Outputs, state: Rows, steps: int) -> None:
        """What a round of `steps` gave this sequence."""
        self.done += steps
        self.state = state
        if self.done < self.steps or self._kept:
            for tensor in graph.outputs:
                if tensor.time_axis is not None:
                    self._kept.setdefault(tensor.name, []).append(outputs[tensor.name])
        self._last = outputs

    def outputs(self, graph: Graph) -> Outputs:
        """All steps' outputs where a tensor has a time axis, the last round's where it has none."""
        result = dict(self._last)
        for name, parts in self._kept.items():
            tensor = graph.output(name)
            assert tensor is not None
            assert tensor.time_axis is not None
            result[name] = np.concatenate(parts, tensor.time_axis)
        return result


def stack(graph: Graph, sequences: Listed[Sequence], steps: int) -> dict[str, Array]:
    """The feeds of one round: each sequence's next `steps`, side by side; nothing padded."""
    feeds: dict[str, Array] = {}
    for tensor in graph.inputs:
        if tensor.role == "lengths":
            feeds[tensor.name] = np.full(sum(s.rows for s in sequences), steps, tensor.numpy_dtype)
        elif tensor.role == "row":
            cells = np.concatenate([_cells(s) for s in sequences])
            feeds[tensor.name] = np.repeat(np.arange(len(cells), dtype=tensor.numpy_dtype), cells)
        else:
            parts = [_part(tensor, s, steps) for s in sequences]
            axis = tensor.batch_axis
            feeds[tensor.name] = parts[0] if len(parts) == 1 or axis is None else np.concatenate(parts, axis)
    if graph.states:
        rows = [s.state if s.state is not None else fresh(graph, s.rows) for s in sequences]
        for state, array in zip(graph.states, stack_states(graph, rows), strict=True):
            feeds[state.input] = array
    return feeds


def split(graph: Graph, sequences: Listed[Sequence], results: Listed[Array], steps: int) -> None:
    """Give each sequence its rows of a round's results (outputs, then next states), as views."""
    bank = tuple(results[len(graph.outputs) :])
    start = cell = 0
    alone = len(sequences) == 1
    for s in sequences:
        ragged = int(_cells(s).sum()) if s.cells is not None else 0
        outputs: Outputs = {}
        for tensor, array in zip(graph.outputs, results, strict=False):
            if alone:
                outputs[tensor.name] = array
                continue
            axis = tensor.batch_axis
            assert axis is not None  # validate() refuses outputs without
            lo, n = (cell, ragged) if tensor.ragged else (start, s.rows)
            outputs[tensor.name] = array[(slice(None),) * axis + (slice(lo, lo + n),)] if axis else array[lo : lo + n]
        s.take(graph, outputs, Rows(bank, start, s.rows), steps)
        start += s.rows
        cell += ragged


def _part(tensor: Tensor, s: Sequence, steps: int) -> Array:
    array = s.inputs[tensor.name]
    axis = tensor.time_axis
    if axis is None or steps == s.steps:
        return array
    return array[(slice(None),) * axis + (slice(s.done, s.done + steps),)]


def _cells(s: Sequence) -> Array:
    assert s.cells is not None, "a ragged graph needs each row's length"
    return np.asarray(s.cells, np.int64)
