"""Turns of several sessions that arrive together run as the rows of one sequence, and nobody can tell from the replies."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import sessions_pb2 as pb
from server import abreast
from server.app import App
from server.inside import Feed
from server.records import Record
from server.sequence import Sequence
from server.states import Rows
from tests.played import WIDTH, Wire, request, run, server, untimed

MODEL = "two_layers"


def attend(app: App) -> None:
    """From now until `run`, this thread is the front's."""
    app.workers.attend()


def opened(app: App, count: int) -> list[str]:
    ids = [f"s{n}" for n in range(count)]
    for id in ids:
        app.shelf.open(MODEL, "", id)
    return ids


def one(seed: int, steps: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, steps, WIDTH)).astype(np.float32)


def outcomes(app: App) -> dict[str, float]:
    found = {}
    for family in app.metrics.collect():
        if family.name == "seqserve_sequences":
            found = {sample.labels["outcome"]: sample.value for sample in family.samples if sample.name.endswith("_total")}
    return found


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16), sessions=st.integers(2, 40), turns=st.integers(1, 8), chunk=st.sampled_from([3, 32]),
    bad=st.none() | st.integers(0, 60), store=st.sampled_from(["memory", "lmdb:PLACE"]), state=st.sampled_from(["auto", "device"]),
)  # fmt: skip
def test_nobody_can_tell(seed: int, sessions: int, turns: int, chunk: int, bad: int | None, store: str, state: str) -> None:
    """Each turn by itself, or whatever has arrived together, from two streams, some sessions ahead of others, some forked, one turn
    refused: the same outputs, refusals and states."""
    told: list[dict[tuple[str, int], bytes]] = []
    left: list[dict[str, tuple[int, bytes]]] = []
    for together in (False, True):
        rng = random.Random(seed)
        with server(store, chunk, state=state) as app:
            wires = Wire(app), Wire(app)
            ids = opened(app, sessions)
            every = []
            for n in range(turns):
                for s, id in enumerate(ids):
                    x = one(100 * n + s, rng.choice((1, 1, 1, 2, 7)))
                    if n * sessions + s == bad:
                        x[0, -1, 0] = np.nan
                    every.append((s % 2, request(id, n + 1, x)))
            while every:
                count = rng.randint(1, 60)
                here, every = every[:count], every[count:]
                if together:
                    attend(app)
                    for at, wire in enumerate(wires):
                        if mine := [r for where, r in here if where == at]:
                            wire.send(*mine)
                    if rng.random() < 0.7:
                        run(app)
                else:
                    rng.random()
                    for where, r in here:
                        wires[where].send(r)
                        run(app)
            run(app)
            replies = [r for wire in wires for r in wire.replies]
            assert len(replies) == sessions * turns
            for id in ids:
                assert [r.turn for r in replies if r.session == id] == list(range(1, turns + 1))
            told.append({(r.session, r.turn): r.refusal.reason.encode() or untimed(r) for r in replies})
            left.append({})
            for id in ids:
                fork = app.shelf.fork(id, f"{id}-fork")
                kept = app.shelf.get(fork.id)
                rows = kept.state.rows
                left[-1][id] = kept.turn, b"".join(a.tobytes() for a in rows.arrays()) if rows is not None else b""
    assert told[0] == told[1]
    assert left[0] == left[1]


def test_one_sequence_for_all_that_arrived() -> None:
    """Forty turns of two messages: two sequences, one of 32 rows, one of eight; the second time their states lie side by side."""
    seen: list[tuple[int, bool]] = []
    with server("memory") as app:
        ids = opened(app, 40)
        engine = app.catalog.find(MODEL).engine
        enqueue = engine.enqueue

        def noted(s: Sequence, claim: object, now: float) -> None:
            seen.append((s.rows, bool(s.apart)))
            enqueue(s, claim, now)  # type: ignore[arg-type]

        engine.enqueue = noted  # type: ignore[method-assign]
        wire = Wire(app)
        for n in (1, 2, 3):
            attend(app)
            wire.send(*(request(id, n, one(n)) for id in ids[:20]))
            wire.send(*(request(id, n, one(n)) for id in (ids[20:] if n < 3 else ids[:19:-1])))
            assert engine.rounds.tickets == 0, "nothing is queued before all that arrived was taken"
            app.workers.gather()
            assert engine.rounds.tickets == 40, "a queue's length is told in turns"
            assert run(app) == 1
            assert engine.rounds.tickets == 0
        assert len(wire.replies) == 120
        assert outcomes(app) == {"answered": 120}
    assert seen == [(32, False), (8, False), (32, False), (8, False), (32, True), (8, True)]


