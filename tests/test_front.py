"""Both fronts, over real ports and with grpcio's ordinary client: whatever carries the calls, handlers and callers see the same."""

import contextlib
import gc
import logging
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from server.rpc.direct_front import DirectFront
from server.rpc.front import Call, Front, Metadata, Method, Options, Receiver, Tls, choose_front, server_stream, stream, unary
from server.rpc.public_front import PublicFront
from server.rpc.relay_front import RelayFront

WAIT_S = 30  # long enough for a crowded machine; nothing waits this long unless a test is about to fail
CUT = ("grpc.use_local_subchannel_pool", 1)  # a connection of its own for every channel
GONE = {grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE}


class Latch:
    """Opens when it has been counted down `n` times."""

    def __init__(self, n: int = 1) -> None:
        self._left = n
        self._lock = threading.Lock()
        self._open = threading.Event()

    def down(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left <= 0:
                self._open.set()

    def wait(self) -> bool:
        """Whether it opened. Collects garbage meanwhile, for latches that count objects which die."""
        until = time.monotonic() + WAIT_S
        while not self._open.wait(0.1) and time.monotonic() < until:
            gc.collect()
        return self._open.is_set()


class Alive:
    """Counts objects that live."""

    def __init__(self) -> None:
        self._n = 0
        self._changed = threading.Condition()

    def watch(self, thing: object) -> None:
        with self._changed:
            self._n += 1
        weakref.finalize(thing, self._died)

    def _died(self) -> None:
        with self._changed:
            self._n -= 1
            self._changed.notify_all()

    def none(self) -> bool:
        """Whether all died."""
        until = time.monotonic() + WAIT_S
        with self._changed:
            while not self._changed.wait_for(lambda: self._n == 0, 0.1) and time.monotonic() < until:
                gc.collect()
        return self._n == 0


class Echo:
    """A receiver that sends every message back and notes what happened."""

    def __init__(self, call: Call) -> None:
        self.call = call

    def on_message(self, message: bytes) -> None:
        self.call.reply(message)

    def on_end(self) -> None:
        self.call.finish()


def echo(call: Call, request: bytes) -> None:
    call.reply(request)


class Served:
    """A front that runs, and a client of it."""

    def __init__(self, front: Front, port: int) -> None:
        self.front = front
        self.address = f"127.0.0.1:{port}"
        self.channel = self.connect()

    def connect(self) -> grpc.Channel:
        return grpc.insecure_channel(self.address, options=[CUT])

    def unary(self, method: str) -> Any:
        return self.channel.unary_unary(method)

    def server_stream(self, method: str) -> Any:
        return self.channel.unary_stream(method)

    def stream(self, method: str) -> Any:
        return self.channel.stream_stream(method)


Serve = Callable[..., Served]


@pytest.fixture(params=["direct", "public", "relayed"])
def kind(request: pytest.FixtureRequest) -> type[Front]:
    return choose_front("direct", 1) if request.param == "relayed" else choose_front(request.param)


@pytest.fixture
def serve(kind: type[Front]) -> Iterator[Serve]:
    """Start fronts of one kind on free ports; afterwards each must have ended every call."""
    running: list[Served] = []

    def start(methods: dict[str, Method], **options: Any) -> Served:
        front = kind(methods, Options(**options))
        port = front.listen("127.0.0.1:0")
        front.start()
        running.append(Served(front, port))
        return running[-1]

    yield start
    for served in running:
        served.channel.close()
        served.front.stop(0)
        assert served.front.live == 0


@pytest.fixture
def engine() -> Iterator[ThreadPoolExecutor]:
    """Threads that answer in place of the engine's."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


def feed(messages: "list[bytes] | Iterator[bytes]", hold: threading.Event) -> Iterator[bytes]:
    """Messages for a stream that its caller keeps open until `hold` is set."""
    yield from messages
    hold.wait(WAIT_S)


# ---- Answers ----


def test_a_unary_call_gets_its_answer(serve: Serve) -> None:
    """What a handler replies is what the caller receives, empty messages included."""
    call = serve({"/t.S/Echo": unary(echo)}).unary("/t.S/Echo")
    assert call(b"hello", timeout=WAIT_S) == b"hello"
    assert call(b"", timeout=WAIT_S) == b""


def test_an_answer_may_come_from_another_thread(serve: Serve, engine: ThreadPoolExecutor) -> None:
    """A handler that returns at once and is answered for later holds nothing up."""
    served = serve({"/t.S/Echo": unary(lambda call, request: (engine.submit(call.reply, request[::-1]), None)[1])})
    assert served.unary("/t.S/Echo")(b"abc", timeout=WAIT_S) == b"cba"


def test_many_calls_at_once_get_their_own_answers(serve: Serve, engine: ThreadPoolExecutor) -> None:
    """2,000 calls, 64 in flight, answered out of order by four threads: every caller gets the answer to its own question."""
    served = serve({"/t.S/Echo": unary(lambda call, request: (engine.submit(call.reply, b"re:" + request), None)[1])})
    call, flight, answers = served.unary("/t.S/Echo"), threading.Semaphore(64), {}
    for i in range(2_000):
        assert flight.acquire(timeout=WAIT_S)
        answers[i] = call.future(b"%d" % i, timeout=WAIT_S)
        answers[i].add_done_callback(lambda _: flight.release())
    assert all(answer.result(WAIT_S) == b"re:%d" % i for i, answer in answers.items())


def test_a_server_stream_arrives_whole_and_in_order(serve: Serve, engine: ThreadPoolExecutor) -> None:
    """Messages replied faster than they are taken wait in the call, and none is lost or moved."""

    def count(call: Call, request: bytes) -> None:
        for i in range(int(request)):
            call.reply(b"%d" % i)
        call.finish()

    served = serve({"/t.S/Count": server_stream(lambda call, request: (engine.submit(count, call, request), None)[1])})
    assert list(served.server_stream("/t.S/Count")(b"5000", timeout=WAIT_S)) == [b"%d" % i for i in range(5_000)]
    assert list(served.server_stream("/t.S/Count")(b"0", timeout=WAIT_S)) == []


def test_replies_of_several_threads_keep_the_order_in_which_they_were_given(serve: Serve, engine: ThreadPoolExecutor) -> None:
    """On one stream with work of many threads, the caller sees replies in the order of the calls of `reply`."""
    given: list[bytes] = []
    lock = threading.Lock()
    n = 2_000

    class Spread(Echo):
        def on_message(self, message: bytes) -> None:
            engine.submit(self.answer, message)

        def answer(self, message: bytes) -> None:
            with lock:
                given.append(message)
                self.call.reply(message)
                if len(given) == n:
                    self.call.finish()

        def on_end(self) -> None:
            """Answers are still being worked on."""

    served = serve({"/t.S/Spread": stream(Spread)})
    taken = list(served.stream("/t.S/Spread")((b"%d" % i for i in range(n)), timeout=WAIT_S))
    assert taken == given
    assert sorted(taken, key=int) == [b"%d" % i for i in range(n)]


def test_many_streams_run_side_by_side(serve: Serve, engine: ThreadPoolExecutor) -> None:
    """Fifty streams of one connection, each talking in turns, do not mix."""
    served = serve({"/t.S/Echo": stream(Echo)})

    def talk(name: int) -> bool:
        mine = [b"%d/%d" % (name, i) for i in range(50)]
        return list(served.stream("/t.S/Echo")(iter(mine), timeout=WAIT_S)) == mine

    assert all(engine.map(talk, range(50)))


def test_the_end_of_the_callers_messages_comes_after_all_of_them(serve: Serve) -> None:
    """`on_end` follows the last message, and the stream can still be answered then."""

    class Sum:
        def __init__(self, call: Call) -> None:
            self.call, self.total = call, 0

        def on_message(self, message: bytes) -> None:
            self.total += int(message)

        def on_end(self) -> None:
            self.call.reply(b"%d" % self.total)
            self.call.finish((("count", "100"),))

    answers = serve({"/t.S/Sum": stream(Sum)}).stream("/t.S/Sum")((b"%d" % i for i in range(100)), timeout=WAIT_S)
    assert list(answers) == [b"4950"]
    assert ("count", "100") in answers.trailing_metadata()


def test_the_server_may_end_a_stream_first(serve: Serve) -> None:
    """After `finish` the caller's further messages are not delivered, and the caller sees a good end."""
    seen: list[bytes] = []

    class Once(Echo):
        def on_message(self, message: bytes) -> None:
            seen.append(message)
            self.call.reply(message)
            self.call.finish()

    hold = threading.Event()
    served = serve({"/t.S/Once": stream(Once)})
    assert list(served.stream("/t.S/Once")(feed([b"1", b"2", b"3"], hold), timeout=WAIT_S)) == [b"1"]
    hold.set()
    assert seen == [b"1"]


def test_only_the_first_end_of_a_call_counts(serve: Serve) -> None:
    """A second reply, a failure after a reply and a finish after a failure are dropped."""

    def twice(call: Call, request: bytes) -> None:
        call.reply(b"first")
        call.reply(b"second")
        call.fail(grpc.StatusCode.INTERNAL, "third")

    class Ended(Echo):
        def on_message(self, message: bytes) -> None:
            self.call.fail(grpc.StatusCode.ABORTED, "enough")
            self.call.reply(b"more")
            self.call.finish()

    served = serve({"/t.S/Twice": unary(twice), "/t.S/Ended": stream(Ended)})
    assert served.unary("/t.S/Twice")(b"", timeout=WAIT_S) == b"first"
    with pytest.raises(grpc.RpcError, match="enough"):
        next(served.stream("/t.S/Ended")(iter([b"x"]), timeout=WAIT_S))


# ---- What goes along with messages ----


def test_a_handler_sees_who_calls_and_what_came_along(serve: Serve) -> None:
    """Method, metadata (text and binary), peer and live count are there."""
    seen: list[tuple[str, Metadata, str, int]] = []

    def look(call: Call, request: bytes) -> None:
        seen.append((call.method, call.metadata, call.peer, served.front.live))
        call.reply(b"")

    served = serve({"/t.S/Look": unary(look)})
    served.unary("/t.S/Look")(b"", metadata=(("who", "me"), ("raw-bin", b"\x00\xff")), timeout=WAIT_S)
    [(method, metadata, peer, live)] = seen
    assert method == "/t.S/Look"
    assert {("who", "me"), ("raw-bin", b"\x00\xff")} <= set(metadata)
    assert peer.startswith("ipv4:127.0.0.1:")
    assert live == 1


def test_a_handler_sees_the_deadline_on_the_monotonic_clock(serve: Serve) -> None:
    """A caller's time limit becomes a moment; no limit becomes None."""
    seen: list[float | None] = []

    def look(call: Call, request: bytes) -> None:
        seen.append(call.deadline)
        call.reply(b"")

    call = serve({"/t.S/Look": unary(look)}).unary("/t.S/Look")
    before = time.monotonic()
    call(b"", timeout=100)
    call(b"")
    limited, unlimited = seen
    assert limited is not None
    assert before + 95 < limited < time.monotonic() + 105  # the wire carries three digits
    assert unlimited is None


TRAILING: Metadata = (("note", "well done"), ("state-bin", b"\x00\x01\xfe"))


def test_trailing_metadata_reaches_the_caller(serve: Serve) -> None:
    """Text and binary, after an answer, after a stream and with a failure."""

    def end(call: Call, request: bytes) -> None:
        call.finish(TRAILING)

    served = serve(
        {
            "/t.S/Reply": unary(lambda call, request: call.reply(b"", TRAILING)),
            "/t.S/Finish": server_stream(end),
            "/t.S/Fail": unary(lambda call, request: call.fail(grpc.StatusCode.NOT_FOUND, "no", TRAILING)),
        }
    )
    _, ended = served.unary("/t.S/Reply").with_call(b"", timeout=WAIT_S)
    assert set(TRAILING) <= set(ended.trailing_metadata())
    answers = served.server_stream("/t.S/Finish")(b"", timeout=WAIT_S)
    assert list(answers) == []
    assert set(TRAILING) <= set(answers.trailing_metadata())
    with pytest.raises(grpc.RpcError) as failure:
        served.unary("/t.S/Fail")(b"", timeout=WAIT_S)
    assert set(TRAILING) <= set(failure.value.trailing_metadata())


def test_a_failure_keeps_its_status_and_words(serve: Serve) -> None:
    """Any status, any alphabet; a text too long for a header is cut, not lost."""
    words = iter(["größer als 3 → nein 🙂", "ä" * 100_000])
    served = serve({"/t.S/Fail": unary(lambda call, request: call.fail(grpc.StatusCode.FAILED_PRECONDITION, next(words)))})
    with pytest.raises(grpc.RpcError) as short:
        served.unary("/t.S/Fail")(b"", timeout=WAIT_S)
    assert (short.value.code(), short.value.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "größer als 3 → nein 🙂")
    with pytest.raises(grpc.RpcError) as long:
        served.unary("/t.S/Fail")(b"", timeout=WAIT_S)
    assert long.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert long.value.details().startswith("äää")


def test_a_stream_that_fails_delivers_what_was_said_before(serve: Serve) -> None:
    """Replies given before `fail` arrive before the status."""

    def count(call: Call, request: bytes) -> None:
        for i in range(100):
            call.reply(b"%d" % i)
        call.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, "no more")

    answers = serve({"/t.S/Count": server_stream(count)}).server_stream("/t.S/Count")(b"", timeout=WAIT_S)
    assert [next(answers) for _ in range(100)] == [b"%d" % i for i in range(100)]
    with pytest.raises(grpc.RpcError, match="no more"):
        next(answers)


