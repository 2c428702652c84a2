"""Film reviews as the sentiment model and its pre-training read them: texts, hold-out, words. `python -m training.reviews --data DIR`
prints the unlabelled ones, one a line, for another model to label: `… | seqserve classify --json > labels.jsonl`.

It knows where texts come from and how they become words; it must not know any model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.trainers import WordLevelTrainer

from contract.text import PAD, UNKNOWN, Vocabulary
from training.config import ConfigError
from training.data import DataError, imdb

VOCABULARY = "tokenizer.json"


def labelled(kind: str, seed: int, data: Path | None) -> tuple[list[str], list[int]]:
    """The training part of a `kind`, imdb or toy, each text once. Raises ConfigError."""
    if kind not in ("imdb", "toy"):
        raise ConfigError(f"data.kind {kind!r}: one of imdb, toy")
    return _toy(seed) if kind == "toy" else _imdb(data)


def unlabelled(kind: str, seed: int, data: Path | None) -> list[str]:
    """Further texts of that kind, whose labels nobody knows."""
    return _toy(seed + 1)[0] if kind == "toy" else list(dict.fromkeys(imdb.read("unsup", data).texts))


def without_held(kind: str, validation: int, seed: int, data: Path | None) -> tuple[list[str], list[str]]:
    """All texts that may be read without their labels, in random order, and those that the sentiment run of the same seed
    holds out; no text is in both."""
    texts, labels = labelled(kind, seed, data)
    train, held = hold_out(labels, validation, seed)
    kept = [texts[i] for i in held]
    never = set(kept)
    read = [t for t in [*(texts[i] for i in train), *unlabelled(kind, seed, data)] if t not in never]
    return [read[i] for i in np.random.default_rng(seed).permutation(len(read)).tolist()], kept


def learn_vocabulary(texts: Sequence[str], size: int, least: int) -> Vocabulary:
    """The most frequent words of `texts`, lower-cased, markup dropped; a word keeps its apostrophe ("don't")."""
    tokenizer = Tokenizer(WordLevel({PAD: 0, UNKNOWN: 1}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace("<br />", " "), normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    words = Regex(r"\w+(?:['’]\w+)*|[^\w\s]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(words, behavior="removed", invert=True)
    trainer = WordLevelTrainer(vocab_size=size, min_frequency=least, special_tokens=[PAD, UNKNOWN], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return Vocabulary(tokenizer)


def _imdb(data: Path | None) -> tuple[list[str], list[int]]:
    """The training part, each text once: 96 reviews are there twice and could stand on both sides of the hold-out."""
    reviews = imdb.read("train", data)
    once = dict(zip(reviews.texts, reviews.labels, strict=True))
    return list(once), list(once.values())


def _toy(seed: int) -> tuple[list[str], list[int]]:
    """Made-up sentences: praise or blame among neutral words, which "not" before it turns round."""
    random = np.random.default_rng(seed)
    praise, blame = ["good", "fine", "lovely", "great"], ["bad", "poor", "awful", "dull"]
    neutral = ["the", "film", "plot", "actor", "scene", "with", "of", "a", "was", "music", ",", "."]
    texts, labels = [], []
    for _ in range(3_000):
        label, negated = int(random.integers(2)), bool(random.integers(2))
        said = [str(random.choice(praise if bool(label) != negated else blame))]
        before = [str(w) for w in random.choice(neutral, random.integers(1, 12))]
        after = [str(w) for w in random.choice(neutral, random.integers(1, 12))]
        texts.append(" ".join(before + (["not"] if negated else []) + said + after))
        labels.append(label)
    return texts, labels


def hold_out(labels: Sequence[int], count: int, seed: int) -> tuple[list[int], list[int]]:
    """Places to train on and places to validate on, the latter with as many of each label; both in random order."""
    order = np.random.default_rng(seed).permutation(len(labels)).tolist()
    kinds = sorted(set(labels))
    held = {i for kind in kinds for i in [i for i in order if labels[i] == kind][: count // len(kinds)]}
    return [i for i in order if i not in held], [i for i in order if i in held]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all are printed, 1 where they can't be had."""
    words = argparse.ArgumentParser(prog="python -m training.reviews", description="Print the unlabelled reviews, one a line.")
    words.add_argument("--data", type=Path, help="directory with the data sets (default: download once into a cache)")
    words.add_argument("--kind", choices=["imdb", "toy"], default="imdb", help="toy: made-up sentences, no data set needed")
    words.add_argument("--seed", type=int, default=1, help="of made-up sentences (%(default)s)")
    asked = words.parse_args(arguments)
    try:
        texts = unlabelled(asked.kind, asked.seed, asked.data)
    except DataError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    for text in texts:
        print(" ".join(text.split()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
