"""What calls give back: frozen values with a short `repr`. This file knows no gRPC and no protobuf.

Arrays are read-only views of the reply; copy one to change it. Times are seconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, repr=False)
class Timing:
    """Where a request's time went inside the server."""

    queue: float = 0.0  # waiting for a round
    run: float = 0.0  # in rounds, shared with the rows that ran alongside
    rounds: int = 0

    def __repr__(self) -> str:
        return f"<{self.queue * 1e3:.1f} ms queued, {self.run * 1e3:.1f} ms in {self.rounds} rounds>"


@dataclass(frozen=True, slots=True, repr=False)
class Classification:
    """A text's label."""

    label: str
    score: float  # the label's probability
    scores: Mapping[str, float]  # every label's, in the model's order
    tokens: int  # read; for a turn of a session, those it brought
    model: str
    version: str
    timing: Timing = field(compare=False)  # of the whole request

    def __repr__(self) -> str:
        return f"<Classification {self.label} {self.score:.1%}, {self.tokens} tokens>"


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Token:
    """One token of a translation."""

    piece: str  # as the vocabulary spells it
    log_probability: float
    attention: NDArray[np.float32]  # one weight per source token; empty where it was not asked for

    def __repr__(self) -> str:
        return f"<Token {self.piece!r} {self.log_probability:.2f}>"


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Translation:
    """A whole translation."""

    text: str
    tokens: tuple[Token, ...]
    score: float  # mean log probability of the tokens
    source_tokens: tuple[str, ...]
    ended: bool  # False: cut at max_tokens before the model was done
    model: str
    version: str
    timing: Timing

    @property
    def attention(self) -> NDArray[np.float32]:
        """What each token attended to, tokens × source tokens; no columns where it was not asked for."""
        if not self.tokens:
            return np.zeros((0, len(self.source_tokens)), np.float32)
        return np.stack([token.attention for token in self.tokens])

    def __repr__(self) -> str:
        return f"<Translation {self.text!r}{'' if self.ended else ', cut'}>"


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class TranslationPiece:
    """What one message of a streamed translation adds: the `text`s together are the translation."""

    text: str
    token: Token | None  # None on the last piece
    done: Translation | None  # the whole of it, on the last piece only

    def __repr__(self) -> str:
        return f"<TranslationPiece {self.text!r}{', done' if self.done else ''}>"


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Forecast:
    """A series continued."""

    channels: tuple[str, ...]
    mean: NDArray[np.float32]  # steps ahead × channels
    quantiles: Mapping[float, NDArray[np.float32]]  # quantile → steps ahead × channels
    model: str
    version: str
    timing: Timing

    def __repr__(self) -> str:
        known = ", ".join(f"{q:g}" for q in self.quantiles)
        return f"<Forecast {len(self.mean)} steps of {', '.join(self.channels)}; quantiles {known or 'none'}>"


@dataclass(frozen=True, slots=True)
class Symbol:
    """One symbol of a generated text."""

    piece: str  # as the vocabulary spells it
    log_probability: float  # by the model itself, before temperature and top_k


@dataclass(frozen=True, slots=True, repr=False)
class Generation:
    """A text that a model went on with."""

    text: str  # without what it goes on from
    symbols: tuple[Symbol, ...]
    seed: int  # with it, and all else the same, the text comes again
    ended: str  # why it is no longer: "end", the model ended it; "stop"; "limit", max_symbols
    read: int  # symbols of the text that was sent
    unknown: int  # of these, not known to the model
    model: str
    version: str
    timing: Timing = field(compare=False)

    def __repr__(self) -> str:
        return f"<Generation {self.text[:60]!r}{'…' if len(self.text) > 60 else ''}, {self.ended}>"


@dataclass(frozen=True, slots=True, repr=False)
class GenerationPiece:
    """What one message of a streamed text adds: the `text`s together are the text."""

    text: str
    symbol: Symbol | None  # None on the last piece
    done: Generation | None  # the whole of it, on the last piece only

    def __repr__(self) -> str:
        return f"<GenerationPiece {self.text!r}{', done' if self.done else ''}>"


@dataclass(frozen=True, slots=True, repr=False)
class Span:
    """A part of a text with a label: a name, a place."""

    label: str
    text: str
    start: int  # in characters: `text[start:end]` of what was sent
    end: int
    first_word: int  # the same in words
    end_word: int
    score: float  # the probability that just these words are a span of this label

    def __repr__(self) -> str:
        return f"<Span {self.label} {self.text!r} {self.score:.1%}>"


@dataclass(frozen=True, slots=True, repr=False)
class Tagging:
    """The spans of a text, in order; they do not overlap."""

    spans: tuple[Span, ...]
    text: str  # as it was sent; where words were, these with a space between them
    words: int
    model: str
    version: str
    timing: Timing = field(compare=False)  # of the whole request

    def __repr__(self) -> str:
        return f"<Tagging {', '.join(map(repr, self.spans)) or 'no spans'}, {self.words} words>"


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Inference:
    """The tensors that a model answered with."""

    outputs: Mapping[str, Array]
    model: str
    version: str
    id: str
    parameters: Mapping[str, bool | int | str | float]
    timing: Timing

    def __getitem__(self, name: str) -> Array:
        """The output called `name`."""
        return self.outputs[name]

    def __repr__(self) -> str:
        return f"<Inference {', '.join(f'{name} {a.dtype}{list(a.shape)}' for name, a in self.outputs.items())}>"


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Tensors(Mapping[str, Array]):
    """The tensors that a turn of a session was answered with, by name."""

    outputs: Mapping[str, Array]
    model: str
    version: str
    timing: Timing = Timing()

    def __getitem__(self, name: str) -> Array:
        return self.outputs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.outputs)

    def __len__(self) -> int:
        return len(self.outputs)

    def __repr__(self) -> str:
        return f"<Tensors {', '.join(f'{name} {a.dtype}{list(a.shape)}' for name, a in self.outputs.items())}>"


Answer = Classification | Forecast | Generation | Tensors
"""What a turn of a session is answered with, by what it brought."""


@dataclass(frozen=True, slots=True, repr=False)
class SessionInfo:
    """What the server has of a session."""

    id: str
    model: str
    version: str
    turn: int  # the last applied; 0: none yet
    acknowledged: int  # the last whose reply the server need not keep
    ttl: float  # seconds that it lives after its last turn
    fingerprint: str  # of the model that made its state

    def __repr__(self) -> str:
        return f"<SessionInfo {self.id} of {self.model} {self.version}, turn {self.turn}>"


@dataclass(frozen=True, slots=True, repr=False)
class Model:
    """One version of a model that the server has."""

    name: str
    version: str
    kind: str  # classify, translate, forecast, tag, generate or tensors
    ready: bool
    facts: Mapping[str, str]  # what a caller wants to know: labels, languages, channels, horizon …
    fingerprint: str

    def __repr__(self) -> str:
        return f"<Model {self.name} {self.version}, {self.kind}, {'ready' if self.ready else 'not ready'}>"


@dataclass(frozen=True, slots=True)
class ServerMetadata:
    """What the server says of itself."""

    name: str
    version: str
    extensions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TensorMetadata:
    """One tensor of a model: the Open Inference Protocol's datatype, and -1 where a length varies."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """The tensors that `infer` takes and gives for a model."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]
    properties: Mapping[str, str]