@pytest.mark.parametrize("trailing", [(("Upper", "x"),), (("text", b"bytes"),), (("raw-bin", "text"),), (("text", "new\nline"),)])
def test_metadata_that_grpc_cannot_carry_fails_one_call_only(serve: Serve, caplog: pytest.LogCaptureFixture, trailing: Any) -> None:
    """The caller gets INTERNAL instead of silence, the log says what was wrong, and the server lives on."""
    served = serve({"/t.S/Bad": unary(lambda call, request: call.reply(b"", trailing)), "/t.S/Echo": unary(echo)})
    with pytest.raises(grpc.RpcError) as failure:
        served.unary("/t.S/Bad")(b"", timeout=WAIT_S)
    assert failure.value.code() is grpc.StatusCode.INTERNAL
    assert "/t.S/Bad: metadata" in caplog.text
    assert served.unary("/t.S/Echo")(b"x", timeout=WAIT_S) == b"x"


# ---- Faults of handlers and callers ----


def boom(*_: object) -> Any:
    raise RuntimeError("secret of the house")


def quit_(*_: object) -> Any:
    raise SystemExit(3)


class Fragile(Echo):
    def on_message(self, message: bytes) -> None:
        boom()


class FragileEnd(Echo):
    def on_end(self) -> None:
        boom()


