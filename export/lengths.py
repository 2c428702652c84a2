"""One-shot graphs whose rows may be of different lengths: each recurrent node is told where its rows end (ONNX `sequence_lens`).

PyTorch exports no such input. A bidirectional layer that has it begins its way back at each row's own end, so that what a shorter
row is filled up with beside longer ones is never read. Whether that is so of the whole graph is not read off it but tried, bit for
bit: an attention or a mean over all steps would see the filling, and then the file stays as it was.

It knows ONNX graphs; it must not know torch, training, or how bundles are served.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from contract import bundle as contract
from contract.bundle import BATCH, Bundle, BundleError, Graph, Tensor
from export import draw, place
from server import dropin
from server.graph import OnnxGraph

RECURRENT = ("LSTM", "GRU", "RNN")
LENGTHS = 4  # the place of sequence_lens among a recurrent node's inputs
NAME = "lengths"
ROWS = (1, 2, 3, 8, 17) * 2  # of the lots that the proof is of
LONGEST = 33  # steps


class CantTell(ValueError):
    """No graph of the bundle can be told its rows' lengths; the message says why, by graph."""


@dataclass(frozen=True, slots=True)
class Told:
    """A graph that is told its rows' lengths; or why it is not, and as it was."""

    graph: Graph
    why: str = ""


def offer(graph: Graph, file: Path) -> Told:
    """Rewrite a one-shot graph's file so that rows of different lengths may share a run, where that alters no bit of any answer."""
    if graph.cut:
        return Told(graph, "it may be cut: rows of different lengths share rounds already")
    if graph.padded:
        return Told(graph, "it is told already")
    timed = [t for t in graph.data if t.time_axis is not None and t.batch_axis is not None]
    if not timed or not graph.shared:
        return Told(graph, "callers can't share a run of it" if timed else "it has no time axis")
    model = onnx.load(file)
    if why := surgery(model, _rows(model, timed[0])):
        return Told(graph, why)
    told = replace(graph, inputs=(*graph.inputs, Tensor(NAME, "int32", (BATCH,), "steps of each row", "lengths")), padded=True)
    if faults := contract.validate(Bundle("graph", {"graph": told}, "graph")):
        return Told(graph, "; ".join(faults))
    with tempfile.TemporaryDirectory() as folder:
        changed = Path(folder, file.name)
        changed.write_bytes(model.SerializeToString())
        try:
            same = padded_is_alone(told, OnnxGraph(told, changed), graph, OnnxGraph(graph, file))
        except Exception as e:  # onnxruntime raises its own types, all of them straight from Exception
            return Told(graph, f"told its lengths it does not run: {str(e)[:200]}")
        if not same:
            return Told(graph, "something in it looks at all steps: beside longer rows a row's answer would be another")
        shutil.copyfile(changed, file)
    return Told(told)


def padded_is_alone(padded: Graph, runner: OnnxGraph, graph: Graph, alone: OnnxGraph, seed: int = 0) -> bool:
    """Whether rows of different lengths, the shorter filled up with anything, answer bit for bit as `alone` does each of them."""
    random = np.random.default_rng(seed)
    for count in ROWS:
        times = random.integers(1, min(LONGEST, graph.max_time), count, endpoint=True).tolist()
        longest = max(times)
        rows, filled = [], []
        for time, size in zip(times, draw.sizes(graph, count, longest, random), strict=True):
            whole = draw.row(graph, size, random) | draw.fresh(graph)
            filled.append(whole)
            rows.append(whole | {t.name: _first(whole[t.name], t, time) for t in graph.data})
        draw.constants_alike(graph, rows)
        draw.constants_alike(graph, filled)
        together = draw.split(padded, filled, runner.run(draw.stack(padded, filled, times)))
        for row, time, got in zip(rows, times, together, strict=True):
            (wanted,) = draw.split(graph, [row], alone.run(draw.stack(graph, [row], [time])))
            own = got | {t.name: _first(got[t.name], t, time) for t in graph.outputs}
            if any(own[n].shape != wanted[n].shape or own[n].tobytes() != wanted[n].tobytes() for n in wanted):
                return False
    return True


