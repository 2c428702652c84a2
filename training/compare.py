"""`python -m training.compare cells`, also `seqserve compare cells`: the same task learnt by each kind of cell, side by side.

The task is `recall` (digits.py): the first row of an image tells the label, noise follows, and only the end is asked. Beside
what each learns stands how the gradient of the end fades, or grows, with the time lag of what it is taken by. It knows the
command, the table and the picture; cells.py and loop.py do the work.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

KINDS: Mapping[str, tuple[str, ...]] = {
    "Elman": ("kind=elman",),
    "Elman, softsign": ("kind=elman", "activation=softsign"),
    "GRU": ("kind=gru",),
    "LSTM, forget bias 0": ("forget_bias=0",),
    "LSTM, forget bias 1": (),
    "LSTM, softsign": ("activation=softsign",),
    "LSTM, two layers": ("layers=2",),
    "LSTM, both directions": ("bidirectional=true",),
}
"""What is compared: names, and what each changes in `model.cells`."""

GROWING: Mapping[str, float] = {"Elman": 1.0, "Elman × 1.5": 1.5, "Elman × 3": 3.0}
"""Elman cells whose recurrent matrices start so many times as large; the last is also drawn clipped."""

LAGS = 100
CLIP = 1.0
LEARNT = 0.9  # the accuracy from which a task counts as learnt
EPILOG = """
examples:
  seqserve compare cells                                    minutes on one core; needs no data set
  seqserve compare cells --set data.length=30 --set run.gradient_clip_by=value
  seqserve compare cells --set optimiser.kind=rmsprop       ... adagrad, nesterov, adam, adamw
