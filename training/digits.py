"""Digits: an image read row by row; after each row it says which digit it takes it for.

The data are MNIST, or `recall`: made-up images whose first row alone tells the label, then noise, so that a layer must
remember it. It knows the model, its data and how it is cut for serving. It must not know the server, or torch.onnx.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from contract import bundle
from training.cells import Recurrent, carried
from training.config import Cells, Config, ConfigError, section
from training.data import mnist
from training.data.batches import Batches
from training.loop import Training
from training.tasks import About

ABOUT = About(
    title="Handwritten digits, read row by row",
    use="Says which digit an image shows, 28 × 28 greys with 0 the paper and 255 the ink, and says so after each row: a digit "
    "that is still being drawn can be sent as it grows. Not for several digits in one image.",
    data="MNIST (LeCun, Cortes and Burges, 1998): 60,000 images, part of them held out for validation; the 10,000 test images "
    "are used for the final figure only.",
    licence="The publishers name no terms; the set is commonly given as CC BY-SA 3.0. To be cited as LeCun et al. 1998.",
    design="Greys standardised by the training set's mean and deviation, stacked LSTM layers, and a linear layer over what the "
    "last of them gives at each row. Trained on images shifted, turned and stretched a little; the loss is that of the last "
    "row and a small share of that of the rows before.",
    limits="Digits must lie in the image as MNIST's do: centred by mass, in a box of 20 × 20. After few rows, many digits still "
    "look alike, and the probabilities say so.",
)


@dataclass(frozen=True, slots=True)
class Dims:
    cells: Cells = field(default_factory=Cells)
    width: int = mnist.SIDE
    length: int = mnist.SIDE  # rows of a whole image
    labels: tuple[str, ...] = mnist.LABELS
    mean: float = 0.0  # of the greys; the inputs are standardised within the model
    deviation: float = 255.0


@dataclass(frozen=True, slots=True)
class Data:
    """The `data` section of the configuration."""

    kind: str = "mnist"  # mnist, recall
    validation: int = 5_000  # held out of the training part
    train: int = 0  # use only so many of the rest; 0: all
    rows: int = 128  # images of a batch
    standardise: bool = True  # by mean and deviation of the training part; else divide by 255
    early: float = 0.0  # share of the loss that is the mean over all rows but the last
    shift: float = 0.0  # while training: at most so many pixels, either way
    turn: float = 0.0  # ... degrees
    stretch: float = 0.0  # ... share of its size, each way by itself
    length: int = mnist.SIDE  # recall: rows of an image
    noise: int = 63  # recall: the darkest of the noise


class Digits(nn.Module):
    """Scores after each row, for training whole and for serving in steps."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.dims = dims
        self.layers = Recurrent(dims.width, dims.cells)
        self.head = nn.Linear(self.layers.width, len(dims.labels))

    def forward(self, images: Tensor, states: tuple[Tensor, ...] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """images uint8, or float of the same range, [rows, time, width] → logits [rows, time, labels], states. Where both
        directions are read there is one step only: what each knows at its end."""
        read, states = self.layers((images.float() - self.dims.mean) / self.dims.deviation, states)
        if self.dims.cells.bidirectional:
            half = self.dims.cells.hidden
            read = torch.cat([read[:, -1:, :half], read[:, :1, half:]], -1)
        return self.head(read), states


class DigitsTraining(Training):
    monitor = "validation_accuracy"
    monitor_mode = "max"

    def __init__(self, model: Digits, config: Config, data: Data, train: Images, validation: Images) -> None:
        super().__init__(model, asdict(model.dims), config)
        self.settings, self.train_images, self.validation_images = data, train, validation

    @classmethod
    def prepare(cls, config: Config, data: Path | None, out: Path) -> DigitsTraining:
        settings = section(Data, config.data, "data")
        if settings.kind not in ("mnist", "recall"):
            raise ConfigError(f"data.kind {settings.kind!r}: one of mnist, recall")
        found = mnist.load("train", data) if settings.kind == "mnist" else recall(6_000, settings.length, settings.noise, config.seed)
        order = np.random.default_rng(config.seed).permutation(len(found.labels))
        held, rest = order[: settings.validation], order[settings.validation :]
        rest = rest[: settings.train or None]
        train, validation = (Images(found.images[places], found.labels[places]) for places in (rest, held))
        scale = {}
        if settings.standardise:
            scale = {"mean": float(found.images[rest].mean()), "deviation": float(found.images[rest].std())}
        dims = section(Dims, {"length": found.images.shape[1], **scale, **config.model}, "model")
        return cls(Digits(dims), config, settings, train, validation)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = batch
        settings = self.settings
        if settings.shift or settings.turn or settings.stretch:
            images = distorted(images, settings.shift, settings.turn, settings.stretch)
        logits, _ = self.model(images)
        accuracy = (logits[:, -1].argmax(-1) == labels).float().mean()
        loss = functional.cross_entropy(logits[:, -1], labels)
        if settings.early and logits.shape[1] > 1:
            before = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.repeat_interleave(logits.shape[1] - 1))
            loss = (1 - settings.early) * loss + settings.early * before
        return loss, {"accuracy": accuracy.detach()}

    def scores(self, batch: Batch) -> dict[str, tuple[Tensor, int]]:
        images, labels = batch
        logits, _ = self.model(images)
        right = (logits.argmax(-1) == labels[:, None]).float().mean(0)  # [time]
        found = {"loss": functional.cross_entropy(logits[:, -1], labels), "accuracy": right[-1]}
        if self.settings.early and len(right) > 1:
            found["accuracy_half_drawn"] = right[len(right) // 2 - 1]
        return {name: (value, len(labels)) for name, value in found.items()}

    def train_batches(self) -> DataLoader[Batch]:
        images = self.train_images
        order = Batches([1] * len(images), self.settings.rows, seed=self.config.seed)
        return DataLoader(images, sampler=order, batch_size=None, num_workers=self.config.run.workers)

    def validation_batches(self) -> DataLoader[Batch]:
        images = self.validation_images
        return DataLoader(images, sampler=Batches([1] * len(images), 500, shuffle=False), batch_size=None)


Batch = tuple[Tensor, Tensor]
"""Images uint8 [rows, time, width], labels [rows]."""


class Images(Dataset[Batch]):
    """Images; asked for a list of places it gives the batch of them."""

    def __init__(self, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> None:
        self.images, self.labels = torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, places: list[int]) -> Batch:
        return self.images[places], self.labels[places]


def distorted(images: Tensor, shift: float, turn: float, stretch: float) -> Tensor:
    """Each image moved, turned and stretched at random within the limits, paper coming in from outside; float [rows, time, width].

    Drawn from torch's own generator, which is seeded by epoch.
    """
    rows, height, width = images.shape
    either = torch.rand(5, rows, device=images.device) * 2 - 1
    angle = either[0] * math.radians(turn)
    wide, high = 1 + either[1] * stretch, 1 + either[2] * stretch
    across, down = either[3] * 2 * shift / width, either[4] * 2 * shift / height
    cos, sin = torch.cos(angle), torch.sin(angle)
    affine = torch.stack([torch.stack([cos * wide, -sin * high, across], -1), torch.stack([sin * wide, cos * high, down], -1)], 1)
    grid = functional.affine_grid(affine, [rows, 1, height, width], align_corners=False)
    return functional.grid_sample(images[:, None].float(), grid, align_corners=False)[:, 0]


def recall(count: int, length: int, noise: int, seed: int) -> mnist.Digits:
    """Made-up images [count, length, 28]: in the first row a stroke at one of ten places, which is the label; then noise."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, len(mnist.LABELS), count).astype(np.uint8)
    images = random.integers(0, noise + 1, (count, length, mnist.SIDE)).astype(np.uint8)
    images[:, 0] = 0
    for place in range(2):
        images[np.arange(count), 0, 4 + 2 * labels + place] = 255
    return mnist.Digits(images, labels)


# How it is served.


def prepare(config: Config, data: Path | None, out: Path) -> DigitsTraining:
    return DigitsTraining.prepare(config, data, out)


def rebuild(dims: Mapping[str, Any]) -> Digits:
    return Digits(section(Dims, dims, "model")).eval()


def describe(model: nn.Module) -> dict[str, bundle.Graph]:
    """One graph: it reads rows and says, after each, which digit it takes the image for."""
    assert isinstance(model, Digits)
    dims = model.dims
    labels, both = len(dims.labels), dims.cells.bidirectional
    rows = bundle.Tensor(
        "rows", "uint8", (bundle.BATCH, bundle.TIME, dims.width), "greys from the top, 0 paper to 255 ink", low=0, high=255
    )
    whole = bundle.Tensor("probabilities", "float32", (bundle.BATCH, labels), "of each digit, after all rows that were read")
    each = bundle.Tensor("by_row", "float32", (bundle.BATCH, bundle.TIME, labels), "of each digit, after each row")
    outputs = (whole,) if both else (whole, each)
    return {"step": bundle.Graph("step.onnx", (rows,), outputs, carried(dims.cells), cut=not both, max_time=dims.length)}


class _Step(nn.Module):
    def __init__(self, model: Digits) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Tensor, h: Tensor | None = None, c: Tensor | None = None) -> tuple[Tensor, ...]:
        logits, after = self.model(rows, tuple(s for s in (h, c) if s is not None) or None)
        by_row = torch.softmax(logits, -1)
        if self.model.dims.cells.bidirectional:
            return (by_row[:, -1],)
        return by_row[:, -1], by_row, *after


def parts(model: nn.Module) -> dict[str, nn.Module]:
    assert isinstance(model, Digits)
    return {"step": _Step(model)}


def task(model: nn.Module, run: Path) -> dict[str, Any]:
    assert isinstance(model, Digits)
    return {"kind": "tensors", "labels": list(model.dims.labels), "input": "rows", "probabilities": "probabilities"}


def resources(run: Path) -> dict[str, Path]:
    return {}
