"""Open Inference Protocol tensors ↔ numpy. The only reader of tensor fields.

BYTES are texts here: UTF-8, an array of str. On the wire each is its length, four bytes little-endian, and itself.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Listed
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from contract.bundle import BATCH, TIME, Graph, Tensor
from protos import inference_pb2 as pb
from server.errors import InvalidInput, listed
from server.rpc.shared_memory import REGION, Place, Regions, place
from server.sequence import Sequence, Views

Array = np.ndarray[Any, Any]

DATATYPES = {
    "BOOL": "bool", "INT8": "int8", "INT16": "int16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8", "UINT16": "uint16",
    "UINT32": "uint32", "UINT64": "uint64", "FP16": "float16", "FP32": "float32", "FP64": "float64",
}  # fmt: skip
_NAMES = {**{dtype: name for name, dtype in DATATYPES.items()}, "string": "BYTES"}
_NUMPY = {name: np.dtype(dtype).newbyteorder("<") for name, dtype in DATATYPES.items()}
_TAKEN = (*DATATYPES, "BF16", "BYTES")
MOST_AXES = 64  # of a tensor: numpy has no more
MOST_VALUES = 1 << 40  # that a tensor's lengths come to, where one of them is 0 and its bytes say nothing of the others
_TYPED = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents", "INT64": "int64_contents",
    "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


class Values(Protocol):
    """Outputs by name: a round's, or a task's."""

    def __getitem__(self, name: str, /) -> Array: ...


def shape(tensor: Tensor) -> list[int]:
    """A contract's axes as the protocol spells them: -1 where the length varies."""
    return [a if isinstance(a, int) else -1 for a in tensor.axes]


def datatype(tensor: Tensor) -> str:
    return _NAMES[tensor.dtype]


def read_inputs(request: pb.ModelInferRequest, regions: Regions) -> dict[str, Array]:
    """A request's tensors by name, raw ones without copying. Raises InvalidInput where bytes, shape and type disagree."""
    raw = request.raw_input_contents
    arrays: dict[str, Array] = {}
    taken = 0
    for tensor in request.inputs:
        name = tensor.name
        if name in arrays:
            raise repeated(name)
        if tensor.parameters and REGION in tensor.parameters:
            arrays[name] = read(name, tensor.datatype, tensor.shape, regions.read(place(name, tensor.parameters)))
        elif not raw:
            arrays[name] = _typed(tensor)
        elif tensor.HasField("contents"):
            # The first words are what published clients look for.
            both = f"contents field must not be specified when using raw_input_contents for {name!r} for model {request.model_name!r}"
            raise InvalidInput("TWO_CONTENTS", f"{both}: send one of them", tensor=name)
        elif taken < len(raw):
            arrays[name] = read(name, tensor.datatype, tensor.shape, raw[taken])
            taken += 1
        else:
            taken += 1
    if raw and taken != len(raw):
        message = f"raw_input_contents has {len(raw)} entries for {taken} inputs; send one each, none for those in shared memory"
        raise InvalidInput("WRONG_RAW_COUNT", message, expected=taken, got=len(raw))
    return arrays


def read(name: str, kind: str, shape: Listed[int], raw: bytes) -> Array:
    """A raw tensor, numbers without copying. Raises InvalidInput where bytes, shape and type disagree."""
    dtype = _NUMPY.get(kind)
    if dtype is None:
        return _texts(name, shape, raw) if kind == "BYTES" else _widened(name, kind, shape, raw)
    dims, count = _form(name, shape)
    if len(raw) != count * dtype.itemsize:
        raise _wrong_size(name, kind, dims, count * dtype.itemsize, len(raw))
    return np.frombuffer(raw, dtype).reshape(dims)


def read_packed(graph: Graph, tensors: Listed[Any], raw: Listed[bytes]) -> tuple[int, tuple[bytes, ...] | None]:
    """One row's raw tensors as they came, in the graph's order, and their steps; None where they are not of the usual form,
    and must be looked at in detail. `graph.packed` is there, and there are as many tensors as inputs."""
    steps = 0
    parts: list[bytes] = []
    for tensor, sent, data in zip(graph.inputs, tensors, raw, strict=True):
        if sent.name != tensor.name:
            return 0, None  # in another order, or another's
        if DATATYPES.get(sent.datatype) != tensor.dtype or len(sent.shape) != len(tensor.axes):
            return 0, None  # before it is looked up: what is looked up is kept, and must not be of any size
        mine = _steps(tensor, tuple(sent.shape))
        if not mine or len(data) != mine * tensor.packed or (tensor.time_axis is not None and steps not in (0, mine)):
            return 0, None
        if tensor.time_axis is not None:
            steps = mine
        parts.append(data)
    steps = steps or 1
    return (steps, tuple(parts)) if steps <= graph.max_time else (0, None)


