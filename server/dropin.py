"""A bare ONNX file in NAME/VERSION/, without a bundle.json: its contract is proposed, tried out, and served.

Names and shapes say much (contract/propose.py), runs say the rest: what form the outputs have, whether a sequence may be
cut, whether rows alter each other. It knows proposals and a file that runs; it must not know callers or queues.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from contract import bundle as contract
from contract.bundle import BATCH, TIME, Axis, Bundle, BundleError, Graph, Tensor
from contract.propose import Proposal, propose
from server.differs import LONG, RATE, USUAL_RATE, batch_differs, cut_differs, draw, fresh, padded_differs
from server.graph import OnnxFile

log = logging.getLogger(__name__)

GRAPH = "model"
TODO = "write a bundle.json: `seqserve inspect {} --json` prints one to start from"

WINDOWS = (512, 256, 1024, 160, 320, 480, 1536, 80, 400, 768)  # samples or frames that streaming models are given at once


def is_one(directory: Path) -> bool:
    """Whether a directory is served by proposal: one ONNX file and no bundle.json."""
    return not (directory / contract.FILE).exists() and len(list(directory.glob("*.onnx"))) == 1


def bundle(directory: Path, name: str) -> Bundle:
    """The bundle that a bare ONNX file seems to be, with its fingerprint. Raises BundleError with what stands against it."""
    file = next(directory.glob("*.onnx"))
    proposal = understand(file)
    if proposal.faults:
        raise BundleError(str(directory), [*proposal.faults, TODO.format(file)])
    made = as_bundle(name, file, proposal)
    log.info("proposed a contract for %s:%s", file, "".join(f"\n  - {remark}" for remark in proposal.remarks) or " nothing was in doubt")
    return replace(made, fingerprint=contract.fingerprint(made, directory))


def as_bundle(name: str, file: Path, proposal: Proposal) -> Bundle:
    """A proposal as a bundle; weights that lie beside the file (`model.onnx.data`) belong to it."""
    beside = sorted(p.name for p in file.parent.glob(f"{file.name}?*") if p.is_file())
    return Bundle(name, {GRAPH: proposal.graph}, GRAPH, resources={f"weights{at or ''}": found for at, found in enumerate(beside)})


def understand(file: Path, window: int = 0) -> Proposal:
    """The proposal for a file, corrected by running it; `window` is the size of its windows, if its owner knows it. Raises
    BundleError where onnxruntime can't load it."""
    onnx = OnnxFile(file)
    first = propose(file.name, onnx.inputs, onnx.outputs)
    trials = [first]
    if any(sum(not isinstance(d, int) for d in port.dims) > 1 for port in onnx.inputs):
        trials.append(propose(file.name, onnx.inputs, onnx.outputs, batch_first=False))
    why = ""
    mixed: Proposal | None = None
    for trial in dict.fromkeys(trials):
        if any(t.dtype not in contract.DTYPES for t in trial.graph.inputs) or not trial.graph.inputs:
            return trial
        try:
            found = _tried(onnx, trial, window)
        except ValueError as e:
            why = why or str(e)[:300]
            continue
        if found.graph.shared or not trial.graph.shared:
            return found
        mixed = mixed or found  # a row depends on others: steps may have been taken for rows
    return mixed or replace(first, faults=(*first.faults, f"it does not run as proposed: {why}"))


