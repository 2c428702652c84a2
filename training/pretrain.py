"""Pre-training of the sentiment model on reviews without labels: a language model of words, whose embedding and LSTM
`sentiment.py` then starts from (Dai & Le, NeurIPS 2015, arXiv 1511.01432).

It knows the language model, its sampled loss and its training. It must not know labels, how a text is cut in lanes
(`lanes.py`) or serving: what it learns is served only as part of a sentiment model, so it offers no graph.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from contract.text import Vocabulary
from training import reviews
from training.carried import CarriedTraining, State
from training.config import Config, section
from training.lanes import Chunk, Documents
from training.layers import SequenceDropout, remember

BETWEEN = 0  # stands between two reviews: the id of padding, which is no word of any review


@dataclass(frozen=True, slots=True)
class Dims:
    vocabulary: int
    embedding: int = 128
    hidden: int = 256
    layers: int = 1
    embedding_dropout: float = 0.1
    dropout: float = 0.1  # of what the LSTM gives


@dataclass(frozen=True, slots=True)
class Data:
    """The `data` section of the configuration. `kind` and `validation` must be those of the sentiment run that follows."""

    kind: str = "imdb"  # imdb, or toy: the sentiment model's made-up sentences
    vocabulary: int = 30_000
    least: int = 3
    validation: int = 2_500  # reviews held out: the very ones that the sentiment run with the same seed validates on
    asked: int = 100  # so many of those are scored here, with the whole vocabulary
    rows: int = 64  # lanes read side by side
    steps: int = 64  # the longest chunk that gradients flow through
    together: int = 200  # reviews read one after another before the state starts at zero again
    against: int = 512  # other words drawn for each chunk, which the right ones are told from


class ReviewModel(nn.Module):
    """A language model of words; input and output share the embedding (Press & Wolf, 2017)."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.dims = dims
        self.embedding = nn.Embedding(dims.vocabulary, dims.embedding)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.embedding_dropout = SequenceDropout(dims.embedding_dropout)
        self.lstm = remember(nn.LSTM(dims.embedding, dims.hidden, dims.layers, batch_first=True))
        self.dropout = SequenceDropout(dims.dropout)
        self.narrow = nn.Linear(dims.hidden, dims.embedding)
        self.bias = nn.Parameter(torch.zeros(dims.vocabulary))

    def zero(self, rows: int) -> State:
        h = self.bias.new_zeros(self.dims.layers, rows, self.dims.hidden)
        return h, h.clone()

    def forward(self, tokens: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [rows, time], h and c → what the next word's vector should look like [rows, time, embedding], next h, c."""
        read, (h, c) = self.lstm(self.embedding_dropout(self.embedding(tokens)), (h, c))
        return self.narrow(self.dropout(read)), h, c

    def logits(self, looked: Tensor) -> Tensor:
        """[..., embedding] → [..., vocabulary]"""
        return functional.linear(looked, self.embedding.weight, self.bias)

    def sampled(self, looked: Tensor, wanted: Tensor, others: Tensor) -> Tensor:
        """The cross entropy of `wanted` [n] among itself and `others` [m], a sample of `likelihood`; looked [n, embedding].

        The sum over all other words is estimated from those drawn, each counted by how seldom it is drawn (Bengio & Senécal,
        2008). A drawn word that is the right one is left out.
        """
        vocabulary, drawn = self.dims.vocabulary, len(others)
        right = (looked * self.embedding(wanted)).sum(-1) + self.bias[wanted]  # [n]
        rest = functional.linear(looked, self.embedding(others), self.bias[others])  # [n, m]
        right = right.float()  # lessening it too, as some do, is right only for words drawn at most once
        rest = rest.float() - torch.log(drawn * likelihood(others, vocabulary))
        rest = rest.masked_fill(wanted[:, None] == others, -math.inf)
        every = torch.cat([right[:, None], rest], 1)
        loss: Tensor = (every.logsumexp(1) - right).mean()
        return loss


def likelihood(words: Tensor, vocabulary: int) -> Tensor:
    """How likely `draw` draws each word: Zipf's law, words being numbered from the most frequent on."""
    return torch.log1p(1 / (words + 1.0)) / math.log(vocabulary + 1)


def draw(count: int, vocabulary: int, device: torch.device) -> Tensor:
    """So many words, with replacement."""
    uniform = torch.rand(count, device=device)
    return ((uniform * math.log(vocabulary + 1)).exp() - 1).long().clamp(0, vocabulary - 1)


class ReviewTraining(CarriedTraining):
    """Validation loss: nats a word over the whole vocabulary. The state of each lane lives here between chunks."""

    next = "python -m training sentiment --set init.from={out}"

    def __init__(self, model: ReviewModel, config: Config, settings: Data, train: Documents, validation: Documents) -> None:
        super().__init__(model, asdict(model.dims), config)
        self.settings, self.train_documents, self.validation_documents = settings, train, validation

    def configure_optimizers(self) -> OptimizerLRScheduler:
        made = super().configure_optimizers()
        if self.config.optimiser.kind in ("adam", "adamw"):
            assert isinstance(made, dict)
            for group in made["optimizer"].param_groups:
                group["fused"] = True  # 3 ms a step for the shipped size and not 16, beside 70 for the rest (one core)
        return made

    def _read(self, given: Tensor, fresh: Tensor) -> Tensor:
        """[rows, time, embedding]; the state goes on, without its gradient."""
        model = self.model
        assert isinstance(model, ReviewModel)
        return self.carry(model, given, fresh)

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        given, wanted, fresh = batch
        looked = self._read(given, fresh)
        model = self.model
        assert isinstance(model, ReviewModel)
        others = draw(self.settings.against, model.dims.vocabulary, given.device)
        return model.sampled(looked.flatten(0, 1), wanted.flatten(), others), {}

    def scores(self, batch: Any) -> dict[str, tuple[Tensor, int]]:
        given, wanted, fresh = batch
        looked = self._read(given, fresh)
        model = self.model
        assert isinstance(model, ReviewModel)
        loss = functional.cross_entropy(model.logits(looked).float().flatten(0, 1), wanted.flatten())
        return {"loss": (loss, wanted.numel())}

    def train_batches(self) -> DataLoader[Chunk]:
        lanes = self.train_documents.lanes(self.settings.rows, self.settings.steps, seed=self.config.seed)
        return DataLoader(self.train_documents, sampler=lanes, batch_size=None)

    def validation_batches(self) -> DataLoader[Chunk]:
        lanes = self.validation_documents.lanes(VALIDATION_ROWS, 64, shuffle=False)
        return DataLoader(self.validation_documents, sampler=lanes, batch_size=None)


VALIDATION_ROWS = 16


def joined(encoded: Sequence[np.ndarray[Any, Any]], together: int) -> Documents:
    """Reviews in the order given, so many of them a document, BETWEEN before and after each."""

    def document(some: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        mark = np.array([BETWEEN])
        return np.concatenate([mark, *(part for review in some for part in (review, mark))])

    return Documents([document(encoded[i : i + together]) for i in range(0, len(encoded), together)])


def rebuild(dims: Mapping[str, Any]) -> ReviewModel:
    return ReviewModel(Dims(**dims)).eval()


def parts(model: nn.Module) -> Mapping[str, nn.Module]:
    """Raises ValueError, which export tells."""
    raise ValueError("a pre-training run has no graph of its own: train sentiment with --set init.from=RUN, then export that")


def prepare(config: Config, data: Path | None, out: Path) -> ReviewTraining:
    """Read the reviews but those that the sentiment run validates on, learn the vocabulary, save it, build the model."""
    settings = section(Data, config.data, "data")
    read, held = reviews.without_held(settings.kind, settings.validation, config.seed, data)
    vocabulary = reviews.learn_vocabulary(read, settings.vocabulary, settings.least)
    vocabulary.save(out / reviews.VOCABULARY)
    dims = section(Dims, {"vocabulary": vocabulary.size, **config.model}, "model")
    return ReviewTraining(
        ReviewModel(dims), config, settings, joined(_encoded(vocabulary, read), settings.together),
        joined(_encoded(vocabulary, held[: settings.asked]), settings.together),
    )  # fmt: skip


def _encoded(vocabulary: Vocabulary, texts: Sequence[str]) -> list[np.ndarray[Any, Any]]:
    """In pieces, as the library's own results take many times the room of the numbers."""

    def every() -> Iterator[np.ndarray[Any, Any]]:
        for start in range(0, len(texts), 5_000):
            yield from (ids.astype(np.int32) for ids in vocabulary.encode_many(texts[start : start + 5_000]))

    return list(every())
