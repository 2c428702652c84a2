"""What the server's own Python costs a turn and a call: `make turn-cost`. One thread, no gRPC, no other process: messages are
given to the handlers as the front gives them, rounds are run when all are taken. Two LSTM layers of 256, one step, 256 sessions.

Printed in µs of the thread's CPU, the best of several passes: taking messages in, and rounds with their replies, onnxruntime
among them. Nothing is judged: it is for finding out where time goes (`--profile`).
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from protos import inference_pb2 as pb
from server.app import App
from server.config import Config
from tests.figures.sessions_bench import INPUTS, TOGETHER, Group, Live, message
from tests.models import two_layers

SESSIONS = 256
PASSES = 6
MODEL = "two_layers"


class _Call:
    """A call whose caller is nobody. Satisfies front.Call as far as it is used."""

    method = peer = "nobody"
    metadata = ()
    deadline = None
    waiting = 0

    def reply(self, message: bytes, trailing: Any = ()) -> None: ...

    def finish(self, trailing: Any = ()) -> None: ...

    def fail(self, status: Any, message: str, trailing: Any = ()) -> None:
        raise AssertionError(f"{status}: {message}")

    def on_gone(self, callback: Callable[[], None]) -> None: ...


def _app(directory: Path, store: str) -> App:
    app = App(Config(models=directory / "models", workers=1, store=store))
    app.workers._brief = 1.0  # on a slow machine too this thread runs every round, as there is no other
    app.catalog.scan(directory / "models")
    return app


def turns(app: App, together: int) -> Callable[[], list[Callable[[], None]]]:
    """Each time: the next turn of every session, `together` to a message."""
    stream = app.methods["/seqserve.v1.Sessions/Turns"].start(_Call())
    assert stream is not None
    lives = [Live(n, f"s-{n}") for n in range(SESSIONS)]
    for live in lives:
        app.shelf.open(MODEL, "", live.id)
    groups = [Group(lives[i : i + together]) for i in range(0, SESSIONS, together)]

    def next() -> list[Callable[[], None]]:
        for live in lives:
            live.turn += 1
        return [partial(stream.on_message, message(group)) for group in groups]

    return next


def calls(app: App, sequences: bool) -> Callable[[], list[Callable[[], None]]]:
    """Each time: one unary request of each caller, a step of its sequence or one that stands alone."""
    start = app.methods["/inference.GRPCInferenceService/ModelInfer"].start
    begun = False

    def request(number: int) -> bytes:
        made = pb.ModelInferRequest(model_name=MODEL, id=str(number), raw_input_contents=[INPUTS[number % 64].tobytes()])
        made.inputs.add(name="x", datatype="FP32", shape=INPUTS[0].shape)
        if sequences:
            made.parameters["sequence_id"].int64_param = number + 1
            made.parameters["sequence_start"].bool_param = not begun
        return made.SerializeToString()

    def next() -> list[Callable[[], None]]:
        nonlocal begun
        made = [request(number) for number in range(SESSIONS)]
        begun = True
        return [partial(start, _Call(), data) for data in made]

    return next


def measure(app: App, next: Callable[[], list[Callable[[], None]]], passes: int) -> tuple[float, float]:
    """µs of CPU a turn, at best: taking in, and rounds."""
    best = [float("inf")] * 2
    for _ in range(passes):
        spent = [0.0, 0.0]
        for _ in range(8):
            app.workers.attend()  # as the front's thread
            for take in next():
                began = time.thread_time()
                take()
                taken = time.thread_time()
                while app.workers.enough and app.workers.brief():
                    pass
                spent = [spent[0] + taken - began, spent[1] + time.thread_time() - taken]
            began = time.thread_time()
            while app.workers.brief():
                pass
            spent[1] += time.thread_time() - began
        best = [min(b, s / (8 * SESSIONS) * 1e6) for b, s in zip(best, spent, strict=True)]
    return best[0], best[1]


def main(argv: Sequence[str] | None = None) -> int:
    words = argparse.ArgumentParser(prog="make turn-cost", description=(__doc__ or "").split("\n\n")[0])
    words.add_argument("--profile", action="store_true", help="where the time of turns, 32 a message, goes")
    asked = words.parse_args(argv)
    said = []
    for store in ("memory", "lmdb"):
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            two_layers(directory / "models" / MODEL / "1")
            app = _app(directory, store if store == "memory" else f"lmdb:{directory}/store")
            lines = {f"turns, {TOGETHER} a message": turns(app, TOGETHER)}
            if store == "memory":
                lines |= {"unary steps of sequences": calls(app, True), "unary calls that stand alone": calls(app, False)}
            for title, next in lines.items():
                measure(app, next, 1)
                profile = cProfile.Profile()
                if asked.profile and title.startswith("turns"):
                    profile.enable()
                taken, ran = measure(app, next, PASSES)
                profile.disable()
                print(f"{store}: {title}: {taken:.1f} µs taking in, {ran:.1f} µs rounds and replies")
                said.append(f"{store} {title} {taken + ran:.0f} µs")
                if asked.profile and title.startswith("turns"):
                    pstats.Stats(profile).sort_stats("tottime").print_stats(30)
            app.store.close()
    print("turn-cost · " + " · ".join(said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
