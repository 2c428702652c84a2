"""Lean clients for what perf_analyzer does not speak, Turns, Translate and Classify of seqserve.v1; and for ModelInfer where it is not at
hand. Each runs as a process of its own, `python -m tests.figures.bench_clients turns|translate|classify|infer`, and prints one line of
JSON: calls a second, p50 and p99 in ms, and all calls that were answered.

It knows seqserve's messages; it must not know servers' insides, models' weights or what is expected of speed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from protos import inference_pb2 as inference
from protos import seqserve_pb2 as tasks
from protos import sessions_pb2 as pb

WARM = 0.5  # seconds of load before anything counts


class Tally:
    """Answers as they arrive, counted from a moment on."""

    def __init__(self, seconds: float) -> None:
        self.begin = time.perf_counter() + WARM
        self.end = self.begin + seconds
        self.answers = self.all = 0
        self.latencies: list[float] = []

    def add(self, sent: float, now: float, answers: int) -> None:
        self.all += answers
        if self.begin <= now <= self.end:
            self.answers += answers
            self.latencies.append(now - sent)

    def line(self, **more: Any) -> str:
        p50, p99 = np.quantile(self.latencies, (0.5, 0.99)) * 1e3
        return json.dumps({"rate": self.answers / (self.end - self.begin), "p50": float(p50), "p99": float(p99), "all": self.all, **more})


def _as_it_is(data: bytes) -> bytes:
    return data


def _varint(n: int) -> bytes:
    """Three bytes whatever the number, so that a message's other parts stay as they are."""
    return bytes((n & 127 | 128, n >> 7 & 127 | 128, n >> 14))


class Group:
    """Sessions whose turns travel in one message, put together from parts made once: the client must not be what is measured."""

    def __init__(self, ids: list[str], numbers: list[int], inputs: list[bytes]) -> None:
        self.turn = 0
        self.sent = 0.0
        self.due = 0
        self._heads = [b"\x0a%c%b\x10" % (len(id), id.encode()) for id in ids]
        self._numbers = numbers
        self._inputs = inputs

    def message(self) -> bytes:
        """The next turn of every session."""
        self.turn += 1
        middle = b"%b\x18%b" % (_varint(self.turn), _varint(self.turn - 1))
        parts: list[bytes] = []
        for head, number in zip(self._heads, self._numbers, strict=True):
            brought = self._inputs[(7 * number + self.turn) % len(self._inputs)]
            parts += (b"\x0a", _varint(len(head) + len(middle) + len(brought)), head, middle, brought)
        self.due = len(self._heads)
        return b"".join(parts)


def inputs() -> list[bytes]:
    """Sixty-four turns' tensors for model B, as they lie in a TurnRequest."""
    drawn = np.random.default_rng(0).normal(size=(64, 1, 1, 16)).astype(np.float32)
    tensors = [pb.Tensors(tensors=[pb.Tensor(name="x", datatype="FP32", shape=x.shape, data=x.tobytes())]) for x in drawn]
    return [pb.TurnRequest(tensors=t).SerializeToString() for t in tensors]


def drive(channel: grpc.Channel, groups: list[Group], tally: Tally) -> None:
    """One stream: each group sends its next turns when all that it sent were answered."""
    out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    of = {head[2:-1].decode(): group for group in groups for head in group._heads}
    for group in groups:
        group.sent = time.perf_counter()
        out.put(group.message())
    under_way = len(groups)
    for data in channel.stream_stream("/seqserve.v1.Sessions/Turns", _as_it_is, _as_it_is)(iter(out.get, None)):
        now = time.perf_counter()
        for reply in pb.TurnsReply.FromString(data).turns:
            group = of[reply.session]
            group.due -= 1
            if reply.turn != group.turn or not reply.HasField("tensors"):
                raise AssertionError(f"session {reply.session}, turn {group.turn}: answered {reply}")
            if not group.due:
                tally.add(group.sent, now, len(group._heads))
                if now > tally.end:
                    under_way -= 1
                else:
                    group.sent = now
                    out.put(group.message())
        if not under_way:
            out.put(None)


