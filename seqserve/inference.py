"""The calls of the Open Inference Protocol as values, like those of the tasks in `wire`.

Its messages are imported where they are used: `protos.inference_pb2` registers the protocol's names with protobuf, and
a process may hold them once only (see `_messages`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from seqserve import errors, results, tensors
from seqserve.wire import Call, parse, string

if TYPE_CHECKING:
    from protos import inference_pb2

Parameter = bool | int | str | float

SERVICE = "/inference.GRPCInferenceService/"


def infer(
    model: str,
    inputs: Mapping[str, ArrayLike],
    outputs: Iterable[str],
    version: str,
    id: str,
    parameters: Mapping[str, Parameter] | None,
) -> Call[results.Inference]:
    oip = _messages()
    request = oip.ModelInferRequest(model_name=string("model", model), model_version=string("version", version), id=string("id", id))
    for name, value in (parameters or {}).items():
        _set_parameter(name, value, request.parameters[name])
    for name, values in inputs.items():
        datatype, shape, raw = tensors.pack(name, values)
        request.inputs.add(name=string("input name", name), datatype=datatype, shape=shape)
        request.raw_input_contents.append(raw)
    for name in outputs:
        request.outputs.add(name=string("output name", name))
    return Call(SERVICE + "ModelInfer", request.SerializeToString(), _inferred)


def live() -> Call[bool]:
    oip = _messages()
    return Call(SERVICE + "ServerLive", b"", lambda raw: parse(oip.ServerLiveResponse, raw).live, absent=False)


def ready() -> Call[bool]:
    oip = _messages()
    return Call(SERVICE + "ServerReady", b"", lambda raw: parse(oip.ServerReadyResponse, raw).ready, absent=False)


def model_ready(name: str, version: str) -> Call[bool]:
    oip = _messages()
    request = oip.ModelReadyRequest(name=string("name", name), version=string("version", version)).SerializeToString()
    return Call(SERVICE + "ModelReady", request, lambda raw: parse(oip.ModelReadyResponse, raw).ready, absent=False)


def metadata() -> Call[results.ServerMetadata]:
    oip = _messages()

    def read(raw: bytes) -> results.ServerMetadata:
        reply = parse(oip.ServerMetadataResponse, raw)
        return results.ServerMetadata(reply.name, reply.version, tuple(reply.extensions))

    return Call(SERVICE + "ServerMetadata", b"", read)


def model_metadata(name: str, version: str) -> Call[results.ModelMetadata]:
    oip = _messages()
    request = oip.ModelMetadataRequest(name=string("name", name), version=string("version", version)).SerializeToString()

    def read(raw: bytes) -> results.ModelMetadata:
        reply = parse(oip.ModelMetadataResponse, raw)
        inputs, outputs = (
            tuple(results.TensorMetadata(t.name, t.datatype, tuple(t.shape)) for t in listed) for listed in (reply.inputs, reply.outputs)
        )
        return results.ModelMetadata(reply.name, tuple(reply.versions), reply.platform, inputs, outputs, dict(reply.properties))

    return Call(SERVICE + "ModelMetadata", request, read)


def _messages() -> Any:
    """The Open Inference Protocol's messages: tritonclient's where the process has them already, else ours.

    Both register the same names with protobuf, so the second to come would be refused. Their names and numbers are
    the same by design.
    """
    loaded = sys.modules.get("tritonclient.grpc.service_pb2")
    if loaded is None:
        from protos import inference_pb2

        return inference_pb2
    return loaded


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
            into.string_param = string(f"parameter {name!r}", value)
        case _:
            raise errors.invalid(f"parameter {name!r} is {value!r}: bool, int (64 bits), float and str travel")


def _parameters(values: Mapping[str, inference_pb2.InferParameter]) -> dict[str, Parameter]:
    known = ((name, value, value.WhichOneof("parameter_choice")) for name, value in values.items())
    return {name: getattr(value, choice) for name, value, choice in known if choice is not None}


def _inferred(raw: bytes) -> results.Inference:
    reply: inference_pb2.ModelInferResponse = parse(_messages().ModelInferResponse, raw)
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
