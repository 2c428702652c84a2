"""A word as numbers, the same code for training and serving: its place in a vocabulary, and what its letters look like.

Every word gets the same number of features, hashed from its ends and its shape into one table, so a word's length never
makes a tensor longer: nothing is padded, and a word never seen before still has known parts. A character network would
need the letters themselves, words of all lengths beside each other. This file must not know any model.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

from contract.text import UNKNOWN

FEATURES = ("first letter", "2 first", "3 first", "last letter", "2 last", "3 last", "4 last", "shape", "runs of the shape")
"""What the numbers of a word stand for; the last axis of the `features` tensor."""

Ids = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


class Words:
    """Splits texts into words and gives words their numbers. Safe to use from many threads."""

    def __init__(self, tokenizer: Tokenizer, buckets: int) -> None:
        self._tokenizer = tokenizer
        self._normal = tokenizer.normalizer
        self._split = tokenizer.pre_tokenizer
        self._buckets = buckets
        self.size: int = tokenizer.get_vocab_size()
        unknown = tokenizer.token_to_id(UNKNOWN)
        if unknown is None or self._split is None or self._normal is None:
            raise ValueError(f"the vocabulary needs the word {UNKNOWN}, a normaliser and a rule that splits texts")
        self.unknown: int = unknown

    @classmethod
    def load(cls, file: Path | str, buckets: int) -> Words:
        return cls(Tokenizer.from_file(str(file)), buckets)

    def save(self, file: Path | str) -> None:
        self._tokenizer.save(str(file), pretty=False)

    def split(self, text: str) -> list[tuple[int, int]]:
        """Where the words of a text begin and end, in characters; spaces belong to none."""
        return [at for _, at in self._split.pre_tokenize_str(text)]

    def normal(self, word: str) -> str:
        """A word as the vocabulary spells it."""
        return str(self._normal.normalize_str(word))

    def ids(self, words: Sequence[str]) -> Ids:
        """[words]; words that are not in the vocabulary are all the same."""
        places = (self._tokenizer.token_to_id(self.normal(w)) for w in words)
        return np.array([self.unknown if p is None else p for p in places], np.int64)

    def features(self, words: Sequence[str]) -> Ids:
        """[words, features], each below the number of buckets."""
        return np.array([_features(w, self._buckets) for w in words], np.int64).reshape(len(words), len(FEATURES))


def vocabulary(words: Sequence[str]) -> Tokenizer:
    """A vocabulary of normal forms, with the rules that make them and that split texts."""
    tokenizer = Tokenizer(WordLevel({UNKNOWN: 0, **{w: i for i, w in enumerate(words, 1)}}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"^(https?://|www\.).*"), "<url>"),
            normalizers.Replace(Regex(r"^@\w.*"), "<user>"),
            normalizers.Replace(Regex(r"[0-9]"), "0"),
            normalizers.Replace("’", "'"),
        ]
    )
    # Addresses, mentions and hashtags whole; words with inner dots and hyphens whole, but apostrophes apart, as in the
    # data's development and test parts; runs of one mark whole.
    word = r"https?://\S+|www\.\S+|[@#]\w+|\w+(?:[.\-,]\w+)*|\.{2,}|!+|\?+|-{2,}|[^\w\s]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(word), behavior="removed", invert=True)
    return tokenizer


def shape(word: str) -> str:
    """Xx0 and marks: "McDonald's" → "XxXxxxxx'x"."""
    return "".join("0" if c.isdigit() else "X" if c.isupper() else "x" if c.isalpha() else c for c in word)


def _features(word: str, buckets: int) -> list[int]:
    low, seen = word.lower(), shape(word)
    runs = "".join(c for c, _ in itertools.groupby(seen))
    parts: tuple[Any, ...] = (word[0], low[:2], low[:3], word[-1], low[-2:], low[-3:], low[-4:], seen[:12], runs)
    # crc32 is the same on every machine and in every release, which Python's own hash is not.
    return [zlib.crc32(f"{kind} {part}".encode()) % buckets for kind, part in enumerate(parts)]
