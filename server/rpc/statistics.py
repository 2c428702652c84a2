"""ModelStatistics: what was counted of each version of each model, from the same reports that metrics are made of.

As in Triton, a request's times are those of the rounds it was in: `compute_input` to put their inputs together, `compute_infer` to
run them, `compute_output` to part their results and answer. How a round's time divides is kept by round, not by request: the sums
over requests are divided as those over rounds were, each round counted once for every request in it.

Counted once a round and once for all sequences that a round finished. A request that was refused before it was queued is not
counted here: it reached no model.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from collections.abc import Sequence as Listed
from weakref import WeakKeyDictionary

from protos import inference_pb2 as pb
from server.catalog import Catalog, Model
from server.engine import Engine, Spent, Watch
from server.rpc.answer import Answer, Desk
from server.rpc.front import Method
from server.rpc.parameters import SERVICE
from server.sequence import Sequence


class Counts:
    """One engine's. The lock makes that a reader never sees counts that don't belong together."""

    __slots__ = (
        "answered", "batches", "failed", "failed_s", "last", "lock", "queued_s", "rounds", "rows", "run_s", "split_s", "stack_s", "told_s",
        "total_s",
    )  # fmt: skip

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.answered = self.failed = self.rows = self.rounds = 0
        self.queued_s = self.run_s = self.failed_s = self.told_s = 0.0
        self.stack_s = self.split_s = self.total_s = 0.0  # of rounds, once for each request in them
        self.last = 0.0  # seconds since 1970
        self.batches: dict[int, list[float]] = {}  # rows of a round → rounds; seconds of input, infer, output


class Statistics:
    """Counts what engines report, and passes it on. Satisfies engine.Watch."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._lock = threading.Lock()
        self._counts: WeakKeyDictionary[Engine, Counts] = WeakKeyDictionary()  # an engine that is gone takes its counts along

    def of(self, engine: Engine) -> Counts:
        counts = self._counts.get(engine)
        if counts is None:
            with self._lock:
                counts = self._counts.setdefault(engine, Counts())
        return counts

    def round(self, engine: Engine, graph: str, tickets: int, rows: int, steps: int, row_steps: int, spent: Spent) -> None:
        self._watch.round(engine, graph, tickets, rows, steps, row_steps, spent)
        counts = self.of(engine)
        with counts.lock:
            counts.rounds += 1
            counts.last = time.time()
            batch = counts.batches.get(rows)
            if batch is None:
                batch = counts.batches[rows] = [0, 0.0, 0.0, 0.0]
            batch[0] += 1
            batch[1] += spent.stack
            batch[2] += spent.infer
            batch[3] += spent.split
            counts.stack_s += tickets * spent.stack
            counts.split_s += tickets * spent.split
            counts.total_s += tickets * spent.seconds

    def told(self, engine: Engine, rows: int, sequences: int, seconds: float) -> None:
        self._watch.told(engine, rows, sequences, seconds)
        counts = self.of(engine)
        with counts.lock:
            counts.told_s += sequences * seconds
            counts.batches[rows][3] += seconds

    def left(self, engine: Engine, sequences: Listed[Sequence], reason: str) -> None:
        self._watch.left(engine, sequences, reason)
        counts = self.of(engine)
        queued = run = 0.0
        count = rows = 0
        one = engine.bundle.graph.ragged  # rows are one text's hypotheses, not a caller's
        for s in sequences:
            count += s.count
            queued += s.count * s.queued
            run += s.count * s.run
            rows += 1 if one else s.rows
        with counts.lock:
            if reason == "answered":
                counts.answered += count
                counts.rows += rows
                counts.queued_s += queued
                counts.run_s += run
            elif reason != "apart":  # these run again
                counts.failed += count
                counts.failed_s += queued + run


class StatisticsService:
    def __init__(self, catalog: Catalog, statistics: Statistics) -> None:
        self._catalog = catalog
        self._statistics = statistics

    def methods(self, desk: Desk) -> Mapping[str, Method]:
        return {f"/{SERVICE}/ModelStatistics": desk.unary(pb.ModelStatisticsRequest, self.statistics)}

    def statistics(self, request: pb.ModelStatisticsRequest, answer: Answer) -> None:
        """Of one version, of a model's versions, or of all models. Raises NotFound."""
        models = self._catalog.models()
        if request.name:
            found = self._catalog.find(request.name, request.version)
            models = [found] if request.version else [m for m in models if m.name == found.name]
        response = pb.ModelStatisticsResponse()
        for model in models:
            _write(response.model_stats.add(name=model.name, version=model.version), model, self._statistics.of(model.engine))
        answer.done(response)


def _write(into: pb.ModelStatistics, model: Model, counts: Counts) -> None:
    with counts.lock:
        into.last_inference = int(counts.last * 1e3)
        into.inference_count = counts.rows
        into.execution_count = counts.rounds
        stats = into.inference_stats
        part = counts.run_s / counts.total_s if counts.total_s else 0.0
        stack, split = part * counts.stack_s, part * counts.split_s
        _set(stats.success, counts.answered, counts.queued_s + counts.run_s + counts.told_s)
        _set(stats.fail, counts.failed, counts.failed_s)
        _set(stats.queue, counts.answered, counts.queued_s)
        _set(stats.compute_input, counts.answered, stack)
        _set(stats.compute_infer, counts.answered, counts.run_s - stack - split)
        _set(stats.compute_output, counts.answered, split + counts.told_s)
        for none in (stats.cache_hit, stats.cache_miss):
            _set(none, 0, 0.0)
        for rows, (rounds, *seconds) in sorted(counts.batches.items()):
            batch = into.batch_stats.add(batch_size=rows)
            for stage, s in zip((batch.compute_input, batch.compute_infer, batch.compute_output), seconds, strict=True):
                _set(stage, int(rounds), s)


def _set(duration: pb.StatisticDuration, count: int, seconds: float) -> None:
    duration.count = count
    duration.ns = int(seconds * 1e9)
