"""What sequences of mixed lengths cost in rounds: `make round-cost`. One thread, no gRPC: callers in a closed loop hand packed tokens to
the engine and read its answers; rounds are run as by two workers. Model A of `make bench`.

Printed by lengths and callers, the best of several passes: µs of the thread's CPU a call, onnxruntime's part of it, rounds a call,
rows a round, how many rounds a row passes through. Nothing is judged.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from server import sequence
from server.app import App
from server.config import Config
from server.inputs import Sizes
from tests.figures.bench_lines import lengths
from tests.figures.bench_models import VOCABULARY, model_a

CALLS = 512
MIXES = ("32", "128", "1–128", "IMDb")


@dataclass(slots=True)
class Spent:
    """Of one pass."""

    cpu: float = 0.0  # seconds
    onnx: float = 0.0
    rounds: int = 0
    rows: int = 0


def measure(app: App, of: list[int], callers: int) -> Spent:
    """Answer a call of each length, `callers` of them at once."""
    engine = app.catalog.find("model_a").engine
    graph = engine.graphs[engine.bundle.main]
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, max(of)).astype(np.int64)
    waiting = [((tokens[:n].tobytes(),), Sizes(1, n)) for n in reversed(of)]
    answered = 0
    spent = Spent()
    onnx = graph.run

    def run(feeds: Mapping[str, Any]) -> Any:
        began = time.thread_time()
        results = onnx(feeds)
        spent.onnx += time.thread_time() - began
        spent.rounds += 1
        spent.rows += len(results[0])
        return results

    def then(s: sequence.Sequence, outputs: sequence.Outputs) -> None:
        nonlocal answered
        answered += 1
        assert isinstance(outputs, sequence.Views)
        outputs.data(graph.graph.outputs[0])
        ask()

    def failed(error: Exception) -> None:
        raise AssertionError(error)

    def ask() -> None:
        if waiting:
            engine.submit(sequence.Sequence(engine.bundle.main, *waiting.pop(), then, failed))

    graph.run = run  # type: ignore[method-assign]
    began = time.thread_time()
    for _ in range(callers):
        ask()
    while app.workers.step():
        pass
    spent.cpu = time.thread_time() - began
    graph.run = onnx  # type: ignore[method-assign]
    assert answered == len(of)
    return spent


def main(argv: Sequence[str] | None = None) -> int:
    words = argparse.ArgumentParser(prog="make round-cost", description=(__doc__ or "").split("\n\n")[0])
    words.add_argument("--passes", type=int, default=5)
    asked = words.parse_args(argv)
    said: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        models = Path(name) / "models"
        model_a(models / "model_a" / "1" / "model.onnx")
        app = App(Config(models=models, workers=2))
        app.catalog.scan(models)
        for mix in MIXES:
            for callers in (32, 64):
                of = lengths(mix, CALLS)
                measure(app, of, callers)
                spent = min((measure(app, of, callers) for _ in range(asked.passes)), key=lambda spent: spent.cpu)
                cpu, onnx = (seconds / CALLS * 1e6 for seconds in (spent.cpu, spent.onnx))
                print(
                    f"{mix:6} {callers} callers: {cpu:6.0f} µs a call, {onnx:6.0f} of it onnxruntime; {spent.rounds / CALLS:.2f} rounds a "
                    f"call of {spent.rows / spent.rounds:4.1f} rows, a row passes through {spent.rows / CALLS:.1f}",
                    flush=True,
                )
                said.append(f"{mix}/{callers} {cpu:.0f} µs")
    print("round-cost · " + " · ".join(said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
