"""Every metric: name, kind, labels, meaning, in one table. Counted once a round or once a request, never per step."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from server.engine import Engine, Spent
    from server.sequence import Sequence
    from server.shelf import Shelf

_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class Metric:
    name: str
    kind: type[Counter] | type[Gauge] | type[Histogram]
    labels: tuple[str, ...]
    meaning: str
    buckets: tuple[float, ...] = ()


_MODEL = ("model", "version")
_DEVICE = (*_MODEL, "graph", "device")

TABLE = (
    Metric("seqserve_rounds_total", Counter, (*_MODEL, "graph"), "Rounds run: one run of one graph"),
    Metric("seqserve_round_rows", Histogram, _MODEL, "Rows that a round advanced together", _COUNTS),
    Metric("seqserve_round_steps", Histogram, _MODEL, "Time steps that a round advanced its rows by", _COUNTS),
    Metric("seqserve_round_seconds", Histogram, _MODEL, "Seconds a round took: stack, run, split", _SECONDS),
    Metric("seqserve_row_steps_total", Counter, _MODEL, "Rows times steps advanced that were to be done"),
    Metric("seqserve_padded_row_steps_total", Counter, _MODEL, "Rows times steps run beyond a row's end, where a graph can't be cut"),
    Metric("seqserve_busy_seconds_total", Counter, _MODEL, "Seconds that threads spent in rounds; over the workers, how busy engines are"),
    Metric("seqserve_workers", Gauge, (), "Threads that run rounds"),
    Metric(
        "seqserve_sequences_total", Counter, (*_MODEL, "outcome"), "Sequences answered, failed, cancelled, expired; put apart, to run alone"
    ),
    Metric("seqserve_queue_seconds", Histogram, _MODEL, "Seconds an answered sequence waited for rounds", _SECONDS),
    Metric("seqserve_task_seconds", Histogram, ("task", *_MODEL), "Seconds from a sequence's arrival in the queue to its answer", _SECONDS),
    Metric("seqserve_waiting", Gauge, _MODEL, "Sequences waiting or running"),
    Metric("seqserve_queue_age_seconds", Gauge, _MODEL, "Seconds that whoever waits longest for a round has waited; 0 where nobody does"),
    Metric("seqserve_expected_wait_seconds", Gauge, _MODEL, "Seconds that what is here now will take, by the measured cost of a step"),
    Metric("seqserve_calls_total", Counter, ("method", "code"), "Calls that ended, by gRPC status"),
    Metric("seqserve_call_seconds", Histogram, ("method",), "Seconds from a call's arrival to its end", _SECONDS),
    Metric("seqserve_calls_open", Gauge, (), "Calls that have begun and are not over, streams among them"),
    Metric("seqserve_refusals_total", Counter, ("reason",), "Calls refused or failed, by machine-readable reason"),
    Metric("seqserve_sessions", Gauge, ("place",), "Live sessions by where they are: memory, or only the store"),
    Metric("seqserve_sessions_begun_total", Counter, ("how",), "Sessions opened, forked, or resumed: from the store or from an export"),
    Metric("seqserve_sessions_ended_total", Counter, ("why",), "Sessions closed, expired, evicted, moved, unloaded"),
    Metric("seqserve_turns_total", Counter, ("outcome",), "Turns applied, and turns replayed: answered again from memory"),
    Metric("seqserve_state_bytes", Gauge, _MODEL, "Bytes of state that sessions keep in memory"),
    Metric("seqserve_round_limit", Gauge, (*_MODEL, "of"), "Most rows and most steps of a round, as given or as measured at load"),
    Metric("seqserve_round_cost_seconds", Gauge, (*_MODEL, "rows", "steps"), "Seconds of a round, measured at load, where its size was"),
    Metric("seqserve_device_slots", Gauge, (*_DEVICE, "state"), "Rows of state that a graph's banks have room for: taken, free"),
    Metric("seqserve_device_rounds_total", Counter, (*_DEVICE, "rows"), "Rounds by how they found their rows: bound, gathered; no_room"),
    Metric("seqserve_device_state_bytes_total", Counter, (*_DEVICE, "way"), "Bytes of state that went to the device and came from it"),
    Metric("seqserve_device_busy_seconds_total", Counter, _DEVICE, "Seconds that onnxruntime ran rounds, on a CPU by its threads' clocks"),
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
        self._shelf: Shelf | None = None
        self._open: Callable[[], int] | None = None
        self.registry.register(self)
        ProcessCollector(registry=self.registry)  # process_*: CPU, memory, file descriptors, read from /proc when somebody looks

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

    def watch_server(self, shelf: Shelf, workers: int, calls: Callable[[], int]) -> None:
        """Where to read, when somebody looks, what needs no counting: sessions, workers, open calls."""
        self._shelf, self._open = shelf, calls
        self._counts["seqserve_workers",] = workers

    def models(self, counts: Iterable[tuple[str, int]]) -> None:
        with self._lock:
            for state, count in counts:
                self._counts["seqserve_models", state] = count

    def round(self, engine: Engine, graph: str, tickets: int, rows: int, steps: int, row_steps: int, spent: Spent) -> None:
        with self._lock:
            watched = self._of(engine)
            watched.rounds[graph] = watched.rounds.get(graph, 0) + 1
            watched.rows.add(rows)
            watched.steps.add(steps)
            watched.seconds.add(spent.seconds)
            watched.row_steps += row_steps
            watched.padded += rows * steps - row_steps

    def told(self, engine: Engine, rows: int, sequences: int, seconds: float) -> None:
        return  # a call's own time has it

    def left(self, engine: Engine, sequences: Listed[Sequence], outcome: str) -> None:
        with self._lock:
            watched = self._of(engine)
            watched.outcomes[outcome] = watched.outcomes.get(outcome, 0) + sum([s.count for s in sequences])
            if outcome == "answered":
                for sequence in sequences:
                    watched.queued.add(sequence.queued, sequence.count)
                    watched.task.add(sequence.queued + sequence.run, sequence.count)

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
                counts["seqserve_padded_row_steps_total", *model] = watched.padded
                counts["seqserve_busy_seconds_total", *model] = watched.seconds.sum
                for outcome, left in watched.outcomes.items():
                    counts["seqserve_sequences_total", *model, outcome] = left
                spreads["seqserve_round_rows", *model] = watched.rows
                spreads["seqserve_round_steps", *model] = watched.steps
                spreads["seqserve_round_seconds", *model] = watched.seconds
                spreads["seqserve_queue_seconds", *model] = watched.queued
                spreads["seqserve_task_seconds", watched.kind, *model] = watched.task
            spreads = {key: spread.copy() for key, spread in spreads.items()}
            queues = dict(self._queues)
        for (name, version), engine in queues.items():
            counts["seqserve_waiting", name, version] = sum(e.rounds.tickets for e in engine.engines)
            counts["seqserve_queue_age_seconds", name, version], counts["seqserve_expected_wait_seconds", name, version] = engine.waited()
            counts.update(_placed(engine))
        if self._open is not None:
            counts["seqserve_calls_open",] = self._open()
        if self._shelf is not None:
            counts.update(_sessions(self._shelf))
        yield from [_family(m, counts, spreads) for m in TABLE]

    def _count(self, *key: str) -> None:
        self._counts[key] = self._counts.get(key, 0) + 1

    def _of(self, engine: Engine) -> _Watched:
        watched = self._watched.get(id(engine))
        if watched is None:
            model = (engine.name, engine.version)
            same = [w for w in self._watched.values() if w.model == model]  # an engine loaded again goes on counting
            watched = self._watched[id(engine)] = same[0] if same else _Watched(model, engine.bundle.kind)
        return watched


class _Spread:
    """A histogram."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def copy(self) -> _Spread:
        copied = _Spread(self.bounds)
        copied.counts, copied.sum = list(self.counts), self.sum
        return copied

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += times * value


