"""The proof of an export: the server's own graph runner against PyTorch, over rows × lengths × cuttings × states.

It knows what must be equal and how nearly. It must not know any model, nor how graphs were made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from contract.bundle import TIME, Graph
from export import draw
from export.draw import Array, Values
from server.graph import OnnxGraph

ROWS = (1, 2, 3, 8, 17)
TIMES = (1, 2, 7, 33)

# A float32 of size 1 has an eps of 1.2e-7; a few hundred additions in another order lose some tens of them.
ABSOLUTE, RELATIVE = 2e-5, 1e-4


class VerifyError(ValueError):
    """The exported graph computes something else than PyTorch; the message is a table of what differs."""

    def __init__(self, differences: Sequence[Difference]) -> None:
        self.differences = tuple(differences)
        super().__init__(table(differences))


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that is further from PyTorch's than allowed."""

    graph: str
    case: str
    name: str
    shape: tuple[int, ...]
    error: float  # largest absolute
    allowed: float  # at that element


@dataclass(slots=True)
class Proof:
    """What was compared for one graph, and what was found."""

    graph: str
    cases: int = 0
    error: float = 0.0  # largest absolute difference from PyTorch, floating tensors
    batched_is_alone: bool = True  # bit for bit
    cut_is_whole: bool | None = None  # bit for bit; None where the graph is not cut
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """For bundle.json."""
        found: dict[str, Any] = {
            "cases": self.cases, "rows": list(ROWS), "largest_error": self.error,
            "allowed": {"absolute": ABSOLUTE, "relative": RELATIVE}, "batched_is_alone": self.batched_is_alone,
        }  # fmt: skip
        return found if self.cut_is_whole is None else {**found, "cut_is_whole": self.cut_is_whole}


def verify(name: str, graph: Graph, module: nn.Module, runner: OnnxGraph, seed: int = 0) -> Proof:
    """Compare an exported graph with its module. Raises VerifyError where they differ more than rounding explains.

    That rows do not depend on each other, and not on cutting, is found bit for bit and reported, not raised.
    """
    random = np.random.default_rng(seed)
    proof = Proof(name)
    cuttable = graph.cut and graph.max_time > 1 and any(t.time_axis is not None for t in graph.data)
    if cuttable:
        proof.cut_is_whole = True
    has_time = any(TIME in t.axes for t in graph.inputs)
    times = sorted({min(t, graph.max_time) for t in TIMES}) if has_time else [1]
    for count in ROWS:
        for time in times:
            rows = _rows(graph, runner, count, time, random)
            case = f"{count} rows, {time} steps"
            together = _run(graph, runner, rows, time)
            _against_torch(proof, graph, module, rows, time, together, case)
            alone = [_run(graph, runner, [r], time)[0] for r in rows]
            if not _same(together, alone):
                proof.batched_is_alone = False
                proof.notes.append(f"{case}: rows run together differ in their last bits from rows run alone")
            if cuttable and time > 1:
                ends = sorted({*random.integers(1, time, min(3, time - 1)).tolist(), time})
                pieces = _run_cut(graph, runner, rows, ends)
                if not _same(together, pieces):
                    proof.cut_is_whole = False
                    proof.notes.append(f"{case}: cut at {ends[:-1]} differs in the last bits from the whole")
                    _near(proof, graph, pieces, together, f"{case}, cut at {ends[:-1]}")
            proof.cases += 1
    if proof.differences:
        raise VerifyError(proof.differences)
    return proof


def settled(graph: Graph, proof: Proof) -> Graph:
    """The contract with what the proof found: rows that depend on their batch-mates are not shared among callers."""
    return graph if proof.batched_is_alone else replace(graph, shared=False)


