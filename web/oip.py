"""Messages of the Open Inference Protocol ↔ its JSON and binary forms. Knows no HTTP but the bytes of bodies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from google.protobuf.message import Message
from msgspec import Meta, Struct

from protos import inference_pb2 as pb
from web import problems, tensors
from web.endpoint import decoded

SHARED = "shared_memory_region"
BINARY, BINARY_ALL, SIZE = "binary_data", "binary_data_output", "binary_data_size"  # of HTTP's form only: the server isn't told

Parameter = str | int | float | bool


class InputTensor(Struct, kw_only=True):
    name: str
    datatype: Annotated[str, Meta(description="BOOL, INT8 to INT64, UINT8 to UINT64, FP16, FP32, FP64, BYTES.")]
    shape: list[int]
    parameters: dict[str, Parameter] = {}
    data: Annotated[list[Any] | None, Meta(description="Row-major, nested or flat; texts for BYTES. Left out for binary data.")] = None


class RequestedOutput(Struct, kw_only=True):
    name: str
    parameters: dict[str, Parameter] = {}


class InferBody(Struct, kw_only=True):
    """An inference request, as the Open Inference Protocol's version 2 has it."""

    inputs: list[InputTensor]
    outputs: Annotated[list[RequestedOutput], Meta(description="Left out: all.")] = []
    id: Annotated[str, Meta(description="Given back in the answer.")] = ""
    parameters: Annotated[
        dict[str, Parameter],
        Meta(description="sequence_id, sequence_start, sequence_end, turn, priority, timeout (microseconds), binary_data_output."),
    ] = {}


class OutputTensor(Struct, kw_only=True, omit_defaults=True):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: Annotated[list[Any] | None, Meta(description="Row-major, flat.")] = None


class InferReply(Struct, kw_only=True, omit_defaults=True):
    model_name: str
    model_version: str
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[OutputTensor] = []


class Inference:
    """One inference request: what the server is sent, and which outputs are to be binary."""

    def __init__(self, model: str, version: str, body: bytes, head: int | None) -> None:
        """`head`: bytes of JSON that the body begins with, the tensors behind them; None: it is all JSON. Raises Problem."""
        given = decoded(body if head is None else body[:head], InferBody)
        self.message = pb.ModelInferRequest(model_name=model, model_version=version, id=given.id)
        self._all = _flag(given.parameters, BINARY_ALL)
        self._binary: dict[str, bool] = {}
        _set_parameters(given.parameters, self.message.parameters)
        binary = memoryview(body)[len(body) if head is None else head :]
        taken = 0
        for tensor in given.inputs:
            taken += self._add(tensor, binary[taken:])
        if taken != len(binary):
            raise problems.bad("WRONG_SIZE", f"{len(binary)} bytes follow the JSON, the inputs' {SIZE} are {taken} in all")
        for wanted in given.outputs:
            self._binary[wanted.name] = _flag(wanted.parameters, BINARY, self._all)
            output = self.message.outputs.add(name=wanted.name)
            _set_parameters(wanted.parameters, output.parameters)

    def _add(self, tensor: InputTensor, binary: memoryview) -> int:
        """Add an input; how many bytes of binary data it took."""
        tensors.check_shape(tensor.name, tensor.shape)
        size = tensor.parameters.get(SIZE)
        ways = [tensor.data is not None, size is not None, SHARED in tensor.parameters]
        if sum(ways) != 1:
            message = f"input {tensor.name!r}: its values come either as data, as {SIZE} bytes behind the JSON, or from shared memory"
            raise problems.bad("NO_CONTENTS" if not any(ways) else "TWO_CONTENTS", message)
        added = self.message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        _set_parameters(tensor.parameters, added.parameters)
        if tensor.data is not None:
            self.message.raw_input_contents.append(tensors.packed(tensor.name, tensor.datatype, tensor.shape, tensor.data))
            return 0
        if size is None:
            return 0
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(binary):
            message = f"input {tensor.name!r}: {SIZE} is {size!r}, {len(binary)} bytes are left behind the JSON"
            raise problems.bad("WRONG_SIZE", message)
        self.message.raw_input_contents.append(bytes(binary[:size]))
        return size

    def written(self, reply: pb.ModelInferResponse) -> tuple[bytes, int | None]:
        """The body of an answer, and how much of it is JSON where binary data follows. Raises Problem for what has no JSON."""
        raw = reply.raw_output_contents
        outputs: list[OutputTensor] = []
        binary: list[bytes] = []
        for i, tensor in enumerate(reply.outputs):
            parameters = _parameters(tensor.parameters)
            output = OutputTensor(name=tensor.name, datatype=tensor.datatype, shape=list(tensor.shape), parameters=parameters)
            outputs.append(output)
            data = raw[i] if i < len(raw) else b""
            if SHARED in parameters:
                continue
            if self._binary.get(tensor.name, self._all):
                parameters[SIZE] = len(data)
                binary.append(data)
            else:
                output.data = tensors.listed(tensor.name, tensor.datatype, tensor.shape, data)
        told = InferReply(
            model_name=reply.model_name, model_version=reply.model_version, id=reply.id, parameters=_parameters(reply.parameters),
            outputs=outputs,
        )  # fmt: skip
        json = msgspec.json.encode(told)
        asked = self._all or any(self._binary.values())
        return b"".join((json, *binary)), len(json) if asked else None


def _flag(parameters: dict[str, Any], name: str, default: bool = False) -> bool:
    value = parameters.pop(name, default)
    if not isinstance(value, bool):
        raise problems.bad("BAD_PARAMETER", f"parameter {name!r} must be true or false")
    return value


def _set_parameters(given: Mapping[str, Any], into: Any) -> None:
    for name, value in given.items():
        if name != SIZE:
            set_parameter(name, value, into[name])


def set_parameter(name: str, value: object, into: Any) -> None:
    """A JSON value as a parameter: an InferParameter, or a ModelRepositoryParameter. Raises Problem where it is neither."""
    match value:
        case bool():
            into.bool_param = value
        case int() if -(2**63) <= value < 2**63:
            into.int64_param = value
        case int() if 0 <= value < 2**64 and hasattr(into, "uint64_param"):
            into.uint64_param = value
        case float() if hasattr(into, "double_param"):
            into.double_param = value
        case str():
            into.string_param = value
        case _:
            raise problems.bad("BAD_PARAMETER", f"parameter {name[:80]!r}: texts, numbers of up to 64 bits, true and false travel")


def _parameters(given: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    chosen = ((name, value, value.WhichOneof("parameter_choice")) for name, value in sorted(given.items()))
    return {name: getattr(value, choice) for name, value, choice in chosen if choice is not None}


def plain(message: Message) -> dict[str, Any]:
    """A message as JSON, the way Triton writes its own: names as in the .proto, whole numbers as numbers, unset fields too."""
    made: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            of = field.message_type.fields_by_name["value"]
            made[field.name] = {key: _value(of, value[key]) for key in sorted(value)}
        elif field.is_repeated:
            made[field.name] = [_value(field, v) for v in value]
        elif (field.message_type is None and field.containing_oneof is None) or message.HasField(field.name):
            made[field.name] = _value(field, value)
    return made


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return plain(value)
    if field.enum_type is not None:
        named = field.enum_type.values_by_number.get(value)
        return value if named is None else named.name
    return value