@pytest.mark.parametrize(
    "method",
    [unary(boom), unary(quit_), server_stream(boom), stream(boom), stream(Fragile), stream(FragileEnd)],
    ids=["unary", "exit", "server_stream", "stream", "on_message", "on_end"],
)
def test_a_handler_that_raises_fails_its_call_and_no_other(serve: Serve, caplog: pytest.LogCaptureFixture, method: Method) -> None:
    """The caller gets INTERNAL without the server's secrets, the log gets the reason once, and the server lives on."""
    served = serve({"/t.S/Boom": method, "/t.S/Echo": unary(echo)})
    with pytest.raises(grpc.RpcError) as failure:
        list(served.stream("/t.S/Boom")(iter([b"x"]), timeout=WAIT_S))
    assert failure.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in failure.value.details()
    assert [record.levelno for record in caplog.records if "/t.S/Boom" in record.getMessage()] == [logging.ERROR]
    assert served.unary("/t.S/Echo")(b"x", timeout=WAIT_S) == b"x"


def test_a_call_that_cannot_be_ended_that_way_says_so_to_its_handler(serve: Serve) -> None:
    """`finish` on a unary call, trailing metadata on a stream's reply, a reply of text and failing with OK raise in the handler."""
    raised: list[type[BaseException]] = []

    def wrong(call: Call, request: bytes) -> None:
        for mistake in (call.finish, lambda: call.fail(grpc.StatusCode.OK, "")):
            try:
                mistake()
            except (TypeError, ValueError) as error:
                raised.append(type(error))
        call.reply(b"")

    text: Any = "text"
    served = serve(
        {
            "/t.S/Wrong": unary(wrong),
            "/t.S/Trailing": server_stream(lambda call, request: call.reply(b"", TRAILING)),
            "/t.S/Text": unary(lambda call, request: call.reply(text)),
            "/t.S/Texts": server_stream(lambda call, request: call.reply(text)),
        }
    )
    served.unary("/t.S/Wrong")(b"", timeout=WAIT_S)
    assert raised == [TypeError, ValueError]
    for method in ("/t.S/Trailing", "/t.S/Text", "/t.S/Texts"):
        with pytest.raises(grpc.RpcError) as failure:
            list(served.server_stream(method)(b"", timeout=WAIT_S))
        assert failure.value.code() is grpc.StatusCode.INTERNAL


