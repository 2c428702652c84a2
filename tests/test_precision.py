"""Other precisions: what only its weights change stays exact, what depends on its round is found out and kept apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from contract import bundle as contract
from contract.bundle import Bundle, Graph, State, Tensor
from export import convert, dynamic, precision, verify
from export.precision import CantConvert
from server.graph import OnnxGraph
from server.rounds import Limits
from tests import models
from tests.test_engine import Bench, alone, equal

HIDDEN = 64
SHARE = {"float16-weights": 0.56, "bfloat16-weights": 0.56, "int8-weights": 0.36, "float16": 0.56, "int8-dynamic": 0.4}
"""The most that a file of `reader`, whose small weights stay as they are, may have of its size in float32."""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of one recurrent model, each named for its precision."""
    root = tmp_path_factory.mktemp("precisions")
    models.reader(root / "float32" / "1", "float32", HIDDEN)
    for wanted in convert.ALLOWED:
        convert.convert(root / "float32" / "1", root / wanted / "1", wanted, wanted)
    return root


def tokens(count: int, steps: int) -> list[np.ndarray]:
    random = np.random.default_rng(count)
    return [random.integers(0, models.VOCABULARY, (1, steps)) for _ in range(count)]


@pytest.mark.parametrize("wanted", convert.ALLOWED)
def test_a_bundle_in_another_precision_keeps_its_contract_and_shrinks(library: Path, wanted: str) -> None:
    """Inputs, outputs and states are what they were; the file is smaller; what was compared is written down."""
    was, made = contract.load(library / "float32" / "1"), contract.load(library / wanted / "1")
    assert made.precision == wanted
    assert replace(made.graph, shared=True, cut=True) == was.graph
    sizes = [(library / p / "1" / "step.onnx").stat().st_size for p in ("float32", wanted)]
    assert sizes[1] < SHARE[wanted] * sizes[0]
    assert made.fingerprint != was.fingerprint
    assert made.made_from["converted"]["from"] == was.fingerprint
    proof = made.verified["step"]
    assert 0 < proof["largest_relative_norm"] <= proof["allowed"]["relative_norm"] == convert.ALLOWED[wanted]


@pytest.mark.parametrize("wanted", precision.WEIGHTS)
def test_weights_alone_leave_answers_exact(library: Path, wanted: str) -> None:
    """Batched is alone, cut is whole, and loaded they are the rounded float32 weights, bit for bit: in the proof and in rounds."""
    made = contract.load(library / wanted / "1")
    assert made.verified["step"]["batched_is_alone"]
    assert made.verified["step"]["cut_is_whole"]
    assert made.verified["step"]["as_rounded"]
    assert (made.graph.shared, made.graph.cut) == (True, True)
    bench = Bench(library, Limits(chunk=5))
    asked = tokens(9, 13)
    for who, t in enumerate(asked):
        bench.ask(wanted, who, tokens=t)
    bench.run()
    for who, t in enumerate(asked):
        assert equal(bench.answers[who], alone(bench.catalog.find(wanted), tokens=t))


def test_what_scales_over_its_round_is_never_shared(library: Path, tmp_path: Path) -> None:
    """The proof finds that a DynamicQuantizeLSTM mixes rows and steps; its callers get the answers they get alone, and would
    not if the bundle did not say so."""
    made = contract.load(library / "int8-dynamic" / "1")
    assert "DynamicQuantizeLSTM" in {n.op_type for n in onnx.load(library / "int8-dynamic" / "1" / "step.onnx").graph.node}
    assert (made.graph.shared, made.graph.cut) == (False, False)
    assert not made.verified["step"]["batched_is_alone"]
    assert made.verified["step"]["cut_matters"]
    forged = tmp_path / "forged" / "1"
    forged.mkdir(parents=True)
    (forged / "step.onnx").write_bytes((library / "int8-dynamic" / "1" / "step.onnx").read_bytes())
    contract.save(replace(made, name="forged", graphs={"step": replace(made.graph, shared=True)}), forged)
    asked = tokens(9, 13)
    exact = {}
    for root, name in ((library, "int8-dynamic"), (tmp_path, "forged")):
        bench = Bench(root, Limits(chunk=5))
        for who, t in enumerate(asked):
            bench.ask(name, who, tokens=t)
        bench.run()
        exact[name] = [equal(bench.answers[who], alone(bench.catalog.find(name), tokens=t)) for who, t in enumerate(asked)]
    assert all(exact["int8-dynamic"])
    assert not any(exact["forged"])


