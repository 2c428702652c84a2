"""Callers that behave badly, against a server, until their time is over: what `make soak` lets loose beside well-behaved ones.

cancel storms      calls begun by the dozen and cancelled within milliseconds
abandoned streams  the connection of a stream with work under way is reset
half-open          a connection with a stream goes silent: nothing is read or sent any more, nothing closed
slow readers       streams whose replies are not read, while turns go on being sent
oversized          messages larger than the server takes, and bytes that are no message
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import numpy as np

from protos import seqserve_pb2 as pb
from protos import sessions_pb2 as sessions

TASKS, SESSIONS = "/seqserve.v1.Tasks/", "/seqserve.v1.Sessions/"
TEXT = "A slow start, but the last hour is superb and the ending will stay with me for years. " * 30
STORM = 24  # calls at once
SILENT = 100.0  # seconds that our end of a half-open connection is kept: longer than a server needs to notice
MAX_BYTES = 16 << 20  # the server's default
MODEL = pb.Model(name="sentiment")


class Relay:
    """A connection through us, which can be reset or fall silent: what a lost machine, or a broken network, does to a server."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._pairs: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []
        self._pumps: list[asyncio.Task[None]] = []
        self.port = 0

    async def __aenter__(self) -> Relay:
        self._listening = await asyncio.start_server(self._joined, "127.0.0.1", 0)
        self.port = self._listening.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.silence()
        self._listening.close()
        for pair in self._pairs:
            for end in pair:
                end.close()

    async def _joined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to, back = await asyncio.open_connection("127.0.0.1", self._port)
        self._pairs.append((back, writer))
        self._pumps += [asyncio.create_task(_pump(reader, back)), asyncio.create_task(_pump(to, writer))]

    def silence(self) -> None:
        """Carry nothing any more, and tell nobody."""
        for pump in self._pumps:
            pump.cancel()

    def reset(self) -> None:
        """End the connection to the server as a crash does."""
        self.silence()
        for back, _ in self._pairs:
            raw = back.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            back.transport.abort()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()


class Abusers:
    def __init__(self, port: int) -> None:
        self.port = port
        self.done: Counter[str] = Counter()
        self._dice = random.Random(3)
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.max_send_message_length", -1)])
        self._kept: set[asyncio.Task[None]] = set()

    async def cancel_storm(self) -> None:
        """Calls begun together, each cancelled after up to 30 ms."""

        async def one(n: int) -> None:
            if n % 2:
                call = self._channel.unary_stream(TASKS + "TranslateStream")(
                    pb.TranslateRequest(text=TEXT[:200], beam=5).SerializeToString()
                )
            else:
                call = self._channel.unary_unary(TASKS + "Classify")(pb.ClassifyRequest(texts=[TEXT]).SerializeToString())
            await asyncio.sleep(self._dice.random() * 0.03)
            call.cancel()

        await asyncio.gather(*(one(n) for n in range(STORM)))
        self.done["calls cancelled"] += STORM

    async def abandoned(self) -> None:
        """A stream of turns, reset in the middle."""
        async with Relay(self.port) as relay, _session(self, relay.port) as (_, call, id):
            await call.write(_turns(id, 1, 50))
            await asyncio.sleep(self._dice.random() * 0.05)
            relay.reset()
        self.done["streams abandoned"] += 1

    async def half_open(self) -> None:
        """A stream that goes silent for longer than anybody waits."""

        async def hold() -> None:
            async with Relay(self.port) as relay, _session(self, relay.port) as (_, call, id):
                await call.write(_turns(id, 1, 5))
                await call.read()
                relay.silence()
                await asyncio.sleep(SILENT)

        task = asyncio.create_task(hold())
        self._kept.add(task)
        task.add_done_callback(self._over)
        self.done["connections half-open"] += 1

    async def slow_reader(self) -> None:
        """Turns sent as long as they are taken, the replies unread for seconds."""
        async with _session(self, self.port) as (_, call, id):
            with contextlib.suppress(asyncio.TimeoutError):
                async with asyncio.timeout(3):
                    for n in range(20):
                        await call.write(_turns(id, 1 + 50 * n, 50))
                    await asyncio.sleep(3)
        self.done["slow readers"] += 1

    async def oversized(self) -> None:
        """A message over the limit, and one that is none."""
        big = pb.ClassifyRequest(texts=["x" * (MAX_BYTES + 1)]).SerializeToString()
        for request in (big, b"\xff" * 1000):
            try:
                await self._channel.unary_unary(TASKS + "Classify")(request)
            except grpc.aio.AioRpcError as e:
                self.done[f"refused {e.code().name}"] += 1

    def _over(self, task: asyncio.Task[None]) -> None:
        self._kept.discard(task)
        if not task.cancelled() and (fault := task.exception()) is not None:
            self.done[f"failed {type(fault).__name__}"] += 1

    async def close(self) -> None:
        for task in self._kept:
            task.cancel()
        await asyncio.gather(*self._kept, return_exceptions=True)
        await self._channel.close()


@contextlib.asynccontextmanager
async def _session(abusers: Abusers, port: int) -> AsyncIterator[tuple[grpc.aio.Channel, grpc.aio.StreamStreamCall[bytes, bytes], str]]:
    """A session that nobody will close, and a stream for its turns."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]  # a connection of its own
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
        opened = await channel.unary_unary(SESSIONS + "Open")(sessions.OpenRequest(model=MODEL, ttl=20).SerializeToString())
        call = channel.stream_stream(SESSIONS + "Turns")()
        try:
            yield channel, call, sessions.SessionInfo.FromString(opened).session
        finally:
            call.cancel()


def _turns(id: str, first: int, count: int) -> bytes:
    data = np.arange(10, 42, dtype="<i8").tobytes()
    tensor = sessions.Tensor(name="tokens", datatype="INT64", shape=[1, 32], data=data)
    request = sessions.TurnsRequest()
    for turn in range(first, first + count):
        request.turns.add(session=id, turn=turn, acknowledged=0, tensors=sessions.Tensors(tensors=[tensor]))
    return request.SerializeToString()


async def run(port: int, seconds: float) -> Counter[str]:
    """All of them side by side for so long; gives what was done."""
    abusers = Abusers(port)
    end = time.monotonic() + seconds

    async def again(what: Callable[[], Awaitable[None]], pause: float) -> None:
        while time.monotonic() < end:
            try:
                await what()
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, OSError) as e:  # what the server, or a reset, made of it
                status = e.code().name if isinstance(e, grpc.aio.AioRpcError) else type(e).__name__
                abusers.done[f"{what.__name__} ended by {status}"] += 1
            await asyncio.sleep(pause)

    every = (
        (abusers.cancel_storm, 0.25),
        (abusers.abandoned, 0.2),
        (abusers.half_open, 2.0),
        (abusers.slow_reader, 0.5),
        (abusers.oversized, 1.0),
    )
    await asyncio.gather(*(again(what, pause) for what, pause in every))
    await abusers.close()
    return abusers.done


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.figures.abuse", description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("seconds", type=float)
    options = parser.parse_args()
    for what, count in sorted(asyncio.run(run(options.port, options.seconds)).items()):
        print(f"{count:7,} {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