def test_an_unknown_method_is_named_with_what_there_is(serve: Serve) -> None:
    """UNIMPLEMENTED tells a caller with a typing error what it could have meant."""
    served = serve({"/t.S/Echo": unary(echo), "/t.S/Count": unary(echo), "/u.V/Other": unary(echo)})
    with pytest.raises(grpc.RpcError) as failure:
        served.unary("/t.S/Ecko")(b"", timeout=WAIT_S)
    assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert failure.value.details() == "no method /t.S/Ecko; t.S has Count, Echo"
    with pytest.raises(grpc.RpcError, match=r"this server has the services t\.S, u\.V"):
        list(served.stream("/x.Y/Z")(iter([b"1", b"2"]), timeout=WAIT_S))
    assert served.unary("/t.S/Echo")(b"x", timeout=WAIT_S) == b"x"


def test_a_message_over_the_limit_is_refused_and_the_server_lives_on(serve: Serve) -> None:
    """RESOURCE_EXHAUSTED with both sizes, the handler never sees it, and the same connection goes on."""
    seen: list[int] = []

    def note(call: Call, request: bytes) -> None:
        seen.append(len(request))
        call.reply(b"")

    call = serve({"/t.S/Note": unary(note)}, max_receive_bytes=1000).unary("/t.S/Note")
    for _ in range(10):
        with pytest.raises(grpc.RpcError, match=r"1001 vs\. 1000") as failure:
            call(b"x" * 1001, timeout=WAIT_S)
        assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert call(b"x" * 1000, timeout=WAIT_S) == b""
    assert set(seen) == {1000}


def test_a_message_over_the_limit_ends_a_stream(serve: Serve) -> None:
    """The caller gets RESOURCE_EXHAUSTED; the handler is told that the call is gone, not that the messages have ended."""
    ends, gone = [], Latch()

    class Watch(Echo):
        def __init__(self, call: Call) -> None:
            super().__init__(call)
            call.on_gone(gone.down)

        def on_end(self) -> None:
            ends.append(self.call.method)

    hold = threading.Event()
    served = serve({"/t.S/Watch": stream(Watch)}, max_receive_bytes=1000)
    answered = threading.Event()

    def messages() -> Iterator[bytes]:
        yield b"small"
        answered.wait(WAIT_S)
        yield b"x" * 1001
        hold.wait(WAIT_S)

    answers = served.stream("/t.S/Watch")(messages(), timeout=WAIT_S)
    assert next(answers) == b"small"
    answered.set()
    with pytest.raises(grpc.RpcError) as failure:
        next(answers)
    hold.set()
    assert failure.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert gone.wait()
    assert not ends


