"""A look inside while it works: rounds, who took part, queues, times; nothing gathered while nobody looks, nobody kept waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

import seqserve
from protos import inside_pb2 as pb
from seqserve import inside as inside_client
from server.app import App
from server.catalog import Catalog
from server.config import Config
from server.inputs import Sizes
from server.inside import KEPT, PARTS, Feed
from server.metrics import Metrics
from server.rounds import Limits, Round
from server.rpc import inside
from server.sequence import Sequence
from server.workers import Workers
from tests import models
from tests.process import reason, serve
from tests.test_security import FILE, KEYS, As

WATCH = "/seqserve.v1.Inside/Watch"
WAIT_S = 30


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    models.library(root)
    return root


@pytest.fixture(scope="module", params=["auto", "public"])
def app(request: pytest.FixtureRequest, library: Path) -> Iterator[App]:
    made = App(Config(models=library, port=0, metrics_port=-1, workers=2, front=request.param))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def client(app: App) -> Iterator[seqserve.Client]:
    with seqserve.Client(f"127.0.0.1:{app.port}") as client:
        yield client


class Watching:
    """A stream of pictures, that can be waited for."""

    def __init__(self, channel: grpc.Channel, interval: float = 0.05, rounds: int = 0) -> None:
        send = channel.unary_stream(WATCH, pb.WatchRequest.SerializeToString, pb.Picture.FromString)
        self.call = send(pb.WatchRequest(interval=interval, rounds=rounds), timeout=WAIT_S)
        self.pictures = [next(self.call)]  # from here on it is watched

    def until(self, enough: Callable[[list[pb.Picture]], bool]) -> list[pb.Picture]:
        while not enough(self.pictures):
            self.pictures.append(next(self.call))
        return self.pictures

    def rounds(self) -> list[pb.RoundRun]:
        return [run for picture in self.pictures for run in picture.rounds]


@pytest.fixture
def watching(app: App) -> Iterator[Watching]:
    with grpc.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        watching = Watching(channel)
        yield watching
        watching.call.cancel()


def load(picture: pb.Picture, model: str) -> pb.ModelLoad:
    return next(m for m in picture.models if m.model == model)


def test_turns_are_seen(client: seqserve.Client, watching: Watching) -> None:
    """Each turn of a session is seen in a round, with its session and number; the model's and the sessions' counts go on."""
    before = watching.pictures[0]
    with client.session("reader", id="mine") as session:
        for step in range(1, 4):
            session.send({"tokens": np.array([[step, step + 1]])})
        pictures = watching.until(lambda seen: load(seen[-1], "reader").answered - load(before, "reader").answered >= 3)
        watching.until(lambda _: len({part.turn for run in watching.rounds() for part in run.parts if part.session == "mine"}) == 3)
        last = pictures[-1]
        assert last.server == before.server
        assert last.at > before.at
        assert last.sessions.memory >= 1
        assert last.sessions.turns - before.sessions.turns == 3
        assert last.workers == 2
        assert last.calls >= 1
    mine = [(run, part) for run in watching.rounds() for part in run.parts if part.session == "mine"]
    assert [(part.turn, part.turns, part.rows) for _, part in mine] == [(1, 1, 1), (2, 1, 1), (3, 1, 1)]
    for run, _ in mine:
        assert (run.model, run.version, run.steps) == ("reader", "1", 2)
        assert run.rows >= 1
        assert 0 < run.seconds < WAIT_S
        assert before.at <= run.began <= watching.pictures[-1].at
    reader = load(watching.pictures[-1], "reader")
    assert reader.recent >= 3
    assert 0 < reader.p50 <= reader.p99
    assert reader.busy > 0


def test_rounds_are_numbered_without_gaps(client: seqserve.Client, watching: Watching) -> None:
    """Told and missed together are all rounds."""
    for _ in range(5):
        client.infer("reader", {"tokens": np.array([[1, 2, 3]])})
    watching.until(lambda _: len(watching.rounds()) >= 5)
    numbers = [run.number for run in watching.rounds()]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert not any(picture.missed for picture in watching.pictures)


def test_what_is_too_much_is_counted(app: App, client: seqserve.Client) -> None:
    """A watcher that wants one round a picture is told of the newest, and how many there were besides."""
    with grpc.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        watching = Watching(channel, rounds=1)
        first = app.workers.onlooker
        assert isinstance(first, Feed)
        start = first.newest
        for _ in range(20):
            client.infer("reader", {"tokens": np.array([[1, 2, 3]])})
        watching.until(lambda seen: sum(p.missed + len(p.rounds) for p in seen) >= 20)
        assert all(len(p.rounds) <= 1 for p in watching.pictures)
        assert sum(p.missed + len(p.rounds) for p in watching.pictures) == first.newest - start
        watching.call.cancel()


def test_nothing_is_gathered_for_nobody(app: App, client: seqserve.Client) -> None:
    """The workers know of an onlooker only while there is a watcher."""
    with grpc.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        watching = Watching(channel)
        feed = app.workers.onlooker
        assert feed is not None
        watching.call.cancel()
    gone = threading.Event()
    for _ in range(WAIT_S * 100):  # until the server has heard of it
        if app.workers.onlooker is None:
            break
        gone.wait(0.01)
    assert app.workers.onlooker is None
    client.infer("reader", {"tokens": np.array([[1, 2, 3]])})
    assert isinstance(feed, Feed)
    assert feed.since(0, 10) == ([], 0)


@pytest.mark.parametrize(
    ("request_", "why"),
    [(pb.WatchRequest(interval=0.001), "BAD_INTERVAL"), (pb.WatchRequest(interval=float("nan")), "BAD_INTERVAL"),
     (pb.WatchRequest(interval=-1), "BAD_INTERVAL"), (pb.WatchRequest(rounds=5000), "BAD_COUNT")],
)  # fmt: skip
def test_bad_wishes(app: App, request_: pb.WatchRequest, why: str) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        send = channel.unary_stream(WATCH, pb.WatchRequest.SerializeToString, pb.Picture.FromString)
        with pytest.raises(grpc.RpcError) as caught:
            next(send(request_, timeout=WAIT_S))
    assert reason(caught.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, why)


def test_not_too_many(app: App) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        watching = [Watching(channel, interval=60) for _ in range(inside.WATCHERS)]
        with pytest.raises(grpc.RpcError) as caught:
            Watching(channel)
        status, why, _, retry = reason(caught.value)
        assert (status, why) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "WATCHERS")
        assert retry
        for one in watching:
            one.call.cancel()


def test_stop_ends_it(library: Path) -> None:
    """A stopping server ends the streams well, and does not wait for them."""
    with serve(library, "--drain-seconds", "20") as server:
        watching = Watching(server.channel)
        assert server.terminate() == 0
        for _ in watching.call:
            pass
        assert any("stopped after" in line for line in server.log)


def test_for_operators(library: Path, tmp_path: Path) -> None:
    """With keys: not for users; and operators don't see how other tenants' sessions are called."""
    file = tmp_path / "keys.toml"
    file.write_text(FILE)
    with serve(library, "--keys", str(file), "--keys-interval", "0") as server:

        def sent(name: str, id: str) -> None:
            with seqserve.Client(f"127.0.0.1:{server.port}", metadata=[("x-api-key", KEYS[name])]) as client:
                client.session("reader", id=id, close=False).send({"tokens": np.array([[1]])})

        with pytest.raises(grpc.RpcError) as caught:
            Watching(As(server, KEYS["ann"]).channel)
        assert reason(caught.value)[:2] == (grpc.StatusCode.PERMISSION_DENIED, "OPERATORS_ONLY")
        with pytest.raises(grpc.RpcError) as caught:
            Watching(server.channel)
        assert reason(caught.value)[0] == grpc.StatusCode.UNAUTHENTICATED
        watching = Watching(As(server, KEYS["boss"]).channel)
        sent("ann", "hers")
        sent("bob", "his")
        watching.until(lambda _: len(watching.rounds()) >= 2)
        parts = [part for run in watching.rounds() for part in run.parts]
        assert [(part.session, part.turn, part.turns) for part in parts] == [("hers", 1, 1), ("", 0, 1)]
        assert "his" not in "".join(str(p) for p in watching.pictures)
        watching.call.cancel()


def test_feed_is_bounded(library: Path) -> None:
    """More rounds than are kept: the oldest are let go, and counted; and a round tells of some of its sequences only."""
    workers = Workers(1)
    catalog = Catalog(workers, Limits(), Metrics(), 256)
    catalog.scan(library)
    engine = catalog.find("reader").engine
    feed = Feed(workers)
    feed.open()
    try:
        assert workers.onlooker is feed
        round = _round(PARTS + 5)
        for at in range(KEPT + 10):
            feed.round(engine, "main", round, float(at), at + 0.5)
        found, missed = feed.since(0, 5)
        assert [ran.number for ran in found] == list(range(KEPT + 6, KEPT + 11))
        assert missed == KEPT + 5
        found, missed = feed.since(0, 2 * KEPT)
        assert (len(found), missed) == (KEPT, 10)
        assert len(found[0].parts) == PARTS
        assert found[0].rows == PARTS + 5
        assert len({part.sequence for part in found[0].parts}) == PARTS, "a number of its own for each"
        assert found[0].parts == found[1].parts, "the same in every round"
    finally:
        feed.close()
    assert workers.onlooker is None
    assert feed.since(0, 5)[0] == []


def test_times(library: Path) -> None:
    """Percentiles of the last ten seconds' answers, by model."""
    workers = Workers(1)
    catalog = Catalog(workers, Limits(), Metrics(), 256)
    catalog.scan(library)
    engine = catalog.find("reader").engine
    feed = Feed(workers)
    feed.open()
    round = _round(100)
    feed.round(engine, "main", round, 0.0, 0.5)
    feed.left(engine, round.tickets, "answered")  # too long ago, below
    for i, sequence in enumerate(round.tickets):
        sequence.queued, sequence.run = i / 100, 1.0
    feed.round(engine, "main", round, 99.0, 100.0)
    feed.left(engine, round.tickets, "answered")
    feed.left(engine, round.tickets, "failed")
    (spread,) = feed.spreads(105.0).values()
    assert spread == (100, pytest.approx(1.49), pytest.approx(1.98))
    assert feed.spreads(200.0) == {}
    feed.close()


