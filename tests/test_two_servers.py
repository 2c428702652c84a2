"""Two servers on one Redis: each takes up the other's sessions, and never do both advance one."""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from contract import bundle as contract
from protos import inference_pb2 as inference_pb
from protos import sessions_pb2 as pb
from server.graph import OnnxGraph
from tests import models
from tests.figures.crash import store
from tests.process import Served, reason, serve
from tests.test_turns import Calls, cut, scores, step, turn

REDIS = shutil.which("redis-server")
if REDIS is None:
    print("test_two_servers.py: no redis-server on this machine, nothing of it is tested", file=sys.__stderr__)


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[Path, list[Served]]]:
    with tempfile.TemporaryDirectory(prefix="sq") as name, ExitStack() as stack:
        library = Path(name, "models")
        models.library(library)
        address = stack.enter_context(store("redis", name))
        yield library, [stack.enter_context(serve(library, "--store", address, "--chunk", "8")) for _ in range(2)]


def inference(tokens: list[int]) -> inference_pb.ModelInferRequest:
    """The same tokens at once, without a session."""
    request = inference_pb.ModelInferRequest(model_name="reader", raw_input_contents=[np.array(tokens, np.int64).tobytes()])
    request.inputs.add(name="tokens", datatype="INT64", shape=[1, len(tokens)])
    return request


def again(call: Any, request: Any) -> Any:
    """A call, sent until it isn't told that another server took the session up meanwhile."""
    while True:
        try:
            return call(request, timeout=60)
        except grpc.RpcError as e:
            if reason(e)[:2] != (grpc.StatusCode.UNAVAILABLE, "SESSION_TAKEN"):
                raise


