"""`make gpu-bench` runs on a CPU, prints its table, and sees a wrong answer."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from server.catalog import Catalog
from server.graph import OnnxGraph
from server.metrics import Metrics
from server.rounds import Limits
from server.workers import Workers
from tests.figures import gpu_bench
from tests.figures.sessions_bench import INPUTS
from tests.models import two_layers


def test_sessions_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Every way of running has its line, with states in banks and on the host; no state crosses on the way."""
    asked = ["--device", "cpu", "--part", "sessions", "--sessions", "3,20", "--seconds", "0.2", "--hidden", "8", "--sizes", "16"]
    assert gpu_bench.main(asked) == 0
    said = capsys.readouterr().out
    for way in (
        "engine, states on the device, 3",
        "engine, states on the host, 3",
        "with its sessions, 3",
        "engine, states on the device, 20",  # after what was brought by a thread that attends
        "with its sessions, 20",
        "onnxruntime alone, states as arrays",
    ):
        (line, *_) = [line for line in said.splitlines() if way in line]
        assert re.search(r"  [1-9][\d,]*  ", line), line
    bound = next(line for line in said.splitlines() if "engine, states on the device" in line)
    assert bound.split()[-4] == "0", "bytes of state a turn"


def test_a_wrong_answer_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are held against whole runs on the CPU: one float off by a thousandth fails the bench."""
    bundle = two_layers(tmp_path / gpu_bench.NAME / "1", hidden=8)
    monkeypatch.setattr(gpu_bench, "MODELS", [str(tmp_path)])
    catalog = Catalog(Workers(0), Limits(), Metrics(), 256)
    catalog.scan(tmp_path)
    graph = OnnxGraph(bundle.graph, tmp_path / gpu_bench.NAME / "1" / bundle.graph.file)
    x = np.concatenate([INPUTS[t] for t in (1, 2, 3)], 1)
    whole = graph.run({"x": x, **{s.input: s.fresh(1) for s in bundle.graph.states}})[0]
    kept = [[np.ascontiguousarray(whole[:, t]).tobytes() for t in range(3)]]
    gpu_bench.check(catalog.find(gpu_bench.NAME), kept, "here")
    whole = whole.copy()
    whole[0, 2, 5] += 1e-3
    kept[0][2] = np.ascontiguousarray(whole[:, 2]).tobytes()
    with pytest.raises(AssertionError, match="off the CPU"):
        gpu_bench.check(catalog.find(gpu_bench.NAME), kept, "here")


def test_processes_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Each way of calling has its line by each number of carriers, with the CPU that the server and they took."""
    asked = ["--device", "cpu", "--part", "processes", "--processes", "0,1", "--seconds", "0.3", "--hidden", "8", "--sizes", "16"]
    assert gpu_bench.main(asked) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "carrier" in line and line.endswith("/s")]
    assert len(lines) == 6
    for line in lines:
        found = re.search(r"(no|1) carriers?  +[1-9][\d,]*  +[\d.]+  +[\d.,]+  +[\d.,]+  +([\d.]+)  +(–|[\d.]+)  +[1-9][\d,]*/s", line)
        assert found is not None, line
        assert float(found[2]) > 0
        assert (found[1] == "no") == (found[3] == "–")