def test_a_unary_method_called_without_a_message_is_refused(serve: Serve) -> None:
    """A caller that closes before it has said anything gets a status, and no handler runs."""
    served = serve({"/t.S/Echo": unary(echo)})
    with pytest.raises(grpc.RpcError) as failure:
        served.channel.stream_unary("/t.S/Echo")(iter(()), timeout=WAIT_S)
    assert failure.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "without the one message" in failure.value.details()


# ---- Callers that leave ----


class Watched:
    """A method of each kind that never ends its calls, and latches for what becomes of them."""

    def __init__(self, n: int = 1) -> None:
        self.begun, self.gone, self.freed = Latch(n), Latch(n), Latch(n)
        self.ends = 0
        self.calls: list[weakref.ref[Call]] = []
        self.methods = {"/t.S/Unary": unary(self.start), "/t.S/Server": server_stream(self.start), "/t.S/Stream": stream(self.receive)}

    def start(self, call: Call, request: bytes) -> None:
        call.on_gone(self.gone.down)
        weakref.finalize(call, self.freed.down)
        self.calls.append(weakref.ref(call))
        self.begun.down()

    def receive(self, call: Call) -> Receiver:
        watched = self

        class Open(Echo):
            def on_message(self, message: bytes) -> None:
                watched.begun.down()

            def on_end(self) -> None:
                watched.ends += 1

        call.on_gone(self.gone.down)
        weakref.finalize(call, self.freed.down)
        self.calls.append(weakref.ref(call))
        return Open(call)


def begin(channel: grpc.Channel, method: str, hold: threading.Event, timeout: float | None = None) -> Any:
    """One call of a `Watched` method, of which no answer will come."""
    match method:
        case "/t.S/Unary":
            return channel.unary_unary(method).future(b"x", timeout=timeout)
        case "/t.S/Server":
            return channel.unary_stream(method)(b"x", timeout=timeout)
        case _:
            return channel.stream_stream(method)(feed([b"x"], hold), timeout=timeout)


KINDS = ["/t.S/Unary", "/t.S/Server", "/t.S/Stream"]


@pytest.mark.parametrize("method", KINDS)
def test_a_caller_that_cancels_is_reported_and_its_call_forgotten(serve: Serve, method: str) -> None:
    """`on_gone` is called, a late answer is dropped, nothing of the call stays, and a cancelled stream was never an ended one."""
    watched, hold = Watched(), threading.Event()
    served = serve(watched.methods)
    pending = begin(served.channel, method, hold)
    assert watched.begun.wait()
    call = watched.calls[0]()
    assert call is not None
    assert served.front.live == 1
    pending.cancel()
    assert watched.gone.wait()
    call.fail(grpc.StatusCode.ABORTED, "too late")
    call.reply(b"too late")
    late: list[int] = []
    call.on_gone(lambda: late.append(1))
    assert late == [1]
    del call
    assert watched.freed.wait()
    assert served.front.live == 0
    assert watched.ends == 0
    hold.set()


@pytest.mark.parametrize("method", KINDS)
def test_a_deadline_that_passes_is_reported(serve: Serve, method: str) -> None:
    """The caller gets DEADLINE_EXCEEDED and the handler `on_gone`."""
    watched, hold = Watched(), threading.Event()
    served = serve(watched.methods)
    pending = begin(served.channel, method, hold, timeout=0.5)
    assert watched.gone.wait()
    assert pending.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert watched.freed.wait()
    hold.set()


def test_a_good_end_is_not_reported_as_gone(serve: Serve) -> None:
    """`on_gone` keeps silent after reply, finish and fail, even if the caller hangs up right after."""
    gone: list[str] = []
    freed = Latch(300)

    def end(call: Call, request: bytes) -> None:
        call.on_gone(lambda: gone.append("before"))
        weakref.finalize(call, freed.down)
        if request == b"fail":
            call.fail(grpc.StatusCode.ABORTED, "")
        else:
            call.reply(b"")
        call.on_gone(lambda: gone.append("after"))

    def finish(call: Call, request: bytes) -> None:
        call.on_gone(lambda: gone.append("before"))
        weakref.finalize(call, freed.down)
        call.finish()

    served = serve({"/t.S/End": unary(end), "/t.S/Finish": server_stream(finish)})
    for _ in range(100):
        channel = served.connect()
        channel.unary_unary("/t.S/End")(b"reply", timeout=WAIT_S)
        with pytest.raises(grpc.RpcError):
            channel.unary_unary("/t.S/End")(b"fail", timeout=WAIT_S)
        list(channel.unary_stream("/t.S/Finish")(b"", timeout=WAIT_S))
        channel.close()
    assert freed.wait()
    assert gone == []


