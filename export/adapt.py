"""`seqserve adapt FILE --out DIR`: a plain ONNX file, exported with no thought of state, becomes a bundle with sessions.

Each forward LSTM, GRU or RNN node starts from zeros and throws its last state away; here both become a state pair of the
file. Whether the result may then be cut is not read off the graph but tried: pieces with states carried over must give
what the whole gives, and the untouched file gives the same. Where they don't, the first nodes that differ are named.

It knows ONNX graphs; it must not know torch, training, or how bundles are served.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from contract import bundle as contract
from contract.bundle import Bundle, BundleError, Graph
from export import lengths, place
from server import differs, dropin
from server.graph import OnnxFile

Array = np.ndarray[Any, Any]

GATES: Mapping[str, int] = {"LSTM": 4, "GRU": 3, "RNN": 1}
TRIALS = 6
EPILOG = """
examples:
  seqserve adapt tagger.onnx --out models/tagger/1
  seqserve serve --models models

Works on forward LSTM, GRU and RNN nodes that start from zeros. What can't be cut is named: a bidirectional layer, a mean,
softmax, attention or convolution over all steps.

  seqserve adapt models/tagger/1 --out models/tagger/2

Given a directory of models/, a bundle or a bare ONNX file, it tells the graphs that can't be cut how long each row is, where that
alters no bit of any answer: then sequences of different lengths share rounds, instead of those of equal length only.
"""


class CantAdapt(ValueError):
    """The file can't be made to remember; `reasons` has why, by node name."""

    def __init__(self, reasons: Sequence[str]) -> None:
        self.reasons = tuple(reasons)
        super().__init__("; ".join(reasons))


@dataclass(frozen=True, slots=True)
class Pair:
    """A state made of a node: names of the file's new input and output."""

    node: str
    input: str
    output: str


