"""What a crash costs: `make crash`. Live sessions of every shipped streamable model, a server killed with SIGKILL at random
moments and started again, clients that retry. Prints kills, turns, how many were lost or doubled, and whether every reply is
bit-identical to an uninterrupted run. Fails unless nothing is lost or doubled and all is identical.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from protos import seqserve_pb2 as tasks_pb
from protos import sessions_pb2 as pb
from tests.process import ROOT, Served, reason, serve

TRANSIENT = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED}
WORDS = ("a", "truly", "dull", "film", "but", "the", "acting", "was", "great", "and", "never", "boring", "a waste of time", "wonderful")


@dataclass(slots=True)
class Plan:
    """What one session is to be sent: its model and its turns."""

    id: str
    model: str
    turns: list[pb.TurnRequest] = field(default_factory=list)


@dataclass(slots=True)
class Outcome:
    """What became of all sessions."""

    digests: dict[str, str] = field(default_factory=dict)  # of all replies of a session, in order
    kills: int = 0
    retries: int = 0
    lost: int = 0  # turns that were answered and then unknown to the server
    doubled: int = 0  # turns that the server counts and nobody sent
    seconds: float = 0.0


def plans(sessions: int, turns: int, seed: int) -> list[Plan]:
    """Half of the sessions read a text piece by piece, half observe a series; each its own."""
    made = []
    for number in range(sessions):
        rng = random.Random(seed * 1000 + number)
        plan = Plan(f"crash-{number}", ("sentiment", "forecaster")[number % 2])
        for turn in range(1, turns + 1):
            request = pb.TurnRequest(session=plan.id, turn=turn, acknowledged=max(0, turn - 1))
            if plan.model == "sentiment":
                request.text = " ".join(rng.choices(WORDS, k=rng.randint(1, 4))) + rng.choice(("", " ", ", "))
            else:
                steps = rng.randint(1, 3)
                values = 10 + 5 * np.sin(turn / 4 + np.arange(7)) + np.array([rng.gauss(0, 1) for _ in range(steps * 7)]).reshape(steps, 7)
                request.observations.channels = 7
                request.observations.values.extend(values.ravel().tolist())
            plan.turns.append(request)
        made.append(plan)
    return made


class Server:
    """A server that is killed and comes back on the same port."""

    def __init__(self, models: Path, flags: list[str]) -> None:
        self._models = models
        self._flags = flags
        self._open = ExitStack()
        self.port = 0

    def start(self) -> Served:
        flags = [*self._flags, *(["--port", str(self.port)] if self.port else [])]
        served = self._open.enter_context(serve(self._models, *flags))
        self.port = served.port
        self.process = served.process
        return served

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._open.close()

    def close(self) -> None:
        self._open.close()


class Moments:
    """When to kill: after which turns, counted over all sessions."""

    def __init__(self, at: list[int]) -> None:
        self._at = at
        self._turns = 0
        self._over = False
        self._changed = threading.Condition()

    def turn(self) -> None:
        with self._changed:
            self._turns += 1
            self._changed.notify()

    def end(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify()

    def wait(self) -> bool:
        """Wait for the next moment; False where there is none any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._over or (bool(self._at) and self._turns >= self._at[0]))
            if self._over or not self._at:
                return False
            self._at.pop(0)
            return True