def test_a_storm_of_cancelled_calls_leaves_nothing_behind(serve: Serve, engine: ThreadPoolExecutor) -> None:
    """500 calls of every kind, answered and cancelled at random at the same time: all are freed and the server lives on."""
    alive, dice = Alive(), random.Random(1)

    class Chatty(Echo):
        def on_message(self, message: bytes) -> None:
            engine.submit(self.call.reply, message)

    def open_stream(call: Call) -> Receiver:
        alive.watch(call)
        return Chatty(call)

    def answer(call: Call, request: bytes) -> None:
        alive.watch(call)
        engine.submit(call.reply, request)

    def talk(call: Call, request: bytes) -> None:
        alive.watch(call)
        engine.submit(lambda: [call.reply(request) for _ in range(20)] and call.finish())

    served = serve({"/t.S/Unary": unary(answer), "/t.S/Server": server_stream(talk), "/t.S/Stream": stream(open_stream)})
    hold, pending = threading.Event(), []
    for _ in range(500):
        pending.append(begin(served.channel, dice.choice(KINDS), hold))
        if dice.random() < 0.5:
            pending.pop(dice.randrange(len(pending))).cancel()
    for call in pending:
        call.cancel()
    hold.set()
    assert served.unary("/t.S/Unary")(b"x", timeout=WAIT_S) == b"x"
    assert alive.none()


def test_connections_cut_in_the_middle_leave_nothing_behind(serve: Serve) -> None:
    """Fifty clients close their connections with calls of every kind open: every handler is told and every call freed."""
    watched, hold = Watched(150), threading.Event()
    served = serve(watched.methods)
    channels = [served.connect() for _ in range(50)]
    pending = [begin(channel, method, hold) for channel in channels for method in KINDS]
    assert watched.begun.wait()
    for channel in channels:
        channel.close()
    hold.set()
    assert watched.gone.wait()
    del pending
    assert watched.freed.wait()
    assert served.front.live == 0
    assert watched.ends == 0


