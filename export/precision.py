"""How the numbers of an ONNX file are kept and computed: the precisions a bundle can be had in.

    float32            as it was trained
    float16-weights    weights lie in the file as float16 (bfloat16-weights: bfloat16), and are float32 again once it is loaded
    int8-weights       the same with int8, a scale for each output channel
    float16            recurrent and matrix nodes compute in float16, all else in float32: for GPUs
    int8-dynamic       recurrent and matrix nodes compute in int8, scaled by what is in the round: for one caller on a CPU

Weights alone cost nothing at run time: what restores them hangs on constants only, and onnxruntime folds it when it loads
the file. Inputs, outputs and states are float32 in every precision, so the contract of a bundle stays as it is, and a state
carried from round to round loses nothing on the way.

It knows ONNX files as data and numbers; it must not know bundles, torch or onnxruntime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxscript.optimizer
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]

SMALLEST = 1024
"""Elements of a tensor worth changing: biases and scales are thousandths of a file, and the numbers that err the most."""

TABLE = 65_536
"""From so many elements on a vector is no bias but a table that is looked up, and counts as weights."""

LARGEST_FLOAT16 = 65504.0
FLOATING: Mapping[str, Sequence[int]] = {
    "LSTM": (0, 1, 2, 3, 5, 6, 7), "GRU": (0, 1, 2, 3, 5), "RNN": (0, 1, 2, 3, 5),
    "Gemm": (0, 1, 2), "MatMul": (0, 1), "Conv": (0, 1, 2), "Gather": (0,),
}  # fmt: skip
"""The nodes that float16 is worth it for, and which of their inputs are floats; Gather where it looks up constants."""


class CantConvert(ValueError):
    """A file that can't be had in the precision that was asked for; the message says why and what to do instead."""


class NothingToChange(CantConvert):
    """A file in which the precision would change nothing; in a bundle of several graphs it stays as it is."""


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The file with what hangs on constants alone computed: an exporter leaves a large LSTM's gates to be reordered at load,
    but what changes weights must find them where the node takes them."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    onnxscript.optimizer.fold_constants(made, onnx_shape_inference=False, input_size_limit=1 << 40, output_size_limit=1 << 40)
    onnxscript.optimizer.remove_unused_nodes(made)
    del made.graph.value_info[:]  # of constants too, whose shapes a quantiser may change
    return made


def float16_weights(model: onnx.ModelProto) -> Mapping[str, Array]:
    """Keep large weights as float16, in place, and return what they are when restored, float32 by name.

    Raises CantConvert where one is beyond float16's range, NothingToChange where none is large.
    """
    return _keep_weights(model, _as_float16)


def bfloat16_weights(model: onnx.ModelProto) -> Mapping[str, Array]:
    """The same as bfloat16, which has every magnitude that float32 has, but three digits only."""
    return _keep_weights(model, _as_bfloat16)


def int8_weights(model: onnx.ModelProto) -> Mapping[str, Array]:
    """The same as int8, with a float32 scale for each output channel.

    Written as Cast and Mul: onnxruntime folds these into the float32 weights when it loads the file, but never a
    DequantizeLinear, which would run anew in every round.
    """
    return _keep_weights(model, _as_int8)


def float16_compute(model: onnx.ModelProto) -> None:
    """Let recurrent and matrix nodes compute in float16 and keep the weights that way, in place; casts around each node keep
    all else float32, sums over time above all. Raises NothingToChange where there is no such node, CantConvert."""
    floats = _floats(model)
    weights = {t.name: t for t in _float_weights(model)}
    halves: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    changed = 0
    for node in model.graph.node:
        slots = [i for i in FLOATING.get(node.op_type, ()) if i < len(node.input) and node.input[i]]
        fits = all(node.input[i] in floats for i in slots) and (node.op_type != "Gather" or node.input[0] in weights)
        if not slots or not fits:
            nodes.append(node)
            continue
        changed += 1
        for i in slots:
            name = node.input[i]
            if name not in halves:
                halves[name] = f"{name}_f16"
                if name in weights:
                    half = _half(name, numpy_helper.to_array(weights[name]))
                    model.graph.initializer.append(numpy_helper.from_array(half, halves[name]))
                else:
                    nodes.append(helper.make_node("Cast", [name], [halves[name]], f"{name}_to_f16", to=TensorProto.FLOAT16))
            node.input[i] = halves[name]
        outputs = [o for o in node.output if o]
        node.output[:] = [f"{o}_of_f16" if o else "" for o in node.output]
        nodes.append(node)
        nodes += [helper.make_node("Cast", [f"{o}_of_f16"], [o], f"{o}_to_f32", to=TensorProto.FLOAT) for o in outputs]
    if not changed:
        raise NothingToChange(f"it has no {', '.join(FLOATING)} node with float32 inputs: float16 would change nothing")
    _replace_nodes(model, nodes)
    _drop_unused(model)


