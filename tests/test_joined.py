"""Turns that wait in line run as one sequence, and nobody can tell from the replies."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from contract import bundle as contract
from contract.bundle import Bundle, Graph, State, Tensor
from protos import seqserve_pb2 as tasks_pb
from protos import sessions_pb2 as pb
from server import turns as running
from server.app import App
from server.config import Config
from server.inputs import Sizes
from server.records import Record
from server.rpc import wire as on_the_wire
from server.sequence import Sequence
from tests.models import FLOAT, INT64, OPSET
from tests.played import WIDTH, Wire, pieces, request, run, server, untimed


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16), sessions=st.integers(1, 4), turns=st.integers(1, 30), chunk=st.sampled_from([3, 8, 32]),
    bad=st.none() | st.integers(0, 29), store=st.sampled_from(["memory", "lmdb:PLACE"]),
)  # fmt: skip
def test_nobody_can_tell(seed: int, sessions: int, turns: int, chunk: int, bad: int | None, store: str) -> None:
    """Sent one by one or all ahead, in messages cut anywhere, with a turn among them that is refused: the same output for each
    turn, the same refusal, the same session afterwards, here and in the store. Each tells how long it took, and sent again or
    read from the store it is told as it was the first time."""
    brought = {f"s{n}": pieces(seed + n, turns) for n in range(sessions)}
    if bad is not None and bad < turns:
        brought["s0"][bad] = np.full((1, 1, WIDTH), np.nan, np.float32)
    told: list[dict[tuple[str, int], bytes]] = []
    left: list[dict[str, object]] = []
    for ahead in (False, True):
        with server(store, chunk) as app:
            wire, rng = Wire(app), random.Random(seed)
            for id in brought:
                app.shelf.open("two_layers", "", id)
            every = [request(id, n + 1, x) for n in range(turns) for id, x in ((id, xs[n]) for id, xs in brought.items())]
            while every:
                count = rng.randint(1, 40) if ahead else 1
                wire.send(*every[:count])
                del every[:count]
                if not ahead or rng.random() < 0.3:
                    run(app)
            run(app)
            first = {(r.session, r.turn): r for r in wire.replies}
            assert all(r.timing.rounds >= 1 and r.timing.run > 0 and r.timing.queue >= 0 for r in first.values() if not r.refusal.code)
            told.append({place: r.refusal.reason.encode() or untimed(r) for place, r in first.items()})
            for id in brought:
                assert [r.turn for r in wire.replies if r.session == id] == list(range(1, turns + 1))
            for id, xs in brought.items():
                turn, replies = app.shelf.get(id).turn, app.shelf.get(id).replies
                assert [pb.TurnReply.FromString(a.reply) for a in replies] == [first[id, n + 1] for n in range(turn)]
                again = Wire(app)
                again.send(*(request(id, n + 1, xs[n]) for n in range(turn)))
                assert again.replies == [first[id, n + 1] for n in range(turn)]
            left.append({id: (app.shelf.get(id).turn,) for id in brought})
            if store != "memory":
                kept = {r.kept.id: r for r in app.store.scan() if isinstance(r, Record)}
                for id in brought:
                    live = app.shelf.get(id)
                    assert (kept[id].kept.turn, kept[id].kept.replies) == (live.turn, live.replies)
                    rows = live.state.rows
                    states = b"".join(a.tobytes() for a in rows.arrays()) if rows is not None else b""
                    assert b"".join(a.tobytes() for a in kept[id].arrays or ()) == states
    assert told[0] == told[1]
    assert left[0] == left[1]


@given(st.integers(1, 15), st.floats(0, 1e6), st.floats(0, 1e6), st.integers(0, 2**32 - 1))
def test_timing_as_protobuf_writes_it(field: int, queue: float, run: float, rounds: int) -> None:
    """The bytes that are put together by hand are the message."""
    ran = Sequence("main", {}, Sizes(1, 1), lambda s, outputs: None, lambda e: None)
    ran.queued, ran.run, ran.rounds = queue, run, rounds
    told = on_the_wire.timing(field, ran)
    head = bytes((field << 3 | 2, len(told) - 2))
    assert told[:2] == head
    assert tasks_pb.Timing.FromString(told[2:]) == tasks_pb.Timing(queue=queue, run=run, rounds=rounds)


def _counted(app: App, turns: list[int]) -> Callable[[], None]:
    """What follows a round, that notes the turn which the store has then."""
    after = app.workers.after_round

    def run() -> None:
        after()
        turns.extend(r.kept.turn for r in app.store.scan() if isinstance(r, Record))

    return run


def test_one_round_and_one_commit_for_all_that_wait() -> None:
    """One turn runs, 32 come meanwhile: they take one round more and one commit, each a reply of its own; of 33 the last waits."""
    for waiting, rounds in ((32, 2), (33, 3)):
        with server("lmdb:PLACE") as app:
            wire = Wire(app)
            commits: list[int] = []
            app.shelf.open("two_layers", "", "s")
            app.workers.after_round = _counted(app, commits)
            x = np.ones((1, 1, WIDTH), np.float32)
            wire.send(request("s", 1, x))
            wire.send(*(request("s", n, x) for n in range(2, waiting + 2)))
            assert run(app) == rounds
            assert commits == [1] + [waiting + 1 if waiting == 32 else 33] + [34] * (waiting == 33)
            assert [r.turn for r in wire.replies] == list(range(1, waiting + 2))


def test_numbered_or_not_together() -> None:
    """Turns without a number among numbered ones, joined: what is stored is what is applied, and replies before the last
    without a number are kept no longer."""
    with server("lmdb:PLACE") as app:
        app.shelf.open("two_layers", "", "s")
        heard: list[bytes] = []
        wire = Wire(app)
        x = np.ones((1, 1, WIDTH), np.float32)
        for number in (1, 2, None, 4, None, 6, 7):
            work = running.Asked(
                lambda model, rest: running.Plan(lambda views, ran: b"%d" % len(heard), inputs=((x.tobytes(),), Sizes(1, 1))),
                lambda reply: heard.append(reply if isinstance(reply, bytes) else str(reply).encode()),
            )
            app.turns.turn("s", number, b"" if number is None else b"d%d" % number, work, None if number is None else 0)
        run(app)
        assert len(heard) == 7
        assert not wire.replies
        live = app.shelf.get("s")
        assert (live.turn, live.acknowledged, [a.turn for a in live.replies]) == (7, 5, [6, 7])
        (kept,) = [r for r in app.store.scan() if isinstance(r, Record)]
        assert (kept.kept.turn, kept.kept.acknowledged, kept.kept.replies) == (7, 5, live.replies)


def test_a_session_that_is_closed_amid_joined_turns() -> None:
    """Closed while joined turns run: each is told so, and nothing of the session comes back."""
    with server("lmdb:PLACE") as app:
        wire = Wire(app)
        app.shelf.open("two_layers", "", "s")
        x = np.ones((1, 1, WIDTH), np.float32)
        wire.send(request("s", 1, x))
        wire.send(*(request("s", n, x) for n in range(2, 9)))
        assert app.workers.step()
        app.turns.close("s")
        run(app)
        assert [r.refusal.reason for r in wire.replies] == [""] + 7 * ["SESSION_CLOSED"]
        assert not list(app.store.scan())


def echoes(directory: Path) -> Bundle:
    """tokens [batch, time] → each as a text, and the sum of all so far as a state."""
    directory.mkdir(parents=True)
    nodes = [
        helper.make_node("Cast", ["tokens"], ["said"], to=TensorProto.STRING),
        helper.make_node("Cast", ["tokens"], ["numbers"], to=FLOAT),
        helper.make_node("ReduceSum", ["numbers", "one"], ["sums"], keepdims=1),
        helper.make_node("Add", ["sums", "total"], ["total_next"]),
    ]
    inputs = [helper.make_tensor_value_info("tokens", INT64, ["b", "t"]), helper.make_tensor_value_info("total", FLOAT, ["b", 1])]
    outputs = [
        helper.make_tensor_value_info("said", TensorProto.STRING, ["b", "t"]), helper.make_tensor_value_info("total_next", FLOAT, ["b", 1]),
    ]  # fmt: skip
    graph = helper.make_graph(nodes, "step", inputs, outputs, [helper.make_tensor("one", INT64, [1], [1])])
    onnx.save(helper.make_model(graph, opset_imports=OPSET, ir_version=9), directory / "step.onnx")
    step = Graph(
        "step.onnx", (Tensor("tokens", "int64", ("batch", "time")),), (Tensor("said", "string", ("batch", "time")),),
        (State("total", "total_next", "float32", ("batch", 1)),),
    )  # fmt: skip
    return contract.save(Bundle("echoes", {"step": step}, "step"), directory)


@pytest.mark.parametrize("together", [1, 5])
def test_texts_are_texts(tmp_path: Path, together: int) -> None:
    """A turn's output of texts comes back as texts, alone in a round or with others, one by one or joined: never as whatever
    numpy keeps in their place."""
    echoes(tmp_path / "echoes" / "1")
    app = App(Config(models=tmp_path, workers=1))
    app.catalog.scan(tmp_path)
    wire = Wire(app)
    ids = [f"s{n}" for n in range(together)]
    for id in ids:
        app.shelf.open("echoes", "", id)
    tokens = [np.array([[100 * n, 7]]) for n in range(6)]
    for n, array in enumerate(tokens):
        tensor = pb.Tensor(name="tokens", datatype="INT64", shape=array.shape, data=array.tobytes())
        wire.send(*(pb.TurnRequest(session=id, turn=n + 1, tensors=pb.Tensors(tensors=[tensor])) for id in ids))
    run(app)
    assert len(wire.replies) == 6 * together
    for reply in wire.replies:
        (said,) = reply.tensors.tensors
        texts = [str(100 * (reply.turn - 1)).encode(), b"7"]
        assert (said.datatype, list(said.shape)) == ("BYTES", [1, 2])
        assert said.data == b"".join(len(t).to_bytes(4, "little") + t for t in texts)


def test_replies_leave_in_the_order_in_which_they_were_told() -> None:
    """While a round's replies are on their way, the next turn runs in another thread, and is done first: its reply waits for them."""
    with server("memory") as app:
        wire, xs = Wire(app), pieces(0, 3)
        app.shelf.open("two_layers", "", "a")
        wire.send(request("a", 1, xs[0]))
        wire.meanwhile = [lambda: (wire.send(request("a", 2, xs[1])), run(app))]
        run(app)
        assert [r.turn for r in wire.replies] == [1, 2]


