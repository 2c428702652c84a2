"""Every metric: name, kind, labels, meaning, in one table. Counted once a round or once a request, never per step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

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


class Metrics:
    """The table, counting. Satisfies engine.Watch."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._all: dict[str, Any] = {}
        for m in TABLE:
            options: dict[str, Any] = {"buckets": m.buckets} if m.buckets else {}
            self._all[m.name] = m.kind(m.name, m.meaning, m.labels, registry=self.registry, **options)
        self._bound: dict[tuple[str, ...], Any] = {}  # label look-ups cost more than counting

    def serve(self, host: str, port: int) -> tuple[int, Callable[[], None]]:
        """Serve /metrics over HTTP; the bound port, and how to stop."""
        server, thread = start_http_server(port, host, self.registry)

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return server.server_port, stop

    def watch_queue(self, engine: Engine) -> None:
        self._of("seqserve_waiting", engine.name, engine.version).set_function(lambda: engine.rounds.tickets)

    def forget_queue(self, engine: Engine) -> None:
        self._bound.pop(("seqserve_waiting", engine.name, engine.version), None)
        self._all["seqserve_waiting"].remove(engine.name, engine.version)

    def models(self, counts: Iterable[tuple[str, int]]) -> None:
        for state, count in counts:
            self._of("seqserve_models", state).set(count)

    def round(self, engine: Engine, graph: str, rows: int, steps: int, seconds: float) -> None:
        model = (engine.name, engine.version)
        self._of("seqserve_rounds_total", *model, graph).inc()
        self._of("seqserve_round_rows", *model).observe(rows)
        self._of("seqserve_round_steps", *model).observe(steps)
        self._of("seqserve_round_seconds", *model).observe(seconds)
        self._of("seqserve_row_steps_total", *model).inc(rows * steps)

    def left(self, engine: Engine, sequences: Listed[Sequence], outcome: str) -> None:
        self._of("seqserve_sequences_total", engine.name, engine.version, outcome).inc(len(sequences))
        if outcome == "answered":
            queued = self._of("seqserve_queue_seconds", engine.name, engine.version)
            for sequence in sequences:
                queued.observe(sequence.queued)

    def call(self, method: str, code: str, seconds: float) -> None:
        self._of("seqserve_calls_total", method, code).inc()
        self._of("seqserve_call_seconds", method).observe(seconds)

    def refused(self, reason: str) -> None:
        self._of("seqserve_refusals_total", reason).inc()

    def _of(self, *key: str) -> Any:
        bound = self._bound.get(key)
        if bound is None:
            bound = self._bound[key] = self._all[key[0]].labels(*key[1:])
        return bound
