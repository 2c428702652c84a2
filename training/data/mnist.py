"""Handwritten digits: 60,000 to train on, 10,000 to test on, 28 × 28 greys (LeCun, Cortes, Burges, 1998).

It knows where the files come from and their format, idx; it must not know models.
"""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.data import DataError, Source, fetch

ADDRESS = "http://yann.lecun.com/exdb/mnist/"
SIDE = 28
LABELS = tuple("0123456789")
COUNTS = {"train": 60_000, "t10k": 10_000}
SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Digits:
    """images uint8 [count, 28, 28], 0 the paper and 255 the ink; labels uint8 [count]."""

    images: Array
    labels: Array


def load(part: str, data: Path | None) -> Digits:
    """The part "train" or "test". `data` is a directory with mnist/*.gz, or None to download. Raises DataError."""
    name = {"train": "train", "test": "t10k"}[part]
    images, labels = (_read(f"{name}-{what}-ubyte.gz", data) for what in ("images-idx3", "labels-idx1"))
    if images.shape != (COUNTS[name], SIDE, SIDE) or labels.shape != (COUNTS[name],):
        raise DataError(f"mnist: {part} has images {images.shape} and labels {labels.shape}; fetch it again")
    return Digits(images, labels)


def _read(name: str, data: Path | None) -> Array:
    file = fetch(Source(name, ADDRESS + name, "sha256:" + SHA256[name]), data, "mnist")
    raw = gzip.decompress(file.read_bytes())
    zero, kind, axes = struct.unpack(">HBB", raw[:4])
    if (zero, kind) != (0, 8):  # 8: unsigned bytes
        raise DataError(f"{file} is no idx file of bytes: fetch it again")
    shape = struct.unpack(f">{axes}I", raw[4 : 4 + 4 * axes])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)
