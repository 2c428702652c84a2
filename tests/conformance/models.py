"""The models that conformance cases and the protocol's published client examples ask for, as ONNX files made by onnx.helper:
`python -m tests.conformance.models DIR` writes DIR/NAME/1/model.onnx.

Names, inputs and outputs are those of Triton's example repository; a sequence's START arrives there as an input, here it is a
state that is 0 in a sequence's first step. What ONNX can't be:

- simple_dyna_sequence, simple_string_dyna_sequence: their last answer has the sequence's own id added to it (control inputs
  END and CORRID), and a graph is never told either;
- repeat_int32: one request, many responses, timed; a graph answers once.

It knows ONNX; it must not know servers or clients.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

INT8, INT32, TEXT = TensorProto.INT8, TensorProto.INT32, TensorProto.STRING


def _save(
    directory: Path, name: str, nodes: Sequence[NodeProto], inputs: Sequence[ValueInfoProto], outputs: Sequence[ValueInfoProto]
) -> None:
    one = numpy_helper.from_array(np.array([1], np.int32), "one")
    used = {i for node in nodes for i in node.input}
    graph = helper.make_graph(list(nodes), name, list(inputs), list(outputs), [one] if "one" in used else [])
    file = directory / name / "1" / "model.onnx"
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), file)


def _value(name: str, kind: int, *shape: int | str) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _sums(directory: Path, name: str, kind: int) -> None:
    """INPUT0, INPUT1 [batch, 16] → their sum OUTPUT0 and difference OUTPUT1, in the same type, computed as int32."""
    nodes = [helper.make_node("Cast", [f"INPUT{i}"], [f"in{i}"], to=INT32) for i in (0, 1)]
    for operation, at in (("Add", 0), ("Sub", 1)):
        nodes.append(helper.make_node(operation, ["in0", "in1"], [f"out{at}"]))
        nodes.append(helper.make_node("Cast", [f"out{at}"], [f"OUTPUT{at}"], to=kind))
    ports = [[_value(f"{side}{i}", kind, "batch", 16) for i in (0, 1)] for side in ("INPUT", "OUTPUT")]
    _save(directory, name, nodes, *ports)


def _identity(directory: Path, name: str) -> None:
    """INPUT0 [batch, 16] texts → OUTPUT0, the same."""
    node = helper.make_node("Identity", ["INPUT0"], ["OUTPUT0"])
    _save(directory, name, [node], [_value("INPUT0", TEXT, "batch", 16)], [_value("OUTPUT0", TEXT, "batch", 16)])


def _starts(directory: Path, name: str) -> None:
    """INPUT [batch, 1] → OUTPUT: the same, and one more in a sequence's first step."""
    nodes = [
        helper.make_node("Sub", ["one", "begun_in"], ["first"]),
        helper.make_node("Add", ["INPUT", "first"], ["OUTPUT"]),
        helper.make_node("Max", ["begun_in", "one"], ["begun_out"]),
    ]
    ports = [[_value(data, INT32, "batch", 1), _value(state, INT32, "batch", 1)] for data, state in _ENDS]
    _save(directory, name, nodes, *ports)


_ENDS = (("INPUT", "begun_in"), ("OUTPUT", "begun_out"))


def _accumulate(directory: Path, name: str) -> None:
    """INPUT [batch, 1] → OUTPUT: the sum of all inputs of the sequence so far."""
    nodes = [helper.make_node("Add", ["INPUT", "sum_in"], ["OUTPUT"]), helper.make_node("Identity", ["OUTPUT"], ["sum_out"])]
    inputs = [_value("INPUT", INT32, "batch", 1), _value("sum_in", INT32, "batch", 1)]
    _save(directory, name, nodes, inputs, [_value("OUTPUT", INT32, "batch", 1), _value("sum_out", INT32, "batch", 1)])


def write(directory: Path) -> None:
    """Eight models, the number that the published model_control example counts."""
    _sums(directory, "simple", INT32)
    _sums(directory, "simple_again", INT32)
    _sums(directory, "simple_int8", INT8)
    _sums(directory, "simple_string", TEXT)
    _identity(directory, "simple_identity")
    _starts(directory, "simple_sequence")
    _accumulate(directory, "simple_accumulate")
    _accumulate(directory, "simple_accumulate_again")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.conformance.models DIR")
    write(Path(sys.argv[1]))
