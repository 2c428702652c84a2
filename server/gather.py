"""A tiny ONNX model, written by hand: it picks rows out of arrays, and is all that moves rows of state on a device.

For each array: `data`I [cells, width], `at`G [count] → `out`I [count, width], one Gather along the first axis. Arrays that are
picked from by the same places share `at`G. Nothing here needs the onnx package, which what is served does without: a protobuf
message is its fields end to end, each a key, maybe a length, and the value (https://protobuf.dev/programming-guides/encoding);
field numbers are those of onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

IR, OPSET = 8, 13  # what onnxruntime has read since 1.10
ELEMENTS = {
    "float32": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "bool": 9, "float16": 10, "float64": 11,
    "uint32": 12, "uint64": 13,
}  # fmt: skip
"""TensorProto.DataType of the dtypes that a state may have."""


def model(arrays: Sequence[tuple[str, int]]) -> bytes:
    """The model's bytes. For each array its dtype's name, and the number of the places it is picked by. Raises KeyError for a dtype
    that no state has."""
    groups = sorted({group for _, group in arrays})
    inputs = [_value(f"data{i}", ELEMENTS[dtype], ("cells", f"width{i}")) for i, (dtype, _) in enumerate(arrays)]
    inputs += [_value(f"at{group}", ELEMENTS["int64"], (f"count{group}",)) for group in groups]
    outputs = [_value(f"out{i}", ELEMENTS[dtype], (f"count{group}", f"width{i}")) for i, (dtype, group) in enumerate(arrays)]
    nodes = [
        b"".join((_text(1, f"data{i}"), _text(1, f"at{group}"), _text(2, f"out{i}"), _text(3, f"pick{i}"), _text(4, "Gather")))
        for i, (_, group) in enumerate(arrays)
    ]
    graph = b"".join([*(_field(1, node) for node in nodes), _text(2, "gather"), *_fields(11, inputs), *_fields(12, outputs)])
    return b"".join((_number(1, IR), _text(2, "seqserve"), _field(7, graph), _field(8, _number(2, OPSET))))


def _value(name: str, element: int, axes: Iterable[str]) -> bytes:
    """A ValueInfoProto: a tensor whose axes have names and no sizes."""
    shape = b"".join(_field(1, _text(2, axis)) for axis in axes)
    return _text(1, name) + _field(2, _field(1, _number(1, element) + _field(2, shape)))


def _fields(number: int, values: Iterable[bytes]) -> list[bytes]:
    return [_field(number, value) for value in values]


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _text(number: int, value: str) -> bytes:
    return _field(number, value.encode())


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    parts.append(value)
    return bytes(parts)
