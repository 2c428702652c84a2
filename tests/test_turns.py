"""Live sessions over a real port: cut anywhere, interleaved with anything, retried at any moment, the answers are those of
one whole run alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from contract import bundle as contract
from protos import inference_pb2 as inference_pb
from protos import seqserve_pb2 as tasks_pb
from protos import sessions_pb2 as pb
from server.graph import OnnxGraph
from tests import models
from tests.process import FRONTS, ROOT, Served, reason, serve

SERVICE = "/seqserve.v1.Sessions"
CHUNK = 5


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    models.library(root)
    return root


@pytest.fixture(scope="module", params=list(FRONTS))
def served(request: pytest.FixtureRequest, library: Path) -> Iterator[Served]:
    with serve(library, *FRONTS[request.param], "--chunk", str(CHUNK), "--max-sessions", "200") as server:
        yield server


class Calls:
    """Plain calls to the Sessions service."""

    def __init__(self, server: Served) -> None:
        self.open = server.method(f"{SERVICE}/Open", pb.SessionInfo)
        self.turn = server.method(f"{SERVICE}/Turn")
        self.get = server.method(f"{SERVICE}/Get", pb.SessionInfo)
        self.list = server.method(f"{SERVICE}/List", pb.ListReply)
        self.fork = server.method(f"{SERVICE}/Fork", pb.SessionInfo)
        self.close = server.method(f"{SERVICE}/Close", pb.SessionInfo)
        self.turns = server.channel.stream_stream(f"{SERVICE}/Turns", pb.TurnsRequest.SerializeToString, pb.TurnsReply.FromString)

    def new(self, model: str = "reader", **fields: Any) -> str:
        return str(self.open(pb.OpenRequest(model=tasks_pb.Model(name=model), **fields)).session)


def turn(session: str, number: int, tokens: Any, acknowledged: int = 0) -> pb.TurnRequest:
    array = np.asarray(tokens, np.int64).reshape(1, -1)
    tensor = pb.Tensor(name="tokens", datatype="INT64", shape=array.shape, data=array.tobytes())
    return pb.TurnRequest(session=session, turn=number, acknowledged=acknowledged, tensors=pb.Tensors(tensors=[tensor]))


def scores(reply: pb.TurnReply) -> bytes:
    return bytes(next(t.data for t in reply.tensors.tensors if t.name == "scores"))


def cut(rng: random.Random, tokens: np.ndarray) -> list[np.ndarray]:
    """A sequence in pieces, anywhere."""
    pieces, at = [], 0
    while at < len(tokens):
        size = rng.randint(1, 9)
        pieces.append(tokens[at : at + size])
        at += size
    return pieces


@pytest.fixture(scope="module")
def whole(library: Path) -> Any:
    """The scores of all steps of a sequence, run whole and alone."""
    bundle = contract.load(library / "reader" / "1")
    onnx = OnnxGraph(bundle.graph, library / "reader" / "1" / "step.onnx")
    return lambda tokens: onnx.run({"tokens": tokens[None], **{s.input: s.fresh(1) for s in bundle.graph.states}})[0].tobytes()


def test_unary_turns_make_the_whole(served: Served, whole: Any) -> None:
    """40 sessions at once, each cut in its own pieces, unary; half of all turns sent twice: every piece of every answer is
    that of the uncut sequence, bit for bit, and the second reply is the first."""
    calls = Calls(served)

    def live(seed: int) -> bool:
        rng = random.Random(seed)
        tokens = np.array([rng.randrange(models.VOCABULARY) for _ in range(rng.randint(5, 80))])
        session = calls.new()
        read = b""
        for number, piece in enumerate(cut(rng, tokens), 1):
            request = turn(session, number, piece, acknowledged=max(0, number - 2))
            reply = calls.turn(request)
            if rng.random() < 0.5:
                assert calls.turn(request) == reply
            answer = pb.TurnReply.FromString(reply)
            read += scores(answer)
            assert answer.timing.rounds >= -(-len(piece) // CHUNK)
            assert answer.timing.run > 0
            assert answer.timing.queue >= 0
        calls.close(pb.SessionName(session=session))
        return read == whole(tokens)

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(live, range(40)))


def test_one_stream_carries_many_sessions(served: Served, whole: Any) -> None:
    """30 sessions over one stream, several turns a message, sent ahead without waiting, some twice: replies of each session
    come in order and make the whole."""
    calls, rng = Calls(served), random.Random(1)
    texts = {calls.new(): np.array([rng.randrange(models.VOCABULARY) for _ in range(rng.randint(5, 60))]) for _ in range(30)}
    waiting = {s: [turn(s, n, piece) for n, piece in enumerate(cut(rng, tokens), 1)] for s, tokens in texts.items()}
    sent: list[pb.TurnsRequest] = []
    while waiting:
        message = pb.TurnsRequest()
        for s in rng.sample(sorted(waiting), min(len(waiting), rng.randint(1, 6))):
            request = waiting[s].pop(0)
            message.turns.append(request)
            if rng.random() < 0.2:
                message.turns.append(request)
            if not waiting[s]:
                del waiting[s]
        sent.append(message)
    replies: dict[str, dict[int, list[bytes]]] = {s: {} for s in texts}
    for message in calls.turns(iter(sent)):
        for reply in message.turns:
            assert not reply.HasField("refusal"), reply.refusal
            replies[reply.session].setdefault(reply.turn, []).append(reply.SerializeToString())
    assert sum(len(m.turns) for m in sent) == sum(len(r) for by_turn in replies.values() for r in by_turn.values())
    for s, tokens in texts.items():
        assert list(replies[s]) == sorted(replies[s])
        assert all(len(set(same)) == 1 for same in replies[s].values())
        assert b"".join(scores(pb.TurnReply.FromString(same[0])) for same in replies[s].values()) == whole(tokens)
        calls.close(pb.SessionName(session=s))


def test_a_fork_goes_its_own_way(served: Served, whole: Any) -> None:
    """A fork continues from the same state; what either reads then, the other does not see."""
    calls = Calls(served)
    a = calls.new()
    first = scores(pb.TurnReply.FromString(calls.turn(turn(a, 1, [1, 2, 3]))))
    b = calls.fork(pb.ForkRequest(session=a)).session
    assert calls.get(pb.SessionName(session=b)).turn == 1
    in_b = scores(pb.TurnReply.FromString(calls.turn(turn(b, 2, [7, 7]))))
    in_a = scores(pb.TurnReply.FromString(calls.turn(turn(a, 2, [4, 5]))))
    assert first + in_a == whole(np.array([1, 2, 3, 4, 5]))
    assert first + in_b == whole(np.array([1, 2, 3, 7, 7]))


def refused(call: Any, request: Any) -> tuple[str, str, dict[str, str]]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request)
    code, why, facts, _ = reason(caught.value)
    return code.name, why, facts


def test_refusals(served: Served, whole: Any) -> None:
    """Every refusal has its reason and the last applied turn, and costs the session nothing."""
    calls = Calls(served)
    a = calls.new(session="my own id", ttl=60)
    assert a == "my own id"
    assert refused(calls.turn, turn("nobody", 1, [1]))[:2] == ("NOT_FOUND", "UNKNOWN_SESSION")
    assert refused(calls.turn, turn(a, 2, [1])) == ("FAILED_PRECONDITION", "GAP", {"session": a, "turn": "0"})
    first = scores(pb.TurnReply.FromString(calls.turn(turn(a, 1, [1, 2]))))
    assert refused(calls.turn, turn(a, 1, [3]))[1:] == ("OTHER_INPUT", {"session": a, "turn": "1"})
    assert refused(calls.turn, turn(a, 2, [1], acknowledged=2))[1] == "ACKNOWLEDGED_AHEAD"
    code, why, facts = refused(calls.turn, turn(a, 2, [99]))
    assert (code, why, facts["turn"], facts["tensor"]) == ("INVALID_ARGUMENT", "OUT_OF_RANGE", "1", "tokens")
    assert refused(calls.turn, turn(a, 2, []))[1] == "EMPTY_SEQUENCE"
    assert refused(calls.turn, pb.TurnRequest(session=a, turn=2))[1] == "NO_INPUT"
    assert refused(calls.turn, pb.TurnRequest(session=a, turn=2, text="hi"))[1] == "WRONG_TASK"
    assert refused(calls.turn, pb.TurnRequest(session=a, turn=2, observations=tasks_pb.Series(channels=1, values=[1])))[1] == "WRONG_TASK"
    assert refused(calls.open, pb.OpenRequest(session=a, model=tasks_pb.Model(name="reader")))[1] == "SESSION_EXISTS"
    assert refused(calls.open, pb.OpenRequest(model=tasks_pb.Model(name="nope")))[1] == "UNKNOWN_MODEL"
    assert refused(calls.open, pb.OpenRequest(model=tasks_pb.Model(name="both_ways")))[1] == "NO_STATE"
    assert refused(calls.open, pb.OpenRequest(model=tasks_pb.Model(name="reader"), ttl=-1))[1] == "BAD_TTL"
    assert refused(calls.open, pb.OpenRequest(model=tasks_pb.Model(name="reader"), session="x" * 129))[1] == "BAD_ID"
    second = scores(pb.TurnReply.FromString(calls.turn(turn(a, 2, [5], acknowledged=1))))
    assert first + second == whole(np.array([1, 2, 5]))
    assert refused(calls.turn, turn(a, 1, [1, 2]))[1] == "ACKNOWLEDGED"
    info = calls.get(pb.SessionName(session=a))
    assert (info.turn, info.acknowledged, info.ttl, info.model.name) == (2, 1, 60, "reader")
    assert a in [s.session for s in calls.list(pb.ListRequest()).sessions]
    calls.close(pb.SessionName(session=a))
    assert refused(calls.turn, turn(a, 3, [1])) == ("FAILED_PRECONDITION", "SESSION_CLOSED", {"session": a, "turn": "2"})


def test_a_refusal_in_a_stream_ends_only_its_turn(served: Served, whole: Any) -> None:
    """Bad turns among good ones get refusals in the stream; the good ones are answered, and the stream lives on."""
    calls = Calls(served)
    a = calls.new()
    requests = [turn(a, 1, [1, 2]), turn(a, 5, [1]), turn("nobody", 1, [1]), turn(a, 2, [99]), turn(a, 2, [3, 4])]
    go_on = [threading.Event() for _ in requests]

    def ask() -> Iterator[pb.TurnsRequest]:
        for event, request in zip(go_on, requests, strict=True):
            yield pb.TurnsRequest(turns=[request])
            assert event.wait(30)

    got = []
    for event, message in zip(go_on, calls.turns(ask()), strict=True):
        got.append(message.turns[0])
        event.set()
    assert [r.refusal.reason for r in got] == ["", "GAP", "UNKNOWN_SESSION", "OUT_OF_RANGE", ""]
    assert got[1].refusal.facts["turn"] == "1"
    assert scores(got[0]) + scores(got[4]) == whole(np.array([1, 2, 3, 4]))


def test_what_was_sent_ahead_of_a_refusal_is_refused_too(served: Served, whole: Any) -> None:
    """Two writers: one whose turn the other has taken does not have its next turn applied on top of the other's."""
    calls = Calls(served)
    a = calls.new()
    calls.turn(turn(a, 1, [1, 2]))
    requests = [turn(a, 1, [7]), turn(a, 2, [8]), turn(a, 3, [9]), turn(a, 1, [1, 2]), turn(a, 2, [3])]
    got = [reply for message in calls.turns(iter([pb.TurnsRequest(turns=requests)])) for reply in message.turns]
    assert [r.refusal.reason for r in sorted(got, key=lambda r: not r.HasField("refusal"))] == ["OTHER_INPUT", "GAP", "GAP", "", ""]
    read = [scores(r) for r in got if not r.HasField("refusal")]
    assert b"".join(read) == whole(np.array([1, 2, 3]))


