"""WNUT-17, emerging and rare entities (Derczynski et al. 2017): posts as words with IOB2 tags; and how found entities are scored.

It knows the files' format and the task's two F1 scores; it must not know vocabularies or models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from contract.chain import labelled
from training.data import DataError, Source, fetch

TYPES = ("corporation", "creative-work", "group", "location", "person", "product")
LABELS = ("O", *(f"{mark}-{kind}" for kind in TYPES for mark in "BI"))

_AT = "https://raw.githubusercontent.com/leondz/emerging_entities_17/master/"
_FILES = {
    "train": ("wnut17train.conll", "731820e13f71af324c6b55a1575ec2ce59fbaa2a0806f8f0400b98d56cd6a7a5", 3_394),
    "dev": ("emerging.dev.conll", "e053b752b8155113ca66e7db08af5f2f5f43ab993694e4774f1ec5bad42312d8", 1_009),
    "test": ("emerging.test.annotated", "2aa79b764e56ec9264a1b30fdd9b70195bd00ff400b62edd8f399d5f13c178f0", 1_287),
}

Span = tuple[int, int, str]
"""First word, the word after the last, type."""


@dataclass(frozen=True, slots=True)
class Post:
    words: tuple[str, ...]
    tags: tuple[str, ...]  # of LABELS, one per word


@dataclass(frozen=True, slots=True)
class Score:
    """Shares of 1: of what was found, what is right; of what is there, what was found; their harmonic mean."""

    precision: float
    recall: float
    f1: float


def read(part: str, directory: Path | None) -> tuple[Post, ...]:
    """The part "train", "dev" or "test" of the official split. Raises DataError."""
    name, digest, count = _FILES[part]
    file = fetch(Source(name, _AT + name, f"sha256:{digest}"), directory, "wnut17")
    posts: list[Post] = []
    words: list[str] = []
    tags: list[str] = []
    for line in [*file.read_text(encoding="utf-8").split("\n"), ""]:
        word, _, tag = line.partition("\t")
        if word.strip():
            words.append(word)
            tags.append(tag.strip())
        elif words:
            posts.append(Post(tuple(words), tuple(tags)))
            words, tags = [], []
    if len(posts) != count or not {t for p in posts for t in p.tags} <= set(LABELS):
        raise DataError(f"{file} has {len(posts)} posts, not {count}, or tags that are none of {', '.join(LABELS)}: fetch it again")
    return tuple(posts)


def entity_score(truth: Iterable[Sequence[Span]], found: Iterable[Sequence[Span]]) -> Score:
    """Over all posts: an entity is right where first word, last word and type are."""
    there = {(post, *span) for post, listed in enumerate(truth) for span in listed}
    given = {(post, *span) for post, listed in enumerate(found) for span in listed}
    return _score(len(there & given), len(there), len(given))


def surface_score(posts: Sequence[Post], found: Sequence[Sequence[Span]]) -> Score:
    """Over the different surface forms of the whole set: naming a frequent entity often counts once."""

    def forms(listed: Iterable[Sequence[Span]]) -> set[tuple[str, str]]:
        return {(" ".join(p.words[a:b]), kind) for p, of in zip(posts, listed, strict=True) for a, b, kind in of}

    there, given = forms(labelled(p.tags) for p in posts), forms(found)
    return _score(len(there & given), len(there), len(given))


def _score(right: int, there: int, given: int) -> Score:
    return Score(right / max(1, given), right / max(1, there), 2 * right / max(1, there + given))
