"""A window in, a forecast out: the multilayer perceptron that a recurrent forecaster is measured by.

One → one: nothing is carried and nothing is cut, so it is served by plain tensors. All channels share the weights, and
values count only relative to the window's last. This file knows the model, its training and its contract; it must not know
files of a data set or onnx.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from contract.bundle import Graph
from contract.bundle import Tensor as Described
from training.config import Config, section
from training.data.ett import Series
from training.loop import Training
from training.tasks import About
from training.windows import AtRandom, Windows, load, scale

ABOUT = About(
    title="Window perceptron, a baseline for the forecaster",
    use="The next 96 hours of ETT-like hourly series from the last 96, as plain tensors. To compare with; the forecaster is "
    "better, follows a series from observation to observation and says how sure it is.",
    data="ETTh1 (Zhou et al. 2021): 12 months to train, 4 to validate, 4 to test",
    licence="as the rest of this repository; the data (not included) are CC BY-ND 4.0",
    design="one hidden layer over the last 96 values relative to the newest, shared by the channels",
    limits="Sees 96 values and nothing before them. Gives no intervals.",
)


@dataclass(frozen=True, slots=True)
class Dims:
    """Sizes of a window perceptron."""

    channels: int = 7
    lookback: int = 96
    horizon: int = 96
    hidden: int = 128
    dropout: float = 0.3


class WindowMlp(nn.Module):
    """Works on standardised values inside; `forward` takes and gives the units of the data."""

    centre: Tensor
    scale: Tensor

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.dims = dims
        self.register_buffer("centre", torch.zeros(dims.channels))
        self.register_buffer("scale", torch.ones(dims.channels))
        self.read = nn.Linear(dims.lookback, dims.hidden)
        self.dropout = nn.Dropout(dims.dropout)
        self.tell = nn.Linear(dims.hidden, dims.horizon)
        nn.init.zeros_(self.tell.weight)  # begins as "the last value stays"
        nn.init.zeros_(self.tell.bias)

    def forecast(self, window: Tensor) -> Tensor:
        """window [batch, lookback, channels] → [batch, horizon, channels], both standardised."""
        by_channel = window.transpose(1, 2)
        last = by_channel[..., -1:]
        found: Tensor = last + self.tell(self.dropout(functional.relu(self.read(by_channel - last))))
        return found.transpose(1, 2)

    def forward(self, window: Tensor) -> tuple[Tensor]:
        """The same in the units of the data."""
        return (self.forecast((window - self.centre) / self.scale) * self.scale + self.centre,)


def rebuild(dims: Mapping[str, Any]) -> WindowMlp:
    """The model of a checkpoint's dims, in eval mode."""
    return WindowMlp(Dims(**dims)).eval()


def describe(model: nn.Module) -> dict[str, Graph]:
    """The contract: no time axis, for a window is one value of a fixed size."""
    assert isinstance(model, WindowMlp)
    d = model.dims
    window = Described("window", "float32", ("batch", d.lookback, d.channels), "the last observations, oldest first, in the data's units")
    mean = Described("mean", "float32", ("batch", d.horizon, d.channels), "the next values")
    return {"window_mlp": Graph(file="window_mlp.onnx", inputs=(window,), outputs=(mean,))}


def parts(model: nn.Module) -> dict[str, nn.Module]:
    return {"window_mlp": model.eval()}


def resources(run: Path) -> dict[str, Path]:
    return {}


def task(model: nn.Module, run: Path) -> dict[str, Any]:
    return {"kind": "tensors"}


# Training.


@dataclass(frozen=True, slots=True)
class Data:
    """The `data` table of a configuration."""

    kind: str = "ett"  # or m4, univariate, waves (generated)
    series: str = "ETTh1"
    windows: int = 4096  # training windows an epoch, begun at random rows
    rows: int = 64  # windows in a batch


@dataclass(frozen=True, slots=True)
class Model:
    """The `model` table of a configuration."""

    lookback: int = 96
    horizon: int = 96
    hidden: int = 128
    dropout: float = 0.3


class WindowTraining(Training):
    """Squared error over windows."""

    def __init__(self, config: Config, model: WindowMlp, data: Data, series: Series) -> None:
        super().__init__(model, asdict(model.dims), config)
        self.data, self.length = data, model.dims.lookback + model.dims.horizon
        values = (torch.from_numpy(series.values) - model.centre) / model.scale
        self.train_windows = Windows(values[: series.train], self.length)
        self.validation_windows = Windows(values[series.train - model.dims.lookback : series.validation], self.length)

    def train_batches(self) -> DataLoader[Any]:
        sampler = AtRandom(len(self.train_windows), self.data.windows, self.config.seed)
        return DataLoader(self.train_windows, self.data.rows, sampler=sampler, num_workers=self.config.run.workers)

    def validation_batches(self) -> DataLoader[Any]:
        return DataLoader(self.validation_windows, 256)

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.model
        assert isinstance(model, WindowMlp)
        back = model.dims.lookback
        return functional.mse_loss(model.forecast(batch[:, :back]), batch[:, back:]), {}

    def scores(self, batch: Any) -> dict[str, tuple[Tensor, int]]:
        return {"loss": (self.loss(batch)[0], len(batch))}


def prepare(config: Config, data: Path | None, out: Path) -> WindowTraining:
    """Load the series and standardise by its training part; nothing of the test part is read into the model."""
    settings, chosen = section(Model, config.model, "model"), section(Data, config.data, "data")
    series = load(chosen.kind, chosen.series, data, config.seed)
    model = WindowMlp(Dims(channels=series.values.shape[1], **asdict(settings)))
    centre, deviation = scale(series)
    model.centre.copy_(centre)
    model.scale.copy_(deviation)
    return WindowTraining(config, model, chosen, series)
