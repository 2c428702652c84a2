"""The documentation says what is so: every block of the README and docs/ that can be run is run, in order, against one server with the
shipped models; those that can't are named here with why. Pages written from the code are fresh; the site builds without a warning."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs import draw_concepts, write_reference
from tests.blocks import Block, blocks, parse, run
from tests.process import ROOT, Served, serve

DOCS = ROOT / "docs"
ELSEWHERE = {
    "docs/models.md",  # its questions are asked by tests/test_examples.py, its trainings are of hours
    "docs/http.md",  # run by tests/test_web_http.py, with a web process before the server
}
PAGES = [ROOT / "README.md", *sorted(f for f in DOCS.rglob("*.md") if f.relative_to(DOCS).parts[0] != "project")]
EVERY = [block for page in PAGES if str(page.relative_to(ROOT)) not in ELSEWHERE for block in blocks(page)]
RUN = [block for block in EVERY if block.kind in ("sh", "python") and not block.why]
NOT_RUN = {
    ("docs/distributed.md", "two processes train for a minute"): 2,
    ("docs/distributed.md", "needs several GPUs and data"): 1,
    ("docs/distributed.md", "needs several machines"): 1,
    ("docs/distributed.md", "needs data and a quarter of an hour"): 1,
    ("docs/load.md", "needs data, and a network for the package"): 1,
    ("docs/load.md", "needs data, and minutes"): 1,
    ("docs/security.md", "needs another machine, with TLS"): 3,
    ("docs/series.md", "needs data, and minutes"): 1,
    ("docs/training.md", "trains for a minute: the README has the same"): 1,
    ("docs/training.md", "needs data, and hours"): 1,
}
"""Blocks that are marked as not to be run, by page and why: so many of each."""


@pytest.fixture(scope="module")
def somewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's directory: `models/` is what the server serves, and what is made here can be loaded."""
    root = tmp_path_factory.mktemp("reader")
    (root / "models").mkdir()
    for model in (ROOT / "models").iterdir():
        (root / "models" / model.name).symlink_to(model)
    return root


@pytest.fixture(scope="module")
def served(somewhere: Path) -> Iterator[Served]:
    with serve(somewhere / "models") as server:
        yield server


def test_what_is_not_run() -> None:
    """Each block that is marked is listed, and nothing else is."""
    assert Counter((b.page, b.why) for b in EVERY if b.why) == NOT_RUN


@pytest.mark.timeout(300)  # one of them trains
@pytest.mark.parametrize("block", RUN, ids=str)
def test_block(block: Block, served: Served, somewhere: Path) -> None:
    """A block runs to its end. What a print's comment says with an arrow comes out."""
    said = run(block, served, somewhere)
    assert said.strip() or "print(" not in block.text
    expected = re.findall(r"^\s*print\(.*\)  # → (.+)$", block.text, re.MULTILINE) if block.kind == "python" else []
    for line in expected:
        assert line in said.splitlines(), said


@pytest.mark.parametrize("block", [b for b in EVERY if b.kind in ("json", "toml", "yaml")], ids=str)
def test_data(block: Block) -> None:
    """Data in a page can be read as what it is."""
    parse(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets(page: Path) -> None:
    """Every `make` command that a page names exists."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`make ([a-z-]+)", text)) | set(re.findall(r"^    make ([a-z-]+)", text, re.MULTILINE))
    assert named <= targets
    if page.name == "README.md":
        assert {"serve", "test", "demo", "quality", "docs"} <= named


def test_reference_is_fresh() -> None:
    """docs/reference/ is what `make reference` would write now."""
    assert write_reference.stale() == [], "run: make reference"


def test_drawings_are_fresh() -> None:
    """docs/drawings/ is what its script draws now, and no drawing is without one."""
    drawn = {f"{name}.svg": draw() for name, draw in draw_concepts.DRAWINGS.items()}
    there = {f.name: f.read_text(encoding="utf-8") for f in (DOCS / "drawings").iterdir()}
    assert drawn == there, "run: python -m docs.draw_concepts"


def test_site(tmp_path: Path) -> None:
    """The site builds with warnings as errors: every link, heading and picture is there. A page asks no other host for anything."""
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "-q", "-d", str(tmp_path / "trees"), str(DOCS), str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert built.returncode == 0, built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert {"index.html", "errors.html", "walkthrough.html", "sessions.html"} <= {p.name for p in pages}
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"(?:https?:)?//[^\"]*", text) == []
        assert re.findall(r"<link\b(?=[^>]*\b(?:stylesheet|preload|icon|preconnect))[^>]*\bhref=\"(?:https?:)?//[^\"]*", text) == []
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert re.findall(r"(?:url\(|@import )['\"]?(?:https?:)?//[^)]*", sheet.read_text(encoding="utf-8")) == [], sheet


def test_a_broken_link_fails_the_site(tmp_path: Path) -> None:
    """A link to a page or heading that is not there is told, with its place."""
    (tmp_path / "docs").mkdir()
    shutil.copy(DOCS / "conf.py", tmp_path / "docs")
    shutil.copytree(DOCS / "_static", tmp_path / "docs" / "_static")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file in ("ARCHITECTURE.md", "CHANGELOG.md"):
        (tmp_path / file).write_text("# A page\n")
    (tmp_path / "docs" / "index.md").write_text("# First\n\n[here](errors.md#gone) and [there](nowhere.md)\n")
    (tmp_path / "docs" / "errors.md").write_text("# Errors\n")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", str(tmp_path / "docs"), str(tmp_path / "site")]
    built = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert built.returncode != 0
    assert "gone" in built.stderr
    assert "nowhere" in built.stderr
