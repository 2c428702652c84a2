"""The forecaster beside what is simpler, on five data sets: `make series DATA=DIR`.

Seasonal naive, AR(1), AR(p) with p by Akaike's criterion, a window perceptron and the forecaster, each asked at the same
moments. ETTh1 is asked of the shipped bundles, through the server's graph runner; for the others small models of the same
code are trained first (minutes on one core) and kept in runs/series. With RUN=--write the table goes into docs/series.md and
the picture into docs/images. Ends with 1 where a floor is missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from contract import bundle as bundles
from server.graph import OnnxGraph
from tests.figures import series_page
from tests.process import ROOT
from training import __main__ as train
from training import baselines, checkpoint, config, tasks
from training.data import ett, m4, univariate

Array = np.ndarray[Any, Any]
Ask = Callable[[Array], tuple[Array, Array | None]]
"""windows [count, time, channels] → mean [count, ahead, channels] and the deciles, [..., 9], or None; the data's units."""

NAIVE, AR1, ARP, MLP, OURS = "seasonal naive", "AR(1)", "AR(p)", "window perceptron", "forecaster"


@dataclass(frozen=True, slots=True)
class Found:
    """What a method forecast: point [count, ahead, channels], and the 80 % interval's edges where it gives one."""

    point: Array
    low: Array | None = None
    high: Array | None = None
    said: str = ""  # beside the method's name

    def covered(self, truth: Array) -> float | None:
        """The share of the truth inside the interval, per cent."""
        return None if self.low is None or self.high is None else float(100 * ((self.low <= truth) & (truth <= self.high)).mean())


@dataclass(frozen=True, slots=True)
class Comparison:
    """One data set: the metrics (the first is drawn), a row a method, published rows, floors, and one moment to draw."""

    name: str
    task: str
    metrics: tuple[str, ...]
    rows: dict[str, tuple[float | None, ...]]
    said: dict[str, str]
    published: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    floors: tuple[tuple[str, bool], ...] = ()
    past: Array = field(default_factory=lambda: np.zeros(0))  # [time], then what followed and the methods' forecasts
    truth: Array = field(default_factory=lambda: np.zeros(0))
    drawn: dict[str, Found] = field(default_factory=dict)  # point, low, high [ahead]


def shipped(models: Path, name: str) -> Ask:
    """The shipped bundle, run as the server runs it."""
    directory = models / name / "1"
    (graph,) = bundles.load(directory).graphs.values()
    runner = OnnxGraph(graph, directory / graph.file)

    def ask(windows: Array) -> tuple[Array, Array | None]:
        mean, *others = runner.run({graph.inputs[0].name: windows, **{s.input: s.fresh(len(windows)) for s in graph.states}})
        return mean, others[0] if graph.states else None

    return ask


def trained(task: str, variant: str, changes: Sequence[str], data: Path, name: str) -> Ask:
    """The model of a run in runs/series, trained first where there is none of this very configuration."""
    out = ROOT / "runs" / "series" / f"{task}-{name}"
    wanted = config.load(task, variant, changes)
    if not (out / checkpoint.FILE).is_file() or checkpoint.load(out).config != wanted.plain():
        given = [word for change in changes for word in ("--set", change)]
        if train.main([task, "--config", variant, *given, "--data", str(data), "--out", str(out)]):
            sys.exit(f"training {out} failed")
    kept = checkpoint.load(out)
    described = tasks.find(task)
    model = described.rebuild(kept.dims)
    model.load_state_dict(dict(kept.weights))
    (graph,) = described.describe(model).values()

    def ask(windows: Array) -> tuple[Array, Array | None]:
        with torch.inference_mode():
            fresh = [torch.from_numpy(s.fresh(len(windows))) for s in graph.states]
            mean, *others = model(torch.from_numpy(windows), *fresh)
        return mean.numpy(), others[0].numpy() if graph.states else None

    return ask


def asked(ask: Ask, windows: Sequence[Array], rows: int = 64) -> Found:
    """All windows, some at a time."""
    means, lows, highs = [], [], []
    for first in range(0, len(windows), rows):
        mean, deciles = ask(np.stack(windows[first : first + rows]).astype(np.float32))
        means.append(mean)
        if deciles is not None:
            lows.append(deciles[..., 0])
            highs.append(deciles[..., -1])
    return Found(np.concatenate(means), *(np.concatenate(x) if x else None for x in (lows, highs)))


