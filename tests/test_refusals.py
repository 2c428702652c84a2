"""Refusals of what may be of any size: they are told in full or cut short, never lost, and nothing of them is kept."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from hypothesis import example, given
from hypothesis import strategies as st

from contract.bundle import Tensor
from protos import inference_pb2 as inference_pb
from protos import seqserve_pb2 as tasks_pb
from protos import sessions_pb2 as pb
from server.errors import InvalidInput, Overloaded, ServeError
from server.rpc import sessions, usual, wire
from server.rpc.answer import brief, details
from server.rpc.h2_headers import failed
from server.turns import Turns
from tests import models
from tests.process import FRONTS, Served, reason, serve
from tests.test_server import tokens_request
from tests.test_turns import Calls, turn

LONG = "n" * 10_000
LIMIT = 8 << 10  # bytes of trailers that gRPC's clients take
INFERENCE = "/inference.GRPCInferenceService"


@pytest.fixture(scope="module", params=list(FRONTS))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    library = tmp_path_factory.mktemp("models")
    models.library(library)
    with serve(library, *FRONTS[request.param]) as server:
        yield server


def size(trailing: Any) -> int:
    return sum(len(key) + len(value) + 32 for key, value in trailing)


def _sequence(id: str, **more: bool) -> inference_pb.ModelInferRequest:
    request = tokens_request([[1, 2]])
    request.parameters["sequence_id"].string_param = id
    for name, value in more.items():
        request.parameters[name].bool_param = value
    return request


ANY = "/seqserve.v1"
NAMED: dict[str, tuple[str, Any, str]] = {
    "a session": (f"{ANY}.Sessions/Get", pb.SessionName(session=LONG), "UNKNOWN_SESSION"),
    "a huge session": (f"{ANY}.Sessions/Get", pb.SessionName(session="n" * (8 << 20)), "UNKNOWN_SESSION"),
    "a session of other letters": (f"{ANY}.Sessions/Get", pb.SessionName(session="ü%\n" * 3_000), "UNKNOWN_SESSION"),
    "a turn": (f"{ANY}.Sessions/Turn", turn(LONG, 1, [1]), "UNKNOWN_SESSION"),
    "a fork": (f"{ANY}.Sessions/Fork", pb.ForkRequest(session=LONG, fork=LONG), "BAD_ID"),
    "a new session": (f"{ANY}.Sessions/Open", pb.OpenRequest(session=LONG, model=tasks_pb.Model(name="reader")), "BAD_ID"),
    "a session's model": (f"{ANY}.Sessions/Open", pb.OpenRequest(model=tasks_pb.Model(name=LONG)), "UNKNOWN_MODEL"),
    "a model": (f"{ANY}.Tasks/Classify", tasks_pb.ClassifyRequest(model=tasks_pb.Model(name=LONG), texts=["a"]), "UNKNOWN_MODEL"),
    "a version": (f"{INFERENCE}/ModelInfer", tokens_request([[1]], model_version=LONG), "UNKNOWN_VERSION"),
    "a sequence": (f"{INFERENCE}/ModelInfer", _sequence(LONG), "UNKNOWN_SESSION"),
    "a new sequence": (f"{INFERENCE}/ModelInfer", _sequence(LONG, sequence_start=True), "BAD_ID"),
    "a health service": ("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(service=LONG), "UNKNOWN_SERVICE"),
    "a repository": (f"{INFERENCE}/RepositoryIndex", inference_pb.RepositoryIndexRequest(repository_name=LONG), "UNKNOWN_REPOSITORY"),
    "a load": (f"{INFERENCE}/RepositoryModelLoad", inference_pb.RepositoryModelLoadRequest(model_name=LONG), "UNKNOWN_MODEL"),
    "an unload": (f"{INFERENCE}/RepositoryModelUnload", inference_pb.RepositoryModelUnloadRequest(model_name=LONG), "UNKNOWN_MODEL"),
}


@pytest.mark.parametrize(("method", "request_", "expected"), NAMED.values(), ids=NAMED)
def test_what_names_something_long_is_told_why(served: Served, method: str, request_: Any, expected: str) -> None:
    """An ordinary client gets the typed error, in trailers that it takes."""
    with pytest.raises(grpc.RpcError) as caught:
        served.method(method)(request_)
    assert reason(caught.value)[1] == expected
    trailing = (*(caught.value.trailing_metadata() or ()), ("grpc-message", caught.value.details() or ""))
    assert size(trailing) < LIMIT


def test_streams_tell_it_as_briefly(served: Served) -> None:
    """A turn of a stream, and a request of ModelStreamInfer; both streams go on."""
    calls = Calls(served)
    a = calls.new()
    turns = [turn(LONG, 1, [1]), turn(LONG, 2, [1]), turn(a, 1, [1])]
    told = {(r.session, r.turn): r.refusal for m in calls.turns(iter([pb.TurnsRequest(turns=turns)])) for r in m.turns}
    assert {key: refusal.reason for key, refusal in told.items()} == {
        (LONG, 1): "UNKNOWN_SESSION", (LONG, 2): "UNKNOWN_SESSION", (a, 1): "",
    }  # fmt: skip
    assert told[LONG, 1].ByteSize() < LIMIT
    stream = served.channel.stream_stream(
        f"{INFERENCE}/ModelStreamInfer", inference_pb.ModelInferRequest.SerializeToString, inference_pb.ModelStreamInferResponse.FromString
    )
    given = list(stream(iter([tokens_request([[1]], LONG), tokens_request([[1]])])))
    assert sorted(len(r.error_message) > 0 for r in given) == [False, True]
    assert max(len(r.error_message) for r in given) < LIMIT


@pytest.mark.parametrize(("shape", "why"), [((1 << 62, 4, 0), "WRONG_SHAPE"), ((1,) * 65, "WRONG_RANK"), ((1,) * 64, "WRONG_RANK")])
def test_turns_of_a_shape_that_no_tensor_has(served: Served, shape: tuple[int, ...], why: str) -> None:
    """Refused by a type, in a call and in a stream; the session is as it was."""
    calls = Calls(served)
    a = calls.new()
    bad = turn(a, 1, [1])
    bad.tensors.tensors[0].shape[:] = shape
    if 0 in shape:
        bad.tensors.tensors[0].data = b""
    with pytest.raises(grpc.RpcError) as caught:
        calls.turn(bad)
    assert reason(caught.value)[1] == why
    [reply] = [r for m in calls.turns(iter([pb.TurnsRequest(turns=[bad])])) for r in m.turns]
    assert reply.refusal.reason == why
    assert calls.get(pb.SessionName(session=a)).turn == 0


@example("ü", {"got": "ü" * 600}, 1_000)  # as many bytes as fit where they need no escapes
@example("%", {"got": "%" * 1_200}, 2_000)
@example("…and so on ", {"got": "a…b" * 900}, 500)  # what is cut may hold what marks a cut
@given(st.text(max_size=5_000), st.dictionaries(st.sampled_from(["session", "known", "got"]), st.text(max_size=5_000)), st.integers(1, 500))
def test_any_error_fits(message: str, facts: dict[str, str], times: int) -> None:
    """Whatever is in it. What is short stays as it is; what is cut begins and ends as it did."""
    error = InvalidInput("ANY", message * times, **facts)
    told = brief(error)
    trailing = details(told)
    assert len(failed(3, told.message, trailing, False)) < LIMIT
    assert (type(told), told.reason, told.facts.keys()) == (InvalidInput, "ANY", facts.keys())
    if len(message.encode()) * times <= 1_000:
        assert told.message == error.message
    if sum(len(value.encode()) for value in facts.values()) <= 1_000:
        assert told.facts == error.facts
    for was, now in ((error.message, told.message), *((facts[key], told.facts[key]) for key in facts)):
        cuts = [i for i, c in enumerate(now) if c == "…"]  # one of them is ours, the others were said
        assert now == was or any(was.startswith(now[:i]) and was.endswith(now[i + 1 :]) for i in cuts)
        assert now == was or len(now) < len(was)


def test_a_list_of_faults_is_told_whole() -> None:
    """As long as the message of a load may be."""
    error = Overloaded("ANY", "a fault of many; " * 117, retry_after=2.5, model="m")
    assert brief(error) is error
    cut = brief(Overloaded("ANY", LONG, retry_after=2.5, model="m"))
    assert (cut.retry_after, cut.facts) == (2.5, {"model": "m"})


# ---- What is kept ----


class Refusing:
    """Turns that are refused, but for those whose session begins with "good"; and what a stream asks of its call and its answer."""

    def __init__(self) -> None:
        self.shelf = SimpleNamespace(errands=None)
        self.caller = None
        self.taken: list[tuple[str, int]] = []
        self.failed: list[ServeError] = []

    def turn(self, id: str, number: int, *_: object, **__: object) -> None:
        self.taken.append((id, number))
        if not id.startswith("good"):
            raise Overloaded("QUEUE_FULL", "too much waits", retry_after=1)

    def claim(self, lasting: bool) -> None:
        assert lasting

    def cancel_by(self, cancel: object) -> None:
        pass

    def reply(self, message: bytes) -> None:
        pass

    def fail(self, error: ServeError) -> None:
        self.failed.append(error)


def open_stream() -> tuple[Refusing, sessions._Stream]:
    around = Refusing()
    return around, sessions._Stream(cast(Turns, around), cast(Any, around), cast(Any, around))


def send(stream: sessions._Stream, *turns: tuple[str, int]) -> None:
    stream.on_message(pb.TurnsRequest(turns=[pb.TurnRequest(session=id, turn=n, text="x") for id, n in turns]).SerializeToString())


def test_a_stream_keeps_no_ids_that_no_session_has() -> None:
    around, stream = open_stream()
    send(stream, *((f"{i}" + LONG, 1) for i in range(5)), ("a" * 128, 1))
    assert list(stream._refused) == ["a" * 128]
    send(stream, ("0" + LONG, 2), ("a" * 128, 2))
    assert around.taken[-1] == ("0" + LONG, 2)  # to be told that there is no such session


def test_a_stream_whose_refused_turns_are_too_many_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """And takes no more turns, not of that message either: it can't tell any more which were sent ahead of a refusal."""
    monkeypatch.setattr(sessions, "REFUSED", 10_000)
    around, stream = open_stream()
    send(stream, *((f"{i:03}", 1) for i in range(200)), ("good", 1))
    [error] = around.failed
    assert (error.status, error.reason) == ("RESOURCE_EXHAUSTED", "MANY_REFUSED")
    assert len(around.taken) == int(error.facts["sessions"]) == 10_000 // 153 + 1
    assert ("good", 1) not in around.taken


