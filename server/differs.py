"""What runs of a graph show of it: whether a sequence may be cut, whether rows alter each other, whether what a row is filled up with does.

Inputs are drawn; knows a contract and a file that runs, and must not know where either comes from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from contract.bundle import BATCH, TIME, Graph, Tensor
from server.graph import OnnxFile

Array = np.ndarray[Any, Any]
Values = dict[str, Array]

# Cut and whole, alone and together are the same additions in another order; a wrong contract is off by far more.
ABSOLUTE, RELATIVE = 1e-4, 1e-3

RATE = re.compile(r"(sr|fs|.*(sample|sampling)_?(rate|freq).*)", re.IGNORECASE)
"""Names of inputs that are a sample rate, and so no number to be drawn."""
USUAL_RATE = 16000


def cut_differs(onnx: OnnxFile, graph: Graph, seed: int = 1, trials: int = 2) -> list[str]:
    """The outputs and states that differ between a sequence run whole and in pieces, states carried over."""
    random = np.random.default_rng(seed)
    wrong: dict[str, None] = {}
    for trial in range(trials):
        rows, steps = min(graph.max_rows, 1 + trial), 9 + 4 * trial
        inputs = draw(graph, rows, steps, random)
        ends = [*sorted(random.choice(np.arange(1, steps), 2 + trial, replace=False).tolist()), steps]
        try:
            whole, pieces = _run_cut(onnx.run, graph, inputs, [steps]), _run_cut(onnx.run, graph, inputs, ends)
        except ValueError:
            return [t.name for t in graph.outputs]
        wrong.update(dict.fromkeys(n for n in whole if not near(whole[n], pieces[n])))
    return list(wrong)


def batch_differs(onnx: OnnxFile, graph: Graph, seed: int = 2) -> list[str]:
    """The outputs and states of which a row differs between a run with others and one alone."""
    rows, steps = 3, min(5, graph.max_time)
    inputs = draw(graph, rows, steps, np.random.default_rng(seed))
    together = onnx.run(inputs | fresh(graph, rows))
    wrong: dict[str, None] = {}
    named = [(t.name, t.batch_axis) for t in graph.outputs] + [(s.output, s.batch_axis) for s in graph.states]
    for row in range(rows):
        mine = {t.name: _row(inputs[t.name], t.batch_axis, row) for t in graph.inputs}
        alone = onnx.run(mine | fresh(graph, 1))
        wrong.update(dict.fromkeys(n for n, axis in named if not near(_row(together[n], axis, row), alone[n])))
    return list(wrong)


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


def near(one: Array, other: Array) -> bool:
    """Whether two arrays are one but for rounding."""
    return one.shape == other.shape and np.allclose(one, other, RELATIVE, ABSOLUTE, equal_nan=one.dtype.kind == "f")


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
