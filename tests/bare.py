"""Bare ONNX files as users bring them: names and axes as other people's exporters write them, and no contract."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from tests.models import FLOAT, INT64, _ints, _save, _value, _weights


def voice(file: Path, batch: int | str = "b") -> None:
    """input [b, t], state [2, b, 16], sr → output [b, 1], stateN: a chunk of sound is read as frames of its own."""
    file.parent.mkdir(parents=True, exist_ok=True)
    hidden = 16
    initial = [
        *_weights(3, w=(1, 4 * hidden, 1), r=(1, 4 * hidden, hidden), b=(1, 8 * hidden), out=(hidden, 1)),
        *_ints(last=[2], one=[1], zero=[0]),
        onnx.numpy_helper.from_array(np.array(16000.0, np.float32), "usual"),
    ]
    nodes = [
        helper.make_node("Cast", ["sr"], ["rate"], to=FLOAT),
        helper.make_node("Div", ["rate", "usual"], ["scale"]),
        helper.make_node("Mul", ["input", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["scaled"], ["turned"], perm=[1, 0]),
        helper.make_node("Unsqueeze", ["turned", "last"], ["x"]),
        helper.make_node("Split", ["state"], ["h", "c"], axis=0, num_outputs=2),
        helper.make_node("LSTM", ["x", "w", "r", "b", "", "h", "c"], ["", "hn", "cn"], hidden_size=hidden),
        helper.make_node("Concat", ["hn", "cn"], ["stateN"], axis=0),
        helper.make_node("Squeeze", ["hn", "zero"], ["flat"]),
        helper.make_node("MatMul", ["flat", "out"], ["score"]),
        helper.make_node("Sigmoid", ["score"], ["output"]),
    ]
    inputs = [_value("input", FLOAT, batch, "t"), _value("state", FLOAT, 2, batch, hidden), _value("sr", INT64)]
    outputs = [_value("output", FLOAT, batch, 1), _value("stateN", FLOAT, 2, batch, hidden)]
    _save(file, nodes, inputs, outputs, initial)


def cell(file: Path) -> None:
    """x [b, 3], h_in [b, 4] → y [b, 4], h_out [b, 4]: one step a call, no time axis anywhere."""
    file.parent.mkdir(parents=True, exist_ok=True)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["h_in", "r"], ["b_"]),
        helper.make_node("Add", ["a", "b_"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["h_out"]),
        helper.make_node("Neg", ["h_out"], ["y"]),
    ]
    inputs = [_value("x", FLOAT, "n", 3), _value("h_in", FLOAT, "n", 4)]
    _save(file, nodes, inputs, [_value("y", FLOAT, "n", 4), _value("h_out", FLOAT, "n", 4)], _weights(4, w=(3, 4), r=(4, 4)))


def whole(file: Path, direction: str = "forward", ending: Sequence[str] = ()) -> None:
    """x [b, t, 3] → LSTM → GRU → Linear → y [b, t, 2]: exported with no thought of state.

    `ending` "mean" adds its mean over all steps, "last" the last step's."""
    file.parent.mkdir(parents=True, exist_ok=True)
    h, ways = 6, 2 if direction == "bidirectional" else 1
    initial = [
        *_weights(5, w1=(ways, 4 * h, 3), r1=(ways, 4 * h, h), b1=(ways, 8 * h), w2=(1, 3 * h, h * ways), r2=(1, 3 * h, h)),
        *_weights(6, b2=(1, 6 * h), out=(h, 2), bias=(2,)),
        *_ints(one=[1], form=[0, 0, -1], minus=[-1]),
        onnx.numpy_helper.from_array(np.array(-1, np.int64), "end"),
    ]
    nodes = [
        helper.make_node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["xt", "w1", "r1", "b1"], ["y1"], "rnn.lstm", hidden_size=h, direction=direction),
        helper.make_node("Transpose", ["y1"], ["y1t"], perm=[0, 2, 1, 3]),  # [t, b, ways, h]
        helper.make_node("Reshape", ["y1t", "form"], ["y1s"]),  # [t, b, ways * h]
        helper.make_node("GRU", ["y1s", "w2", "r2", "b2"], ["y2"], "rnn.gru", hidden_size=h, linear_before_reset=1),
        helper.make_node("Squeeze", ["y2", "one"], ["y2s"]),
        helper.make_node("Transpose", ["y2s"], ["yb"], perm=[1, 0, 2]),
        helper.make_node("MatMul", ["yb", "out"], ["lin"]),
        helper.make_node("Add", ["lin", "bias"], ["y"]),
    ]
    outputs = [_value("y", FLOAT, "b", "t", 2)]
    if "mean" in ending:
        nodes.append(helper.make_node("ReduceMean", ["y", "one"], ["mean"], "head.pool", keepdims=0))
        outputs.append(_value("mean", FLOAT, "b", 2))
    if "last" in ending:
        nodes.append(helper.make_node("Gather", ["y", "end"], ["last"], "head.last", axis=1))
        outputs.append(_value("last", FLOAT, "b", 2))
    _save(file, nodes, [_value("x", FLOAT, "b", "t", 3)], outputs, initial)


def pooled(file: Path) -> None:
    """x [b, t, 4], h [b, 4] → mean [b, 4] of h plus all steps, hn [b, 4]: a state, and yet not to be cut."""
    nodes = [
        helper.make_node("ReduceMean", ["x", "one"], ["average"], keepdims=0),
        helper.make_node("Add", ["average", "h"], ["mean"]),
        helper.make_node("Tanh", ["mean"], ["hn"]),
    ]
    inputs = [_value("x", FLOAT, "b", "t", 4), _value("h", FLOAT, "b", 4)]
    _save(file, nodes, inputs, [_value("mean", FLOAT, "b", 4), _value("hn", FLOAT, "b", 4)], _ints(one=[1]))


def rowless(file: Path) -> None:
    """x [3] → y [3]: nowhere is there a row."""
    file.parent.mkdir(parents=True, exist_ok=True)
    _save(file, [helper.make_node("Neg", ["x"], ["y"])], [_value("x", FLOAT, 3)], [_value("y", FLOAT, 3)], [])


def window(file: Path, size: int) -> None:
    """x [b, t], h [b, 4] → y [b, 4], hn [b, 4]: takes `size` samples at once and nothing else, though t is open."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "h"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["hn"]),
        helper.make_node("Neg", ["hn"], ["y"]),
    ]
    inputs = [_value("x", FLOAT, "b", "t"), _value("h", FLOAT, "b", 4)]
    _save(file, nodes, inputs, [_value("y", FLOAT, "b", 4), _value("hn", FLOAT, "b", 4)], _weights(8, w=(size, 4)))


def nameless(file: Path) -> None:
    """x [?, ?, 3] with steps first, h_in [1, ?, 4] → y [?, ?, 4], h_out [1, ?, 4]: an RNN of which no axis has a name."""
    nodes = [
        helper.make_node("RNN", ["x", "w", "r", "b", "", "h_in"], ["y4", "h_out"], hidden_size=4),
        helper.make_node("Squeeze", ["y4", "one"], ["y"]),
    ]
    inputs = [_value("x", FLOAT, None, None, 3), _value("h_in", FLOAT, 1, None, 4)]
    outputs = [_value("y", FLOAT, None, None, 4), _value("h_out", FLOAT, 1, None, 4)]
    _save(file, nodes, inputs, outputs, [*_weights(9, w=(1, 4, 3), r=(1, 4, 4), b=(1, 8)), *_ints(one=[1])])
