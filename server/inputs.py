"""Are these tensors what the contract asks for? Checked before anything is stacked, because one bad row fails a whole
round: an out-of-range token id is enough.

Pure: knows the contract and numpy; no gRPC, no clock, no engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from contract.bundle import BATCH, TIME, Graph, Tensor
from server.errors import InvalidInput, listed

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the inputs agree on: their rows, their time steps, and the lengths of other named axes."""

    rows: int
    steps: int
    named: tuple[tuple[str, int], ...] = ()


def check(graph: Graph, inputs: Mapping[str, Array], most_rows: int) -> Sizes:
    """Raise InvalidInput naming tensor, expected and got, or return the sizes that all inputs agree on."""
    expected = graph.expected
    for name in inputs:
        if name not in expected:
            raise InvalidInput(
                "UNKNOWN_INPUT", f"input {name!r} is not one of the model's: {listed(expected)}", tensor=name, expected=listed(expected)
            )
    sizes: dict[str, tuple[int, str]] = {}
    for name, tensor in expected.items():
        if name not in inputs:
            raise InvalidInput(
                "MISSING_INPUT", f"input {name!r} is missing; the model takes {listed(expected)}", tensor=name, expected=spell(tensor)
            )
        _check_form(tensor, inputs[name], sizes)
        check_values(tensor, inputs[name])
    rows = sizes.pop(BATCH, (1, ""))[0]
    steps, where = sizes.pop(TIME, (1, ""))
    most_rows = min(most_rows, graph.max_rows)
    if not 1 <= rows <= most_rows:
        raise InvalidInput("BAD_ROWS", f"{rows} rows in one request; allowed are 1 to {most_rows}", expected=f"1..{most_rows}", got=rows)
    if steps < 1:
        raise InvalidInput("EMPTY_SEQUENCE", f"input {where!r} has no time steps; send at least one", tensor=where, got=steps)
    if steps > graph.max_time:
        raise InvalidInput(
            "TOO_LONG", f"input {where!r} has {steps} time steps; at most {graph.max_time} are allowed", tensor=where,
            expected=f"1..{graph.max_time}", got=steps,
        )  # fmt: skip
    return Sizes(rows, steps, tuple(sorted((name, size) for name, (size, _) in sizes.items())))


def spell(tensor: Tensor) -> str:
    """A tensor's form for a message: `int64 [batch, time]`."""
    return f"{tensor.dtype} [{', '.join(map(str, tensor.axes))}]"


def _got(array: Array) -> str:
    return f"{array.dtype.name} {list(array.shape)}"


def _check_form(tensor: Tensor, array: Array, sizes: dict[str, tuple[int, str]]) -> None:
    name = tensor.name
    if array.dtype != tensor.numpy_dtype:
        message = f"input {name!r}: expected {spell(tensor)}, got {_got(array)}"
        raise InvalidInput("WRONG_DTYPE", message, tensor=name, expected=tensor.dtype, got=array.dtype.name)
    if array.ndim != len(tensor.axes):
        message = f"input {name!r}: expected {spell(tensor)}, got {_got(array)}"
        raise InvalidInput("WRONG_RANK", message, tensor=name, expected=len(tensor.axes), got=array.ndim)
    for place, (axis, size) in enumerate(zip(tensor.axes, array.shape, strict=True), 1):
        if isinstance(axis, int):
            which, wanted, because = f"{place} of {array.ndim}", axis, ""
        else:
            wanted, other = sizes.setdefault(axis, (size, name))
            which, because = axis, f" as in {other!r}"
        if size != wanted:
            said = repr(which) if because else which
            message = f"input {name!r}: axis {said} must be {wanted}{because}, got {_got(array)}; expected {spell(tensor)}"
            raise InvalidInput("WRONG_SHAPE", message, tensor=name, axis=which, expected=wanted, got=size)


def check_values(tensor: Tensor, array: Array) -> None:
    """Raise InvalidInput where an array has values that the contract forbids."""
    if not array.size:
        return  # an empty axis is refused by its size, with a better message
    if tensor.finite and array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InvalidInput("NOT_FINITE", f"input {tensor.name!r} has NaN or infinity; only finite numbers are allowed", tensor=tensor.name)
    if tensor.low is not None or tensor.high is not None:
        low, high = array.min(), array.max()
        if (tensor.low is not None and low < tensor.low) or (tensor.high is not None and high > tensor.high):
            allowed = f"{_number(tensor.low)}..{_number(tensor.high)}"
            raise InvalidInput(
                "OUT_OF_RANGE", f"input {tensor.name!r} has values {low}..{high}; allowed are {allowed}", tensor=tensor.name,
                expected=allowed, got=f"{low}..{high}",
            )  # fmt: skip


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}" if value != int(value) else str(int(value))
