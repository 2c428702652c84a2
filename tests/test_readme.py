"""The README's commands and examples run, against a real server with the shipped models."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process import ROOT, Served, serve

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(ROOT / "models") as server:
        yield server


@pytest.fixture(scope="module")
def somewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where commands that write may write."""
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize("command", SHELL)
def test_shell(command: str, served: Served, somewhere: Path) -> None:
    """Each line of the README's shell blocks, in order, ends well and prints something."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SEQSERVE_SERVER": f"localhost:{served.port}"}
    ran = subprocess.run(["sh", "-c", command], cwd=somewhere, env=environment, capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


@pytest.mark.parametrize("code", PYTHON, ids=["client", "tensors", "sessions"])
def test_python(code: str, served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """Each Python block runs as it stands, but for the port."""
    assert "localhost:8001" in code
    exec(compile(code.replace("localhost:8001", f"localhost:{served.port}"), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_make_targets() -> None:
    """Every `make` command that the README names exists."""
    named = set(re.findall(r"make ([\w-]+)", README)) - {"and"}
    assert {"serve", "test", "demo", "quality"} <= named
    for target in named:
        ran = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
