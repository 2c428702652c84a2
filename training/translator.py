"""A translator: a recurrent encoder and decoder with attention, cut in two graphs where the server's decode loop joins.

Bidirectional LSTM encoder, one LSTM decoder with Luong's attention and input feeding (Luong et al. 2015, arXiv
1508.04025), one matrix for all word vectors (Press & Wolf 2017, arXiv 1608.05859). This file knows the model, its
training and its contract; it must not know how text becomes batches (`pairs.py`), beams (`contract/search.py`), files
of a data set (`data/multi30k.py`) or onnx.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sacrebleu
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

from contract.bundle import Graph, State
from contract.bundle import Tensor as Described
from contract.search import Hypothesis
from contract.text import Vocabulary
from training import checkpoint, search
from training.attention import Attention
from training.config import Config, ConfigError, section
from training.data import multi30k
from training.layers import SequenceDropout, remember
from training.loop import Training
from training.pairs import (
    END_ID,
    PAD_ID,
    START_ID,
    UNKNOWN_ID,
    Batch,
    ByLength,
    Pairs,
    make_vocabulary,
    reversed_words,
)
from training.repeated import Repeated, smoothed_cross_entropy
from training.tasks import About

CANDIDATES = 10  # per hypothesis and step: enough for beams up to 9
VOCABULARY = "vocabulary.json"
SEARCH = "search.json"

ABOUT = About(
    title="Caption translator",
    use="Short descriptive sentences, English to German as shipped; not news, not conversation, not several sentences at once.",
    data="Multi30k task 1, 29,000 sentence pairs (Elliott et al. 2016), raw text",
    licence="weights for research and education, as the data: captions derived from Flickr30K, non-commercial",
    design="bidirectional LSTM encoder, LSTM decoder with Luong attention and input feeding, joint subwords, tied word vectors",
    limits="Knows the words of image captions only; a word it never saw is spelled from pieces and often wrong.",
)


@dataclass(frozen=True, slots=True)
class Dims:
    """Sizes of a translator. Its memory is 2 * encoder wide; the fed-back vector is as wide as the word vectors."""

    vocabulary: int = 5000
    embedding: int = 256
    encoder: int = 192  # per direction
    decoder: int = 384
    dropout: float = 0.35


class Encoder(nn.Module):
    """Reads a sentence both ways."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.lstm = remember(nn.LSTM(dims.embedding, dims.encoder, batch_first=True, bidirectional=True))
        self.begin = nn.Linear(2 * dims.encoder, 2 * dims.decoder)

    def forward(self, vectors: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """vectors [batch, time, embedding], right-padded where `lengths` [batch] is given
        → memory [batch, time, 2 * encoder], h and c [1, batch, decoder] for the decoder to begin with."""
        if lengths is None:
            memory, (last, _) = self.lstm(vectors)
        else:
            packed = pack_padded_sequence(vectors, lengths.cpu(), batch_first=True, enforce_sorted=False)
            output, (last, _) = self.lstm(packed)
            memory, _ = pad_packed_sequence(output, batch_first=True, total_length=vectors.shape[1])
        begin = self.begin(torch.cat([last[0], last[1]], dim=1))  # [batch, 2 * decoder]
        h, c = begin.chunk(2, dim=1)
        return memory, torch.tanh(h).unsqueeze(0), c.unsqueeze(0)


class Translator(nn.Module):
    """Encoder, decoder and their shared word vectors [vocabulary, embedding]: source, target and output alike."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.dims = dims
        self.words = nn.Embedding(dims.vocabulary, dims.embedding)
        nn.init.normal_(self.words.weight, std=dims.embedding**-0.5)
        self.encoder = Encoder(dims)
        self.lstm = remember(nn.LSTM(2 * dims.embedding, dims.decoder, batch_first=True))
        self.attention = Attention(dims.decoder, 2 * dims.encoder)
        self.combine = nn.Linear(dims.decoder + 2 * dims.encoder, dims.embedding)
        self.bias = nn.Parameter(torch.zeros(dims.vocabulary))
        self.vary = SequenceDropout(dims.dropout)
        self.dropout = nn.Dropout(dims.dropout)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [...] → word vectors [..., embedding], scaled to unit variance: the output layer wants them small."""
        vectors: Tensor = self.words(tokens) * self.dims.embedding**0.5
        return vectors

    def encode(self, tokens: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [batch, time] ending in </s>, right-padded where `lengths` [batch] is given → memory, h, c."""
        memory, h, c = self.encoder(self.vary(self.embed(tokens)), lengths)
        return self.vary(memory), h, c

    def logits(self, attentional: Tensor) -> Tensor:
        """[..., embedding] → [..., vocabulary]."""
        return functional.linear(attentional, self.words.weight, self.bias)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Teacher forcing: source [batch, time] right-padded, lengths [batch], target [batch, steps] beginning with
        <s> → attentional vectors [batch, steps, embedding], to be given to `logits`.

        The decoder's own LSTM weights are applied by hand, because the fed-back vector makes each step wait for the
        last: the words' share of the gates is one product for all steps, the rest one product a step.
        """
        memory, h, c = self.encode(source, lengths)
        absent = torch.arange(source.shape[1], device=source.device) >= lengths.unsqueeze(1)
        e = self.dims.embedding
        words = self.vary(self.embed(target))
        w, u, *biases = self.lstm.all_weights[0]
        given = functional.linear(words, w[:, :e], biases[0] + biases[1])  # [batch, steps, 4H]
        kind = given.dtype  # bfloat16 under autocast
        recur = Repeated(torch.cat([w[:, e:], u], dim=1).to(kind))  # [4H, embedding + H]
        combine = Repeated(self.combine.weight.to(kind))
        query = Repeated(self.attention.project.weight.to(kind))
        memory, h, c = memory.to(kind), h[0].to(kind), c[0].float()
        feed = words.new_zeros(len(source), e, dtype=kind)
        seen: list[Tensor] = []
        for gates in given.unbind(1):  # not given[:, step]: its gradient would be a whole tensor of zeros each step
            i, f, g, o = (gates + recur(torch.cat([feed, h], dim=1))).float().chunk(4, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = (torch.sigmoid(o) * torch.tanh(c)).to(kind)
            context, _ = self.attention.padded(query(h), memory, absent)
            feed = self.dropout(torch.tanh(combine(torch.cat([h, context], dim=1)) + self.combine.bias.to(kind)))
            seen.append(feed)
        return torch.stack(seen, dim=1)


class Encode(nn.Module):
    """The one-shot graph: a whole source sentence → what each decoding step looks at."""

    def __init__(self, model: Translator) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [batch, time] → memory [batch, time, 2 * encoder], h, c [1, batch, decoder]."""
        return self.model.encode(tokens)


class Step(nn.Module):
    """The stateful graph: one more token of each hypothesis → candidates for the next."""

    never: Tensor

    def __init__(self, model: Translator) -> None:
        super().__init__()
        self.model = model
        never = torch.zeros(model.dims.vocabulary)
        never[[PAD_ID, UNKNOWN_ID, START_ID]] = -1e9  # not words of any translation
        self.register_buffer("never", never, persistent=False)

    def forward(
        self, tokens: Tensor, memory: Tensor, row: Tensor, h: Tensor, c: Tensor, feed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """tokens [batch, 1], memory [batch*source, 2 * encoder], row [batch*source], h and c [1, batch, decoder],
        feed [batch, embedding] → log_probs and ids [batch, K] best first, attention [batch*source], next h, c, feed."""
        m = self.model
        given = torch.cat([m.embed(tokens), feed.unsqueeze(1)], dim=2)  # [batch, 1, 2 * embedding]
        output, (h, c) = m.lstm(given, (h, c))
        query = output[:, 0]
        context, weights = m.attention.ragged(query, memory, row)
        feed = torch.tanh(m.combine(torch.cat([query, context], dim=1)))
        scores = torch.log_softmax(m.logits(feed) + self.never, dim=1)
        log_probs, ids = scores.topk(min(CANDIDATES, m.dims.vocabulary), dim=1)
        return log_probs, ids, weights, h, c, feed


def rebuild(dims: Mapping[str, Any]) -> Translator:
    """The model of a checkpoint's dims, in eval mode."""
    return Translator(Dims(**dims)).eval()


def describe(model: nn.Module) -> dict[str, Graph]:
    """The contracts of "step" and "encode". A step reads one token: `max_time` is 1, so "time" is always 1 there."""
    assert isinstance(model, Translator)
    d = model.dims
    wide, k = 2 * d.encoder, min(CANDIDATES, d.vocabulary)
    tokens = Described("tokens", "int64", ("batch", "time"), "subword ids; a source ends in </s>", low=0, high=d.vocabulary - 1)
    step = Graph(
        file="step.onnx",
        inputs=(
            Described(tokens.name, tokens.dtype, tokens.axes, "the newest token of each hypothesis", low=0, high=d.vocabulary - 1),
            Described("memory", "float32", ("batch*source", wide), "each row's own source as `encode` read it, end to end"),
            Described("row", "int64", ("batch*source",), "the row that each cell of memory belongs to", role="row"),
        ),
        outputs=(
            Described("log_probs", "float32", ("batch", k), "natural log probabilities of the best next tokens, best first"),
            Described("ids", "int64", ("batch", k), "those tokens"),
            Described("attention", "float32", ("batch*source",), "how much each source position counted; sums to 1 in a row"),
        ),
        states=(
            State("h", "next_h", "float32", (1, "batch", d.decoder)),
            State("c", "next_c", "float32", (1, "batch", d.decoder)),
            State("feed", "next_feed", "float32", ("batch", d.embedding)),
        ),
        max_time=1,
    )
    encode = Graph(
        file="encode.onnx",
        inputs=(tokens,),
        outputs=(
            Described("memory", "float32", ("batch", "time", wide), "what attention looks at, one vector per source token"),
            Described("h", "float32", (1, "batch", d.decoder), "the step's first h"),
            Described("c", "float32", (1, "batch", d.decoder), "the step's first c"),
        ),
        cut=False,
        max_time=512,
    )
    return {"step": step, "encode": encode}


def parts(model: nn.Module) -> dict[str, nn.Module]:
    assert isinstance(model, Translator)
    return {"step": Step(model).eval(), "encode": Encode(model).eval()}


def resources(run: Path) -> dict[str, Path]:
    return {"vocabulary": run / VOCABULARY}


def task(model: nn.Module, run: Path) -> dict[str, Any]:
    """Search settings as the validation set chose them at the end of the run."""
    chosen = json.loads((run / SEARCH).read_text(encoding="utf-8"))
    return {
        "kind": "translate", "main": "step", "source": chosen["source"], "target": chosen["target"],
        "vocabulary": "vocabulary", "start": START_ID, "end": END_ID, "max_length": chosen["max_length"],
        "beam": chosen["beam"], "length_penalty": chosen["length_penalty"], "candidates": CANDIDATES,
    }  # fmt: skip


# Training.


@dataclass(frozen=True, slots=True)
class Data:
    """The `data` table of a configuration."""

    kind: str = "multi30k"  # or "reverse", generated
    source: str = "en"
    target: str = "de"
    sentences: int = 64  # in a batch
    vary: float = 0.0  # BPE dropout: how often a merge is left out when a training sentence is split


@dataclass(frozen=True, slots=True)
class Model:
    """The `model` table of a configuration: Dims, and what belongs to its loss and its search."""

    vocabulary: int = 5000
    embedding: int = 256
    encoder: int = 192
    decoder: int = 384
    dropout: float = 0.35
    smoothing: float = 0.1
    beam: int = 5
    max_length: int = 128


class TranslatorTraining(Training):
    """Cross entropy with label smoothing; greedy BLEU on the validation set decides."""

    monitor = "validation_bleu"
    monitor_mode = "max"

    def __init__(self, config: Config, model: Translator, settings: Model, data: Data, tokenizer: Tokenizer,
                 train: tuple[list[str], list[str]], validation: tuple[list[str], list[str]], out: Path) -> None:  # fmt: skip
        super().__init__(model, asdict(model.dims), config)
        self.settings, self.data, self.out = settings, data, out
        self.vocabulary = Vocabulary(tokenizer)
        self.train_pairs = self._pairs(*train)
        self.validation_pairs = self._pairs(*validation)
        self.references = validation[1]

    def _pairs(self, sources: list[str], targets: list[str]) -> Pairs:
        return Pairs(*([ids.tolist() for ids in self.vocabulary.encode_many(lines)] for lines in (sources, targets)))

    def _batches(self, pairs: Pairs, seed: int | None) -> DataLoader[Any]:
        sampler = ByLength(pairs, self.data.sentences, seed)
        return DataLoader(pairs, batch_size=None, sampler=sampler, num_workers=self.config.run.workers)

    def train_batches(self) -> DataLoader[Any]:
        return self._batches(self.train_pairs, self.config.seed)

    def validation_batches(self) -> DataLoader[Any]:
        return self._batches(self.validation_pairs, None)

    def _losses(self, batch: Batch, smoothing: float) -> tuple[Tensor, int]:
        """The mean loss of a batch's tokens, and how many they are."""
        model = self.model
        assert isinstance(model, Translator)
        wanted = batch.target[:, 1:]
        real = wanted != PAD_ID
        attentional = model(batch.source, batch.lengths, batch.target[:, :-1])
        given = attentional[real]  # [tokens, embedding]: no work for padding
        weight = model.words.weight.to(given.dtype)
        return smoothed_cross_entropy(given, weight, model.bias, wanted[real], smoothing), int(real.sum())

    def loss(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return self._losses(batch, self.settings.smoothing)[0], {}

    def scores(self, batch: Any) -> dict[str, tuple[Tensor, int]]:
        return {"loss": self._losses(batch, 0.0)}

    def validation_end_scores(self) -> dict[str, float]:
        found = self.translate(self.model, beam=1, length_penalty=0.0)
        draw_attention(self.out / "attention.png", self.vocabulary, self.validation_pairs.sources[:3], found[:3])
        return {"bleu": self.bleu(found)}

    def bleu(self, found: Sequence[Hypothesis]) -> float:
        texts = [self.vocabulary.decode(h.tokens) for h in found]
        return float(sacrebleu.corpus_bleu(texts, [self.references]).score)

    def translate(self, model: nn.Module, beam: int, length_penalty: float) -> list[Hypothesis]:
        """The validation sentences through the parts that are exported, in full precision."""
        assert isinstance(model, Translator)
        sources = [np.array([*s, END_ID], np.int64) for s in self.validation_pairs.sources]
        encode, step = as_functions(model)
        with torch.autocast(self.device.type, enabled=False):
            return search.translate(
                encode, step, sources, start=START_ID, end=END_ID, beam=beam, length_penalty=length_penalty,
                max_length=self.settings.max_length, feed=model.dims.embedding,
            )  # fmt: skip

    def on_fit_end(self) -> None:
        if self.trainer.is_global_zero:
            self.finish()

    def finish(self) -> None:
        """Choose the length penalty on the validation set, with the weights that were kept."""
        kept = checkpoint.load(self.out)
        model = rebuild(kept.dims)
        model.load_state_dict(dict(kept.weights))
        tried = {a: self.bleu(self.translate(model, self.settings.beam, a)) for a in (0.6, 1.0, 1.4, 1.8)}
        chosen = {
            "source": self.data.source, "target": self.data.target, "beam": self.settings.beam,
            "length_penalty": max(tried, key=lambda a: tried[a]), "max_length": self.settings.max_length,
            "validation_bleu": tried,
        }  # fmt: skip
        (self.out / SEARCH).write_text(json.dumps(chosen, indent=1) + "\n", encoding="utf-8")


def as_functions(model: Translator) -> tuple[search.Encode, search.Step]:
    """The model's two parts as functions of arrays, as `search.translate` wants them."""
    modules = parts(model)
    device = model.bias.device

    def call(name: str, arrays: Sequence[search.Array]) -> list[search.Array]:
        with torch.inference_mode():
            return [t.cpu().numpy() for t in modules[name](*(torch.from_numpy(np.asarray(a)).to(device) for a in arrays))]

    return lambda *arrays: call("encode", arrays), lambda *arrays: call("step", arrays)


def draw_attention(file: Path, vocabulary: Vocabulary, sources: Sequence[Sequence[int]], found: Sequence[Hypothesis]) -> None:
    """A heat map per sentence: which source pieces each output piece looked at."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(found), 5))
    FigureCanvasAgg(figure)
    for place, (source, hypothesis) in enumerate(zip(sources, found, strict=True)):
        axes = figure.add_subplot(1, len(found), place + 1)
        axes.imshow(np.stack(hypothesis.attention), cmap="Greys", vmin=0.0, vmax=1.0, aspect="auto")
        columns, rows = vocabulary.pieces([*source, END_ID]), vocabulary.pieces([*hypothesis.tokens, END_ID])
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
        axes.set_yticks(range(len(hypothesis.attention)), rows[: len(hypothesis.attention)], fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=100)


def prepare(config: Config, data: Path | None, out: Path) -> TranslatorTraining:
    """Load the sentence pairs, make the vocabulary from the training part and save it in `out`."""
    settings, chosen = section(Model, config.model, "model"), section(Data, config.data, "data")
    if settings.beam >= CANDIDATES:
        raise ConfigError(f"model.beam {settings.beam}: at most {CANDIDATES - 1}")
    if chosen.kind == "multi30k":
        train = multi30k.load("train", chosen.source, data), multi30k.load("train", chosen.target, data)
        validation = multi30k.load("val", chosen.source, data), multi30k.load("val", chosen.target, data)
    elif chosen.kind == "reverse":
        train, validation = reversed_words(4000, config.seed), reversed_words(200, config.seed + 1)
    else:
        raise ConfigError(f"data.kind {chosen.kind!r}: one of multi30k, reverse")
    tokenizer = make_vocabulary([*train[0], *train[1]], settings.vocabulary)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / VOCABULARY))
    dims = Dims(tokenizer.get_vocab_size(), settings.embedding, settings.encoder, settings.decoder, settings.dropout)
    return TranslatorTraining(config, Translator(dims), settings, chosen, tokenizer, train, validation, out)
