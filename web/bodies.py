"""What /v1 takes and gives, as types: they check what comes, and they are the schemas of the OpenAPI document.

Names are those of protos/ and of the Python client. Series are lists of steps, each a list of channels; numbers that travel as
32-bit floats are written with as many digits as those have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
import orjson
from msgspec import UNSET, Meta, Struct, UnsetType
from numpy.typing import NDArray

from protos import sessions_pb2 as live
from seqserve import errors, results, tensors
from web import problems

Count = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Series = Annotated[list[list[float]], Meta(description="Steps, oldest first; each a list with a number per channel, in raw units.")]
MOST_TEXTS = 256


class Named(Struct, kw_only=True, forbid_unknown_fields=True):
    model: Annotated[str, Meta(description="Which model answers; left out, the server's only one of that task.")] = ""
    version: Annotated[str, Meta(description="Left out, the newest.")] = ""


class ClassifyBody(Named, kw_only=True):
    texts: Annotated[list[str], Meta(min_length=1, max_length=MOST_TEXTS, description="Each is labelled by itself.")]


class TagBody(Named, kw_only=True):
    texts: Annotated[
        list[str | Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1)]],
        Meta(min_length=1, max_length=MOST_TEXTS, description="Each a text, or its words as they were split elsewhere."),
    ]


class TranslateBody(Named, kw_only=True):
    text: Annotated[str, Meta(min_length=1)]
    source: Annotated[str, Meta(description="ISO 639-1, such as en; left out, what the model translates from.")] = ""
    target: str = ""
    beam: Annotated[int, Meta(ge=0, le=10, description="Hypotheses kept; 1 is greedy, 0 the model's own choice.")] = 0
    max_tokens: Annotated[Count, Meta(description="0: the model's own limit.")] = 0
    attention: Annotated[bool, Meta(description="Give what each token attended to.")] = False


class Wishes(Struct, kw_only=True, forbid_unknown_fields=True):
    """How a text is to be gone on with."""

    text: Annotated[str, Meta(description="What to go on from.")] = ""
    temperature: Annotated[float, Meta(ge=0, le=100, description="0 takes the likeliest symbol each time.")] = 1.0
    top_k: Annotated[Count, Meta(description="Draw from so many of the likeliest symbols; 0: from all.")] = 0
    seed: Annotated[int | None, Meta(description="0 to 2^64-1. The same seed gives the same text; left out, the server draws one.")] = None
    max_symbols: Annotated[Count, Meta(description="0: 200.")] = 0
    stop: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=16, description="The text ends after any of these.")] = []


class GenerateBody(Wishes, kw_only=True):
    model: str = ""
    version: str = ""


class ForecastBody(Named, kw_only=True):
    observations: Annotated[list[list[float] | float], Meta(min_length=1, description="A series; a flat list is one channel.")]
    horizon: Annotated[Count, Meta(description="Steps ahead; 0: as many as the model gives.")] = 0
    quantiles: Annotated[list[Annotated[float, Meta(gt=0, lt=1)]], Meta(description="Empty: all that the model has.")] = []


class TensorBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """A tensor of one row. As the Open Inference Protocol has it, without the binary extension."""

    name: str
    datatype: str
    shape: list[Annotated[int, Meta(ge=0)]]
    data: Annotated[list[Any], Meta(description="Row-major, nested or flat.")]


class OpenBody(Struct, kw_only=True, forbid_unknown_fields=True):
    model: Annotated[str, Meta(min_length=1)]
    version: str = ""
    session: Annotated[str, Meta(max_length=127, description="Its id; left out, the server makes one.")] = ""
    ttl: Annotated[float, Meta(ge=0, description="Seconds that it lives after its last turn; 0: the server's default.")] = 0.0


class TurnBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """One turn: its number, and one of `text`, `observations`, `generate`, `tensors`."""

    turn: Annotated[int, Meta(ge=1, description="One more than the last. Sent again, it is answered again, never applied again.")]
    acknowledged: Annotated[int, Meta(ge=0, description="The last turn whose answer you have: those up to it need not be kept.")] = 0
    text: Annotated[str, Meta(description="A piece of a text, cut anywhere, for a classifier.")] | UnsetType = UNSET
    observations: (
        Annotated[list[list[float] | float], Meta(min_length=1, description="For a forecaster: a series, or one step as a flat list.")]
        | UnsetType
    ) = UNSET
    generate: Wishes | UnsetType = UNSET
    tensors: Annotated[list[TensorBody], Meta(min_length=1)] | UnsetType = UNSET


class ForkBody(Struct, forbid_unknown_fields=True):
    session: Annotated[str, Meta(max_length=127, description="Id of the fork; left out, the server makes one.")] = ""


class ExportBody(Struct, forbid_unknown_fields=True):
    move: Annotated[bool, Meta(description="End the session here.")] = False


# What is given


class Timing(Struct):
    """Where the time of a request went inside the server, in seconds."""

    queue: float
    run: float
    rounds: int


class Answered(Struct, kw_only=True):
    model: str
    version: str
    timing: Timing


class Label(Struct):
    label: str
    score: Annotated[float, Meta(description="Its probability.")]
    scores: dict[str, float]
    tokens: int


class ClassifyReply(Answered, kw_only=True):
    results: Annotated[list[Label], Meta(description="One per text, in order.")]


class Span(Struct):
    label: str
    text: str
    start: Annotated[int, Meta(description="In characters (Unicode code points), as `end`.")]
    end: int
    first_word: int
    end_word: int
    score: float


class Tagged(Struct):
    spans: list[Span]
    words: int


class TagReply(Answered, kw_only=True):
    results: Annotated[list[Tagged], Meta(description="One per text, in order.")]


class Token(Struct):
    piece: str
    log_probability: float
    attention: Annotated[list[float], Meta(description="A weight per source token, where it was asked for.")] | UnsetType = UNSET


class TranslateReply(Answered, kw_only=True):
    text: str
    tokens: list[Token]
    score: Annotated[float, Meta(description="Mean log probability of the tokens.")]
    source_tokens: list[str]
    ended: Annotated[bool, Meta(description="False: cut at max_tokens.")]


class Generated(Struct, kw_only=True):
    text: str
    tokens: list[Token]
    seed: Annotated[int, Meta(description="Up to 2^64-1: more than a JavaScript number holds.")]
    ended: Annotated[str, Meta(description="end, stop or limit.")]
    read: int
    unknown: int


class GenerateReply(Generated, kw_only=True):
    model: str
    version: str
    timing: Timing


class Quantile(Struct):
    quantile: float
    values: Series


class Forecasted(Struct, kw_only=True):
    channels: list[str]
    mean: Series
    quantiles: list[Quantile]


class ForecastReply(Forecasted, kw_only=True):
    model: str
    version: str
    timing: Timing


class Piece(Struct):
    """What a token, or a symbol, adds."""

    text: str
    token: Token


class ModelInfo(Struct):
    name: str
    version: str
    kind: str
    ready: bool
    facts: dict[str, str]
    fingerprint: str


class ModelsReply(Struct):
    models: list[ModelInfo]


class SessionReply(Struct):
    session: str
    model: str
    version: str
    turn: Annotated[int, Meta(description="The last applied; 0: none yet.")]
    acknowledged: int
    ttl: float
    fingerprint: str


class SessionsReply(Struct):
    sessions: list[SessionReply]
    total: int


class TensorReply(Struct):
    name: str
    datatype: str
    shape: list[int]
    data: list[Any]


class TurnReply(Struct):
    """The answer to a turn: always the same bytes for the same turn. One of the last four is there."""

    session: str
    turn: int
    classification: Label | UnsetType = UNSET
    forecast: Forecasted | UnsetType = UNSET
    generated: Generated | UnsetType = UNSET
    tensors: list[TensorReply] | UnsetType = UNSET


# Results as these


def series(given: Sequence[list[float] | float]) -> list[Any]:
    """Steps × channels, or a flat list. Raises Problem for a mixture, or steps of different lengths."""
    lengths = {len(step) if isinstance(step, list) else 0 for step in given}
    if len(lengths) != 1:
        raise problems.bad("WRONG_SHAPE", "observations must be numbers, or steps with one number per channel, all of one length")
    return list(given)


def decimal(value: float) -> float:
    """The shortest decimal that is this 32-bit float: 0.1, where the wire has 0.10000000149."""
    return float(str(np.float32(value)))


def numbers(array: NDArray[Any]) -> Any:
    """An array as JSON, nested as it is shaped, where a type says lists. Not a number, and infinite, have no JSON: null."""
    return msgspec.Raw(orjson.dumps(np.ascontiguousarray(array), option=orjson.OPT_SERIALIZE_NUMPY))


def timing(t: results.Timing) -> Timing:
    return Timing(t.queue, t.run, t.rounds)


def label(c: results.Classification) -> Label:
    return Label(c.label, decimal(c.score), {name: decimal(score) for name, score in c.scores.items()}, c.tokens)


def tagged(t: results.Tagging) -> Tagged:
    return Tagged([Span(s.label, s.text, s.start, s.end, s.first_word, s.end_word, decimal(s.score)) for s in t.spans], t.words)


def token(t: results.Token) -> Token:
    return Token(t.piece, decimal(t.log_probability), numbers(t.attention) if len(t.attention) else UNSET)


def symbol(s: results.Symbol) -> Token:
    return Token(s.piece, decimal(s.log_probability))


def translated(t: results.Translation) -> TranslateReply:
    return TranslateReply(
        text=t.text, tokens=list(map(token, t.tokens)), score=decimal(t.score), source_tokens=list(t.source_tokens), ended=t.ended,
        model=t.model, version=t.version, timing=timing(t.timing),
    )  # fmt: skip


def generated(g: results.Generation) -> Generated:
    return Generated(text=g.text, tokens=list(map(symbol, g.symbols)), seed=g.seed, ended=g.ended, read=g.read, unknown=g.unknown)


def generate_reply(g: results.Generation) -> GenerateReply:
    return GenerateReply(**msgspec.structs.asdict(generated(g)), model=g.model, version=g.version, timing=timing(g.timing))


def forecasted(f: results.Forecast) -> Forecasted:
    quantiles = [Quantile(q, numbers(values)) for q, values in f.quantiles.items()]
    return Forecasted(channels=list(f.channels), mean=numbers(f.mean), quantiles=quantiles)


def forecast_reply(f: results.Forecast) -> ForecastReply:
    return ForecastReply(**msgspec.structs.asdict(forecasted(f)), model=f.model, version=f.version, timing=timing(f.timing))


def session(s: results.SessionInfo) -> SessionReply:
    return SessionReply(s.id, s.model, s.version, s.turn, s.acknowledged, s.ttl, s.fingerprint)


def tensor(t: live.Tensor) -> TensorReply:
    """Raises ServerError for a reply that makes no sense, or has bytes that are no text."""
    array = tensors.unpack(t.name, t.datatype, t.shape, t.data)
    if t.datatype != tensors.BYTES:
        return TensorReply(t.name, t.datatype, list(t.shape), numbers(array.ravel()))
    try:
        return TensorReply(t.name, t.datatype, list(t.shape), [value.decode() for value in array.flat])
    except UnicodeDecodeError:
        raise errors.bad_reply(f"output {t.name!r} is not UTF-8") from None
