"""Every call of the API as a value: where it goes, the request's bytes, how to read a reply.

Both clients are made of this, so that neither knows messages. This file must not know channels, time or retries.

The tasks are here, those of sessions in `sessions`, those of the Open Inference Protocol in `inference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import ArrayLike, NDArray

from protos import seqserve_pb2 as pb
from seqserve import errors, results

R = TypeVar("R")
M = TypeVar("M", bound=Message)

TASKS = "/seqserve.v1.Tasks/"
HEALTH = "/grpc.health.v1.Health/Check"


@dataclass(frozen=True, slots=True)
class Call(Generic[R]):
    """One call, ready to be sent; `read` gives the result of a reply, or of each message of a stream."""

    path: str
    request: bytes
    read: Callable[[bytes], R]
    absent: R | None = None  # the answer where no server is there; None: that is an error
    metadata: tuple[tuple[str, str], ...] = ()  # for this call, beside the client's own


# Tasks


def classify(text: str | Sequence[str], model: str, version: str) -> Call[results.Classification | list[results.Classification]]:
    """One result for a text, a list for a list."""
    texts = [text] if isinstance(text, str) else list(text)
    request = pb.ClassifyRequest(model=model_named(model, version), texts=[string(f"texts[{i}]", t) for i, t in enumerate(texts)])

    def read(raw: bytes) -> results.Classification | list[results.Classification]:
        reply = parse(pb.ClassifyReply, raw)
        if len(reply.results) != len(texts):
            raise errors.bad_reply(f"{len(reply.results)} results for {len(texts)} texts")
        timing = read_timing(reply.timing)
        made = [classification(c, reply.model.name, reply.model.version, timing) for c in reply.results]
        return made[0] if isinstance(text, str) else made

    return Call(TASKS + "Classify", request.SerializeToString(), read)


def translate(
    text: str, source: str, target: str, beam: int, max_tokens: int, attention: bool, model: str, version: str
) -> Call[results.Translation]:
    request = _translate_request(text, source, target, beam, max_tokens, attention, model, version)
    return Call(TASKS + "Translate", request, lambda raw: _translation(parse(pb.TranslateReply, raw)))


def translate_stream(
    text: str, source: str, target: str, beam: int, max_tokens: int, attention: bool, model: str, version: str
) -> Call[results.TranslationPiece]:
    request = _translate_request(text, source, target, beam, max_tokens, attention, model, version)

    def read(raw: bytes) -> results.TranslationPiece:
        piece = parse(pb.TranslatePiece, raw)
        if piece.HasField("done"):
            return results.TranslationPiece(piece.text, None, _translation(piece.done))
        return results.TranslationPiece(piece.text, _token(piece.token), None)

    return Call(TASKS + "TranslateStream", request, read)


def forecast(observations: ArrayLike, horizon: int, quantiles: Sequence[float], model: str, version: str) -> Call[results.Forecast]:
    """Observations are steps × channels, raw units, oldest first; a flat list is one channel."""
    values = numbers("observations", observations)
    request = pb.ForecastRequest(
        model=model_named(model, version),
        observations=series("observations", values[:, np.newaxis] if values.ndim == 1 else values),
        horizon=count("horizon", horizon),
        quantiles=[float(q) for q in quantiles],
    )

    def read(raw: bytes) -> results.Forecast:
        reply = parse(pb.ForecastReply, raw)
        return forecasted(reply, reply.model.name, reply.model.version, read_timing(reply.timing))

    return Call(TASKS + "Forecast", request.SerializeToString(), read)


def tag(given: str | Sequence[str | Sequence[str]], model: str, version: str) -> Call[results.Tagging | list[results.Tagging]]:
    """One result for a text, a list for a list, whose members are texts or lists of words."""
    inputs = [given] if isinstance(given, str) else [g if isinstance(g, str) else list(g) for g in given]
    request = pb.TagRequest(model=model_named(model, version), inputs=[_tag_input(f"[{i}]", g) for i, g in enumerate(inputs)])

    def read(raw: bytes) -> results.Tagging | list[results.Tagging]:
        reply = parse(pb.TagReply, raw)
        if len(reply.results) != len(inputs):
            raise errors.bad_reply(f"{len(reply.results)} results for {len(inputs)} texts")
        texts = (g if isinstance(g, str) else " ".join(g) for g in inputs)
        timing = read_timing(reply.timing)
        made = [
            results.Tagging(tuple(map(_span, r.spans)), text, r.words, reply.model.name, reply.model.version, timing)
            for r, text in zip(reply.results, texts, strict=True)
        ]
        return made[0] if isinstance(given, str) else made

    return Call(TASKS + "Tag", request.SerializeToString(), read)


def _tag_input(where: str, given: str | Sequence[str]) -> pb.TagInput:
    if isinstance(given, str):
        return pb.TagInput(text=string(f"texts{where}", given))
    return pb.TagInput(words=[string(f"words{where}[{i}]", word) for i, word in enumerate(given)])


def _span(s: pb.Span) -> results.Span:
    return results.Span(s.label, s.text, s.start, s.end, s.first_word, s.end_word, s.score)


def models() -> Call[list[results.Model]]:
    def read(raw: bytes) -> list[results.Model]:
        reply = parse(pb.ModelsReply, raw)
        return [results.Model(m.name, m.version, m.kind, m.ready, dict(m.facts), m.fingerprint) for m in reply.models]

    return Call(TASKS + "Models", b"", read)


def health(service: str) -> Call[str]:
    from grpc_health.v1 import health_pb2

    def read(raw: bytes) -> str:
        status = parse(health_pb2.HealthCheckResponse, raw).status
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(status))

    return Call(HEALTH, health_pb2.HealthCheckRequest(service=string("service", service)).SerializeToString(), read)


# Parts of messages


def parse(kind: type[M], raw: bytes) -> M:
    """`raw` as a message. Raises ServerError where it is none."""
    try:
        return kind.FromString(raw)
    except DecodeError as e:
        raise errors.bad_reply(f"not a {kind.__name__} ({e})") from None


def string(what: str, value: object) -> str:
    """`value`, if it can travel as a string. Raises InvalidInput, naming `what`, where it can't."""
    if not isinstance(value, str):
        raise errors.invalid(f"{what} must be str, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise errors.invalid(f"{what} is not Unicode text (character {e.start}): decode it from its real encoding") from None
    return value


def numbers(what: str, values: ArrayLike) -> NDArray[np.float32]:
    """`values` as 32-bit floats. Raises InvalidInput for what is no table of numbers that fit."""
    try:
        with np.errstate(over="raise"):
            return np.asarray(values).astype(np.float32)
    except (TypeError, ValueError):
        raise errors.invalid(f"{what} must be numbers, steps × channels, with all rows of one length") from None
    except FloatingPointError:
        raise errors.invalid(f"{what} has a number beyond what 32-bit floats hold (3.4e38)") from None


def series(what: str, values: NDArray[np.float32]) -> pb.Series:
    """Steps × channels as a message. Raises InvalidInput where they are of another shape."""
    if values.ndim != 2:
        raise errors.invalid(f"{what} must be steps × channels, not of shape {list(values.shape)}")
    return pb.Series(channels=values.shape[1], values=values.ravel())


def classification(c: pb.Classification, model: str, version: str, timing: results.Timing) -> results.Classification:
    return results.Classification(c.label, c.score, {s.label: s.score for s in c.scores}, c.tokens, model, version, timing)


def forecasted(reply: pb.ForecastReply, model: str, version: str, timing: results.Timing) -> results.Forecast:
    channels = len(reply.channels)
    quantiles = {_decimal(q.quantile): _matrix(q.series, channels) for q in reply.quantiles}
    mean = _matrix(reply.mean, channels)
    return results.Forecast(tuple(reply.channels), mean, quantiles, model, version, timing)


def count(what: str, value: int) -> int:
    if not 0 <= value < 2**32:
        raise errors.invalid(f"{what} is {value}: it can't be below 0 or above {2**32 - 1}")
    return value


def model_named(name: str, version: str) -> pb.Model:
    return pb.Model(name=string("model", name), version=string("version", version))


def read_timing(timing: pb.Timing) -> results.Timing:
    return results.Timing(timing.queue, timing.run, timing.rounds)


def _translate_request(text: str, source: str, target: str, beam: int, max_tokens: int, attention: bool, model: str, version: str) -> bytes:
    return pb.TranslateRequest(
        model=model_named(model, version),
        text=string("text", text),
        source=string("source", source),
        target=string("target", target),
        beam=count("beam", beam),
        max_tokens=count("max_tokens", max_tokens),
        attention=attention,
    ).SerializeToString()


def _translation(reply: pb.TranslateReply) -> results.Translation:
    tokens = tuple(_token(t) for t in reply.tokens)
    if any(len(t.attention) not in (0, len(reply.source_tokens)) for t in tokens):
        raise errors.bad_reply("attention weights and source tokens differ in number")
    return results.Translation(
        reply.text,
        tokens,
        reply.score,
        tuple(reply.source_tokens),
        reply.ended,
        reply.model.name,
        reply.model.version,
        read_timing(reply.timing),
    )


def _token(token: pb.Token) -> results.Token:
    return results.Token(token.piece, token.log_probability, np.array(token.attention, np.float32))


def _matrix(series: pb.Series, channels: int) -> NDArray[np.float32]:
    values = np.array(series.values, np.float32)
    if series.channels != channels or not channels or len(values) % channels:
        raise errors.bad_reply(f"a series of {len(values)} values, {series.channels} channels; {channels} channels are named")
    return values.reshape(-1, channels)


def _decimal(value: float) -> float:
    """The shortest decimal that is `value` as a 32-bit float: 0.1, where the wire has 0.10000000149."""
    return float(str(np.float32(value)))
