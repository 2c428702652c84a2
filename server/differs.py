"""What runs of a graph show of it: whether a sequence may be cut, whether rows alter each other, whether what a row is filled up with does.

Inputs are drawn; knows a contract and a file that runs, and must not know where either comes from.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from contract.bundle import BATCH, TIME, Graph, Tensor
from server.graph import OnnxFile

Array = np.ndarray[Any, Any]
Values = dict[str, Array]

# Cut and whole, alone and together are the same additions in another order; a wrong contract is off by far more. Of what is small
# throughout, so much of its largest value; and of what is kept in 16 bits, some of their last.
ABSOLUTE, RELATIVE = 1e-4, 1e-3
LAST_BITS = 4

LONG = (1025, 257, 65)
"""Steps of a sequence that is cut once more: an output may look far back, as to the same hour of yesterday, past what short ones show."""
PATIENCE = 2.0  # seconds for that: of these lengths the first that is expected to take no longer, or the last

RATE = re.compile(r"(sr|fs|.*(sample|sampling)_?(rate|freq).*)", re.IGNORECASE)
"""Names of inputs that are a sample rate, and so no number to be drawn."""
USUAL_RATE = 16000


@dataclass(slots=True)
class Differences:
    """What runs of the same showed. `wrong`: outputs and states that came to something else. `rounded`: those that are the same but
    for rounding. `steps`: of the longest sequence that was looked at."""

    wrong: dict[str, None] = field(default_factory=dict)
    rounded: dict[str, None] = field(default_factory=dict)
    steps: int = 0

    def see(self, name: str, one: Array, other: Array, all: Array | None = None) -> None:
        """Hold a value against what it should be, which may be a part of `all`."""
        if one.shape == other.shape and np.array_equal(one, other, equal_nan=one.dtype.kind == "f"):
            return
        (self.rounded if near(one, other, all) else self.wrong)[name] = None


def cut_differs(onnx: OnnxFile, graph: Graph, seed: int = 1, trials: int = 2) -> Differences:
    """A sequence run whole against one run in pieces, states carried over: short ones, and if these are equal a long one."""
    random = np.random.default_rng(seed)
    found = Differences()
    for trial in range(trials):
        rows, steps = min(graph.max_rows, 1 + trial), min(9 + 4 * trial, graph.max_time)
        ends = [*sorted(random.choice(np.arange(1, steps), min(2 + trial, steps - 1), replace=False).tolist()), steps]
        _see_cut(onnx, graph, draw(graph, rows, steps, random), ends, found)
    if not found.wrong and graph.max_time > found.steps:
        steps = min(_bearable(onnx, graph, random), graph.max_time)
        third = steps // 3
        _see_cut(onnx, graph, draw(graph, 1, steps, random), [third, third + 1, 2 * third, steps], found)
    return found


def _see_cut(onnx: OnnxFile, graph: Graph, inputs: Values, ends: Sequence[int], found: Differences) -> None:
    try:
        whole, pieces = _run_cut(onnx.run, graph, inputs, ends[-1:]), _run_cut(onnx.run, graph, inputs, ends)
    except ValueError:
        found.wrong.update(dict.fromkeys(t.name for t in graph.outputs))
        return
    found.steps = max(found.steps, ends[-1])
    for name in whole:
        found.see(name, pieces[name], whole[name])


def _bearable(onnx: OnnxFile, graph: Graph, random: np.random.Generator) -> int:
    """How long a sequence may be that is run twice."""
    steps = min(LONG[-1], graph.max_time)
    inputs = draw(graph, 1, steps, random) | fresh(graph, 1)
    began = time.perf_counter()
    try:
        onnx.run(inputs)
    except ValueError:
        return steps
    step = (time.perf_counter() - began) / steps
    return next((length for length in LONG if 2 * length * step <= PATIENCE), LONG[-1])


def batch_differs(onnx: OnnxFile, graph: Graph, seed: int = 2) -> Differences:
    """A row of a run with others against one alone; among few rows, and among as many as have products of matrices go another way."""
    random = np.random.default_rng(seed)
    found = Differences()
    named = [(t.name, t.batch_axis) for t in graph.outputs] + [(s.output, s.batch_axis) for s in graph.states]
    for rows, steps in ((3, 5), (8, 7), (17, 2)):
        rows, steps = min(rows, graph.max_rows), min(steps, graph.max_time)
        inputs = draw(graph, rows, steps, random)
        together = onnx.run(inputs | fresh(graph, rows))
        for row in range(rows):
            mine = {t.name: _row(inputs[t.name], t.batch_axis, row) for t in graph.inputs}
            alone = onnx.run(mine | fresh(graph, 1))
            for name, axis in named:
                found.see(name, _row(together[name], axis, row), alone[name], together[name])
    return found


def padded_differs(onnx: OnnxFile, graph: Graph, seed: int = 3) -> list[str]:
    """The outputs and states of which a row differs between a run with a longer one, filled up, and one alone."""
    random = np.random.default_rng(seed)
    steps = (3, min(7, graph.max_time))
    inputs = draw(graph, 2, max(steps), random)
    given = {t.name: np.array(steps, t.numpy_dtype) if t.role == "lengths" else inputs[t.name] for t in graph.inputs}
    together = onnx.run(given | fresh(graph, 2))
    wrong: dict[str, None] = {}
    for row, own in enumerate(steps):
        mine = {t.name: between(t, _row(inputs[t.name], t.batch_axis, row), 0, own) for t in graph.inputs}
        alone = onnx.run(mine | fresh(graph, 1))
        for t in graph.outputs:
            found = _row(together[t.name], t.batch_axis, row)
            found = found if t.time_axis is None else found.take(range(own), t.time_axis)
            wrong.update({} if near(found, alone[t.name]) else {t.name: None})
        states = [(s.output, _row(together[s.output], s.batch_axis, row)) for s in graph.states]
        wrong.update({name: None for name, found in states if not near(found, alone[name])})
    return list(wrong)


def _run_cut(run: Callable[[Mapping[str, Array]], Values], graph: Graph, inputs: Values, ends: Sequence[int]) -> Values:
    """Outputs along time laid end to end, the last piece's others, and the last states."""
    rows = next(inputs[t.name].shape[t.batch_axis] for t in graph.inputs if t.batch_axis is not None)
    states = fresh(graph, rows)
    pieces: list[Values] = []
    start = 0
    for end in ends:
        part = {t.name: between(t, inputs[t.name], start, end) for t in graph.inputs}
        pieces.append(run(part | states))
        states = {s.input: pieces[-1][s.output] for s in graph.states}
        start = end
    joined = {s.output: pieces[-1][s.output] for s in graph.states}
    for t in graph.outputs:
        parts = [piece[t.name] for piece in pieces]
        joined[t.name] = parts[-1] if t.time_axis is None else np.concatenate(parts, t.time_axis)
    return joined


