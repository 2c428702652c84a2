"""A device, or a thread of the server's own, that fails for good: told apart from an input that can't be run and from memory that is
full, and survived by sessions."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from contract.bundle import BundleError
from protos import seqserve_pb2 as tasks_pb
from protos import sessions_pb2 as pb
from server import probes
from server.app import App
from server.catalog import Catalog, Model
from server.config import Config
from server.devices import Device, Placement
from server.errors import DeviceLost
from server.graph import OnnxGraph, together
from server.rounds import Limits
from tests import models
from tests.lost import Far
from tests.process import ROOT, Served, reason, running, serve
from tests.test_engine import Bench, alone, equal
from tests.test_turns import scores, turn


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    models.library(root)
    return root


def test_a_failure_is_the_devices_where_it_fails_all() -> None:
    """What fails on a device that then does the smallest run is told as it was; what fails on one that doesn't is the device's loss, which
    stays; a device whose loss nobody can tell, as a CPU, keeps its errors."""
    works = [True]
    device = Far("cpu", 7)

    def probe() -> bool:
        with together(device):  # its own failure is not asked about again
            if not works[0]:
                raise RuntimeError("CUDA failure 719")
        return True

    def fail(where: Device) -> None:
        with together(where):
            raise MemoryError("full")

    probes.keep(device, probe)
    with pytest.raises(MemoryError):
        fail(device)
    with pytest.raises(MemoryError):
        fail(Far("cpu", 8))
    works[0] = False
    with pytest.raises(DeviceLost, match=r"device cpu:7 can't be used any more.*send the request again \(CUDA failure 719\)"):
        fail(device)
    works[0] = True
    assert "CUDA failure 719" in str(probes.lost(device))
    with pytest.raises(MemoryError):
        fail(Device())
    probes.keep(device, lambda: False)
    assert "it computes nonsense" in str(probes.lost(device))


class Rounds:
    """What a graph is asked to run, by rows; fails as `fails` says."""

    def __init__(self, graph: OnnxGraph, fails: Any) -> None:
        self.rows: list[int] = []
        self._advance = graph.advance
        self._fails = fails
        graph.advance = self  # type: ignore[assignment]

    def __call__(self, feeds: dict[str, Any], carried: Any) -> Any:
        self.rows.append(len(feeds["tokens"]))
        if (error := self._fails(feeds["tokens"])) is not None:
            raise error
        return self._advance(feeds, carried)


def failing(library: Path, fails: Any) -> tuple[Bench, Rounds, list[Any]]:
    """64 texts in one round of a graph that fails so, and who asked."""
    bench = Bench(library, Limits(rows=64, chunk=50))
    rounds = Rounds(bench.catalog.find("reader").engine.graphs["step"], fails)
    texts = [np.full((1, 5), i) % models.VOCABULARY for i in range(64)]
    for i, tokens in enumerate(texts):
        bench.ask("reader", i, tokens=tokens)
    bench.run()
    return bench, rounds, texts


def test_halves_find_who_can_not_be_run(library: Path) -> None:
    """One row that can't be run among 64 is found in 13 runs, not 65; all others are answered as alone."""
    bench, rounds, texts = failing(library, lambda tokens: ValueError("bad") if (tokens == 21).any() else None)
    assert len(rounds.rows) == 13
    for i, tokens in enumerate(texts):
        if (tokens == 21).any():
            assert "could not run this input: bad" in str(bench.answers[i])
        else:
            assert equal(bench.answers[i], alone(reader_of(library), tokens=tokens))


def test_a_round_too_large_for_the_memory_is_run_in_parts(library: Path) -> None:
    """Where so many rows don't fit, halves of them may: nobody is refused."""
    bench, rounds, texts = failing(library, lambda tokens: MemoryError("full") if len(tokens) > 20 else None)
    assert rounds.rows == [64, 32, 16, 16, 32, 16, 16]
    for i, tokens in enumerate(texts):
        assert equal(bench.answers[i], alone(reader_of(library), tokens=tokens))


def reader_of(library: Path) -> Model:
    return Bench(library, Limits()).catalog.find("reader")


def test_a_lost_device_is_asked_once(library: Path) -> None:
    """No row is tried alone, all are told to come again, and so is who comes now; whoever is to end the server hears of it once."""
    heard: list[DeviceLost] = []
    bench = Bench(library, Limits(rows=8))
    bench.workers.when_lost = heard.append
    rounds = Rounds(bench.catalog.find("reader").engine.graphs["step"], lambda tokens: DeviceLost("DEVICE_LOST", "gone", device="cuda:0"))
    for i in range(16):
        bench.ask("reader", i, tokens=np.full((1, 5), i))
    bench.run()
    assert rounds.rows == [8, 8]
    told = [bench.answers[i] for i in range(16)]
    assert {(type(e), e.reason, e.facts["device"]) for e in told} == {(DeviceLost, "DEVICE_LOST", "cuda:0")}
    assert len({id(e) for e in told}) == 16, "each may get facts of its own"
    assert len(heard) == 1
    with pytest.raises(DeviceLost, match="gone"):
        bench.ask("reader", 99, tokens=np.full((1, 5), 1))