def test_refused_turns_that_are_sent_again_take_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that lives long, on which turns are refused now and then."""
    monkeypatch.setattr(sessions, "REFUSED", 10_000)
    around, stream = open_stream()
    for i in range(200):
        id = f"{i:03}é"
        send(stream, (id, 3), (id, 4))
        stream._forget(id)
    assert not around.failed
    assert (stream._refused, stream._remembered) == ({}, 0)
    send(stream, ("a", 3), ("a", 4), ("a", 2), ("a", 3))
    assert stream._refused == {"a": 2}
    assert around.taken[-2:] == [("a", 3), ("a", 2)]


def test_forms_and_ids_of_any_length_are_not_learnt() -> None:
    forms = usual.Forms()
    for size, known in ((100, True), (1 << 20, False)):
        forms.learn((b"f" * size,), cast(Any, SimpleNamespace(lengths=())))
        assert (forms.find((b"f" * size,), []) is not None) == known
        forms.learn_sequence(b"i" * size, "id")
        assert (forms.sequence(b"i" * size) is not None) == known


def test_forms_that_no_tensor_has_are_not_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked up is kept, with whatever a caller made of it."""
    monkeypatch.setattr(wire, "_steps", lambda *form: pytest.fail(f"{form} is kept"))
    graph = cast(Any, SimpleNamespace(inputs=[Tensor("x", "int64", ("batch", "time"))], max_time=9))
    for kind, shape in (("INT64" + LONG, [1, 1]), ("INT64", [1] * 100_000)):
        sent = pb.Tensor(name="x", datatype=kind, shape=shape)
        assert wire.read_packed(graph, [sent], [np.zeros(1, np.int64).tobytes()]) == (0, None)


def test_shapes_that_say_nothing_of_their_bytes() -> None:
    """Everything that takes a shape: of each kind one that is, and one that only looks so."""
    for kind in ("INT64", "BF16", "BYTES"):
        assert wire.read("x", kind, [1 << 20, 1 << 20, 0], b"").shape == (1 << 20, 1 << 20, 0)
        with pytest.raises(InvalidInput) as caught:
            wire.read("x", kind, [1 << 30, 1 << 30, 0], b"")
        assert caught.value.reason == "WRONG_SHAPE"
