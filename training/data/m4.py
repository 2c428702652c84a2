"""The hourly series of the M4 competition (Makridakis et al., IJF 2020): 414 of them, the next 48 hours to be forecast.

Published by the organisers for research at github.com/Mcompetitions/M4-methods. This file knows where the files come from,
their form and the competition's measures; it must not know models.
"""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np

from training.data import DataError, Source, fetch_any
from training.data.ett import Series

ADDRESS = "https://raw.githubusercontent.com/Mcompetitions/M4-methods/6c1067e/Dataset/"
SHA256 = {
    "Hourly-train.csv": "ea59b7783573c49077a835ab6465c7d66f1474783360f310988a9a737fbca62f",
    "Hourly-test.csv": "71a57fccb15e534d973626ada4fb87febf789e9317715b7cc6dd3b5f90db6f42",
    "Hourly-train.csv.gz": "4d56abb6310bc349657607a9ab0fed833985c7558f5c3e246818057e51667e2a",
    "Hourly-test.csv.gz": "e766b6f2f51c485c8f3c7128be7eed5c5ae788954327547dfe59002ab1f16b03",
}
COUNT, AHEAD, SEASON = 414, 48, 24
SHORTEST = 700  # observations; the longer series have 960
NAIVE2 = (18.383, 2.395)  # sMAPE, MASE of Naive2 on Hourly, by the organisers' "Evaluation and Ranks.xlsx"

Array = np.ndarray[Any, Any]


def load(data: Path | None) -> tuple[tuple[Array, ...], Array]:
    """The observed series, float64 [700 or 960] each, and what followed, [414, 48].

    `data` is a directory with m4_hourly/*.csv.gz or *.csv, or None to download. Raises DataError.
    """
    observed = tuple(np.array(row) for row in _rows("Hourly-train", "train", data))
    followed = _rows("Hourly-test", "test", data)
    if len(observed) != COUNT or len(followed) != COUNT or {len(s) for s in followed} != {AHEAD}:
        raise DataError(f"M4 hourly has {len(observed)} series, not {COUNT} with {AHEAD} values to come: fetch it again")
    return observed, np.array(followed)


def series(data: Path | None) -> Series:
    """All series as the channels of one: their newest 700 observations side by side, the 96 before the end to validate on,
    then what followed, to test. Raises DataError."""
    observed, followed = load(data)
    values = np.concatenate([np.stack([s[-SHORTEST:] for s in observed], 1), followed.T]).astype(np.float32)
    names = tuple(f"H{n + 1}" for n in range(COUNT))
    return Series(values, names, SHORTEST - 2 * AHEAD, SHORTEST, SHORTEST + AHEAD)


def smape(truth: Array, found: Array) -> float:
    """The competition's symmetric error in per cent: 200 |t - f| / (|t| + |f|), mean over series and steps."""
    return float(np.mean(200 * np.abs(truth - found) / (np.abs(truth) + np.abs(found))))


def mase(observed: tuple[Array, ...], truth: Array, found: Array, season: int = SEASON) -> float:
    """Absolute errors in units of each series' own mean absolute step of a season, [series, steps] → their mean."""
    unit = np.array([np.abs(s[season:] - s[:-season]).mean() for s in observed])
    return float(np.mean(np.abs(truth - found).mean(1) / unit))


def owa(smape: float, mase: float) -> float:
    """The overall weighted average that ranked the competition: 1 is as good as Naive2."""
    return (smape / NAIVE2[0] + mase / NAIVE2[1]) / 2


def _rows(name: str, part: str, data: Path | None) -> list[list[float]]:
    packed, plain = f"{name}.csv.gz", f"{name}.csv"
    address = f"{ADDRESS}{part.capitalize()}/{plain}"
    sources = (Source(packed, None, "sha256:" + SHA256[packed]), Source(plain, address, "sha256:" + SHA256[plain]))
    file = fetch_any(sources, data, "m4_hourly")
    raw = file.read_bytes()
    table = csv.reader(io.StringIO((gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("ascii")))
    next(table)  # V1, V2, ...
    return [[float(cell) for cell in row[1:] if cell] for row in table]
