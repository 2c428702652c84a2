"""`make overload`: what the server does with three times the calls that it can answer.

Long reviews to classify arrive as they may (Poisson), each a call of its own that is not tried again. Peak throughput is that of a
closed loop of a full round's callers, measured by turns with overload, since generator and server share a machine. Three figures: how
much of the peak is still answered under overload, how soon the rest is refused and whether it is told when to come back, and how soon
after the load has fallen to half a call takes as long again as it did at that load before.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import seqserve
from loadtests import inputs
from tests.figures.bench_tools import cpu
from tests.process import ROOT, serve

PATIENCE = 30.0  # seconds that a caller waits
WINDOW = 0.5  # seconds over which recovery is judged
CLOSED = 64  # callers at peak: a full round
TURNS = 3  # of peak and overload
LEAD = 2.0  # seconds of overload before it counts
KEPT, SOON, RECOVERED = 0.9, 0.25, 5.0  # floors: share of the peak; seconds to a refusal, p99; seconds to recover


@dataclass(frozen=True, slots=True)
class Call:
    """One call: when it was due, how long it took from then, and how it ended: "", or the reason of its refusal."""

    due: float
    seconds: float
    refused: str
    retry_after: float | None

    @property
    def ended(self) -> float:
        return self.due + self.seconds


class Callers:
    """Everyone who calls, on a few connections."""

    def __init__(self, target: str, texts: tuple[str, ...]) -> None:
        self._clients = [seqserve.AsyncClient(target, retries=0, timeout=PATIENCE, metadata=[("caller", str(i))]) for i in range(4)]
        self._texts = texts
        self._dice = random.Random(7)

    async def one(self, due: float) -> Call:
        reason, retry = "", None
        try:
            await self._dice.choice(self._clients).classify(self._dice.choice(self._texts))
        except seqserve.Error as e:
            reason, retry = e.reason or type(e).__name__, e.retry_after
        return Call(due, time.perf_counter() - due, reason, retry)

    async def closed(self, callers: int, seconds: float) -> list[Call]:
        """`callers` of whom each calls again when answered."""
        end = time.perf_counter() + seconds

        async def caller() -> list[Call]:
            made = []
            while time.perf_counter() < end:
                made.append(await self.one(time.perf_counter()))
            return made

        return [call for made in await asyncio.gather(*(caller() for _ in range(callers))) for call in made]

    async def open(self, rate: float, seconds: float) -> list[asyncio.Task[Call]]:
        """`rate` arrivals a second, however many are waiting; gives those under way too."""
        began = due = time.perf_counter()
        calls: list[asyncio.Task[Call]] = []
        while (due := due + self._dice.expovariate(rate)) < began + seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            calls.append(asyncio.create_task(self.one(due)))
        return calls

    async def close(self) -> None:
        for client in self._clients:
            await client.close()


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of them do not exceed; NaN of none."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


@dataclass(frozen=True, slots=True)
class Phase:
    """What came of some seconds of load: answers, and the server's CPU."""

    answered: int
    seconds: float
    cpu: float  # seconds


