"""A small run of `make crash`, and stores that come back damaged or with other models."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import grpc
import pytest
from rich.console import Console
from rich.progress import Progress

from protos import sessions_pb2 as pb
from tests import models
from tests.figures.crash import Server, plans, run
from tests.process import ROOT, reason, serve
from tests.test_turns import Calls, scores, turn


def test_kill_minus_nine(tmp_path: Path) -> None:
    """Sessions of the shipped models, killed three times amid their turns: nothing lost, nothing doubled, every reply as if
    nothing had happened."""
    every = plans(sessions=8, turns=40, seed=3)
    with Progress(console=Console(quiet=True)) as progress:
        undisturbed = run(Server(ROOT / "models", []), every, 0, 1, progress, "")
        crashed = run(Server(ROOT / "models", ["--store", f"lmdb:{tmp_path / 'sessions'}"]), every, 3, 1, progress, "")
    assert crashed.kills == 3
    assert (crashed.lost, crashed.doubled) == (0, 0)
    assert crashed.digests == undisturbed.digests


def test_sigterm_hands_every_session_to_the_store(tmp_path: Path) -> None:
    """With durability none nothing is written until the server stops; then everything is, and goes on in the next."""
    library, flags = tmp_path / "models", ["--store", f"lmdb:{tmp_path / 'sessions'}", "--durability", "none"]
    models.library(library)
    with serve(library, *flags) as server:
        a = Calls(server).new()
        first = scores(pb.TurnReply.FromString(Calls(server).turn(turn(a, 1, [1, 2]))))
        assert server.terminate() == 0
    with serve(library, *flags) as server:
        calls = Calls(server)
        assert scores(pb.TurnReply.FromString(calls.turn(turn(a, 1, [1, 2])))) == first
        assert calls.get(pb.SessionName(session=a)).turn == 1


def test_another_model_under_the_same_name(tmp_path: Path) -> None:
    """A session whose model is gone, or is another by now, is refused with the reason; the others go on."""
    library, flags = tmp_path / "models", ["--store", f"lmdb:{tmp_path / 'sessions'}"]
    models.library(library)
    models.reader(library / "going" / "1", "going")
    with serve(library, *flags) as server:
        calls = Calls(server)
        changed, gone, stays = calls.new("fragile"), calls.new("going"), calls.new("reader")
        for session in (changed, gone, stays):
            calls.turn(turn(session, 1, [1, 2]))
    shutil.rmtree(library / "going")
    models.reader(library / "fragile" / "1", "fragile", seed=9)
    with serve(library, *flags) as server:
        calls = Calls(server)
        for session, why in ((changed, "FINGERPRINT_MISMATCH"), (gone, "MODEL_GONE")):
            with pytest.raises(grpc.RpcError) as caught:
                calls.turn(turn(session, 2, [3]))
            code, found, facts, _ = reason(caught.value)
            assert (code.name, found, facts["turn"]) == ("FAILED_PRECONDITION", why, "1")
        assert calls.turn(turn(stays, 2, [3]))


def test_sessions_beyond_the_memory_cap(tmp_path: Path) -> None:
    """With room for three in memory, twenty sessions go on as if all were there, for each durability; all are listed, all
    survive, and a closed one is gone."""
    library = tmp_path / "models"
    models.library(library)
    rng = random.Random(2)
    pieces = [[rng.randrange(models.VOCABULARY) for _ in range(rng.randint(1, 5))] for _ in range(8)]
    for durability in ("none", "process"):
        store = f"lmdb:{tmp_path / durability}"
        with serve(library, "--store", store, "--durability", durability, "--resident-sessions", "3") as server:
            calls = Calls(server)
            ids = [calls.new() for _ in range(20)]
            read: dict[str, list[bytes]] = {id: [] for id in ids}
            left = [(id, n) for n in range(8) for id in rng.sample(ids, len(ids))]
            for id, n in left:
                read[id].append(scores(pb.TurnReply.FromString(calls.turn(turn(id, n + 1, pieces[n])))))
            assert len({b"".join(r) for r in read.values()}) == 1
            calls.close(pb.SessionName(session=ids[0]))
            listed = calls.list(pb.ListRequest())
            assert [s.session for s in listed.sessions] == sorted(ids[1:])
            assert {s.turn for s in listed.sessions} == {8}
            assert server.terminate() == 0
        with serve(library, "--store", store, "--durability", durability, "--resident-sessions", "3") as server:
            calls = Calls(server)
            assert calls.list(pb.ListRequest()).total == 19
            assert len({scores(pb.TurnReply.FromString(calls.turn(turn(id, 9, [1])))) for id in ids[1:]}) == 1


def test_a_store_in_use(tmp_path: Path) -> None:
    """A second server on the same store says who holds it and ends."""
    library, flags = tmp_path / "models", ["--store", f"lmdb:{tmp_path / 'sessions'}"]
    models.library(library)
    with serve(library, *flags), pytest.raises(AssertionError, match="did not start"), serve(library, *flags):
        pass
