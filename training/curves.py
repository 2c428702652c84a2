"""The history of a run: one line of JSON per validation, and its picture. It must not know any model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display where training runs
from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator

FILE = "history.jsonl"
PICTURE = "curves.png"

Row = Mapping[str, float]


def read(out: Path) -> list[Row]:
    """The validations of a run so far, oldest first."""
    file = out / FILE
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def append(out: Path, row: Row) -> None:
    """Add one validation; rows at or after its step, left by a run that was resumed from before them, are dropped."""
    kept = [old for old in read(out) if old["step"] < row["step"]]
    (out / FILE).write_text("".join(json.dumps(r) + "\n" for r in [*kept, row]), encoding="utf-8")


def draw(out: Path, title: str, monitor: str, highest: bool) -> Path:
    """Draw each score and the learning rate over epochs; the best validation is marked."""
    rows = read(out)
    names = sorted({name for row in rows for name in row} - {"step", "epoch", "seconds", "lr"})
    panels: dict[str, list[str]] = {}
    for name in names:  # the same score in training and in validation shares a panel
        panels.setdefault(name.removeprefix("train_").removeprefix("validation_").replace("_", " "), []).append(name)
    panels["learning rate"] = ["lr"]
    width = min(3, len(panels))
    height = -(-len(panels) // width)
    figure, axes = pyplot.subplots(height, width, figsize=(4.2 * width, 3.0 * height), squeeze=False)
    best = (max if highest else min)((r for r in rows if monitor in r), key=lambda r: r[monitor], default=None)
    for place, (label, shown) in zip(axes.flat, panels.items(), strict=False):
        for name in shown:
            points = [(r["epoch"], r[name]) for r in rows if name in r]
            place.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name) if points else None
        if best is not None:
            place.axvline(best["epoch"], color="grey", linewidth=0.8, linestyle=":")
        place.set_title(label, fontsize=9)
        place.set_xlabel("epoch", fontsize=8)
        place.tick_params(labelsize=7)
        place.xaxis.set_major_locator(MaxNLocator(integer=True))
        place.grid(alpha=0.25)
        if len(shown) > 1:
            place.legend(fontsize=7)
    for place in list(axes.flat)[len(panels) :]:
        place.set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    picture = out / PICTURE
    figure.savefig(picture, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return picture
