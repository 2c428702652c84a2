"""Spans for OpenTelemetry: a call, and in it each sequence with its time in the queue and its time in rounds.

An optional extra, put around what serves without it: methods, the workers, what engines report to. Where no collector is named
nothing here is made, and a call pays nothing. A call's trace is its caller's, where that sent a `traceparent`. Turns that were sent
ahead begin when the turn before them is done, by a worker: their sequences are traces of their own.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Listed
from importlib.metadata import version
from typing import Any

import grpc
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from server.engine import Engine, Spent, Watch
from server.rounds import Round
from server.rpc.front import Call, Metadata, Method, Receiver
from server.sequence import Sequence
from server.shares import Claim
from server.workers import Workers


class _Current(threading.local):
    """The call that this thread handles."""

    context: Context | None = None


_current = _Current()


def exporting(endpoint: str) -> SpanProcessor:
    """Sends spans to a collector, in batches and from a thread of its own: "http://host:4317", or https."""
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))


class Tracing:
    """The tracer, and what is put around what."""

    def __init__(self, processor: SpanProcessor) -> None:
        resource = Resource.create({"service.name": "seqserve", "service.version": version("seqserve")})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self.tracer = self._provider.get_tracer("seqserve")

    def methods(self, methods: Mapping[str, Method]) -> dict[str, Method]:
        return {name: Method(method.kind, self._start(name, method)) for name, method in methods.items()}

    def stop(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _start(self, name: str, method: Method) -> Callable[..., Receiver | None]:
        service, _, own = name[1:].partition("/")
        attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": own}
        propagator = TraceContextTextMapPropagator()

        def start(call: Call, *message: bytes) -> Receiver | None:
            carrier = {key: value for key, value in call.metadata if isinstance(value, str)}
            span = self.tracer.start_span(name[1:], propagator.extract(carrier), SpanKind.SERVER, {**attributes, "net.peer": call.peer})
            context = set_span_in_context(span)
            receiver = _within(context, method.start, _Call(call, span, method.kind == "unary"), *message)
            return None if receiver is None else _Receiver(receiver, context)

        return start


def _within(context: Context, do: Callable[..., Any], *arguments: Any) -> Any:
    before, _current.context = _current.context, context
    try:
        return do(*arguments)
    finally:
        _current.context = before


class _Receiver:
    """Has what arrives on a stream handled as part of its call."""

    def __init__(self, receiver: Receiver, context: Context) -> None:
        self._receiver = receiver
        self._context = context

    def on_message(self, message: bytes) -> None:
        _within(self._context, self._receiver.on_message, message)

    def on_end(self) -> None:
        _within(self._context, self._receiver.on_end)


class _Call:
    """A call whose end is seen. Satisfies front.Call."""

    def __init__(self, call: Call, span: Span, unary: bool) -> None:
        self._call = call
        self._span = span
        self._unary = unary
        call.on_gone(lambda: self._end("CANCELLED"))

    @property
    def method(self) -> str:
        return self._call.method

    @property
    def metadata(self) -> Metadata:
        return self._call.metadata

    @property
    def peer(self) -> str:
        return self._call.peer

    @property
    def peer_certificate(self) -> bytes | None:
        return self._call.peer_certificate

    @property
    def deadline(self) -> float | None:
        return self._call.deadline

    @property
    def waiting(self) -> int:
        return self._call.waiting

    def reply(self, message: bytes, trailing: Metadata = ()) -> None:
        self._call.reply(message, trailing)
        if self._unary:
            self._end("")

    def finish(self, trailing: Metadata = ()) -> None:
        self._call.finish(trailing)
        self._end("")

    def fail(self, status: grpc.StatusCode, message: str, trailing: Metadata = ()) -> None:
        self._call.fail(status, message, trailing)
        self._end(status.name, message)

    def on_gone(self, callback: Callable[[], None]) -> None:
        self._call.on_gone(callback)

    def _end(self, failed: str, message: str = "") -> None:
        if self._span.is_recording():  # an ended span is not
            self._span.set_attribute("rpc.grpc.status", failed or "OK")
            if failed:
                self._span.set_status(Status(StatusCode.ERROR, message or failed))
            self._span.end()


class _Seen:
    """When a sequence came, for which call, and when its first round began; nanoseconds since 1970."""

    __slots__ = ("came", "context", "ran")

    def __init__(self, context: Context | None) -> None:
        self.context = context
        self.came = time.time_ns()
        self.ran = 0


class TracedWorkers(Workers):
    """Workers that note when sequences come and when they first run."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.seen: dict[Sequence, _Seen] = {}

    @property
    def gathers(self) -> bool:
        """Turns of several callers as one sequence could be of one's trace only, and of none once their handlers have returned."""
        return False

    def submit(self, engine: Engine, sequence: Sequence, claim: Claim) -> None:
        self.seen[sequence] = _Seen(_current.context)
        try:
            super().submit(engine, sequence, claim)
        except BaseException:
            del self.seen[sequence]
            raise

    def _run(self, engine: Engine, round: Round[Sequence]) -> None:
        now = time.time_ns()
        for sequence in round.tickets:
            if sequence.rounds == 0 and (seen := self.seen.get(sequence)) is not None:
                seen.ran = now
        super()._run(engine, round)


class TracedWatch:
    """Makes the spans of a sequence when it leaves, and passes the report on. Satisfies engine.Watch."""

    def __init__(self, watch: Watch, workers: TracedWorkers, tracer: Tracer) -> None:
        self._watch = watch
        self._seen = workers.seen
        self._tracer = tracer

    def round(self, engine: Engine, graph: str, tickets: int, rows: int, steps: int, row_steps: int, spent: Spent) -> None:
        self._watch.round(engine, graph, tickets, rows, steps, row_steps, spent)

    def told(self, engine: Engine, rows: int, sequences: int, seconds: float) -> None:
        self._watch.told(engine, rows, sequences, seconds)

    def left(self, engine: Engine, sequences: Listed[Sequence], reason: str) -> None:
        self._watch.left(engine, sequences, reason)
        now = time.time_ns()
        for sequence in sequences:
            seen = self._seen.pop(sequence, None)
            if seen is not None:
                self._tell(engine, sequence, seen, reason, now)

    def _tell(self, engine: Engine, s: Sequence, seen: _Seen, outcome: str, now: int) -> None:
        attributes: dict[str, str | int | float] = {
            "seqserve.model": engine.name, "seqserve.version": engine.version, "seqserve.outcome": outcome, "seqserve.rounds": s.rounds,
            "seqserve.rows": s.rows, "seqserve.queued_seconds": s.queued, "seqserve.run_seconds": s.run,
        }  # fmt: skip
        whole = self._tracer.start_span("sequence", seen.context or Context(), attributes=attributes, start_time=seen.came)
        context = set_span_in_context(whole)
        parts = (("queue", seen.came, seen.ran or now), *((("run", seen.ran, now),) if seen.ran else ()))
        for name, began, ended in parts:
            self._tracer.start_span(name, context, start_time=began).end(ended)
        whole.end(now)