def turns(channel: grpc.Channel, model: str, sessions: int, together: int, streams: int, seconds: float) -> str:
    """A closed loop of sessions, `together` of them a message."""
    prefix = f"bench-{time.time_ns()}"
    ids = [f"{prefix}-{n}" for n in range(sessions)]
    opening = channel.unary_unary("/seqserve.v1.Sessions/Open", pb.OpenRequest.SerializeToString, pb.SessionInfo.FromString)
    closing = channel.unary_unary("/seqserve.v1.Sessions/Close", pb.SessionName.SerializeToString, pb.SessionInfo.FromString)
    for call in [opening.future(pb.OpenRequest(session=id, model=tasks.Model(name=model))) for id in ids]:
        call.result()
    brought = inputs()
    groups = [Group(ids[at : at + together], list(range(sessions))[at : at + together], brought) for at in range(0, sessions, together)]
    tally = Tally(seconds)
    failed: list[BaseException] = []

    def run(mine: list[Group]) -> None:
        try:
            drive(channel, mine, tally)
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=run, args=(mine,), daemon=True) for at in range(streams) if (mine := groups[at::streams])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    for closed in [closing.future(pb.SessionName(session=id)) for id in ids]:
        closed.result()
    return tally.line()


def steps(model: str) -> list[bytes]:
    """Sixty-four requests for model B, one step each, as ModelInfer takes them."""
    drawn = np.random.default_rng(0).normal(size=(64, 1, 1, 16)).astype(np.float32)
    made = [inference.ModelInferRequest(model_name=model, raw_input_contents=[x.tobytes()]) for x in drawn]
    for request in made:
        request.inputs.add(name="x", datatype="FP32", shape=drawn[0].shape)
    return [request.SerializeToString() for request in made]


def asked(what: str, texts: list[str]) -> list[bytes]:
    """A request for each text."""
    made = [tasks.TranslateRequest(text=t, beam=1) if what == "translate" else tasks.ClassifyRequest(texts=[t]) for t in texts]
    return [request.SerializeToString() for request in made]


METHODS = {
    "translate": "/seqserve.v1.Tasks/Translate", "classify": "/seqserve.v1.Tasks/Classify",
    "infer": "/inference.GRPCInferenceService/ModelInfer",
}  # fmt: skip


async def ask_all(port: int, what: str, requests: list[bytes], callers: int, whole: bool, seconds: float) -> str:
    """Texts translated greedily, or classified, or single steps, one a call, `callers` under way at once; `whole`: each once, else
    round and round for a while. Replies are taken as bytes and read when all is over: threads and parsing took this client as much of
    the two cores as the server had."""
    tally = Tally(seconds)
    if whole:
        tally.begin, tally.end = time.perf_counter(), float("inf")
    replies: list[bytes] = []
    numbers = iter(range(len(requests))) if whole else itertools.count()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.max_receive_message_length", -1)]) as channel:
        ask = channel.unary_unary(METHODS[what])

        async def caller() -> None:
            for number in numbers:
                sent = time.perf_counter()
                replies.append(await ask(requests[number % len(requests)]))
                now = time.perf_counter()
                tally.add(sent, now, 1)
                if now > tally.end:
                    return

        await asyncio.gather(*(caller() for _ in range(callers)))
    tally.end = min(tally.end, time.perf_counter())
    return tally.line(tokens=sum(_tokens(what, reply) for reply in replies), texts=len(replies))


def _tokens(what: str, reply: bytes) -> int:
    if what == "infer":
        return 0
    if what == "translate":
        return len(tasks.TranslateReply.FromString(reply).tokens)
    return sum(result.tokens for result in tasks.ClassifyReply.FromString(reply).results)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.figures.bench_clients", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=["turns", "translate", "classify", "infer"])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="model_b")
    parser.add_argument("--sessions", type=int, default=256)
    parser.add_argument("--together", type=int, default=32, help="sessions whose turns share a message")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--texts", type=Path, help="one text a line")
    parser.add_argument("--whole", action="store_true", help="every text once")
    options = parser.parse_args()
    with grpc.insecure_channel(f"127.0.0.1:{options.port}", [("grpc.max_receive_message_length", -1)]) as channel:
        if options.what == "turns":
            print(turns(channel, options.model, options.sessions, options.together, options.streams, options.seconds))
        else:
            texts = [] if options.what == "infer" else options.texts.read_text(encoding="utf-8").splitlines()
            requests = steps(options.model) if options.what == "infer" else asked(options.what, texts)
            print(asyncio.run(ask_all(options.port, options.what, requests, options.callers, options.whole, options.seconds)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