def test_a_broken_stream_loses_nothing(served: Served, whole: Any) -> None:
    """A caller whose stream breaks sends again whatever it has no reply to, and the session is as if nothing had happened."""
    calls, rng = Calls(served), random.Random(7)
    tokens = np.array([rng.randrange(models.VOCABULARY) for _ in range(120)])
    a = calls.new()
    requests = [turn(a, n, piece) for n, piece in enumerate(cut(rng, tokens), 1)]
    read: dict[int, bytes] = {}
    tries = 0
    while len(read) < len(requests):
        tries += 1
        missing = [r for r in requests if r.turn not in read]
        stream = calls.turns(pb.TurnsRequest(turns=[r]) for r in missing)
        for message in stream:
            for reply in message.turns:
                assert not reply.HasField("refusal"), reply.refusal
                read[reply.turn] = scores(reply)
            if len(read) < len(requests) and rng.random() < 0.3:
                stream.cancel()
                break
    assert tries > 2
    assert b"".join(read[n] for n in sorted(read)) == whole(tokens)


def test_expiry(library: Path) -> None:
    """A session lives for its ttl after its last turn; then turns are told that it expired, and after which turn."""
    with serve(library) as server:
        calls = Calls(server)
        a = calls.new(ttl=1.0)
        calls.turn(turn(a, 1, [1]))
        kept = calls.new()
        for _ in range(100_000):  # each look is a real call; they end when the ttl has passed
            if calls.list(pb.ListRequest()).total == 1:
                break
        assert refused(calls.turn, turn(a, 2, [1])) == ("FAILED_PRECONDITION", "SESSION_EXPIRED", {"session": a, "turn": "1"})
        assert calls.get(pb.SessionName(session=kept)).turn == 0


