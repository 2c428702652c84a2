"""What `make bench` measured, as Markdown, a plot and a line. It knows results and aims; it must not measure anything."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from tests.figures.bench_lines import IDLE, LINES, TITLES

if TYPE_CHECKING:
    from tests.figures.bench import Results


def _spread(values: Sequence[float], form: str) -> str:
    middle = statistics.median(values)
    return f"{middle:{form}}" + (f" ({min(values):{form}}–{max(values):{form}})" if len(values) > 1 else "")


def _machine() -> str:
    found = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {found[0] if found else platform.machine()}"


def bare_rate(results: Results, name: str) -> tuple[float, float]:
    """Calls a second of onnxruntime alone: one core, both cores."""
    of = results.bare[name]
    return statistics.median(o for o, _ in of), statistics.median(b for _, b in of)


def rows(results: Results) -> list[list[str]]:
    """The table's cells, line by line and server by server."""
    made = []
    for line in LINES:
        for name in (line.name, f"{line.name} probe"):
            for title in dict.fromkeys(t for n, t in results.passes if n == name):
                of = results.passes[name, title]
                rate = statistics.median(m.rate for m in of)
                costs = [f"{statistics.median(m.server_us for m in of):.0f}", f"{statistics.median(m.client_us for m in of):.0f}"]
                limit = times = aim = ""
                if name == line.name and line.bare in results.bare:
                    one, both = bare_rate(results, line.bare)
                    limit, times = f"{one:,.0f} / {both:,.0f}", f"{rate / one:.2f}"
                    scaled = f"; {line.times} × bare here: {line.times * one:,.0f}" if line.times else ""
                    aim = line.aim + scaled
                elif name != line.name and results.chunk:
                    chunk = statistics.median(results.chunk)
                    aim = f"p99 ≤ 4 chunks: {4 * chunk:.1f} ms"
                made.append(
                    [
                        TITLES[name], title, _spread([m.rate for m in of], ",.0f"), _spread([m.p50 for m in of], ".2f"),
                        _spread([m.p99 for m in of], ".2f"), *(costs if name == line.name else ["", ""]), limit, times, aim,
                        line.bar if name == line.name else "",
                    ]
                )  # fmt: skip
    return made


def markdown(results: Results, repeats: int, window: float) -> str:
    head = ["workload", "server", "calls/s", "p50 ms", "p99 ms", "server CPU µs", "client CPU µs", "bare/s, 1 / 2 cores", "× bare"]
    head += ["aim", "Triton"]
    parts = [
        "# Bench",
        "",
        f"`make bench`, {date.today().isoformat()}, {_machine()} shared by server and client; medians of {repeats} (least–most), three "
        f"windows of {window} s each. CPU is per call. *bare* is onnxruntime alone in the same run, the same rounds, one thread a run: on "
        "one core, and two threads on both. *Triton* is what NVIDIA Triton 2.51 with its ONNX Runtime backend made on another machine of "
        "this kind (calls/s, p99; best of several configurations; from the task that set the aims, not measured here).",
        "",
        "|" + "|".join(head) + "|",
        "|---|---|" + "---:|" * (len(head) - 4) + "---|---|",
        *("|" + "|".join(row) + "|" for row in rows(results)),
    ]
    for title, (mb, share) in results.idle.items():
        parts += ["", f"Idle with {', '.join(IDLE)}, {title}: {mb:.0f} MB, {share:.1%} of a core (aim: ≤ 150 MB, < 1 %)."]
    if results.chunk:
        parts += ["", f"One chunk, 32 rows × 32 tokens of A alone on one core: {statistics.median(results.chunk):.1f} ms."]
    return "\n".join(parts)


def plot(results: Results, file: Path) -> None:
    """Each server's calls a second as a multiple of onnxruntime alone on one core, with the extremes."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    names = [line for line in LINES if line.bare in results.bare and any(n == line.name for n, _ in results.passes)]
    titles = list(dict.fromkeys(t for _, t in results.passes))
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(names) * max(1, len(titles)) + 1.5), layout="constrained")
    height = 0.8 / max(1, len(titles))
    for at, title in enumerate(titles):
        for place, line in enumerate(names):
            of = results.passes.get((line.name, title))
            if not of:
                continue
            one, _ = bare_rate(results, line.bare)
            middle, least, most = (f(m.rate for m in of) / one for f in (statistics.median, min, max))
            axes.barh(
                place + (at - (len(titles) - 1) / 2) * height, middle, height, xerr=[[middle - least], [most - middle]], color=f"C{at}",
                label=title if not place else None,
            )  # fmt: skip
    for place, line in enumerate(names):
        one, both = bare_rate(results, line.bare)
        axes.plot([both / one] * 2, [place - 0.45, place + 0.45], color="black", lw=1.5, label="bare, both cores" if not place else None)
        if line.times:
            axes.plot([line.times] * 2, [place - 0.45, place + 0.45], color="C3", lw=1.5, ls=":", label="aim" if not place else None)
    axes.set_yticks(range(len(names)), [TITLES[line.name] for line in names])
    axes.invert_yaxis()
    axes.set_xlabel("calls a second, bare onnxruntime on one core = 1")
    axes.legend(loc="lower right")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def summary(results: Results) -> str:
    """One line that says it all."""
    parts = []
    for line in LINES:
        of = results.passes.get((line.name, "seqserve"))
        if of:
            rate, p99 = statistics.median(m.rate for m in of), statistics.median(m.p99 for m in of)
            times = f" ({rate / bare_rate(results, line.bare)[0]:.2f} × bare)" if line.bare in results.bare else ""
            one = f"p50 {statistics.median(m.p50 for m in of):.2f} ms" if line.callers == 1 else f"{rate:,.0f}/s, {p99:.0f} ms{times}"
            parts.append(f"{line.name} {one}")
    if "seqserve" in results.idle:
        parts.append(f"idle {results.idle['seqserve'][0]:.0f} MB")
    return "bench · " + " · ".join(parts) + (f" · {len(results.failed)} FAILED" if results.failed else "")