async def measure(target: str, server: int, texts: tuple[str, ...], seconds: float, times: float) -> bool:
    """Run all phases, print what came out, and tell whether the floors were held. `server` is its process id."""
    callers = Callers(target, texts)
    await callers.closed(8, 2)  # connected, warm
    quiet = await callers.closed(1, 2)
    warm = await callers.closed(CLOSED, seconds / TURNS)
    sustained = len(warm) / (max(c.ended for c in warm) - min(c.due for c in warm))
    before = [await t for t in await callers.open(sustained / 2, seconds / 2)]
    usual = percentile([c.seconds for c in before], 0.9)
    alone = percentile([c.seconds for c in quiet], 0.5)
    print(f"sustainable {sustained:.0f} calls/s; at half of it p90 {usual * 1e3:.0f} ms, alone {alone * 1e3:.0f} ms", flush=True)

    # By turns, since others on this machine come and go: peak and overload see the same of them.
    peak: list[Phase] = []
    over: list[Phase] = []
    calls: list[Call] = []
    for turn in range(TURNS):
        used, began = cpu(server), time.perf_counter()
        made = await callers.closed(CLOSED, seconds / TURNS)
        peak.append(Phase(sum(not c.refused for c in made), time.perf_counter() - began, cpu(server) - used))
        under_way = await callers.open(sustained * times, LEAD)  # the queue fills
        used, began = cpu(server), time.perf_counter()
        under_way += await callers.open(sustained * times, seconds / TURNS)
        fallen, used = time.perf_counter(), cpu(server) - used
        after = [await t for t in await callers.open(sustained / 2, seconds / 2)] if turn == TURNS - 1 else []
        all = [await t for t in under_way]
        over.append(Phase(sum(not c.refused and began < c.ended <= fallen for c in all), fallen - began, used))
        calls += all
    await callers.close()
    at_peak, at_over = (sum(p.answered for p in phases) / sum(p.seconds for p in phases) for phases in (peak, over))
    efficiency = [sum(p.answered for p in phases) / sum(p.cpu for p in phases) for phases in (peak, over)]
    answered, refused = [c.seconds for c in calls if not c.refused], [c for c in calls if c.refused]
    kept, soon = at_over / at_peak, percentile([c.seconds for c in refused], 0.99)
    told = sum(bool(c.retry_after) for c in refused) / max(1, len(refused))
    wait = percentile([c.retry_after for c in refused if c.retry_after], 0.5)
    recovered = next((at * WINDOW for at in range(int(seconds)) if _usual(after, fallen + at * WINDOW, usual)), float("inf"))
    reasons = {r: sum(c.refused == r for c in refused) for r in sorted({c.refused for c in refused})}
    print(f"peak {at_peak:.0f} answers/s, {efficiency[0]:.0f} a second of the server's CPU")
    print(f"offered {times:g} times the sustainable: {len(answered):,} answered, {len(refused):,} refused {reasons}")
    print(
        f"kept      {kept:.1%} of the peak for admitted calls (floor {KEPT:.0%}), {efficiency[1] / efficiency[0]:.1%} by the server's CPU; "
        f"admitted p50 {percentile(answered, 0.5):.2f} s, p99 {percentile(answered, 0.99):.2f} s"
    )
    print(
        f"refused   in {percentile([c.seconds for c in refused], 0.5) * 1e3:.1f} ms p50, {soon * 1e3:.1f} ms p99 (floor {SOON * 1e3:.0f}); "
        f"{told:.1%} told when to come back, p50 {wait:.2f} s"
    )
    print(f"recovered {recovered:.1f} s after the load fell to half (floor {RECOVERED:.0f} s)")
    return kept >= KEPT and soon <= SOON and told == 1 and recovered <= RECOVERED


def _usual(calls: list[Call], at: float, usual: float) -> bool:
    """Whether those that were due in a window were all answered, and about as fast as at that load before."""
    window = [c for c in calls if at <= c.due < at + WINDOW]
    return bool(window) and all(not c.refused for c in window) and percentile([c.seconds for c in window], 0.5) <= 2 * usual


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.figures.overload", description=__doc__)
    parser.add_argument("--data", type=Path, help="directory of test sets; none: made-up texts")
    parser.add_argument("--seconds", type=float, default=20.0, help="of overload")
    parser.add_argument("--times", type=float, default=3.0, help="the peak")
    parser.add_argument("--server", default="", help="flags of the server, such as '--max-queue 256'")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout to serve from")
    options = parser.parse_args()
    reviews = inputs.read(options.data).reviews
    # Eight a call: so the model's work, not gRPC's, is what the machine runs short of, and the generator keeps up.
    texts = tuple(" ".join(reviews[i : i + 8]) for i in range(0, len(reviews) - 7, 3))
    with serve(options.root.resolve() / "models", *options.server.split(), root=options.root) as served:
        print(f"load average before {os.getloadavg()[0]:.1f}", flush=True)
        held = asyncio.run(measure(f"127.0.0.1:{served.port}", served.process.pid, texts, options.seconds, options.times))
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