def _round(rows: int) -> Round[Sequence]:
    tickets = tuple(Sequence("main", {}, Sizes(1, 1), lambda s, o: None, lambda e: None) for _ in range(rows))
    return Round((), tickets, 1)


def test_from_python(app: App, client: seqserve.Client) -> None:
    """Both clients watch, and see the same of a round."""

    async def first_round() -> inside_client.Round:
        async with seqserve.AsyncClient(f"127.0.0.1:{app.port}") as other:
            pictures = other.watch(0.05)
            await anext(pictures)
            client.infer("reader", {"tokens": np.array([[1, 2, 3]])})
            async for picture in pictures:
                if picture.rounds:
                    await pictures.aclose()
                    return picture.rounds[0]
        raise AssertionError("it ended")

    pictures = client.watch(0.05)
    before = next(pictures)
    assert repr(before).startswith("<Picture at ")
    awaited = asyncio.run(first_round())
    seen = next(picture for picture in pictures if picture.rounds)
    assert seen.rounds[0] == awaited
    assert (awaited.model, awaited.steps, awaited.parts[0].turns) == ("reader", 3, 0)
    assert seen.server == before.server
    assert {load.model for load in seen.models} == {"reader", "both_ways", "fragile"}
    pictures.close()
    with pytest.raises(seqserve.InvalidInput):
        next(client.watch(1e9))
    with pytest.raises(seqserve.InvalidInput):
        client.watch("often")  # type: ignore[arg-type]
