"""What may wait for the store keeps nobody else waiting, and keeps its order."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos import seqserve_pb2 as tasks_pb
from protos import sessions_pb2 as pb
from server import app as building
from server.app import App
from server.config import Config
from server.errands import Errands
from server.errors import Draining
from server.records import Record
from server.store import Durability, MemoryStore
from tests import models
from tests.process import reason
from tests.test_turns import scores, turn


def test_each_session_in_order() -> None:
    """A thousand errands of a few sessions, some of two at once: for each session they run one at a time, as they came."""
    errands, rng = Errands(), random.Random(1)
    came: dict[str, list[int]] = {id: [] for id in "abcdef"}
    ran: dict[str, list[int]] = {id: [] for id in came}
    under_way: set[str] = set()
    overlaps = 0

    def work(number: int, ids: list[str]) -> None:
        nonlocal overlaps
        overlaps += bool(under_way & set(ids))
        under_way.update(ids)
        for id in ids:
            ran[id].append(number)
        under_way.difference_update(ids)
        if number % 97 == 0:
            raise RuntimeError("one that fails ends nothing but itself")

    for number in range(1000):
        ids = rng.sample(sorted(came), rng.choice([0, 1, 1, 2]))
        for id in ids:
            came[id].append(number)
        errands.run(ids, lambda number=number, ids=ids: work(number, ids))  # type: ignore[misc]  # mypy: defaults in a lambda
    errands.stop()
    assert ran == came
    assert not overlaps
    assert not any(errands.waits(id) for id in came)
    with pytest.raises(Draining):
        errands.run("a", lambda: None)
    assert not errands.waits("a")


class Slow(MemoryStore):
    """A store that keeps sessions as they go, and whose writes wait until they are let through."""

    durability = Durability.PROCESS
    quick = False
    shared = True

    def __init__(self) -> None:
        super().__init__()
        self.let = threading.Semaphore(0)
        self.asked = threading.Semaphore(0)
        self.commits: list[list[str]] = []

    def write(self, records: Iterable[Record], removed: Iterable[str] = ()) -> frozenset[str]:
        records = list(records)
        self.asked.release()
        assert self.let.acquire(timeout=60)
        self.commits.append([r.kept.id for r in records])
        return super().write(records, removed)


@pytest.fixture(params=["direct", "public"])
def slow(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Slow, grpc.Channel]]:
    """A server over a real port whose store waits."""
    models.library(tmp_path)
    store = Slow()
    monkeypatch.setattr(building, "open_store", lambda *_: store)
    app = App(Config(models=tmp_path, port=0, metrics_port=-1, workers=1, front=request.param, drain_seconds=5))
    app.start()
    with grpc.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        yield store, channel
        store.let.release(1000)
        app.stop()


def unary(channel: grpc.Channel, name: str) -> Any:
    return channel.unary_unary(f"/seqserve.v1.Sessions/{name}", lambda m: m.SerializeToString())


def models_of(channel: grpc.Channel) -> Any:
    """A call that has nothing to do with sessions."""
    return channel.unary_unary("/seqserve.v1.Tasks/Models", lambda m: m.SerializeToString())


def test_a_waiting_store_keeps_only_its_callers(slow: tuple[Slow, grpc.Channel]) -> None:
    """While an Open waits for the store, others' calls are answered; a turn, a look and a Close that were sent behind it, of the
    same session, see it done, in that order."""
    store, channel = slow
    opening, turning = unary(channel, "Open"), unary(channel, "Turn")
    opened = opening.future(pb.OpenRequest(session="mine", model=tasks_pb.Model(name="reader")))
    assert store.asked.acquire(timeout=60)
    behind = turning.future(turn("mine", 1, [1, 2]))
    looked = unary(channel, "Get").future(pb.SessionName(session="mine"))
    closed = unary(channel, "Close").future(pb.SessionName(session="mine"))
    for _ in range(5):
        assert models_of(channel)(tasks_pb.ModelsRequest(), timeout=30)
    assert not opened.done()
    assert not behind.done()
    assert not looked.done()
    store.let.release()
    assert opened.result(30)
    assert pb.SessionInfo.FromString(looked.result(30)).session == "mine"
    store.let.release(10)
    failed = behind.exception(30)
    if failed is None:
        assert scores(pb.TurnReply.FromString(behind.result()))
    else:  # the Close came while its commit waited: then it is told so, and the store is rid of it
        assert reason(failed)[1] == "SESSION_CLOSED"
    assert pb.SessionInfo.FromString(closed.result(30)).session == "mine"
    with pytest.raises(grpc.RpcError) as gone:
        turning(turn("mine", 2, [3]), timeout=30)
    assert reason(gone.value)[1] == "SESSION_CLOSED"
    assert not list(store.scan())


def test_rounds_go_on_while_one_is_stored(slow: tuple[Slow, grpc.Channel]) -> None:
    """While a round's commit waits, other sessions' turns run, over one stream; all that ran meanwhile is one commit; what is
    answered is stored."""
    store, channel = slow
    store.let.release(4)
    for id in "abcd":
        unary(channel, "Open")(pb.OpenRequest(session=id, model=tasks_pb.Model(name="reader")), timeout=30)
    for _ in "abcd":
        assert store.asked.acquire(timeout=60)
    asking: list[pb.TurnsRequest] = []
    more, over = threading.Semaphore(0), threading.Event()

    def ask() -> Iterator[pb.TurnsRequest]:
        while more.acquire(timeout=60) and not over.is_set():
            yield asking.pop(0)

    stream = channel.stream_stream("/seqserve.v1.Sessions/Turns", pb.TurnsRequest.SerializeToString, pb.TurnsReply.FromString)(ask())
    asking.append(pb.TurnsRequest(turns=[turn("a", 1, [1, 2])]))
    more.release()
    assert store.asked.acquire(timeout=60)
    for id in "bcd":
        asking.append(pb.TurnsRequest(turns=[turn(id, 1, [3])]))
        more.release()
    for _ in range(200):
        models_of(channel)(tasks_pb.ModelsRequest(), timeout=30)
    store.let.release(10)
    got = {}
    for message in stream:
        for reply in message.turns:
            assert not reply.HasField("refusal"), reply.refusal
            assert {r.kept.id: r.kept.turn for r in store.scan() if isinstance(r, Record)}[reply.session] == 1
            got[reply.session] = scores(reply)
        if len(got) == 4:
            break
    over.set()
    more.release()
    assert got["b"] == got["c"] == got["d"]
    assert store.commits[4] == ["a"]
    assert sorted(np.concatenate(store.commits[5:])) == ["b", "c", "d"]
    stream.cancel()
