"""`python -m export.page`: docs/models.md, every system of this project with its figures, from what is known elsewhere already.

Bundles say what they are and how they were made, their cards what they scored offline, docs/models.served.json what they scored
over gRPC, docs/models.toml what neither can know. It measures nothing and must not import torch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contract import bundle as bundles
from contract.bundle import Bundle

ROOT = Path(__file__).resolve().parent.parent
PAGE, FACTS, SERVED = Path("docs/models.md"), Path("docs/models.toml"), Path("docs/models.served.json")
CARD = "README.md"
CONFIGS = ROOT / "training" / "configs"

HEAD = """# Every system, and how good it is

<!-- written by make models-page -->

A recurrent network reads and writes in one of five shapes; here is at least one served system for each. Figures are of test sets by
which no weights were chosen, measured twice by `make quality`: offline, and over gRPC as users ask. A value that misses its floor
fails that command. Times, negative results and what was tried are in [log.md](log.md).
"""

HOW = """`make serve` serves all of them; `seqserve serve --models DIR` others. `--data DIR` is the directory of the data sets;
without it they are fetched from their official addresses. Ready models are in `models/`; commands write beside them, to `models.new/`.
"""


UNSHIPPED = """## Not shipped

Too large, too weak, not trained yet, or a step on the way to one of the above. Where there are graphs, `seqserve export` and `serve` them
likewise; `--data DIR` as above.
"""


class Stale(ValueError):
    """The page can't be written: something it needs is missing, or two sources disagree. The message says what to do."""


@dataclass(frozen=True, slots=True)
class Score:
    """One row of a card's figures, as printed; `served` as measured over gRPC, printed the same way."""

    data: str
    metric: str
    value: str
    floor: str
    served: str


@dataclass(frozen=True, slots=True)
class System:
    """A shipped system: its bundle, what its card says, and its entry in docs/models.toml."""

    bundle: Bundle
    directory: Path
    card: str
    scores: Sequence[Score]
    said: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.bundle.name

    def section(self, heading: str) -> str:
        """The text of one of the card's sections."""
        _, found, rest = self.card.partition(f"\n## {heading}\n")
        if not found:
            raise Stale(f"{self.directory / CARD} has no section {heading!r}")
        return rest.partition("\n## ")[0].strip()


def text(root: Path = ROOT) -> str:
    """The page of the bundles in `root`. Raises Stale."""
    facts = tomllib.loads((root / FACTS).read_text(encoding="utf-8"))
    served = _served(json.loads((root / SERVED).read_text(encoding="utf-8")))
    shipped = {d.name for d in (root / "models").iterdir() if d.is_dir()}
    told = [s["model"] for s in facts["system"]]
    if differ := shipped.symmetric_difference(told):
        raise Stale(f"{', '.join(sorted(differ))}: either in models/ or in {FACTS}, but not in both")
    systems = [_system(root, said, served) for said in facts["system"]]
    others = list(_others(systems, facts["unshipped"]))
    parts = [HEAD, "\n".join(_overview(systems)), HOW, *(part for s in systems for part in _chapter(root, s)), UNSHIPPED, "\n".join(others)]
    return "\n".join(part.strip("\n") + "\n" for part in parts)


def _served(rows: Iterable[Mapping[str, Any]]) -> Mapping[tuple[str, str, str], float]:
    return {(r["model"], r["data"], r["metric"]): r["value"] for r in rows}


def _system(root: Path, said: Mapping[str, Any], served: Mapping[tuple[str, str, str], float]) -> System:
    versions = [d for d in (root / "models" / said["model"]).iterdir() if d.name.isdigit()]
    directory = max(versions, key=lambda d: int(d.name))
    card = (directory / CARD).read_text(encoding="utf-8")
    made = bundles.load(directory)
    found = System(made, directory, card, (), said)
    return System(made, directory, card, list(_scores(found, served)), said)


def _scores(system: System, served: Mapping[tuple[str, str, str], float]) -> Iterable[Score]:
    """The test figures of a card; validation's chose the weights and are left to the card."""
    for line in system.section("Figures").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or len(cells) != 4 or cells[0] in ("measured on", "---", "validation"):
            continue
        data, metric, value, floor = cells
        again = served.get((system.name, data, metric))
        shown = "" if again is None else f"{again:.4g}"
        if shown != value:
            raise Stale(
                f"{system.name}, {metric} on {data}: the card says {value}, {SERVED} {shown or 'nothing'}; measure again: make quality "
                f'DATA=DIR RUN="--served --only {system.name} --json FILE", then make models-page RUN="--served FILE"'
            )
        yield Score(data, metric, value, floor, shown)


def _overview(systems: Sequence[System]) -> Iterable[str]:
    yield "| system | shape | reads | gives | figure, offline and served | floor |"
    yield "|---|---|---|---|---|---|"
    for s in systems:
        first = s.scores[0]
        figure = f"{first.data}: **{first.value}** {first.metric}"
        yield f"| [{s.name}](#{s.name}) | {s.said['shape']} | {s.said['reads']} | {s.said['gives']} | {figure} | {first.floor} |"