def test_a_turn_sent_again_before_it_is_told_of_is_told_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two turns were applied together; before the first is told of, the second comes again."""
    with server("memory") as app:
        wire, xs = Wire(app), pieces(0, 3)
        app.shelf.open("two_layers", "", "a")
        wire.send(request("a", 1, xs[0]))
        wire.send(*(request("a", n + 2, x) for n, x in enumerate(xs[1:])))
        assert app.workers.step(), "the first; the others wait, and run together"
        deliver = app.turns._deliver

        def told(*arguments: Any) -> None:
            monkeypatch.undo()
            wire.send(request("a", 3, xs[2]))
            deliver(*arguments)

        monkeypatch.setattr(app.turns, "_deliver", told)
        run(app)
        assert [r.turn for r in wire.replies] == [1, 2, 3, 3]
        assert len({r.SerializeToString() for r in wire.replies}) == 3


def test_large_replies_told_meanwhile_leave_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits while a message is sent may be more than one message can hold."""
    monkeypatch.setattr("server.rpc.sessions.JOINED", 100)
    messages: list[int] = []
    with server("memory") as app:
        wire = Wire(app)
        reply = pb.TurnReply(session="a" * 60).SerializeToString()

        def sent(message: bytes) -> None:
            messages.append(len(pb.TurnsReply.FromString(message).turns))
            if len(messages) == 1:
                for _ in range(5):
                    wire.stream.tell(reply)

        monkeypatch.setattr(wire, "reply", sent)
        wire.stream.tell(reply)
        wire.stream.flush()
    assert messages == [1, 2, 2, 1]
