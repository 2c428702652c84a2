"""What a graph is tried with when it is loaded: that it gives what its contract promises, that a device answers as the CPU does, and
what its rounds cost, by rows and steps.

It runs graphs on made-up inputs; it must not know engines or callers.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from contract import tolerance
from contract.bundle import BATCH, TIME, Graph, Tensor, is_ragged
from server.errors import DeviceLost
from server.graph import Array, OnnxGraph
from server.inputs import spell
from server.states import Rows

log = logging.getLogger(__name__)

CELLS = 2  # the length of every other named axis in a trial
ROWS = (1, 4, 16, 64, 256, 1024, 4096)  # that rounds are timed with
STEPS = (1, 8, 32, 128)
NEAR_BEST = 0.9  # of the most row-steps a second: what comes so near in a shorter round is taken
LONGEST = 0.05  # seconds: who comes may wait for a round that has begun
ROUND = 0.02  # seconds: of one step
Clock = Callable[[], float]


def sample(tensor: Tensor, rows: int, steps: int) -> Array:
    """Values that a tensor may have: all the lowest allowed, or 0."""
    sizes = {BATCH: rows, TIME: steps}
    shape = [a if isinstance(a, int) else sizes.get(a, rows * CELLS if is_ragged(a) else CELLS) for a in tensor.axes]
    if tensor.role == "row":
        return np.repeat(np.arange(rows, dtype=tensor.numpy_dtype), CELLS)
    if tensor.role == "lengths":
        return np.full(rows, steps, tensor.numpy_dtype)
    if tensor.dtype == "string":
        return np.full(shape, "0", tensor.numpy_dtype)  # a text that graphs which read numbers can read too
    return np.full(shape, tensor.allowed, tensor.numpy_dtype)


def drawn(tensor: Tensor, rows: int, steps: int, rng: np.random.Generator) -> Array:
    """The same with values drawn from what is allowed, where they are numbers that a caller sends."""
    made = sample(tensor, rows, steps)
    if tensor.role != "data" or tensor.dtype == "string":
        return made
    if made.dtype.kind == "f":
        made[...] = np.clip(rng.normal(size=made.shape), tensor.low, tensor.high)
    elif made.dtype.kind in "iu" and tensor.high is not None:
        made[...] = rng.integers(int(tensor.allowed), int(tensor.high), made.shape, endpoint=True)
    return made


def drawing(graph: Graph) -> Callable[[], dict[str, Array]]:
    """Inputs of one row and step, others each time."""
    rng = np.random.default_rng(0)
    return lambda: {t.name: drawn(t, 1, 1, rng) for t in graph.inputs}


def first_run(onnx: OnnxGraph) -> tuple[list[str], list[tuple[int, float]]]:
    """Warm up with one row and with several, and see that the outputs have the promised forms; what is wrong, and by rows the
    seconds that a step took."""
    graph = onnx.graph
    times = []
    for rows, steps in ((1, 1), (min(3, graph.max_rows), min(2, graph.max_time))):
        feeds = {t.name: sample(t, rows, steps) for t in graph.inputs}
        states = {s.input: s.fresh(rows) for s in graph.states}
        carried = [onnx.fresh(rows)] if graph.states else []
        try:
            results = onnx.run(feeds | states)
            onnx.advance(dict(feeds), carried)
            times.append((rows, onnx.advance(dict(feeds), carried)[2] / steps))
        except Exception as e:  # onnxruntime raises its own types, all of them straight from Exception
            return [f"does not run with {rows} rows of {steps} steps: {str(e)[:300]}"], []
        sizes = {BATCH: rows, TIME: steps}
        promised = [(t.name, t.axes, spell(t)) for t in graph.outputs]
        promised += [(s.output, s.axes, f"{s.dtype} {list(s.axes)}") for s in graph.states]
        for (name, axes, text), array in zip(promised, results, strict=True):
            wanted = [a if isinstance(a, int) else sizes.get(a, rows * CELLS if is_ragged(a) else CELLS) for a in axes]
            if list(array.shape) != wanted:
                return [f"output {name!r} is {list(array.shape)} for {rows} rows of {steps} steps; promised is {text}"], []
    return [], times


def agree(onnx: OnnxGraph, reference: OnnxGraph, stated: Mapping[str, float]) -> list[str]:
    """Where a graph on its device answers otherwise than on the CPU, by more than the bundle states: some rounds of drawn inputs,
    each from the states that the one before left."""
    graph = onnx.graph
    rng = np.random.default_rng(0)
    for rows, steps in ((1, 1), (min(5, graph.max_rows), min(7, graph.max_time))):
        mine, theirs = [onnx.fresh(rows)] if graph.states else [], [reference.fresh(rows)] if graph.states else []
        for _ in range(3):
            feeds = {t.name: drawn(t, rows, steps, rng) for t in graph.inputs}
            found, bank, _ = onnx.advance(dict(feeds), mine)
            wanted, other, _ = reference.advance(dict(feeds), theirs)
            names = [t.name for t in graph.outputs]
            if graph.states:
                mine, theirs = [Rows(graph.state_axes, bank, 0, rows)], [Rows(graph.state_axes, other, 0, rows)]
                found, wanted = (*found, *mine[0].arrays()), (*wanted, *theirs[0].arrays())
                names += [s.output for s in graph.states]
            for name, one, other_one in zip(names, found, wanted, strict=True):
                if (times := tolerance.excess(one, other_one, stated)) > 1:
                    most = ", ".join(f"{k} {v:g}" for k, v in stated.items())
                    return [f"{name!r} on {onnx.device} is off the CPU's by {times:.2g} times what the bundle states ({most})"]
    return []


@dataclass(frozen=True, slots=True)
class Point:
    """What a round of so many rows and steps takes."""

    rows: int
    steps: int
    seconds: float

    @property
    def rate(self) -> float:
        """Row-steps a second."""
        return self.rows * self.steps / self.seconds


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large rounds are to be."""

    rows: int
    chunk: int
    share: int  # the fewest rows that are worth a round of their own: fewer take hardly less time