def test_a_callback_that_raises_does_not_hurt_the_next(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Every callback of `on_gone` is called, and the server lives on."""
    begun, gone = Latch(), Latch()

    def start(call: Call, request: bytes) -> None:
        call.on_gone(boom)
        call.on_gone(gone.down)
        begun.down()

    served = serve({"/t.S/Start": unary(start), "/t.S/Echo": unary(echo)})
    pending = served.unary("/t.S/Start").future(b"")
    assert begun.wait()
    pending.cancel()
    assert gone.wait()
    assert "secret of the house" in caplog.text
    assert served.unary("/t.S/Echo")(b"x", timeout=WAIT_S) == b"x"


# ---- Readers that are slow ----


@pytest.mark.parametrize("limits", [{"backlog_messages": 8}, {"backlog_bytes": 8 * 16_000}], ids=["messages", "bytes"])
def test_a_slow_reader_is_asked_no_more(serve: Serve, limits: dict[str, int]) -> None:
    """While a caller does not read its replies its stream is not read either, so no more than the limit waits; later all arrive."""
    n, most, stuck = 2_000, [0], Latch()

    class Measured(Echo):
        def on_message(self, message: bytes) -> None:
            self.call.reply(message)
            most[0] = max(most[0], self.call.waiting)
            if self.call.waiting > 8:
                stuck.down()

    served = serve({"/t.S/Echo": stream(Measured)}, **limits)
    answers = served.stream("/t.S/Echo")((b"%d" % i + b"." * 16_000 for i in range(n)), timeout=WAIT_S)
    assert stuck.wait()  # nothing has been read so far
    assert [int(answer.partition(b".")[0]) for answer in answers] == list(range(n))
    assert most[0] <= 10  # the limit, the one that went over it and the one that gRPC has in hand


@pytest.mark.parametrize("limits", [{}, {"unread_bytes": 1 << 20}], ids=["as it is", "little unread"])
def test_large_answers_to_many_calls_at_once_all_arrive(serve: Serve, limits: dict[str, int]) -> None:
    """Far more than a connection may leave unread, asked for by a caller that reads: it loses none, and nothing stalls until somebody
    happens to ask whether anyone is there."""
    answer = random.Random(3).randbytes(400_000)
    served = serve({"/t.S/Big": unary(lambda call, request: call.reply(request + answer))}, keepalive_s=10 * WAIT_S, **limits)
    big = served.channel.unary_unary("/t.S/Big")
    calls = [big.future(b"%3d" % i, timeout=WAIT_S) for i in range(250)]
    for i, call in enumerate(calls):
        assert call.result() == b"%3d" % i + answer


def test_a_handler_sees_how_much_is_waiting_and_may_stop(serve: Serve) -> None:
    """A producer that looks at `waiting` stays bounded too, and a caller that leaves frees all of it."""
    freed, filled = Latch(), Latch()

    def produce(call: Call, request: bytes) -> None:
        weakref.finalize(call, freed.down)
        while call.waiting < 50:
            call.reply(b"." * 16_000)
        filled.down()

    served = serve({"/t.S/Produce": server_stream(produce)})
    answers = served.server_stream("/t.S/Produce")(b"")
    assert filled.wait()
    answers.cancel()
    assert freed.wait()


# ---- The life of a front ----


def test_draining_lets_running_calls_finish_and_refuses_new_ones(serve: Serve) -> None:
    """After `drain` new calls are refused on old and on new connections; what runs is answered; then `stop` returns."""
    begun, calls = Latch(2), []

    def hold(call: Call, request: bytes) -> None:
        calls.append(call)
        begun.down()

    served = serve({"/t.S/Hold": unary(hold), "/t.S/Stream": stream(Echo), "/t.S/Server": server_stream(hold)})
    unary_answer = served.unary("/t.S/Hold").future(b"")
    stream_answer = served.server_stream("/t.S/Server")(b"")
    assert begun.wait()
    served.front.drain()
    with pytest.raises(grpc.RpcError) as failure:  # CANCELLED if it crosses the news on the wire
        served.unary("/t.S/Hold")(b"", timeout=WAIT_S)
    assert failure.value.code() in GONE
    with served.connect() as channel, pytest.raises(grpc.RpcError) as failure:
        channel.unary_unary("/t.S/Hold")(b"", timeout=WAIT_S)
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    assert served.front.live == 2
    for call in calls:
        call.reply(b"done")
        if call.method == "/t.S/Server":
            call.finish()
    assert unary_answer.result(WAIT_S) == b"done"
    assert list(stream_answer) == [b"done"]
    served.front.stop(WAIT_S)


def test_stopping_waits_for_running_calls(serve: Serve, engine: ThreadPoolExecutor) -> None:
    """A call answered within the grace is answered, though `stop` was called before."""
    begun, calls = Latch(), []

    def hold(call: Call, request: bytes) -> None:
        calls.append(call)
        begun.down()

    served = serve({"/t.S/Hold": unary(hold)})
    answer = served.unary("/t.S/Hold").future(b"")
    assert begun.wait()
    stopped = engine.submit(served.front.stop, WAIT_S)
    calls[0].reply(b"done")
    assert answer.result(WAIT_S) == b"done"
    stopped.result(WAIT_S)


@pytest.mark.parametrize("method", KINDS)
def test_stopping_cancels_what_outlives_the_grace(serve: Serve, method: str) -> None:
    """Handlers are told, callers get a status, and an answer that comes after all that is dropped and harms nobody."""
    watched, hold = Watched(), threading.Event()
    served = serve(watched.methods)
    pending = begin(served.channel, method, hold)
    assert watched.begun.wait()
    call = watched.calls[0]()
    assert call is not None
    served.front.stop(0)
    assert watched.gone.wait()
    assert served.front.live == 0
    assert pending.code() in GONE
    call.reply(b"")
    call.fail(grpc.StatusCode.ABORTED, "")
    assert call.peer.startswith("ipv4:127.0.0.1:")
    hold.set()


def test_a_storm_of_calls_across_a_drain_ends_well(serve: Serve) -> None:
    """Calls that meet a draining server are answered or refused as retryable; none hangs."""
    served = serve({"/t.S/Echo": unary(echo)})
    call, begun = served.unary("/t.S/Echo"), Latch(200)
    answers = []
    for i in range(1_000):
        answers.append(call.future(b"x", timeout=WAIT_S))
        answers[-1].add_done_callback(lambda _: begun.down())
        if i == 500:
            assert begun.wait()
            served.front.drain()
    codes = {answer.code() for answer in answers}
    assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


def test_stopping_in_the_middle_of_answers_harms_nobody(serve: Serve, engine: ThreadPoolExecutor) -> None:
    """While four threads answer unary calls and streams the front stops without grace: every caller gets some end."""
    begun = Latch(300)

    class Chatty(Echo):
        def on_message(self, message: bytes) -> None:
            engine.submit(lambda: [self.call.reply(message) for _ in range(20)])

    def answer(call: Call, request: bytes) -> None:
        begun.down()
        engine.submit(call.reply, request)

    served = serve({"/t.S/Unary": unary(answer), "/t.S/Stream": stream(Chatty)})
    hold, pending = threading.Event(), []
    for i in range(1_000):
        pending.append(begin(served.channel, "/t.S/Stream" if i % 10 == 0 else "/t.S/Unary", hold, timeout=WAIT_S))
        if i == 500:
            assert begun.wait()
            stopped = engine.submit(served.front.stop, 0)
    stopped.result(WAIT_S)
    hold.set()
    for call in pending[::10]:  # a stream's status comes only to those who read what came before
        with contextlib.suppress(grpc.RpcError):
            list(call)
    assert {call.code() for call in pending} <= {grpc.StatusCode.OK, *GONE}


def test_a_stopped_front_gives_its_port_back(kind: type[Front]) -> None:
    """Stopped twice, or never started: in each case another server can take the port."""
    port = 0
    for start in (True, False, True):
        front = kind({"/t.S/Echo": unary(echo)})
        assert port in (0, front.listen(f"127.0.0.1:{port}"))
        port = port or front.listen("127.0.0.1:0")
        if start:
            front.start()
        front.stop(WAIT_S)
        front.stop(WAIT_S)


@pytest.mark.parametrize("which", ["direct", "public"])
def test_a_process_that_forgets_to_stop_its_front_still_ends(which: str) -> None:
    """Leaving without `stop`, with a call open, ends the process with its own exit status."""
    program = f"""
import grpc, threading
from server.rpc.front import choose_front, unary
begun = threading.Event()
front = choose_front("{which}")({{"/t.S/Hold": unary(lambda call, request: begun.set())}})
port = front.listen("127.0.0.1:0")
front.start()
pending = grpc.insecure_channel(f"127.0.0.1:{{port}}").unary_unary("/t.S/Hold").future(b"")
assert begun.wait({WAIT_S})
raise SystemExit(7)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=WAIT_S, check=False).returncode == 7