def run(server: Server, every: list[Plan], kills: int, seed: int, progress: Progress, title: str) -> Outcome:
    """Send all turns of all sessions, killing the server `kills` times meanwhile."""
    outcome = Outcome()
    lock = threading.Lock()
    moments = Moments(sorted(random.Random(seed).sample(range(1, sum(len(p.turns) for p in every) * 9 // 10), kills)))
    bar = progress.add_task(title, total=sum(len(p.turns) for p in every))
    server.start()
    began = time.monotonic()

    def killer() -> None:
        while moments.wait():
            server.kill()
            outcome.kills += 1
            server.start()

    def live(plan: Plan) -> None:
        digest = hashlib.sha256()
        with grpc.insecure_channel(
            f"127.0.0.1:{server.port}", [("grpc.max_reconnect_backoff_ms", 200), ("grpc.initial_reconnect_backoff_ms", 50)]
        ) as channel:
            call = {
                name: channel.unary_unary(f"/seqserve.v1.Sessions/{name}", lambda m: m.SerializeToString(), None)
                for name in ("Open", "Turn", "Get")
            }

            def ask(name: str, request: object, accept: str = "") -> bytes:
                while True:
                    try:
                        return call[name](request, timeout=20, wait_for_ready=True)  # type: ignore[no-any-return]
                    except grpc.RpcError as e:
                        if e.code() not in TRANSIENT:
                            if accept and reason(e)[1] == accept:
                                return b""
                            raise
                        with lock:
                            outcome.retries += 1

            model = tasks_pb.Model(name=plan.model)
            ask("Open", pb.OpenRequest(session=plan.id, model=model), accept="SESSION_EXISTS")  # a retried Open may find its own work
            for request in plan.turns:
                reply = pb.TurnReply.FromString(ask("Turn", request))
                reply.ClearField("timing")  # how long it took is no part of the answer
                digest.update(reply.SerializeToString(deterministic=True))
                if request.turn % 10 == 0:
                    there = pb.SessionInfo.FromString(ask("Get", pb.SessionName(session=plan.id))).turn
                    with lock:
                        outcome.lost += max(0, request.turn - there)
                        outcome.doubled += max(0, there - request.turn)
                progress.advance(bar)
                moments.turn()
        with lock:
            outcome.digests[plan.id] = digest.hexdigest()

    thread = threading.Thread(target=killer)
    with ThreadPoolExecutor(len(every)) as pool:
        thread.start()
        try:
            list(pool.map(live, every))
        finally:
            moments.end()
            thread.join()
    outcome.seconds = time.monotonic() - began
    server.close()
    return outcome


@contextmanager
def store(kind: str, directory: str) -> Iterator[str]:
    """The address of a new store; for "redis" with a redis-server of its own, which is not killed."""
    if kind != "redis":
        yield f"lmdb:{directory}/sessions" if kind == "lmdb" else kind
        return
    socket = f"{directory}/redis.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no", "--dir", directory]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if not any("eady to accept connections" in line for line in process.stdout):
            raise RuntimeError("redis-server ended before it was ready")
        yield f"unix://{socket}"
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def main() -> int:
    parser = argparse.ArgumentParser(prog="make crash", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--turns", type=int, default=320, help="of each session")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--store", action="append", help="lmdb, redis (a redis-server is started) or an address; may be given again")
    parser.add_argument("--models", type=Path, default=ROOT / "models")
    options = parser.parse_args()
    kinds = options.store or (["lmdb", "redis"] if shutil.which("redis-server") else ["lmdb"])
    every = plans(options.sessions, options.turns, options.seed)
    turns = options.sessions * options.turns
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    said, bad = [], False
    with Progress(*columns, console=Console()) as progress:
        undisturbed = run(Server(options.models, []), every, 0, options.seed, progress, "undisturbed")
        for kind in kinds:
            with tempfile.TemporaryDirectory() as directory, store(kind, directory) as address:
                crashed = run(Server(options.models, ["--store", address]), every, options.kills, options.seed, progress, f"killed, {kind}")
            differing = [id for id, digest in undisturbed.digests.items() if crashed.digests.get(id) != digest]
            bad |= bool(crashed.lost or crashed.doubled or differing) or crashed.kills < options.kills
            said.append(
                f"{kind}: {crashed.kills} kills, {crashed.retries} retries, {crashed.lost} lost, {crashed.doubled} doubled, "
                f"{'all identical' if not differing else f'{len(differing)} sessions differ'}, {crashed.seconds:.0f} s"
            )
    if "redis" not in kinds and not options.store:
        print("redis-server is not installed: Redis was left out")
    print(f"crash, {turns:,} turns of {options.sessions} sessions (undisturbed {undisturbed.seconds:.0f} s) · " + " · ".join(said))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