def test_the_quota(library: Path) -> None:
    """One session too many is refused with a time to come back; closing one makes room."""
    with serve(library, "--max-sessions", "2") as server:
        calls = Calls(server)
        a, _ = calls.new(), calls.new()
        assert refused(calls.open, pb.OpenRequest(model=tasks_pb.Model(name="reader")))[:2] == ("RESOURCE_EXHAUSTED", "SESSION_QUOTA")
        calls.close(pb.SessionName(session=a))
        assert calls.new()


REVIEW = (
    "I didn't expect much.<br /><br />But what a film! The actors (all of them, really) are superb; the ending isn't < the rest, "
    "it's  better... 10/10,\nwould watch again & again.<br/>Don't miss it"
)


@pytest.fixture(scope="module")
def shipped() -> Iterator[Served]:
    with serve(ROOT / "models") as server:
        yield server


def test_a_text_in_pieces_is_the_text(shipped: Served) -> None:
    """However a review is cut, in words, in tags, in spaces, the score after the last piece is that of the whole review, bit
    for bit; and so it is after every piece, of all that was sent so far."""
    calls = Calls(shipped)
    classify = shipped.method("/seqserve.v1.Tasks/Classify", tasks_pb.ClassifyReply)
    known: dict[str, list[float]] = {}

    def alone(text: str) -> list[float]:
        if text not in known:
            known[text] = [s.score for s in classify(tasks_pb.ClassifyRequest(texts=[text])).results[0].scores]
        return known[text]

    def live(seed: int) -> None:
        rng = random.Random(seed)
        session, so_far, number = calls.new("sentiment"), "", 0
        while so_far != REVIEW:
            piece = REVIEW[len(so_far) : len(so_far) + rng.randint(1, 30)]
            reply = pb.TurnReply.FromString(calls.turn(pb.TurnRequest(session=session, turn=number + 1, text=piece)))
            number += 1
            so_far += piece
            assert [s.score for s in reply.classification.scores] == alone(so_far), so_far
        calls.close(pb.SessionName(session=session))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(live, range(30)))