def _tried(onnx: OnnxFile, trial: Proposal, window: int) -> Proposal:
    """A proposal, corrected by running it. Raises ValueError where nothing of the kind runs."""
    why = ""
    poor: Proposal | None = None  # windows of that size run, but to no use
    for graph, note, given in _variants(trial.graph, window, _declared(onnx)):
        try:
            seen = _forms(onnx, graph)
            if given and not any(given in t.axes for t in seen.outputs):
                continue  # the file's size is another axis'
            settled, remarks = _settled(onnx, replace(graph, outputs=tuple(seen.outputs)))
        except ValueError as e:
            why = why or str(e)
            continue
        faults = [f for f in trial.faults if not f.startswith("output ")] + seen.faults
        guesses = [r for r in trial.remarks if not r.startswith("output ")]  # what runs have shown is no guess any more
        if note and not window and (others := [str(size) for size in _others(settled) if _runs(onnx, graph, settled, size)]):
            remarks += [f"it runs with windows of {', '.join(others)} as well: `seqserve inspect --window N` where yours are"]
        valid = contract.validate(Bundle(GRAPH, {GRAPH: settled}, GRAPH))
        faults += [f for f in (v.removeprefix(f"graph '{GRAPH}': ") for v in valid) if f not in faults]
        found = Proposal(settled, (*guesses, *note, *seen.remarks, *remarks), tuple(faults))
        if not faults or not note:
            return found
        poor = poor or found
    if poor is None:
        raise ValueError(why)
    return poor


def _declared(onnx: OnnxFile) -> tuple[int, ...]:
    """Sizes that the file gives only outputs: of an example, where an exporter wired its length into the nodes."""
    taken = {d for port in onnx.inputs for d in port.dims}
    return tuple(dict.fromkeys(d for port in onnx.outputs for d in port.dims if isinstance(d, int) and d > 1 and d not in taken))


def _variants(graph: Graph, window: int, declared: Sequence[int]) -> Iterator[tuple[Graph, tuple[str, ...], int]]:
    """The graph; and as it would be if its time axis took windows of one size only: a remark, and the size if the file has it."""
    if not window:
        yield graph, (), 0
    timed = [t for t in graph.data if TIME in t.axes]
    if not graph.states or len(timed) != 1:
        return
    for size in (window,) if window else (*declared, *WINDOWS):

        def fixed(t: Tensor, size: int = size) -> Tensor:
            if RATE.fullmatch(t.name) and t.batch_axis is None:
                return replace(t, low=USUAL_RATE, high=USUAL_RATE)
            return replace(t, axes=tuple(size if a == TIME else a for a in t.axes))

        note = f"input {timed[0].name!r} runs with {size} at once and not with a few: a turn is one window of exactly {size}"
        if window:
            note = f"input {timed[0].name!r}: a turn is one window of exactly {size}, as you say"
        rate = [f"{t.name!r} is held to {USUAL_RATE}" for t in graph.data if RATE.fullmatch(t.name) and t.batch_axis is None]
        inputs = tuple(fixed(t) for t in graph.inputs)
        yield replace(graph, inputs=inputs, max_time=1, cut=False), (note, *rate), size if size in declared and not window else 0


def _window(graph: Graph) -> tuple[Tensor, int] | None:
    """The input that takes windows, and their size: the longest fixed axis after the rows."""
    sized = [(t, a) for t in graph.data for a in t.axes if isinstance(a, int) and a in WINDOWS]
    return max(sized, key=lambda pair: pair[1]) if sized else None