class _Watched:
    """What is counted of one version of a model."""

    __slots__ = ("kind", "model", "outcomes", "padded", "queued", "rounds", "row_steps", "rows", "seconds", "steps", "task")

    def __init__(self, model: tuple[str, str], kind: str) -> None:
        self.model = model
        self.kind = kind
        self.rounds: dict[str, int] = {}
        self.outcomes: dict[str, int] = {}
        self.row_steps = self.padded = 0
        self.rows, self.steps = _Spread(_COUNTS), _Spread(_COUNTS)
        self.seconds, self.queued, self.task = _Spread(_SECONDS), _Spread(_SECONDS), _Spread(_SECONDS)


def _placed(engine: Engine) -> Iterator[tuple[tuple[str, ...], float]]:
    """How large a model's rounds get, and what its devices have counted themselves."""
    model = (engine.name, engine.version)
    yield ("seqserve_round_limit", *model, "rows"), engine.rounds.limits.rows
    yield ("seqserve_round_limit", *model, "steps"), engine.rounds.limits.chunk
    for point in engine.measured:
        yield ("seqserve_round_cost_seconds", *model, str(point.rows), str(point.steps)), point.seconds
    for one in engine.engines:
        for which, graph in one.graphs.items():
            place = (*model, which, str(graph.device))
            for name, label, value in graph.about:
                yield (name, *place, *((label,) if label else ())), value


def _sessions(shelf: Shelf) -> Iterator[tuple[tuple[str, ...], float]]:
    """What sessions have counted themselves, and what those in memory keep. Their lock is held for a copy of the list only."""
    sessions = shelf.sessions
    with shelf.changed:
        memory = sessions.all()
        store = len(sessions) - len(memory)
        begun, ended = dict(sessions.begun), dict(sessions.ended_as)
        turns = (("applied", sessions.turns_applied), ("replayed", sessions.turns_replayed))
    yield ("seqserve_sessions", "memory"), len(memory)
    yield ("seqserve_sessions", "store"), store
    for how, count in begun.items():
        yield ("seqserve_sessions_begun_total", how), count
    for why, count in ended.items():
        yield ("seqserve_sessions_ended_total", why), count
    for outcome, count in turns:
        yield ("seqserve_turns_total", outcome), count
    kept: dict[tuple[str, str], int] = {}
    each: dict[tuple[str, str], int] = {}  # bytes of a row: the same for all sessions of a model
    for session in memory:
        rows = session.state.rows
        if rows is not None:
            model = (session.model, session.version)
            size = each.get(model)
            if size is None:
                size = each[model] = rows.bytes
            kept[model] = kept.get(model, 0) + size
    for model, size in kept.items():
        yield ("seqserve_state_bytes", *model), size


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