def table(differences: Iterable[Difference]) -> str:
    """Differences as aligned lines under a heading."""
    lines = [("graph", "case", "tensor", "shape", "largest error", "allowed")]
    lines += [(d.graph, d.case, d.name, str(list(d.shape)), f"{d.error:.3g}", f"{d.allowed:.3g}") for d in differences]
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _rows(graph: Graph, runner: OnnxGraph, count: int, time: int, random: np.random.Generator) -> list[dict[str, Array]]:
    """Rows with random inputs and random states: fresh, or reached by reading something, then moved off it."""
    rows: list[dict[str, Array]] = []
    for place, size in enumerate(draw.sizes(graph, count, time, random)):
        states: Values = draw.fresh(graph)
        if graph.states and place % 3:
            before = min(int(random.integers(1, 9)), graph.max_time)
            prior = draw.row(graph, draw.Sizes(before, size.named), random) | dict(states)
            reached = _run(graph, runner, [prior], before)[0]
            states = {s.input: reached[s.output] for s in graph.states}
            states = draw.scaled(graph, states, random) if place % 3 == 1 else states
        rows.append(draw.row(graph, size, random) | dict(states))
    draw.constants_alike(graph, rows)
    return rows


def _run(graph: Graph, runner: OnnxGraph, rows: Sequence[Values], time: int) -> list[dict[str, Array]]:
    results = runner.run(draw.stack(graph, rows, [time] * len(rows)))
    return draw.split(graph, rows, results)


def _run_cut(graph: Graph, runner: OnnxGraph, rows: Sequence[Values], ends: Sequence[int]) -> list[dict[str, Array]]:
    """The same rows in pieces that end at `ends`; outputs along time are laid end to end, others are the last piece's."""
    current = [dict(r) for r in rows]
    outputs: list[list[dict[str, Array]]] = [[] for _ in rows]
    start = 0
    for end in ends:
        for r, row in zip(current, rows, strict=True):
            for t in graph.data:
                if t.time_axis is not None:
                    r[t.name] = row[t.name].take(range(start, end), t.time_axis)
        for r, got, kept in zip(current, _run(graph, runner, current, end - start), outputs, strict=True):
            kept.append(got)
            r.update({s.input: got[s.output] for s in graph.states})
        start = end
    whole: list[dict[str, Array]] = []
    for kept in outputs:
        joined = dict(kept[-1])
        for t in graph.outputs:
            if t.time_axis is not None:
                joined[t.name] = np.concatenate([k[t.name] for k in kept], t.time_axis)
        whole.append(joined)
    return whole


def _against_torch(
    proof: Proof, graph: Graph, module: nn.Module, rows: Sequence[Values], time: int, got: list[dict[str, Array]], case: str
) -> None:
    feeds = draw.stack(graph, rows, [time] * len(rows))
    order = [t.name for t in graph.inputs] + [s.input for s in graph.states]
    with torch.no_grad():
        results = module(*(torch.from_numpy(np.ascontiguousarray(feeds[n])) for n in order))
    _near(proof, graph, got, draw.split(graph, rows, [r.numpy() for r in results]), case)


def _near(proof: Proof, graph: Graph, got: list[dict[str, Array]], wanted: list[dict[str, Array]], case: str) -> None:
    """Add to the proof each tensor's largest error, and as a difference what is over the limit; whole numbers must agree."""
    worst: dict[str, Difference] = {}
    for mine, theirs in zip(got, wanted, strict=True):
        for name, value in mine.items():
            reference = theirs[name]
            if value.shape != reference.shape or value.dtype != reference.dtype:
                worst[name] = Difference(proof.graph, case, name, value.shape, float("inf"), 0.0)
                continue
            if value.size == 0 or np.array_equal(value, reference, equal_nan=value.dtype.kind == "f"):
                continue
            floating = value.dtype.kind == "f"
            error = np.abs(value.astype(np.float64) - reference.astype(np.float64))
            error = np.where(np.isnan(error), np.inf, error)
            limit = ABSOLUTE + RELATIVE * np.abs(reference.astype(np.float64)) if floating else np.zeros(error.shape)
            place = np.unravel_index(int(np.argmax(error - limit)), error.shape)
            if floating:
                proof.error = max(proof.error, float(error.max()))
            if error[place] > limit[place] and (name not in worst or error[place] > worst[name].error):
                worst[name] = Difference(proof.graph, case, name, value.shape, float(error[place]), float(limit[place]))
    proof.differences += worst.values()


def _same(one: Sequence[Values], other: Sequence[Values]) -> bool:
    """Bit for bit, so that NaN equals NaN and 0.0 is not -0.0."""
    return all(a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes() for a, b in zip(one, other, strict=True) for n in a)
