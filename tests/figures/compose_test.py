"""What a fleet costs its callers when replicas are killed and drained: `make compose-test`.

Builds the images and starts the `fleet` stack of docker-compose.yml; then, for a minute, live sessions read texts piece by piece
through the balancer, beside locust's mix of users, while one replica is killed with SIGKILL, another drained with SIGTERM, then the
first drained too; each comes back.
Every session's last answer is compared with the same text classified at once: equal scores mean that no turn was lost, doubled or
misplaced. Prints requests, failures that reached callers after their client's own retries, turns lost and doubled, sessions that
changed their replica, and latencies before, during and after. Fails unless all four are 0 and sessions did move.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from seqserve import Client, errors
from tests.figures.crash import WORDS
from tests.figures.fleets import Containers, Fleet, Processes
from tests.process import ROOT

TURNS = (20, 200)  # of one session: some outlive both disturbances, some begin amid them
PHASES = {"before": (0.05, 0.20), "killed": (0.20, 0.38), "drained": (0.42, 0.58), "again": (0.62, 0.78), "after": (0.86, 1.0)}
"""When, as parts of the whole time: what is in between is neither quiet nor disturbed."""
REST = 0.12  # a part of the whole time: how long a replica stays away
LOOK = 4.0  # seconds between looks at the store: a command in a container costs tenths of a second of CPU


@dataclass(slots=True)
class Seen:
    """What callers saw, all together."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    took: list[tuple[float, float]] = field(default_factory=list)  # of each request: when it was sent, seconds until its answer
    failures: list[str] = field(default_factory=list)
    lost: int = 0
    doubled: int = 0
    differing: int = 0
    sessions: int = 0


def live(client: Client, name: str, seed: int, began: float, seconds: float, pace: float, seen: Seen) -> None:
    """Sessions one after another until the time is over; each reads a text of its own, piece by piece."""
    rng = random.Random(seed)
    number = 0
    while time.monotonic() - began < seconds:
        number += 1
        try:
            _session(client, f"{name}-{number}", rng, began, seconds, pace, seen)
        except errors.Error as e:
            with seen.lock:
                seen.failures.append(f"{time.monotonic() - began:.1f} s: {type(e).__name__} {e.status} {e.reason}: {e}")


def _session(client: Client, id: str, rng: random.Random, began: float, seconds: float, pace: float, seen: Seen) -> None:
    read, answer = "", None
    with client.session("sentiment", id=id) as session:
        for turn in range(1, rng.randint(*TURNS) + 1):
            piece = " ".join(rng.choices(WORDS, k=rng.randint(1, 4))) + rng.choice((" ", ", "))
            sent = time.monotonic()
            answer = session.send(piece)
            took = time.monotonic() - sent
            read += piece
            with seen.lock:
                seen.took.append((sent - began, took))
            there = session.info().turn if turn % 10 == 0 else turn
            with seen.lock:
                seen.lost += max(0, turn - there)
                seen.doubled += max(0, there - turn)
            if sent - began > seconds:
                break
            time.sleep(pace * rng.uniform(0.5, 1.5))
    assert answer is not None
    whole = client.classify(read, "sentiment")
    with seen.lock:
        seen.sessions += 1
        seen.differing += whole.scores != answer.scores


