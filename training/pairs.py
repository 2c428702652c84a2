"""Sentence pairs as a translator reads them: made into pieces, laid into batches.

It knows text, ids and how sentences are grouped; it must not know the model or files of a data set.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from contract.text import END, PAD, START, UNKNOWN

MARKS = (PAD, UNKNOWN, START, END)
PAD_ID, UNKNOWN_ID, START_ID, END_ID = range(4)


def make_vocabulary(lines: Sequence[str], size: int) -> Tokenizer:
    """Byte-pair pieces of cased raw text, joint over languages, whose decoding is the text again (in Unicode's NFC, runs
    of spaces made one). Punctuation is always a piece of its own."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(MARKS), show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    if [tokenizer.token_to_id(mark) for mark in MARKS] != [PAD_ID, UNKNOWN_ID, START_ID, END_ID]:
        raise AssertionError("the trainer numbers special tokens first and in order")
    return tokenizer


def reversed_words(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Made-up sentences and, as their translation, the same words backwards: a toy that needs attention."""
    rng = random.Random(seed)
    words = [a + b for a in "bdfgklmn" for b in ("a", "i", "o")]
    made = [[rng.choice(words) for _ in range(rng.randint(2, 7))] for _ in range(count)]
    return [" ".join(s) for s in made], [" ".join(reversed(s)) for s in made]


class Batch(NamedTuple):
    """source [batch, time] right-padded, lengths [batch], target [batch, steps + 1] from <s> to </s>, right-padded."""

    source: Tensor
    lengths: Tensor
    target: Tensor


class Pairs(Dataset[Batch]):
    """Sentence pairs; an item is a whole batch, named by its sentences' numbers."""

    def __init__(self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> None:
        self.sources, self.targets = sources, targets

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, numbers: Sequence[int]) -> Batch:
        sources = [torch.tensor([*self.sources[n], END_ID]) for n in numbers]
        targets = [torch.tensor([START_ID, *self.targets[n], END_ID]) for n in numbers]
        pad = torch.nn.utils.rnn.pad_sequence
        return Batch(
            pad(sources, batch_first=True, padding_value=PAD_ID),
            torch.tensor([len(s) for s in sources]),
            pad(targets, batch_first=True, padding_value=PAD_ID),
        )


class ByLength(Sampler[list[int]]):
    """Batches of sentences about equally long, in a new order each epoch; `set_epoch` is called by Lightning."""

    def __init__(self, pairs: Pairs, sentences: int, seed: int | None) -> None:
        self.lengths = [(len(t), len(s)) for s, t in zip(pairs.sources, pairs.targets, strict=True)]
        self.sentences, self.seed, self.epoch = sentences, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.sentences)

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(None if self.seed is None else self.seed * 1000 + self.epoch)
        order = list(range(len(self.lengths)))
        if self.seed is not None:
            rng.shuffle(order)  # the sort below is stable, so equals meet others each epoch
        order.sort(key=lambda n: self.lengths[n])
        batches = [order[at : at + self.sentences] for at in range(0, len(order), self.sentences)]
        if self.seed is not None:
            rng.shuffle(batches)
        yield from batches
