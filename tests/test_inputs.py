"""Wrong tensors are refused by name, with what was expected and what was got."""

from __future__ import annotations

import numpy as np
import pytest

from contract.bundle import Graph, Tensor
from server.errors import InvalidInput
from server.inputs import Sizes, check

GRAPH = Graph(
    "g.onnx",
    (
        Tensor("tokens", "int64", ("batch", "time"), low=0, high=9),
        Tensor("x", "float32", ("batch", "time", 3)),
        Tensor("side", "float32", ("source", "batch"), finite=False),
    ),
    (Tensor("y", "float32", ("batch",)),),
    max_time=6,
)


def good(**other: object) -> dict[str, np.ndarray]:
    inputs = {"tokens": np.ones((2, 4), np.int64), "x": np.zeros((2, 4, 3), np.float32), "side": np.full((5, 2), np.nan, np.float32)}
    return {k: v for k, v in {**inputs, **other}.items() if v is not None}  # type: ignore[misc]


def test_sizes_are_what_the_inputs_agree_on() -> None:
    """Rows, steps and other named lengths come from the axes' names, wherever they stand."""
    assert check(GRAPH, good(), 8) == Sizes(2, 4, (("source", 5),))


@pytest.mark.parametrize(
    ("change", "reason", "says"),
    [
        ({"x": None}, "MISSING_INPUT", "'x' is missing"),
        ({"z": np.zeros(1)}, "UNKNOWN_INPUT", "'z' is not one of the model's: tokens, x, side"),
        ({"tokens": np.ones((2, 4), np.int32)}, "WRONG_DTYPE", "expected int64 [batch, time], got int32 [2, 4]"),
        ({"tokens": np.ones(4, np.int64)}, "WRONG_RANK", "got int64 [4]"),
        ({"x": np.zeros((2, 4, 2), np.float32)}, "WRONG_SHAPE", "axis 3 of 3 must be 3, got"),
        ({"x": np.zeros((2, 5, 3), np.float32)}, "WRONG_SHAPE", "axis 'time' must be 4 as in 'tokens'"),
        ({"tokens": np.full((2, 4), 10)}, "OUT_OF_RANGE", "values 10..10; allowed are 0..9"),
        ({"tokens": np.full((2, 4), -1)}, "OUT_OF_RANGE", "allowed are 0..9"),
        ({"x": np.full((2, 4, 3), np.nan, np.float32)}, "NOT_FINITE", "'x' has NaN or infinity"),
        ({"x": np.full((2, 4, 3), np.inf, np.float32)}, "NOT_FINITE", "'x' has NaN or infinity"),
    ],
)
def test_refusals(change: dict[str, object], reason: str, says: str) -> None:
    """Each fault has a reason for programs and a sentence for people."""
    with pytest.raises(InvalidInput) as caught:
        check(GRAPH, good(**change), 8)
    assert caught.value.reason == reason
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("rows", "steps", "reason"), [(0, 4, "BAD_ROWS"), (9, 4, "BAD_ROWS"), (2, 0, "EMPTY_SEQUENCE"), (2, 7, "TOO_LONG")]
)
def test_limits(rows: int, steps: int, reason: str) -> None:
    """No rows, too many, no steps (onnxruntime's LSTM leaves its state uninitialised then) or too many are refused."""
    inputs = {
        "tokens": np.ones((rows, steps), np.int64), "x": np.zeros((rows, steps, 3), np.float32), "side": np.zeros((1, rows), np.float32)
    }  # fmt: skip
    with pytest.raises(InvalidInput) as caught:
        check(GRAPH, inputs, 8)
    assert caught.value.reason == reason
