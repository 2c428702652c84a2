"""What figure commands have in common: clients as processes of their own, a server's metrics, a table."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any

from tests.process import ROOT


def table(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    wide = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    print(f"\n{title}")
    for line in [heads, *lines]:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, wide, strict=True))), flush=True)


def ask(port: int, commands: list[list[str]]) -> list[dict[str, Any]]:
    """Clients at once, each in a process of its own."""
    run = [sys.executable, "-m", "tests.figures.bench_clients"]
    started = [subprocess.Popen([*run, c[0], "--port", str(port), *c[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True) for c in commands]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise AssertionError("a client failed: see above")
    return [json.loads(text) for text in said]


def metrics(port: int) -> Callable[..., float]:
    """The sum of a metric's samples on a server's page, of those that have the labels asked for."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
        lines = page.read().decode().splitlines()

    def total(name: str, **labels: str) -> float:
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(
            float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split(" ")[0] == name and all(w in line for w in wanted)
        )

    return total
