"""What each precision of the shipped bundles costs and saves: size, figures on the test set, exactness, time. `make precisions DATA=DIR`.

The figures are the quality command's, over the engine in this process; nothing is held to a floor here. Written as Markdown,
for docs/log.md and, with --write, into the cards of the bundles. Of a bundle that is shipped with its weights in another precision, the
float32 line has these weights, restored; or export the run in float32 and name its directory with --models.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.console import Console
from rich.progress import Progress

from contract import bundle as contract
from export import card, convert, draw, precision
from export.draw import Array
from server.graph import OnnxGraph
from tests.figures.quality import MODELS, Asked, Figure, offline
from tests.process import ROOT

ROWS = 32
STEPS = {"sentiment": 32, "translator": 1, "forecaster": 96}  # as calls bring them; of the translator, `step`
PASSES = 15
PRECISIONS = ("float32", *convert.ALLOWED)
NOTE = (
    "*Batched = alone, cut = whole*: bit for bit; *rounded*: in float16's last digits. Time on one core, the least of "
    f"{PASSES} passes taken in turn; of the translator, `step`. float16 ran on a CPU, which computes it in float32. What is not "
    "batched = alone is never shared among callers."
)


@dataclass(slots=True)
class Line:
    """One precision of one model."""

    precision: str
    megabytes: float
    batched: str  # = alone
    cut: str  # = whole
    figures: Sequence[Figure] = ()
    together: float = 0.0  # µs a row, ROWS of them in a round
    alone: float = 0.0  # µs of a row by itself
    within: float = field(default=0.0)  # of float32, by norms


def made(model: str, wanted: str, models: Path, at: Path) -> Path:
    """The directory of a model's bundle in a precision."""
    source, out = models / model / "1", at / wanted / model / "1"
    if contract.load(source).precision != "float32":
        source = restored(source, at / "restored" / model / "1")
    if wanted == "float32":
        return shutil.copytree(source, out)
    convert.convert(source, out, wanted)
    return out


def restored(source: Path, out: Path) -> Path:
    """A bundle whose weights alone lie in another precision, as the float32 bundle that onnxruntime makes of it when it loads it."""
    if out.exists():
        return out
    bundle = contract.load(source)
    if bundle.precision not in precision.WEIGHTS:
        raise SystemExit(f"{source} is in {bundle.precision}: export its run in float32, and name the directory with --models")
    shutil.copytree(source, out)
    for graph in bundle.graphs.values():
        (out / graph.file).write_bytes(precision.folded(onnx.load(source / graph.file)).SerializeToString())
    was = {name: proof.get("float32", proof) for name, proof in bundle.verified.items()}
    contract.save(replace(bundle, precision="float32", verified=was), out)
    return out


def line(directory: Path) -> Line:
    bundle = contract.load(directory)
    proofs = list(bundle.verified.values())
    shared = [graph.shared for graph in bundle.graphs.values()]
    return Line(
        bundle.precision, sum((directory / g.file).stat().st_size for g in bundle.graphs.values()) / 1e6,
        _exact([p.get("batched_is_alone", True) for p in proofs], shared),
        _exact([p.get("cut_is_whole", True) for p in proofs], [not p.get("cut_matters") for p in proofs]),
        within=max((p["largest_relative_norm"] for p in proofs if "against" in p), default=0.0),
    )  # fmt: skip


def _exact(bits: Sequence[bool], near: Sequence[bool]) -> str:
    """Of all graphs: bit for bit, else within what the precision rounds."""
    return "yes" if all(bits) else "rounded" if all(near) else "**no**"


def runs(directory: Path, steps: int) -> list[Callable[[], float]]:
    """Two clocks: microseconds a row of one run over ROWS rows, and over one."""
    bundle = contract.load(directory)
    graph = bundle.graphs.get("step", bundle.graph)
    runner = OnnxGraph(graph, directory / graph.file)
    random = np.random.default_rng(0)
    clocks = []
    for count in (ROWS, 1):
        sizes = [draw.Sizes(steps, dict.fromkeys(draw.names(graph), 12)) for _ in range(count)]  # 12: tokens of a caption
        rows = [draw.row(graph, size, random) | draw.fresh(graph) for size in sizes]
        draw.constants_alike(graph, rows)
        clocks.append(_clock(runner, draw.stack(graph, rows, [steps] * count), count))
    return clocks


def _clock(runner: OnnxGraph, feeds: dict[str, Array], count: int) -> Callable[[], float]:
    def run() -> float:
        began = time.perf_counter()
        runner.run(feeds)
        return (time.perf_counter() - began) * 1e6 / count

    return run


def table(lines: Sequence[Line], steps: int) -> list[str]:
    """The Markdown of one model."""
    names = [f"{f.data}: {f.metric}" for f in lines[0].figures]
    heads = ["precision", "MB", *names, "within of float32", "batched = alone", "cut = whole", f"µs a row, {ROWS} × {steps}", "µs alone"]
    text = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(names) + 2) + "---|---|---:|---:|"]
    for at in lines:
        values = [f"{f.value:.{4 if f.metric in ('MSE', 'MAE') else 2}f}" for f in at.figures]
        within = f"{at.within:.1e}" if at.within else ""
        cells = [at.precision, f"{at.megabytes:.2f}", *values, within, at.batched, at.cut, f"{at.together:.0f}", f"{at.alone:.0f}"]
        text.append(f"| {' | '.join(cells)} |")
    return text


def write(directory: Path, lines: Sequence[str]) -> None:
    """Into the card of a bundle, in place of what was measured before."""
    model = directory.parent.name
    made = f"Made by `seqserve convert models/{model}/1 --precision …`, measured by `make precisions` on the same test data."
    if (shipped := contract.load(directory).precision) != "float32":
        made = f"Made by `seqserve convert` of the shipped {shipped}, restored to float32, and measured by `make precisions`."
    file = directory / card.FILE
    body = "\n".join([made, "", *lines, "", NOTE])
    file.write_text(card.with_section(file.read_text(encoding="utf-8"), card.PRECISIONS, body), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make precisions", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="directory of the data sets: imdb/, multi30k/, ett/")
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="directory of float32 bundles")
    parser.add_argument("--only", choices=STEPS, action="append", help="only this model; may be given again")
    parser.add_argument("--precision", choices=PRECISIONS, action="append", help="only this one; may be given again")
    parser.add_argument("--no-quality", action="store_true", help="sizes, exactness and times only")
    parser.add_argument("--json", type=Path, help="write everything into this file too")
    parser.add_argument("--write", action="store_true", help="put the tables into the bundles' cards")
    options = parser.parse_args()
    console = Console(stderr=True)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for model in options.only or STEPS:
            directories = {p: made(model, p, options.models, Path(folder)) for p in options.precision or PRECISIONS}
            lines = [line(directory) for directory in directories.values()]
            clocks = [runs(directory, STEPS[model]) for directory in directories.values()]
            taken = np.array([[[clock() for clock in pair] for pair in clocks] for _ in range(PASSES)])  # in turn: load drifts
            for at, (together, alone) in zip(lines, taken.min(0), strict=True):
                at.together, at.alone = together, alone
            for at, directory in zip(lines, directories.values(), strict=True):
                if not options.no_quality:
                    with offline(directory.parent.parent) as asker, Progress(console=console) as progress:
                        at.figures = list(MODELS[model](asker, Asked(progress), options.data))
            print(f"\n{model}\n", *table(lines, STEPS[model]), sep="\n", flush=True)
            if options.write:
                write(options.models / model / "1", table(lines, STEPS[model]))
            found[model] = [asdict(at) for at in lines]
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
