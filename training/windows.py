"""Stretches of a long series to train a forecaster on. It must not know the model or files of a data set."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from training.data import ett

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
