"""What the sentiment model starts from in place of random numbers: the run of a language model, or vectors of words.

It knows the configuration's `init` and whose weights fit where; it must not know how either was learnt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from contract.text import Vocabulary
from training import checkpoint
from training.config import Config, ConfigError

SHARED = ("embedding.", "lstm.")
"""The weights that the language model and the sentiment model have in common, by the beginning of their names."""


@dataclass(frozen=True, slots=True)
class Start:
    """The section `init`: `from`, the directory of a pre-training run, or `word2vec`, a file of vectors; empty: neither."""

    run: Path | None = None
    word2vec: Path | None = None


def read(table: Mapping[str, Any]) -> Start:
    """Raises ConfigError."""
    if unknown := sorted(table.keys() - {"from", "word2vec"}):
        raise ConfigError(f"init: unknown {', '.join(unknown)}; known are from, word2vec")
    if len([v for v in table.values() if v]) > 1:
        raise ConfigError("init: from or word2vec, not both: a run brings its own vectors")
    for key, value in table.items():
        if not isinstance(value, str):
            raise ConfigError(f"init.{key}: must be a path, got {value!r}")
    run, file = table.get("from"), table.get("word2vec")
    if run and not (Path(run) / checkpoint.FILE).is_file():
        raise ConfigError(f"init.from: {run} holds no {checkpoint.FILE}: give the directory of a finished pre-training")
    if file and not Path(file).is_file():
        raise ConfigError(f"init.word2vec: there is no file {file}")
    return Start(Path(run) if run else None, Path(file) if file else None)


def check(run: Path, config: Config) -> None:
    """Raises ConfigError where the run has read reviews that this one would validate on."""
    before = checkpoint.load(run).config
    if before["task"] != "pretrain":
        raise ConfigError(f"init.from: {run} is a run of {before['task']}, not of pretrain")
    for key, was, now in (
        ("seed", before["seed"], config.seed),
        ("data.kind", before["data"].get("kind", "imdb"), config.data.get("kind", "imdb")),
        ("data.validation", before["data"].get("validation", 2_500), config.data.get("validation", 2_500)),
    ):
        if was != now:
            raise ConfigError(
                f"{key}: {now!r} here and {was!r} in {run}: other reviews would be held out, and the run has read some of them"
            )


def take_over(run: Path, model: nn.Module) -> None:
    """The run's embedding and LSTM into `model`, bit for bit. Raises ConfigError where shapes differ."""
    weights = {name: w for name, w in checkpoint.load(run).weights.items() if name.startswith(SHARED)}
    mine = {name: w for name, w in model.state_dict().items() if name.startswith(SHARED)}
    found, wanted = ({name: list(w.shape) for name, w in some.items()} for some in (weights, mine))
    if found != wanted:
        raise ConfigError(f"init.from: the model has {wanted}, {run} has {found}: set model.embedding, hidden and layers as there")
    model.load_state_dict(weights, strict=False)


def take_words(file: Path, vocabulary: Vocabulary, embedding: nn.Embedding) -> int:
    """Each word's vector, divided by what makes their numbers' deviation that of `embedding`; words without one keep
    theirs. Returns how many were found. A file whose name ends in .bin is word2vec's binary form, else its text.

    Raises ConfigError.
    """
    from gensim.models import KeyedVectors  # a second to import, and only needed here

    try:
        vectors = KeyedVectors.load_word2vec_format(str(file), binary=file.suffix == ".bin")
    except (ValueError, UnicodeDecodeError, EOFError) as e:
        raise ConfigError(f"init.word2vec: {file} is not in word2vec's format: {e}") from None
    if vectors.vector_size != embedding.embedding_dim:
        raise ConfigError(f"model.embedding: {embedding.embedding_dim} here, but the vectors of {file} have {vectors.vector_size} numbers")
    pieces = vocabulary.pieces(range(vocabulary.size))
    known = [(place, vectors.key_to_index[piece]) for place, piece in enumerate(pieces) if piece in vectors.key_to_index]
    if not known:
        raise ConfigError(f"init.word2vec: no word of the vocabulary is in {file}")
    places, rows = (torch.tensor(some) for some in zip(*known, strict=True))
    found = torch.from_numpy(vectors.vectors)[rows]
    with torch.no_grad():
        embedding.weight[places] = found * (embedding.weight.std() / found.std())
    return len(known)
