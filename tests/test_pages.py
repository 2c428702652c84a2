"""The pages for people say what is so: docs/models.md is that of the bundles, links lead somewhere, all that is there is named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from export import page
from tests.process import ROOT
from training import config

MODELS = (ROOT / page.PAGE).read_text(encoding="utf-8")


def pages() -> list[Path]:
    """Every Markdown file of the project: none below a directory with a dot, and none of runs."""
    every = (f for f in ROOT.rglob("*.md") if not any(p.startswith(".") for p in f.relative_to(ROOT).parts))
    return sorted(f for f in every if f.relative_to(ROOT).parts[0] not in ("runs", "models.new"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """What the page is made from, to be spoilt."""
    shutil.copytree(ROOT / "models", tmp_path / "models")
    (tmp_path / "docs").mkdir()
    for file in (page.FACTS, page.SERVED):
        shutil.copy(ROOT / file, tmp_path / file)
    return tmp_path


def test_the_models_page_is_fresh() -> None:
    """docs/models.md is what `make models-page` would write now."""
    assert page.text() == MODELS, "run: make models-page"
    assert page.main(["--check"]) == 0


def test_other_figures_over_grpc_are_told(root: Path) -> None:
    """A card whose figure the server was not seen to reach, and a bundle without an entry, are no page."""
    rows = json.loads((root / page.SERVED).read_text())
    for changed in (rows[1:], [{**rows[0], "value": rows[0]["value"] - 1}, *rows[1:]]):
        (root / page.SERVED).write_text(json.dumps(changed))
        with pytest.raises(page.Stale, match=f"{rows[0]['model']}.*measure again"):
            page.text(root)
    (root / page.SERVED).write_text(json.dumps(rows))
    assert page.text(root) == page.text()
    (root / "models" / "new").mkdir()
    with pytest.raises(page.Stale, match="new: either in models"):
        page.text(root)


def test_new_figures_replace_those_of_their_model(tmp_path: Path) -> None:
    """What is measured anew takes the place of what was known of the same models, and nothing else."""
    row = {"data": "d", "metric": "m", "low": None, "high": None}
    known, new = tmp_path / "known.json", tmp_path / "new.json"
    known.write_text(json.dumps([{**row, "model": name, "value": 1} for name in ("a", "b", "b")]))
    new.write_text(json.dumps([{**row, "model": "b", "value": 2}]))
    page.merge(known, new)
    assert [(r["model"], r["value"]) for r in json.loads(known.read_text())] == [("a", 1), ("b", 2)]


def test_every_configuration_is_named() -> None:
    """Each configuration but the toys' is a command of the page, and each command there reads its configuration."""
    said = set()
    for task, name in re.findall(r"seqserve train (\w+)(?: --config ([\w-]+))?", page.text()):
        config.load(task, name or None)
        said.add(f"{task}-{name}" if name else task)
    assert said == {file.stem for file in config.CONFIGS.glob("*.toml") if not file.stem.endswith("-toy")}


@pytest.mark.parametrize("file", pages(), ids=lambda file: str(file.relative_to(ROOT)))
def test_links(file: Path) -> None:
    """Every relative link and picture leads to something, and to a heading where it names one."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link, heading in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        there = (file.parent / link) if link else file
        assert there.exists(), link
        if heading and there.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}, f"{link}#{heading}"


def test_the_readme_names_every_model() -> None:
    """The README's table has each shipped bundle, and its heading in docs/models.md."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| \[(\w+)\]\(docs/models\.md#\1\)", readme, re.MULTILINE))
    assert named == {d.name for d in (ROOT / "models").iterdir() if d.is_dir()}
