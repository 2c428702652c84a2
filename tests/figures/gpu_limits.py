"""What `make gpu-bench` holds the server against, on the same device: onnxruntime alone and PyTorch, no network, no queue; and the texts.

It knows graphs and devices; it must not know servers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from contract import bundle as contract
from contract.bundle import Graph
from contract.text import Vocabulary
from server.devices import Device, Placement
from server.graph import _providers
from tests.figures import bench_bare
from tests.figures.sessions_bench import INPUTS
from tests.process import ROOT


def bare_turns(file: Path, graph: Graph, device: Device, rows: int, seconds: float, *, far: bool) -> float:
    """Turns a second of onnxruntime in a loop, `rows` at once: states as arrays, or (`far`) left on the device."""
    onnx = bench_bare.session(file, _providers(device, Placement()))
    feeds = {"x": np.repeat(INPUTS[0], rows, 0)}
    names = [s.output for s in graph.states]
    states: list[Any] = [s.fresh(rows) for s in graph.states]
    values = [ort.OrtValue.ortvalue_from_numpy(s, device.kind, device.index) for s in states] if far else []

    def run() -> None:
        nonlocal states, values
        if far:
            binding = onnx.io_binding()
            binding.bind_cpu_input("x", feeds["x"])
            for state, value in zip(graph.states, values, strict=True):
                binding.bind_ortvalue_input(state.input, value)
            binding.bind_output("y", "cpu")
            for name in names:
                binding.bind_output(name, device.kind, device.index)
            onnx.run_with_iobinding(binding)
            values = binding.get_outputs()[1:]
            binding.get_outputs()[0].numpy()
        else:
            _, *states = onnx.run(["y", *names], {**feeds, **{s.input: v for s, v in zip(graph.states, states, strict=True)}})

    return rows / each(run, seconds)


def each(work: Callable[[], object], seconds: float) -> float:
    """Seconds a piece of work takes, over and over."""
    for _ in range(3):
        work()
    began, times = time.perf_counter(), 0
    while time.perf_counter() < began + seconds:
        work()
        times += 1
    return (time.perf_counter() - began) / times


def torch_sessions(device: Device, hidden: int, rows: int, seconds: float) -> tuple[str, float] | None:
    """Turns a second of PyTorch, all rows in one batch: cuDNN on a GPU."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(1)  # on a CPU, as rounds have one
    where = str(device) if device.kind == "cuda" and torch.cuda.is_available() else "cpu"
    with torch.inference_mode():
        lstm, out = torch.nn.LSTM(16, hidden, 2).to(where), torch.nn.Linear(hidden, 16).to(where)
        state: Any = None

        def run() -> None:
            nonlocal state
            y, state = lstm(torch.from_numpy(np.repeat(INPUTS[0], rows, 0).reshape(1, rows, 16)).to(where), state)
            out(y).cpu()

        return f"PyTorch {torch.__version__} on {where}", rows / each(run, seconds)


def reviews(data: Path, most: int) -> list[str]:
    """IMDb's test reviews; where they are not at hand, words drawn with lengths like theirs, which is said."""
    try:
        from training.data import imdb

        return list(imdb.read("test", data).texts[:: max(1, 25_000 // most)][:most])
    except Exception as e:
        print(f"IMDb is not at hand ({type(e).__name__}): words are drawn, with lengths log-normal about its median of 174", flush=True)
        rng = np.random.default_rng(0)
        words = ["the", "film", "was", "a", "good", "bad", "story", "and", "of", "plot", "actor", "ending"]
        return [" ".join(rng.choice(words, int(n))) for n in np.clip(rng.lognormal(np.log(174), 0.62, most), 10, 1500)]


def sentences(data: Path, most: int) -> list[str]:
    try:
        from training.data import multi30k

        return multi30k.load("test_2016_flickr", "en", data)[:most]
    except Exception as e:
        print(f"test_2016 is not at hand ({type(e).__name__}): sentences are made up", flush=True)
        return [
            f"A {c} dog {v} {p} the {o}."
            for c in ("brown", "big", "wet")
            for v in ("runs", "jumps", "sleeps")
            for p in ("over", "by")
            for o in ("snow", "ball")
        ]


def bare_reviews(texts: list[str], device: Device) -> dict[str, float]:
    """Sequences a second of onnxruntime alone in the same rounds, and of PyTorch, an LSTM of the same size over batches of 256 sorted by
    length and padded."""
    directory = ROOT / "models" / "sentiment" / "1"
    bundle = contract.load(directory)
    graph = bundle.graph
    vocabulary = Vocabulary.load(directory / bundle.resources[str(bundle.task["vocabulary"])])
    ids = [np.asarray(i) for i in vocabulary.encode_many(texts)]
    onnx = bench_bare.session(directory / graph.file, _providers(device, Placement()))
    names = [s.output for s in graph.states]
    rounds = bench_bare.rounds([len(i) for i in ids], 256, 32)

    def run() -> None:
        for rows, steps in rounds:
            onnx.run(names, {"tokens": np.ones((rows, steps), np.int64), **{s.input: s.fresh(rows) for s in graph.states}})

    began = time.perf_counter()
    run()
    found = {"onnxruntime": len(ids) / (time.perf_counter() - began)}
    try:
        import torch
    except ImportError:
        return found
    where = str(device) if device.kind == "cuda" and torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    hidden = int(graph.states[0].axes[-1])
    with torch.inference_mode():
        table_, lstm = torch.nn.Embedding(20_000, 128).to(where), torch.nn.LSTM(128, hidden, batch_first=True).to(where)
        ordered = sorted(map(len, ids))
        lstm(table_(torch.zeros((4, 8), dtype=torch.long, device=where)))
        began = time.perf_counter()
        for at in range(0, len(ordered), 256):
            batch = ordered[at : at + 256]
            lstm(table_(torch.zeros((len(batch), max(batch)), dtype=torch.long, device=where)))[0].amax(1).cpu()
        found["torch"] = len(ordered) / (time.perf_counter() - began)
    return found


def bare_sentences(texts: list[str], device: Device) -> dict[str, float]:
    greedy = bench_bare.Greedy(ROOT / "models" / "translator" / "1", _providers(device, Placement()))
    sources = greedy.sources(texts)
    greedy.translate(sources[:16])
    began = time.perf_counter()
    for at in range(0, len(sources), 256):
        greedy.translate(sources[at : at + 256])
    return {"onnxruntime": len(texts) / (time.perf_counter() - began)}
