"""Tiny ONNX models for tests, made by onnx.helper: the files a user might bring, with the contract that fits them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from contract import bundle as contract
from contract.bundle import Bundle, Graph, State, Tensor
from contract.text import of_letters

VOCABULARY = 50
FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
OPSET = [helper.make_opsetid("", 18)]


def _weights(seed: int, **shapes: tuple[int, ...]) -> list[onnx.TensorProto]:
    rng = np.random.default_rng(seed)
    return [numpy_helper.from_array((rng.normal(size=shape) * 0.3).astype(np.float32), name) for name, shape in shapes.items()]


def _ints(**values: Sequence[int]) -> list[onnx.TensorProto]:
    return [numpy_helper.from_array(np.array(v, np.int64), name) for name, v in values.items()]


def _save(file: Path, nodes: list[onnx.NodeProto], inputs: list[Any], outputs: list[Any], initial: list[onnx.TensorProto]) -> None:
    graph = helper.make_graph(nodes, file.stem, inputs, outputs, initial)
    onnx.save(helper.make_model(graph, opset_imports=OPSET, ir_version=9), file)


def _value(name: str, kind: int, *shape: int | str | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def reader(directory: Path, name: str = "reader", hidden: int = 8, seed: int = 0) -> Bundle:
    """tokens [batch, time] → Embedding → LSTM → scores of every step [batch, time, 2] and of the last [batch, 2]."""
    directory.mkdir(parents=True, exist_ok=True)
    initial = [
        *_weights(seed, table=(VOCABULARY, 6), w=(1, 4 * hidden, 6), r=(1, 4 * hidden, hidden), b=(1, 8 * hidden), out=(hidden, 2)),
        *_ints(one=[1], zero=[0]),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["x"]),
        helper.make_node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["xt", "w", "r", "b", "", "h", "c"], ["y", "h_next", "c_next"], hidden_size=hidden),
        helper.make_node("Squeeze", ["y", "one"], ["ys"]),
        helper.make_node("Transpose", ["ys"], ["yt"], perm=[1, 0, 2]),
        helper.make_node("MatMul", ["yt", "out"], ["scores"]),
        helper.make_node("Squeeze", ["h_next", "zero"], ["hs"]),
        helper.make_node("MatMul", ["hs", "out"], ["last"]),
    ]
    inputs = [_value("tokens", INT64, "b", "t"), _value("h", FLOAT, 1, "b", hidden), _value("c", FLOAT, 1, "b", hidden)]
    outputs = [
        _value("scores", FLOAT, "b", "t", 2), _value("last", FLOAT, "b", 2), _value("h_next", FLOAT, 1, "b", hidden),
        _value("c_next", FLOAT, 1, "b", hidden),
    ]  # fmt: skip
    _save(directory / "step.onnx", nodes, inputs, outputs, initial)
    graph = Graph(
        "step.onnx",
        (Tensor("tokens", "int64", ("batch", "time"), low=0, high=VOCABULARY - 1),),
        (Tensor("scores", "float32", ("batch", "time", 2)), Tensor("last", "float32", ("batch", 2))),
        (State("h", "h_next", "float32", (1, "batch", hidden)), State("c", "c_next", "float32", (1, "batch", hidden))),
        max_time=400,
    )
    return contract.save(Bundle(name, {"step": graph}, "step"), directory)


def both_ways(directory: Path, name: str = "both_ways", hidden: int = 5) -> Bundle:
    """x [batch, time, 3] → bidirectional LSTM → y [batch, time, 2 * hidden]: one-shot, it can't be cut."""
    directory.mkdir(parents=True, exist_ok=True)
    initial = [*_weights(1, w=(2, 4 * hidden, 3), r=(2, 4 * hidden, hidden), b=(2, 8 * hidden)), *_ints(form=[0, 0, 2 * hidden])]
    nodes = [
        helper.make_node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["xt", "w", "r", "b"], ["y4"], hidden_size=hidden, direction="bidirectional"),
        helper.make_node("Transpose", ["y4"], ["yb"], perm=[2, 0, 1, 3]),
        helper.make_node("Reshape", ["yb", "form"], ["y"]),
    ]
    _save(directory / "read.onnx", nodes, [_value("x", FLOAT, "b", "t", 3)], [_value("y", FLOAT, "b", "t", 2 * hidden)], initial)
    graph = Graph(
        "read.onnx", (Tensor("x", "float32", ("batch", "time", 3)),), (Tensor("y", "float32", ("batch", "time", 2 * hidden)),), cut=False
    )
    return contract.save(Bundle(name, {"read": graph}, "read"), directory)


