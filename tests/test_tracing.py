"""Traces and logs: a call, its sequences, their queue and run; who called and about what."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator, Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import seqserve
from server import logs, tracing
from server.app import App
from server.config import Config
from tests.process import ROOT

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
METADATA = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("x-request-id", "r-7"))


class Exported(InMemorySpanExporter):
    """Spans kept in memory, that can be waited for: a call's end is seen by its caller before its span has ended."""

    def __init__(self) -> None:
        super().__init__()
        self._more = threading.Condition()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        with self._more:
            self._more.notify_all()
            return super().export(spans)

    def shutdown(self) -> None:
        pass  # it goes on for the next server

    def of(self, name: str, count: int) -> list[ReadableSpan]:
        """The spans of that name, as soon as there are so many."""
        with self._more:
            assert self._more.wait_for(lambda: len(self._named(name)) >= count, 20), f"{count} of {name}"
            return self._named(name)

    def _named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.get_finished_spans() if span.name == name]


@pytest.fixture(scope="module")
def exported() -> Exported:
    return Exported()


@pytest.fixture(scope="module", params=["direct", "public"])
def app(request: pytest.FixtureRequest, exported: Exported) -> Iterator[App]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "exporting", lambda _: SimpleSpanProcessor(exported))
        made = App(Config(models=ROOT / "models", port=0, metrics_port=-1, otlp="http://nowhere", access_log=True, front=request.param))
    made.start()
    yield made
    made.stop()


class Written(io.StringIO):
    """Lines of a log, as other threads write them: a caller may have its answer before its call's line is there."""

    def __init__(self) -> None:
        super().__init__()
        self._more = threading.Condition()

    def write(self, text: str) -> int:
        with self._more:
            self._more.notify_all()
            return super().write(text)

    def lines(self, count: int) -> list[str]:
        """All lines, when there are so many."""
        with self._more:
            assert self._more.wait_for(lambda: len(self.getvalue().splitlines()) >= count, 30), self.getvalue()
            return self.getvalue().splitlines()


@pytest.fixture
def written(app: App) -> Iterator[Written]:
    """What the access log writes, as JSON."""
    text = Written()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logs.JsonLines())
    logs.access.addHandler(handler)
    logs.access.setLevel(logging.INFO)
    yield text
    logs.access.removeHandler(handler)


def test_call_and_sequences(app: App, exported: Exported) -> None:
    """A call's span is its caller's child; each of its sequences is its child, with a queue and a run that meet."""
    exported.clear()
    with seqserve.Client(f"127.0.0.1:{app.port}", metadata=METADATA) as client:
        client.classify(["A good film.", "A bad film."])
    (call,) = exported.of("seqserve.v1.Tasks/Classify", 1)
    assert call.context.trace_id == int(TRACE, 16)
    assert call.parent is not None
    assert call.parent.span_id == int(PARENT, 16)
    sequences = [s for s in exported.of("sequence", 2) if s.parent and s.parent.span_id == call.context.span_id]
    assert len(sequences) == 2
    for sequence in sequences:
        assert sequence.attributes is not None
        assert sequence.attributes["seqserve.model"] == "sentiment"
        assert sequence.attributes["seqserve.outcome"] == "answered"
        parts = {s.name: s for s in exported.get_finished_spans() if s.parent and s.parent.span_id == sequence.context.span_id}
        assert set(parts) == {"queue", "run"}
        assert parts["queue"].start_time == sequence.start_time
        assert parts["queue"].end_time == parts["run"].start_time
        assert parts["run"].end_time == sequence.end_time


def test_failure(app: App, exported: Exported) -> None:
    """A refused call's span says so."""
    exported.clear()
    with seqserve.Client(f"127.0.0.1:{app.port}") as client, pytest.raises(seqserve.NotFound):
        client.classify("x", model="nothing")
    (call,) = exported.of("seqserve.v1.Tasks/Classify", 1)
    assert not call.status.is_ok
    assert call.attributes is not None
    assert call.attributes["rpc.grpc.status"] == "NOT_FOUND"


def test_turns_are_of_their_stream(app: App, exported: Exported) -> None:
    """The first turn that a stream brings is a sequence of the stream's trace."""
    exported.clear()
    with seqserve.Client(f"127.0.0.1:{app.port}", metadata=METADATA) as client, client.session("sentiment", id="s") as session:
        assert len(list(session.send_all(["One ", "two "]))) == 2
    traces = {s.context.trace_id for s in exported.of("sequence", 2)}
    assert int(TRACE, 16) in traces


def test_nobody_is_kept(app: App, exported: Exported) -> None:
    """What has left is not kept, however it left."""
    exported.clear()
    with seqserve.Client(f"127.0.0.1:{app.port}") as client:
        pieces = client.translate_stream("A dog runs along the beach.", target="de")
        next(pieces)
        pieces.close()
        client.classify("x")
    exported.of("sequence", 2)
    assert isinstance(app.workers, tracing.TracedWorkers)
    assert not app.workers.seen


def test_access_log(app: App, written: Written) -> None:
    """A line of the access log is one JSON object, with the ids of request, session and trace and the status."""
    with seqserve.Client(f"127.0.0.1:{app.port}", metadata=METADATA) as client:
        client.classify("A good film.")
        with client.session("sentiment", id="mine") as session:
            session.send("One.")
    lines = {line["method"]: line for line in map(json.loads, written.lines(4))}  # opened, a turn, closed
    classify = lines["/seqserve.v1.Tasks/Classify"]
    assert (classify["status"], classify["request"], classify["trace"], classify["level"]) == ("OK", "r-7", TRACE, "info")
    assert classify["ms"] > 0
    assert lines["/seqserve.v1.Sessions/Turn"]["session"] == "mine"


def test_json_tells_errors() -> None:
    """An exception is one line too."""
    text = io.StringIO()
    logger = logging.getLogger("tests.json")
    handler = logging.StreamHandler(text)
    handler.setFormatter(logs.JsonLines())
    logger.addHandler(handler)
    logger.propagate = False
    try:
        raise ValueError("über\nzwei")
    except ValueError:
        logger.exception("it %s", "failed")
    (line,) = map(json.loads, text.getvalue().splitlines())
    assert line["message"] == "it failed"
    assert "ValueError: über\nzwei" in line["error"]


def test_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra, --otlp says what to install."""
    monkeypatch.setitem(__import__("sys").modules, "server.tracing", None)
    with pytest.raises(ValueError, match=r"seqserve\[otel\]"):
        App(Config(models=ROOT / "models", otlp="http://nowhere"))