def adapt(file: Path, out: Path, name: str) -> Bundle:
    """Write a streamable bundle of a plain ONNX file into `out` and return it; on failure `out` stays as it was.

    Raises CantAdapt with every reason, BundleError where onnxruntime can't load the file, FileNotFoundError.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no file {str(file)!r}")
    plain = dropin.understand(file)
    model = onnx.load(file)
    pairs = surgery(model, 1 if plain.graph.max_rows == 1 else "batch")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".adapt-", dir=out.parent) as made_in:
        made = Path(made_in)
        changed = made / "model.onnx"
        onnx.save(model, changed)
        proposal = dropin.understand(changed)
        graph = proposal.graph
        if proposal.faults:
            raise CantAdapt(proposal.faults)
        found = {(s.input, s.output) for s in graph.states}
        if lost := [p.node for p in pairs if (p.input, p.output) not in found]:
            raise CantAdapt([f"the state of node {n!r} has another form than its rows have" for n in lost])
        if not any(t.time_axis is not None for t in graph.data):
            raise CantAdapt(["no input has a time axis of open length: export the model with dynamic steps"])
        graph = replace(graph, cut=True)
        _note_axes(model, graph)
        onnx.save(model, changed)
        _prove(model, changed, file, graph)
        bundle = Bundle(
            name, {dropin.GRAPH: graph}, dropin.GRAPH,
            made_from={"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()},
            verified={dropin.GRAPH: {
                "cut_is_whole": True, "as_before": True, "trials": TRIALS, "states": [p.node for p in pairs],
                "allowed": {"absolute": differs.ABSOLUTE, "relative": differs.RELATIVE},
            }},
        )  # fmt: skip
        contract.save(bundle, made)
        place.move(made, out)
    return contract.load(out)


def surgery(model: onnx.ModelProto, rows: int | str) -> list[Pair]:
    """Make inputs of the states that recurrent nodes start from and outputs of those they end with, in place.

    Raises CantAdapt with every node that stands in the way, or where there is none to change.
    """
    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    inputs = {value.name for value in graph.input} - constants.keys()
    nodes = [(at, node) for at, node in enumerate(graph.node) if node.op_type in GATES]
    inner = [(f"{node.name or node.op_type}", n) for node in graph.node for n in _inner(node) if n.op_type in GATES]
    reasons = [f"node {n.name or n.op_type!r} lies within {outer!r}: unroll or inline it" for outer, n in inner]
    for at, node in nodes:
        reasons += [f"node {_called(node, at)!r} ({node.op_type}) {why}" for why in _obstacles(node, makers, constants, inputs)]
    if reasons:
        raise CantAdapt(reasons)
    pairs: list[Pair] = []
    for at, node in nodes:
        if any(name in inputs for name in node.input[5:7]):
            continue  # it is a state already
        base = re.sub(r"[^A-Za-z0-9]+", "_", _called(node, at)).strip("_")
        hidden = next(a.i for a in node.attribute if a.name == "hidden_size")
        layout = next((a.i for a in node.attribute if a.name == "layout"), 0)
        kind = constants[node.input[1]].data_type if node.input[1] in constants else onnx.TensorProto.FLOAT
        shape = [rows, 1, hidden] if layout else [1, rows, hidden]
        for which, slot in (("h", 5), ("c", 6)) if node.op_type == "LSTM" else (("h", 5),):
            pair = Pair(_called(node, at), f"{base}_{which}_in", f"{base}_{which}_out")
            node.input.extend([""] * (slot + 1 - len(node.input)))
            node.output.extend([""] * (slot - 3 - len(node.output)))
            node.input[slot] = pair.input
            node.output[slot - 4] = node.output[slot - 4] or f"{base}_{which}_last"
            # An Identity, for the value may be an output of the file already, and a state is one of its own.
            graph.node.append(helper.make_node("Identity", [node.output[slot - 4]], [pair.output], f"{base}_{which}_keep"))
            graph.input.append(helper.make_tensor_value_info(pair.input, kind, shape))
            graph.output.append(helper.make_tensor_value_info(pair.output, kind, shape))
            pairs.append(pair)
    if not pairs:
        raise CantAdapt(["it has no LSTM, GRU or RNN node that starts from zeros: there is nothing to remember"])
    return pairs


def culprits(model: onnx.ModelProto, graph: Graph, steps: int = 9, seed: int = 3) -> list[str]:
    """The nodes whose results first differ between a whole of so many steps and one cut: all that goes into them is still equal."""
    spied = onnx.ModelProto()
    spied.CopyFrom(model)
    known = {value.name for value in spied.graph.output}
    watched = [o for node in spied.graph.node for o in node.output if o]
    spied.graph.output.extend(onnx.ValueInfoProto(name=o) for o in watched if o not in known)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "spied.onnx"
        onnx.save(spied, file)
        runner = OnnxFile(file)
    cut = steps // 2
    inputs = differs.draw(graph, 1, steps, np.random.default_rng(seed))
    whole = runner.run(inputs | differs.fresh(graph, 1))
    first = runner.run({t.name: differs.between(t, inputs[t.name], 0, cut) for t in graph.inputs} | differs.fresh(graph, 1))
    then = runner.run(
        {t.name: differs.between(t, inputs[t.name], cut, steps) for t in graph.inputs} | {s.input: first[s.output] for s in graph.states}
    )
    wrong: set[str] = set()
    named: list[str] = []
    for at, node in enumerate(spied.graph.node):
        bad = [o for o in node.output if o and whole[o].dtype.kind == "f" and not _joins(whole[o], first[o], then[o])]
        if bad and not wrong & set(node.input):
            named.append(f"node {_called(node, at)!r} ({node.op_type}) looks beyond its own step")
        if bad or wrong & set(node.input):
            wrong.update(node.output)
    return named


def _note_axes(model: onnx.ModelProto, graph: Graph) -> None:
    """Write the axes that runs have shown into the outputs: exporters note an example's length for one that is open."""
    axes = {t.name: t.axes for t in graph.outputs}
    for output in model.graph.output:
        dims = output.type.tensor_type.shape.dim
        for dim, axis in zip(dims, axes.get(output.name, ()), strict=False):
            if isinstance(axis, str):
                dim.dim_param = axis


def _prove(model: onnx.ModelProto, changed: Path, file: Path, graph: Graph) -> None:
    """Cut is whole, and the whole is what the untouched file gives. Raises CantAdapt."""
    runner, before = OnnxFile(changed), OnnxFile(file)
    cut = differs.cut_differs(runner, graph, trials=TRIALS)
    if cut.wrong:
        raise CantAdapt([f"in pieces it gives another {', '.join(map(repr, cut.wrong))} than whole", *culprits(model, graph, cut.steps)])
    inputs = differs.draw(graph, min(2, graph.max_rows), 11, np.random.default_rng(4))
    wanted = before.run(inputs)
    got = runner.run(inputs | differs.fresh(graph, min(2, graph.max_rows)))
    if changed_names := [n for n in wanted if not differs.near(got[n], wanted[n])]:
        raise CantAdapt([f"output {n!r} is not as it was before the change; please report this" for n in changed_names])