def fragile(directory: Path, name: str = "fragile") -> Bundle:
    """A contract that forgets to say which ids are allowed: ids past the table fail a whole run."""
    bundle = reader(directory, name)
    step = bundle.graphs["step"]
    loose = Graph(step.file, (Tensor("tokens", "int64", ("batch", "time")),), step.outputs, step.states)
    return contract.save(Bundle(name, {"step": loose}, "step"), directory)


def two_layers(directory: Path, name: str = "two_layers", width: int = 16, hidden: int = 256) -> Bundle:
    """x [batch, time, 16] → two LSTM layers of 256 → y [batch, time, 16], both layers' states fed in and given back."""
    directory.mkdir(parents=True, exist_ok=True)
    initial = _weights(2, out=(hidden, width)) + _ints(one=[1])
    nodes = [helper.make_node("Transpose", ["x"], ["y0"], perm=[1, 0, 2])]
    states = []
    for layer, size in ((1, width), (2, hidden)):
        w, r, b = f"w{layer}", f"r{layer}", f"b{layer}"
        initial += _weights(2 + layer, **{w: (1, 4 * hidden, size), r: (1, 4 * hidden, hidden), b: (1, 8 * hidden)})
        states += [State(f"{kind}{layer}", f"{kind}{layer}_next", "float32", (1, "batch", hidden)) for kind in "hc"]
        carried = [f"y{layer}_4", f"h{layer}_next", f"c{layer}_next"]
        nodes += [
            helper.make_node("LSTM", [f"y{layer - 1}", w, r, b, "", f"h{layer}", f"c{layer}"], carried, hidden_size=hidden),
            helper.make_node("Squeeze", [f"y{layer}_4", "one"], [f"y{layer}"]),
        ]
    nodes += [helper.make_node("Transpose", ["y2"], ["y2b"], perm=[1, 0, 2]), helper.make_node("MatMul", ["y2b", "out"], ["y"])]
    inputs = [_value("x", FLOAT, "b", "t", width), *(_value(s.input, FLOAT, 1, "b", hidden) for s in states)]
    outputs = [_value("y", FLOAT, "b", "t", width), *(_value(s.output, FLOAT, 1, "b", hidden) for s in states)]
    _save(directory / "step.onnx", nodes, inputs, outputs, initial)
    x, y = (Tensor(name, "float32", ("batch", "time", width)) for name in "xy")
    return contract.save(Bundle(name, {"step": Graph("step.onnx", (x,), (y,), tuple(states))}, "step"), directory)


LETTERS = "\n .,abcdefgh"


def speaker(directory: Path, name: str = "speaker", hidden: int = 12, seed: int = 3) -> Bundle:
    """tokens [batch, time] → Embedding → LSTM → logits of the next of a few letters [batch, time, vocabulary]; task generate."""
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = of_letters([LETTERS])
    vocabulary.save(directory / "vocabulary.json")
    size = vocabulary.size
    weights = _weights(seed, table=(size, 6), w=(1, 4 * hidden, 6), r=(1, 4 * hidden, hidden), b=(1, 8 * hidden), out=(hidden, size))
    weights = [numpy_helper.from_array(numpy_helper.to_array(w) * 6, w.name) for w in weights]  # so that what was read counts
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["x"]),
        helper.make_node("Transpose", ["x"], ["xt"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["xt", "w", "r", "b", "", "h", "c"], ["y", "h_next", "c_next"], hidden_size=hidden),
        helper.make_node("Squeeze", ["y", "one"], ["ys"]),
        helper.make_node("Transpose", ["ys"], ["yt"], perm=[1, 0, 2]),
        helper.make_node("MatMul", ["yt", "out"], ["logits"]),
    ]
    states = tuple(State(n, f"{n}_next", "float32", (1, "batch", hidden)) for n in ("h", "c"))
    inputs = [_value("tokens", INT64, "b", "t"), *(_value(s.input, FLOAT, 1, "b", hidden) for s in states)]
    outputs = [_value("logits", FLOAT, "b", "t", size), *(_value(s.output, FLOAT, 1, "b", hidden) for s in states)]
    _save(directory / "step.onnx", nodes, inputs, outputs, weights + _ints(one=[1]))
    graph = Graph(
        "step.onnx", (Tensor("tokens", "int64", ("batch", "time"), low=0, high=size - 1),),
        (Tensor("logits", "float32", ("batch", "time", size)),), states, max_time=300,
    )  # fmt: skip
    task = {"kind": "generate", "vocabulary": "vocabulary", "start": 1, "end": 2, "never": [0, 1], "most": 400}
    return contract.save(Bundle(name, {"step": graph}, "step", task, {"vocabulary": "vocabulary.json"}), directory)


def library(root: Path) -> Mapping[str, Bundle]:
    """A directory of models, as a server is given."""
    return {
        "reader": reader(root / "reader" / "1"),
        "both_ways": both_ways(root / "both_ways" / "1"),
        "fragile": fragile(root / "fragile" / "1"),
    }
