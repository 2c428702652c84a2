"""Open Inference Protocol tensors ↔ numpy. The only reader of tensor fields."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from contract.bundle import BATCH, TIME, Graph, Tensor
from protos import inference_pb2 as pb
from server.errors import InvalidInput, listed

Array = np.ndarray[Any, Any]

DATATYPES = {
    "BOOL": "bool", "INT8": "int8", "INT16": "int16", "INT32": "int32", "INT64": "int64", "UINT8": "uint8", "UINT16": "uint16",
    "UINT32": "uint32", "UINT64": "uint64", "FP16": "float16", "FP32": "float32", "FP64": "float64",
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
_NUMPY = {name: np.dtype(dtype).newbyteorder("<") for name, dtype in DATATYPES.items()}
_TYPED = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents", "INT64": "int64_contents",
    "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents", "UINT64": "uint64_contents",
    "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


def shape(tensor: Tensor) -> list[int]:
    """A contract's axes as the protocol spells them: -1 where the length varies."""
    return [a if isinstance(a, int) else -1 for a in tensor.axes]


def datatype(tensor: Tensor) -> str:
    return _NAMES[tensor.dtype]


def read_inputs(request: pb.ModelInferRequest) -> dict[str, Array]:
    """A request's tensors by name, raw ones without copying. Raises InvalidInput where bytes, shape and type disagree."""
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidInput(
            "WRONG_RAW_COUNT", f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs; send one each",
            expected=len(request.inputs), got=len(raw),
        )  # fmt: skip
    arrays: dict[str, Array] = {}
    for i, tensor in enumerate(request.inputs):
        if tensor.name in arrays:
            raise InvalidInput("REPEATED_INPUT", f"input {tensor.name!r} is there twice; send it once", tensor=tensor.name)
        arrays[tensor.name] = _read(tensor, raw[i] if raw else None)
    return arrays


def read(name: str, kind: str, shape: Sequence[int], raw: bytes) -> Array:
    """A raw tensor, without copying. Raises InvalidInput where bytes, shape and type disagree."""
    dims, dtype, count = _form(name, kind, shape)
    expected = count * dtype.itemsize
    if len(raw) != expected:
        message = f"input {name!r}: {kind} {dims} takes {expected} raw bytes, got {len(raw)}"
        raise InvalidInput("WRONG_SIZE", message, tensor=name, expected=expected, got=len(raw))
    return np.frombuffer(raw, dtype).reshape(dims)


def read_packed(graph: Graph, tensors: Sequence[Any]) -> tuple[int, tuple[bytes, ...] | None]:
    """One row's raw tensors as they came, in the graph's order, and their steps; None where they are not of the usual form,
    and must be looked at in detail. `graph.packed` is there."""
    steps = 0
    parts: list[bytes] = []
    for tensor, sent in zip(graph.inputs, tensors, strict=True):
        if sent.name != tensor.name:
            return 0, None  # in another order, or another's
        data: bytes = sent.data
        mine = _steps(tensor, sent.datatype, tuple(sent.shape))
        if not mine or len(data) != mine * tensor.packed or (tensor.time_axis is not None and steps not in (0, mine)):
            return 0, None
        if tensor.time_axis is not None:
            steps = mine
        parts.append(data)
    steps = steps or 1
    return (steps, tuple(parts)) if steps <= graph.max_time else (0, None)


@lru_cache(maxsize=4096)
def _steps(tensor: Tensor, kind: str, shape: tuple[int, ...]) -> int:
    """Of how many steps one row of that form is; 0 where it is not of the tensor's form."""
    if DATATYPES.get(kind) != tensor.dtype or len(shape) != len(tensor.axes):
        return 0
    if any((n != 1) if a == BATCH else (n < 1) if a == TIME else (n != a) for a, n in zip(tensor.axes, shape, strict=True)):
        return 0
    return 1 if tensor.time_axis is None else shape[tensor.time_axis]


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


def _read(tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> Array:
    name, kind = tensor.name, tensor.datatype
    if raw is not None:
        if tensor.HasField("contents"):
            raise InvalidInput("TWO_CONTENTS", f"input {name!r} has both raw and typed contents; send one of them", tensor=name)
        return read(name, kind, tensor.shape, raw)
    dims, dtype, count = _form(name, kind, tensor.shape)
    if kind not in _TYPED:
        raise InvalidInput("RAW_ONLY", f"input {name!r}: {kind} travels in raw_input_contents only", tensor=name)
    values = getattr(tensor.contents, _TYPED[kind])
    if len(values) != count:
        message = f"input {name!r}: shape {dims} takes {count} values in {_TYPED[kind]}, got {len(values)}"
        raise InvalidInput("WRONG_SIZE", message, tensor=name, expected=count, got=len(values))
    try:
        return np.array(values, dtype).reshape(dims)
    except OverflowError:
        raise InvalidInput("OUT_OF_RANGE", f"input {name!r}: a value does not fit {kind}", tensor=name, expected=kind) from None


def _form(name: str, kind: str, shape: Sequence[int]) -> tuple[list[int], np.dtype[Any], int]:
    """A tensor's lengths, numpy type and count of values."""
    dims = list(shape)
    if kind not in DATATYPES:
        allowed = listed(DATATYPES)
        message = f"input {name!r}: datatype {kind!r}; allowed are {allowed}"
        raise InvalidInput("WRONG_DTYPE", message, tensor=name, expected=allowed, got=kind)
    if dims and min(dims) < 0:
        raise InvalidInput("WRONG_SHAPE", f"input {name!r}: shape {dims} has a negative length", tensor=name, got=dims)
    return dims, _NUMPY[kind], math.prod(dims)


def write_outputs(response: pb.ModelInferResponse, outputs: Iterable[tuple[Tensor, Array]]) -> None:
    """Add outputs to a response, raw."""
    for tensor, array in outputs:
        response.outputs.add(name=tensor.name, datatype=_NAMES[tensor.dtype], shape=array.shape)
        response.raw_output_contents.append(array.tobytes())
