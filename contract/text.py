"""Text ↔ token ids, the same code for training and serving.

A vocabulary is a `tokenizer.json` of the `tokenizers` library, so that normalisation, splitting and pieces are data in
the bundle. This file must not know any model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.decoders import DecodeStream
from tokenizers.models import WordLevel

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

    def stream(self) -> Callable[[int], str]:
        """Decodes id by id: what each adds to the text of those before, which together are `decode` of them all. Empty
        where a letter needs the next id too."""
        decoder = DecodeStream(skip_special_tokens=True)

        def step(id: int) -> str:
            return decoder.step(self._tokenizer, id) or ""

        return step

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Each id's own piece as the vocabulary spells it, for showing."""
        return [self._tokenizer.id_to_token(int(i)) or UNKNOWN for i in ids]


def of_letters(texts: Iterable[str]) -> Vocabulary:
    """A vocabulary of every character of `texts`, each a symbol of its own, after the marks for unknown, begin and end (0, 1, 2).

    The marks are no special tokens of the library: a text that spells one is read letter by letter like any other.
    """
    marks = (UNKNOWN, START, END)
    letters = sorted({letter for text in texts for letter in text})
    tokenizer = Tokenizer(WordLevel({symbol: id for id, symbol in enumerate((*marks, *letters))}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return Vocabulary(tokenizer)
