"""`make dashboard`: a picture of the Grafana dashboard's panels under load, into docs/images/dashboard.png.

A fleet of processes (three servers, haproxy, redis-server) and a real Prometheus, scraped and configured as in docker-compose.yml,
are put under locust's load for some minutes, with a spike amid it and a replica that is drained and comes back. Then every query of
deploy/grafana/dashboards/seqserve.json is asked of Prometheus over that time, as Grafana asks it, and drawn where the dashboard has
its panel. The drawing is matplotlib's, not Grafana's: it shows what the panels say, not how Grafana looks. Fails where a query fails;
panels without data are named.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from seqserve import Client, errors
from tests.figures.compose_test import wait_until_served
from tests.figures.fleets import Processes, free
from tests.process import ROOT

BOARD = ROOT / "deploy" / "grafana" / "dashboards" / "seqserve.json"
SCRAPE_S = 5
RATE = f"{4 * SCRAPE_S}s"  # what Grafana puts for $__rate_interval at this step: four scrapes


@dataclass(frozen=True, slots=True)
class Series:
    """A line of a panel: its name, seconds since 1970, values."""

    name: str
    times: tuple[float, ...]
    values: tuple[float, ...]


class Prometheus:
    """A Prometheus of this machine that scrapes some addresses by job, until it is closed. Raises FileNotFoundError without one."""

    def __init__(self, jobs: Mapping[str, list[str]]) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        (port,) = free(1)
        self._at = f"http://127.0.0.1:{port}"
        file = Path(self._scratch.name, "prometheus.yml")
        scraped = [{"job_name": job, "static_configs": [{"targets": targets}]} for job, targets in jobs.items()]
        config = {"global": {"scrape_interval": f"{SCRAPE_S}s"}, "scrape_configs": scraped}
        file.write_text(json.dumps(config))  # JSON is YAML
        flags = (f"--storage.tsdb.path={self._scratch.name}/data", f"--web.listen-address=127.0.0.1:{port}", "--log.level=error")
        self._process = subprocess.Popen(["prometheus", f"--config.file={file}", *flags])

    def asked(self, path: str, **values: str) -> Any:
        """What Prometheus answers. Raises RuntimeError with its own words."""
        try:
            with urllib.request.urlopen(f"{self._at}/api/v1/{path}?{urllib.parse.urlencode(values)}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as e:
            raise RuntimeError(f"{values.get('query', path)}: {json.load(e)['error']}") from None

    def version(self) -> str:
        return str(self.asked("status/buildinfo")["version"])

    def series(self, query: str, legend: str, began: float, ended: float) -> Iterator[Series]:
        """A query of a panel over that time."""
        plain = query.replace("$__rate_interval", RATE).replace("$instance", ".*")
        for found in self.asked("query_range", query=plain, start=str(began), end=str(ended), step=str(SCRAPE_S))["result"]:
            name = legend
            for label, value in found["metric"].items():
                name = name.replace(f"{{{{{label}}}}}", value)
            times, values = zip(*((float(at), float(value)) for at, value in found["values"]), strict=True)
            yield Series(name or "value", times, values)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)
        self._scratch.cleanup()


def draw(board: Mapping[str, Any], panels: Mapping[str, list[Series]], began: float, ended: float, about: str, out: Path) -> None:
    """The dashboard's panels at their places."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker
    from PIL import Image

    height = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in board["panels"])
    figure = pyplot.figure(figsize=(19, height * 0.32), facecolor="white")
    top, bottom = 0.96, 0.01
    scale = {
        "s": ticker.FuncFormatter(lambda v, _: f"{v * 1e3:g} ms" if v < 1 else f"{v:g} s"),
        "bytes": ticker.FuncFormatter(lambda v, _: f"{v / (1 << 20):.0f} MiB" if v >= 1 << 20 else f"{v / 1024:.0f} KiB"),
        "percentunit": ticker.PercentFormatter(1.0),
    }
    for panel in board["panels"]:
        place = panel["gridPos"]
        left, upper = place["x"] / 24, top - (top - bottom) * place["y"] / height
        if panel["type"] == "row":
            figure.text(left + 0.01, upper - 0.012, panel["title"], fontsize=12, weight="bold", va="center")
            continue
        width, tall = place["w"] / 24, (top - bottom) * place["h"] / height
        axes = figure.add_axes((left + 0.03, upper - tall + 0.33 * tall, width - 0.042, 0.55 * tall))
        axes.set_title(panel["title"], fontsize=10, loc="left")
        lines = sorted(panels[panel["title"]], key=lambda s: -max(map(abs, s.values)))
        for line in lines[:12]:
            axes.plot([(t - began) / 60 for t in line.times], line.values, linewidth=1, label=line.name)
        if not lines:
            axes.text(0.5, 0.5, "No data", ha="center", va="center", transform=axes.transAxes, color="gray")
        unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "")
        if unit in scale:
            axes.yaxis.set_major_formatter(scale[unit])
        values = [value for line in lines for value in line.values if value == value]
        if values and min(values) >= 0:
            axes.set_ylim(0, 1.08 * max(values) or 1)
        axes.set_xlim(0, (ended - began) / 60)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if lines:
            axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.13), ncol=3 if place["w"] < 12 else 6, fontsize=7, frameon=False)
    figure.text(0.01, 0.985, about, fontsize=10, va="center")
    out.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=75)
    pyplot.close(figure)
    Image.open(drawn).convert("RGB").quantize(64).save(out, optimize=True)  # a third of the bytes