def test_float16_computes_in_float16_and_is_float32_at_the_border(library: Path) -> None:
    """Only recurrent and matrix nodes change; batching and cutting move answers by float16's rounding and no more."""
    made = contract.load(library / "float16" / "1")
    assert (made.graph.shared, made.graph.cut) == (True, True)
    graph = onnx.load(library / "float16" / "1" / "step.onnx").graph
    assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {TensorProto.FLOAT, TensorProto.INT64}
    held = {t.name: t.data_type for t in graph.initializer}
    assert {held[i] for n in graph.node if n.op_type in ("LSTM", "MatMul") for i in n.input if i in held} == {TensorProto.FLOAT16}


def test_int8_weights_have_a_scale_for_each_channel() -> None:
    """Each row's error is within half a step of its own scale, whatever the sizes of others; a row of zeros stays zeros."""
    weights = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32) * np.logspace(-4, 4, 40, dtype=np.float32)[:, None]
    weights[7] = 0
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", w]) for n, w in (("x", 64), ("y", 40))]
    node = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)
    model = helper.make_model(helper.make_graph([node], "g", values[:1], values[1:], [numpy_helper.from_array(weights, "w")]))
    restored = precision.int8_weights(model)["w"]
    assert (np.abs(restored - weights) <= np.abs(weights).max(1, keepdims=True) / 254 * 1.001).all()
    assert not restored[7].any()


def tied(directory: Path, largest: float = 1.0) -> Bundle:
    """tokens → embedding → state → the same embedding as the output layer: one weight in two places, one of them transposed."""
    directory.mkdir(parents=True)
    table = np.random.default_rng(0).normal(size=(48, 32)).astype(np.float32)
    table[3, 3] = largest
    ends = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([1]), "one")]
    nodes = [
        helper.make_node("Gather", ["table", "token"], ["x"]),
        helper.make_node("Add", ["x", "s"], ["s_next"]),
        helper.make_node("Gemm", ["s_next", "table"], ["y"], transB=1),
    ]
    f, i = TensorProto.FLOAT, TensorProto.INT64
    info = helper.make_tensor_value_info
    inputs, outputs = [info("token", i, ["b"]), info("s", f, ["b", 32])], [info("y", f, ["b", 48]), info("s_next", f, ["b", 32])]
    model = helper.make_model(helper.make_graph(nodes, "tied", inputs, outputs, ends), opset_imports=models.OPSET, ir_version=9)
    onnx.save(model, directory / "step.onnx")
    states = (State("s", "s_next", "float32", ("batch", 32)),)
    graph = Graph("step.onnx", (Tensor("token", "int64", ("batch",), low=0, high=47),), (Tensor("y", "float32", ("batch", 48)),), states)
    return contract.save(Bundle("tied", {"step": replace(graph, max_time=1)}, "step"), directory)


@pytest.mark.parametrize("shape", [(precision.TABLE,), (precision.TABLE, 1)])
@pytest.mark.parametrize("wanted", precision.WEIGHTS)
def test_a_table_of_single_numbers_shrinks_and_a_bias_does_not(wanted: str, shape: tuple[int, ...]) -> None:
    """A long vector is weights too, of int8 with one scale; a short one stays as it is."""
    table = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    bias = np.ones(precision.SMALLEST, np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["found"]),
        helper.make_node("Gather", ["bias", "ids"], ["other"]),
        helper.make_node("ReduceSum", ["found"], ["all"], keepdims=0),
        helper.make_node("ReduceSum", ["other"], ["both"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("ids", TensorProto.INT64, [None])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, []) for n in ("all", "both")],
        [numpy_helper.from_array(table, "table"), numpy_helper.from_array(bias, "bias")],
    )  # fmt: skip
    model = helper.make_model(graph)
    restored = precision.WEIGHTS[wanted](model)
    assert set(restored) == {"table"}
    assert np.abs(restored["table"] - table).max() < 0.03
    assert model.ByteSize() < 0.6 * table.nbytes
    onnx.checker.check_model(model)


@pytest.mark.parametrize("wanted", convert.ALLOWED)
def test_a_weight_in_two_places_is_right_in_both(tmp_path: Path, wanted: str) -> None:
    """An embedding that is the output layer too comes through; onnxruntime's quantiser by itself transposes it for both."""
    tied(tmp_path / "tied" / "1")
    made, _ = convert.convert(tmp_path / "tied" / "1", tmp_path / "out" / "1", wanted)
    assert made.verified["step"]["largest_relative_norm"] < convert.ALLOWED[wanted] / 2