def _others(graph: Graph) -> tuple[int, ...]:
    """Sizes near the one that was found by trying: with some samples of the window before in front, as voice models have it."""
    found = _window(graph)
    return () if found is None else tuple(found[1] + found[1] // part for part in (16, 8, 4))


def _runs(onnx: OnnxFile, graph: Graph, settled: Graph, size: int) -> bool:
    found = _window(settled)
    assert found is not None
    old = found[1]
    inputs = tuple(replace(t, axes=tuple(size if a == old else a for a in t.axes)) if t.name == found[0].name else t for t in graph.inputs)
    try:
        _forms(onnx, replace(graph, inputs=inputs))
    except ValueError:
        return False
    return True


@dataclass(slots=True)
class _Seen:
    outputs: list[Tensor]
    remarks: list[str]
    faults: list[str]


def _forms(onnx: OnnxFile, graph: Graph) -> _Seen:
    """The outputs' axes, as two runs of different sizes show them. Raises ValueError where it does not run."""
    sizes = [(1, 5), (1, 7)] if graph.max_rows == 1 else [(3, 5), (4, 7)]
    random = np.random.default_rng(0)
    runs = [onnx.run(draw(graph, *size, random) | fresh(graph, size[0])) for size in sizes]
    seen = _Seen([], [], [])
    kept = {s.output: s for s in graph.states}
    for port in onnx.outputs:
        if port.dtype not in contract.DTYPES:
            seen.remarks.append(f"output {port.name!r} is {port.dtype}, no tensor of numbers: left out")
            continue
        shapes = [run[port.name].shape for run in runs]
        if port.name in kept and port.name not in {t.name for t in graph.outputs}:
            state = kept[port.name]
            wanted = [tuple(rows if a == BATCH else a for a in state.axes) for rows, _ in sizes]
            if shapes != wanted:
                seen.faults.append(
                    f"state {state.input!r}: {port.name!r} comes out as {list(shapes[0])}, not {list(wanted[0])} as it went in"
                )
            continue
        axes = _read(shapes, sizes, graph)
        if axes is None:
            seen.remarks.append(f"output {port.name!r} has a form that is neither rows, steps nor fixed ({list(shapes[0])}): left out")
            continue
        seen.outputs.append(Tensor(port.name, port.dtype, axes))
    return seen


def _read(shapes: Sequence[tuple[int, ...]], sizes: Sequence[tuple[int, int]], graph: Graph) -> tuple[Axis, ...] | None:
    if len(shapes[0]) != len(shapes[1]):
        return None
    axes: list[Axis] = []
    timed = any(TIME in t.axes for t in graph.data)
    for one, other in zip(*shapes, strict=True):
        if graph.max_rows > 1 and (one, other) == (sizes[0][0], sizes[1][0]) and BATCH not in axes:
            axes.append(BATCH)
        elif timed and (one, other) == (sizes[0][1], sizes[1][1]) and TIME not in axes:
            axes.append(TIME)
        elif one == other and one > 0:
            axes.append(one)
        else:
            return None
    if BATCH not in axes and graph.max_rows == 1 and 1 in axes:
        axes[axes.index(1)] = BATCH
    return tuple(axes) if BATCH in axes else None


def _settled(onnx: OnnxFile, graph: Graph) -> tuple[Graph, list[str]]:
    """The graph with what runs show: whether it may be cut, and whether rows may share a run."""
    remarks = []
    if graph.cut and graph.max_time > 1:
        cut = cut_differs(onnx, graph)
        if cut.wrong:
            graph = replace(graph, cut=False)
            remarks.append(f"{_listed(cut.wrong)} would differ if a sequence were cut: each call or turn runs whole")
        elif cut.steps < min(LONG[0], graph.max_time):
            remarks.append(f"it is slow, so pieces were held against the whole over {cut.steps} steps: what looks further back is not seen")
        elif cut.rounded:
            remarks.append(f"{_listed(cut.rounded)} may differ in the last bits by where a sequence is cut")
    if graph.shared:
        rows = batch_differs(onnx, graph)
        if rows.wrong:
            graph = replace(graph, shared=False)
            remarks.append(f"{_listed(rows.wrong)} of a row depend on the rows beside it: callers never run together")
        elif rows.rounded:
            remarks.append(f"{_listed(rows.rounded)} of a row may differ in the last bits by how many run together")
    padded = replace(graph, padded=True)
    if graph.shared and not contract.validate(Bundle(GRAPH, {GRAPH: padded}, GRAPH)):  # it can't be cut, and takes lengths
        if differ := padded_differs(onnx, graph):
            remarks.append(f"{', '.join(map(repr, differ))} of a row depend on what it is filled up with: only equal lengths run together")
        else:
            graph = padded
            remarks.append("it is told how long each row is: sequences of different lengths run together")
    return graph, remarks


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
