"""Three classic series of one number: monthly sunspots, airline passengers, daily minimum temperatures.

From the Time Series Data Library, as github.com/jbrownlee/Datasets keeps them. This file knows where the files come from,
their form and a split in time order; it must not know models.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from training.data import DataError, Source, fetch
from training.data.ett import Series

ADDRESS = "https://raw.githubusercontent.com/jbrownlee/Datasets/d20fcb6/"
DAY, MONTH = 86_400, 2_629_746  # seconds; a month of the mean Gregorian length


@dataclass(frozen=True, slots=True)
class Kind:
    """A series and how it is commonly cut: two thirds to learn from (`validation` of them held out), the rest to test."""

    rows: int
    sha256: str
    step_seconds: int
    season: int  # steps of the strongest cycle: what a seasonal naive forecast repeats
    validation: int
    logarithm: bool = False  # grows by a factor: its logarithm is what models see


KINDS = {
    "monthly-sunspots": Kind(2_820, "c4ec8cc57d9f6fb6ecdb3e1f37f25b6f4badd5124c55931052b0cd2fc3bc71f3", MONTH, 132, 376),
    "airline-passengers": Kind(144, "8cb51be753a718d9be5d76d7e238cc224792754676adc21faa59e954b0201621", MONTH, 12, 24, True),
    "daily-min-temperatures": Kind(3_650, "8b9de63ed6789492bf497625e7f9beb96a63d367b4b0a21754006f749fa5e5da", DAY, 365, 486),
}


def load(name: str, data: Path | None) -> Series:
    """One series ("monthly-sunspots", ...), the logarithm where its Kind says so; float32 [rows, 1].

    `data` is a directory with univariate/*.csv, or None to download. Raises DataError.
    """
    if name not in KINDS:
        raise DataError(f"no series {name!r}: one of {', '.join(KINDS)}")
    kind = KINDS[name]
    file = fetch(Source(f"{name}.csv", f"{ADDRESS}{name}.csv", "sha256:" + kind.sha256), data, "univariate")
    table = list(csv.reader(io.StringIO(file.read_text(encoding="ascii"))))
    if len(table) - 1 != kind.rows:
        raise DataError(f"{file}: {len(table) - 1} rows, not {kind.rows}; fetch it again")
    values = np.array([[row[1]] for row in table[1:]], np.float64)
    learnt = kind.rows * 2 // 3
    shown = (np.log(values) if kind.logarithm else values).astype(np.float32)
    return Series(shown, (table[0][1],), learnt - kind.validation, learnt, kind.rows, kind.step_seconds)
