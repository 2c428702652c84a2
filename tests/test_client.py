"""The client, blocking and asyncio, against a fake server: conversions, errors, retries, cancellation."""

from __future__ import annotations

import asyncio
import inspect
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import seqserve
from protos import inference_pb2 as oip
from protos import seqserve_pb2 as pb
from seqserve import errors, retry, tensors, wire
from tests import fakes
from tests.fakes import Fake, failure

Code = grpc.StatusCode


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fakes.serving() as fake:
        yield fake


class Ask:
    """Makes one call, by name, with a fresh client of either kind. A stream comes as a list."""

    def __init__(self, fake: Fake, blocking: bool) -> None:
        self.waits: list[float] = []  # what would have been slept before another try
        self._fake, self._blocking = fake, blocking

    def __call__(self, method: str, *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        options = {"target": self._fake.target, **(options or {})}
        if not self._blocking:
            return asyncio.run(self._await(method, args, options, kwargs))
        with seqserve.Client(**options) as client:
            answer = getattr(client, method)(*args, **kwargs)
            return list(answer) if inspect.isgenerator(answer) else answer

    async def _await(self, method: str, args: tuple[Any, ...], options: dict[str, Any], kwargs: dict[str, Any]) -> Any:
        async with seqserve.AsyncClient(**options) as client:
            answer = getattr(client, method)(*args, **kwargs)
            return [piece async for piece in answer] if inspect.isasyncgen(answer) else await answer


@pytest.fixture(params=["blocking", "asyncio"])
def ask(request: pytest.FixtureRequest, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> Ask:
    asked = Ask(fake, request.param == "blocking")

    async def noted(client: seqserve.AsyncClient, seconds: float) -> None:
        asked.waits.append(seconds)

    monkeypatch.setattr(seqserve.Client, "_sleep", lambda client, seconds: asked.waits.append(seconds))
    monkeypatch.setattr(seqserve.AsyncClient, "_sleep", noted)
    return asked


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address where nothing listens, and nothing will as long as the test runs."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


# Conversions


@given(hnp.arrays(st.sampled_from(list(tensors.DATATYPES.values())), hnp.array_shapes(min_dims=0, min_side=0, max_dims=4)))
def test_pack_and_unpack_are_inverse(array: Any) -> None:
    """Arrays of every datatype and shape, empty and of no dimension too, come back bit for bit."""
    datatype, shape, raw = tensors.pack("x", array)
    back = tensors.unpack("x", datatype, shape, raw)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@given(st.lists(st.binary()))
def test_bytes_are_kept_as_they_are(elements: list[bytes]) -> None:
    """Byte strings come back, empty ones and those that end in zeros too."""
    datatype, shape, raw = tensors.pack("x", tensors.objects(elements))
    assert datatype == "BYTES"
    assert tensors.unpack("x", datatype, shape, raw).tolist() == elements


@given(hnp.arrays(st.sampled_from([">i4", ">f8", "<u2"]), (3, 4)))
def test_memory_layout_does_not_matter(array: Any) -> None:
    """Byte order, steps and transposition of the memory are not seen on the wire."""
    plain = tensors.pack("x", np.array(array.T[::2].tolist(), array.dtype.newbyteorder("<")))
    assert tensors.pack("x", array.T[::2]) == plain


def test_text_travels_as_bytes() -> None:
    """Arrays of str, of either numpy dtype, are UTF-8 on the wire."""
    for array in (np.array(["ä", "日本"]), np.array(["ä", "日本"], object), ["ä", "日本"]):
        assert tensors.unpack("x", *tensors.pack("x", array)).tolist() == ["ä".encode(), "日本".encode()]


@pytest.mark.parametrize("values", [np.array([1j]), np.array([object()]), np.array(["\ud800"]), [[1], [2, 3]]])
def test_what_has_no_datatype_is_refused_here(values: Any) -> None:
    """Complex numbers, other objects, broken text and ragged lists name the input."""
    with pytest.raises(seqserve.InvalidInput, match="'x'"):
        tensors.pack("x", values)


@pytest.mark.parametrize(
    ("datatype", "shape", "raw"),
    [("FP32", [2], b"1234"), ("FP32", [1], b"123"), ("BF16", [1], b"12"), ("BYTES", [1], b"\5\0\0\0abc"), ("BYTES", [1], b"\5\0")],
)
def test_contents_that_do_not_fit_are_a_bad_reply(datatype: str, shape: list[int], raw: bytes) -> None:
    """Bytes that are not what shape and datatype promise are the server's fault."""
    with pytest.raises(seqserve.ServerError, match="'x'") as caught:
        tensors.unpack("x", datatype, shape, raw)
    assert caught.value.reason == "BAD_REPLY"


# Calls


def test_classify(ask: Ask) -> None:
    """A text gives one result, a list gives a list in its order."""
    one = ask("classify", "a good film")
    assert (one.label, one.score, dict(one.scores), one.tokens) == ("positive", 0.9375, {"negative": 0.0625, "positive": 0.9375}, 3)
    assert (one.model, one.version, one.timing) == ("sentiment", "1", seqserve.Timing(0.001, 0.002, 3))
    assert repr(one) == "<Classification positive 93.8%, 3 tokens>"
    assert [c.label for c in ask("classify", ["bad", "good"])] == ["negative", "positive"]


def test_translate(ask: Ask, fake: Fake) -> None:
    """Every choice reaches the server; attention is tokens by source tokens, and absent unless asked for."""
    answer = ask("translate", "a dog runs", "en", "de", 5, 2, True, model="en-de", version="1")
    assert (answer.text, answer.ended, answer.source_tokens) == ("A DOG", False, ("a", "dog", "runs"))
    assert answer.attention.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert answer.timing.rounds == 0
    model = pb.Model(name="en-de", version="1")
    wanted = pb.TranslateRequest(model=model, text="a dog runs", source="en", target="de", beam=5, max_tokens=2, attention=True)
    assert fake.requests == [wanted]
    assert ask("translate", "a dog").attention.shape == (2, 0)


def test_streamed_pieces_are_the_translation(ask: Ask) -> None:
    """The pieces' texts together are what the last message holds whole."""
    pieces = ask("translate_stream", "a dog runs")
    assert "".join(p.text for p in pieces) == pieces[-1].done.text == "A DOG RUNS"
    assert [p.token.piece for p in pieces[:-1]] == ["A", "DOG", "RUNS"]
    assert pieces[-1].token is None


def test_forecast(ask: Ask) -> None:
    """Steps by channels in, steps ahead by channels out; quantiles are found under the number that was asked for."""
    answer = ask("forecast", [[1, 2], [3, 4]], 3, (0.1, 0.9))
    assert answer.channels == ("c0", "c1")
    assert answer.mean.tolist() == [[3, 4]] * 3
    assert answer.quantiles[0.9] == pytest.approx(np.array([[3.4, 4.4]] * 3))
    assert list(answer.quantiles) == [0.1, 0.9]
    assert ask("forecast", [1, 2, 3]).mean.shape == (24, 1)


def test_infer(ask: Ask) -> None:
    """Arrays and parameters go and come by name; the server's times are seconds."""
    parameters = {"b": True, "i": -1, "u": 2**63, "f": 0.5, "s": "x"}
    inputs = {"x": np.arange(6).reshape(2, 3), "y": np.array([b"a\0"], object)}
    answer = ask("infer", "echo", inputs, id="7", parameters=parameters)
    assert answer["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert answer["y"].tolist() == [b"a\0"]
    assert {name: answer.parameters[name] for name in parameters} == parameters
    assert (answer.model, answer.version, answer.id, answer.timing) == ("echo", "1", "7", seqserve.Timing(0.0015, 0.0025, 4))
    assert list(ask("infer", "echo", inputs, ["y"]).outputs) == ["y"]


def test_contents_by_type_are_read(ask: Ask, fake: Fake) -> None:
    """Outputs that came as lists of values, as other servers may send them, become the same arrays."""
    reply = oip.ModelInferResponse(model_name="other")
    reply.outputs.add(name="x", datatype="INT8", shape=[2], contents=oip.InferTensorContents(int_contents=[1, -1]))
    reply.outputs.add(name="y", datatype="BYTES", shape=[1], contents=oip.InferTensorContents(bytes_contents=[b"a"]))
    fake.replies["ModelInfer"] = reply.SerializeToString()
    answer = ask("infer", "other", {})
    assert answer["x"].dtype == np.int8
    assert (answer["x"].tolist(), answer["y"].tolist()) == ([1, -1], [b"a"])


def test_what_the_server_says_of_itself(ask: Ask) -> None:
    """Liveness, readiness, metadata, models and the standard health check."""
    assert ask("live")
    assert ask("ready")
    assert ask("model_ready", "ett")
    assert not ask("model_ready", "other")
    assert ask("health") == "SERVING"
    assert ask("metadata") == seqserve.ServerMetadata("fake", "0", ("x",))
    described = ask("model_metadata", "sentiment")
    assert described.inputs[0] == seqserve.TensorMetadata("tokens", "INT64", (-1, -1))
    assert [(m.name, m.version, m.kind) for m in ask("models")][-1] == ("ett", "2", "forecast")


def test_metadata_and_timeout_go_along(ask: Ask, fake: Fake) -> None:
    """What the client was given for every call arrives with it, and a call's own timeout wins."""
    ask("models", options={"metadata": (("authorization", "Bearer x"),), "timeout": 1000})
    ask("models", timeout=100)
    assert fake.metadata[0]["authorization"] == "Bearer x"
    first, second = (left or 0.0 for left in fake.left)
    assert 101 < first <= 1010  # gRPC rounds up what it writes into the header, by at most 1 %
    assert 0 < second <= 101


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("classify", ("\ud800",)),
        ("classify", ([b"bytes"],)),
        ("translate", ("x", "", "", -1)),
        ("translate_stream", ("x", "", "", 0, 2**32)),
        ("forecast", ([["a"]],)),
        ("forecast", ([[1], [2, 3]],)),
        ("forecast", (np.zeros((1, 2, 3)),)),
        ("forecast", ([[1e300]],)),
        ("infer", ("m", {}, (), "", "", {"p": 2**64})),
    ],
)
def test_what_can_not_be_sent_is_refused_here(ask: Ask, fake: Fake, method: str, args: tuple[Any, ...]) -> None:
    """Input that has no place in a message is InvalidInput, and no call is made."""
    with pytest.raises(seqserve.InvalidInput):
        ask(method, *args)
    assert not fake.calls


@pytest.mark.parametrize(
    ("method", "reply"),
    [
        ("Classify", b"\xff"),
        ("Classify", pb.ClassifyReply(timing=pb.Timing(rounds=1)).SerializeToString()),
        ("Forecast", pb.ForecastReply(channels=["a"], mean=pb.Series(channels=2, values=[1, 2])).SerializeToString()),
        ("Translate", pb.TranslateReply(tokens=[pb.Token(attention=[1])]).SerializeToString()),
    ],
)
def test_a_reply_that_makes_no_sense(ask: Ask, fake: Fake, method: str, reply: bytes) -> None:
    """Replies that can't be read, or contradict themselves, are ServerError and are not asked for again."""
    fake.replies[method] = reply
    with pytest.raises(seqserve.ServerError) as caught:
        ask(method.lower(), [[1.0]] if method == "Forecast" else "x")
    assert caught.value.reason == "BAD_REPLY"
    assert fake.calls == [method]


# Errors


@pytest.mark.parametrize("code", list(Code)[1:])
def test_every_status_has_its_error(code: grpc.StatusCode) -> None:
    """Each gRPC status becomes a class of the tree that keeps its name."""
    error = errors.from_status(code, "why", ())
    expected = {
        Code.INVALID_ARGUMENT: seqserve.InvalidInput,
        Code.OUT_OF_RANGE: seqserve.InvalidInput,
        Code.NOT_FOUND: seqserve.NotFound,
        Code.UNIMPLEMENTED: seqserve.NotFound,
        Code.RESOURCE_EXHAUSTED: seqserve.TooLarge,
        Code.UNAVAILABLE: seqserve.Unavailable,
        Code.DEADLINE_EXCEEDED: seqserve.DeadlineExceeded,
        Code.CANCELLED: seqserve.Cancelled,
        Code.FAILED_PRECONDITION: seqserve.FailedPrecondition,
        Code.ALREADY_EXISTS: seqserve.FailedPrecondition,
        Code.ABORTED: seqserve.FailedPrecondition,
        Code.UNAUTHENTICATED: seqserve.Denied,
        Code.PERMISSION_DENIED: seqserve.Denied,
    }
    assert type(error) is expected.get(code, seqserve.ServerError)
    assert (error.status, str(error)) == (code.name, "why")


@pytest.mark.parametrize(
    ("code", "reasons", "kind"),
    [
        (Code.NOT_FOUND, "UNKNOWN_SESSION", seqserve.SessionNotFound),
        (Code.NOT_FOUND, "UNKNOWN_MODEL", seqserve.NotFound),
        (Code.FAILED_PRECONDITION, "SESSION_CLOSED SESSION_EXPIRED SESSION_EVICTED SESSION_MOVED SESSION_UNLOADED", seqserve.SessionGone),
        (Code.FAILED_PRECONDITION, "GAP OTHER_INPUT ACKNOWLEDGED ACKNOWLEDGED_AHEAD SESSION_EXISTS", seqserve.SessionConflict),
        (Code.FAILED_PRECONDITION, "SOMETHING_NEW", seqserve.FailedPrecondition),
        (Code.RESOURCE_EXHAUSTED, "SESSION_QUOTA UNACKNOWLEDGED QUEUE_FULL", seqserve.Overloaded),
    ],
)
def test_refusals_of_sessions(code: grpc.StatusCode, reasons: str, kind: type[seqserve.Error]) -> None:
    """Each reason has its class, as the status of a call and as a message of a stream, and tells the last turn applied."""
    for reason in reasons.split():
        _, message, details = failure(code, "why", reason, retry=0.5, turn="7")
        told = errors.from_status(code, message, ((errors.DETAILS_KEY, details),))
        streamed = errors.from_refusal(code.value[0], "why", reason, {"turn": "7"}, 0.5)
        for error in (told, streamed):
            assert type(error) is kind
            assert (error.reason, error.turn, error.retry_after) == (reason, 7, 0.5)
    assert errors.Error("x", details={"turn": "many"}).turn is None
    assert errors.from_refusal(99, "x", "", {}, None).status == "UNKNOWN"


def test_details_are_read(ask: Ask, fake: Fake) -> None:
    """Reason, details and the time to come back arrive from google.rpc.Status."""
    fake.failures = [failure(Code.INVALID_ARGUMENT, "3 channels", "WRONG_CHANNELS", expected="7", got="3")]
    with pytest.raises(seqserve.InvalidInput, match="3 channels") as caught:
        ask("forecast", [[1, 2, 3]])
    assert (caught.value.reason, caught.value.details) == ("WRONG_CHANNELS", {"expected": "7", "got": "3"})
    assert caught.value.retry_after is None
    fake.failures = [failure(Code.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", retry=0.25)]
    with pytest.raises(seqserve.Overloaded) as overloaded:
        ask("models", options={"retries": 0})
    assert overloaded.value.retry_after == 0.25


@given(st.binary())
def test_broken_details_do_not_hide_the_status(junk: bytes) -> None:
    """Whatever bytes stand for the details, an error of the right class comes out."""
    error = errors.from_status(Code.NOT_FOUND, "no such model", ((errors.DETAILS_KEY, junk),))
    assert type(error) is seqserve.NotFound


def test_errors_are_also_what_python_calls_them() -> None:
    """Input faults are ValueErrors, deadlines TimeoutErrors, and all survive a process boundary."""
    assert issubclass(seqserve.InvalidInput, ValueError)
    assert issubclass(seqserve.DeadlineExceeded, TimeoutError)
    for kind in (seqserve.InvalidInput, seqserve.DeadlineExceeded, seqserve.Overloaded):
        error = kind("why", status="S", reason="R", details={"a": "b"}, retry_after=1.5)
        back = pickle.loads(pickle.dumps(error))
        assert type(back) is kind
        assert (str(back), vars(back)) == ("why", vars(error))


def test_a_deadline_that_passes(ask: Ask) -> None:
    """A call that is not over in time is DeadlineExceeded, and is not made again."""
    with pytest.raises(seqserve.DeadlineExceeded):
        ask("translate_stream", fakes.HOLD + " on", timeout=0.02)
    assert ask.waits == []


def test_nobody_there(ask: Ask, nobody: str) -> None:
    """Without a server, calls are Unavailable; whether it is live or ready is a plain no."""
    with pytest.raises(seqserve.Unavailable):
        ask("models", options={"target": nobody})
    assert len(ask.waits) == 3
    assert not ask("live", options={"target": nobody})
    assert not ask("ready", options={"target": nobody})
    assert not ask("model_ready", "ett", options={"target": nobody})


# Retries

FULL = failure(Code.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", retry=0.25)
AWAY = failure(Code.UNAVAILABLE, "draining", "DRAINING")


@given(
    tries=st.integers(1, 50),
    limit=st.integers(0, 50),
    left=st.floats(0, 1e6),
    chance=st.floats(0, 1, exclude_max=True),
    after=st.none() | st.floats(0, 1e6),
)
def test_the_wait_is_what_was_asked_for_and_fits(tries: int, limit: int, left: float, chance: float, after: float | None) -> None:
    """A wait is never shorter than the server's word, at most LONGEST above it, and over before the deadline."""
    for kind in (seqserve.Overloaded, seqserve.Unavailable):
        wait = retry.delay(kind("", retry_after=after), tries, limit, left, chance)
        assert wait is None or (after or 0) <= wait <= (after or 0) + retry.LONGEST
        assert wait is None or (wait < left and tries <= limit)
        assert wait is not None or tries > limit or (after or 0) + retry.LONGEST >= left


def test_what_a_server_or_proxy_cancelled_is_sent_again() -> None:
    """A call cancelled on the way, as by a server that stops, is tried again; once its client is closed, none is."""
    closed = False
    tries = retry.Tries(5, 10.0, clock=lambda: 0.0, chance=lambda: 0.0, closed=lambda: closed)
    assert tries.after(seqserve.Cancelled("")) == 0.0
    closed = True
    assert tries.after(seqserve.Cancelled("")) is None
    assert tries.after(seqserve.Unavailable("")) is None


@given(st.sampled_from([seqserve.InvalidInput, seqserve.TooLarge, seqserve.ServerError, seqserve.DeadlineExceeded]))
def test_other_failures_stand(kind: type[seqserve.Error]) -> None:
    """What a second try can't change is not tried again, whatever the server says."""
    assert retry.delay(kind("", retry_after=0.0), 1, 10, 1e6, 0.0) is None


def test_tries_without_a_limit() -> None:
    """However many tries were made, there is a wait for the next."""
    assert 0 < (retry.delay(seqserve.Unavailable(""), 10**6, retry.UNLIMITED, 1e9, 0.5) or 0.0) <= retry.LONGEST


def test_tries_share_one_deadline() -> None:
    """The time that a try may take is what those before it have left."""
    now = [100.0]
    tries = retry.Tries(5, 10.0, clock=lambda: now[0], chance=lambda: 0.0)
    assert tries.left() == 10.0
    now[0] = 107.0
    assert tries.left() == 3.0
    assert tries.after(seqserve.Unavailable("", retry_after=2.5)) == 2.5
    now[0] = 108.0
    assert tries.after(seqserve.Unavailable("", retry_after=2.5)) is None
    now[0] = 200.0
    assert tries.left() == 0.0


@pytest.mark.parametrize("method", ["translate", "translate_stream"])
def test_a_busy_server_is_asked_again(ask: Ask, fake: Fake, method: str) -> None:
    """Calls turned away with a time to come back, or at a draining server, are sent again after at least that time."""
    fake.failures = [FULL, AWAY]
    ask(method, "a dog")
    assert len(fake.calls) == 3
    assert ask.waits[0] >= 0.25


@pytest.mark.parametrize(("retries", "calls"), [(0, 1), (2, 3)])
def test_retries_are_counted(ask: Ask, fake: Fake, retries: int, calls: int) -> None:
    """After `retries` more tries the last failure is raised."""
    fake.failures = [AWAY] * 5
    with pytest.raises(seqserve.Unavailable, match="draining"):
        ask("classify", "x", options={"retries": retries})
    assert len(fake.calls) == calls


@pytest.mark.parametrize("refusal", [failure(Code.RESOURCE_EXHAUSTED, "message too large"), failure(Code.INTERNAL, "bug", retry=0.0)])
def test_what_can_not_help_is_not_tried(ask: Ask, fake: Fake, refusal: fakes.Failure) -> None:
    """A message over the limit, or a server's bug, is raised at once."""
    fake.failures = [refusal]
    with pytest.raises((seqserve.TooLarge, seqserve.ServerError)):
        ask("classify", "x")
    assert fake.calls == ["Classify"]


def test_a_wait_past_the_deadline_is_not_begun(ask: Ask, fake: Fake) -> None:
    """Where the server asks for more time than is left, the caller hears so at once."""
    fake.failures = [failure(Code.RESOURCE_EXHAUSTED, "full", retry=1000.0)]
    with pytest.raises(seqserve.Overloaded):
        ask("classify", "x", timeout=100)
    assert ask.waits == []


def test_a_stream_that_began_is_not_begun_again(ask: Ask, fake: Fake) -> None:
    """Once a piece was given out, a failure is raised: the pieces can't be taken back."""
    with pytest.raises(seqserve.Unavailable):
        ask("translate_stream", fakes.BREAK + " it")
    assert fake.calls == ["TranslateStream"]


# Streams that are left


def test_closing_a_stream_ends_the_call(fake: Fake) -> None:
    """The server hears that the caller has left."""
    with seqserve.Client(fake.target) as client:
        pieces = client.translate_stream(fakes.HOLD + " on")
        assert next(pieces).text == "HOLD"
        pieces.close()
        assert fake.gone.wait(60)
        assert client.classify("good").label == "positive"


def test_dropping_a_stream_ends_the_call(fake: Fake) -> None:
    """So it does when the iterator is no longer referred to."""
    with seqserve.Client(fake.target) as client:
        for piece in client.translate_stream(fakes.HOLD + " on"):
            assert piece.text == "HOLD"
            break
        assert fake.gone.wait(60)


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_leaving_a_stream_within_asyncio_ends_the_call(fake: Fake, how: str) -> None:
    """Closing the iterator and cancelling the task that reads it both reach the server."""

    async def go() -> None:
        async with seqserve.AsyncClient(fake.target) as client:
            pieces = client.translate_stream(fakes.HOLD + " on")
            assert (await anext(pieces)).text == "HOLD"
            if how == "cancel":
                reading = asyncio.ensure_future(anext(pieces))
                await asyncio.sleep(0)  # let it begin
                reading.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reading
            await pieces.aclose()
            assert await asyncio.to_thread(fake.gone.wait, 60)

    asyncio.run(go())


def test_closing_the_client_cancels(fake: Fake) -> None:
    """A stream that is being read when the client is closed is Cancelled."""
    client = seqserve.Client(fake.target)
    pieces = client.translate_stream(fakes.HOLD + " on")
    next(pieces)
    client.close()
    with pytest.raises(seqserve.Cancelled):
        next(pieces)


# Both clients


def test_the_twins_have_the_same_methods() -> None:
    """AsyncClient has Client's public methods, with the same parameters and defaults, and the same words to say of them."""

    def methods(kind: type) -> dict[str, Any]:
        return {name: member for name, member in vars(kind).items() if inspect.isfunction(member) and not name.startswith("_")}

    blocking, awaited = methods(seqserve.Client), methods(seqserve.AsyncClient)
    assert list(blocking) == list(awaited)
    for name in blocking:
        parameters = [list(inspect.signature(twin).parameters.values()) for twin in (blocking[name], awaited[name])]
        assert parameters[0] == parameters[1], name
        assert blocking[name].__doc__ == awaited[name].__doc__
    assert inspect.signature(seqserve.Client) == inspect.signature(seqserve.AsyncClient)


def test_one_connection_for_several_callers(fake: Fake) -> None:
    """`with_metadata` sends other metadata on the same connection, which lives on when such a client is closed; `call` carries
    what `wire` makes."""
    call = wire.models()
    with seqserve.Client(fake.target, metadata=(("x-api-key", "mine"),)) as client:
        with client.with_metadata((("x-api-key", "theirs"),)) as other:
            assert other.call(call) == other.models()
        client.models()

    async def awaited() -> None:
        async with seqserve.AsyncClient(fake.target, metadata=(("x-api-key", "mine"),)) as client:
            async with client.with_metadata((("x-api-key", "theirs"),)) as other:
                assert await other.call(call) == await other.models()
            await client.models()

    asyncio.run(awaited())
    assert [shown["x-api-key"] for shown in fake.metadata] == ["theirs", "theirs", "mine"] * 2


def test_one_client_for_many_threads(fake: Fake) -> None:
    """Calls made side by side get their own answers."""
    with seqserve.Client(fake.target) as client, ThreadPoolExecutor(8) as pool:
        texts = ["x " * n + "x" for n in range(64)]
        assert [c.tokens for c in pool.map(client.classify, texts)] == list(range(1, 65))


def test_importing_registers_no_open_inference_messages() -> None:
    """`import seqserve` leaves the protocol's names free, so that a process may hold tritonclient's copy."""
    script = "import seqserve, sys; sys.exit('protos.inference_pb2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_tritonclient_in_the_same_process(fake: Fake) -> None:
    """Where tritonclient's messages are registered, calls use those and work."""
    script = """
import sys, types
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
file = descriptor_pb2.FileDescriptorProto(name="grpc_service.proto", package="inference", syntax="proto3")
file.message_type.add(name="ServerLiveRequest")
file.message_type.add(name="ServerLiveResponse").field.add(name="live", number=1, type=8, label=1)
found = descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
module = types.ModuleType("tritonclient.grpc.service_pb2")
module.ServerLiveResponse = message_factory.GetMessageClass(found.message_types_by_name["ServerLiveResponse"])
sys.modules[module.__name__] = module
import seqserve
with seqserve.Client(sys.argv[1]) as client:
    sys.exit(not client.live() or "protos.inference_pb2" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", script, fake.target], check=False).returncode == 0


def test_results_say_what_they_are(ask: Ask) -> None:
    """The repr of each result is short and has what one looks for first."""
    assert repr(ask("translate", "a dog", max_tokens=1)) == "<Translation 'A', cut>"
    assert [repr(p) for p in ask("translate_stream", "a")] == ["<TranslationPiece 'A'>", "<TranslationPiece '', done>"]
    assert repr(ask("forecast", [1.0], 2, [0.5])) == "<Forecast 2 steps of c0; quantiles 0.5>"
    assert repr(ask("infer", "m", {"x": np.zeros((1, 2), np.float32)})) == "<Inference x float32[1, 2]>"
    assert repr(ask("models")[0]) == "<Model sentiment 1, classify, ready>"