def test_only_the_culprit_is_told() -> None:
    """One turn of twenty brings what the model does not take: the others are answered, and all go on."""
    with server("lmdb:PLACE") as app:
        ids, wire = opened(app, 20), Wire(app)
        attend(app)
        bad = one(7)
        bad[0, 0, 3] = np.inf
        wire.send(*(request(id, 1, bad if id == "s7" else one(1)) for id in ids))
        run(app)
        assert {r.session for r in wire.replies if r.refusal.code} == {"s7"}
        assert outcomes(app) == {"apart": 20, "answered": 19, "failed": 1}
        attend(app)
        wire.send(*(request(id, 1 if id == "s7" else 2, one(2)) for id in ids))
        run(app)
        assert len(wire.replies) == 40
        assert sum(bool(r.refusal.code) for r in wire.replies) == 1
        assert {r.kept.id: r.kept.turn for r in app.store.scan() if isinstance(r, Record)} == {id: 1 if id == "s7" else 2 for id in ids}


def test_an_answer_that_fails_is_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with server("memory") as app:
        ids, wire = opened(app, 5), Wire(app)
        row = abreast.Views.row

        def broken(views: abreast.Views, at: int) -> abreast.Views:
            if at == 3:
                raise RuntimeError("a bug")
            return row(views, at)

        monkeypatch.setattr(abreast.Views, "row", broken)
        attend(app)
        wire.send(*(request(id, 1, one(1)) for id in ids))
        run(app)
        assert {r.session: r.refusal.reason for r in wire.replies} == {id: "TURN_FAILED" if id == "s3" else "" for id in ids}


def test_closed_before_and_during() -> None:
    """One is closed before its turn is queued, one while it runs; a new session of that id is another."""
    with server("memory") as app:
        ids, wire = opened(app, 6), Wire(app)
        attend(app)
        wire.send(*(request(id, 1, one(1)) for id in ids))
        app.turns.close("s1")
        app.workers.gather()
        app.turns.close("s2")
        app.shelf.open(MODEL, "", "s2")
        run(app)
        told = {r.session: r.refusal.reason for r in wire.replies}
        assert told == {id: "SESSION_CLOSED" if id in ("s1", "s2") else "" for id in ids}
        assert app.shelf.get("s2").turn == 0
        assert app.shelf.get("s3").turn == 1


def test_a_queue_that_is_full() -> None:
    """All are refused together, and may be sent again."""
    with server("memory", max_queue=64) as app:
        ids, wire = opened(app, 128), Wire(app)
        attend(app)
        wire.send(*(request(id, 1, one(1)) for id in ids))
        run(app)
        refused = [r.session for r in wire.replies if r.refusal.reason == "QUEUE_FULL"]
        assert len(refused) == 64
        attend(app)
        wire.send(*(request(id, 1, one(1)) for id in refused))
        run(app)
        assert all(app.shelf.get(id).turn == 1 for id in ids)


def test_who_watches_sees_each_session() -> None:
    with server("memory") as app:
        ids, wire = opened(app, 5), Wire(app)
        feed = Feed(app.workers)
        feed.open()
        attend(app)
        wire.send(*(request(id, 1, one(1)) for id in ids))
        run(app)
        (ran,), _ = feed.since(0, 10)
        assert [(part.session, part.rows) for part in ran.parts] == [(id, 1) for id in ids]
        assert len({part.sequence for part in ran.parts}) == 5
        feed.close()


def test_lots() -> None:
    """A worker's part each, of at least the share, of at most 32."""
    assert [len(lot) for lot in abreast.lots(range(40), 8, 1)] == [32, 8]
    assert [len(lot) for lot in abreast.lots(range(40), 8, 4)] == [10, 10, 10, 10]
    assert [len(lot) for lot in abreast.lots(range(40), 8, 16)] == [8] * 5
    assert [len(lot) for lot in abreast.lots(range(3), 8, 1)] == [3]


def test_side_by_side() -> None:
    bank = (np.zeros((4, 2), np.float32),)
    rows = [Rows((0,), bank, n, 1) for n in range(4)]
    together = abreast.side_by_side(rows[1:])
    assert together is not None
    assert (together.start, together.count) == (1, 3)
    assert abreast.side_by_side(rows[::-1]) is None
    assert abreast.side_by_side([rows[0], None]) is None
    assert abreast.side_by_side([None, rows[0]]) is None
    assert abreast.side_by_side([rows[0], Rows((0,), (bank[0].copy(),), 1, 1)]) is None


def test_a_form_is_known_by_its_bytes() -> None:
    """The same length, another shape or name: read anew, refused where it is wrong."""
    with server("memory") as app:
        wire = Wire(app)
        opened(app, 1)
        good = one(1, 2)
        wrong = request("s0", 2, good)
        wrong.tensors.tensors[0].name = "y"
        other = request("s0", 2, good.reshape(2, 1, WIDTH))
        for asked in (request("s0", 1, good), wrong, other, request("s0", 2, good), request("s0", 3, good)):
            wire.send(asked)
            run(app)
        assert [r.refusal.reason for r in wire.replies] == ["", "UNKNOWN_INPUT", "BAD_ROWS", "", ""]
        two = pb.Tensors(tensors=[pb.Tensor(name="x", datatype="FP32", shape=good.shape, data=good.tobytes())] * 2)
        wire.send(pb.TurnRequest(session="s0", turn=4, tensors=two))
        run(app)
        assert wire.replies[-1].refusal.reason == "REPEATED_INPUT"
