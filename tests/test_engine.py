"""The engine on tiny graphs, without gRPC: answers do not depend on company, and nobody's fault is another's."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.catalog import Catalog, Model
from server.errors import DeadlineExceeded, Draining, ModelFailed, Overloaded, ServeError
from server.metrics import Metrics
from server.rounds import Limits
from server.sequence import Outputs, Sequence, Views
from server.shares import Claim
from server.workers import Workers
from tests import models

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    models.library(root)
    return root


class Bench:
    """A catalog whose rounds run when the test says so, on a clock the test sets."""

    def __init__(self, library: Path, limits: Limits | None = None, threads: int = 0) -> None:
        self.now = 100.0
        self.workers = Workers(threads, lambda: self.now)
        self.metrics = Metrics()
        self.catalog = Catalog(self.workers, limits or Limits(), self.metrics, 256)
        self.catalog.scan(library)
        self.answers: dict[object, Outputs | ServeError] = {}
        self.all_in = threading.Event()
        self.expected = 0

    def ask(self, model: str, who: object, deadline: float | None = None, **inputs: Array) -> Sequence:
        def then(_: Sequence, outputs: Outputs) -> None:
            self._put(who, outputs)

        return self.catalog.find(model).tensors.start(inputs, then, lambda error: self._put(who, error), Claim(deadline))

    def _put(self, who: object, answer: Outputs | ServeError) -> None:
        assert who not in self.answers, "answered twice"
        self.answers[who] = answer
        if len(self.answers) == self.expected:
            self.all_in.set()

    def run(self) -> None:
        while self.workers.step():
            pass

    def counts(self, model: str) -> tuple[int, int, int, int]:
        r = self.catalog.find(model).engine.rounds
        return r.tickets, r.waiting_rows, r.running_rows, r.waiting_steps


def alone(model: Model, **inputs: Array) -> Mapping[str, Array]:
    """The answer of one bare run over the whole sequence."""
    onnx = model.engine.graphs[model.bundle.main]
    rows = next(iter(inputs.values())).shape[0]
    feeds = {**inputs, **{s.input: s.fresh(rows) for s in onnx.graph.states}}
    return dict(zip(onnx.outputs, onnx.run(feeds), strict=True))


def equal(answer: Outputs | ServeError, expected: Mapping[str, Array]) -> bool:
    assert isinstance(answer, Mapping), answer
    return bool(answer) and all(np.array_equal(array, expected[name]) for name, array in answer.items())


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 50)), min_size=1, max_size=12),
    chunk=st.integers(1, 20), rows=st.integers(3, 16), workers=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_together_is_alone_and_cut_is_whole(
    library: Path, lengths: list[tuple[int, int]], chunk: int, rows: int, workers: int, seed: int
) -> None:
    """Whatever runs alongside and wherever rounds cut, answers are those of one whole run alone, bit for bit."""
    bench = Bench(library, Limits(rows=rows, chunk=chunk, share=2, workers=workers))
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, models.VOCABULARY, size) for size in lengths]
    series = [rng.normal(size=(n, t, 3)).astype(np.float32) for n, t in lengths]
    for i, (tokens, x) in enumerate(zip(texts, series, strict=True)):
        bench.ask("reader", ("reader", i), tokens=tokens)
        bench.ask("both_ways", ("both_ways", i), x=x)
    bench.run()
    for i, (tokens, x) in enumerate(zip(texts, series, strict=True)):
        assert equal(bench.answers["reader", i], alone(bench.catalog.find("reader"), tokens=tokens))
        assert equal(bench.answers["both_ways", i], alone(bench.catalog.find("both_ways"), x=x))
    assert bench.counts("reader") == bench.counts("both_ways") == (0, 0, 0, 0)


def test_threads_change_nothing(library: Path) -> None:
    """Several real workers over several models give the same bits as one run alone."""
    bench = Bench(library, Limits(chunk=7, rows=16, share=2, workers=3), threads=3)
    rng = np.random.default_rng(5)
    texts = [rng.integers(0, models.VOCABULARY, (1, int(n))) for n in rng.integers(1, 80, 150)]
    bench.expected = len(texts) * 2
    bench.workers.start()
    for i, tokens in enumerate(texts):
        bench.ask("reader", ("reader", i), tokens=tokens)
        bench.ask("fragile", ("fragile", i), tokens=tokens)
    assert bench.all_in.wait(60)
    assert bench.workers.drain(10)
    bench.workers.stop()
    for (model, i), answer in bench.answers.items():  # type: ignore[misc]
        assert equal(answer, alone(bench.catalog.find(model), tokens=texts[i]))


def test_only_the_culprit_fails(library: Path) -> None:
    """A row that fails its round gets the error; its batch-mates get their answers, in the same round's place."""
    bench = Bench(library, Limits(chunk=4))
    good = [np.full((1, n), 3) for n in (2, 9, 5)]
    for i, tokens in enumerate(good):
        bench.ask("fragile", i, tokens=tokens)
    bench.ask("fragile", "culprit", tokens=np.array([[1, 2, 99]]))
    bench.run()
    error = bench.answers["culprit"]
    assert isinstance(error, ModelFailed)
    assert "fragile" in error.message
    for i, tokens in enumerate(good):
        assert equal(bench.answers[i], alone(bench.catalog.find("fragile"), tokens=tokens))
    assert bench.counts("fragile") == (0, 0, 0, 0)


