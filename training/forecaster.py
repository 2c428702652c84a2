"""A forecaster that listens: after every observation of several channels, the next 96 values of each with intervals.

A linear highway over the last 96 values (the autoregressive part of LSTNet, Lai et al. 2018, arXiv 1703.07015) gives
most of the forecast; an LSTM that has followed the series since its session began corrects it and says how sure it is.
All channels share the weights. Both parts see values only relative to other values of the series, so a shift of level
changes nothing. Beside them may stand a direct autoregression of each channel's own, which knows the level that a channel
usually has and leads back to it; how much it counts the validation months decide. This file knows the model, its training on
windows of a long series and its contract; it must not know files of a data set (`data/ett.py`) or onnx.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Subset

from contract.bundle import Graph, State
from contract.bundle import Tensor as Described
from training import checkpoint, loop
from training.config import Config, ConfigError, section
from training.data.ett import Series
from training.layers import remember
from training.loop import Training
from training.tasks import About
from training.windows import DAY, AtRandom, Windows, load, scale

QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
MIDDLE = QUANTILES.index(0.5)
FEATURES = 4
FORECAST = "forecast.json"

ABOUT = About(
    title="Transformer load and oil temperature",
    use="The next 96 hours of ETT-like hourly series, updated with every observation; not other units or time steps.",
    data="ETTh1 (Zhou et al. 2021): 12 months to train, 4 to validate, 4 to test",
    licence="as the rest of this repository; the data (not included) are CC BY-ND 4.0",
    design="channel-shared LSTM with a linear highway over the last 96 values, averaged with a linear map of each channel's own "
    "window (ridge regression, in closed form); deciles that cannot cross",
    limits="Knows no calendar and no weather, and leads a channel back to the level it had in the months of training: one that has "
    "left it for good is forecast too near to it. Intervals were calibrated on sixteen months of one transformer.",
)


@dataclass(frozen=True, slots=True)
class Dims:
    """Sizes of a forecaster."""

    channels: int = 7
    lookback: int = 96
    horizon: int = 96
    hidden: int = 64
    dropout: float = 0.3
    season: int = DAY  # steps of the pattern that the features look for; 3, 6, 12, 24, ...
    regression: bool = False  # whether a linear map of each channel's own window stands beside


class Forecast(NamedTuple):
    """mean [..., horizon, channels], quantiles [..., horizon, channels, Q]; never crossing."""

    mean: Tensor
    quantiles: Tensor


def positive(values: Tensor) -> Tensor:
    """A smooth step from 0 to the identity (Barron's squareplus). Not softplus: onnxruntime computes logarithms a vector
    at a time and the rest one by one, with other last bits, so that a row's answer would depend on its place."""
    return 0.5 * (values + torch.sqrt(values * values + 1.0))


class Forecaster(nn.Module):
    """Works on standardised values inside; `forward` takes and gives the units of the data."""

    centre: Tensor
    scale: Tensor
    width: Tensor
    regression: Tensor
    share: Tensor

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.dims = dims
        self.register_buffer("centre", torch.zeros(dims.channels))  # of the training part, set by `prepare`
        self.register_buffer("scale", torch.ones(dims.channels))
        self.register_buffer("width", torch.ones(()))  # of all intervals; set on the validation set after training
        self.lstm = remember(nn.LSTM(FEATURES, dims.hidden, batch_first=True))
        self.highway = nn.Linear(dims.lookback, dims.horizon)
        nn.init.constant_(self.highway.weight, 0.0)  # begins as "the last value stays"
        nn.init.zeros_(self.highway.bias)
        self.dropout = nn.Dropout(dims.dropout)
        self.correct = nn.Linear(dims.hidden, dims.horizon)
        nn.init.zeros_(self.correct.weight)
        nn.init.zeros_(self.correct.bias)
        self.spread = nn.Linear(dims.hidden + 2, dims.horizon * len(QUANTILES))
        nn.init.normal_(self.spread.weight, std=0.01)
        nn.init.constant_(self.spread.bias, -0.5)
        if dims.regression:
            self.register_buffer("regression", torch.zeros(dims.channels, dims.lookback, dims.horizon))  # solved in `finish`
            self.register_buffer("share", torch.ones(()))  # of LSTM and highway in the mean; the rest is the regression's

    def features(self, before: Tensor, values: Tensor) -> Tensor:
        """before [batch, lookback, channels], values [batch, time, channels], both standardised → what the LSTM reads,
        [batch, time, channels, FEATURES]: the step, the step from a season (a day) ago, the deviation from the season's mean and
        that mean's change in a season. Sums of shifted slices: each value's result is the same wherever the series is cut."""
        time = values.shape[1]
        series = torch.cat([before, values], dim=1)
        back, season = self.dims.lookback, self.dims.season

        def ago(steps: int) -> Tensor:
            return series[:, back - steps : back - steps + time]

        # the sum of `season` values that ends at each place of `series` from season - 1 on, by doubling: 1, 2, 4, 8, then 3 * 8
        third = season // 3
        total = series
        for shift in (2**n for n in range(third.bit_length() - 1)):
            total = total[:, shift:] + total[:, :-shift]
        total = total[:, 2 * third :] + total[:, third:-third] + total[:, : -2 * third]
        mean = total / season  # mean[:, p] ends at series[:, p + season - 1]
        now_mean = mean[:, back - season + 1 : back - season + 1 + time]
        before_mean = mean[:, back - 2 * season + 1 : back - 2 * season + 1 + time]
        parts = (values - ago(1), values - ago(season), values - now_mean, now_mean - before_mean)
        return torch.stack(parts, dim=3)

    def follow(self, before: Tensor, values: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h, c [1, batch, channels * hidden] → the LSTM's output [batch, channels, time, hidden] and next h, c."""
        batch, time, channels = values.shape
        rows, hidden = batch * channels, self.dims.hidden
        given = self.features(before, values).permute(0, 2, 1, 3).reshape(rows, time, FEATURES)
        output, (h, c) = self.lstm(given, (h.reshape(1, rows, hidden), c.reshape(1, rows, hidden)))
        shape = (1, batch, channels * hidden)
        return output.reshape(batch, channels, time, hidden), h.reshape(shape), c.reshape(shape)

    def forecast(self, state: Tensor, window: Tensor) -> Forecast:
        """state [..., channels, hidden], window [..., channels, lookback] standardised → standardised forecast."""
        last = window[..., -1:]
        relative = window - last
        state = self.dropout(state)
        mean = last + self.highway(relative) + self.correct(state)  # [..., channels, horizon]
        if self.dims.regression:
            own = self.regress(window)
            mean = self.share * mean + (1 - self.share) * own
        # Errors grow with how much the window moved: the spread is in units of its mean deviation. Sums run over `lookback`
        # floats, whole vector registers for 48 or 96: else the rows' alignment would show in onnxruntime's last bits.
        level = relative.sum(-1, keepdim=True) / self.dims.lookback
        moved = (relative - level).abs().sum(-1, keepdim=True) / self.dims.lookback
        steps = functional.pad(relative[..., 1:] - relative[..., :-1], (1, 0)).abs().sum(-1, keepdim=True) / self.dims.lookback
        raw = self.spread(torch.cat([state, moved, steps], dim=-1))
        raw = raw.reshape(*raw.shape[:-1], self.dims.horizon, len(QUANTILES))
        unit = (moved + 0.1).unsqueeze(-1)
        up, down = positive(raw[..., MIDDLE + 1 :]) * unit, positive(raw[..., :MIDDLE]) * unit
        # running sums outward from the middle, so that no quantile crosses another
        above = [up[..., 0]]
        below = [down[..., -1]]
        for n in range(1, MIDDLE):
            above.append(above[-1] + up[..., n])
            below.append(below[-1] + down[..., -1 - n])
        middle = raw[..., MIDDLE] + 0.5  # the bias begins at -0.5; the median may differ from the mean
        away = [*(-b for b in reversed(below)), torch.zeros_like(middle), *above]
        quantiles = torch.stack([mean + middle + self.width * a for a in away], dim=-1)
        return Forecast(mean.transpose(-1, -2), quantiles.transpose(-2, -3))

    def regress(self, window: Tensor) -> Tensor:
        """window [..., channels, lookback], standardised → what each channel's own map makes of it [..., channels, horizon]."""
        if not torch.onnx.is_in_onnx_export():
            own: Tensor = torch.einsum("...cl,clh->...ch", window, self.regression)
            return own
        # A product for each channel gave last bits that hung on how many rows a round had. So one matrix for all, of whose result
        # each takes its own part: as many times the work as there are channels, which for seven is little.
        channels = self.dims.channels
        every = functional.linear(window, self.regression.transpose(1, 2).flatten(0, 1))
        every = every.reshape(*every.shape[:-1], channels, self.dims.horizon)
        own = (every * torch.eye(channels).unsqueeze(-1)).sum(-2)
        return own

    def start(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """first [batch, 1, channels], any units → the look-back before anything was seen, and h (or c)."""
        d = self.dims
        return first.expand(-1, d.lookback, -1), first.new_zeros(1, first.shape[0], d.channels * d.hidden)

    def forward(
        self, values: Tensor, window: Tensor, seen: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """values [batch, time, channels]; window [batch, lookback, channels], seen [batch, 1] observations so far,
        h, c [1, batch, channels * hidden] → mean [batch, horizon, channels], quantiles [batch, horizon, channels, Q],
        next window, seen, h, c. A session that has seen nothing takes its first observation for all of its past."""
        fresh = (seen == 0).unsqueeze(2)  # [batch, 1, 1]
        before = torch.where(fresh, values[:, :1], window)
        window = torch.cat([before, values], dim=1)[:, -self.dims.lookback :]
        _, h, c = self.follow(self.standardise(before), self.standardise(values), h, c)
        # the newest output, read from h: a slice of the whole output would cost a copy of it
        state = h.reshape(values.shape[0], self.dims.channels, self.dims.hidden)
        found = self.forecast(state, self.standardise(window).transpose(1, 2))
        mean = found.mean * self.scale + self.centre
        quantiles = found.quantiles * self.scale.unsqueeze(1) + self.centre.unsqueeze(1)
        return mean, quantiles, window, seen + values.shape[1], h, c

    def at(self, values: Tensor, positions: Tensor) -> Forecast:
        """values [batch, time, channels] of fresh sessions, standardised → the forecasts each would have given after
        `positions` [count] observations: mean [batch, count, horizon, channels] and its quantiles."""
        before, nothing = self.start(values[:, :1])
        output, _, _ = self.follow(before, values, nothing, nothing)
        series = torch.cat([before, values], dim=1)
        windows = series.unfold(1, self.dims.lookback, 1)  # [batch, time + 1, channels, lookback]; the p-th after p values
        return self.forecast(output[:, :, positions - 1].transpose(1, 2), windows[:, positions])

    def standardise(self, values: Tensor) -> Tensor:
        """In units of the training part's mean and standard deviation; [..., channels]."""
        return (values - self.centre) / self.scale


def rebuild(dims: Mapping[str, Any]) -> Forecaster:
    """The model of a checkpoint's dims, in eval mode."""
    return Forecaster(Dims(**dims)).eval()


def describe(model: nn.Module) -> dict[str, Graph]:
    """The contract: cut anywhere, the outputs are the forecast after the newest observation."""
    assert isinstance(model, Forecaster)
    d = model.dims
    memory = (1, "batch", d.channels * d.hidden)
    graph = Graph(
        file="forecaster.onnx",
        inputs=(Described("values", "float32", ("batch", "time", d.channels), "observations, oldest first, in the data's units"),),
        outputs=(
            Described("mean", "float32", ("batch", d.horizon, d.channels), "the next values, after the newest observation"),
            Described("quantiles", "float32", ("batch", d.horizon, d.channels, len(QUANTILES)), "ascending, at task.quantiles"),
        ),
        states=(
            State("window", "next_window", "float32", ("batch", d.lookback, d.channels)),
            State("seen", "next_seen", "int64", ("batch", 1)),
            State("h", "next_h", "float32", memory),
            State("c", "next_c", "float32", memory),
        ),
    )
    return {"forecaster": graph}


def parts(model: nn.Module) -> dict[str, nn.Module]:
    return {"forecaster": model.eval()}


def resources(run: Path) -> dict[str, Path]:
    return {}


def task(model: nn.Module, run: Path) -> dict[str, Any]:
    assert isinstance(model, Forecaster)
    about = json.loads((run / FORECAST).read_text(encoding="utf-8"))
    return {
        "kind": "forecast", "channels": about["channels"], "horizon": model.dims.horizon, "quantiles": list(QUANTILES),
        "lookback": model.dims.lookback, "step_seconds": about["step_seconds"],
    }  # fmt: skip


# Training.


@dataclass(frozen=True, slots=True)
class Data:
    """The `data` table of a configuration."""

    kind: str = "ett"  # or m4, univariate, waves (generated)
    series: str = "ETTh1"
    observed: int = 288  # observations of a training session; it is asked for forecasts on the way
    sessions: int = 2048  # training sessions an epoch, begun at random rows
    rows: int = 32  # sessions in a batch


@dataclass(frozen=True, slots=True)
class Model:
    """The `model` table of a configuration."""

    lookback: int = 96
    horizon: int = 96
    hidden: int = 64
    dropout: float = 0.3
    season: int = DAY
    regression: bool = False


def pinball(quantiles: Tensor, truth: Tensor) -> Tensor:
    """Mean quantile loss; quantiles [..., Q], truth [...]. Zero for a perfect point, and smallest at the true quantiles."""
    levels = torch.tensor(QUANTILES, device=truth.device)
    error = truth.unsqueeze(-1) - quantiles
    return torch.maximum(levels * error, (levels - 1) * error).mean()


PENALTIES = (1.0, 30.0, 300.0, 1000.0)  # on squares of the regression's weights, tried on the validation months
SHARES = tuple(n / 20 for n in range(21))

COVERED = (0.75, 0.85)  # of the validation values, by an 80 % interval, is well enough


class ForecasterTraining(Training):
    """Squared error of the mean and pinball loss of the quantiles, at several lengths of one session at once."""

    def __init__(self, config: Config, model: Forecaster, data: Data, series: Series, out: Path) -> None:
        super().__init__(model, asdict(model.dims), config)
        self.data, self.out, self.series = data, out, series
        d = model.dims
        values = (torch.from_numpy(series.values) - model.centre) / model.scale
        self.train_windows = Windows(values[: series.train], data.observed + d.horizon)
        # the first forecast of a part looks back into the part before it, as everybody's does
        self.validation_values = values[series.train - d.lookback : series.validation]
        # before a full look-back, once it is full (the published task), and then ever longer
        later = range(d.lookback + 24, data.observed + 1, 48)
        self.positions = torch.tensor([d.lookback // 4, d.lookback // 2, d.lookback, d.lookback, *later, data.observed])

    def train_batches(self) -> DataLoader[Any]:
        sampler = AtRandom(len(self.train_windows), self.data.sessions, self.config.seed)
        return DataLoader(self.train_windows, self.data.rows, sampler=sampler, num_workers=self.config.run.workers)

    def validation_batches(self) -> DataLoader[Any]:
        """Every window of look-back and horizon, one step apart."""
        d = self.dims
        rows = max(1, min(256, 2048 // d["channels"]))  # of hundreds of channels 256 windows would be gigabytes
        return DataLoader(Windows(self.validation_values, d["lookback"] + d["horizon"]), rows)

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.model
        assert isinstance(model, Forecaster)
        found = model.at(batch[:, : self.data.observed], self.positions)
        truth = batch.unfold(1, model.dims.horizon, 1)[:, self.positions].transpose(-1, -2)  # [batch, count, horizon, channels]
        squared, quantile = functional.mse_loss(found.mean, truth), pinball(found.quantiles, truth)
        return squared + quantile, {"mse": squared.detach(), "pinball": quantile.detach()}

    def scores(self, batch: Any) -> dict[str, tuple[Tensor, int]]:
        model = self.model
        assert isinstance(model, Forecaster)
        back = model.dims.lookback
        found = model.at(batch[:, :back], torch.tensor([back]))
        truth = batch[:, None, back:]
        squared, quantile = functional.mse_loss(found.mean, truth), pinball(found.quantiles, truth)
        return {
            "loss": (squared + quantile, len(batch)), "mse": (squared, len(batch)), "pinball": (quantile, len(batch)),
            "coverage": (covered(found.quantiles, truth), len(batch)),
        }  # fmt: skip

    def validation_end_scores(self) -> dict[str, float]:
        """The same forecasts from one session that goes on through the whole part."""
        model = self.model
        assert isinstance(model, Forecaster)
        return {f"going_on_{name}": value for name, value in going_on(model, self.validation_values).items()}

    def on_fit_end(self) -> None:
        if self.trainer.is_global_zero:
            self.finish()

    def finish(self) -> None:
        """See to the width of the intervals, with the weights that were kept; draw some forecasts.

        Where the intervals as trained cover the validation months well enough (COVERED), they stay as they are: ETTh1's
        validation months are of one season and vary nearly twice as much as those of training, and a width fitted to them
        would be theirs alone. Otherwise the width is fitted to the validation months.
        """
        kept = checkpoint.load(self.out)
        model = rebuild(kept.dims)
        assert isinstance(model, Forecaster)
        model.load_state_dict(dict(kept.weights))
        model.width.fill_(1.0)
        if model.dims.regression:
            self.solve(model)
            kept = replace(kept, scores=self.rescored(model))
            loop.rescore(self.out, kept.scores)
        low, high = COVERED
        if not low <= kept.scores["validation_coverage"] <= high:
            length = model.dims.lookback + model.dims.horizon
            seen = Subset(Windows(self.validation_values, length), range(0, len(self.validation_values) - length + 1, 3))
            with torch.inference_mode():
                model.width.copy_(torch.tensor(calibrate(model, DataLoader(seen, 256))))
        checkpoint.save(replace(kept, weights=model.state_dict()), self.out / checkpoint.FILE)
        about = {
            "channels": list(self.series.channels), "step_seconds": self.series.step_seconds,
            "width": float(model.width),
        }  # fmt: skip
        (self.out / FORECAST).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        draw(self.out / "forecast.png", model, self.validation_values, self.series.channels)

    def solve(self, model: Forecaster) -> None:
        """Solve the regression on the training months, for each penalty; keep that penalty and that share with the smallest
        squared error on the validation months."""
        d = model.dims
        length = d.lookback + d.horizon
        train = self.train_windows.values.unfold(0, length, 1).transpose(1, 2).double()  # [windows, length, channels]
        windows = self.validation_values.unfold(0, length, 1).transpose(1, 2)
        before, truth = windows[:, : d.lookback], windows[:, d.lookback :]
        model.share.fill_(1.0)
        with torch.inference_mode():
            places = torch.tensor([d.lookback])
            ours = torch.cat([model.at(some, places).mean[:, 0] for some in torch.split(before, 256)])  # [windows, horizon, channels]
        best = math.inf
        for penalty in PENALTIES:
            weights = ridge(train[:, : d.lookback], train[:, d.lookback :], penalty).float()  # [channels, lookback, horizon]
            own = torch.einsum("nlc,clh->nhc", before, weights)
            for share in SHARES:
                error = float(functional.mse_loss(share * ours + (1 - share) * own, truth))
                if error < best:
                    best = error
                    model.share.fill_(share)
                    model.regression.copy_(weights)

    def rescored(self, model: Forecaster) -> dict[str, float]:
        """The validation scores of a finished model."""
        self.model, trained = model, self.model
        sums: dict[str, float] = {}
        count = 0
        with torch.inference_mode():
            for batch in self.validation_batches():
                for name, (mean, rows) in self.scores(batch).items():
                    sums[name] = sums.get(name, 0.0) + float(mean) * rows
                count += len(batch)
            found = {name: value / count for name, value in sums.items()} | self.validation_end_scores()
        self.model = trained
        return {f"validation_{name}": value for name, value in found.items()}


def ridge(given: Tensor, wanted: Tensor, penalty: float) -> Tensor:
    """given [n, lookback, channels], wanted [n, horizon, channels] → of each channel the linear map of least squares with a
    penalty on its own squares, [channels, lookback, horizon]."""
    past, ahead = given.permute(2, 0, 1), wanted.permute(2, 0, 1)
    square = past.transpose(1, 2) @ past + penalty * torch.eye(past.shape[2], dtype=past.dtype)
    maps: Tensor = torch.linalg.solve(square, past.transpose(1, 2) @ ahead)
    return maps


def covered(quantiles: Tensor, truth: Tensor) -> Tensor:
    """The share of values between the outermost quantiles: 0.8 is what 0.1 and 0.9 promise."""
    return ((truth >= quantiles[..., 0]) & (truth <= quantiles[..., -1])).float().mean()


def going_on(model: Forecaster, values: Tensor) -> dict[str, float]:
    """MSE and coverage after every observation from the look-back on, in one session over `values` [rows, channels]."""
    d = model.dims
    with torch.inference_mode():
        positions = torch.arange(d.lookback, len(values) - d.horizon + 1)
        found = model.at(values[None, : len(values) - d.horizon], positions)
        truth = values.unfold(0, d.horizon, 1)[positions].transpose(-1, -2)[None]
        return {"mse": float(functional.mse_loss(found.mean, truth)), "coverage": float(covered(found.quantiles, truth))}


def calibrate(model: Forecaster, batches: Iterable[Tensor]) -> float:
    """The width at which 80 % of the values lie between the deciles 0.1 and 0.9, by bisection over [0.25, 4]."""
    back = model.dims.lookback
    low, high = math.log(0.25), math.log(4.0)
    found = [(model.at(b[:, :back], torch.tensor([back])).quantiles, b[:, None, back:]) for b in batches]
    centre = [q[..., MIDDLE] for q, _ in found]
    for _ in range(20):
        width = math.exp((low + high) / 2) / float(model.width)
        inside = total = 0.0
        for (quantiles, truth), middle in zip(found, centre, strict=True):
            least = middle + width * (quantiles[..., 0] - middle)
            most = middle + width * (quantiles[..., -1] - middle)
            inside += float(((truth >= least) & (truth <= most)).sum())
            total += truth.numel()
        low, high = ((low + high) / 2, high) if inside / total < 0.8 else (low, (low + high) / 2)
    return math.exp((low + high) / 2)


def draw(file: Path, model: Forecaster, values: Tensor, channels: tuple[str, ...]) -> None:
    """Forecasts of the last channel and the first from three moments of `values`, with their 80 % intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    d = model.dims
    figure = Figure(figsize=(15, 6))
    FigureCanvasAgg(figure)
    for column, share in enumerate((0.2, 0.5, 0.8)):
        first = int(share * (len(values) - d.lookback - d.horizon))
        part = values[first : first + d.lookback + d.horizon]
        with torch.inference_mode():
            found = model.at(part[None, : d.lookback], torch.tensor([d.lookback]))
        for row, channel in enumerate((len(channels) - 1, 0)):
            axes = figure.add_subplot(2, 3, row * 3 + column + 1)
            unit, shift = float(model.scale[channel]), float(model.centre[channel])
            axes.plot(range(-d.lookback, d.horizon), part[:, channel] * unit + shift, color="black", linewidth=0.8)
            mean, quantiles = found.mean[0, 0, :, channel], found.quantiles[0, 0, :, channel]
            axes.plot(range(d.horizon), mean * unit + shift, color="tab:blue", label="mean")
            edges = quantiles * unit + shift
            axes.fill_between(range(d.horizon), edges[:, 0], edges[:, -1], alpha=0.25, label="0.1 to 0.9")
            axes.set_title(channels[channel], fontsize=9)
            axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=100)


def prepare(config: Config, data: Path | None, out: Path) -> ForecasterTraining:
    """Load the series and standardise by its training part; nothing of the test part is read into the model."""
    settings, chosen = section(Model, config.model, "model"), section(Data, config.data, "data")
    season = settings.season
    if season < 3 or season % 3 or (season // 3).bit_count() != 1:
        raise ConfigError(f"model.season {season}: three times a power of two, such as 12 or 24")
    if settings.lookback < 2 * season:
        raise ConfigError(f"model.lookback {settings.lookback}: at least two seasons, {2 * season}")
    series = load(chosen.kind, chosen.series, data, config.seed)
    model = Forecaster(Dims(channels=series.values.shape[1], **asdict(settings)))
    centre, deviation = scale(series)
    model.centre.copy_(centre)
    model.scale.copy_(deviation)
    return ForecasterTraining(config, model, chosen, series, out)
