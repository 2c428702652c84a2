"""A character language model: it reads a text symbol by symbol and says what comes next; what it has read is its state.

Stacked LSTM, trained by truncated backpropagation through time with the state carried from chunk to chunk and set to
zero where a document begins. This file knows the model, its training and its contract; it must not know how a text is
cut in lanes (`lanes.py`), where it comes from (`data/shakespeare.py`), how symbols are drawn (the server) or onnx.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from contract import bundle
from contract.bundle import State as Carried
from contract.text import Vocabulary, of_letters
from training.carried import CarriedTraining, State
from training.config import Config, ConfigError, section
from training.data import shakespeare
from training.lanes import Chunk, Documents
from training.layers import SequenceDropout, remember
from training.tasks import About

VOCABULARY = "vocabulary.json"
UNKNOWN_ID, START_ID, END_ID = 0, 1, 2  # of contract.text.of_letters

ABOUT = About(
    title="Shakespeare, character by character",
    use="Goes on with a text in the manner of the plays it read, and gives the probability of each next character. A toy "
    "and a teaching piece: it means nothing by what it writes.",
    data="Tiny Shakespeare (Karpathy, char-rnn, 2015): 1,115,394 characters; the last tenth is the test, 40,000 characters "
    "from the middle chose the weights.",
    licence="The plays are in the public domain; the file comes from a repository under the MIT licence.",
    design="Character vectors, two LSTM layers, one linear layer; truncated backpropagation through time with the state "
    "carried across chunks and reset where a document begins.",
    limits="Knows the 65 characters of the file and no others; words are mostly right, sense lasts for a few lines at best.",
)


@dataclass(frozen=True, slots=True)
class Dims:
    vocabulary: int
    embedding: int = 128
    hidden: int = 384
    layers: int = 2
    dropout: float = 0.4  # before each LSTM layer but the first, and before the output
    embedding_dropout: float = 0.1
    recurrent_dropout: float = 0.3  # of the weights between steps, drawn anew for each chunk (Merity et al. 2018)


@dataclass(frozen=True, slots=True)
class Data:
    """The `data` section of the configuration."""

    kind: str = "shakespeare"  # or toy: sentences of the code's own making
    rows: int = 32  # lanes read side by side
    steps: int = 96  # the longest chunk that gradients flow through
    document: int = 20_000  # characters; the state starts at zero as often as that
    unknown: float = 0.01  # share of symbols read as unknown while training, so that its vector means something


class CharacterModel(nn.Module):
    """Logits of the next symbol after each symbol read."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.dims = dims
        self.symbols = nn.Embedding(dims.vocabulary, dims.embedding)
        self.vary_symbols = SequenceDropout(dims.embedding_dropout)
        self.vary = SequenceDropout(dims.dropout)
        widths = [dims.embedding] + [dims.hidden] * (dims.layers - 1)
        self.lstms = nn.ModuleList(remember(nn.LSTM(width, dims.hidden, batch_first=True)) for width in widths)
        self.head = nn.Linear(dims.hidden, dims.vocabulary)

    def zero(self, rows: int) -> State:
        h = self.head.weight.new_zeros(self.dims.layers, rows, self.dims.hidden)
        return h, h.clone()

    def forward(self, tokens: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [rows, time], h and c [layers, rows, hidden] → logits [rows, time, vocabulary], next h, next c."""
        read = self.vary_symbols(self.symbols(tokens))
        hs, cs = [], []
        for layer, lstm in enumerate(self.lstms):
            assert isinstance(lstm, nn.LSTM)
            w, u, *biases = lstm.all_weights[0]
            weights = [w, functional.dropout(u, self.dims.recurrent_dropout, self.training), *biases]
            before = [h[layer : layer + 1], c[layer : layer + 1]]
            # What nn.LSTM itself calls; the module has no way to be given other weights for one call.
            read, last_h, last_c = torch.lstm(
                read if layer == 0 else self.vary(read), before, weights, True, 1, 0.0, self.training, False, True
            )
            hs.append(last_h)
            cs.append(last_c)
        return self.head(self.vary(read)), torch.cat(hs), torch.cat(cs)


class CharacterTraining(CarriedTraining):
    """Cross entropy in nats a symbol; the state of each lane lives here between chunks."""

    def __init__(self, model: CharacterModel, config: Config, settings: Data, train: Documents, validation: Documents) -> None:
        super().__init__(model, asdict(model.dims), config)
        self.settings, self.train_documents, self.validation_documents = settings, train, validation

    def _read(self, given: Tensor, fresh: Tensor) -> Tensor:
        """Logits [rows, time, vocabulary]; the state goes on, without its gradient."""
        model = self.model
        assert isinstance(model, CharacterModel)
        return self.carry(model, given, fresh).float()

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        given, wanted, fresh = batch
        if self.settings.unknown:
            given = given.masked_fill(torch.rand(given.shape, device=given.device) < self.settings.unknown, UNKNOWN_ID)
        logits = self._read(given, fresh)
        return functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()), {}

    def scores(self, batch: Any) -> dict[str, tuple[Tensor, int]]:
        given, wanted, fresh = batch
        with torch.autocast(self.device.type, enabled=False):
            logits = self._read(given, fresh)
        return {"loss": (functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()), wanted.numel())}

    def train_batches(self) -> DataLoader[Chunk]:
        lanes = self.train_documents.lanes(self.settings.rows, self.settings.steps, seed=self.config.seed)
        return DataLoader(self.train_documents, sampler=lanes, batch_size=None)

    def validation_batches(self) -> DataLoader[Chunk]:
        # Lanes of a single document begin in its middle with nothing read: a little worse than the text read as one.
        lanes = self.validation_documents.lanes(VALIDATION_ROWS, 256, shuffle=False)
        return DataLoader(self.validation_documents, sampler=lanes, batch_size=None)


VALIDATION_ROWS = 16


def documents(vocabulary: Vocabulary, texts: Sequence[str]) -> Documents:
    """Texts between their marks of begin and end."""
    return Documents([np.concatenate([[START_ID], ids, [END_ID]]) for ids in vocabulary.encode_many(texts)])


def prepare(config: Config, data: Path | None, out: Path) -> CharacterTraining:
    settings = section(Data, config.data, "data")
    train, validation = _toy(config.seed) if settings.kind == "toy" else _shakespeare(settings, data)
    vocabulary = of_letters(train)
    vocabulary.save(out / VOCABULARY)
    dims = section(Dims, {"vocabulary": vocabulary.size, **config.model}, "model")
    return CharacterTraining(CharacterModel(dims), config, settings, documents(vocabulary, train), documents(vocabulary, validation))


def _shakespeare(settings: Data, data: Path | None) -> tuple[list[str], list[str]]:
    if settings.kind != "shakespeare":
        raise ConfigError(f"data.kind {settings.kind!r}: one of shakespeare, toy")
    text = shakespeare.load(data)
    return [stretch for part in text.train for stretch in shakespeare.stretches(part, settings.document)], [text.validation]


def _toy(seed: int) -> tuple[list[str], list[str]]:
    """Made-up sentences about who sees whom, each a document, so that a text also ends."""
    random = np.random.default_rng(seed)
    names, verbs = ["ann", "bob", "the cat", "the dog"], ["sees", "likes", "hears"]

    def sentence() -> str:
        first, second = random.choice(len(names), 2, replace=False)
        return f"{names[first]} {random.choice(verbs)} {names[second]}."

    return [sentence() for _ in range(1_500)], [sentence() for _ in range(200)]


# How it is served.

LONGEST = 20_000  # symbols of one request


def rebuild(dims: Mapping[str, Any]) -> CharacterModel:
    return CharacterModel(Dims(**dims)).eval()


def describe(model: nn.Module) -> dict[str, bundle.Graph]:
    """One graph: it reads a piece and gives the logits after each of its symbols."""
    assert isinstance(model, CharacterModel)
    d = model.dims
    tokens = bundle.Tensor("tokens", "int64", (bundle.BATCH, bundle.TIME), "symbol ids of the vocabulary", low=0, high=d.vocabulary - 1)
    logits = bundle.Tensor("logits", "float32", (bundle.BATCH, bundle.TIME, d.vocabulary), "of the symbol after each, before softmax")
    shape = (d.layers, bundle.BATCH, d.hidden)
    states = (Carried("h", "next_h", "float32", shape), Carried("c", "next_c", "float32", shape))
    return {"step": bundle.Graph("step.onnx", (tokens,), (logits,), states, max_time=LONGEST)}


class _Step(nn.Module):
    """The same with its layers in one nn.LSTM: between two of them torch.onnx takes the example's length for the only one."""

    def __init__(self, model: CharacterModel) -> None:
        super().__init__()
        d = model.dims
        self.symbols, self.head = model.symbols, model.head
        self.lstm = nn.LSTM(d.embedding, d.hidden, d.layers, batch_first=True)
        for layer, lstm in enumerate(model.lstms):
            for name, weight in lstm.named_parameters():
                self.lstm.get_parameter(name.removesuffix("0") + str(layer)).data.copy_(weight.data)

    def forward(self, tokens: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        read, (h, c) = self.lstm(self.symbols(tokens), (h, c))
        return self.head(read), h, c


def parts(model: nn.Module) -> dict[str, nn.Module]:
    assert isinstance(model, CharacterModel)
    return {"step": _Step(model).eval()}


def task(model: nn.Module, run: Path) -> dict[str, Any]:
    return {
        "kind": "generate", "vocabulary": "vocabulary", "input": "tokens", "logits": "logits",
        "start": START_ID, "end": END_ID, "never": [UNKNOWN_ID, START_ID], "most": 4_000,
    }  # fmt: skip


def resources(run: Path) -> dict[str, Path]:
    return {"vocabulary": run / VOCABULARY}
