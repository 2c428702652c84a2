"""Fenced blocks of Markdown, and how they are run against a server: `sh` line by line, `python` whole, data parsed.

A block that can't be run here has a comment right before it, `<!-- not run: WHY -->`; tests list them. A line that starts a server is
read, not run: its flags must be flags. What is indented, or of another language, is for people.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from server.config import Config
from tests.process import ROOT, Served

_BLOCK = re.compile(
    r"(?:<!-- not run: (?P<why>[^\n]*?) -->\n+)?^(?P<in>[ ]*)```(?P<kind>\w+)\n(?P<text>.*?)^[ ]*```$", re.MULTILINE | re.DOTALL
)
_SERVES = re.compile(r"(?:(?P<set>(?:\w+=\S+ +)*))seqserve serve\b(?P<flags>.*)")
WANTED = "localhost:8001"
"""How pages call the server that a reader has started."""


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block: where, in what language, why it is not run ("": it is)."""

    page: str
    line: int
    kind: str
    text: str
    why: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(file: Path) -> Iterator[Block]:
    text = file.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        body = re.sub(rf"^{found['in']}", "", found["text"], flags=re.MULTILINE)
        line = text.count("\n", 0, found.start("kind")) + 1
        yield Block(str(file.relative_to(ROOT)), line, found["kind"], body, found["why"] or "")


def run(block: Block, served: Served, where: Path) -> str:
    """What a block prints, run in a directory. Raises AssertionError where a command fails, or whatever the code raises."""
    return shell(block.text, served, where) if block.kind == "sh" else python(block, served, where)


def shell(text: str, served: Served, where: Path) -> str:
    """Each line in order; a line that ends in a backslash goes on with the next."""
    said = ""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SEQSERVE_SERVER": f"localhost:{served.port}", "PYTHONPATH": str(ROOT)}
    for line in filter(None, text.replace("\\\n", " ").splitlines()):
        if found := _SERVES.match(line):
            pairs = dict(pair.split("=", 1) for pair in found["set"].split())
            Config.parse(shlex.split(found["flags"], comments=True), pairs)
            continue
        ran = subprocess.run(["sh", "-c", line], cwd=where, env=environment, capture_output=True, text=True, timeout=110)
        assert ran.returncode == 0, f"{line}\n{ran.stderr}"
        said += ran.stdout
    return said


def python(block: Block, served: Served, where: Path) -> str:
    """In this process, which has the packages loaded; in its own where NVIDIA's client is used, whose messages can't be beside ours,
    or torch's exporter, which fixes an axis that is open when it runs amid other tests."""
    code = block.text.replace(WANTED, f"localhost:{served.port}")
    if "tritonclient" in code or "import torch" in code:
        command = [sys.executable, "-c", code]
        ran = subprocess.run(command, cwd=where, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=110)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout
    said = io.StringIO()
    with contextlib.chdir(where), contextlib.redirect_stdout(said):
        exec(compile(code, str(block), "exec"), {"__name__": "__main__"})
    return said.getvalue()


def parse(block: Block) -> None:
    """Data must be what its block says it is."""
    if block.kind == "json":
        json.loads(block.text)
    elif block.kind == "toml":
        tomllib.loads(block.text)
    elif block.kind == "yaml":
        list(yaml.safe_load_all(block.text))