def test_a_taken_port_is_an_error(serve: Serve, kind: type[Front]) -> None:
    """A second server on the port is refused with the address, instead of sharing the calls."""
    served = serve({"/t.S/Echo": unary(echo)})
    second = kind({})
    with pytest.raises(OSError, match=served.address):
        second.listen(served.address)
    second.stop(0)


def test_a_front_starts_once(serve: Serve) -> None:
    """A second `start` is refused and the first goes on."""
    served = serve({"/t.S/Echo": unary(echo)})
    with pytest.raises(RuntimeError, match="started before"):
        served.front.start()
    assert served.unary("/t.S/Echo")(b"x", timeout=WAIT_S) == b"x"


def test_one_front_listens_on_several_addresses(kind: type[Front]) -> None:
    """Calls of both ports reach the same handlers."""
    front = kind({"/t.S/Echo": unary(echo)})
    ports = [front.listen("127.0.0.1:0"), front.listen("127.0.0.1:0")]
    front.start()
    for port in ports:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert channel.unary_unary("/t.S/Echo")(b"x", timeout=WAIT_S) == b"x"
    front.stop(WAIT_S)


def test_tls(kind: type[Front], tmp_path: Path) -> None:
    """With credentials the port speaks TLS, and only to callers that trust its certificate."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run([*made.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    front = kind({"/t.S/Echo": unary(echo)})
    port = front.listen("127.0.0.1:0", Tls(certificate, key))
    front.start()
    options = [CUT, ("grpc.ssl_target_name_override", "localhost")]
    trusting = grpc.ssl_channel_credentials(certificate.read_bytes())
    with grpc.secure_channel(f"127.0.0.1:{port}", trusting, options=options) as channel:
        assert channel.unary_unary("/t.S/Echo")(b"x", timeout=WAIT_S) == b"x"
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel, pytest.raises(grpc.RpcError) as failure:
        channel.unary_unary("/t.S/Echo")(b"x", timeout=WAIT_S)
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    front.stop(WAIT_S)


# ---- Which front ----


def test_the_direct_front_is_the_default() -> None:
    """And a name that is none is refused with those that there are."""
    assert choose_front() is choose_front("direct") is DirectFront
    assert choose_front("public") is PublicFront
    assert choose_front(processes=2) is RelayFront
    with pytest.raises(ValueError, match="auto, direct and public"):
        choose_front("aio")


class Awake:
    """Work besides, of which there is always enough and never any: it notes whether the front's thread is about."""

    def __init__(self) -> None:
        self.attending = False
        self.enough = True

    def attend(self) -> None:
        self.attending = True

    def brief(self) -> bool:
        self.attending = False
        return False


def test_whatever_a_front_takes_it_takes_attending() -> None:
    """Also what it takes after it has looked up from the wire in between, for the work that it had brought."""
    besides = Awake()
    seen: list[bool] = []

    def handle(call: Call, request: bytes) -> None:
        seen.append(besides.attending)
        call.reply(request)

    front = DirectFront({"/t/Ask": unary(handle)}, besides=besides)
    port = front.listen("127.0.0.1:0")
    front.start()
    try:
        with contextlib.ExitStack() as stack:
            channels = [stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}", options=[CUT])) for _ in range(16)]
            asks = [channel.unary_unary("/t/Ask") for channel in channels]
            for _ in range(20):
                for call in [ask.future(b"x") for ask in asks]:
                    assert call.result(timeout=WAIT_S) == b"x"
    finally:
        front.stop(0)
    assert len(seen) == 320
    assert all(seen)
