"""A training run becomes a bundle: graphs written, proved, described; resources and card beside them.

It knows the order and what a half-written bundle must never look like. It must not know any model.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from contract import bundle as bundles
from contract.bundle import Bundle, BundleError, Graph
from export import card, convert, lengths, place, to_onnx, verify
from server.graph import OnnxGraph
from training import checkpoint, curves, tasks


def export(run: Path, out: Path, name: str | None = None, scores: Path | None = None, precision: str = "float32") -> Bundle:
    """Write the bundle of a run into `out`, bundle.json last, and return it.

    Everything is made and proved in a directory beside `out` first: where anything fails, `out` stays as it was. Raises
    FileNotFoundError, verify.VerifyError, BundleError, precision.CantConvert.
    """
    kept = checkpoint.load(run)
    task = tasks.find(kept.task)
    model = task.rebuild(kept.dims)
    model.load_state_dict(dict(kept.weights))
    model.eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as made_in:
        made = Path(made_in)
        graphs: dict[str, Graph] = {}
        proofs: dict[str, Mapping[str, Any]] = {}
        parts = task.parts(model)
        for graph_name, described in task.describe(model).items():
            file = made / described.file
            to_onnx.write(described, parts[graph_name], file)
            described = lengths.offer(described, file).graph
            proof = verify.verify(graph_name, described, parts[graph_name], OnnxGraph(described, file))
            for note in proof.notes[:3]:
                print(f"warning: {graph_name}: {note}", file=sys.stderr)
            settled = verify.settled(described, proof)
            graphs[graph_name], proofs[graph_name] = settled, proof.plain() | ({"padded_is_alone": True} if settled.padded else {})
        if precision != "float32":
            changed = convert.change_all(graphs, made, made, precision)
            for remark in changed.remarks:
                print(f"note: {remark}", file=sys.stderr)
            graphs, proofs = dict(changed.graphs), {n: {**changed.verified[n], "float32": p} for n, p in proofs.items()}
        resources = task.resources(run)
        for source in resources.values():
            shutil.copyfile(source, made / source.name)
        said = dict(task.task(model, run))
        found = Bundle(
            name=name or kept.task,
            graphs=graphs,
            main=str(said.pop("main", next(iter(graphs)))),
            task=said,
            resources={n: f.name for n, f in resources.items()},
            made_from=_origin(kept),
            verified=proofs,
            precision=precision,
        )
        found = bundles.save(found, made)
        shown = card.Scores.read(scores, found.name) if scores is not None else card.Scores()
        others = [f for f in sorted(run.glob("*.png")) if f.name != curves.PICTURE]
        pictures = [card.Picture(f, f.stem.replace("-", " ").capitalize()) for f in others]
        card.write(made, found, kept, task.ABOUT, run, shown, pictures, _card_before(out, found))
        place.move(made, out)
    return bundles.load(out)


def _card_before(out: Path, made: Bundle) -> str:
    """The card in `out`, if it is of the very bundle that is to take its place; else nothing, and a note of what is lost."""
    file = out / card.FILE
    if not file.is_file():
        return ""
    text = file.read_text(encoding="utf-8")
    try:
        same = bundles.load(out).fingerprint == made.fingerprint
    except BundleError:
        same = False
    if not same and card.section(text, card.PRECISIONS):
        print(f"note: '{card.PRECISIONS}' in {file} were another bundle's and are left out; make precisions RUN=--write", file=sys.stderr)
    return text if same else ""


def verdict(proof: Mapping[str, Any]) -> str:
    """The bit-for-bit findings of a graph in words."""
    batched = "batched = alone bit for bit" if proof["batched_is_alone"] else "batched differs from alone: never shared among callers"
    if proof.get("padded_is_alone"):
        batched += ", rows of different lengths too"
    if "cut_is_whole" not in proof:
        return batched
    return batched + (", cut = whole bit for bit" if proof["cut_is_whole"] else ", cut = whole but for the last bits")


def _origin(kept: checkpoint.Checkpoint) -> dict[str, Any]:
    return {
        "task": kept.task, "config": dict(kept.config), "command": kept.command, "revision": kept.revision,
        "scores": dict(kept.scores), "step": kept.step, "parameters": kept.parameters,
        "tools": {name: version(name).partition("+")[0] for name in ("torch", "onnx", "onnxscript", "onnxruntime")},
    }  # fmt: skip
