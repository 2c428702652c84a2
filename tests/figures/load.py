"""`make load`: mixed load of real inputs against one server on this machine, by locust, and what the server's memory does meanwhile.

Writes locust's report (build/load.html, which is not kept in git: locust's own page, a megabyte) and a picture of percentiles and memory
over time beside it; with --write, the summary into docs/load.md and the picture into docs/images.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tests.figures.watched import Watched, memory_slope
from tests.process import ROOT, serve

FROM, TO = "<!-- from make load -->\n", "<!-- to here -->\n"
WARM = 180.0  # seconds of the same load before it counts: until then arenas fill, ever more slowly
FLAT = 2.0  # MiB a minute
PICTURE = "![Percentiles, requests a second and memory over time](images/load.png)\n\n"


@dataclass(frozen=True, slots=True)
class Moment:
    """What locust noted of the ten seconds before; milliseconds."""

    at: float  # seconds since 1970
    rate: float
    p50: float
    p95: float
    p99: float


def moments(history: Path) -> list[Moment]:
    """Of all requests together, from the file that locust's --csv writes."""
    with history.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["Name"] == "Aggregated" and row["99%"] != "N/A"]
    return [Moment(float(r["Timestamp"]), float(r["Requests/s"]), float(r["50%"]), float(r["95%"]), float(r["99%"])) for r in rows]


def draw(noted: Sequence[Moment], memory: Sequence[tuple[float, float]], counted: float, about: str, out: Path) -> None:
    """Percentiles and requests a second as locust noted them, and MiB of the server, by seconds since `counted`, which is when
    the minutes that count began."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(9, 5.6), sharex=True, layout="constrained")
    at = [(m.at - counted) / 60 for m in noted]
    for name in ("p50", "p95", "p99"):
        upper.plot(at, [getattr(m, name) for m in noted], label=name, linewidth=1.2)
    upper.set(yscale="log", ylabel="ms", title=about)
    rate = upper.twinx()
    rate.plot(at, [m.rate for m in noted], color="gray", linewidth=0.8, label="requests a second")
    rate.set(ylabel="requests a second", ylim=(0, None))
    upper.legend(loc="upper left", ncol=3, fontsize=8)
    lower.plot([(t - counted) / 60 for t, _ in memory], [mib for _, mib in memory], linewidth=1.2)
    lower.axvspan((memory[0][0] - counted) / 60, 0, alpha=0.08, color="black", label="before it counts")
    lower.set(xlabel="minutes", ylabel="MiB resident", ylim=(0, None))
    lower.legend(loc="lower left", fontsize=8)
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=80)
    pyplot.close(figure)


def locust(port: int, users: int, seconds: float, data: Path | None, html: Path, summary: Path, flags: list[str]) -> int:
    """One headless run; its exit status says whether the thresholds were held."""
    command = [
        sys.executable, "-m", "locust", "-f", str(ROOT / "loadtests" / "locustfile.py"), "Mix", "--host", f"127.0.0.1:{port}", "--headless",
        "--users", str(users), "--run-time", str(int(seconds)), "--only-summary", "--html", str(html), "--summary", str(summary),
        "--loglevel", "WARNING", *(("--data", str(data)) if data else ()), *flags,
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.figures.load", description=__doc__)
    parser.add_argument("--data", type=Path, help="directory of test sets; none: made-up texts")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--warm", type=float, default=WARM, help="seconds of the same load before")
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--html", type=Path, default=ROOT / "build" / "load.html", help="locust's report, with latencies over time")
    parser.add_argument("--write", action="store_true", help="put what came out into docs/load.md")
    options, flags = parser.parse_known_args()
    options.html.parent.mkdir(parents=True, exist_ok=True)
    before, zero = os.getloadavg()[0], time.time() - time.perf_counter()
    with serve(ROOT / "models") as served, tempfile.TemporaryDirectory() as directory:
        summary = Path(directory) / "summary.md"
        history = [Path(directory) / name for name in ("warm", "load")]
        with Watched(served.process.pid) as watched:
            for where, seconds, html in zip(
                history, (options.warm, options.seconds), (Path(directory) / "warm.html", options.html), strict=True
            ):
                written = ["--csv", str(where), "--csv-full-history", *flags]
                status = locust(served.port, options.users, seconds, options.data, html, summary, written)
            ended = time.perf_counter()
        noted = [m for where in history for m in moments(where.with_name(f"{where.name}_stats_history.csv"))]
        text = summary.read_text() if summary.exists() else "locust wrote no summary\n"
    loaded = watched.between(ended - options.seconds, ended - 2)
    steep = memory_slope(loaded)
    used = (loaded[-1].cpu - loaded[0].cpu) / (loaded[-1].at - loaded[0].at)
    about = (
        f"{datetime.now(UTC):%Y-%m-%d}, {options.seconds:.0f} s of {options.users} users, server and locust on "
        f"the same\n{os.cpu_count()} cores, "
        f"load average before {before:.1f}. The server used {used:.2f} cores.\nMemory, after {options.warm:.0f} s of the same load: "
        f"{loaded[0].memory:.0f} MiB, {loaded[-1].memory:.0f} at the end, a slope of {steep:+.2f} MiB a minute\n(flat: at most {FLAT:g}); "
        f"descriptors {loaded[0].descriptors} and {loaded[-1].descriptors}.\n\n"
    )
    print(about + text)
    picture = ROOT / "docs" / "images" / "load.png" if options.write else options.html.with_suffix(".png")
    title = f"{options.users} users of the mix, {datetime.now(UTC):%Y-%m-%d}"
    draw(noted, [(s.at + zero, s.memory) for s in watched.samples], ended - options.seconds + zero, title, picture)
    print(f"report: {options.html}, picture: {picture}")
    if options.write:
        page = ROOT / "docs" / "load.md"
        head, _, rest = page.read_text().partition(FROM)
        page.write_text(head + FROM + about + PICTURE + text + TO + rest.partition(TO)[2])
    return status or int(steep > FLAT)


if __name__ == "__main__":
    sys.exit(main())