"""


@dataclass(frozen=True, slots=True)
class Learnt:
    """What came of one kind: its validations, and the gradient's norm by lag at the start and at the end of training."""

    name: str
    parameters: int
    seconds: float
    rows: Sequence[Mapping[str, float]]
    before: Sequence[float]
    after: Sequence[float]

    @property
    def accuracy(self) -> float:
        return max(r["validation_accuracy"] for r in self.rows)

    @property
    def steps(self) -> int | None:
        """Optimiser steps until the task was learnt."""
        return next((int(r["step"]) for r in self.rows if r["validation_accuracy"] >= LEARNT), None)


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(
        prog="seqserve compare", description="Train the same task with each kind of cell; print a table, draw a picture.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    words.add_argument("what", choices=["cells"], help="what to compare")
    words.add_argument("--out", type=Path, default=Path("runs/compare-cells"), help="directory for runs, cells.png and cells.json")
    words.add_argument("--only", action="append", choices=list(KINDS), help="only this kind; may be given again")
    words.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one value of the configuration, for all")
    return words


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare; 0 when done, 1 when it can't start (the reason is printed)."""
    asked = parser().parse_args(arguments)

    from training.config import ConfigError

    try:
        found = [learn(name, asked.set, asked.out) for name in asked.only or KINDS]
    except ConfigError as e:
        print(f"seqserve compare: {e}", file=sys.stderr)
        return 1
    growing = grown()
    table(found)
    (asked.out / "cells.json").write_text(json.dumps([_plain(f) for f in found], indent=1) + "\n", encoding="utf-8")
    print(f"picture: {draw(found, growing, asked.out / 'cells.png')}")
    return 0


def learn(name: str, settings: Sequence[str], out: Path) -> Learnt:
    """Train one kind; the run is kept under `out`. Raises ConfigError."""
    import lightning

    from training import checkpoint, config, curves, digits, loop

    chosen = config.load("digits", "recall", [*(f"model.cells.{s}" for s in KINDS[name]), *settings])
    lightning.seed_everything(chosen.seed, workers=True, verbose=False)
    place = out / name.lower().replace(", ", "-").replace(" ", "-")
    place.mkdir(parents=True, exist_ok=True)
    training = digits.prepare(chosen, None, place)
    model = training.model
    assert isinstance(model, digits.Digits)
    before = gradient_by_lag(model.layers)
    loop.fit(training, place, resume=False, command=f"seqserve compare cells --only '{name}'", progress=False)
    rows = curves.read(place)
    print(f"{name}: {max(r['validation_accuracy'] for r in rows):.1%} in {rows[-1]['seconds']:.0f} s", file=sys.stderr)
    return Learnt(name, checkpoint.load(place).parameters, rows[-1]["seconds"], rows, before, gradient_by_lag(model.layers))


def gradient_by_lag(layers: Any, clip: float = 0.0) -> list[float]:
    """How much what the layers give last depends on what they read 0, 1, 2, … steps before: the norm of the gradient of a
    random projection of it, averaged over 32 sequences of noise. With `clip` all are scaled as clipping the gradient of
    the weights to that norm scales it."""
    import torch

    generator = torch.Generator().manual_seed(0)
    width = layers.layers.input_size
    given = torch.randn(32, LAGS, width, generator=generator, requires_grad=True)
    aim = torch.nn.functional.normalize(torch.randn(32, layers.width, generator=generator), dim=-1)
    was = layers.training
    layers.eval()
    read, _ = layers(given)  # [rows, time, width]
    end = (read[:, -1] * aim).sum() / len(given)
    weights = list(layers.parameters())
    of_input, *of_weights = torch.autograd.grad(end, [given, *weights])
    layers.train(was)
    scale = 1.0
    if clip:
        norm = float(torch.stack([g.norm() for g in of_weights]).norm())
        scale = min(1.0, clip / norm)
    found: list[float] = (of_input.norm(dim=-1).mean(0).flip(0) * len(given) * scale).tolist()
    return found


def grown() -> dict[str, list[float]]:
    """The gradient by lag of Elman cells with ever larger recurrent weights, and of the largest when clipped."""
    import torch

    from training.cells import Recurrent
    from training.config import Cells

    found: dict[str, list[float]] = {}
    for name, gain in GROWING.items():
        for label, clip in ((name, 0.0), (f"{name}, clipped to norm {CLIP:g}", CLIP)):
            if clip and gain < max(GROWING.values()):
                continue
            torch.manual_seed(0)
            found[label] = gradient_by_lag(Recurrent(28, replace(Cells(), kind="elman", hidden=48, gain=gain)), clip)
    return found


def table(found: Sequence[Learnt]) -> None:
    """Print what came of each."""
    from rich.console import Console
    from rich.table import Table

    shown = Table("cell", title="The first of a sequence, remembered to its end")
    for heading in ("parameters", "best accuracy", f"steps to {LEARNT:.0%}", "seconds", "gradient at lag 20, start", "… after training"):
        shown.add_column(heading, justify="right")
    for f in found:
        at = [f"{g[20] / g[0]:.1e}" for g in (f.before, f.after)]
        shown.add_row(f.name, f"{f.parameters:,}", f"{f.accuracy:.1%}", str(f.steps or "never"), f"{f.seconds:.0f}", *at)
    Console(width=120).print(shown)
    print("gradient: its norm 20 steps before the end as a share of that at the end")


def draw(found: Sequence[Learnt], growing: Mapping[str, Sequence[float]], file: Path) -> Path:
    """Four panels: accuracy and loss over steps; the gradient by lag of each kind; the same of ever larger weights."""
    import matplotlib

    matplotlib.use("Agg")  # no display where training runs
    from matplotlib import pyplot

    figure, ((accuracy, loss), (fading, growth)) = pyplot.subplots(2, 2, figsize=(11, 8))
    for f in found:
        steps = [r["step"] for r in f.rows]
        accuracy.plot(steps, [r["validation_accuracy"] for r in f.rows], label=f.name)
        loss.plot(steps, [r["validation_loss"] for r in f.rows], label=f.name)
        fading.plot(f.before, label=f.name)
    for name, norms in growing.items():
        growth.plot(norms, label=name, linestyle="--" if "clipped" in name else "-")
    for axes, title, label in (
        (accuracy, "validation accuracy", "optimiser steps"), (loss, "validation loss", "optimiser steps"),
        (fading, "gradient of the end, before training", "time lag"), (growth, "the same, recurrent weights times a gain", "time lag"),
    ):  # fmt: skip
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(label, fontsize=9)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7)
    for axes in (fading, growth):
        axes.set_yscale("log")
        axes.set_ylabel("norm", fontsize=9)
    fading.set_ylim(bottom=1e-12)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100, metadata={"Software": None})
    pyplot.close(figure)
    return file


def _plain(f: Learnt) -> dict[str, Any]:
    return {
        "name": f.name, "parameters": f.parameters, "accuracy": f.accuracy, "steps": f.steps, "seconds": f.seconds,
        "gradient_by_lag": {"before": list(f.before), "after": list(f.after)},
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
