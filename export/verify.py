"""The proof of an export: the server's own graph runner against PyTorch, over rows × lengths × cuttings × states.

It knows what must be equal and how nearly. It must not know any model, nor how graphs were made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
LONG = 513  # of one row, where a graph may be cut: what looks far back, as to the same hour of last week, shows in no short sequence

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
    cut_matters: bool = False  # pieces give another answer than the whole, beyond rounding
    mates_matter: bool | None = None  # rows together another than alone, beyond rounding; None: any bit is beyond it
    relative: float | None = None  # of a graph in another precision: largest difference of a tensor, by norms
    whole_numbers: float = 0.0  # of the same: the share of whole numbers that differ
    allowed: Mapping[str, float] = field(default_factory=lambda: {"absolute": ABSOLUTE, "relative": RELATIVE})
    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """For bundle.json."""
        found: dict[str, Any] = {
            "cases": self.cases, "rows": list(ROWS), "largest_error": self.error,
            "allowed": dict(self.allowed), "batched_is_alone": self.batched_is_alone,
        }  # fmt: skip
        if self.relative is not None:
            found |= {
                "largest_relative_norm": self.relative,
                "whole_numbers_that_differ": self.whole_numbers,
                "cut_matters": self.cut_matters,
            }
        return found if self.cut_is_whole is None else {**found, "cut_is_whole": self.cut_is_whole}


def verify(name: str, graph: Graph, module: nn.Module, runner: OnnxGraph, seed: int = 0) -> Proof:
    """Compare an exported graph with its module. Raises VerifyError where they differ more than rounding explains.

    That rows do not depend on each other, and not on cutting, is found bit for bit and reported, not raised.
    """
    proof = Proof(name)
    for case in _cases(proof, graph, runner, seed):
        _against_torch(proof, graph, module, case.rows, case.time, case.together, case.name)
        if case.pieces is not None:
            _near(proof, graph, case.pieces, case.together, f"{case.name}, cut at {case.ends}")
    if proof.differences:
        raise VerifyError(proof.differences)
    return proof


def compare(name: str, graph: Graph, before: OnnxGraph, runner: OnnxGraph, allowed: float, rounding: float = 0.0, seed: int = 0) -> Proof:
    """Compare a graph in another precision with the one it was made of. Raises VerifyError where a tensor is further from what
    it was than `allowed`, by the norms of the difference and of itself in one round.

    Whole numbers are counted where they differ, not refused: they may be ranks, and near ties change places. Where batching or
    cutting alters answers beyond rounding the proof says so, for `settled`: beyond `rounding` of the same norms, and where that
    is 0 as float32 rounds.
    """
    proof = Proof(name, relative=0.0, allowed={"relative_norm": allowed}, mates_matter=False if rounding else None)
    differ = numbers = 0
    for case in _cases(proof, graph, runner, seed):
        was = _run(graph, before, case.rows, case.time)
        for n, one, other in _pairs(case.together, was):
            if one.dtype.kind != "f":
                differ, numbers = differ + int((one != other).sum()), numbers + one.size
                continue
            off = _off(one, other)
            proof.error = max(proof.error, float(np.abs(one.astype(np.float64) - other).max(initial=0)))
            proof.relative = max(proof.relative or 0.0, off)
            if not off <= allowed:
                proof.differences.append(Difference(name, case.name, n, was[0][n].shape, off, allowed))
        if rounding:
            proof.mates_matter = proof.mates_matter or _apart(case.together, case.alone, rounding)
        if case.pieces is not None and rounding:
            proof.cut_matters |= _apart(case.pieces, case.together, rounding)
        elif case.pieces is not None:
            tried = Proof(name)
            _near(tried, graph, case.pieces, case.together, case.name)
            proof.cut_matters |= bool(tried.differences)
    proof.whole_numbers = differ / max(numbers, 1)
    if proof.differences:
        raise VerifyError(proof.differences)
    return proof


def _pairs(one: Sequence[Values], other: Sequence[Values]) -> Iterator[tuple[str, Array, Array]]:
    """By name, all rows' values of each side end to end."""
    for n in one[0]:
        yield n, np.concatenate([np.ravel(r[n]) for r in one]), np.concatenate([np.ravel(r[n]) for r in other])


def _off(one: Array, other: Array) -> float:
    """The norm of the difference by the norm of `other`; infinite where it is no number."""
    error = float(np.linalg.norm(one.astype(np.float64) - other))
    return error / (float(np.linalg.norm(other.astype(np.float64))) or 1.0) if np.isfinite(error) else float("inf")


def _apart(one: Sequence[Values], other: Sequence[Values], rounding: float) -> bool:
    return any(a.dtype.kind == "f" and _off(a, b) > rounding for _, a, b in _pairs(one, other))


def identical(graph: Graph, one: OnnxGraph, other: OnnxGraph, seed: int = 0) -> bool:
    """Whether two runners give the same bits."""
    return all(_same(case.together, _run(graph, other, case.rows, case.time)) for case in _cases(Proof(""), graph, one, seed))


@dataclass(frozen=True, slots=True)
class _Case:
    """Rows of one length that ran together and alone, and where they could be cut and the bits differed, in pieces too."""

    name: str
    rows: Sequence[Values]
    time: int
    together: list[dict[str, Array]]
    alone: list[dict[str, Array]]
    ends: Sequence[int] = ()
    pieces: list[dict[str, Array]] | None = None


def _cases(proof: Proof, graph: Graph, runner: OnnxGraph, seed: int) -> Iterator[_Case]:
    """Rows × lengths, each run together, alone and in pieces; the proof gets what is found bit for bit."""
    random = np.random.default_rng(seed)
    cuttable = graph.cut and graph.max_time > 1 and any(t.time_axis is not None for t in graph.data)
    if cuttable:
        proof.cut_is_whole = True
    has_time = any(TIME in t.axes for t in graph.inputs)
    times = sorted({min(t, graph.max_time) for t in TIMES}) if has_time else [1]
    for count in ROWS:
        for time in (*times, min(LONG, graph.max_time)) if cuttable and count == 1 and graph.max_time > times[-1] else times:
            rows = _rows(graph, runner, count, time, random)
            name = f"{count} rows, {time} steps"
            together = _run(graph, runner, rows, time)
            alone = [_run(graph, runner, [r], time)[0] for r in rows]
            case = _Case(name, rows, time, together, alone)
            if not _same(together, alone):
                proof.batched_is_alone = False
                proof.notes.append(f"{name}: rows run together differ in their last bits from rows run alone")
            if cuttable and time > 1:
                ends = sorted({*random.integers(1, time, min(3, time - 1)).tolist(), time})
                pieces = _run_cut(graph, runner, rows, ends)
                if not _same(together, pieces):
                    proof.cut_is_whole = False
                    proof.notes.append(f"{name}: cut at {ends[:-1]} differs in the last bits from the whole")
                    case = replace(case, ends=ends[:-1], pieces=pieces)
            yield case
            proof.cases += 1


def settled(graph: Graph, proof: Proof) -> Graph:
    """The contract with what the proof found: rows that depend on their batch-mates are not shared among callers, and what
    depends on where it is cut is not cut."""
    mates_matter = not proof.batched_is_alone if proof.mates_matter is None else proof.mates_matter
    shared = graph.shared and not mates_matter
    return replace(graph, shared=shared, cut=graph.cut and not proof.cut_matters, padded=graph.padded and shared)


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
    order = [t.name for t in graph.inputs if t.role != "lengths"] + [s.input for s in graph.states]  # PyTorch's rows are of one length
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
