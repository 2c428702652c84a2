"""onnxruntime alone, as the limit that a server is held against: the same graphs, one thread a run, no network, no queue.

It knows graphs and rounds; it must not know servers. One core: CPU time of this thread, which neighbours on the machine
disturb least. Both cores: two threads at it at once, by the clock.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from contract import bundle as contract
from contract.text import Vocabulary
from tests.figures.bench_models import HIDDEN, VOCABULARY, WIDTH

Array = np.ndarray[Any, Any]
ROWS, CHUNK = 32, 32


def session(file: Path, providers: Sequence[Any] = ("CPUExecutionProvider",)) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_mem_pattern = False
    return ort.InferenceSession(str(file), options, providers=list(providers))


def tokens(rows: int, steps: int) -> dict[str, Array]:
    zero = np.zeros((1, rows, HIDDEN), np.float32)
    drawn = np.random.default_rng(rows * steps).integers(0, VOCABULARY, (rows, steps))
    return {"tokens": drawn, "h0": zero, "c0": zero}


def step(rows: int) -> dict[str, Array]:
    zero = np.zeros((2, rows, HIDDEN), np.float32)
    return {"x": np.random.default_rng(rows).normal(size=(rows, 1, WIDTH)).astype(np.float32), "h0": zero, "c0": zero}


def one_core(work: Callable[[], object], seconds: float) -> float:
    """Seconds of CPU that a piece of work takes: the median of five spans."""
    work()
    spans = []
    for _ in range(5):
        began, until, times = time.thread_time(), time.perf_counter() + seconds / 5, 0
        while not times or time.perf_counter() < until:
            work()
            times += 1
        spans.append((time.thread_time() - began) / times)
    return statistics.median(spans)


def two_cores(work: Callable[[], object], seconds: float) -> float:
    """Seconds a piece of work takes where two threads share the pieces."""
    counts = [0, 0]
    began = time.perf_counter()

    def run(at: int) -> None:
        while time.perf_counter() < began + seconds:
            work()
            counts[at] += 1

    threads = [threading.Thread(target=run, args=(at,)) for at in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (time.perf_counter() - began) / sum(counts)


def rounds(lengths: list[int], rows: int = ROWS, chunk: int = CHUNK) -> list[tuple[int, int]]:
    """The rounds, (rows, steps), in which sequences of these lengths advance in order of arrival, nothing padded."""
    waiting = list(lengths)
    live: list[int] = []
    made: list[tuple[int, int]] = []
    while waiting or live:
        while waiting and len(live) < rows:
            live.append(waiting.pop(0))
        steps = min(chunk, *live)
        made.append((len(live), steps))
        live = [left - steps for left in live if left > steps]
    return made


def _runs(onnx: ort.InferenceSession, feeds: list[dict[str, Array]]) -> Callable[[], object]:
    return lambda: [onnx.run(None, f) for f in feeds]


def workloads(models: Path, lengths: dict[str, list[int]]) -> dict[str, tuple[Callable[[], object], float]]:
    """What to run for each workload, and how many calls that stands for."""
    a, b = session(models / "model_a" / "1" / "model.onnx"), session(models / "model_b" / "1" / "model.onnx")
    made: dict[str, tuple[Callable[[], object], float]] = {}
    for steps in (32, 128):
        feeds = [tokens(ROWS, CHUNK)] * (steps // CHUNK)
        made[f"A t={steps}"] = (_runs(a, feeds), ROWS)
    for name, of in lengths.items():
        made[f"A {name}"] = (_runs(a, [tokens(*r) for r in rounds(of)]), len(of))
    alone, fed = tokens(1, 32), step(ROWS)
    made["A alone"] = (lambda: a.run(None, alone), 1)
    made["B"] = (lambda: b.run(None, fed), ROWS)
    fed_one = step(1)
    made["B alone"] = (lambda: b.run(None, fed_one), 1)
    return made


class Greedy:
    """The shipped translator in batches of 64 offline: sources of equal length are encoded together, all 64 decode together,
    and who has finished leaves."""

    def __init__(self, directory: Path, providers: Sequence[Any] = ("CPUExecutionProvider",)) -> None:
        bundle = contract.load(directory)
        self._encode = session(directory / bundle.graphs["encode"].file, providers)
        self._step = session(directory / bundle.graph.file, providers)
        self._states = bundle.graph.states
        self._ends = next((t for t in bundle.graphs["encode"].inputs if t.role == "lengths"), None)
        self._names = ["log_probs", "ids", *(s.output for s in self._states)]
        self.begin, self.end, self.most = (int(bundle.task[k]) for k in ("start", "end", "max_length"))
        self.vocabulary = Vocabulary.load(directory / bundle.resources[bundle.task["vocabulary"]])

    def sources(self, texts: list[str]) -> list[Array]:
        """Token ids, shortest first."""
        return sorted((np.append(ids, self.end) for ids in self.vocabulary.encode_many(texts)), key=len)

    def translate(self, sources: list[Array]) -> int:
        """Translate one batch, sorted by length; the tokens made."""
        memories: list[Array] = []
        firsts: list[dict[str, Array]] = []
        at = 0
        while at < len(sources):
            same = [s for s in sources[at:] if len(s) == len(sources[at])]
            feeds = {"tokens": np.stack(same)}
            if self._ends is not None:
                feeds[self._ends.name] = np.full(len(same), len(same[0]), self._ends.numpy_dtype)
            memory, h, c = self._encode.run(["memory", "h", "c"], feeds)
            memories += list(memory)
            firsts.append({"h": h, "c": c})
            at += len(same)
        states = {s.input: s.fresh(len(sources)) for s in self._states}
        for name in ("h", "c"):
            states[name] = np.concatenate([f[name] for f in firsts], 1)
        lengths = np.array([len(m) for m in memories])
        memory = np.concatenate(memories)
        last = np.full((len(sources), 1), self.begin)
        made = 0
        for _ in range(self.most):
            row = np.repeat(np.arange(len(lengths)), lengths)
            _, ids, *following = self._step.run(self._names, {"tokens": last, "memory": memory, "row": row, **states})
            states = {s.input: v for s, v in zip(self._states, following, strict=True)}
            made += len(ids)
            last = ids[:, :1]
            goes_on = last[:, 0] != self.end
            if goes_on.all():
                continue
            if not goes_on.any():
                break
            memory, lengths, last = memory[goes_on[row]], lengths[goes_on], last[goes_on]
            axes = {s.input: s.batch_axis for s in self._states}
            states = {name: v.compress(goes_on, axes[name]) for name, v in states.items()}
        return made

    def rate(self, texts: list[str], cores: int) -> float:
        """Texts a second: one core by CPU time, two by the clock with a batch to each thread in turn."""
        sources = self.sources(texts)
        batches = [sources[at : at + 64] for at in range(0, len(sources), 64)]
        self.translate(batches[0])
        if cores == 1:
            began = time.thread_time()
            for batch in batches:
                self.translate(batch)
            return len(texts) / (time.thread_time() - began)
        threads = [threading.Thread(target=lambda at=at: [self.translate(batch) for batch in batches[at::2]]) for at in (0, 1)]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(texts) / (time.perf_counter() - start)
