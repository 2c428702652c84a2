"""Stretches of a long series to train a forecaster on. It must not know the model or files of a data set (`data/`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from training.config import ConfigError
from training.data import ett, m4, univariate

DAY = 24  # steps of a daily pattern, as in hourly data


class Windows(Dataset[Tensor]):
    """Stretches of a standardised series, each named by its first row."""

    def __init__(self, values: Tensor, length: int) -> None:
        self.values, self.length = values, length

    def __len__(self) -> int:
        return len(self.values) - self.length + 1

    def __getitem__(self, first: int) -> Tensor:
        return self.values[first : first + self.length]


class AtRandom(Sampler[int]):
    """`count` rows to begin at, other ones each epoch; `set_epoch` is called by Lightning."""

    def __init__(self, among: int, count: int, seed: int) -> None:
        self.among, self.count, self.seed, self.epoch = among, count, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1000 + self.epoch)
        yield from torch.randint(self.among, (self.count,), generator=generator).tolist()


def waves(rows: int, channels: int, seed: int) -> ett.Series:
    """Generated: each channel a daily and a slower sine wave with noise, split like ETT."""
    rng = np.random.default_rng(seed)
    t = np.arange(rows)[:, None]
    daily = np.sin(2 * np.pi * (t / DAY + rng.random(channels)))
    slow = np.sin(2 * np.pi * (t / (10 * DAY) + rng.random(channels)))
    values = (10 + 3 * daily + 2 * slow + 0.3 * rng.normal(size=(rows, channels))).astype(np.float32)
    names = tuple(f"wave{n}" for n in range(channels))
    return ett.Series(values, names, rows * 3 // 5, rows * 4 // 5, rows)


def load(kind: str, name: str, data: Path | None, seed: int) -> ett.Series:
    """The series that a configuration names. Raises ConfigError, DataError."""
    match kind:
        case "ett":
            return ett.load(name, data)
        case "m4":
            return m4.series(data)
        case "univariate":
            return univariate.load(name, data)
        case "waves":
            return waves(3000, 3, seed)
    raise ConfigError(f"data.kind {kind!r}: one of ett, m4, univariate, waves")


def scale(series: ett.Series) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel's training part, [channels] each; nothing of the test part."""
    train = series.values[: series.train].astype(np.float64)
    return torch.from_numpy(train.mean(0)).float(), torch.from_numpy(train.std(0)).float()