if REDIS:

    def test_random_writers_against_both(place: tuple[Path, list[Served]]) -> None:
        """Three writers of each session, each sending every turn to either server at random and none waiting for another: every turn
        has one reply, whoever asked and wherever, and all of them are those of the uncut sequence; so each was applied once."""
        library, servers = place
        calls = [Calls(server) for server in servers]
        bundle = contract.load(library / "reader" / "1")
        onnx = OnnxGraph(bundle.graph, library / "reader" / "1" / "step.onnx")

        def write(session: str, seed: int, pieces: list[np.ndarray]) -> list[bytes]:
            rng = random.Random(seed)
            return [again(rng.choice(calls).turn, turn(session, n, piece)) for n, piece in enumerate(pieces, 1)]

        rng = random.Random(5)
        texts = [np.array([rng.randrange(models.VOCABULARY) for _ in range(rng.randint(30, 120))]) for _ in range(8)]
        with ThreadPoolExecutor(3 * len(texts)) as pool:
            asked = []
            for text in texts:
                pieces = cut(rng, text)
                session = calls[0].new()
                asked.append((session, text, [pool.submit(write, session, rng.randrange(1 << 30), pieces) for _ in range(3)]))
            for session, text, writers in asked:
                replies = [w.result() for w in writers]
                assert replies[0] == replies[1] == replies[2]
                read = b"".join(scores(pb.TurnReply.FromString(r)) for r in replies[0])
                assert read == onnx.run({"tokens": text[None], **{s.input: s.fresh(1) for s in bundle.graph.states}})[0].tobytes()
                for server in calls:
                    assert again(server.get, pb.SessionName(session=session)).turn == len(replies[0])

    def test_what_one_does_the_other_sees(place: tuple[Path, list[Served]]) -> None:
        """A server that has a session in memory from before answers as its last writer left it: its turn, a gap, a fork, an export,
        its end; streams as well as calls."""
        here, there = (Calls(server) for server in place[1])
        a = here.new()
        here.turn(turn(a, 1, [1]))
        for n in (2, 3):
            again(there.turn, turn(a, n, [n]))
        assert again(here.get, pb.SessionName(session=a)).turn == 3
        again(there.turn, turn(a, 4, [4]))
        with pytest.raises(grpc.RpcError) as gap:
            again(here.turn, turn(a, 6, [6]))
        assert reason(gap.value)[1:3] == ("GAP", {"session": a, "turn": "4"})
        again(there.turn, turn(a, 5, [5]))
        (message,) = here.turns(iter([pb.TurnsRequest(turns=[turn(a, 6, [6])])]))
        assert not message.turns[0].HasField("refusal")
        again(there.turn, turn(a, 7, [7]))
        b = again(here.fork, pb.ForkRequest(session=a)).session
        assert again(there.get, pb.SessionName(session=b)).turn == 7
        assert scores(pb.TurnReply.FromString(again(there.turn, turn(b, 8, [8])))) == scores(
            pb.TurnReply.FromString(again(here.turn, turn(a, 8, [8])))
        )
        assert again(there.close, pb.SessionName(session=a)).turn == 8
        for call, request in ((here.get, pb.SessionName(session=a)), (here.turn, turn(a, 9, [9]))):
            with pytest.raises(grpc.RpcError) as gone:
                again(call, request)
            assert reason(gone.value)[1] == "SESSION_CLOSED"

    def test_a_sequence_of_the_open_inference_protocol_goes_to_and_fro(place: tuple[Path, list[Served]]) -> None:
        """Numbered requests of one sequence_id to either server: its steps make the whole; a start begins anew wherever it is sent."""
        infer = [server.method("/inference.GRPCInferenceService/ModelInfer", inference_pb.ModelInferResponse) for server in place[1]]
        tokens = list(range(1, 11))
        for round in range(3):
            read = [
                again(infer[(n + round) % 2 if n % 3 else n % 2], step("to and fro", [t], start=n == 0, end=n == 9, number=n + 1))
                for n, t in enumerate(tokens)
            ]
            made = b"".join(r.raw_output_contents[0] for r in read)
            expected = infer[0](inference(tokens)).raw_output_contents[0]
            assert made == expected

    def test_a_store_that_is_asked_for_nothing(place: tuple[Path, list[Served]]) -> None:
        """With durability none nothing of a session is in Redis until its server stops; then the others have it."""
        library, servers = place
        address = str(servers[1].process.args[servers[1].process.args.index("--store") + 1])  # type: ignore[union-attr,index,arg-type]
        with serve(library, "--store", address, "--durability", "none") as server:
            calls = Calls(server)
            a = calls.new()
            first = calls.turn(turn(a, 1, [1]))
            with pytest.raises(grpc.RpcError) as gap:
                calls.turn(turn(a, 3, [3]))
            assert reason(gap.value)[1] == "GAP"
            assert calls.get(pb.SessionName(session=a)).turn == 1
            assert server.terminate() == 0
        assert Calls(servers[0]).turn(turn(a, 1, [1])) == first

    def test_a_server_goes_and_the_other_goes_on(place: tuple[Path, list[Served]]) -> None:
        """Killed with kill -9 amid its turns: the other server has every answered turn of its sessions."""
        library, servers = place
        there = Calls(servers[1])
        address = servers[1].process.args[servers[1].process.args.index("--store") + 1]  # type: ignore[union-attr,index,arg-type]
        with serve(library, "--store", str(address)) as server:
            here = Calls(server)
            ids = [here.new() for _ in range(20)]
            replies = {id: [here.turn(turn(id, n, [n])) for n in (1, 2)] for id in ids}
            waiting = [here.turn.future(turn(id, 3, [3])) for id in ids]
            server.process.kill()
            answered = [id for id, call in zip(ids, waiting, strict=True) if call.exception(60) is None]
        for id in ids:
            assert [there.turn(turn(id, n, [n])) for n in (1, 2)] == replies[id]
            assert there.get(pb.SessionName(session=id)).turn >= 2 + (id in answered)
            assert scores(pb.TurnReply.FromString(there.turn(turn(id, 3, [3]))))
