"""ModelStatistics: what was counted of each version of each model, from the same reports that metrics are made of.

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
from server.engine import Engine, Watch
from server.rpc.answer import Answer, Desk
from server.rpc.front import Method
from server.rpc.parameters import SERVICE
from server.sequence import Sequence


class Counts:
    """One engine's. The lock makes that a reader never sees counts that don't belong together."""

    __slots__ = ("answered", "batches", "failed", "failed_s", "last", "lock", "queued_s", "rounds", "rows", "run_s")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.answered = self.failed = self.rows = self.rounds = 0
        self.queued_s = self.run_s = self.failed_s = 0.0
        self.last = 0.0  # seconds since 1970
        self.batches: dict[int, list[float]] = {}  # rows of a round → rounds, seconds


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

    def round(self, engine: Engine, graph: str, rows: int, steps: int, seconds: float) -> None:
        self._watch.round(engine, graph, rows, steps, seconds)
        counts = self.of(engine)
        with counts.lock:
            counts.rounds += 1
            counts.last = time.time()
            batch = counts.batches.get(rows)
            if batch is None:
                batch = counts.batches[rows] = [0, 0.0]
            batch[0] += 1
            batch[1] += seconds

    def left(self, engine: Engine, sequences: Listed[Sequence], reason: str) -> None:
        self._watch.left(engine, sequences, reason)
        counts = self.of(engine)
        queued = run = 0.0
        rows = 0
        one = engine.bundle.graph.ragged  # rows are one text's hypotheses, not a caller's
        for s in sequences:
            queued += s.queued
            run += s.run
            rows += 1 if one else s.rows
        with counts.lock:
            if reason == "answered":
                counts.answered += len(sequences)
                counts.rows += rows
                counts.queued_s += queued
                counts.run_s += run
            else:
                counts.failed += len(sequences)
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
        _set(stats.success, counts.answered, counts.queued_s + counts.run_s)
        _set(stats.fail, counts.failed, counts.failed_s)
        _set(stats.queue, counts.answered, counts.queued_s)
        _set(stats.compute_infer, counts.answered, counts.run_s)
        for empty in (stats.compute_input, stats.compute_output):  # parts of a round's time, which is measured whole
            _set(empty, counts.answered, 0.0)
        for none in (stats.cache_hit, stats.cache_miss):
            _set(none, 0, 0.0)
        for rows, (rounds, seconds) in sorted(counts.batches.items()):
            batch = into.batch_stats.add(batch_size=rows)
            _set(batch.compute_input, int(rounds), 0.0)
            _set(batch.compute_infer, int(rounds), seconds)
            _set(batch.compute_output, int(rounds), 0.0)


def _set(duration: pb.StatisticDuration, count: int, seconds: float) -> None:
    duration.count = count
    duration.ns = int(seconds * 1e9)
