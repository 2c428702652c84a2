"""Text ↔ token ids, the same code for training and serving.

A vocabulary is a `tokenizer.json` of the `tokenizers` library, so that normalisation, splitting and pieces are data in
the bundle. This file must not know any model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

PAD, UNKNOWN, START, END = "<pad>", "<unk>", "<s>", "</s>"


class Vocabulary:
    """The pieces a model reads or writes. Safe to use from many threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.size: int = tokenizer.get_vocab_size()
        self.start: int | None = tokenizer.token_to_id(START)
        self.end: int | None = tokenizer.token_to_id(END)
        self.unknown: int | None = tokenizer.token_to_id(UNKNOWN)

    @classmethod
    def load(cls, file: Path | str) -> Vocabulary:
        return cls(Tokenizer.from_file(str(file)))

    def save(self, file: Path | str) -> None:
        self._tokenizer.save(str(file), pretty=False)

    def encode(self, text: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The ids of a text, without start or end marks; may be empty."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.int64) for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special marks dropped."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each id's own piece as the vocabulary spells it, for showing."""
        return [self._tokenizer.id_to_token(int(i)) or UNKNOWN for i in ids]