def _first(value: draw.Array, tensor: Tensor, steps: int) -> draw.Array:
    """The first steps of a value; all of what has no time axis."""
    return value if tensor.time_axis is None else value.take(range(steps), tensor.time_axis)


def _rows(model: onnx.ModelProto, tensor: Tensor) -> str:
    """What the file calls the axis that its rows lie on: by it whoever reads the file alone knows them for the same."""
    assert tensor.batch_axis is not None, "one that is shared has rows"
    port = next(i for i in model.graph.input if i.name == tensor.name)
    return port.type.tensor_type.shape.dim[tensor.batch_axis].dim_param or BATCH


def surgery(model: onnx.ModelProto, rows: str = BATCH) -> str:
    """Give the model an input of lengths and each recurrent node its rows' ends, in place; gives why that can't be, or nothing."""
    nodes = [n for n in model.graph.node if n.op_type in RECURRENT and n.domain in ("", "ai.onnx")]
    if not nodes:
        return f"it has no {', '.join(RECURRENT)} node at its top"
    names = (
        {i.name for i in model.graph.input} | {t.name for t in model.graph.initializer} | {o for n in model.graph.node for o in n.output}
    )
    if NAME in names:
        return f"the name {NAME!r} is taken in it"
    for node in nodes:
        if len(node.input) > LENGTHS and node.input[LENGTHS]:
            return f"node {node.name!r} has lengths of its own"
        missing = LENGTHS + 1 - len(node.input)
        node.input.extend([""] * missing)
        node.input[LENGTHS] = NAME
    model.graph.input.append(helper.make_tensor_value_info(NAME, TensorProto.INT32, [rows]))
    return ""


def adapt(source: Path, out: Path, name: str | None = None) -> tuple[Bundle, Mapping[str, str]]:
    """Write a bundle, or what a directory with a bare ONNX file seems to be, into `out` with its one-shot graphs told their rows'
    lengths; gives it, and by graph why one is not.

    Raises CantTell where none is, BundleError, FileNotFoundError; on failure `out` stays as it was.
    """
    from export import card  # it needs what draws pictures, which takes its time to import

    was = dropin.bundle(source, name or source.name) if dropin.is_one(source) else contract.load(source)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adapt-", dir=out.parent) as made_in:
        made = Path(made_in)
        for file in source.iterdir():
            if file.is_file() and file.name != contract.FILE:
                shutil.copyfile(file, made / file.name)
        told = {key: offer(graph, made / graph.file) for key, graph in was.graphs.items()}
        why = {key: each.why for key, each in told.items() if each.why}
        if len(why) == len(told):
            raise CantTell("; ".join(f"graph {key!r}: {reason}" for key, reason in why.items()))
        verified: dict[str, Any] = {
            key: {**was.verified.get(key, {}), **({} if each.why else {"padded_is_alone": True})} for key, each in told.items()
        }
        bundle = replace(
            was, name=name or was.name, graphs={key: each.graph for key, each in told.items()}, verified=verified,
            made_from={**was.made_from, "told_lengths": {"from": was.fingerprint}},
        )  # fmt: skip
        bundle = contract.save(bundle, made)
        if (shown := made / card.FILE).is_file():
            shown.write_text(card.with_graphs(shown.read_text(encoding="utf-8"), bundle), encoding="utf-8")
        place.move(made, out)
    return contract.load(out), why


def main(source: Path, out: Path, name: str) -> int:
    """`seqserve adapt DIR`: 0 when written, 1 where there is nothing to tell."""
    try:
        made, why = adapt(source, out, name)
    except (CantTell, BundleError) as e:
        faults = e.faults if isinstance(e, BundleError) else [str(e)]
        print(f"seqserve adapt: {source}; nothing was written", *faults, sep="\n  - ", file=sys.stderr)
        return 1
    for graph in made.graphs:
        if reason := why.get(graph):
            print(f"graph {graph!r} stays as it was: {reason}")
        else:
            print(f"graph {graph!r} takes rows of different lengths together: as alone, bit for bit")
    print(f"{made.name}: {out}, {made.fingerprint[:19]}")
    return 0