def test_another_model_is_not_taken_for_a_rounded_one(library: Path, tmp_path: Path) -> None:
    """Weights of another seed are found out, far beyond what the coarsest precision is allowed."""
    other = models.reader(tmp_path, "other", HIDDEN, seed=1)
    graphs = [OnnxGraph(other.graph, at / "step.onnx") for at in (library / "float32" / "1", tmp_path)]
    with pytest.raises(verify.VerifyError):
        verify.compare("step", other.graph, *graphs, max(convert.ALLOWED.values()))
    assert not verify.identical(other.graph, *graphs)


@pytest.mark.parametrize(
    ("source", "wanted", "out", "says"),
    [
        ("float32", "float16-weights", "float32", "write it elsewhere"),
        ("int8-weights", "float16-weights", "new", "in int8-weights already"),
        ("huge", "float16-weights", "new", "use bfloat16-weights"),
        ("huge", "float16", "new", "use bfloat16-weights"),
        ("small", "int8-weights", "new", "nothing to make smaller"),
        ("gru", "int8-dynamic", "new", "use int8-weights"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(
    library: Path, tmp_path: Path, source: str, wanted: str, out: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command exits 1, says what to do instead, and writes nothing."""
    match source:
        case "huge":
            tied(tmp_path / "huge" / "1", largest=1e6)
        case "small":
            models.reader(tmp_path / "small" / "1", "small", 4)
        case "gru":
            _gru(tmp_path / "gru" / "1")
    at = (tmp_path if (tmp_path / source).exists() else library) / source / "1"
    to = at if out == source else tmp_path / out / "1"
    before = sorted(f.name for f in at.iterdir())
    assert convert.main([str(at), "--precision", wanted, "--out", str(to)]) == 1
    said = capsys.readouterr().err
    assert says in said
    assert len(said.splitlines()) == 1
    assert sorted(f.name for f in at.iterdir()) == before
    assert at == to or not to.exists()


def _gru(directory: Path) -> None:
    directory.mkdir(parents=True)
    random = np.random.default_rng(0)
    weights = [numpy_helper.from_array(random.normal(size=(1, 96, n)).astype(np.float32), name) for name, n in (("w", 16), ("r", 32))]
    node = helper.make_node("GRU", ["x", "w", "r", "", "", "h"], ["", "h_next"], hidden_size=32)
    copy = helper.make_node("Identity", ["h_next"], ["y"])
    info, f = helper.make_tensor_value_info, TensorProto.FLOAT
    inputs, outputs = [info("x", f, ["t", "b", 16]), info("h", f, [1, "b", 32])], [info(n, f, [1, "b", 32]) for n in ("h_next", "y")]
    model = helper.make_model(helper.make_graph([node, copy], "gru", inputs, outputs, weights), opset_imports=models.OPSET, ir_version=9)
    onnx.save(model, directory / "step.onnx")
    state, shape = State("h", "h_next", "float32", (1, "batch", 32)), (1, "batch", 32)
    graph = Graph("step.onnx", (Tensor("x", "float32", ("time", "batch", 16)),), (Tensor("y", "float32", shape),), (state,))
    contract.save(Bundle("gru", {"step": graph}, "step"), directory)


def test_a_bundle_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory that does not exist, or holds no bundle, is named."""
    assert convert.main([str(tmp_path / "no"), "--precision", "float16", "--out", str(tmp_path / "1")]) == 2
    assert convert.main([str(tmp_path), "--precision", "float16", "--out", str(tmp_path / "1")]) == 1
    assert "no bundle.json" in capsys.readouterr().err


def test_a_failed_conversion_leaves_what_was_there(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the comparison fails, an earlier bundle in the same place is still whole."""
    out = tmp_path / "1"
    first, _ = convert.convert(library / "float32" / "1", out, "float16-weights")
    monkeypatch.setattr(convert, "ALLOWED", {"int8-weights": 1e-9})
    assert convert.main([str(library / "float32" / "1"), "--precision", "int8-weights", "--out", str(out)]) == 1
    assert contract.load(out).fingerprint == first.fingerprint


def test_the_quantiser_refuses_what_it_would_leave_alone() -> None:
    """Dynamic int8 of a file without LSTM or matrix nodes is refused, not copied."""
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 4]) for n in "xy"]
    node = helper.make_node("Tanh", ["x"], ["y"])
    model = helper.make_model(helper.make_graph([node], "g", info[:1], info[1:]), opset_imports=models.OPSET, ir_version=9)
    with pytest.raises(CantConvert, match="no LSTM or MatMul"):
        dynamic.int8_dynamic(model)