def _chapter(root: Path, s: System) -> Iterable[str]:
    title, _, rest = s.card.removeprefix("# ").partition("\n")
    here = Path("..") / s.directory.relative_to(root)
    size = sum(f.stat().st_size for f in s.directory.iterdir() if f.suffix == ".onnx") / 1e6
    parameters = s.bundle.made_from["parameters"]
    yield f"## {s.name}"
    yield f"**{title}.** {rest.strip().partition(chr(10))[0]} ([card]({here / CARD}))"
    yield f"*{s.said['shape'].capitalize()}.* Reads {s.said['reads']}; gives {s.said['gives']}."
    yield f"{_sentences(s.section('Design'))} {parameters:,} parameters, {size:.1f} MB, {_proved(s.bundle)}"
    yield "Data: " + _sentences(s.section("Data and licence"))
    yield "\n".join(_table(("measured on", "metric", "offline", "served", "floor"), [_row(score) for score in s.scores]))
    yield "\n".join(_table(("published", "figure", "source"), s.said["published"]))
    if "note" in s.said:
        yield s.said["note"]
    yield "```sh\n" + "\n".join(commands(s)) + "\n```"
    yield f"A client: [docs/examples/{s.said['example']}.py](examples/{s.said['example']}.py)."
    yield f"![{s.name}]({here / s.said.get('picture', 'curves.png')})"


def commands(s: System) -> list[str]:
    """How to train, export, serve and ask a system; what comes before that, if anything, and the last are of docs/models.toml."""
    made = s.bundle.made_from["command"].replace("python -m training", "seqserve train", 1)
    words = made.split()
    run = words[words.index("--out") + 1]
    precision = f" --precision {s.bundle.precision}" if s.bundle.precision != "float32" else ""
    export = f"seqserve export {run} --out models.new/{s.name}/1{precision}"
    ask = (one.replace("\n", "\\n") for one in s.said["ask"])
    return [*s.said.get("first", ()), made, export, "seqserve serve --models models.new", *ask]


def _proved(bundle: Bundle) -> str:
    proof = bundle.verified[bundle.main]
    alone = all(p.get("batched_is_alone") for p in bundle.verified.values())
    said = "exported for any length" if any(t.time_axis is not None for t in bundle.graph.inputs) else "exported for any number of rows"
    said += "; batched = alone" + (" bit for bit" if alone else " not held: callers never share a round")
    return said + (", cut = whole bit for bit" if proof.get("cut_is_whole") else "") + ", as the exporter proved."


def _sentences(text: str) -> str:
    """Paragraphs in one, each beginning with a capital and ending with a full stop."""
    return " ".join(part[0].upper() + part[1:].rstrip(".") + "." for part in text.split("\n\n"))


def _row(score: Score) -> tuple[str, ...]:
    return score.data, score.metric, score.value, score.served, score.floor


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterable[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def _others(systems: Sequence[System], came: Mapping[str, Mapping[str, str]]) -> Iterable[str]:
    """A row for each configuration that is neither a toy nor a shipped bundle's."""
    files = {f.stem: f for f in sorted(CONFIGS.glob("*.toml")) if not f.stem.endswith("-toy")}
    if gone := came.keys() - files.keys():
        raise Stale(f"{FACTS} tells of configurations that are not there: {', '.join(sorted(gone))}")
    shapes = {s.bundle.made_from["task"]: s.said["shape"] for s in systems}
    for s in systems:
        files.pop(_configuration(s.bundle), None)
    yield "| configuration | shape | what it is | train | what came of it |"
    yield "|---|---|---|---|---|"
    for name, file in files.items():
        task = tomllib.loads(file.read_text(encoding="utf-8"))["task"]
        variant = name.removeprefix(task).removeprefix("-")
        command = f"seqserve train {task}{f' --config {variant}' if variant else ''} --out runs/{name}"
        known = came.get(name, {})
        shape = shapes.get(task) or known.get("shape", "")
        yield f"| {name} | {shape} | {_comment(file)} | `{command}` | {known.get('figure', '')} |"


def _configuration(bundle: Bundle) -> str:
    """The file that a bundle's recorded command was trained with."""
    words = bundle.made_from["command"].split()
    task: str = bundle.made_from["task"]
    return f"{task}-{words[words.index('--config') + 1]}" if "--config" in words else task


def _comment(file: Path) -> str:
    """The first paragraph of the comment at the head of a configuration."""
    lines = itertools.takewhile(lambda line: line.startswith("# "), file.read_text(encoding="utf-8").splitlines())
    return " ".join(line.removeprefix("# ") for line in lines)


def merge(file: Path, new: Path) -> None:
    """Put newly measured rows of `make quality --served --json` in place of those of the same models."""
    rows = json.loads(new.read_text(encoding="utf-8"))
    models = {r["model"] for r in rows}
    kept = [r for r in json.loads(file.read_text(encoding="utf-8")) if r["model"] not in models] if file.is_file() else []
    lines = ",\n".join(json.dumps(r, ensure_ascii=False) for r in [*kept, *rows])
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    words = argparse.ArgumentParser(prog="make models-page", description="Write docs/models.md from the bundles in models/.")
    words.add_argument("--check", action="store_true", help="write nothing; fail where the page is not what would be written")
    words.add_argument("--served", type=Path, help="figures measured over gRPC: the JSON of make quality with --served")
    asked = words.parse_args(arguments)
    try:
        if asked.served is not None:
            merge(ROOT / SERVED, asked.served)
        page = text()
    except (Stale, OSError, bundles.BundleError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    if not asked.check:
        (ROOT / PAGE).write_text(page, encoding="utf-8")
    elif (ROOT / PAGE).read_text(encoding="utf-8") != page:
        print(f"error: {PAGE} is stale: make models-page", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