def between(tensor: Tensor, value: Array, start: int, end: int) -> Array:
    """The steps from `start` to `end` of an input; all of what has no time axis."""
    if tensor.role == "lengths":
        return np.full_like(value, end - start)
    return value if tensor.time_axis is None else value.take(range(start, end), tensor.time_axis)


def _row(value: Array, axis: int | None, row: int) -> Array:
    return value if axis is None else value.take([row], axis)


def near(one: Array, other: Array, all: Array | None = None) -> bool:
    """Whether two arrays are one but for rounding, as large as the values of `all` let it be, or as those of `other`."""
    if one.shape != other.shape:
        return False
    if one.dtype.kind != "f":
        return np.array_equal(one, other)
    sizes = np.abs(other if all is None else all, dtype=np.float64)
    scale = min(1.0, float(np.max(sizes, initial=0.0, where=np.isfinite(sizes))))
    bits = LAST_BITS * float(np.finfo(one.dtype).eps)
    return np.allclose(one, other, max(RELATIVE, bits), max(ABSOLUTE, bits) * scale, equal_nan=True)


def fresh(graph: Graph, rows: int) -> Values:
    """The states of `rows` sequences that have read nothing, by input name."""
    return {s.input: s.fresh(rows) for s in graph.states}


def draw(graph: Graph, rows: int, steps: int, random: np.random.Generator) -> Values:
    """Inputs that any model should take: small numbers, ids 0 and 1, a usual sample rate."""
    sizes = {BATCH: rows, TIME: steps}
    drawn: Values = {}
    for t in graph.inputs:
        shape = [a if isinstance(a, int) else sizes.get(a, 2) for a in t.axes]
        if t.role == "lengths":
            value: Array = np.full(shape, steps)
        elif t.batch_axis is None and RATE.fullmatch(t.name):
            value = np.full(shape, USUAL_RATE)
        elif t.numpy_dtype.kind in "iub":
            value = random.integers(0, 2, shape)
        else:
            value = np.asarray(random.normal(size=shape))
        drawn[t.name] = np.asarray(value, t.numpy_dtype)
    return drawn
