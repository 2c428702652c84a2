"""The clients in docs/examples, the questions of docs/models.md and `seqserve demo` run as they stand, against a server with the
shipped models."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from seqserve import demo
from tests.process import ROOT, Served, serve

EXAMPLES = ROOT / "docs" / "examples"
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "models.md").read_text(encoding="utf-8"), re.DOTALL)
MAKES = re.compile(r"seqserve (train|export|serve) |python |.* > runs/")  # what a training needs, and takes its time
ASKED = [line for block in BLOCKS for line in block.splitlines() if not MAKES.match(line)]

SAID: dict[str, tuple[list[str], list[str]]] = {
    "digits": ([], ["in one call, the same bits: True"]),
    "forecast": ([], ["96 hours ahead of HUFL", "turns applied: 31 and in the fork 31"]),
    "generate": ([], ["the same seed, the same text: True"]),
    "names": ([], ["3 posts", "London", "of split words:"]),
    "review": ([], ["read whole, the same score: True"]),
    "tensors": ([], ["window_mlp: (1, 96, 7)", "% positive", "after 'my whole family"]),
    "translate": (["picture.png", "A dog runs on the beach."], ["← ▁beach", "picture.png"]),
}
"""What each example is given after the server's address, and what it must say."""


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(ROOT / "models") as server:
        yield server


def test_every_example_is_here() -> None:
    """No example without a test."""
    assert {file.stem for file in EXAMPLES.glob("*.py")} == set(SAID)


@pytest.mark.parametrize("name", SAID)
def test_example(name: str, served: Served, tmp_path: Path) -> None:
    """An example runs to its end and says what it is for; a picture it draws is one."""
    given, said = SAID[name]
    ran = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", f"localhost:{served.port}", *given], cwd=tmp_path, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    for line in said:
        assert line in ran.stdout
    for picture in tmp_path.iterdir():
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_demo_asks_every_kind(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """One of each kind of model that is served is asked, and everything goes well."""
    assert demo.run(f"localhost:{served.port}") == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    titles = ("Classify", "A session", "Translate", "Tag", "Generate", "Forecast", "A digit", "Plain tensors")
    assert [title for title in titles if f"\n{title}" not in out] == []


@pytest.mark.parametrize("command", ASKED)
def test_questions(command: str, served: Served, tmp_path: Path) -> None:
    """What docs/models.md asks is answered."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SEQSERVE_SERVER": f"localhost:{served.port}"}
    ran = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
