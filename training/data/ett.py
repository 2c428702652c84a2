"""Electricity transformer temperature: two years of loads and oil temperature of a transformer (Zhou et al., AAAI 2021).

ETTh1 and ETTh2 hourly, ETTm1 every 15 minutes; github.com/zhouhaoyi/ETDataset, CC BY-ND 4.0. This file knows where the
files come from, their columns and the split everybody uses; it must not know models.
"""

from __future__ import annotations

import csv
import gzip
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from training.data import DataError, Source, fetch_any

ADDRESS = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/1d16c8f/ETT-small/"
CHANNELS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
ROWS = {"ETTh1": 17_420, "ETTh2": 17_420, "ETTm1": 69_680}
SHA256 = {
    "ETTh1.csv": "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066",
    "ETTh2.csv": "a3dc2c597b9218c7ce1cd55eb77b283fd459a1d09d753063f944967dd6b9218b",
    "ETTm1.csv": "6ce1759b1a18e3328421d5d75fadcb316c449fcd7cec32820c8dafda71986c9e",
    "ETTh1.csv.gz": "3c56c865b8f6fc9b760a07f055ff8a993d3cf2a747235dc382b98821ed35f029",
    "ETTh2.csv.gz": "a549927e8cd45bd1c20a8ec51529cd037bf6da38fe37c2ba3dc0e9c8446d6cb5",
    "ETTm1.csv.gz": "ca45123028f1acad120b5f971ca64594746aa9b881d56cdff589ee9aa6cdbd8f",
}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Series:
    """values float32 [rows, channels] in the file's units; train is rows [0, train), validation [train, validation),
    test [validation, test). Data of other kinds come in the same form."""

    values: Array
    channels: tuple[str, ...]
    train: int
    validation: int
    test: int
    step_seconds: int = 3600


def load(name: str, data: Path | None) -> Series:
    """One series ("ETTh1", "ETTh2", "ETTm1"), split by months of 30 days: 12 to train, 4 to validate, 4 to test.

    `data` is a directory with ett/*.csv.gz or *.csv, or None to download. Raises DataError.
    """
    if name not in ROWS:
        raise DataError(f"no series {name!r}: one of {', '.join(ROWS)}")
    packed, plain = f"{name}.csv.gz", f"{name}.csv"
    sources = (
        Source(packed, None, "sha256:" + SHA256[packed]),
        Source(plain, ADDRESS + plain, "sha256:" + SHA256[plain]),
    )
    file = fetch_any(sources, data, "ett")
    raw = file.read_bytes()
    table = list(csv.reader(io.StringIO((gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("ascii"))))
    if table[0] != ["date", *CHANNELS] or len(table) - 1 != ROWS[name]:
        raise DataError(f"{file}: not the columns and rows of {name}; fetch it again")
    values = np.array([row[1:] for row in table[1:]], np.float32)
    month = 30 * 24 * (4 if name == "ETTm1" else 1)
    return Series(values, CHANNELS, 12 * month, 16 * month, 20 * month, 900 if name == "ETTm1" else 3600)