def test_what_lay_on_a_lost_device_only(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With durability none the sessions whose states are gone are counted in the log, and the server ends as it should."""
    when = tmp_path / "lost"
    monkeypatch.setenv("LOST_WHEN", str(when))
    command = [sys.executable, "-m", "tests.lost", "--models", str(library), "--port", "0", "--metrics-port", "-1", "--durability", "none"]
    command += ["--store", f"lmdb:{tmp_path / 'store'}"]
    with running(command, ROOT, r"serving \d+ models on \S+:(\d+)") as (process, found, log):
        served = Served(process, int(found[1]), 0, log)
        ask = served.method("/seqserve.v1.Sessions/Turn", pb.TurnReply)
        for name in ("a", "b", "fresh"):
            served.method("/seqserve.v1.Sessions/Open", pb.SessionInfo)(pb.OpenRequest(session=name, model=tasks_pb.Model(name="reader")))
        ask(turn("a", 1, np.ones(5, np.int64)))
        ask(turn("b", 1, np.ones(5, np.int64)))
        when.touch()
        with pytest.raises(grpc.RpcError, match="can't be used any more"):
            ask(turn("a", 2, np.ones(5, np.int64)))
        assert process.wait(60) == 70
        served.channel.close()
    assert any("2 sessions are gone" in line for line in log)
    assert not any("Traceback" in line for line in log)


def test_a_model_may_cost_the_device(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device is lost while a model is loaded, the model is refused, and the server is told to end."""
    far = Far("cpu", 5)
    heard: list[DeviceLost] = []
    bench = Bench(library, Limits())
    bench.workers.when_lost = heard.append
    probes.keep(far, lambda: False)
    monkeypatch.setattr("server.trial.agree", lambda *_: ["it is off"])
    with pytest.raises(BundleError, match="it is off"):
        Catalog(bench.workers, Limits(), bench.metrics, 256, Placement((far,))).load(library / "reader" / "1")
    assert [e.facts["device"] for e in heard] == ["cpu:5"]


def test_sessions_outlive_a_device(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose device is lost refuses the turn so that it may be sent again, calls itself not serving, and ends with its own exit
    status; one that starts on the store takes the same turn, and all is as if nothing had been."""
    when = tmp_path / "lost"
    monkeypatch.setenv("LOST_WHEN", str(when))
    store = f"lmdb:{tmp_path / 'store'}"
    tokens = np.random.default_rng(3).integers(0, models.VOCABULARY, 40)
    pieces = np.split(tokens, [9, 20, 31])
    command = [sys.executable, "-m", "tests.lost", "--models", str(library), "--port", "0", "--metrics-port", "-1", "--store", store]
    with running(command, ROOT, r"serving \d+ models on \S+:(\d+)") as (process, found, log):
        served = Served(process, int(found[1]), 0, log)
        ask = served.method("/seqserve.v1.Sessions/Turn", pb.TurnReply)
        served.method("/seqserve.v1.Sessions/Open", pb.SessionInfo)(pb.OpenRequest(session="s", model=tasks_pb.Model(name="reader")))
        read = b"".join(scores(ask(turn("s", number, piece))) for number, piece in enumerate(pieces[:2], 1))
        when.touch()
        with pytest.raises(grpc.RpcError) as refused:
            ask(turn("s", 3, pieces[2]))
        code, why, facts, _ = reason(refused.value)
        assert (code, why) == (grpc.StatusCode.UNAVAILABLE, "DEVICE_LOST")
        assert (facts["session"], facts["turn"], facts["device"]) == ("s", "2", "cpu:1")
        assert process.wait(60) == 70
        served.channel.close()
    assert any("CRITICAL" in line and "can't be used any more" in line for line in log)
    assert not any("Traceback" in line for line in log)
    with serve(library, "--store", store) as again:
        ask = again.method("/seqserve.v1.Sessions/Turn", pb.TurnReply)
        read += b"".join(scores(ask(turn("s", number, piece))) for number, piece in enumerate(pieces[2:], 3))
    assert read == alone(reader_of(library), tokens=tokens[None])["scores"].tobytes()


@pytest.mark.parametrize("who", ["worker", "seqserve-front"])
def test_a_thread_that_fails_ends_the_server(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    """A fault of the server's own, where none was foreseen: callers are told to come again, nobody waits for good, and one that is started
    on the store goes on."""
    when = tmp_path / "dies"
    monkeypatch.setenv("DIES_WHEN", str(when))
    monkeypatch.setenv("DIES_WHO", who)
    store = f"lmdb:{tmp_path / 'store'}"
    tokens = np.random.default_rng(4).integers(0, models.VOCABULARY, 20)
    command = [sys.executable, "-m", "tests.dying", "--models", str(library), "--port", "0", "--metrics-port", "-1", "--store", store]
    command += ["--drain-seconds", "1"]
    with running(command, ROOT, r"serving \d+ models on \S+:(\d+)") as (process, found, log):
        served = Served(process, int(found[1]), 0, log)
        ask = served.method("/seqserve.v1.Sessions/Turn", pb.TurnReply)
        served.method("/seqserve.v1.Sessions/Open", pb.SessionInfo)(pb.OpenRequest(session="s", model=tasks_pb.Model(name="reader")))
        read = scores(ask(turn("s", 1, tokens[:9])))
        when.touch()
        with pytest.raises(grpc.RpcError) as refused:
            ask(turn("s", 2, tokens[9:]))
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert process.wait(60) == 70
        served.channel.close()
    assert any("CRITICAL" in line and f"thread {who}" in line and "changed size" in line for line in log)
    with serve(library, "--store", store) as again:
        read += scores(again.method("/seqserve.v1.Sessions/Turn", pb.TurnReply)(turn("s", 2, tokens[9:])))
    assert read == alone(reader_of(library), tokens=tokens[None])["scores"].tobytes()


def test_a_server_is_ended_once(library: Path) -> None:
    """However many threads fail: a second signal would end the process amid what it still answers."""
    app = App(Config(models=library, port=0, metrics_port=-1))
    heard: list[str | None] = []

    def when() -> None:
        heard.append(app.failure)
        app.fail("for what the first led to")

    app.when_failed = when
    app.fail("for this")
    app.fail("for that")
    assert heard == ["for this"]
    assert app.failure == "for this"
    app.store.close()
