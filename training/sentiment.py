"""Sentiment: a review read word by word; what it has felt so far is carried as state, so it can be read in pieces.

It knows the model, its data and how it is cut for serving. It must not know the server, or torch.onnx.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from contract import bundle
from contract.bundle import State as Carried
from contract.text import Vocabulary
from training import checkpoint, loop, ngrams, start
from training.config import Config, ConfigError, section
from training.data import imdb
from training.data.batches import Batches
from training.layers import SequenceDropout, remember
from training.loop import Training
from training.reviews import VOCABULARY, hold_out, labelled, learn_vocabulary
from training.tasks import About

ABOUT = About(
    title="Sentiment of English film reviews",
    use="Says whether an English film review is favourable, after each piece of it that has been read. Not for other "
    "languages, and not made for other kinds of text.",
    data="Large Movie Review Dataset v1.0 (Maas et al., ACL 2011): 25,000 labelled reviews, part of them held out for "
    "validation; the 25,000 test reviews are used for the final figure only.",
    licence="The data set is free for research, to be cited as Maas et al. 2011; the reviews belong to their authors.",
    design="Word embedding, one unidirectional LSTM, and a linear layer over the maximum, the mean and the last of its "
    "outputs. Beside it a log-linear score: every word and every pair of words in a row brings a number of its own, added up over "
    "the square root of the length (Wang & Manning 2012). The two scores are weighed by a logistic regression on the validation "
    "reviews. Maximum, sums, count and the last word are carried beside the LSTM's state: cutting a text changes nothing.",
    limits="Irony, comparisons with other films and long retellings of the plot mislead it; words it has not learnt are "
    "all the same to it; scores after few words say little. Reviews of five and six stars are not in the data, so it "
    "has never seen a lukewarm one.",
)


@dataclass(frozen=True, slots=True)
class Dims:
    vocabulary: int
    embedding: int = 128
    hidden: int = 256
    layers: int = 1
    labels: tuple[str, ...] = imdb.LABELS
    embedding_dropout: float = 0.3
    dropout: float = 0.5
    word_dropout: float = 0.0  # share of words read as unknown while training
    pairs: int = 0  # buckets for pairs of words, scored beside the LSTM (ngrams.py); 0: the LSTM alone


@dataclass(frozen=True, slots=True)
class Data:
    """The `data` section of the configuration."""

    kind: str = "imdb"  # imdb, or toy: sentences of the code's own making
    vocabulary: int = 20_000
    least: int = 3  # words seen less often are unknown
    validation: int = 2_500  # held out of the training part
    train: int = 0  # use only so many of the rest; 0: all
    taught: str = ""  # a file of further texts with another model's scores, as `seqserve classify --json` prints them
    times: int = 1  # how often a labelled review counts beside these
    rows: int = 32
    longest: int = 400  # a longer review is cut at random while training; validation reads it whole


class Sentiment(nn.Module):
    """Scores of a sequence of words, for training whole and for serving in steps."""

    pair_marks: Tensor
    weighed: Tensor

    def __init__(self, dims: Dims) -> None:
        """Raises ConfigError where pairs are asked for with other than two labels."""
        super().__init__()
        self.dims = dims
        self.embedding = nn.Embedding(dims.vocabulary, dims.embedding)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.embedding_dropout = SequenceDropout(dims.embedding_dropout)
        self.lstm = remember(nn.LSTM(dims.embedding, dims.hidden, dims.layers, batch_first=True))
        self.dropout = nn.Dropout(dims.dropout)
        self.head = nn.Linear(3 * dims.hidden, len(dims.labels))
        if dims.pairs:
            if len(dims.labels) != 2:
                raise ConfigError(f"model.pairs: for two labels, not {len(dims.labels)}")
            # Fitted by themselves, in `finish`; until then the LSTM speaks alone.
            self.word_scores = nn.Embedding(dims.vocabulary, 1, _weight=torch.zeros(dims.vocabulary, 1), _freeze=True)
            self.pair_scores = nn.Embedding(dims.pairs, 1, _weight=torch.zeros(dims.pairs, 1), _freeze=True)
            self.register_buffer("pair_marks", torch.zeros(dims.pairs, dtype=torch.uint8))
            self.register_buffer("weighed", torch.tensor([1.0, 0.0, 0.0]))  # the LSTM, words and pairs, for all texts alike

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Whole texts, padded: tokens [rows, time], lengths [rows] → logits [rows, labels]."""
        scores = self.recurrent(tokens, lengths)
        if not self.dims.pairs:
            return scores
        inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        nothing = tokens.new_full((len(tokens), 1), ngrams.NOTHING)
        added = self.added(torch.cat([nothing, tokens[:, :-1]], 1), tokens)  # [rows, time]
        return self.both(scores, (added * inside).sum(1, keepdim=True), lengths[:, None])

    def added(self, before: Tensor, tokens: Tensor) -> Tensor:
        """What each word and the pair it ends bring [rows, time]; before: the word before each."""
        at = ngrams.bucket(before, tokens, self.dims.pairs)
        known = self.pair_marks[at] == ngrams.mark(before, tokens)
        added: Tensor = self.word_scores(tokens)[..., 0] + known * self.pair_scores(at)[..., 0]
        return added

    def both(self, scores: Tensor, said: Tensor, count: Tensor) -> Tensor:
        """The LSTM's scores [rows, 2] and the sum of what `count` words brought [rows, 1] → logits [rows, 2]."""
        half = (self.weighed[1] * said / torch.sqrt(count.to(said.dtype)) + self.weighed[2]) / 2
        return self.weighed[0] * scores + torch.cat([-half, half], 1)

    def recurrent(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """`forward` without the scores of words and pairs."""
        read, _ = self.lstm(self.embedding_dropout(self.embedding(tokens)))  # [rows, time, hidden]
        read = read.float()
        inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        highest = read.masked_fill(~inside[:, :, None], -1.0).amax(1)
        mean = (read * inside[:, :, None]).sum(1) / lengths[:, None]
        last = read[torch.arange(len(lengths), device=tokens.device), lengths - 1]
        scores: Tensor = self.head(self.dropout(torch.cat([highest, mean, last], -1)))
        return scores

    def step(
        self, tokens: Tensor, h: Tensor, c: Tensor, highest: Tensor, total: Tensor, count: Tensor,
        before: Tensor | None = None, said: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """A piece of a text: tokens [rows, time], then the states as `describe` lists them → logits, next states."""
        read, (h, c) = self.lstm(self.embedding(tokens), (h, c))  # [rows, time, hidden]
        # |output| < 1, so -1 is below every output and a fresh maximum of -1 is exact.
        highest = torch.maximum(highest, read.amax(1))
        total = _add_up(total, read)
        count = count + tokens.shape[1]
        logits = self.head(torch.cat([highest, total / count, h[-1]], -1))
        states = (h, c, highest, total, count)
        if before is None or said is None:
            return logits, *states
        added = self.added(torch.cat([before, tokens[:, :-1]], 1), tokens)
        said = _add_up(said, added[..., None])
        return self.both(logits, said, count), *states, tokens[:, -1:], said


def _add_up(carried: Tensor, values: Tensor) -> Tensor:
    """carried [rows, n] and the sum over time of values [rows, time, n].

    A sum over time depends on where a text was cut, in the last bits, unless it is added up step by step from what was
    carried. A cumulative sum does just that.
    """
    return torch.cat([carried[:, None], values], 1).cumsum(1)[:, -1]


class SentimentTraining(Training):
    monitor = "validation_accuracy"
    monitor_mode = "max"
    starts = True

    def __init__(self, model: Sentiment, config: Config, data: Data, train: Rows, validation: Rows, unknown: int, out: Path) -> None:
        super().__init__(model, asdict(model.dims), config)
        self.out = out
        self.settings, self.train_rows, self.validation_rows, self.unknown = data, train, validation, unknown
        self.word_dropout = model.dims.word_dropout

    @classmethod
    def prepare(cls, config: Config, data: Path | None, out: Path) -> SentimentTraining:
        """Read the reviews, learn the vocabulary from the training part alone and save it, build the model."""
        settings = section(Data, config.data, "data")
        begin = start.read(config.init)
        texts, labels = labelled(settings.kind, config.seed, data)
        train, validation = hold_out(labels, settings.validation, config.seed)
        if settings.train:
            train = train[: settings.train]
        if begin.run:
            start.check(begin.run, config)
            vocabulary = Vocabulary.load(begin.run / VOCABULARY)
        else:
            vocabulary = learn_vocabulary([texts[i] for i in train], settings.vocabulary, settings.least)
        vocabulary.save(out / VOCABULARY)
        dims = section(Dims, {"vocabulary": vocabulary.size, **config.model}, "model")
        unknown = vocabulary.unknown
        assert unknown is not None  # learn_vocabulary puts it there

        def rows(texts: Sequence[str], labels: Sequence[float], longest: int) -> Rows:
            tokens = vocabulary.encode_many(texts)
            kept = [(t, label) for t, label in zip(tokens, labels, strict=True) if len(t)]
            return Rows([t for t, _ in kept], [label for _, label in kept], longest)

        known = [texts[i] for i in train], [labels[i] for i in train]
        held = [texts[i] for i in validation], [labels[i] for i in validation]
        more, scores = read_taught(Path(settings.taught), dims.labels, held[0]) if settings.taught else ([], [])
        model = Sentiment(dims)
        if begin.run:
            start.take_over(begin.run, model)
        if begin.word2vec:
            start.take_words(begin.word2vec, vocabulary, model.embedding)
        given = rows([*known[0] * settings.times, *more], [*known[1] * settings.times, *scores], settings.longest)
        return cls(model, config, settings, given, rows(*held, 0), unknown, out)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        tokens, lengths, labels = batch
        if self.word_dropout:
            tokens = tokens.masked_fill(torch.rand_like(tokens, dtype=torch.float32) < self.word_dropout, self.unknown)
        model = self.model
        assert isinstance(model, Sentiment)
        logits = model.recurrent(tokens, lengths)
        accuracy = (logits.argmax(-1) == labels.round()).float().mean()
        wanted = torch.stack([1 - labels, labels], -1) if labels.is_floating_point() else labels
        return functional.cross_entropy(logits, wanted), {"accuracy": accuracy.detach()}

    def scores(self, batch: Batch) -> dict[str, tuple[Tensor, int]]:
        tokens, lengths, labels = batch
        with torch.autocast(self.device.type, enabled=False):  # as it is served
            logits = self.model(tokens, lengths)
        accuracy = (logits.argmax(-1) == labels).float().mean()
        return {"loss": (functional.cross_entropy(logits, labels), len(labels)), "accuracy": (accuracy, len(labels))}

    def train_batches(self) -> DataLoader[Batch]:
        rows = self.train_rows
        order = Batches(rows.lengths, self.settings.rows, seed=self.config.seed)
        return DataLoader(rows, sampler=order, batch_size=None, num_workers=self.config.run.workers)

    def validation_batches(self) -> DataLoader[Batch]:
        rows = self.validation_rows
        return DataLoader(rows, sampler=Batches(rows.lengths, self.settings.rows, shuffle=False), batch_size=None)

    def on_fit_end(self) -> None:
        if self.trainer.is_global_zero and self.dims["pairs"]:
            self.finish()

    def finish(self) -> None:
        """Fit the scores of words and pairs to the training reviews, whole, and how much they and the LSTM count to the
        validation reviews; into the checkpoint, whose scores then are those of both together."""
        kept = checkpoint.load(self.out)
        model = rebuild(kept.dims)
        model.load_state_dict(dict(kept.weights))
        train, held = self.train_rows, self.validation_rows
        least = 2 * self.settings.times if self.settings.taught else 3
        fitted = ngrams.fit(train.tokens, np.asarray(train.labels), model.dims.vocabulary, model.dims.pairs, least=least)
        model.word_scores.weight.copy_(torch.from_numpy(fitted.words)[:, None])
        model.pair_scores.weight.copy_(torch.from_numpy(fitted.pairs)[:, None])
        model.pair_marks.copy_(torch.from_numpy(fitted.marks))
        given, truth = [], []
        with torch.inference_mode():
            for tokens, lengths, labels in self.validation_batches():
                read = model.recurrent(tokens, lengths)
                given.append((read[:, 1] - read[:, 0]).numpy())
                truth.append(labels.numpy())
        right = np.concatenate(truth)
        order = [place for batch in self.validation_batches().sampler for place in batch]
        said = np.array([fitted.of(held.tokens[place]) for place in order])
        each = np.stack([np.concatenate(given).astype(np.float64), said - fitted.bias])
        weights = ngrams.weigh(each, right)
        both = weights[:-1] @ each + weights[-1]
        model.weighed.copy_(torch.tensor(weights))
        scores = {
            "validation_accuracy": float(((both > 0) == right).mean()),
            "validation_loss": float((np.logaddexp(0, both) - right * both).mean()),
            "validation_lstm_accuracy": kept.scores["validation_accuracy"],
            "validation_words_and_pairs_accuracy": float(((said > 0) == right).mean()),
        }
        checkpoint.save(replace(kept, weights=model.state_dict(), scores=scores), self.out / checkpoint.FILE)
        loop.rescore(self.out, scores)


def read_taught(file: Path, labels: Sequence[str], held: Sequence[str]) -> tuple[list[str], list[float]]:
    """Texts and how much another model takes each for the second of the two labels, 0 to 1 (Lee, 2013, pseudo-labels; kept as
    they are, so that what is doubtful stays so). Texts that are held out are left out. Raises ConfigError."""
    if len(labels) != 2:
        raise ConfigError(f"data.taught: for two labels, not {len(labels)}")
    texts: dict[str, float] = {}
    number = 0
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                number += 1
                said = json.loads(line)
                text, score = said["text"], said["scores"][labels[1]]
                if not isinstance(text, str) or not isinstance(score, int | float) or not 0 <= score <= 1:
                    raise ValueError("a text and scores from 0 to 1 are needed")
                texts[text] = float(score)
    except OSError as e:
        raise ConfigError(f"data.taught: {e}") from None
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"data.taught: {file}, line {number}: not what seqserve classify --json prints of {labels}: {e!r}") from None
    never = {" ".join(text.split()) for text in held}
    kept = {text: score for text, score in texts.items() if " ".join(text.split()) not in never}
    return list(kept), list(kept.values())


Batch = tuple[Tensor, Tensor, Tensor]
"""Tokens [rows, time] padded with 0, lengths [rows], labels [rows]; or where another model taught, how far each is the second label."""


class Rows(Dataset[Batch]):
    """Encoded reviews; asked for a list of places it gives the batch of them."""

    def __init__(self, tokens: Sequence[np.ndarray[Any, Any]], labels: Sequence[float], longest: int) -> None:
        self.tokens, self.labels, self.longest = tokens, labels, longest

    @property
    def lengths(self) -> list[int]:
        return [min(len(t), self.longest or len(t)) for t in self.tokens]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, places: list[int]) -> Batch:
        chosen = [self._cut(self.tokens[i]) for i in places]
        lengths = [len(t) for t in chosen]
        padded = np.zeros((len(chosen), max(lengths)), np.int64)
        for row, t in zip(padded, chosen, strict=True):
            row[: len(t)] = t
        return torch.from_numpy(padded), torch.tensor(lengths), torch.tensor([self.labels[i] for i in places])

    def _cut(self, tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        spare = len(tokens) - self.longest
        if not self.longest or spare <= 0:
            return tokens
        start = int(torch.randint(spare + 1, ()))  # torch's generator: seeded, also in loader processes
        return tokens[start : start + self.longest]


# How it is served.


def prepare(config: Config, data: Path | None, out: Path) -> SentimentTraining:
    return SentimentTraining.prepare(config, data, out)


def rebuild(dims: Mapping[str, Any]) -> Sentiment:
    return Sentiment(Dims(**dims)).eval()


LONGEST = 20_000  # tokens of one request: several times the longest review


def describe(model: nn.Module) -> dict[str, bundle.Graph]:
    """One graph: it reads a piece and says the score of all that was read so far."""
    assert isinstance(model, Sentiment)
    dims = model.dims
    labels, hidden = len(dims.labels), dims.hidden
    tokens = bundle.Tensor("tokens", "int64", (bundle.BATCH, bundle.TIME), "word ids of the vocabulary", low=0, high=dims.vocabulary - 1)
    outputs = (
        bundle.Tensor("probabilities", "float32", (bundle.BATCH, labels), "of each label, after all that was read"),
        bundle.Tensor("logits", "float32", (bundle.BATCH, labels), "the same before softmax"),
    )
    layered, flat = (dims.layers, bundle.BATCH, hidden), (bundle.BATCH, hidden)
    states: tuple[Carried, ...] = (
        Carried("h", "next_h", "float32", layered),
        Carried("c", "next_c", "float32", layered),
        Carried("highest", "next_highest", "float32", flat, initial=-1.0),
        Carried("total", "next_total", "float32", flat),
        Carried("count", "next_count", "float32", (bundle.BATCH, 1)),
    )
    if dims.pairs:
        states += (
            Carried("before", "next_before", "int64", (bundle.BATCH, 1), initial=float(ngrams.NOTHING)),
            Carried("said", "next_said", "float32", (bundle.BATCH, 1)),
        )
    return {"step": bundle.Graph("step.onnx", (tokens,), outputs, states, max_time=LONGEST)}


class _Step(nn.Module):
    def __init__(self, model: Sentiment) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, h: Tensor, c: Tensor, highest: Tensor, total: Tensor, count: Tensor,
        before: Tensor | None = None, said: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        logits, *states = self.model.step(tokens, h, c, highest, total, count, before, said)
        return torch.softmax(logits, -1), logits, *states


def parts(model: nn.Module) -> dict[str, nn.Module]:
    assert isinstance(model, Sentiment)
    return {"step": _Step(model)}


def task(model: nn.Module, run: Path) -> dict[str, Any]:
    assert isinstance(model, Sentiment)
    return {
        "kind": "classify", "vocabulary": "vocabulary", "labels": list(model.dims.labels),
        "input": "tokens", "probabilities": "probabilities",
    }  # fmt: skip


def resources(run: Path) -> dict[str, Path]:
    return {"vocabulary": run / VOCABULARY}
