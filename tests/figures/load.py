"""`make load`: mixed load of real inputs against one server on this machine, by locust, and what the server's memory does meanwhile.

Writes locust's report beside the docs (docs/load.html is not kept in git) and, with --write, the summary into docs/load.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from tests.figures.watched import Watched, memory_slope
from tests.process import ROOT, serve

FROM, TO = "<!-- from make load -->\n", "<!-- to here -->\n"
WARM = 60.0  # seconds of the same load before it counts: until then arenas fill, seen to take 40 to 60 s at 16 users
FLAT = 2.0  # MiB a minute


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
    before = os.getloadavg()[0]
    with serve(ROOT / "models") as served, tempfile.TemporaryDirectory() as directory:
        summary = Path(directory) / "summary.md"
        locust(served.port, options.users, options.warm, options.data, Path(directory) / "warm.html", summary, flags)
        with Watched(served.process.pid) as watched:
            status = locust(served.port, options.users, options.seconds, options.data, options.html, summary, flags)
            ended = time.perf_counter()
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
    print(f"report: {options.html}")
    if options.write:
        page = ROOT / "docs" / "load.md"
        head, _, rest = page.read_text().partition(FROM)
        page.write_text(head + FROM + about + text + TO + rest.partition(TO)[2])
    return status or int(steep > FLAT)


if __name__ == "__main__":
    sys.exit(main())