def test_who_leaves_frees_the_row(library: Path) -> None:
    """A cancelled sequence is not run again, waiting or half done, and says nothing to anyone."""
    bench = Bench(library, Limits(chunk=4))
    tokens = np.ones((1, 12), np.int64)
    waiting = bench.ask("reader", "waiting", tokens=tokens)
    half = bench.ask("reader", "half", tokens=tokens)
    bench.ask("reader", "stays", tokens=tokens)
    engine = bench.catalog.find("reader").engine
    engine.cancel(waiting)
    bench.workers.step()
    engine.cancel(half)
    engine.cancel(half)
    bench.run()
    assert list(bench.answers) == ["stays"]
    assert half.done == 4
    assert bench.counts("reader") == (0, 0, 0, 0)


def test_a_deadline_ends_the_waiting(library: Path) -> None:
    """Past its deadline a sequence gets DeadlineExceeded; one already past on arrival is refused at once."""
    bench = Bench(library, Limits(chunk=4))
    bench.ask("reader", "late", deadline=101.0, tokens=np.ones((1, 12), np.int64))
    bench.ask("reader", "patient", tokens=np.ones((1, 12), np.int64))
    bench.workers.step()
    bench.now = 102.0
    bench.run()
    assert isinstance(bench.answers["late"], DeadlineExceeded)
    assert isinstance(bench.answers["patient"], Views)
    with pytest.raises(DeadlineExceeded):
        bench.ask("reader", "past", deadline=101.0, tokens=np.ones((1, 2), np.int64))
    assert bench.counts("reader") == (0, 0, 0, 0)


def test_a_full_queue_refuses(library: Path) -> None:
    """Past the queue's length newcomers are told when to come back; who was taken is answered."""
    bench = Bench(library, Limits(queue=3))
    for i in range(3):
        bench.ask("reader", i, tokens=np.ones((1, 2), np.int64))
    with pytest.raises(Overloaded) as caught:
        bench.ask("reader", 3, tokens=np.ones((1, 2), np.int64))
    assert caught.value.retry_after is not None
    assert caught.value.retry_after > 0
    bench.run()
    assert sorted(bench.answers) == [0, 1, 2]  # type: ignore[type-var]


def test_a_broken_answer_harms_no_neighbour(library: Path) -> None:
    """A task whose answer raises fails its own caller only."""
    bench = Bench(library)
    model = bench.catalog.find("reader")

    def broken(sequence: Sequence, outputs: Outputs) -> None:
        raise KeyError("oops")

    errors: list[ServeError] = []
    model.tensors.start({"tokens": np.ones((1, 2), np.int64)}, broken, errors.append)
    bench.ask("reader", "neighbour", tokens=np.ones((1, 2), np.int64))
    bench.run()
    assert [e.reason for e in errors] == ["ANSWER_FAILED"]
    assert isinstance(bench.answers["neighbour"], Views)
    assert bench.counts("reader") == (0, 0, 0, 0)


def test_drain_finishes_what_runs_and_refuses_the_rest(library: Path) -> None:
    """After drain nothing new is taken; what was there is answered; what stop finds still waiting is told."""
    bench = Bench(library, Limits(chunk=1))
    bench.ask("reader", "first", tokens=np.ones((1, 30), np.int64))
    assert not bench.workers.drain(0)
    with pytest.raises(Draining):
        bench.ask("reader", "new", tokens=np.ones((1, 1), np.int64))
    bench.run()
    assert isinstance(bench.answers["first"], Views)
    assert bench.workers.drain(0)

    other = Bench(library)
    other.ask("reader", "left", tokens=np.ones((1, 30), np.int64))
    other.workers.stop()
    assert isinstance(other.answers["left"], Draining)