INFER = "/inference.GRPCInferenceService/ModelInfer"


def step(id: Any, tokens: Any, start: bool = False, end: bool = False, number: int | None = None) -> inference_pb.ModelInferRequest:
    array = np.asarray(tokens, np.int64).reshape(1, -1)
    request = inference_pb.ModelInferRequest(model_name="reader", raw_input_contents=[array.tobytes()])
    request.inputs.add(name="tokens", datatype="INT64", shape=array.shape)
    if isinstance(id, str):
        request.parameters["sequence_id"].string_param = id
    else:
        request.parameters["sequence_id"].int64_param = id
    request.parameters["sequence_start"].bool_param = start
    request.parameters["sequence_end"].bool_param = end
    if number is not None:
        request.parameters["turn"].int64_param = number
    return request


@pytest.mark.parametrize("id", [42, "a name"])
def test_sequences_of_the_open_inference_protocol(served: Served, whole: Any, id: Any) -> None:
    """sequence_id, start and end make a session of the same kind: its steps make the whole; a start begins anew; an end
    ends; a numbered step sent again is answered with the same bytes."""
    infer = served.method(INFER)

    def read(*requests: inference_pb.ModelInferRequest) -> bytes:
        return b"".join(inference_pb.ModelInferResponse.FromString(infer(r)).raw_output_contents[0] for r in requests)

    expected = whole(np.array([3, 1, 4, 1, 5]))
    for _ in range(2):
        assert read(step(id, [3, 1], start=True), step(id, [4]), step(id, [1, 5], end=True)) == expected
    assert refused(infer, step(id, [1]))[1] == "SESSION_CLOSED"
    first, second = step(id, [3, 1, 4], start=True, number=1), step(id, [1, 5], number=2)
    replies = [infer(r) for r in (first, first, second, second)]
    assert replies[0] == replies[1]
    assert replies[2] == replies[3]
    for reply in map(inference_pb.ModelInferResponse.FromString, replies):
        assert reply.parameters["rounds"].int64_param >= 1
        assert {"queue_us", "run_us"} <= set(reply.parameters)
    assert b"".join(inference_pb.ModelInferResponse.FromString(r).raw_output_contents[0] for r in replies[::2]) == expected
    assert refused(infer, step(id, [1], number=5))[1] == "GAP"
    assert refused(infer, step(0, [1], start=True))[1] == "BAD_SEQUENCE_ID"
    assert refused(infer, step(id, [99], number=3))[1] == "OUT_OF_RANGE"
    assert infer(step(id, [9], number=3, end=True))