@lru_cache(maxsize=4096)
def _steps(tensor: Tensor, shape: tuple[int, ...]) -> int:
    """Of how many steps one row of that shape is; 0 where it is not of the tensor's form."""
    if any((n != 1) if a == BATCH else (n < 1) if a == TIME else (n != a) for a, n in zip(tensor.axes, shape, strict=True)):
        return 0
    return 1 if tensor.time_axis is None else shape[tensor.time_axis]


def timing(field: int, ran: Sequence) -> bytes:
    """A seqserve.v1.Timing as that field (of a number up to 15) of a message: where the time of what ran went."""
    if ran.rounds < 128:
        return _TIMING.pack(field << 3 | 2, 20, 0x09, ran.queued, 0x11, ran.run, 0x18, ran.rounds)
    rounds = varint(ran.rounds)
    return b"".join((bytes((field << 3 | 2, 19 + len(rounds))), _SECONDS.pack(0x09, ran.queued, 0x11, ran.run), b"\x18", rounds))


_SECONDS = struct.Struct("<BdBd")
_TIMING = struct.Struct("<BBBdBdBB")


def varint(n: int) -> bytes:
    """A number as protobuf writes it."""
    if n < 128:
        return _SMALL[n]
    head = bytearray()
    while n > 127:
        head.append(n & 127 | 128)
        n >>= 7
    head.append(n)
    return bytes(head)


_SMALL = tuple(bytes((n,)) for n in range(128))


def _texts(name: str, shape: Listed[int], raw: bytes) -> Array:
    dims, count = _form(name, shape)
    if 4 * count > len(raw):
        raise _wrong_size(name, "BYTES", dims, f"{4 * count} or more", len(raw))
    texts: list[bytes] = []
    at = 0
    while at < len(raw) and len(texts) < count:
        end = at + 4 + int.from_bytes(raw[at : at + 4], "little")
        if at + 4 > len(raw) or end > len(raw):
            message = f"input {name!r}: text {len(texts)} ends after the tensor; each is its length, 4 bytes little-endian, and itself"
            raise InvalidInput("WRONG_SIZE", message, tensor=name, got=len(raw))
        texts.append(raw[at + 4 : end])
        at = end
    if len(texts) != count or at != len(raw):
        message = f"input {name!r}: BYTES {dims} are {count} texts, got {len(texts)} in {at} of {len(raw)} bytes"
        raise InvalidInput("WRONG_SIZE", message, tensor=name, expected=count, got=len(texts))
    return _decoded(name, texts, dims)


def _decoded(name: str, texts: Iterable[bytes], dims: list[int]) -> Array:
    array = np.empty(math.prod(dims), object)
    try:
        for i, text in enumerate(texts):
            array[i] = text.decode()
    except UnicodeDecodeError as e:
        raise InvalidInput("NOT_UTF8", f"input {name!r}: a text is not UTF-8 ({e.reason}); send UTF-8", tensor=name) from None
    return array.reshape(dims)


def _widened(name: str, kind: str, shape: Listed[int], raw: bytes) -> Array:
    """BF16, which numpy has not, as the FP32 that it is the upper half of."""
    if kind != "BF16":
        raise _unknown(name, kind)
    dims, count = _form(name, shape)
    if len(raw) != 2 * count:
        raise _wrong_size(name, kind, dims, 2 * count, len(raw))
    return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").reshape(dims)


def _typed(tensor: pb.ModelInferRequest.InferInputTensor) -> Array:
    name, kind = tensor.name, tensor.datatype
    if kind not in _TYPED:
        if kind not in _TAKEN:
            raise _unknown(name, kind)
        raise InvalidInput("RAW_ONLY", f"input {name!r}: {kind} travels in raw_input_contents only", tensor=name)
    dims, count = _form(name, tensor.shape)
    values = getattr(tensor.contents, _TYPED[kind])
    if len(values) != count:
        message = f"input {name!r}: shape {dims} takes {count} values in {_TYPED[kind]}, got {len(values)}"
        raise InvalidInput("WRONG_SIZE", message, tensor=name, expected=count, got=len(values))
    if kind == "BYTES":
        return _decoded(name, values, dims)
    try:
        return np.array(values, _NUMPY[kind]).reshape(dims)
    except OverflowError:
        raise InvalidInput("OUT_OF_RANGE", f"input {name!r}: a value does not fit {kind}", tensor=name, expected=kind) from None


