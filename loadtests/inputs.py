"""What users send: real test sets read from a directory, or, without one, made-up sentences of like lengths.

Plain files in, lists out; it must not know gRPC, locust or models. `training/data/` checks these sets in full; here a few hundred
of each suffice.
"""

from __future__ import annotations

import gzip
import random
import tarfile
from dataclasses import dataclass
from pathlib import Path

MOST = 500  # of each set
REVIEW_WORDS = 229  # mean of the reviews' test set
CAPTION_WORDS = 11  # mean of the captions' test set
_WORDS = (
    "a",
    "the",
    "of",
    "and",
    "to",
    "in",
    "it",
    "film",
    "story",
    "man",
    "woman",
    "dog",
    "plays",
    "slow",
    "good",
    "bad",
    "street",
    "red",
)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Texts to classify and to translate, and series to forecast from: rows of seven numbers, hour after hour."""

    reviews: tuple[str, ...]
    captions: tuple[str, ...]
    hours: tuple[tuple[float, ...], ...]
    source: str


def read(data: Path | None, seed: int = 1) -> Inputs:
    """Inputs from imdb/, multi30k/ and ett/ of a directory. Raises FileNotFoundError where one of them is missing."""
    if data is None:
        return _made_up(random.Random(seed))
    return Inputs(_reviews(data / "imdb"), _captions(data / "multi30k"), _hours(data / "ett"), "IMDB, Multi30k and ETTh1 test sets")


def _reviews(directory: Path) -> tuple[str, ...]:
    """Test reviews, as many of either label as come first in the archive."""
    found: dict[str, list[str]] = {"neg": [], "pos": []}
    archive = next((f for name in ("aclImdb_labelled.tar.xz", "aclImdb_v1.tar.gz") if (f := directory / name).exists()), None)
    if archive is None:
        raise FileNotFoundError(f"no archive of reviews in {directory}")
    with tarfile.open(archive) as members:
        for member in members:
            parts = member.name.split("/")
            if len(parts) == 4 and parts[1] == "test" and len(found.get(parts[2], range(MOST))) < MOST // 2:
                opened = members.extractfile(member)
                if opened is not None:
                    found[parts[2]].append(opened.read().decode())
            if all(len(texts) == MOST // 2 for texts in found.values()):
                break
    return tuple(text for pair in zip(*found.values(), strict=True) for text in pair)


def _captions(directory: Path) -> tuple[str, ...]:
    return tuple(gzip.decompress((directory / "test_2016_flickr.en.gz").read_bytes()).decode().splitlines()[:MOST])


def _hours(directory: Path) -> tuple[tuple[float, ...], ...]:
    """The last hours of ETTh1: date, then seven numbers."""
    lines = gzip.decompress((directory / "ETTh1.csv.gz").read_bytes()).decode().splitlines()
    return tuple(tuple(map(float, line.split(",")[1:])) for line in lines[-4 * MOST :])


def _made_up(dice: random.Random) -> Inputs:
    def text(mean: int) -> str:
        words = max(3, int(dice.lognormvariate(0, 0.6) * mean * 0.85))
        return " ".join(dice.choice(_WORDS) for _ in range(words)).capitalize() + "."

    hours = tuple(tuple(dice.gauss(0, 1) for _ in range(7)) for _ in range(4 * MOST))
    return Inputs(tuple(text(REVIEW_WORDS) for _ in range(MOST)), tuple(text(CAPTION_WORDS) for _ in range(MOST)), hours, "made up")