def measure(onnx: OnnxGraph, seconds: float, most_rows: int = ROWS[-1], clock: Clock = time.perf_counter) -> list[Point]:
    """Time rounds, from few rows to many, each from the states that the one before left; about so many seconds in all, none
    longer than anyone should wait, and none larger than what doesn't fit the device's memory. Raises what the first one raises."""
    graph = onnx.graph
    points: list[Point] = []
    until = clock() + seconds
    for steps in STEPS:
        if steps > 1 and (not graph.cut or steps > graph.max_time or not any(t.time_axis is not None for t in graph.data)):
            break
        for rows in ROWS:
            if rows > min(most_rows, graph.max_rows) or (rows > 1 and not graph.shared) or (points and clock() > until):
                break
            try:
                took = _best(onnx, rows, steps, clock, until)
            except Exception as e:  # onnxruntime raises its own types, all of them straight from Exception
                if not points or isinstance(e, DeviceLost):
                    raise
                log.warning(
                    "%s: rounds of %d rows and %d steps can't be run here, smaller ones can: %s", graph.file, rows, steps, str(e)[:300]
                )
                break
            points.append(Point(rows, steps, took))
            if took > LONGEST:
                break
    return points


def _best(onnx: OnnxGraph, rows: int, steps: int, clock: Clock, until: float) -> float:
    graph = onnx.graph
    feeds = {t.name: sample(t, rows, steps) for t in graph.inputs}
    carried = [onnx.fresh(rows)] if graph.states else []
    best = float("inf")
    for turn in range(6):  # the first two set things up: memory, and what a shape needs
        _, bank, took = onnx.advance(dict(feeds), carried)
        if graph.states:
            carried = [Rows(graph.state_axes, bank, 0, rows)]
        if turn > 1 or took > LONGEST:
            best = min(best, took)
        if best < float("inf") and clock() > until:
            break
    return best


def choose(points: Sequence[Point]) -> Sizes:
    """The sizes of rounds by what was measured: the fewest rows, and then the fewest steps, that come near the best rate, in rounds
    that nobody waits too long for. Pure."""
    single = [p for p in points if p.steps == 1]
    bearable = [p for p in single if p.seconds <= ROUND] or [min(single, key=lambda p: p.seconds)]
    best = max(p.rate for p in bearable)
    rows = min(p.rows for p in bearable if p.rate >= NEAR_BEST * best)
    whole = [p for p in points if p.rows == rows and (p.seconds <= LONGEST or p.steps == 1)]
    best = max(p.rate for p in whole)
    chunk = min(p.steps for p in whole if p.rate >= NEAR_BEST * best)
    one = min(p.seconds for p in single if p.rows == 1)
    share = max(p.rows for p in single if p.rows <= rows and (p.seconds <= 2 * one or p.rows == 1))
    return Sizes(rows, chunk, share)


def table(points: Sequence[Point]) -> str:
    """Milliseconds by rows and steps, for a log."""
    steps = sorted({p.steps for p in points})
    found = {(p.rows, p.steps): p.seconds * 1e3 for p in points}
    lines = [f"{'rows':>8}" + "".join(f"{s:>8} st." for s in steps)]
    for rows in sorted({p.rows for p in points}):
        lines.append(f"{rows:>8}" + "".join(f"{found[rows, s]:>12.3f}" if (rows, s) in found else f"{'–':>12}" for s in steps))
    return "\n".join(lines)


class Notes:
    """Measurements kept in a file, so that a restart needs none: by what they were taken of."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def get(self, key: str) -> list[Point] | None:
        """What was noted; nothing where the file isn't there, or isn't one of these."""
        try:
            return [Point(int(rows), int(steps), float(seconds)) for rows, steps, seconds in self._read()[key]] or None
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def put(self, key: str, points: Sequence[Point]) -> None:
        """Note it; a file that can't be written costs a warning, and the next start the measuring."""
        try:
            known = self._read()
        except (OSError, ValueError):
            known = {}
        known = known if isinstance(known, dict) else {}
        known[key] = [(p.rows, p.steps, p.seconds) for p in points]
        part = self._file.with_name(self._file.name + ".part")
        try:
            part.write_text(json.dumps(known, indent=1))
            part.replace(self._file)
        except OSError as e:
            log.warning("what was measured can't be kept in %s: %s", self._file, e)

    def _read(self) -> Any:
        return json.loads(self._file.read_text(encoding="utf-8"))


__all__ = ["Graph", "Notes", "Point", "Sizes", "agree", "choose", "drawn", "first_run", "measure", "sample", "table"]