def classical(learnt: Array, windows: Array, season: int, ahead: int, most: int) -> Iterator[tuple[str, Found]]:
    """The naive method and the autoregressions; learnt [time, channels] is what they are fitted to, windows as for `Ask`
    but at least a season long. All in the units that `learnt` is in."""
    count, _, channels = windows.shape
    naive = np.stack([baselines.seasonal(windows[:, :, c], season, ahead) for c in range(channels)], 2)
    yield NAIVE, Found(naive, said=f"season {season}")
    for name in (AR1, ARP):
        point, width, orders = np.empty((count, ahead, channels)), np.empty((ahead, channels)), []
        for c in range(channels):
            model = baselines.fit(learnt[:, c], 1) if name == AR1 else baselines.fit_best(learnt[:, c], most)
            point[:, :, c] = baselines.roll(model, windows[:, :, c], ahead)
            width[:, c] = 1.2816 * baselines.spread(model, ahead)  # the normal distribution's 0.9 quantile
            orders.append(model.order)
        said = f"p {min(orders)}–{max(orders)}" if min(orders) < max(orders) else f"p {orders[0]}"
        yield name, Found(point, point - width, point + width, said if name == ARP else "")


def etth1(data: Path, models: Path) -> Comparison:
    """The published task: 96 hours from 96, every window of the test months, in standard deviations of the training."""
    series = ett.load("ETTh1", data)
    train_part = series.values[: series.train].astype(np.float64)
    mean, deviation = train_part.mean(0), train_part.std(0)
    starts = range(series.validation, series.test - 96 + 1)
    windows = np.stack([series.values[at - 96 : at] for at in starts])
    truth = np.stack([series.values[at : at + 96] for at in starts])
    found = dict(classical(series.values[: series.validation].astype(np.float64), windows.astype(np.float64), 24, 96, 95))
    found |= {MLP: asked(shipped(models, "window_mlp"), windows), OURS: asked(shipped(models, "forecaster"), windows)}
    rows = {}
    for name, f in found.items():
        error = (f.point - truth) / deviation
        rows[name] = (float((error**2).mean()), float(np.abs(error).mean()), f.covered(truth))
    assert mean.shape == deviation.shape
    return Comparison(
        "ETTh1", f"7 channels, 96 hours from 96, {len(starts):,} windows", ("MSE", "MAE", "80 % covers"), rows,
        {n: f.said for n, f in found.items()},
        {"SegRNN": (0.368, 0.395, None), "DLinear": (0.386, 0.400, None), "PatchTST": (0.414, 0.419, None)},
        (
            ("forecaster's MSE at most 0.43", rows[OURS][0] <= 0.43), ("window perceptron's MSE at most 0.43", rows[MLP][0] <= 0.43),
            ("forecaster's MSE below AR(p)'s", rows[OURS][0] < rows[ARP][0]),
            ("window perceptron's MSE below the naive's", rows[MLP][0] < rows[NAIVE][0]),
        ),
        **_moment(windows, truth, found, len(starts) // 2, 6),
    )  # fmt: skip


def m4_hourly(data: Path) -> Comparison:
    """The competition's task and measures; each method sees all of a series or as much as it was made for."""
    observed, truth = m4.load(data)
    found: dict[str, Found] = {}
    for series in observed:  # of two lengths: one by one
        for name, f in classical(series[:, None], series[None, :, None], m4.SEASON, m4.AHEAD, 48):
            before = found.get(name)
            found[name] = f if before is None else Found(*(_beside(a, b) for a, b in _pairs(before, f)))
    window = np.stack([s[-m4.SHORTEST :] for s in observed], 1)  # [time, 414]
    found[MLP] = asked(trained("window_mlp", "m4", [], data, "m4"), [window[-96:]])
    ask = trained("forecaster", "m4", [], data, "m4")
    found[OURS] = asked(lambda w: (lambda m, d: (d[..., 4], d))(*ask(w)), [window[-240:]])  # medians, for absolute errors
    rows = {}
    for name, f in found.items():
        s, a = m4.smape(truth, f.point[0].T), m4.mase(observed, truth, f.point[0].T)
        rows[name] = (m4.owa(s, a), s, a, f.covered(truth.T[None]))
    published = {
        "ES-RNN, the winner": (0.440, 9.328, 0.893, None), "organisers' MLP": (0.921, 13.842, 2.607, None),
        "organisers' RNN": (1.036, 14.698, 3.048, None), "Naive2": (1.0, 18.383, 2.395, None), "sNaive": (0.627, 13.912, 1.193, None),
    }  # fmt: skip
    same = abs(rows[NAIVE][1] - 13.912) < 1e-3 and abs(rows[NAIVE][2] - 1.193) < 1e-3
    return Comparison(
        "M4 hourly", "414 series, 48 hours", ("OWA", "sMAPE", "MASE", "80 % covers"), rows, {}, published,
        (
            ("seasonal naive gives the organisers' figures", same), ("forecaster's OWA at most 0.8", rows[OURS][0] <= 0.8),
            ("window perceptron's OWA below 1", rows[MLP][0] < 1),
        ),
        **_moment(window[None], truth.T[None], found, 0, 150),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class One:
    """How a univariate series is asked."""

    title: str
    unit: str
    ahead: int
    observed: int  # by the forecaster before each moment
    back: int  # the perceptron's window
    most: int  # of the AR orders tried
    within: float  # of the best classical method's RMSE the forecaster must stay
    ours: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ()


ONES = {
    "monthly-sunspots": One("sunspots", "months", 12, 288, 96, 36, 1.1),
    "airline-passengers": One(
        "airline passengers", "months", 12, 36, 24, 24, 2.2,
        ("model.lookback=24", "data.observed=36", "model.hidden=8", "data.sessions=256", "optimiser.lr=1e-2", "run.average=0.9"),
        ("model.lookback=24", "model.hidden=16"),
    ),
    "daily-min-temperatures": One(
        "minimum temperatures", "days", 14, 384, 96, 36, 1.1,
        ("data.observed=384",),
    ),
}  # fmt: skip


def one(name: str, data: Path) -> Comparison:
    """A univariate series: the last third, a forecast from every moment of it."""
    kind, how = univariate.KINDS[name], ONES[name]
    series = univariate.load(name, data)
    starts = range(series.validation, series.test - how.ahead + 1)
    long = max(how.observed, kind.season + 1)
    padded = series.values.astype(np.float64)
    windows = [padded[max(0, at - long) : at] for at in starts]
    truth = np.stack([padded[at : at + how.ahead] for at in starts])
    found = dict(classical(padded[: series.validation], np.stack([w[-long:] for w in windows]), kind.season, how.ahead, how.most))
    changes = [f"data.series={name}", f"model.horizon={how.ahead}"]
    found[MLP] = asked(trained("window_mlp", "univariate", [*changes, *how.mlp], data, name), [w[-how.back :] for w in windows])
    found[OURS] = asked(trained("forecaster", "univariate", [*changes, *how.ours], data, name), [w[-how.observed :] for w in windows])
    back = np.exp if kind.logarithm else (lambda x: x)
    learnt = back(padded[: series.validation, 0])
    unit = np.abs(learnt[kind.season :] - learnt[: -kind.season]).mean()
    rows = {}
    for method, f in found.items():
        error = back(f.point) - back(truth)
        rows[method] = (
            float(np.sqrt((error**2).mean())), float(np.sqrt((error[:, 0] ** 2).mean())),
            float(np.abs(error).mean() / unit), f.covered(truth),
        )  # fmt: skip
    best = min(r[0] for m, r in rows.items() if m in (NAIVE, AR1, ARP))  # type: ignore[type-var]
    return Comparison(
        how.title, f"{how.ahead} {how.unit}, {len(starts):,} moments", ("RMSE", "RMSE, next step", "MASE", "80 % covers"), rows,
        {n: f.said for n, f in found.items()},
        floors=(
            ("forecaster's RMSE below the seasonal naive's", rows[OURS][0] < rows[NAIVE][0]),
            (f"forecaster's RMSE at most {how.within:g} of the best classical method's", rows[OURS][0] <= how.within * best),
        ),
        **_moment(np.stack([w[-how.observed :] for w in windows]), truth, found, len(starts) // 2, 0, back),
    )  # fmt: skip


def _pairs(one: Found, other: Found) -> Iterator[tuple[Array | None, Array | None]]:
    yield from ((one.point, other.point), (one.low, other.low), (one.high, other.high))


def _beside(one: Array | None, other: Array | None) -> Array | None:
    return None if one is None or other is None else np.concatenate([one, other], -1)


def _moment(
    windows: Array, truth: Array, found: dict[str, Found], at: int, channel: int, back: Callable[[Array], Array] = lambda x: x
) -> dict[str, Any]:
    """One moment of one channel, for the picture."""

    def of(values: Array | None) -> Array | None:
        return None if values is None else back(values[at, :, channel])

    past = back(windows[at, -96:, channel])
    drawn = {n: Found(back(f.point[at, :, channel]), of(f.low), of(f.high)) for n, f in found.items() if n in (NAIVE, ARP, OURS)}
    return {"past": past, "truth": back(truth[at, :, channel]), "drawn": drawn}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make series", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="directory of the data sets: ett/, m4_hourly/, univariate/")
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="directory of bundles")
    parser.add_argument("--write", action="store_true", help="write docs/series.md and its picture anew")
    options = parser.parse_args()
    began = time.monotonic()
    torch.set_num_threads(1)
    every = [etth1(options.data, options.models), *(one(name, options.data) for name in ONES), m4_hourly(options.data)]
    every.insert(1, every.pop())
    print(series_page.table(every))
    out = ROOT / "runs" / "series"
    out.mkdir(parents=True, exist_ok=True)
    series_page.draw(every, out / "series.png")
    if options.write:
        series_page.write(every, ROOT / "docs" / "series.md", ROOT / "docs" / "images" / "series.png")
    floors = [(c.name, said, held) for c in every for said, held in c.floors]
    missed = [f"{name}: {said}" for name, said, held in floors if not held]
    head = " · ".join(f"{c.name} {c.metrics[0]} {c.rows[OURS][0]:.3f} (AR(p) {c.rows[ARP][0]:.3f})" for c in every)
    print("\n".join(f"MISSED {m}" for m in missed), end="\n" if missed else "")
    print(f"series: {len(missed)} of {len(floors)} floors missed in {time.monotonic() - began:.0f} s · {head}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
