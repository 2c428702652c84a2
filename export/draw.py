"""Random values that a contract allows, row by row, and how rows lie beside each other in a round.

It knows axes; it must not know torch, onnx or any model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from contract.bundle import BATCH, TIME, Axis, Graph, Tensor, is_ragged

Array = np.ndarray[Any, Any]
Values = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How long a row is along each named axis: the steps in time, and by axis name everything else."""

    time: int
    named: Mapping[str, int] = field(default_factory=dict)

    def of(self, axis: Axis) -> int:
        if isinstance(axis, int):
            return axis
        return 1 if axis == BATCH else self.time if axis == TIME else self.named[axis]


def names(graph: Graph) -> tuple[str, ...]:
    """The axes of a graph's inputs that are neither rows, time nor numbers, ragged ones as they are written."""
    axes = (a for t in graph.inputs for a in t.axes)
    return tuple(dict.fromkeys(a for a in axes if isinstance(a, str) and a not in (BATCH, TIME)))


def sizes(graph: Graph, rows: int, time: int, random: np.random.Generator) -> list[Sizes]:
    """Sizes for rows that may share a round: ragged axes differ from row to row, other names are equal."""
    shared = {a: int(random.integers(1, 12)) for a in names(graph) if not is_ragged(a)}
    ragged = [a for a in names(graph) if is_ragged(a)]
    return [Sizes(time, {**shared, **{a: int(random.integers(1, 12)) for a in ragged}}) for _ in range(rows)]


def telling_sizes(graph: Graph, others: Iterable[int]) -> list[Sizes]:
    """Sizes for an example round in which no length equals another one, 1, 2 or any of `others`."""
    every = [t.axes for t in (*graph.inputs, *graph.outputs)] + [s.axes for s in graph.states]
    taken = {1, 2, *others, *(a for axes in every for a in axes if isinstance(a, int))}
    free = (n for n in itertools.count(3) if n not in taken)
    rows, time = next(free), min(next(free), graph.max_time)
    shared = {a: next(free) for a in names(graph) if not is_ragged(a)}
    found = [Sizes(time, {**shared, **{a: 1 for a in names(graph) if is_ragged(a)}}) for _ in range(rows)]
    for a in (a for a in names(graph) if is_ragged(a)):  # the first row's cells fill up to a total that tells
        total = next(n for n in free if n > rows)
        found[0] = Sizes(time, {**found[0].named, a: total - rows + 1})
    return found


def row(graph: Graph, size: Sizes, random: np.random.Generator) -> dict[str, Array]:
    """One row's data inputs, within low and high; those without a batch axis too."""
    return {t.name: _values(t, [size.of(a) for a in t.axes], random) for t in graph.data}


def _values(tensor: Tensor, shape: Sequence[int], random: np.random.Generator) -> Array:
    kind = tensor.numpy_dtype
    if kind.kind == "b":
        return random.integers(0, 2, shape).astype(kind)
    if kind.kind in "iu":
        low = 0 if tensor.low is None else int(tensor.low)
        high = low + 7 if tensor.high is None else int(tensor.high)
        return random.integers(low, high, shape, endpoint=True).astype(kind)
    if tensor.low is None or tensor.high is None:
        drawn = random.normal(size=shape)
        return np.clip(drawn, tensor.low, tensor.high).astype(kind)
    return random.uniform(tensor.low, tensor.high, shape).astype(kind)


def constants_alike(graph: Graph, rows: Sequence[dict[str, Array]]) -> None:
    """Give every row the first one's constants of the round, without which they may not run together."""
    for t in graph.data:
        if t.batch_axis is None:
            for other in rows[1:]:
                other[t.name] = rows[0][t.name]


def fresh(graph: Graph) -> dict[str, Array]:
    """The states of one row that has read nothing."""
    return {s.input: s.fresh(1) for s in graph.states}


def scaled(graph: Graph, states: Values, random: np.random.Generator) -> dict[str, Array]:
    """States moved off what the model itself reached: each element of a floating state times 0.5 to 1.5, but a state of
    whole numbers (a count of steps) as it is: a fraction of a step is no state the model can be in."""
    moved: dict[str, Array] = {}
    for s in graph.states:
        value = states[s.input]
        whole = value.dtype.kind != "f" or bool((value == np.rint(value)).all())
        moved[s.input] = value if whole else (value * random.uniform(0.5, 1.5, value.shape)).astype(value.dtype)
    return moved


def stack(graph: Graph, rows: Sequence[Values], times: Sequence[int]) -> dict[str, Array]:
    """The feeds of one round: rows side by side, ragged tensors end to end, the server's own inputs filled in."""
    feeds: dict[str, Array] = {}
    for s in graph.states:
        feeds[s.input] = np.concatenate([r[s.input] for r in rows], s.batch_axis)
    for t in graph.inputs:
        if t.role == "lengths":
            feeds[t.name] = np.array(times, t.numpy_dtype)
        elif t.role == "row":
            feeds[t.name] = np.repeat(np.arange(len(rows)), _cells(graph, t.axes[0], rows)).astype(t.numpy_dtype)
        elif t.batch_axis is None:
            feeds[t.name] = rows[0][t.name]
        else:
            feeds[t.name] = np.concatenate([r[t.name] for r in rows], t.batch_axis)
    return feeds


def split(graph: Graph, rows: Sequence[Values], results: Sequence[Array]) -> list[dict[str, Array]]:
    """Each row's own part of a round's results, by output name."""
    parts: list[dict[str, Array]] = [{} for _ in rows]
    named = [(t.name, t.axes) for t in graph.outputs] + [(s.output, s.axes) for s in graph.states]
    for (name, axes), result in zip(named, results, strict=True):
        axis = next(i for i, a in enumerate(axes) if a == BATCH or is_ragged(a))  # validate() refuses outputs without one
        widths = _cells(graph, axes[axis], rows) if is_ragged(axes[axis]) else [1] * len(rows)
        ends = np.cumsum(widths)[:-1].tolist()
        for part, value in zip(parts, np.split(result, ends, axis), strict=True):
            part[name] = value
    return parts


def _cells(graph: Graph, axis: Axis, rows: Sequence[Values]) -> list[int]:
    """How many cells of a ragged axis each row has, read off a data input that has it."""
    measured = next(t for t in graph.data if axis in t.axes)
    return [r[measured.name].shape[measured.axes.index(axis)] for r in rows]