def _form(name: str, shape: Listed[int]) -> tuple[list[int], int]:
    """A tensor's lengths and count of values. Raises InvalidInput where no array has that shape."""
    if len(shape) > MOST_AXES:
        message = f"input {name!r}: a shape of {len(shape)} axes; at most {MOST_AXES} can be read"
        raise InvalidInput("WRONG_RANK", message, tensor=name, expected=f"0..{MOST_AXES}", got=len(shape))
    dims = list(shape)
    if dims and min(dims) < 0:
        raise InvalidInput("WRONG_SHAPE", f"input {name!r}: shape {dims} has a negative length", tensor=name, got=dims)
    count = math.prod(dims)
    if not count and math.prod(n for n in dims if n) > MOST_VALUES:  # no bytes belie it, and numpy multiplies the others all the same
        message = f"input {name!r}: the lengths of {dims} other than 0 come to more than {MOST_VALUES} values; send smaller ones"
        raise InvalidInput("WRONG_SHAPE", message, tensor=name, expected=f"0..{MOST_VALUES}", got=dims)
    return dims, count


def repeated(name: str) -> InvalidInput:
    return InvalidInput("REPEATED_INPUT", f"input {name!r} is there twice; send it once", tensor=name)


def _unknown(name: str, kind: str) -> InvalidInput:
    allowed = listed(_TAKEN)
    return InvalidInput("WRONG_DTYPE", f"input {name!r}: datatype {kind!r}; allowed are {allowed}", tensor=name, expected=allowed, got=kind)


def _wrong_size(name: str, kind: str, dims: list[int], expected: int | str, got: int) -> InvalidInput:
    message = f"input {name!r}: {kind} {dims} takes {expected} raw bytes, got {got}"
    return InvalidInput("WRONG_SIZE", message, tensor=name, expected=expected, got=got)


def raw(array: Array) -> bytes:
    """A tensor's bytes as they travel."""
    if array.dtype != object:
        return array.tobytes()
    texts = [text.encode() for text in array.ravel()]
    return b"".join(part for text in texts for part in (struct.pack("<I", len(text)), text))


def bytes_of(tensor: Tensor, outputs: Values) -> tuple[bytes, tuple[int, ...]]:
    """An output's bytes as they travel, and its shape."""
    if isinstance(outputs, Views) and tensor.dtype != "string":
        return outputs.data(tensor)
    array = outputs[tensor.name]
    return raw(array), array.shape


def response(head: bytes, parameters: bytes, id: str, wanted: Listed[Tensor], outputs: Values) -> bytes:
    """A serialised ModelInferResponse, put together from parts: most of it is the same for every answer of a model. `head` is
    one with the model's name and version, `parameters` any number of `parameter`s."""
    shapes = []
    values: list[bytes] = []
    for tensor in wanted:
        data, shape = bytes_of(tensor, outputs)
        shapes.append(shape)
        values += (b"\x32", varint(len(data)), data)
    if id:
        encoded = id.encode()
        head += b"\x1a" + varint(len(encoded)) + encoded
    return b"".join((head, parameters, abouts(tuple(wanted), tuple(shapes)), *values))


@lru_cache(maxsize=4096)
def abouts(wanted: tuple[Tensor, ...], shapes: tuple[tuple[int, ...], ...]) -> bytes:
    """What a response says of its outputs beside their bytes."""
    described = pb.ModelInferResponse()
    for tensor, shape in zip(wanted, shapes, strict=True):
        described.outputs.add(name=tensor.name, datatype=_NAMES[tensor.dtype], shape=shape)
    return described.SerializeToString()


def parameter(name: bytes, value: int) -> bytes:
    """One whole number among a response's parameters: an entry of the map in field 4, its value an InferParameter."""
    number = varint(value)
    inner = b"".join((b"\x0a", varint(len(name)), name, b"\x12", varint(len(number) + 1), b"\x10", number))
    return b"\x22" + varint(len(inner)) + inner


def told(ran: Sequence) -> bytes:
    """Parameters of a response: where the time of what ran went."""
    told = parameter(b"queue_us", int(ran.queued * 1e6)) + parameter(b"run_us", int(ran.run * 1e6))
    return told + parameter(b"rounds", ran.rounds)


def share_outputs(
    response: pb.ModelInferResponse, wanted: Iterable[Tensor], outputs: Values, places: Mapping[str, Place], regions: Regions
) -> None:
    """The same, where some outputs go to shared memory: those say where they are, and their bytes are empty. Raises InvalidInput
    where one does not fit its place."""
    for tensor in wanted:
        array = outputs[tensor.name]
        output = response.outputs.add(name=tensor.name, datatype=_NAMES[tensor.dtype], shape=array.shape)
        where, data = places.get(tensor.name), raw(array)
        if where is not None:
            regions.write(where, data)
            where.tell(output.parameters, len(data))
            data = b""
        response.raw_output_contents.append(data)
