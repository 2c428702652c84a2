"""PyTorch → ONNX: the only caller of torch.onnx.

It knows how a contract's axes become dynamic shapes, and what must not stay in a file. It must not know any model.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from contract.bundle import TIME, Graph
from export import draw

OPSET = 20


def write(graph: Graph, module: nn.Module, file: Path) -> None:
    """Export `module` as the contract names its tensors, weights inside; nothing of the machine is left in the file.

    `module.forward` takes inputs, then states, and returns a tuple of outputs, then next states.
    """
    random = np.random.default_rng(0)
    # The tracer takes a length that equals another one, or a layer's width, for the same thing, and fixes it without a word;
    # the server's runner would refuse the file.
    sizes = draw.telling_sizes(graph, {n for p in (*module.parameters(), *module.buffers()) for n in p.shape})
    rows = [draw.row(graph, size, random) | draw.fresh(graph) for size in sizes]
    draw.constants_alike(graph, rows)
    feeds = draw.stack(graph, rows, [sizes[0].time] * len(rows))
    tensors = [(t.name, t.axes) for t in graph.inputs] + [(s.input, s.axes) for s in graph.states]
    dims: dict[str, Any] = {}
    shapes = tuple(
        {
            place: dims.setdefault(axis, torch.export.Dim(re.sub(r"\W", "_", axis)))
            for place, axis in enumerate(axes)
            if isinstance(axis, str) and not (axis == TIME and graph.max_time == 1)
        }
        for _, axes in tensors
    )
    # For a dynamic time axis torch.onnx swaps in other kernels of these while it traces, but torch 2.13 goes on with the
    # ones it chose first in this process: a second export would find time fixed. (torch.export._patches)
    for recurrent in (torch.ops.aten.lstm.input, torch.ops.aten.gru.input):
        recurrent._dispatch_cache.clear()
    with warnings.catch_warnings(), _quiet(), torch.no_grad():
        warnings.simplefilter("ignore")  # the exporter's advice on its own insides
        program = torch.onnx.export(
            module.eval(),
            tuple(torch.from_numpy(feeds[name]) for name, _ in tensors),
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=[name for name, _ in tensors],
            output_names=[t.name for t in graph.outputs] + [s.output for s in graph.states],
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None  # dynamo=True always returns one
    model = program.model_proto
    bare(model)
    _name_axes(graph, model)
    onnx.checker.check_model(model)
    file.write_bytes(model.SerializeToString())


def bare(model: onnx.ModelProto) -> None:
    """Drop notes that the exporter leaves: stack traces with paths, module names, doc strings. In place."""
    model.doc_string = ""
    del model.metadata_props[:]
    _bare_graph(model.graph)
    for function in model.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        _bare_nodes(function.node)


def _name_axes(graph: Graph, model: onnx.ModelProto) -> None:
    """Write the contract's axes into the outputs: the exporter notes an LSTM's time axis as the example's length, though
    the node itself takes any. Whether every length really runs is the proof's business."""
    promised = {t.name: t.axes for t in graph.outputs} | {s.output: s.axes for s in graph.states}
    for output in model.graph.output:
        dims = output.type.tensor_type.shape.dim
        for dim, axis in zip(dims, promised[output.name], strict=True):
            if isinstance(axis, str):
                dim.dim_param = axis


def _bare_graph(graph: onnx.GraphProto) -> None:
    graph.doc_string = ""
    del graph.metadata_props[:]
    del graph.value_info[:]  # shapes in between: onnxruntime infers its own
    for value in (*graph.input, *graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    for weights in graph.initializer:
        weights.doc_string = ""
        del weights.metadata_props[:]
    _bare_nodes(graph.node)


def _bare_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        node.doc_string = ""
        del node.metadata_props[:]
        for attribute in node.attribute:
            attribute.doc_string = ""
            if attribute.type == onnx.AttributeProto.GRAPH:
                _bare_graph(attribute.g)


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter prints its progress; what fails is an exception all the same."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
