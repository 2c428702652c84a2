"""The models that `make bench` serves, made by onnx.helper as any user's ONNX files: no contract, names as exporters write them.

It knows ONNX and sizes; it must not know servers or clients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import helper, numpy_helper

from tests.models import FLOAT, INT64, _ints, _save, _value, _weights

VOCABULARY, EMBEDDING, HIDDEN, WIDTH = 20_000, 128, 256, 16
Array = np.ndarray[Any, Any]


def model_a(file: Path) -> None:
    """tokens int64 [b, t], h0, c0 [1, b, 256] → logits [b, 2] of the last step, hn, cn."""
    file.parent.mkdir(parents=True, exist_ok=True)
    h = HIDDEN
    initial = _weights(11, w=(1, 4 * h, EMBEDDING), r=(1, 4 * h, h), b=(1, 8 * h), out=(h, 2), bias=(2,))
    table = np.random.default_rng(12).normal(size=(VOCABULARY, EMBEDDING)).astype(np.float32)
    initial += [numpy_helper.from_array(table, "table"), *_ints(zero=[0])]
    nodes = [
        helper.make_node("Transpose", ["tokens"], ["turned"], perm=[1, 0]),  # tokens are smaller to turn than embeddings
        helper.make_node("Gather", ["table", "turned"], ["x"]),
        helper.make_node("LSTM", ["x", "w", "r", "b", "", "h0", "c0"], ["", "hn", "cn"], hidden_size=h),
        helper.make_node("Squeeze", ["hn", "zero"], ["last"]),
        helper.make_node("Gemm", ["last", "out", "bias"], ["logits"]),
    ]
    inputs = [_value("tokens", INT64, "b", "t"), *(_value(n, FLOAT, 1, "b", h) for n in ("h0", "c0"))]
    outputs = [_value("logits", FLOAT, "b", 2), *(_value(n, FLOAT, 1, "b", h) for n in ("hn", "cn"))]
    _save(file, nodes, inputs, outputs, initial)


def model_b(file: Path) -> None:
    """x float32 [b, 1, 16], h0, c0 [2, b, 256] → y [b, 1, 16], hn, cn: one step a call through two layers."""
    file.parent.mkdir(parents=True, exist_ok=True)
    h = HIDDEN
    initial = _weights(
        13, w0=(1, 4 * h, WIDTH), r0=(1, 4 * h, h), b0=(1, 8 * h), w1=(1, 4 * h, h), r1=(1, 4 * h, h), b1=(1, 8 * h), out=(h, WIDTH),
        bias=(WIDTH,),
    )  # fmt: skip
    initial += _ints(one=[1])
    nodes = [
        helper.make_node("Split", ["h0"], ["h_0", "h_1"], axis=0, num_outputs=2),
        helper.make_node("Split", ["c0"], ["c_0", "c_1"], axis=0, num_outputs=2),
        helper.make_node("Transpose", ["x"], ["x0"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["x0", "w0", "r0", "b0", "", "h_0", "c_0"], ["s0", "h_0n", "c_0n"], hidden_size=h),
        helper.make_node("Squeeze", ["s0", "one"], ["x1"]),
        helper.make_node("LSTM", ["x1", "w1", "r1", "b1", "", "h_1", "c_1"], ["s1", "h_1n", "c_1n"], hidden_size=h),
        helper.make_node("Squeeze", ["s1", "one"], ["x2"]),
        helper.make_node("Transpose", ["x2"], ["x2b"], perm=[1, 0, 2]),
        helper.make_node("MatMul", ["x2b", "out"], ["lin"]),
        helper.make_node("Add", ["lin", "bias"], ["y"]),
        helper.make_node("Concat", ["h_0n", "h_1n"], ["hn"], axis=0),
        helper.make_node("Concat", ["c_0n", "c_1n"], ["cn"], axis=0),
    ]
    inputs = [_value("x", FLOAT, "b", 1, WIDTH), *(_value(n, FLOAT, 2, "b", h) for n in ("h0", "c0"))]
    outputs = [_value("y", FLOAT, "b", 1, WIDTH), *(_value(n, FLOAT, 2, "b", h) for n in ("hn", "cn"))]
    _save(file, nodes, inputs, outputs, initial)
