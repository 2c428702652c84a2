"""Sessions of the client, blocking and asyncio, against real servers: pieces make the whole, whatever is lost on the way."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import random
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save

import seqserve
from contract import bundle as contract
from contract.bundle import Bundle, Graph, State, Tensor
from protos import sessions_pb2 as pb
from seqserve import turns
from server.graph import OnnxGraph
from tests import fakes, models
from tests.fakes import Fake, failure
from tests.process import ROOT, Served, serve

LARGEST = 20_000  # bytes of a message that the server takes


def adder(directory: Path) -> None:
    """A forecaster of two channels: the sum of all observations goes on, with quantiles one below and one above."""
    directory.mkdir(parents=True)
    f = TensorProto.FLOAT
    value = helper.make_tensor_value_info
    nodes = [
        helper.make_node("ReduceSum", ["values", "one"], ["sum"], keepdims=0),
        helper.make_node("Add", ["total", "sum"], ["total_next"]),
        helper.make_node("Unsqueeze", ["total_next", "one"], ["mean"]),
        helper.make_node("Unsqueeze", ["mean", "three"], ["wide"]),
        helper.make_node("Add", ["wide", "around"], ["quantiles"]),
    ]
    initial = [numpy_helper.from_array(np.array([n], np.int64), name) for name, n in (("one", 1), ("three", 3))]
    initial.append(numpy_helper.from_array(np.array([-1, 0, 1], np.float32), "around"))
    inputs = [value("values", f, ["b", "t", 2]), value("total", f, ["b", 2])]
    outputs = [value("mean", f, ["b", 1, 2]), value("quantiles", f, ["b", 1, 2, 3]), value("total_next", f, ["b", 2])]
    graph = helper.make_graph(nodes, "step", inputs, outputs, initial)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), directory / "step.onnx")
    step = Graph(
        "step.onnx", (Tensor("values", "float32", ("batch", "time", 2)),),
        (Tensor("mean", "float32", ("batch", 1, 2)), Tensor("quantiles", "float32", ("batch", 1, 2, 3))),
        (State("total", "total_next", "float32", ("batch", 2)),),
    )  # fmt: skip
    task = {"kind": "forecast", "channels": ["up", "down"], "horizon": 1, "lookback": 96, "quantiles": [0.1, 0.5, 0.9]}
    contract.save(Bundle("adder", {"step": step}, "step", task), directory)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models, and the shipped classifier."""
    root = tmp_path_factory.mktemp("models")
    models.library(root)
    adder(root / "adder" / "1")
    (root / "sentiment").symlink_to(ROOT / "models" / "sentiment")
    return root


@pytest.fixture(scope="module")
def served(library: Path) -> Iterator[Served]:
    with serve(library, "--chunk", "5", "--max-message-bytes", str(LARGEST)) as server:
        yield server


@pytest.fixture(scope="module")
def whole(library: Path) -> Any:
    """The scores of all steps of a sequence, run whole and alone."""
    bundle = contract.load(library / "reader" / "1")
    onnx = OnnxGraph(bundle.graph, library / "reader" / "1" / "step.onnx")
    return lambda tokens: onnx.run({"tokens": tokens[None], **{s.input: s.fresh(1) for s in bundle.graph.states}})[0].tobytes()


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fakes.serving() as fake:
        yield fake


# Both twins under one test


class Awaited:
    """An asyncio client or session as if it were the blocking one: every call is awaited, on one loop."""

    def __init__(self, runner: asyncio.Runner, inner: Any) -> None:
        self._runner, self._inner = runner, inner

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._inner, name)
        return (lambda *args, **kwargs: self._done(member(*args, **kwargs))) if callable(member) else member

    def __enter__(self) -> Any:
        self._runner.run(self._inner.__aenter__())
        return self

    def __exit__(self, *error: Any) -> None:
        self._runner.run(self._inner.__aexit__(*error))

    def _done(self, made: Any) -> Any:
        if inspect.iscoroutine(made):
            return self._done(self._runner.run(made))
        if inspect.isasyncgen(made):
            return self._each(made)
        return Awaited(self._runner, made) if isinstance(made, seqserve.AsyncSession) else made

    def _each(self, made: Any) -> Iterator[Any]:
        async def following() -> Any:
            return await anext(made)

        try:
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    yield self._runner.run(following())
        finally:
            self._runner.run(made.aclose())


