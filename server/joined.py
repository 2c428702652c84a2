"""Turns of one session that wait in line, run as one sequence: their inputs end to end, its outputs cut apart again.

Cutting a sequence changes nothing, so neither does joining; a round of several steps costs little more than a round of one.
Only where a turn's inputs and outputs all lie along the time axis, and come as they are from the wire. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from typing import Any

import numpy as np

from contract.bundle import Graph, Tensor
from server.inputs import Sizes
from server.sequence import Packed, Views

Array = np.ndarray[Any, Any]


def joinable(graph: Graph) -> bool:
    """Whether turns on that graph may be joined."""
    if not graph.cut or not graph.shared or graph.packed is None:
        return False
    return all(t.time_axis is not None for t in graph.inputs) and all(t.time_axis is not None for t in graph.outputs)


def join(parts: Listed[tuple[Packed, Sizes]]) -> tuple[Packed, Sizes]:
    """One row's inputs, end to end along time: packed bytes of one row lie in the order of its steps."""
    packed = tuple([b"".join(tensors) for tensors in zip(*[inputs for inputs, _ in parts], strict=True)])
    return packed, Sizes(1, sum([sizes.steps for _, sizes in parts]))


class Part(Views):
    """The outputs of steps `start` to `end` of a sequence of one row."""

    __slots__ = ("_end", "_start", "_whole")

    def __init__(self, graph: Graph, whole: dict[str, Array], start: int, end: int) -> None:
        super().__init__(graph, [], 1)
        self._whole = whole
        self._start = start
        self._end = end

    def __getitem__(self, name: str) -> Array:
        axis = self._graph.outputs[self._graph.place[name]].time_axis
        assert axis is not None, "joined only where every output has a time axis"
        return self._whole[name][(slice(None),) * axis + (slice(self._start, self._end),)]

    def data(self, tensor: Tensor) -> tuple[bytes, tuple[int, ...]]:
        array = self[tensor.name]
        return array.tobytes(), array.shape


def part(graph: Graph, outputs: Views, lengths: Listed[int]) -> list[Views]:
    """A joined sequence's outputs, by turn: `lengths` are the turns' steps, in order."""
    whole = {name: outputs[name] for name in outputs}
    parts: list[Views] = []
    start = 0
    for steps in lengths:
        parts.append(Part(graph, whole, start, start + steps))
        start += steps
    return parts
