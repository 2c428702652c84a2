"""The Large Movie Review Dataset (Maas et al., ACL 2011): 25,000 labelled reviews to train on, 25,000 to test on.

It knows the archive's tree and its counts; it must not know vocabularies or models. The publisher gives no checksum: the
md5 below is the one commonly quoted for aclImdb_v1.tar.gz, and the counts are checked besides.
"""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

from training.data import DataError, Source, fetch_any

OFFICIAL = Source(
    "aclImdb_v1.tar.gz",
    "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
    "md5:7c2ac02c03563afcf9b574c7e56c153a",
)
LABELLED = Source(
    "aclImdb_labelled.tar.xz", None, "sha256:4cf0452d74306be21ae85ddbd64c6c252486c0aea24cb52d6534dd0dbe0389c2"
)  # the same reviews, repacked without the unlabelled half
UNLABELLED = Source("aclImdb_unsup.tar.xz", None, "sha256:e54cb0214c0687104569ccc010bda7d9b6e1272bdbfd1c5224d412822b4acce3")

LABELS = ("negative", "positive")
_MEMBER = re.compile(r"aclImdb/(train|test)/(neg|pos|unsup)/(\d+)_(\d+)\.txt")
_COUNTS = {"train": 25_000, "test": 25_000, "unsup": 50_000}


@dataclass(frozen=True, slots=True)
class Reviews:
    """Texts as published ("<br />" kept), in the archive's numbering; labels are places in LABELS, -1 where unlabelled."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]


def read(part: str, directory: Path | None) -> Reviews:
    """The part "train", "test" or "unsup" of the official split. Raises DataError."""
    sources = (UNLABELLED, OFFICIAL) if part == "unsup" else (LABELLED, OFFICIAL)
    file = fetch_any(sources, directory, "imdb")
    found: list[tuple[str, int, str]] = []
    with tarfile.open(file) as archive:
        for member in archive:
            name = _MEMBER.fullmatch(member.name)
            if name is None or part != ("unsup" if name[2] == "unsup" else name[1]):
                continue
            opened = archive.extractfile(member)
            assert opened is not None  # the pattern fits files only
            found.append((name[2], int(name[3]), opened.read().decode("utf-8")))
    if len(found) != _COUNTS[part]:
        raise DataError(f"{file} has {len(found)} reviews in {part!r}, not {_COUNTS[part]}: fetch it again")
    found.sort(key=lambda review: review[:2])  # an order of our own: archives differ in theirs
    places = {"neg": 0, "pos": 1, "unsup": -1}
    return Reviews(tuple(text for _, _, text in found), tuple(places[folder] for folder, _, _ in found))
