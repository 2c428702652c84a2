"""Every call of the API as a value: where it goes, the request's bytes, how to read a reply.

Both clients are made of this, so that neither knows messages. This file must not know channels, time or retries.

Messages are imported where they are used: `protos.inference_pb2` registers the Open Inference Protocol's names with
protobuf, and a process may hold them once only (see `_inference`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import ArrayLike, NDArray

from protos import seqserve_pb2 as pb
from seqserve import errors, results, tensors

if TYPE_CHECKING:
    from protos import inference_pb2

R = TypeVar("R")
M = TypeVar("M", bound=Message)
Parameter = bool | int | str | float

TASKS = "/seqserve.v1.Tasks/"
OPEN = "/inference.GRPCInferenceService/"
HEALTH = "/grpc.health.v1.Health/Check"


@dataclass(frozen=True, slots=True)
class Call(Generic[R]):
    """One call, ready to be sent; `read` gives the result of a reply, or of each message of a stream."""

    path: str
    request: bytes
    read: Callable[[bytes], R]
    absent: R | None = None  # the answer where no server is there; None: that is an error


# Tasks


def classify(text: str | Sequence[str], model: str, version: str) -> Call[results.Classification | list[results.Classification]]:
    """One result for a text, a list for a list."""
    texts = [text] if isinstance(text, str) else list(text)
    request = pb.ClassifyRequest(model=_model(model, version), texts=[_text(f"texts[{i}]", t) for i, t in enumerate(texts)])

    def read(raw: bytes) -> results.Classification | list[results.Classification]:
        reply = _parse(pb.ClassifyReply, raw)
        if len(reply.results) != len(texts):
            raise errors.bad_reply(f"{len(reply.results)} results for {len(texts)} texts")
        timing = _timing(reply.timing)
        made = [
            results.Classification(
                c.label, c.score, {s.label: s.score for s in c.scores}, c.tokens, reply.model.name, reply.model.version, timing
            )
            for c in reply.results
        ]
        return made[0] if isinstance(text, str) else made

    return Call(TASKS + "Classify", request.SerializeToString(), read)


def translate(
    text: str, source: str, target: str, beam: int, max_tokens: int, attention: bool, model: str, version: str
) -> Call[results.Translation]:
    request = _translate_request(text, source, target, beam, max_tokens, attention, model, version)
    return Call(TASKS + "Translate", request, lambda raw: _translation(_parse(pb.TranslateReply, raw)))


def translate_stream(
    text: str, source: str, target: str, beam: int, max_tokens: int, attention: bool, model: str, version: str
) -> Call[results.TranslationPiece]:
    request = _translate_request(text, source, target, beam, max_tokens, attention, model, version)

    def read(raw: bytes) -> results.TranslationPiece:
        piece = _parse(pb.TranslatePiece, raw)
        if piece.HasField("done"):
            return results.TranslationPiece(piece.text, None, _translation(piece.done))
        return results.TranslationPiece(piece.text, _token(piece.token), None)

    return Call(TASKS + "TranslateStream", request, read)


def forecast(observations: ArrayLike, horizon: int, quantiles: Sequence[float], model: str, version: str) -> Call[results.Forecast]:
    """Observations are steps × channels, raw units, oldest first; a flat list is one channel."""
    values = _series("observations", observations)
    request = pb.ForecastRequest(
        model=_model(model, version),
        observations=pb.Series(channels=values.shape[1], values=values.ravel()),
        horizon=_count("horizon", horizon),
        quantiles=[float(q) for q in quantiles],
    )

    def read(raw: bytes) -> results.Forecast:
        reply = _parse(pb.ForecastReply, raw)
        return results.Forecast(
            tuple(reply.channels),
            _matrix(reply.mean, len(reply.channels)),
            {_decimal(q.quantile): _matrix(q.series, len(reply.channels)) for q in reply.quantiles},
            reply.model.name,
            reply.model.version,
            _timing(reply.timing),
        )

    return Call(TASKS + "Forecast", request.SerializeToString(), read)


def models() -> Call[list[results.Model]]:
    def read(raw: bytes) -> list[results.Model]:
        reply = _parse(pb.ModelsReply, raw)
        return [results.Model(m.name, m.version, m.kind, m.ready, dict(m.facts), m.fingerprint) for m in reply.models]

    return Call(TASKS + "Models", b"", read)


# The Open Inference Protocol


def infer(
    model: str,
    inputs: Mapping[str, ArrayLike],
    outputs: Iterable[str],
    version: str,
    id: str,
    parameters: Mapping[str, Parameter] | None,
) -> Call[results.Inference]:
    oip = _inference()
    request = oip.ModelInferRequest(model_name=_text("model", model), model_version=_text("version", version), id=_text("id", id))
    for name, value in (parameters or {}).items():
        _set_parameter(name, value, request.parameters[name])
    for name, values in inputs.items():
        datatype, shape, raw = tensors.pack(name, values)
        request.inputs.add(name=_text("input name", name), datatype=datatype, shape=shape)
        request.raw_input_contents.append(raw)
    for name in outputs:
        request.outputs.add(name=_text("output name", name))
    return Call(OPEN + "ModelInfer", request.SerializeToString(), _inferred)


def live() -> Call[bool]:
    oip = _inference()
    return Call(OPEN + "ServerLive", b"", lambda raw: _parse(oip.ServerLiveResponse, raw).live, absent=False)


def ready() -> Call[bool]:
    oip = _inference()
    return Call(OPEN + "ServerReady", b"", lambda raw: _parse(oip.ServerReadyResponse, raw).ready, absent=False)


def model_ready(name: str, version: str) -> Call[bool]:
    oip = _inference()
    request = oip.ModelReadyRequest(name=_text("name", name), version=_text("version", version)).SerializeToString()
    return Call(OPEN + "ModelReady", request, lambda raw: _parse(oip.ModelReadyResponse, raw).ready, absent=False)


def metadata() -> Call[results.ServerMetadata]:
    oip = _inference()

    def read(raw: bytes) -> results.ServerMetadata:
        reply = _parse(oip.ServerMetadataResponse, raw)
        return results.ServerMetadata(reply.name, reply.version, tuple(reply.extensions))

    return Call(OPEN + "ServerMetadata", b"", read)


def model_metadata(name: str, version: str) -> Call[results.ModelMetadata]:
    oip = _inference()
    request = oip.ModelMetadataRequest(name=_text("name", name), version=_text("version", version)).SerializeToString()

    def read(raw: bytes) -> results.ModelMetadata:
        reply = _parse(oip.ModelMetadataResponse, raw)
        inputs, outputs = (
            tuple(results.TensorMetadata(t.name, t.datatype, tuple(t.shape)) for t in listed) for listed in (reply.inputs, reply.outputs)
        )
        return results.ModelMetadata(reply.name, tuple(reply.versions), reply.platform, inputs, outputs, dict(reply.properties))

    return Call(OPEN + "ModelMetadata", request, read)


def health(service: str) -> Call[str]:
    from grpc_health.v1 import health_pb2

    def read(raw: bytes) -> str:
        status = _parse(health_pb2.HealthCheckResponse, raw).status
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(status))

    return Call(HEALTH, health_pb2.HealthCheckRequest(service=_text("service", service)).SerializeToString(), read)


# Parts of messages


def _inference() -> Any:
    """The Open Inference Protocol's messages: tritonclient's where the process has them already, else ours.

    Both register the same names with protobuf, so the second to come would be refused. Their names and numbers are
    the same by design.
    """
    loaded = sys.modules.get("tritonclient.grpc.service_pb2")
    if loaded is None:
        from protos import inference_pb2

        return inference_pb2
    return loaded


def _parse(kind: type[M], raw: bytes) -> M:
    try:
        return kind.FromString(raw)
    except DecodeError as e:
        raise errors.bad_reply(f"not a {kind.__name__} ({e})") from None


def _text(what: str, value: object) -> str:
    """`value`, if it can travel as a string."""
    if not isinstance(value, str):
        raise errors.invalid(f"{what} must be str, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise errors.invalid(f"{what} is not Unicode text (character {e.start}): decode it from its real encoding") from None
    return value


def _count(what: str, value: int) -> int:
    if not 0 <= value < 2**32:
        raise errors.invalid(f"{what} is {value}: it can't be below 0 or above {2**32 - 1}")
    return value


def _model(name: str, version: str) -> pb.Model:
    return pb.Model(name=_text("model", name), version=_text("version", version))


def _timing(timing: pb.Timing) -> results.Timing:
    return results.Timing(timing.queue, timing.run, timing.rounds)


def _translate_request(text: str, source: str, target: str, beam: int, max_tokens: int, attention: bool, model: str, version: str) -> bytes:
    return pb.TranslateRequest(
        model=_model(model, version),
        text=_text("text", text),
        source=_text("source", source),
        target=_text("target", target),
        beam=_count("beam", beam),
        max_tokens=_count("max_tokens", max_tokens),
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
        _timing(reply.timing),
    )


def _token(token: pb.Token) -> results.Token:
    return results.Token(token.piece, token.log_probability, np.array(token.attention, np.float32))


def _series(what: str, values: ArrayLike) -> NDArray[np.float32]:
    """`values` as steps × channels. Raises InvalidInput for what is no such table of numbers that fit."""
    try:
        with np.errstate(over="raise"):
            array = np.asarray(values).astype(np.float32)
    except (TypeError, ValueError):
        raise errors.invalid(f"{what} must be numbers, steps × channels, with all rows of one length") from None
    except FloatingPointError:
        raise errors.invalid(f"{what} has a number beyond what 32-bit floats hold (3.4e38)") from None
    if array.ndim == 1:
        array = array[:, np.newaxis]
    if array.ndim != 2:
        raise errors.invalid(f"{what} must be steps × channels, not of shape {list(array.shape)}")
    return array


def _matrix(series: pb.Series, channels: int) -> NDArray[np.float32]:
    values = np.array(series.values, np.float32)
    if series.channels != channels or not channels or len(values) % channels:
        raise errors.bad_reply(f"a series of {len(values)} values, {series.channels} channels; {channels} channels are named")
    return values.reshape(-1, channels)


def _decimal(value: float) -> float:
    """The shortest decimal that is `value` as a 32-bit float: 0.1, where the wire has 0.10000000149."""
    return float(str(np.float32(value)))


def _set_parameter(name: str, value: Parameter, into: inference_pb2.InferParameter) -> None:
    match value:
        case bool():  # before int, which it is too
            into.bool_param = value
        case int() if -(2**63) <= value < 2**63:
            into.int64_param = value
        case int() if 0 <= value < 2**64:
            into.uint64_param = value
        case float():
            into.double_param = value
        case str():
            into.string_param = _text(f"parameter {name!r}", value)
        case _:
            raise errors.invalid(f"parameter {name!r} is {value!r}: bool, int (64 bits), float and str travel")


def _parameters(values: Mapping[str, inference_pb2.InferParameter]) -> dict[str, Parameter]:
    known = ((name, value, value.WhichOneof("parameter_choice")) for name, value in values.items())
    return {name: getattr(value, choice) for name, value, choice in known if choice is not None}


def _inferred(raw: bytes) -> results.Inference:
    reply: inference_pb2.ModelInferResponse = _parse(_inference().ModelInferResponse, raw)
    if len(reply.raw_output_contents) not in (0, len(reply.outputs)):
        raise errors.bad_reply(f"{len(reply.raw_output_contents)} raw contents for {len(reply.outputs)} outputs")
    outputs: dict[str, results.Array] = {}
    for i, tensor in enumerate(reply.outputs):
        if reply.raw_output_contents:
            outputs[tensor.name] = tensors.unpack(tensor.name, tensor.datatype, tensor.shape, reply.raw_output_contents[i])
        else:
            outputs[tensor.name] = _typed(tensor)
    parameters = _parameters(reply.parameters)
    queue, run, rounds = (parameters.get(name) for name in ("queue_us", "run_us", "rounds"))
    timing = results.Timing(_number(queue) / 1e6, _number(run) / 1e6, int(_number(rounds)))
    return results.Inference(outputs, reply.model_name, reply.model_version, reply.id, parameters, timing)


def _number(value: Parameter | None) -> float:
    return float(value) if isinstance(value, (int, float)) else 0.0


_CONTENTS: Mapping[str, str] = {
    "BOOL": "bool_contents", "BYTES": "bytes_contents", "FP32": "fp32_contents", "FP64": "fp64_contents",
    "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents", "INT64": "int64_contents",
    "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
}  # fmt: skip


def _typed(tensor: inference_pb2.ModelInferResponse.InferOutputTensor) -> results.Array:
    """An output whose values came by type and not raw, as other servers may send it."""
    if tensor.datatype not in _CONTENTS:
        raise errors.bad_reply(f"output {tensor.name!r} of datatype {tensor.datatype!r} has no raw contents")
    values = list(getattr(tensor.contents, _CONTENTS[tensor.datatype]))
    try:
        if tensor.datatype == tensors.BYTES:
            return tensors.objects(values).reshape(tuple(tensor.shape))
        return np.array(values, tensors.DATATYPES[tensor.datatype]).reshape(tuple(tensor.shape))
    except (ValueError, OverflowError):
        fault = f"output {tensor.name!r}: {len(values)} values are not {tensor.datatype} of shape {list(tensor.shape)}"
        raise errors.bad_reply(fault) from None
