"""What the demo sends: reviews, captions, a post, a series, a drawn digit, and tensors of any model. Made up, the same every time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from seqserve import tensors
from seqserve.results import Array

REVIEWS = (
    "I went in expecting very little and came out humming; the two leads are a joy and the last half hour is superb.",
    "Slow, muddled and far too long. I kept checking my watch, and the ending made me angry.",
    "A small, warm film with a great heart. My whole family loved it, and we will watch it again.",
    "The jokes are stale, the acting is wooden and the plot makes no sense at all. A complete waste of an evening.",
)
CAPTION = "A brown dog runs along the beach with a stick in its mouth."
CAPTIONS = (
    "Two men are playing chess in a park.",
    "A little girl in a red dress is climbing a tree.",
    "A man is riding a bicycle down a busy street.",
)
PIECES = ("I went in expecting very little; ", "the first hour is dull, ", "but the last is superb, and I loved every minute of it.")
OTHERWISE = "and the last is worse. A complete waste of an evening."
POST = "Just met Alicia Keys at the airport in London, on the way to the Empire State Building."
OPENING = "ROMEO:\nWhat light is this that"
CHANNELS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")  # a power transformer's loads and oil temperature


def seven() -> NDArray[np.uint8]:
    """A seven as MNIST's lie in their images, grey [28, 28]: a bar, and a stroke that leans."""
    y, x = np.mgrid[0:28, 0:28]
    bar = np.abs(y - 6) / 1.8 + np.maximum(0, np.abs(x - 13.5) - 5.5)
    stroke = np.abs(x - (18.5 - 0.45 * (y - 6))) / 1.8 + np.maximum(0, np.abs(y - 14) - 8)
    return np.asarray(np.round(255 * np.clip(1.5 - np.minimum(bar, stroke), 0, 1)), np.uint8)


def observations(steps: int = 96) -> NDArray[np.float32]:
    """Made-up hourly readings of a transformer, steps × channels: a daily rhythm, a slow drift and some noise, in the
    ranges that such a station has."""
    hour = np.arange(steps)[:, np.newaxis]  # steps × 1
    level = np.array([9.0, 2.5, 6.0, 1.2, 2.8, 0.9, 14.0])
    swing = np.array([5.0, 1.2, 4.5, 0.9, 0.7, 0.25, 3.0])
    peak = np.array([19.0, 19.0, 19.0, 19.0, 20.0, 20.0, 16.0])  # hour of the day
    drift = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.5])
    noise = np.random.default_rng(7).normal(0, 0.12, (steps, len(level)))
    daily = np.cos((hour - peak) / 24 * 2 * np.pi) + 0.3 * np.cos((hour - peak) / 12 * 2 * np.pi)
    return np.asarray(level + swing * (daily + noise) + drift * hour / steps, np.float32)


def example(datatype: str, shape: Sequence[int]) -> Array:
    """A small tensor of a model's datatype and shape: one row, twelve of any other length that varies."""
    varying = iter([1])
    lengths = [n if n >= 0 else next(varying, 12) for n in shape]
    if datatype == tensors.BYTES:
        return np.full(lengths, b"word", object)
    dtype = tensors.DATATYPES[datatype]
    count = int(np.prod(lengths))
    values = np.linspace(-1, 1, count) if dtype.kind == "f" else np.arange(5, 5 + count)
    return values.astype(dtype).reshape(lengths)
