"""`seqserve convert BUNDLE --precision P --out DIR`: a bundle in another precision, without the run it was trained in.

Every graph is compared with the one it was made of by the server's own runner; weights-only precisions must besides give
the very bits of the float32 graph with the same rounded weights. A graph whose answers turn out to depend on what else is
in the round is marked: never shared among callers, never cut.

It knows bundles and the order of things; what a precision does to a file is in precision.py.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from contract import bundle as contract
from contract.bundle import Bundle, BundleError, Graph
from export import lengths, place, precision
from export.precision import CantConvert, NothingToChange
from server.graph import OnnxGraph

ALLOWED: Mapping[str, float] = {
    "float16-weights": 0.01, "bfloat16-weights": 0.06, "int8-weights": 0.3, "float16": 0.01, "int8-dynamic": 0.4,
}  # fmt: skip
"""By precision, how far a tensor may be from the float32 graph's, norm of the difference by norm of itself, over random inputs
and states. The shipped models came to 0.0042, 0.022, 0.049, 0.0038 and 0.067 at most, a graph that is wrong comes to 1 or so.
What a precision costs in answers only a test set tells."""

ROUNDING: Mapping[str, float] = {"float16": 0.002}
"""Where a graph computes in fewer digits than float32, how far batching and cutting may move an answer and still be taken for
rounding, by norms: two of float16's 0.00098. Everywhere else batching may not change one bit."""

CARD = "README.md"
EPILOG = """
examples:
  seqserve convert models/translator/1 --precision float16-weights --out models/translator/2
  seqserve convert models/translator/1 --precision int8-dynamic --out models/quick/1

float16-weights   half the size; answers are computed in float32, as fast and as exact in rounds as before
bfloat16-weights  the same for weights beyond float16's range, with fewer digits
int8-weights      a quarter of the size, computed in float32 too, with fewer digits still
float16           half the size, recurrent and matrix nodes compute in float16: for GPUs
int8-dynamic      a quarter of the size, computed in int8: half the time for one caller on a CPU; but an answer depends on
                  what is in its round, so callers never share one and no sequence is cut: little gained under load

Measure what it costs: make quality DATA=DIR RUN="--models DIR"
"""


@dataclass(frozen=True, slots=True)
class Changed:
    """Graphs in another precision: their contracts, what was compared, and remarks on it."""

    graphs: Mapping[str, Graph]
    verified: Mapping[str, Mapping[str, Any]]
    remarks: Sequence[str]


def change_all(graphs: Mapping[str, Graph], before: Path, after: Path, wanted: str) -> Changed:
    """Write the files of all graphs, from one directory to another or in place; what has nothing to change stays in float32.

    Raises NothingToChange where that is so of every graph, and what `change` raises.
    """
    settled: dict[str, Graph] = {}
    verified: dict[str, Mapping[str, Any]] = {}
    same: list[str] = []
    remarks: list[str] = []
    for name, graph in graphs.items():
        try:
            settled[name], verified[name], notes = change(name, graph, before / graph.file, after / graph.file, wanted)
            remarks += [f"{name}: {note}" for note in notes[:1]]
        except NothingToChange as e:
            same.append(f"{name} stays in float32: {e}")
            (after / graph.file).write_bytes(onnx.load(before / graph.file).SerializeToString())
            settled[name], verified[name] = graph, {}
    if len(same) == len(graphs):
        raise NothingToChange("; ".join(same))
    return Changed(settled, verified, (*same, *remarks))


def change(name: str, graph: Graph, before: Path, after: Path, wanted: str) -> tuple[Graph, dict[str, Any], list[str]]:
    """Write a graph's file in another precision and compare the two: the settled contract, the proof and notes of it.

    Raises CantConvert, NothingToChange, verify.VerifyError, BundleError where onnxruntime can't load what came out.
    """
    from export import verify  # it needs torch, which takes seconds to import

    was = OnnxGraph(graph, before)
    source = precision.folded(onnx.load(before))
    made = onnx.ModelProto()
    made.CopyFrom(source)
    restored: Mapping[str, Any] = {}
    if wanted in precision.WEIGHTS:
        restored = precision.WEIGHTS[wanted](made)
    elif wanted == "float16":
        precision.float16_compute(made)
    else:
        from export import dynamic

        made = dynamic.int8_dynamic(made)
    after.write_bytes(made.SerializeToString())
    runner = OnnxGraph(graph, after)
    proof = verify.compare(name, graph, was, runner, ALLOWED[wanted], ROUNDING.get(wanted, 0.0))
    found = proof.plain() | {"against": "float32"}
    if wanted == "float16":
        found["computed"] = "float32"  # by onnxruntime's CPU provider, of float16 values: what a GPU does is not covered
    if restored:
        found["as_rounded"] = _as_rounded(graph, source, restored, runner)
        if not found["as_rounded"]:
            raise CantConvert(f"graph {name!r}: it does not answer as the float32 graph with the same weights; please report this")
    settled = verify.settled(graph, proof)
    if settled.padded:
        found["padded_is_alone"] = lengths.padded_is_alone(graph, runner, graph, runner)
        settled = replace(settled, padded=found["padded_is_alone"])
    return settled, found, proof.notes


