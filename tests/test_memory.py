"""What large rounds took is given back: a server's memory is that of what it does now, not of the most that it ever did."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

from server import graph
from tests import models
from tests.process import ROOT

PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from contract import bundle as contract
from server import app, graph

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / (1 << 20)

directory = Path(sys.argv[1])
bundle = contract.load(directory)
onnx = graph.OnnxGraph(bundle.graph, directory / bundle.graph.file)

def run(rows, steps):
    onnx.run({"x": np.ones((rows, steps, 16), np.float32), **{s.input: s.fresh(rows) for s in bundle.graph.states}})

run(1, 1)
before = resident()
run(256, 128)
large = resident()
run(1, 1)
kept = resident()
graph.shrink()
run(1, 1)
app._trim()
print(large - before, kept - before, resident() - before)
"""


def test_a_large_round_is_forgotten(tmp_path: Path) -> None:
    """The arena keeps what a large round took, for the next; after `shrink` the next run of any size gives it back."""
    models.two_layers(tmp_path / "two_layers" / "1", hidden=64)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "two_layers" / "1")]
    said = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    large, kept, left = map(float, said.stdout.split())
    assert large > 30
    assert kept > 15
    assert left < 5


def test_shrinking_meets_many_runs(tmp_path: Path) -> None:
    """Asked again and again while threads run: every run gives what it gave alone."""
    models.two_layers(tmp_path / "two_layers" / "1", hidden=16)
    bundle = models.contract.load(tmp_path / "two_layers" / "1")
    onnx = graph.OnnxGraph(bundle.graph, tmp_path / "two_layers" / "1" / bundle.graph.file)
    feeds = [
        {"x": np.full((rows, 4, 16), rows / 9, np.float32), **{s.input: s.fresh(rows) for s in bundle.graph.states}} for rows in range(1, 9)
    ]
    alone = [onnx.run(f)[0].tobytes() for f in feeds]
    differing: list[int] = []

    def work() -> None:
        for _ in range(40):
            differing.extend(n for n, f in enumerate(feeds) if onnx.run(f)[0].tobytes() != alone[n])
            graph.shrink()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not differing
