"""Arrays ↔ the raw bytes of the Open Inference Protocol. `pack` and `unpack` are inverses. Knows no messages.

Raw contents are row-major, little-endian and without gaps; a BYTES tensor is a length (4 bytes, little-endian) before
each element.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqserve import errors
from seqserve.results import Array

BYTES = "BYTES"
DATATYPES: Mapping[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"UINT{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
}
_NAMES: Mapping[tuple[str, int], str] = {(dtype.kind, dtype.itemsize): name for name, dtype in DATATYPES.items()}


def pack(name: str, values: ArrayLike) -> tuple[str, tuple[int, ...], bytes]:
    """The datatype, shape and raw contents of an array.

    Arrays of str, bytes and objects (each one of the two) travel as BYTES. Raises InvalidInput, naming the tensor,
    for what the protocol has no datatype for.
    """
    try:
        array = np.asarray(values)
    except ValueError as e:
        raise errors.invalid(f"input {name!r} is no array: {e}") from None
    if array.dtype.kind in "OSU":
        return BYTES, array.shape, b"".join(_prefixed(name, array))
    datatype = _NAMES.get((array.dtype.kind, array.dtype.itemsize))
    if datatype is None:
        raise errors.invalid(f"input {name!r} has dtype {array.dtype}: convert it to one of {', '.join(DATATYPES)} or {BYTES}")
    return datatype, array.shape, np.asarray(array, DATATYPES[datatype]).tobytes()


def unpack(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Array:
    """The array of a datatype, shape and raw contents: a read-only view of `raw`, or bytes objects for BYTES.

    Raises ServerError where the three do not agree.
    """
    try:
        if datatype == BYTES:
            return objects(list(_elements(raw))).reshape(tuple(shape))
        return np.frombuffer(raw, DATATYPES[datatype]).reshape(tuple(shape))
    except KeyError:
        raise errors.bad_reply(f"output {name!r} has the unknown datatype {datatype!r}") from None
    except (ValueError, struct.error):
        fault = f"output {name!r}: {len(raw)} bytes are not {datatype} of shape {list(shape)}"
        raise errors.bad_reply(fault) from None


def objects(elements: Sequence[bytes]) -> NDArray[np.object_]:
    """A flat object array; numpy's own choice, dtype S, would drop trailing zero bytes."""
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


def _prefixed(name: str, array: Array) -> Iterator[bytes]:
    for element in array.flat:
        match element:
            case str():
                try:
                    encoded = element.encode()
                except UnicodeEncodeError as e:
                    raise errors.invalid(f"input {name!r} has text that is not Unicode: {e}") from None
            case bytes():
                encoded = element
            case _:
                raise errors.invalid(f"input {name!r} has an element of type {type(element).__name__}: only str and bytes travel")
        yield struct.pack("<I", len(encoded))
        yield encoded


def _elements(raw: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(raw):
        (length,) = struct.unpack_from("<I", raw, at)
        at += 4 + length
        if at > len(raw):
            raise ValueError("an element is cut off")
        yield raw[at - length : at]