WEIGHTS: Mapping[str, Callable[[onnx.ModelProto], Mapping[str, Array]]] = {
    "float16-weights": float16_weights, "bfloat16-weights": bfloat16_weights, "int8-weights": int8_weights,
}  # fmt: skip
"""Precisions that change what weights are and nothing else."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A weight as it lies in the file."""

    constants: Sequence[TensorProto]
    restore: Sequence[onnx.NodeProto]  # makes float32 of them, under the weight's own name
    restored: Array  # what that will be


def _keep_weights(model: onnx.ModelProto, keep: Callable[[str, Array, int], Kept]) -> dict[str, Array]:
    found = list(_float_weights(model, SMALLEST))
    if not found:
        raise NothingToChange(f"it has no float32 weights of {SMALLEST} elements or more: there is nothing to make smaller")
    restore: list[onnx.NodeProto] = []
    restored: dict[str, Array] = {}
    for tensor in found:
        weights = numpy_helper.to_array(tensor)
        if not np.isfinite(weights).all():
            raise CantConvert(f"the weights {tensor.name!r} are not all finite: keep it in float32")
        kept = keep(tensor.name, weights, _summed_axis(model, tensor))
        model.graph.initializer.remove(tensor)
        model.graph.initializer.extend(kept.constants)
        restore += kept.restore
        restored[tensor.name] = kept.restored
    _replace_nodes(model, [*restore, *model.graph.node])
    return restored


def _as_float16(name: str, weights: Array, _: int) -> Kept:
    half = _half(name, weights)
    constant = numpy_helper.from_array(half, f"{name}_kept")
    return Kept([constant], [_restore(constant.name, name)], half.astype(np.float32))


def _as_bfloat16(name: str, weights: Array, _: int) -> Kept:
    bits = np.ascontiguousarray(weights, np.float32).view(np.uint32)
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to the nearest, ties to even
    constant = helper.make_tensor(f"{name}_kept", TensorProto.BFLOAT16, weights.shape, upper.astype("<u2").tobytes(), raw=True)
    return Kept([constant], [_restore(constant.name, name)], (upper << 16).view(np.float32))


def _as_int8(name: str, weights: Array, summed: int) -> Kept:
    """`summed`: the axis that a product sums over; each place on the others is a channel with a scale of its own; a table
    of single numbers has one for all."""
    scale = np.abs(weights).max(axis=summed if weights.shape[summed] > 1 else None, keepdims=True) / np.float32(127)
    scale[scale == 0] = 1
    whole = np.rint(weights / scale).astype(np.int8)
    constants = [numpy_helper.from_array(whole, f"{name}_kept"), numpy_helper.from_array(scale, f"{name}_kept_scale")]
    restore = [
        _restore(constants[0].name, f"{name}_whole"),
        helper.make_node("Mul", [f"{name}_whole", constants[1].name], [name], f"{name}_scaled"),
    ]
    return Kept(constants, restore, whole.astype(np.float32) * scale)


def _restore(kept: str, name: str) -> onnx.NodeProto:
    return helper.make_node("Cast", [kept], [name], f"{name}_restored", to=TensorProto.FLOAT)


def _summed_axis(model: onnx.ModelProto, tensor: TensorProto) -> int:
    """The axis of a weight that products sum over: the last, but for the right side of a plain product the one before."""
    for node in model.graph.node:
        transposed = node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute)
        if tensor.name in node.input[1:2] and node.op_type in ("MatMul", "Gemm") and not transposed:
            return len(tensor.dims) - 2
    return len(tensor.dims) - 1


def _float_weights(model: onnx.ModelProto, smallest: int = 0) -> Iterator[TensorProto]:
    """The float32 constants that no caller can override; those of `smallest` elements or more in two dimensions at
    least, and tables."""
    inputs = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        size = math.prod(tensor.dims)
        small = size < smallest or (smallest and size < TABLE and sum(d > 1 for d in tensor.dims) < 2)
        if tensor.data_type == TensorProto.FLOAT and not small and tensor.name not in inputs:
            yield tensor


def _floats(model: onnx.ModelProto) -> set[str]:
    """Names of the values that are float32, as far as ONNX's own inference can tell."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = {v.name for v in (*graph.input, *graph.output, *graph.value_info) if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    return values | {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT}


def _half(name: str, weights: Array) -> Array:
    largest = float(np.abs(weights).max(initial=0))
    if not largest <= LARGEST_FLOAT16:
        raise CantConvert(f"the weights {name!r} reach {largest:.3g}, beyond float16's {LARGEST_FLOAT16:g}: use bfloat16-weights")
    return weights.astype(np.float16)


def _replace_nodes(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    kept = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]  # they may live in the very field that is emptied
    del model.graph.node[:]
    model.graph.node.extend(kept)


def _drop_unused(model: onnx.ModelProto) -> None:
    used = {name for node in model.graph.node for name in _taken(node)} | {value.name for value in model.graph.output}
    for tensor in [t for t in model.graph.initializer if t.name not in used]:
        model.graph.initializer.remove(tensor)


def _taken(node: onnx.NodeProto) -> Iterator[str]:
    yield from node.input
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            for inner in graph.node:
                yield from _taken(inner)