def convert(source: Path, out: Path, wanted: str, name: str | None = None) -> tuple[Bundle, list[str]]:
    """Write the bundle in `source` in another precision into `out`; return it and remarks. On failure `out` stays as it was.

    Raises CantConvert with a sentence, verify.VerifyError, BundleError.
    """
    if source.resolve() == out.resolve():
        raise CantConvert("write it elsewhere: every precision is made of the float32 bundle, which would be lost")
    was = contract.load(source)
    if was.precision != "float32":
        raise CantConvert(f"{source} is in {was.precision} already: convert the float32 bundle it was made of")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=out.parent) as made_in:
        made = Path(made_in)
        beside = {f for graph in was.graphs.values() for f in _data_files(source / graph.file)}
        resources = {n: f for n, f in was.resources.items() if f not in beside}  # weights beside a file are in the new one
        for file in {*resources.values(), *(f.name for f in source.iterdir() if f.suffix == ".png")}:
            shutil.copyfile(source / file, made / file)
        changed = change_all(was.graphs, source, made, wanted)
        verified = {n: {**changed.verified[n], "float32": dict(was.verified.get(n, {}))} for n in was.graphs}
        bundle = replace(
            was, name=name or was.name, graphs=changed.graphs, resources=resources, verified=verified, precision=wanted,
            made_from={**was.made_from, "converted": {"from": was.fingerprint, "tools": tools()}},
        )  # fmt: skip
        bundle = contract.save(bundle, made)
        sizes = tuple(sum((at / g.file).stat().st_size for g in was.graphs.values()) for at in (source, made))
        if (source / CARD).is_file():
            (made / CARD).write_text(_card((source / CARD).read_text(encoding="utf-8"), bundle, sizes), encoding="utf-8")
        place.move(made, out)
    return contract.load(out), list(changed.remarks)


def tools() -> dict[str, str]:
    """Versions of what converts."""
    return {name: version(name).partition("+")[0] for name in ("onnx", "onnxscript", "onnxruntime")}


def said(bundle: Bundle) -> str:
    """A precision in words, for model cards: what was found out about it."""
    lines = [f"**Precision {bundle.precision}.**"]
    for name, graph in bundle.graphs.items():
        proof = bundle.verified.get(name, {})
        if "against" not in proof:
            lines.append(f"`{name}` stays in float32.")
            continue
        words = f"`{name}` is within {proof['largest_relative_norm']:.1e} of the float32 graph (norm of the difference)"
        words += ", and is bit for bit the float32 graph with these weights" if proof.get("as_rounded") else ""
        if proof.get("computed"):
            words += ", as the CPU computes it, which is in float32: what a GPU's float16 does is to be measured there"
        words += "" if graph.shared else "; its answers depend on what is in the round, so callers never share one"
        lines.append(words + "; it is never cut in time: that would alter answers too." if proof.get("cut_matters") else words + ".")
    return " ".join(lines)


def _as_rounded(graph: Graph, source: onnx.ModelProto, restored: Mapping[str, Any], runner: OnnxGraph) -> bool:
    """Whether the runner gives the bits of the float32 file that has the restored weights in it."""
    from export import verify

    for tensor in source.graph.initializer:
        if tensor.name in restored:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(restored[tensor.name], np.float32), tensor.name))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rounded.onnx"
        file.write_bytes(source.SerializeToString())
        return verify.identical(graph, runner, OnnxGraph(graph, file))


def _data_files(file: Path) -> set[str]:
    """The files beside an ONNX file that hold weights of it."""
    tensors = onnx.load(file, load_external_data=False).graph.initializer
    return {entry.value for t in tensors for entry in t.external_data if entry.key == "location"}


def _card(text: str, bundle: Bundle, sizes: tuple[int, ...]) -> str:
    """The model card of the float32 bundle, with what is different put first."""
    heading, _, rest = text.partition("\n")
    note = f"{said(bundle)} {sizes[1] / 1e6:.2f} MB, float32: {sizes[0] / 1e6:.2f} MB. Sizes and figures below are those of float32."
    return f"{heading}\n\n{note}\n{rest}"


def main(argv: Sequence[str] | None = None) -> int:
    """Convert: 0 when done, 1 where it can't be, 2 where there is no such bundle."""
    words = argparse.ArgumentParser(
        prog="seqserve convert", description="Write a bundle in another precision.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    words.add_argument("bundle", type=Path, help="directory of a float32 bundle, such as models/NAME/1")
    words.add_argument("--precision", required=True, choices=list(ALLOWED), help="see below")
    words.add_argument("--out", type=Path, required=True, help="directory of the new bundle, such as models/NAME/2")
    words.add_argument("--name", help="the model's name when served (default: the directory above --out, or as it was)")
    asked = words.parse_args(argv)
    if not asked.bundle.is_dir():
        print(f"seqserve convert: no directory {str(asked.bundle)!r}", file=sys.stderr)
        return 2
    from export.verify import VerifyError

    name = asked.name or (asked.out.parent.name if asked.out.name.isdecimal() else None)
    try:
        made, remarks = convert(asked.bundle, asked.out, asked.precision, name)
    except (CantConvert, BundleError) as e:
        print(f"seqserve convert: {e}; nothing was written", file=sys.stderr)
        return 1
    except VerifyError as e:
        print(f"seqserve convert: too far from float32; nothing was written\n{e}", file=sys.stderr)
        return 1
    for remark in remarks:
        print(f"note: {remark}")
    sizes = [sum((at / g.file).stat().st_size for g in made.graphs.values()) / 1e6 for at in (asked.bundle, asked.out)]
    print(said(made))
    print(f"{made.name}: {asked.out}, {sizes[0]:.2f} MB → {sizes[1]:.2f} MB, {made.fingerprint[:19]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
