"""Streams of turns played by hand, at a server without port or threads: who asks runs its rounds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from protos import sessions_pb2 as pb
from server.app import App
from server.config import Config
from server.rpc.answer import Answer, Desk
from server.rpc.front import Metadata
from server.rpc.sessions import _Stream
from tests import models

WIDTH = 16


class Wire:
    """A call whose stream of turns is played by hand: no port, no threads."""

    method, metadata, peer, deadline, waiting = "/Turns", (), "here", None, 0

    def __init__(self, app: App) -> None:
        self.replies: list[pb.TurnReply] = []
        self.meanwhile: list[Callable[[], object]] = []  # what comes before the next replies are away
        self.stream = _Stream(app.turns, self, Answer(Desk(app.metrics, False), self, "/Turns"))

    def reply(self, message: bytes, trailing: Metadata = ()) -> None:
        while self.meanwhile:
            self.meanwhile.pop()()
        self.replies += pb.TurnsReply.FromString(message).turns

    def finish(self, trailing: Metadata = ()) -> None:
        raise AssertionError("nobody ended the stream")

    def fail(self, status: object, message: str, trailing: Metadata = ()) -> None:
        raise AssertionError(message)

    def on_gone(self, callback: Callable[[], None]) -> None:
        pass

    def send(self, *turns: pb.TurnRequest) -> None:
        self.stream.on_message(pb.TurnsRequest(turns=turns).SerializeToString())


@contextmanager
def server(store: str, chunk: int = 32, **more: Any) -> Iterator[App]:
    """A server without threads: rounds are run by who asks."""
    with tempfile.TemporaryDirectory() as name:
        models.two_layers(Path(name, "models", "two_layers", "1"), hidden=12)
        place = store.replace("PLACE", f"{name}/store")
        app = App(Config(models=Path(name, "models"), workers=1, chunk=chunk, store=place, metrics_port=-1, **more))
        app.catalog.scan(Path(name, "models"))
        yield app
        app.store.close()


def run(app: App) -> int:
    """Everything that is due; how many rounds that took."""
    app.workers.gather()
    rounds = 0
    while app.workers.step():
        rounds += 1
    return rounds


def request(session: str, number: int, x: np.ndarray, acknowledged: int = 0) -> pb.TurnRequest:
    tensor = pb.Tensor(name="x", datatype="FP32", shape=x.shape, data=x.tobytes())
    return pb.TurnRequest(session=session, turn=number, acknowledged=acknowledged, tensors=pb.Tensors(tensors=[tensor]))


def untimed(reply: pb.TurnReply) -> bytes:
    """A reply without the time it took."""
    plain = pb.TurnReply()
    plain.CopyFrom(reply)
    plain.ClearField("timing")
    return plain.SerializeToString()


def pieces(seed: int, turns: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(1, int(rng.integers(1, 5)), WIDTH)).astype(np.float32) for _ in range(turns)]
