"""`make soak`: ill-behaved callers (abuse.py) beside well-behaved ones, for MINUTES.

The well-behaved call all along: some time undisturbed, then beside the others, then alone again. Printed are their p99 in each part,
the server's memory and file descriptors with their slope while it is disturbed, and what is left of both in the end; and the cores
that the server, the others and the neighbours used then, since all of them share this machine's.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import seqserve
from loadtests import calls, inputs
from tests.figures.overload import percentile
from tests.figures.watched import Watched, descriptors_slope, memory_slope
from tests.process import ROOT, serve

NEIGHBOURS = 4
PAUSE = 0.05  # seconds that a neighbour rests between calls, mean
SETTLED = 0.4  # share of the disturbed part after which memory and descriptors are to be flat
FLAT_MIB, FLAT_DESCRIPTORS, TIMES = 2.0, 2.0, 2.0  # a minute, a minute, of the quiet p99


@dataclass(frozen=True, slots=True)
class Made:
    """One request of a neighbour."""

    at: float
    seconds: float
    failed: str


def neighbour(target: str, given: inputs.Inputs, seed: int, over: threading.Event, made: list[Made]) -> None:
    """Call as people do until it is over."""
    dice = random.Random(seed)
    with seqserve.Client(target, metadata=[("caller", str(seed))]) as client:
        while not over.wait(dice.expovariate(1 / PAUSE)):
            steps = calls.mixed(client, given, dice)
            next(steps)
            more: str | None = ""
            while more is not None:
                began, failed = time.perf_counter(), ""
                try:
                    more = next(steps, None)
                except (seqserve.Error, calls.Wrong) as e:
                    failed, more = f"{type(e).__name__}: {e}", None
                made.append(Made(began, time.perf_counter() - began, failed))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.figures.soak", description=__doc__)
    parser.add_argument("--data", type=Path, help="directory of test sets; none: made-up texts")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--server", default="", help="flags of the server")
    options = parser.parse_args()
    given = inputs.read(options.data)
    total = options.minutes * 60
    quiet = max(15.0, total * 0.15)
    print(f"load average before {os.getloadavg()[0]:.1f}", flush=True)
    with serve(ROOT / "models", *options.server.split()) as served, Watched(served.process.pid) as watched:
        over = threading.Event()
        made: list[list[Made]] = [[] for _ in range(NEIGHBOURS)]
        target = f"127.0.0.1:{served.port}"
        threads = [threading.Thread(target=neighbour, args=(target, given, n, over, made[n])) for n in range(NEIGHBOURS)]
        for thread in threads:
            thread.start()
        over.wait(5)  # connected, warm
        marks = [time.perf_counter()]
        over.wait(quiet)
        marks.append(time.perf_counter())
        command = [sys.executable, "-m", "tests.figures.abuse", str(served.port), str(total - 2 * quiet)]
        before = os.times()
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        marks.append(time.perf_counter())
        after = os.times()
        over.wait(quiet)
        marks.append(time.perf_counter())
        over.set()
        for thread in threads:
            thread.join()
        alive = served.process.poll() is None
    print(done.stdout, end="")
    every = [m for one in made for m in one]
    p99 = []
    for name, began, ended in zip(("before", "during", "after"), marks, marks[1:], strict=False):
        part = [m for m in every if began <= m.at < ended]
        seen = watched.between(began, ended)
        p50, last = (percentile([m.seconds for m in part], share) * 1e3 for share in (0.5, 0.99))
        p99.append(last)
        memory, descriptors = max(s.memory for s in seen), max(s.descriptors for s in seen)
        failed = [m.failed for m in part if m.failed]
        print(
            f"{name}: {ended - began:.0f} s, {len(part):,} requests, {len(failed)} failed, p50 {p50:.0f} ms, p99 {last:.0f} ms; "
            f"memory {seen[0].memory:.0f} to {seen[-1].memory:.0f} MiB, most {memory:.0f}; "
            f"descriptors {seen[0].descriptors} to {seen[-1].descriptors}, most {descriptors}"
        )
        for failure in sorted(set(failed))[:5]:
            print(f"  {failure}")
    used = watched.between(marks[1], marks[2])
    cores = {
        "server": used[-1].cpu - used[0].cpu,
        "abusers": after.children_user + after.children_system - before.children_user - before.children_system,
        "neighbours": after.user + after.system - before.user - before.system,
    }
    said = ", ".join(f"{who} {seconds / (marks[2] - marks[1]):.2f}" for who, seconds in cores.items())
    print(f"cores used during it: {said}, of {os.cpu_count()}; load average {os.getloadavg()[0]:.1f}")
    disturbed = watched.between(marks[1] + SETTLED * (marks[2] - marks[1]), marks[2])
    steep, rising = memory_slope(disturbed), descriptors_slope(disturbed)
    failed_ever = sum(bool(m.failed) for m in every)
    print(f"slope while disturbed, its first {SETTLED:.0%} aside: {steep:+.2f} MiB and {rising:+.2f} descriptors a minute")
    print(f"neighbours' p99 {p99[1] / p99[0]:.2f} times that before (floor {TIMES:g})")
    held = alive and not failed_ever and steep <= FLAT_MIB and rising <= FLAT_DESCRIPTORS and p99[1] <= TIMES * p99[0]
    return done.returncode or int(not held)


if __name__ == "__main__":
    sys.exit(main())
