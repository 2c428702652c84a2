"""Dynamic int8: recurrent and matrix nodes that scale their inputs by what is in the round.

The quantiser is part of onnxruntime's package, and this file the only one here that imports it: it rewrites a file and runs
nothing (what runs graphs is server/graph.py, alone). It must not know bundles.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import tempfile
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from export import precision
from export.precision import NothingToChange

NODES = ("LSTM", "MatMul")
"""What is computed in int8. There is no dynamic form of GRU and RNN; of Gemm only by way of MatMul."""


def int8_dynamic(model: onnx.ModelProto) -> onnx.ModelProto:
    """The file with LSTM and matrix nodes in int8 and its other large weights kept as int8. Raises NothingToChange
    where no node can be."""
    _untie(model)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "quantised.onnx"
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)  # its advice to fold constants first, which is done
        try:
            quantize_dynamic(model, file, op_types_to_quantize=list(NODES), per_channel=True, weight_type=QuantType.QInt8)
        finally:
            root.setLevel(level)
        made = onnx.load(file)
    if not any(n.op_type in ("DynamicQuantizeLSTM", "MatMulInteger", "DynamicQuantizeMatMul") for n in made.graph.node):
        raise NothingToChange(f"it has no {' or '.join(NODES)} node with constant weights to compute in int8: use int8-weights")
    with contextlib.suppress(NothingToChange):  # where all large weights belong to nodes that are in int8 already
        precision.int8_weights(made)
    return made


def _untie(model: onnx.ModelProto) -> None:
    """Give each Gemm a right side of its own: the quantiser (onnxruntime 1.31) transposes it under its old name, and an
    embedding tied to an output layer would look its words up in the transposed table."""
    constants = {t.name: t for t in model.graph.initializer}
    users = collections.Counter(name for node in model.graph.node for name in node.input)
    for at, node in enumerate(n for n in model.graph.node if n.op_type == "Gemm"):
        if node.input[1] in constants and users[node.input[1]] > 1:
            own = onnx.TensorProto()
            own.CopyFrom(constants[node.input[1]])
            own.name = f"{own.name}_of_gemm_{at}"
            model.graph.initializer.append(own)
            node.input[1] = own.name
