"""JSON values ↔ the raw bytes of the Open Inference Protocol's tensors. Knows no HTTP and no messages."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqserve import tensors
from web import bodies, problems
from web.problems import Problem

BYTES = tensors.BYTES
MOST_AXES = 64  # numpy's; without a bound the product of a long shape would have millions of digits


def check_shape(name: str, shape: Sequence[int]) -> None:
    """Raises Problem for a shape that no array has, or that can't travel."""
    if len(shape) > MOST_AXES:
        raise _bad("WRONG_RANK", f"input {name!r}: a shape of {len(shape)} axes; at most {MOST_AXES} can be read")
    if any(not 0 <= n < 2**63 for n in shape):
        raise _bad("WRONG_SHAPE", f"input {name!r}: shape {list(shape)} has a length that is negative or beyond 64 bits")


def packed(name: str, datatype: str, shape: Sequence[int], data: Sequence[Any]) -> bytes:
    """The bytes of a tensor whose values came as JSON, nested or flat, row-major. Raises Problem where they are not of that type
    or number."""
    check_shape(name, shape)
    count = math.prod(shape)
    if datatype == BYTES:
        return _texts(name, shape, count, list(_flat(data)))
    dtype = tensors.DATATYPES.get(datatype)
    if dtype is None:
        known = ", ".join((*tensors.DATATYPES, BYTES))
        raise _bad("WRONG_DTYPE", f"input {name!r}: datatype {datatype[:40]!r}; in JSON {known} travel, others as binary data")
    try:
        array = np.asarray(data)
    except (ValueError, OverflowError):
        raise _bad("WRONG_SHAPE", f"input {name!r}: its data is nested unevenly") from None
    if array.size != count:
        raise _wrong_count(name, datatype, shape, count, array.size)
    if not count:
        return b""
    if array.dtype.kind not in _KINDS[dtype.kind]:
        raise _bad("WRONG_DTYPE", f"input {name!r}: its data is not {_SAID[dtype.kind]}, as {datatype} takes")
    with np.errstate(over="ignore"):
        made = array.astype(dtype)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype.str)
        out = bool(int(array.min()) < int(limits.min) or int(array.max()) > int(limits.max))
    else:
        out = dtype.kind == "f" and not bool(np.isfinite(made).all())
    if out:
        raise _bad("OUT_OF_RANGE", f"input {name!r}: a value does not fit {datatype}")
    return made.tobytes()


_KINDS = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}
_SAID = {"b": "true and false", "i": "whole numbers", "u": "whole numbers", "f": "numbers"}


def _flat(data: Sequence[Any]) -> Iterator[Any]:
    """What is in nested lists, in order; however deeply nested."""
    levels = [iter(data)]
    while levels:
        for value in levels[-1]:
            if isinstance(value, list):
                levels.append(iter(value))
                break
            yield value
        else:
            levels.pop()


def _texts(name: str, shape: Sequence[int], count: int, texts: list[Any]) -> bytes:
    if len(texts) != count:
        raise _wrong_count(name, BYTES, shape, count, len(texts))
    parts: list[bytes] = []
    for text in texts:
        if not isinstance(text, str):
            raise _bad("WRONG_DTYPE", f"input {name!r}: in JSON, BYTES are texts; others travel as binary data")
        encoded = text.encode()
        parts += (len(encoded).to_bytes(4, "little"), encoded)
    return b"".join(parts)


def listed(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Any:
    """An output's values for JSON, flat. Raises Problem for what JSON can't say, ServerError where the reply makes no sense."""
    if datatype not in tensors.DATATYPES and datatype != BYTES:
        raise Problem(406, "NOT_IN_JSON", f"output {name!r} is {datatype}, which has no JSON: ask for binary_data")
    array: NDArray[Any] = tensors.unpack(name, datatype, shape, raw)
    if datatype == BYTES:
        try:
            return [value.decode() for value in array.flat]
        except UnicodeDecodeError:
            raise Problem(406, "NOT_IN_JSON", f"output {name!r} has bytes that are no UTF-8: ask for binary_data") from None
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Problem(406, "NOT_IN_JSON", f"output {name!r} has values that are no finite numbers: ask for binary_data")
    return bodies.numbers(array.ravel())


def _wrong_count(name: str, datatype: str, shape: Sequence[int], expected: int, got: int) -> Problem:
    return _bad("WRONG_SIZE", f"input {name!r}: {datatype} {list(shape)} takes {expected} values, got {got}")


def _bad(reason: str, detail: str) -> Problem:
    return problems.bad(reason, detail)