class Clients:
    """Makes clients of one kind, and closes them in the end."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._stack = contextlib.ExitStack()
        self._runner = self._stack.enter_context(asyncio.Runner()) if kind == "asyncio" else None

    def __call__(self, port: int, **options: Any) -> Any:
        options.setdefault("timeout", 30)
        target = f"127.0.0.1:{port}"
        if self._runner is None:
            return self._stack.enter_context(seqserve.Client(target, **options))
        return self._stack.enter_context(Awaited(self._runner, seqserve.AsyncClient(target, **options)))

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(params=["blocking", "asyncio"])
def connect(request: pytest.FixtureRequest) -> Iterator[Clients]:
    clients = Clients(request.param)
    yield clients
    clients.close()


def tokens(rng: random.Random, count: int) -> Any:
    return np.array([rng.randrange(models.VOCABULARY) for _ in range(count)], np.int64)


def cut(rng: random.Random, values: Any, longest: int = 9) -> list[Any]:
    """A sequence in pieces, anywhere."""
    pieces, at = [], 0
    while at < len(values):
        size = rng.randint(1, longest)
        pieces.append(values[at : at + size])
        at += size
    return pieces


def step(piece: Any) -> dict[str, Any]:
    return {"tokens": np.asarray(piece, np.int64).reshape(1, -1)}


def scores(answers: Any) -> bytes:
    return b"".join(answer["scores"].tobytes() for answer in answers)


# Pieces make the whole


def test_pieces_make_the_whole(served: Served, connect: Clients, whole: Any) -> None:
    """Tensors sent turn by turn, and sent ahead in windows of any size, are answered as the uncut sequence, bit for bit."""
    client, rng = connect(served.port), random.Random(3)
    read = tokens(rng, 150)
    pieces = [step(piece) for piece in cut(rng, read)]
    with client.session("reader") as s:
        assert scores(s.send(piece) for piece in pieces) == whole(read)
        assert (s.turn, s.unanswered, s.model, s.version) == (len(pieces), 0, "reader", "1")
    for window in (1, 3, 32, 1024):
        with client.session("reader") as s:
            assert scores(s.send_all(iter(pieces), window=window)) == whole(read)
            assert s.turn == s.info().turn == len(pieces)


def test_text_in_pieces(served: Served, connect: Clients) -> None:
    """A review cut anywhere is labelled as the review so far, after every piece."""
    client, rng = connect(served.port), random.Random(5)
    review = "I didn't expect much.<br /><br />But what a film! The actors are superb; it's  better... 10/10, don't miss it"
    pieces = cut(rng, review, 20)
    wanted = [c.scores for c in client.classify(["".join(pieces[: n + 1]) for n in range(len(pieces))], "sentiment")]
    with client.session("sentiment") as s:
        assert [answer.scores for answer in s.send_all(pieces)] == wanted
    with client.session("sentiment") as s:
        answers = [s.send(piece) for piece in pieces]
    assert [answer.scores for answer in answers] == wanted
    assert (answers[-1].model, answers[-1].version) == ("sentiment", "1")
    assert all(answer.timing.rounds >= 1 and answer.timing.run > 0 for answer in answers)


def test_observations(served: Served, connect: Clients) -> None:
    """A forecaster takes one observation, a number per channel, or steps by channels; the forecast is that of all so far."""
    client = connect(served.port)
    with client.session("adder") as s:
        for sent, total in (([1, 2], [1, 2]), (np.array([[1, 0], [0, 1]]), [2, 3]), ((3, 4), [5, 7])):
            answer = s.send(sent)
            assert answer.mean.tolist() == [total]
            assert answer.quantiles[0.9].tolist() == [[total[0] + 1, total[1] + 1]]
        assert (answer.channels, answer.model, answer.version) == (("up", "down"), "adder", "1")
        with s.fork() as rise, s.fork() as fall:
            assert rise.send([10, 0]).mean.tolist() == [[15, 7]]
            assert fall.send([-10, 0]).mean.tolist() == [[-5, 7]]
        assert [a.mean.tolist() for a in s.send_all(np.ones((3, 2)))] == [[[6, 8]], [[7, 9]], [[8, 10]]]


def test_a_fork_goes_its_own_way(served: Served, connect: Clients, whole: Any) -> None:
    """A fork goes on from the same turn; what either reads then, the other does not see."""
    client = connect(served.port)
    with client.session("reader", id="trunk") as s:
        first = s.send(step([1, 2, 3]))
        with s.fork("branch") as b:
            assert (b.id, b.turn) == ("branch", 1)
            there = b.send(step([7, 7]))
        here = s.send(step([4]))
    assert scores([first, here]) == whole(np.array([1, 2, 3, 4]))
    assert scores([first, there]) == whole(np.array([1, 2, 3, 7, 7]))


# What is lost on the way


class Relay(grpc.GenericRpcHandler):
    """Stands before a server and passes calls on; loses replies, which the server has given, or holds them back."""

    def __init__(self, port: int) -> None:
        self.calls: list[tuple[str, bytes]] = []
        self.lose: list[str] = []  # methods whose next reply never arrives
        self.hold: set[str] = set()  # methods whose replies wait until `let_go`
        self.let_go = threading.Event()
        self._behind = grpc.insecure_channel(f"127.0.0.1:{port}")
        self._server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.so_reuseport", 0)])
        self._server.add_generic_rpc_handlers((self,))
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    def service(self, call: grpc.HandlerCallDetails) -> Any:
        name = call.method.rpartition("/")[2]

        def pass_on(request: bytes, context: grpc.ServicerContext) -> bytes:
            self.calls.append((name, request))
            try:
                reply: bytes = self._behind.unary_unary(call.method, bytes, bytes)(request, timeout=60)
            except grpc.RpcError as e:
                trailing: Any = e.trailing_metadata()
                context.set_trailing_metadata(trailing or ())
                context.abort(e.code(), e.details() or "")
            if name in self.hold:
                assert self.let_go.wait(60)
            if name in self.lose:
                self.lose.remove(name)
                context.abort(grpc.StatusCode.UNAVAILABLE, "the reply was lost")
            return reply

        return grpc.unary_unary_rpc_method_handler(pass_on)

    def __enter__(self) -> Relay:
        self._server.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.let_go.set()
        self._server.stop(None).wait()
        self._behind.close()


@pytest.fixture
def relay(served: Served) -> Iterator[Relay]:
    with Relay(served.port) as relay:
        yield relay


def test_a_lost_reply_advances_nothing(relay: Relay, connect: Clients, whole: Any) -> None:
    """Whichever reply is lost after the server did its part, the call is made again and nothing is done twice."""
    client = connect(relay.port)
    before = len(client.sessions())
    relay.lose = ["Open", "Turn", "Turn", "Fork", "Close"]
    with client.session("reader") as s:
        read = [s.send(step([1, 2])), s.send(step([3]))]
        assert s.info().turn == 2
        fork = s.fork()
        read.append(fork.send(step([4])))
        assert len(client.sessions()) == before + 2
    fork.close()
    assert scores(read) == whole(np.array([1, 2, 3, 4]))
    assert relay.lose == []
    assert len(client.sessions()) == before
    brought = [pb.TurnRequest.FromString(request) for name, request in relay.calls if name == "Turn"]
    assert brought[0] == brought[1] == brought[2]


def test_a_turn_out_of_time_keeps_its_number(relay: Relay, connect: Clients, whole: Any) -> None:
    """After a timeout the same piece asks for the answer of the same turn; another piece comes after it."""
    client = connect(relay.port)
    with client.session("reader") as s:
        relay.hold = {"Turn"}
        with pytest.raises(seqserve.DeadlineExceeded):
            s.send(step([1, 2]), timeout=0.2)
        assert (s.turn, s.unanswered) == (0, 1)
        relay.let_go.set()
        read = [s.send(step([1, 2]))]
        assert (s.turn, s.unanswered, s.info().turn) == (1, 0, 1)
        relay.let_go.clear()
        with pytest.raises(seqserve.DeadlineExceeded):
            s.send(step([3]), timeout=0.2)
        with pytest.raises(seqserve.DeadlineExceeded):
            s.send(step([4]), timeout=0.2)  # not sent: what is unanswered could not be sent before it
        relay.let_go.set()
        fork = s.fork(timeout=30)
        assert (s.turn, fork.turn, s.unanswered) == (2, 2, 0)
        read += [s.send(step([4]))]
        assert s.turn == 3
    fork.close()
    assert scores(read) == whole(np.array([1, 2]))[:] + whole(np.array([1, 2, 3, 4]))[-8:]


class Cable:
    """Carries bytes to a server and back over TCP, and breaks: each connection after so many bytes of the server's."""

    def __init__(self, port: int, lasts: list[int]) -> None:
        self._port, self.lasts = port, lasts
        self.broke = 0
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                self._open += [near, far]
                lasts = self.lasts.pop(0) if self.lasts else None
                for ends in ((near, far, None), (far, near, lasts)):
                    self._threads.append(threading.Thread(target=self._carry, args=ends))
                    self._threads[-1].start()

    def _carry(self, source: socket.socket, sink: socket.socket, lasts: int | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                if lasts is not None and (lasts := lasts - len(data)) <= 0:
                    self.broke += 1
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for end in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in self._threads:
            thread.join()


@pytest.mark.parametrize("seed", range(4))
def test_a_connection_that_breaks(served: Served, connect: Clients, whole: Any, seed: int) -> None:
    """However often the connection breaks, in whatever message, send_all and send give the answers of the uncut sequence, once."""
    rng = random.Random(seed)
    read = tokens(rng, 300)
    pieces = [step(piece) for piece in cut(rng, read)]
    cable = Cable(served.port, [rng.randint(500, 3000) for _ in range(5)])
    try:
        client = connect(cable.port)
        with client.session("reader", id=f"cable-{id(cable)}") as s:
            ahead = len(pieces) * 3 // 4
            answers = list(s.send_all(pieces[:ahead], window=rng.choice([2, 8, 32])))
            answers += [s.send(piece) for piece in pieces[ahead:]]
            assert s.turn == s.info().turn == len(pieces)
        assert scores(answers) == whole(read)
        assert cable.broke >= 2
    finally:
        connect.close()
        cable.close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What would have been slept before another try."""
    waits: list[float] = []

    async def noted(client: seqserve.AsyncClient, seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(seqserve.Client, "_sleep", lambda client, seconds: waits.append(seconds))
    monkeypatch.setattr(seqserve.AsyncClient, "_sleep", noted)
    return waits


def test_a_busy_server_is_asked_again(fake: Fake, connect: Clients, waits: list[float]) -> None:
    """A turn that was turned away is sent again after the time asked for, with the same number and input, and all behind it."""
    client = connect(fake.port)
    with client.session("echo") as s:
        away = failure(grpc.StatusCode.UNAVAILABLE, "draining", "DRAINING")
        fake.failures = [failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", retry=0.25), *[away] * 6]
        assert s.send(step([1]))["tokens"].tolist() == [[1]]
        assert (len(waits), waits[0] >= 0.25) == (7, True)
        fake.busy = [3, 6]
        fake.failures = [away]
        pieces = [step([n]) for n in range(20)]
        assert [int(a["tokens"][0, 0]) for a in s.send_all(pieces, window=4)] == list(range(20))
        assert (len(waits), fake.busy, fake.sessions[s.id].info.turn) == (10, [], 21)


def test_what_is_too_large(served: Served, connect: Clients, whole: Any) -> None:
    """A piece over the limit ends send_all after the answers before it; the session goes on without it."""
    client = connect(served.port)
    with client.session("reader") as s:
        got = []
        with pytest.raises(seqserve.TooLarge):
            got.extend(s.send_all([step([1]), step([2, 3]), step(np.zeros(LARGEST)), step([4])]))
        assert (s.turn, s.unanswered) == (2, 0)
        read = [s.send(step([4]))]
    assert scores(read) == whole(np.array([1, 2, 3, 4]))[-8:]


# Refusals


def test_a_refused_turn_costs_nothing(served: Served, connect: Clients, whole: Any) -> None:
    """A turn the model can't take is refused, by itself or sent ahead; what was sent behind it is not applied."""
    client = connect(served.port)
    with client.session("reader") as s:
        read = [s.send(step([1]))]
        with pytest.raises(seqserve.InvalidInput) as caught:
            s.send(step([99]))
        assert (caught.value.reason, caught.value.turn, s.turn, s.unanswered) == ("OUT_OF_RANGE", 1, 1, 0)
        with pytest.raises(seqserve.InvalidInput):
            read.extend(s.send_all([step([2]), step([3]), step([99]), *[step([5])] * 20]))
        assert (s.turn, s.unanswered, s.info().turn) == (3, 0, 3)
        read.append(s.send(step([4])))
    assert scores(read[:1] + read[-1:]) == whole(np.array([1]))[:] + whole(np.array([1, 2, 3, 4]))[-8:]


@pytest.mark.parametrize(
    "piece", ["\ud800", {"tokens": [[1], [2, 3]]}, [["a"]], b"text", np.zeros((1, 2, 3)), [1e300], {"tokens": [object()]}]
)
def test_what_no_turn_can_bring(fake: Fake, connect: Clients, piece: Any) -> None:
    """What has no place in a message is InvalidInput, and no turn."""
    with connect(fake.port).session("echo") as s:
        with pytest.raises(seqserve.InvalidInput):
            s.send(piece)
        assert s.unanswered == 0
    assert "Turn" not in fake.calls


def test_two_writers_are_told_apart(served: Served, connect: Clients) -> None:
    """Of two clients that write to one session, the second to send a turn hears of it, until it takes the session up anew."""
    one, two = connect(served.port), connect(served.port)
    with one.session("reader") as s:
        other = two.resume(s.id).open()
        s.send(step([1, 2]))
        for _ in range(2):
            with pytest.raises(seqserve.SessionConflict) as caught:
                other.send(step([3]))
            assert (caught.value.reason, caught.value.turn, other.unanswered) == ("OTHER_INPUT", 1, 0)
        with pytest.raises(seqserve.SessionConflict):
            list(other.send_all([step([3]), step([4])]))
        assert s.info().turn == 1
        assert two.resume(s.id).send(step([3]))["scores"].shape == (1, 1, 2)


def test_sessions_that_are_not_there(served: Served, connect: Clients) -> None:
    """A session that never was, has ended, or has an id in use; a model that is unknown or keeps no state."""
    client = connect(served.port)
    with pytest.raises(seqserve.SessionNotFound):
        client.resume("nobody").open()
    with client.session("reader", id="twice") as s:
        s.send(step([1]))
        with pytest.raises(seqserve.SessionConflict) as exists:
            client.session("reader", id="twice").open()
        assert exists.value.reason == "SESSION_EXISTS"
        client.resume("twice").open().close()
        with pytest.raises(seqserve.SessionGone) as gone:
            s.send(step([2]))
        assert (gone.value.reason, gone.value.turn) == ("SESSION_CLOSED", 1)
    with pytest.raises(seqserve.SessionGone):
        s.send(step([2]))
    with pytest.raises(seqserve.NotFound, match="reader"):
        client.session("nothing").open()
    with pytest.raises(seqserve.InvalidInput) as stateless:
        client.session("both_ways").open()
    assert stateless.value.reason == "NO_STATE"
    with pytest.raises(seqserve.InvalidInput):
        client.session("reader", ttl="soon")
    with pytest.raises(seqserve.InvalidInput):
        client.session("reader").send_all([], window=0)


# The life of a session


def test_leaving_the_block_closes(served: Served, connect: Clients) -> None:
    """The session ends with its block, after an exception too, which is not hidden; kept or detached it lives on."""
    client = connect(served.port)
    with client.session("reader") as s:
        pass
    with pytest.raises(seqserve.SessionGone):
        client.resume(s.id).open()
    with pytest.raises(ZeroDivisionError), client.session("reader") as s:
        _ = 1 / s.turn
    with pytest.raises(seqserve.SessionGone):
        client.resume(s.id).open()
    with client.session("reader", close=False) as kept, client.session("reader") as detached:
        detached.detach()
    for session in (kept, detached):
        with client.resume(session.id) as s:
            s.send(step([1]))
        s.close()  # once more is nothing
        with pytest.raises(seqserve.SessionGone):
            client.resume(session.id).open()


def test_a_failure_to_close_hides_nothing(library: Path, connect: Clients) -> None:
    """Where the server has gone, what went wrong inside the block is what is raised; without that, that it has gone."""
    with serve(library) as server:
        client = connect(server.port, retries=0)
        with pytest.raises(ZeroDivisionError), client.session("reader") as s:
            _ = 1 / server.terminate()
        with pytest.raises(seqserve.Unavailable):
            s.close()


def test_resumed_after_a_turn(served: Served, connect: Clients, whole: Any) -> None:
    """A session is taken up after its last turn, or after an earlier one whose answer is had: the later is answered again."""
    client = connect(served.port)
    with client.session("reader", ttl=77, close=False) as s:
        first, second = s.send(step([1])), s.send(step([2, 3]))
        assert (s.info().ttl, s.info().acknowledged) == (77, 1)
    again = client.resume(s.id, turn=1, close=False)
    with again:
        assert scores([again.send(step([2, 3]))]) == scores([second])
        assert again.info().turn == 2
    for turn in (0, 3):
        with pytest.raises(seqserve.SessionConflict) as caught:
            client.resume(s.id, turn=turn).open()
        assert caught.value.turn == 2
    with client.resume(s.id) as last:
        third = last.send(step([4]))
        assert last.turn == 3
    assert scores([first, second, third]) == whole(np.array([1, 2, 3, 4]))


def test_send_all_left_early(served: Served, connect: Clients, whole: Any) -> None:
    """What was sent ahead stays sent where the loop is left: the turns come after it. A loop that goes on then is told."""
    client = connect(served.port)
    with client.session("reader") as s:
        answers = s.send_all([step([n]) for n in range(8)], window=4)
        next(answers)
        assert (s.turn, s.unanswered) == (1, 3)
        last = s.send(step([9]))
        assert (s.turn, s.unanswered) == (5, 0)
        with pytest.raises(seqserve.FailedPrecondition) as caught:
            next(answers)
        assert caught.value.reason == "TAKEN_OVER"
    assert scores([last]) == whole(np.array([0, 1, 2, 3, 9]))[-8:]


def test_send_all_taken_up_again(served: Served, connect: Clients, whole: Any) -> None:
    """Pieces sent again from the first without an answer are the same turns; others come after those that were sent."""
    client = connect(served.port)
    pieces = [step([n]) for n in range(12)]
    with client.session("reader") as s:
        answers = s.send_all(pieces, window=5)
        read = [next(answers), next(answers)]
        answers.close()
        assert s.unanswered == 4
        read += s.send_all(pieces[2:])
        assert (s.turn, scores(read)) == (12, whole(np.arange(12)))
        answers = s.send_all(pieces, window=5)
        next(answers)
        answers.close()
        assert s.turn == 13
        read = list(s.send_all([pieces[1], step([40]), step([41])]))  # 1 is asked for again; 2, 3 and 4 come before 40
        assert (s.turn, len(read)) == (19, 3)
        assert scores(read[1:]) == whole(np.array([*range(12), 0, 1, 2, 3, 4, 40, 41]))[-16:]


def test_a_source_that_fails(served: Served, connect: Clients) -> None:
    """An exception of the iterable comes through; what was sent before it is sent."""

    def source() -> Iterator[Any]:
        yield step([1])
        yield step([2])
        raise ZeroDivisionError

    with connect(served.port).session("reader") as s:
        with pytest.raises(ZeroDivisionError):
            list(s.send_all(source()))
        s.send(step([3]))
        assert s.turn <= 3


def test_sessions_are_listed(fake: Fake, connect: Clients) -> None:
    """Open sessions by id, in pages."""
    client = connect(fake.port)
    for name in "cab":
        client.session("sentiment", "2", id=name, ttl=9).open()
    assert [i.id for i in client.sessions()] == ["a", "b", "c"]
    (info,) = client.sessions(1, "a")
    assert info == seqserve.SessionInfo("b", "sentiment", "2", 0, 0, 9, "")
    assert repr(info) == "<SessionInfo b of sentiment 2, turn 0>"


def test_the_id_travels_for_proxies(fake: Fake, connect: Clients) -> None:
    """Every call of a session names it in metadata, the first too, where its id can stand there."""
    client = connect(fake.port)
    with client.session("echo") as s:
        s.send(step([1]))
        assert len(list(s.send_all([step([2])]))) == 1
        s.info()
    assert len(fake.calls) == 5
    assert {m.get("seqserve-session") for m in fake.metadata} == {s.id}
    with client.session("echo", id="größe") as s:
        s.send(step([1]))
    assert len(fake.calls) == 8
    assert not any("seqserve-session" in m for m in fake.metadata[5:])
    assert not any(turns.metadata(id) for id in ("", " a", "a\n"))


def test_what_a_session_says_of_itself(fake: Fake, connect: Clients) -> None:
    """Before it is open a session has an id; then a model, its turn, and short words for what it gives."""
    s = connect(fake.port).session("echo", id="x")
    assert (s.id, s.turn, s.model, s.version, s.unanswered) == ("x", 0, "", "", 0)
    answer = s.send(step([1]))
    assert (s.model, s.version, s.turn) == ("echo", "1", 1)
    assert repr(answer) == "<Tensors tokens int64[1, 1]>"
    assert (list(answer), len(answer), "tokens" in answer) == (["tokens"], 1, True)


def test_the_twins_have_the_same_methods() -> None:
    """AsyncSession has Session's methods with the same parameters and defaults, and the same words to say of them but for send_all."""

    def methods(kind: type) -> dict[str, Any]:
        return {name: member for name, member in vars(kind).items() if inspect.isfunction(member) and not name.startswith("_")}

    blocking, awaited = methods(seqserve.Session), methods(seqserve.AsyncSession)
    assert list(blocking) == list(awaited)
    for name in blocking:
        twins = [[(p.name, p.kind, p.default) for p in inspect.signature(m[name]).parameters.values()] for m in (blocking, awaited)]
        assert twins[0] == twins[1], name
        assert blocking[name].__doc__ == awaited[name].__doc__ or name == "send_all"


# Side by side


def test_threads_take_turns(served: Served) -> None:
    """Threads that share a session each get an answer to a turn of their own."""
    with seqserve.Client(f"127.0.0.1:{served.port}") as client, client.session("adder") as s, ThreadPoolExecutor(8) as pool:
        totals = sorted(answer.mean[0, 0] for answer in pool.map(lambda _: s.send([1, 0]), range(64)))
        assert totals == list(range(1, 65))
        assert s.turn == 64


def test_tasks_take_turns(served: Served) -> None:
    """So do the tasks of a loop."""

    async def go() -> None:
        async with seqserve.AsyncClient(f"127.0.0.1:{served.port}") as client, client.session("adder") as s:
            answers = await asyncio.gather(*(s.send([1, 0]) for _ in range(64)))
            assert [answer.mean[0, 0] for answer in answers] == list(range(1, 65))

    asyncio.run(go())


def test_a_cancelled_send_is_kept(relay: Relay, whole: Any) -> None:
    """A task that is cancelled while it waits for an answer leaves its turn to be asked for again."""

    async def go() -> bytes:
        async with seqserve.AsyncClient(f"127.0.0.1:{relay.port}") as client, client.session("reader") as s:
            relay.hold = {"Turn"}
            sending = asyncio.ensure_future(s.send(step([1, 2])))
            while not relay.calls or relay.calls[-1][0] != "Turn":
                await asyncio.sleep(0)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            assert s.unanswered == 1
            relay.let_go.set()
            answers = [await s.send(step([1, 2])), await s.send(step([3]))]
            assert s.turn == 2
            return scores(answers)

    assert asyncio.run(go()) == whole(np.array([1, 2, 3]))


def test_pieces_that_come_as_answers_do(served: Served, whole: Any) -> None:
    """An asynchronous source whose every piece waits for the answer to the one before is answered as it comes."""

    async def go() -> bytes:
        answered: asyncio.Queue[None] = asyncio.Queue()

        async def source() -> AsyncIterator[Any]:
            for n in range(10):
                yield step([n])
                await answered.get()

        read = []
        async with seqserve.AsyncClient(f"127.0.0.1:{served.port}") as client, client.session("reader") as s:
            async for answer in s.send_all(source()):
                read.append(answer)
                answered.put_nowait(None)
        return scores(read)

    assert asyncio.run(go()) == whole(np.arange(10))


# The line of turns by itself


def test_turns_behind_a_refused_one_come_again() -> None:
    """Answers may come out of order; a turn that is refused because one before it was, is sent again, not given up."""
    line = turns.Line("s", "m", "1", 0)
    for n in range(4):
        assert line.claim(turns.encode(str(n)))

    def sent(ahead: turns.Ahead) -> list[int]:
        return [pb.TurnsRequest.FromString(message).turns[0].turn for message in ahead.due()]

    def take(ahead: turns.Ahead, *replies: pb.TurnReply) -> None:
        ahead.take(pb.TurnsReply(turns=replies).SerializeToString())

    ahead = turns.Ahead(line)
    gap = pb.Refusal(code=9, message="early", reason="GAP")
    fine = [pb.TurnReply(session="s", turn=n) for n in range(4)]
    for reply in fine:
        reply.classification.label = "good"
    assert (sent(ahead), sent(ahead)) == ([1], [])
    take(ahead, fine[1], pb.TurnReply(session="other", turn=1), pb.TurnReply(session="s", turn=9))
    assert isinstance(ahead.first(), seqserve.Classification)
    assert line.answered()
    assert sent(ahead) == [2, 3, 4]
    take(ahead, pb.TurnReply(session="s", turn=3, refusal=gap))
    assert ahead.first() is None
    take(ahead, fine[2])
    assert isinstance(ahead.first(), seqserve.Classification)
    assert line.answered()
    assert isinstance(ahead.first(), seqserve.Unavailable)
    again = turns.Ahead(line)
    assert pb.TurnsRequest.FromString(again.due()[0]).turns[0] == pb.TurnRequest(session="s", turn=3, acknowledged=2, text="2")
    take(again, pb.TurnReply(session="s", turn=3, refusal=gap))
    assert isinstance(again.first(), seqserve.SessionConflict)


def test_an_answer_that_makes_no_sense(fake: Fake, connect: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn whose answer can't be read was applied: the error is raised once, and the next piece is the next turn."""
    client = connect(fake.port)
    with client.session("echo") as s:
        turn = fake.turn
        monkeypatch.setattr(fake, "turn", lambda r: pb.TurnReply(session=r.session, turn=turn(r).turn))
        with pytest.raises(seqserve.ServerError) as caught:
            s.send(step([1]))
        assert (caught.value.reason, s.turn) == ("BAD_REPLY", 1)
        with pytest.raises(seqserve.ServerError):
            list(s.send_all([step([2])]))
        monkeypatch.undo()
        assert s.send(step([3]))["tokens"].tolist() == [[3]]
        assert fake.sessions[s.id].info.turn == 3


def test_a_session_moves_to_another_server(tmp_path: Path) -> None:
    """Exported from one server and imported into another, a session goes on as if it had never moved; here it has moved, there
    an older copy under another id lives a life of its own; what isn't an export, or is another model's, is refused."""
    library = tmp_path / "models"
    models.library(library)
    piece = {"tokens": np.array([[1, 2, 3]])}
    with (
        serve(library) as here,
        serve(library, "--store", f"lmdb:{tmp_path / 'there'}") as there,
        seqserve.Client(f"localhost:{here.port}") as a,
        seqserve.Client(f"localhost:{there.port}") as b,
    ):
        with a.session("reader") as alone:
            expected = [alone.send(piece)["scores"].tobytes() for _ in range(4)]
        session = a.session("reader", id="mine")
        assert session.send(piece)["scores"].tobytes() == expected[0]
        copy = session.export()
        assert session.send(piece)["scores"].tobytes() == expected[1]
        exported = session.export(move=True)
        with pytest.raises(seqserve.SessionGone) as gone:
            session.send(piece)
        assert (gone.value.reason, gone.value.turn) == ("SESSION_MOVED", 2)
        with b.bring(exported) as moved, b.bring(copy, id="older") as older:
            assert (moved.id, moved.turn, older.turn) == ("mine", 2, 1)
            assert older.send(piece)["scores"].tobytes() == expected[1]
            assert moved.send(piece)["scores"].tobytes() == expected[2]
            assert moved.send(piece)["scores"].tobytes() == expected[3]
            with pytest.raises(seqserve.SessionConflict), b.bring(exported):
                pass
        for damaged in (exported[:-3], exported[:40] + b"x" + exported[41:], b"nonsense"):
            with pytest.raises(seqserve.Error), b.bring(damaged, id="broken") as broken:
                broken.send(piece)
        tail = len(b"\x1a\x04mine")  # what lies beside the record
        assert exported[-tail:] == b"\x1a\x04mine"
        for at in range(len(exported) - tail, len(exported)):
            for bit in range(8):
                flipped = exported[:at] + bytes([exported[at] ^ 1 << bit]) + exported[at + 1 :]
                with pytest.raises(seqserve.InvalidInput), b.bring(flipped):
                    pass
    models.reader(library / "reader" / "1", "reader", seed=5)
    with serve(library) as other, seqserve.Client(f"localhost:{other.port}") as c:
        with pytest.raises(seqserve.SessionGone) as unfit, c.bring(exported):
            pass
        assert unfit.value.reason == "FINGERPRINT_MISMATCH"
