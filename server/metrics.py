"""Every metric: name, kind, labels, meaning, in one table. Counted once a round or once a request, never per step."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from server.engine import Engine
    from server.sequence import Sequence

_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    kind: type[Counter] | type[Gauge] | type[Histogram]
    labels: tuple[str, ...]
    meaning: str
    buckets: tuple[float, ...] = ()


TABLE = (
    Metric("seqserve_rounds_total", Counter, ("model", "version", "graph"), "Rounds run: one run of one graph"),
    Metric("seqserve_round_rows", Histogram, ("model", "version"), "Rows that a round advanced together", _COUNTS),
    Metric("seqserve_round_steps", Histogram, ("model", "version"), "Time steps that a round advanced its rows by", _COUNTS),
    Metric("seqserve_round_seconds", Histogram, ("model", "version"), "Seconds a round took: stack, run, split", _SECONDS),
    Metric("seqserve_row_steps_total", Counter, ("model", "version"), "Rows times steps advanced; nothing padded, so all of it wanted"),
    Metric(
        "seqserve_sequences_total",
        Counter,
        ("model", "version", "outcome"),
        "Sequences answered, failed, cancelled, expired",
    ),
    Metric("seqserve_queue_seconds", Histogram, ("model", "version"), "Seconds an answered sequence waited for rounds", _SECONDS),
    Metric("seqserve_waiting", Gauge, ("model", "version"), "Sequences waiting or running"),
    Metric("seqserve_calls_total", Counter, ("method", "code"), "Calls that ended, by gRPC status"),
    Metric("seqserve_call_seconds", Histogram, ("method",), "Seconds from a call's arrival to its end", _SECONDS),
    Metric("seqserve_refusals_total", Counter, ("reason",), "Calls refused or failed, by machine-readable reason"),
    Metric("seqserve_models", Gauge, ("state",), "Bundles by state: ready, or refused at load"),
)


class Metrics(Collector):
    """The table, counting. Satisfies engine.Watch.

    Counted in plain lists and handed to prometheus_client when somebody looks: its own counters cost several times as much,
    at every sequence and call.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, ...], float] = {}  # name, labels → counters and gauges
        self._spreads: dict[tuple[str, ...], _Spread] = {}  # name, labels → histograms
        self._queues: dict[tuple[str, str], Engine] = {}
        self._watched: dict[int, _Watched] = {}  # by id of the engine
        self.registry.register(self)

    def serve(self, host: str, port: int) -> tuple[int, Callable[[], None]]:
        """Serve /metrics over HTTP; the bound port, and how to stop."""
        server, thread = start_http_server(port, host, self.registry)

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return server.server_port, stop

    def watch_queue(self, engine: Engine) -> None:
        self._queues[engine.name, engine.version] = engine

    def forget_queue(self, engine: Engine) -> None:
        self._queues.pop((engine.name, engine.version), None)

    def models(self, counts: Iterable[tuple[str, int]]) -> None:
        with self._lock:
            for state, count in counts:
                self._counts["seqserve_models", state] = count

    def round(self, engine: Engine, graph: str, rows: int, steps: int, seconds: float) -> None:
        with self._lock:
            watched = self._of(engine)
            watched.rounds[graph] = watched.rounds.get(graph, 0) + 1
            watched.rows.add(rows)
            watched.steps.add(steps)
            watched.seconds.add(seconds)
            watched.row_steps += rows * steps

    def left(self, engine: Engine, sequences: Listed[Sequence], outcome: str) -> None:
        with self._lock:
            watched = self._of(engine)
            watched.outcomes[outcome] = watched.outcomes.get(outcome, 0) + len(sequences)
            if outcome == "answered":
                for sequence in sequences:
                    watched.queued.add(sequence.queued)

    def call(self, method: str, code: str, seconds: float) -> None:
        with self._lock:
            self._count("seqserve_calls_total", method, code)
            key = ("seqserve_call_seconds", method)
            spread = self._spreads.get(key)
            if spread is None:
                spread = self._spreads[key] = _Spread(_SECONDS)
            spread.add(seconds)

    def refused(self, reason: str) -> None:
        with self._lock:
            self._count("seqserve_refusals_total", reason)

    def collect(self) -> Iterator[Family]:
        """Everything in the table, as it stands; called by prometheus_client."""
        with self._lock:
            counts, spreads = dict(self._counts), dict(self._spreads)
            for watched in self._watched.values():
                model = watched.model
                for graph, rounds in watched.rounds.items():
                    counts["seqserve_rounds_total", *model, graph] = rounds
                counts["seqserve_row_steps_total", *model] = watched.row_steps
                for outcome, left in watched.outcomes.items():
                    counts["seqserve_sequences_total", *model, outcome] = left
                spreads["seqserve_round_rows", *model] = watched.rows
                spreads["seqserve_round_steps", *model] = watched.steps
                spreads["seqserve_round_seconds", *model] = watched.seconds
                spreads["seqserve_queue_seconds", *model] = watched.queued
            for (name, version), engine in self._queues.items():
                counts["seqserve_waiting", name, version] = engine.rounds.tickets
            yield from [_family(m, counts, spreads) for m in TABLE]

    def _count(self, *key: str) -> None:
        self._counts[key] = self._counts.get(key, 0) + 1

    def _of(self, engine: Engine) -> _Watched:
        watched = self._watched.get(id(engine))
        if watched is None:
            model = (engine.name, engine.version)
            same = [w for w in self._watched.values() if w.model == model]  # an engine loaded again goes on counting
            watched = self._watched[id(engine)] = same[0] if same else _Watched(model)
        return watched


class _Spread:
    """A histogram."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class _Watched:
    """What is counted of one version of a model."""

    __slots__ = ("model", "outcomes", "queued", "rounds", "row_steps", "rows", "seconds", "steps")

    def __init__(self, model: tuple[str, str]) -> None:
        self.model = model
        self.rounds: dict[str, int] = {}
        self.outcomes: dict[str, int] = {}
        self.row_steps = 0
        self.rows, self.steps = _Spread(_COUNTS), _Spread(_COUNTS)
        self.seconds, self.queued = _Spread(_SECONDS), _Spread(_SECONDS)


def _family(m: Metric, counts: dict[tuple[str, ...], float], spreads: dict[tuple[str, ...], _Spread]) -> Family:
    if m.kind is Histogram:
        histogram = HistogramMetricFamily(m.name, m.meaning, labels=m.labels)
        for key, spread in spreads.items():
            if key[0] == m.name:
                total = 0
                buckets = []
                for bound, count in zip((*map(float, spread.bounds), "+Inf"), spread.counts, strict=True):
                    total += count
                    buckets.append((str(bound), total))
                histogram.add_metric(key[1:], buckets, spread.sum)
        return histogram
    family = (CounterMetricFamily if m.kind is Counter else GaugeMetricFamily)(m.name, m.meaning, labels=m.labels)
    for key, value in counts.items():
        if key[0] == m.name:
            family.add_metric(key[1:], value)
    return family
