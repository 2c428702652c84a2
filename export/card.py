"""The model card: README.md of a bundle, for people. It knows wording and layout, no model and no onnx."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contract.bundle import Bundle
from export import convert
from training import curves
from training.checkpoint import Checkpoint
from training.config import parse
from training.tasks import About

FILE = "README.md"
PRECISIONS = "Other precisions"
"""A section that no export writes: `make precisions` measures it, on a bundle that is there."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of the card, with what it shows."""

    file: Path
    caption: str


@dataclass(frozen=True, slots=True)
class Scores:
    """Figures that the quality command measured on the test set, as it wrote them."""

    rows: Sequence[Mapping[str, Any]] = field(default_factory=tuple)

    @classmethod
    def read(cls, file: Path, model: str) -> Scores:
        """The rows of a model in the quality command's JSON: a list of objects with model, data (what they were measured
        on), metric, value, and low and high where there are floors."""
        rows = json.loads(file.read_text(encoding="utf-8"))
        return cls(tuple(r for r in rows if r.get("model") == model))


def write(
    directory: Path, bundle: Bundle, kept: Checkpoint, about: About, run: Path, scores: Scores, pictures: Sequence[Picture] = (),
    before: str = "",
) -> None:  # fmt: skip
    """Write the card into a bundle's directory, the learning curve and other pictures beside it.

    `before` is an earlier card of the very same bundle: what was measured on it holds, and stays where `scores` has nothing.
    """
    shown = [p for p in (Picture(run / curves.PICTURE, "Learning curves; dotted: the weights kept."), *pictures) if p.file.is_file()]
    for picture in shown:
        shutil.copyfile(picture.file, directory / picture.file.name)
    size = sum(f.stat().st_size for f in directory.iterdir() if f.suffix == ".onnx")
    precision = f" --precision {bundle.precision}" if bundle.precision != "float32" else ""
    paragraphs = [
        f"# {about.title}",
        about.use,
        f"Served under the name `{bundle.name}`, task `{bundle.kind}`. {kept.parameters:,} parameters, {size / 1e6:.1f} MB.",
        convert.said(bundle) if bundle.precision != "float32" else "",
        "## Design",
        about.design,
        "## Figures",
        *_figures(kept, _rows(scores) or _measured(before)),
        "## Data and licence",
        about.data,
        about.licence,
        "## Limits",
        about.limits,
        "## Making",
        "```sh\n" + kept.command + f"\npython -m export {_run_of(kept)} --out models/{bundle.name}/1{precision}\n```",
        f"Seed {kept.config['seed']}, weights of step {kept.step} (epoch {kept.epoch + 1})."
        + (f" Code at revision `{kept.revision}`." if kept.revision else ""),
        "<details><summary>Configuration</summary>\n\n```toml\n" + parse(kept.config).to_toml() + "```\n\n</details>",
        "## Graphs",
        *_graphs(bundle),
        *(f"![{p.caption}]({p.file.name})" for p in shown),
    ]
    text = "\n\n".join(p for p in paragraphs if p) + "\n"
    if also := section(before, PRECISIONS):
        text = with_section(text, PRECISIONS, also)
    (directory / FILE).write_text(text, encoding="utf-8")


def section(text: str, heading: str) -> str:
    """What stands under a heading of a card; empty where there is none."""
    _, _, rest = text.partition(f"\n## {heading}\n")
    return rest.partition("\n## ")[0].strip()


def with_section(text: str, heading: str, body: str) -> str:
    """The card with a section in place of that of the same heading, or else after the figures."""
    there = section(text, heading)
    if there:
        return text.replace(f"\n## {heading}\n\n{there}\n", f"\n## {heading}\n\n{body}\n")
    return text.replace("\n## Data and licence\n", f"\n## {heading}\n\n{body}\n\n## Data and licence\n", 1)


def with_graphs(text: str, bundle: Bundle) -> str:
    """The card with the table of the graphs as they are now."""
    there = section(text, "Graphs")
    table = "\n".join(line for line in there.splitlines() if line.startswith("|"))
    return text.replace(table, _graphs(bundle)[0]) if table else text


def _rows(scores: Scores) -> list[str]:
    return [f"| {r['data']} | {r['metric']} | {_number(r['value'])} | {_floor(r.get('low'), r.get('high'))} |" for r in scores.rows]


def _measured(before: str) -> list[str]:
    """The rows of an earlier card's figures that are not of validation."""
    lines = [line for line in section(before, "Figures").splitlines() if line.startswith("|")]
    return [line for line in lines[2:] if not line.startswith("| validation |")]


def _figures(kept: Checkpoint, rows: Sequence[str]) -> list[str]:
    lines = ["| measured on | metric | value | floor |", "|---|---|---:|---:|", *rows]
    lines += [f"| validation | {n.removeprefix('validation_').replace('_', ' ')} | {_number(v)} | |" for n, v in kept.scores.items()]
    note = "" if rows else "Figures on the test set come from the quality command, which runs this bundle as it is served."
    return ["\n".join(lines), note]


def _graphs(bundle: Bundle) -> list[str]:
    lines = ["| graph | in | out | carried | largest error | batched = alone | cut = whole |", "|---|---|---|---|---:|---|---|"]
    for name, graph in bundle.graphs.items():
        proof = bundle.verified.get(name, {})
        yes = {True: "bit for bit", False: "nearly", None: ""}
        lines.append(
            f"| `{name}` | {_tensors((t.name, t.axes) for t in graph.inputs)} | {_tensors((t.name, t.axes) for t in graph.outputs)}"
            f" | {_tensors((s.input, s.axes) for s in graph.states)} | {proof.get('largest_error', 0):.1e}"
            f" | {yes[proof.get('batched_is_alone')]}{', of different lengths too' if proof.get('padded_is_alone') else ''}"
            f" | {yes[proof.get('cut_is_whole')]} |"
        )
    whom = "PyTorch" if bundle.precision == "float32" else "the float32 graph"
    return ["\n".join(lines), f"Errors are against {whom}, found by running the server's own graph runner."]


def _tensors(listed: Any) -> str:
    return ", ".join(f"`{name}` [{', '.join(str(a) for a in axes)}]" for name, axes in listed)


def _floor(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f"{low:g} to {high:g}"
    return f"at least {low:g}" if low is not None else f"at most {high:g}" if high is not None else ""


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _run_of(kept: Checkpoint) -> str:
    """The directory that the recorded command wrote to."""
    words = kept.command.split()
    return words[words.index("--out") + 1] if "--out" in words[:-1] else f"runs/{kept.task}"
