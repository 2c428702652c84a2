"""`python -m training.word2vec --data DIR --out FILE`: vectors of words from training and unlabelled reviews (Mikolov et al.,
2013, arXiv 1301.3781), which a sentiment model can start from.

It knows gensim and the reviews; it must not know torch or any model.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from gensim.models import Word2Vec

from contract.text import PAD, UNKNOWN, Vocabulary
from training import reviews
from training.config import ConfigError
from training.data import DataError


class Sentences:
    """Each review as its list of words, again each time it is asked: gensim reads them several times."""

    def __init__(self, texts: Sequence[str], vocabulary: Vocabulary) -> None:
        self._encoded = [ids for i in range(0, len(texts), 5_000) for ids in vocabulary.encode_many(texts[i : i + 5_000])]
        self._pieces = vocabulary.pieces(range(vocabulary.size))

    def __iter__(self) -> Iterator[list[str]]:
        for ids in self._encoded:
            yield [self._pieces[i] for i in ids if self._pieces[i] not in (PAD, UNKNOWN)]


def learn(sentences: Sentences, file: Path, *, size: int = 128, epochs: int = 5, seed: int = 1) -> int:
    """Writes the vectors as `file`, in word2vec's binary form where its name ends in .bin, else as text; returns how many.

    Bags of words around the word, five on each side, against five others: gensim's own choices. One thread, or the result
    would hang on who comes first.
    """
    model = Word2Vec(sentences, vector_size=size, epochs=epochs, seed=seed, workers=1, min_count=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    model.wv.save_word2vec_format(str(file), binary=file.suffix == ".bin")
    return len(model.wv)


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(prog="python -m training.word2vec", description="Vectors of words from film reviews.")
    words.add_argument("--out", type=Path, required=True, help="file for the vectors; .bin: word2vec's binary form")
    words.add_argument("--data", type=Path, help="directory with the data sets (default: download once into a cache)")
    words.add_argument("--kind", choices=["imdb", "toy"], default="imdb", help="toy: made-up sentences, no data set needed")
    words.add_argument("--size", type=int, default=128, help="numbers a vector, model.embedding of what starts from it (%(default)s)")
    words.add_argument("--epochs", type=int, default=5, help="%(default)s")
    words.add_argument("--vocabulary", type=int, default=30_000, help="most words (%(default)s)")
    words.add_argument("--least", type=int, default=3, help="words seen less often are left out (%(default)s)")
    words.add_argument("--validation", type=int, default=2_500, help="reviews held out, as the sentiment run's (%(default)s)")
    words.add_argument("--seed", type=int, default=1, help="as the sentiment run's (%(default)s)")
    return words


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when written, 1 where the data can't be had (the reason is printed)."""
    asked = parser().parse_args(arguments)
    try:
        read, _ = reviews.without_held(asked.kind, asked.validation, asked.seed, asked.data)
    except (ConfigError, DataError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    vocabulary = reviews.learn_vocabulary(read, asked.vocabulary, asked.least)
    count = learn(Sentences(read, vocabulary), asked.out, size=asked.size, epochs=asked.epochs, seed=asked.seed)
    print(f"{count} vectors of {asked.size} numbers in {asked.out}")
    print(f"next: seqserve train sentiment --set init.word2vec={asked.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