def test_sequences_over_one_inference_stream(served: Served, whole: Any) -> None:
    """ModelStreamInfer carries many sequences and plain requests at once; errors are told in the stream, which lives on."""
    infer = served.channel.stream_stream(
        "/inference.GRPCInferenceService/ModelStreamInfer",
        inference_pb.ModelInferRequest.SerializeToString,
        inference_pb.ModelStreamInferResponse.FromString,
    )
    requests = [step(f"s{i}", [t], start=n == 0, end=n == 4) for n, t in enumerate([3, 1, 4, 1, 5]) for i in range(20)]
    bad = step("another", [99], start=True)
    bad.id = "bad one"
    plain = inference_pb.ModelInferRequest(model_name="reader", id="plain", raw_input_contents=[np.array([3, 1, 4, 1, 5]).tobytes()])
    plain.inputs.add(name="tokens", datatype="INT64", shape=[1, 5])
    plain.parameters["triton_enable_empty_final_response"].bool_param = True
    got = list(infer(iter([*requests[:50], bad, plain, *requests[50:]])))
    read: dict[str, bytes] = {}
    for response in got:
        if "sequence_id" in response.infer_response.parameters:
            id = response.infer_response.parameters["sequence_id"].string_param
            read[id] = read.get(id, b"") + response.infer_response.raw_output_contents[0]
    assert set(read.values()) == {whole(np.array([3, 1, 4, 1, 5]))}
    assert len(read) == 20
    (refusal,) = [r for r in got if r.error_message]
    assert "allowed are 0..49" in refusal.error_message
    assert refusal.infer_response.id == "bad one"
    (answer,) = [r.infer_response for r in got if r.infer_response.id == "plain"]
    assert answer.raw_output_contents[0] == whole(np.array([3, 1, 4, 1, 5]))
    assert answer.parameters["triton_final_response"].bool_param
