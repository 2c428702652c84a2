"""What processes that carry calls for the server win (`--rpc-processes`): a part of `make gpu-bench`, on whatever device.

Unary calls, and turns of sessions one and 32 to a message, of a model that costs little; CPU of the server's own process, which is
what ends at one core, apart from that of its carriers. Calls a second tell something where there are cores for all of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from tests.figures.bench_tools import cpu, family
from tests.figures.tables import ask, table
from tests.process import serve

HEADS = ["/s", "× direct", "p50 ms", "p99 ms", "server CPU µs", "carriers' CPU µs", "1 core of the server carries"]
CALLERS = 256


def part(models: Path, name: str, flags: Sequence[str], processes: Sequence[int], clients: int, seconds: float) -> None:
    """A table of the calls a second by `processes` (0: the server carries them itself)."""
    each = str(max(1, CALLERS // clients))
    ways = {
        "unary calls": ["infer", "--model", name, "--callers", each],
        "turns, one a message": ["turns", "--model", name, "--sessions", each, "--together", "1"],
        "turns, 32 a message": ["turns", "--model", name, "--sessions", str(max(32, 1024 // clients)), "--together", "32"],
    }
    found: dict[str, list[list[str]]] = {way: [] for way in ways}
    direct: dict[str, float] = {}
    for count in processes:
        with serve(models, *flags, "--rpc-processes", str(count)) as served:
            pid = served.process.pid
            for way, command in ways.items():
                before, began = _spent(pid), time.perf_counter()
                told = ask(served.port, [[*command, "--seconds", str(seconds)] for _ in range(clients)])
                wall = time.perf_counter() - began
                own, others = (after - at for after, at in zip(_spent(pid), before, strict=True))
                rate = sum(t["rate"] for t in told)
                direct.setdefault(way, rate)
                own, others = own / sum(t["all"] for t in told), others / sum(t["all"] for t in told)
                found[way].append([
                    f"{way}, {count or 'no'} carrier{'s' * (count != 1)}", f"{rate:,.0f}", f"{rate / direct[way]:.2f}",
                    f"{max(t['p50'] for t in told):,.1f}", f"{max(t['p99'] for t in told):,.1f}", f"{own * 1e6:.1f}",
                    f"{others * 1e6:.1f}" if count else "–", f"{1 / own:,.0f}/s",
                ])  # fmt: skip
                print(f"{found[way][-1][0]}: {rate:,.0f}/s in {wall:.0f} s", flush=True)
    title = f"Calls by --rpc-processes, {clients} client processes beside them on {os.cpu_count()} cores"
    table(title, ["", *HEADS], [line for way in ways for line in found[way]])


def _spent(pid: int) -> tuple[float, float]:
    """Seconds of CPU so far: the server's process, its carriers."""
    own, *others = family(pid)
    return cpu(own), sum(map(cpu, others))