def _joins(whole: Array, first: Array, then: Array) -> bool:
    """Whether two pieces' values make up the whole's: laid end to end, or the last alone."""
    if differs.near(whole, then):
        return True
    if not whole.ndim == first.ndim == then.ndim:
        return False
    axes = [a for a in range(whole.ndim) if whole.shape[a] == first.shape[a] + then.shape[a]]
    rest = [a for a in axes if all(whole.shape[b] == first.shape[b] == then.shape[b] for b in range(whole.ndim) if b != a)]
    return any(differs.near(whole, np.concatenate([first, then], a)) for a in rest)


def _obstacles(
    node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], constants: Mapping[str, onnx.TensorProto], inputs: set[str]
) -> Iterator[str]:
    direction = next((a.s.decode() for a in node.attribute if a.name == "direction"), "forward")
    if direction == "bidirectional":
        yield "is bidirectional: it reads the end before it gives the first step, so it can't be cut"
    elif direction != "forward":
        yield f"runs in {direction}: it can't be cut"
    if len(node.input) > 4 and node.input[4]:
        yield f"takes sequence_lens ({node.input[4]!r}): export it without; nothing is ever padded here"
    for slot, which in ((5, "initial_h"), (6, "initial_c")):
        if len(node.input) > slot and (name := node.input[slot]) and name not in inputs and not _zeros(name, makers, constants):
            yield f"has an {which} ({name!r}) that is not zeros: make it an input of the file"


_KEEPS_ZEROS = {"Expand", "Slice", "Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Tile", "Gather", "Split", "Flatten"}


def _zeros(name: str, makers: Mapping[str, onnx.NodeProto], constants: Mapping[str, onnx.TensorProto]) -> bool:
    if name in constants:
        return not numpy_helper.to_array(constants[name]).any()
    node = makers.get(name)
    if node is None:
        return False
    if node.op_type in ("Constant", "ConstantOfShape"):
        values = [a.t for a in node.attribute if a.name == "value"]
        numbers = [a.f for a in node.attribute if a.name == "value_float"]
        if not values and not numbers:
            return node.op_type == "ConstantOfShape"
        return not any(numpy_helper.to_array(t).any() for t in values) and not any(numbers)
    if node.op_type == "Concat":
        return all(_zeros(i, makers, constants) for i in node.input)
    return node.op_type in _KEEPS_ZEROS and _zeros(node.input[0], makers, constants)


def _inner(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            for n in graph.node:
                yield n
                yield from _inner(n)


def _called(node: onnx.NodeProto, at: int) -> str:
    return node.name or f"{node.op_type}_{at}"


def main(argv: Sequence[str] | None = None) -> int:
    """Adapt: 0 when done, 1 where it can't be, 2 where there is no such file."""
    words = argparse.ArgumentParser(
        prog="seqserve adapt", description="Give sessions to a plain ONNX file, or rounds of mixed lengths to what can't be cut.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    words.add_argument("file", type=Path, help="an ONNX file with forward LSTM, GRU or RNN nodes, or a directory of models/")
    words.add_argument("--out", type=Path, required=True, help="directory of the bundle, such as models/NAME/VERSION")
    words.add_argument("--name", help="the model's name when served (default: the directory above --out, or the file's)")
    asked = words.parse_args(argv)
    name = asked.name or (asked.out.parent.name if asked.out.name.isdecimal() else asked.file.stem)
    if asked.file.is_dir():
        return lengths.main(asked.file, asked.out, name)
    try:
        made = adapt(asked.file, asked.out, name)
    except FileNotFoundError as e:
        print(f"seqserve adapt: {e}", file=sys.stderr)
        return 2
    except CantAdapt as e:
        print(f"seqserve adapt: {asked.file} can't be cut in time; nothing was written", *e.reasons, sep="\n  - ", file=sys.stderr)
        return 1
    except BundleError as e:
        print(f"seqserve adapt: {asked.file}", *e.faults, sep="\n  - ", file=sys.stderr)
        return 1
    for state in made.graph.states:
        print(f"state  {state.input} → {state.output}  {state.dtype} {list(state.axes)}")
    print(f"cut = whole over {TRIALS} random cuttings, and in a long sequence; the whole as before")
    print(f"{made.name}: {asked.out}, {made.fingerprint[:19]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