def load(address: str, seconds: float, data: Path | None) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "locust", "-f", str(ROOT / "loadtests" / "locustfile.py"), "Mix", "--host", address, "--headless",
        "--users", "24", "--shape", "spikes", "--run-time", str(int(seconds)), "--pause", "0.1", "--retries", "20", "--only-summary",
        "--loglevel", "ERROR", *(("--data", str(data)) if data else ()),
    ]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def mistaken(address: str, until: float) -> None:
    """A caller of models that there are not, so that refusals are seen."""
    with Client(address, retries=0) as client:
        while time.time() < until:
            with contextlib.suppress(errors.Error):
                client.classify("Where is it?", f"no-such-model-{int(time.time()) % 2}")
            time.sleep(1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="make dashboard", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--data", type=Path, help="directory of test sets; none: made-up texts")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "dashboard.png")
    options = parser.parse_args()
    board = json.loads(BOARD.read_text())
    fleet = Processes(metrics=True)
    prometheus = Prometheus({"seqserve": fleet.metrics, "balancer": [fleet.balancer_metrics]})
    try:
        fleet.start()
        wait_until_served(fleet.address)
        began = time.time()
        users = load(fleet.address, options.seconds, options.data)
        for moment, act in ((0.45, fleet.drain), (0.6, fleet.back)):
            mistaken(fleet.address, began + moment * options.seconds)
            act(1)
        users.wait()
        time.sleep(SCRAPE_S)
        ended = time.time()
        panels = {
            p["title"]: [s for t in p["targets"] for s in prometheus.series(t["expr"], t.get("legendFormat", ""), began, ended)]
            for p in board["panels"]
            if p["type"] != "row"
        }
        version = prometheus.version()
    finally:
        fleet.close()
        prometheus.close()
    about = (
        f"Dashboard “{board['title']}”: its queries, asked of Prometheus {version} and drawn by matplotlib at the panels' places; "
        f"Grafana itself draws them in its own style.\n{datetime.now(UTC):%Y-%m-%d}, {fleet.said()}, {options.seconds:.0f} s of load in "
        "spikes, one replica drained amid it and back, and a caller of models that there are not. Minutes."
    )
    draw(board, panels, began, ended, about, options.out)
    empty = [title for title, lines in panels.items() if not lines]
    print(f"{len(panels)} panels, {sum(map(len, panels.values()))} series; without data: {', '.join(empty) or 'none'}; {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