class Moves:
    """How many times sessions changed their replica, by looking at the store again and again."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._last: dict[str, str] = {}
        self.moved = 0

    def look(self) -> None:
        try:
            now: Mapping[str, str] = self._fleet.owners()
        except RuntimeError:
            return
        self.moved += sum(self._last.get(id, owner) != owner for id, owner in now.items())
        self._last.update(now)


def disturb(fleet: Fleet, began: float, seconds: float, moves: Moves) -> None:
    """Kill the first replica, drain the second, drain the first, each when its phase begins; all come back. The last sends sessions
    to replicas that had them while the first was away, and still have them as they were then."""
    plan = (("killed", "kill", fleet.kill, 0), ("drained", "drain", fleet.drain, 1), ("again", "drain", fleet.drain, 0))
    for phase, what, act, replica in plan:
        start = began + PHASES[phase][0] * seconds
        _look_until(start, moves)
        act(replica)
        print(f"{time.monotonic() - began:5.1f} s: replica {replica + 1}, {what}", flush=True)
        _look_until(start + REST * seconds, moves)
        fleet.back(replica)
        print(f"{time.monotonic() - began:5.1f} s: replica {replica + 1}, back", flush=True)
    _look_until(began + seconds, moves)


def _look_until(moment: float, moves: Moves) -> None:
    while (left := moment - time.monotonic()) > 0:
        time.sleep(min(LOOK, left))
        moves.look()


class Users:
    """Locust's `Mix` beside the sessions, from another process, for so long: what it asked and how that ended."""

    def __init__(self, address: str, count: int, seconds: float) -> None:
        command = [
            sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "Mix", "--host", address, "--headless", "--json", "--skip-log",
            "--users", str(count), "--run-time", str(int(seconds)), "--pause", "0.3", "--retries", "50",
        ]  # fmt: skip
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) if count else None

    def said(self) -> tuple[str, int]:
        """What to say of it, and how many requests failed."""
        if self._process is None:
            return "", 0
        rows = json.loads(self._process.communicate()[0])
        failed, asked = (sum(row[name] for row in rows) for name in ("num_failures", "num_requests"))
        times = sorted((float(ms), count) for row in rows for ms, count in row["response_times"].items())
        every = np.repeat([ms for ms, _ in times], [count for _, count in times])
        p50, p99 = np.percentile(every, (50, 99)) if len(every) else (float("nan"), float("nan"))
        return f"; locust's mix: {asked:,} requests, {failed} failed, ms p50 / p99 {p50:.0f} / {p99:.0f}", failed + (not asked)


def wait_until_served(address: str, seconds: float = 60.0) -> None:
    with Client(address, retries=1000, timeout=seconds) as client:
        client.classify("ready?", "sentiment")


def summary(seen: Seen, moves: Moves, seconds: float, fleet: Fleet) -> tuple[str, bool]:
    """The line that says it all, and whether anything was lost."""
    parts = []
    for name, (first, last) in PHASES.items():
        took = [t for at, t in seen.took if first * seconds <= at < last * seconds]
        p50, p99 = np.percentile(took, (50, 99)) * 1000 if took else (float("nan"), float("nan"))
        parts.append(f"{name} {p50:.0f} / {p99:.0f}")
    line = (
        f"compose-test ({fleet.said()}, {seconds:.0f} s): {len(seen.took):,} requests of {seen.sessions} sessions, "
        f"{len(seen.failures)} failures after retries, {seen.lost} turns lost, {seen.doubled} doubled, {seen.differing} sessions differ, "
        f"{moves.moved} moved, slowest {max((t for _, t in seen.took), default=0.0):.1f} s; ms p50 / p99: " + ", ".join(parts)
    )
    bad = bool(seen.failures or seen.lost or seen.doubled or seen.differing) or not moves.moved or not seen.sessions
    return line, bad


def main() -> int:
    parser = argparse.ArgumentParser(prog="make compose-test", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--sessions", type=int, default=24, help="at once")
    parser.add_argument("--pace", type=float, default=0.1, help="seconds between a caller's turns, on average")
    parser.add_argument("--users", type=int, default=4, help="of locust's mix, beside the sessions")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--base", default="", help="image to build all others from, with Debian's packages: where no registry is reached")
    parser.add_argument("--processes", action="store_true", help="no containers: servers, haproxy and redis-server of this machine")
    options = parser.parse_args()
    fleet: Fleet = Processes() if options.processes else Containers(options.base)
    seen, moves = Seen(), Moves(fleet)
    try:
        fleet.start()
        wait_until_served(fleet.address)
        began = time.monotonic()
        with Client(fleet.address) as client, ThreadPoolExecutor(options.sessions) as pool:
            every = [
                pool.submit(live, client, f"s{n}", options.seed * 1000 + n, began, options.seconds, options.pace, seen)
                for n in range(options.sessions)
            ]
            users = Users(fleet.address, options.users, options.seconds)
            disturb(fleet, began, options.seconds, moves)
            for one in every:
                one.result()
        line, bad = summary(seen, moves, options.seconds, fleet)
        more, failed = users.said()
    finally:
        fleet.close()
    for failure in seen.failures[:20]:
        print(failure)
    print(line + more)
    return 1 if bad or failed else 0


if __name__ == "__main__":
    sys.exit(main())
