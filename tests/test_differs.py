"""What runs of a bare file show: how far back it looks, whose rows alter whose, in which form it takes what; and what is then told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from contract import bundle as contract
from export import adapt
from seqserve import Client
from server import differs, dropin
from server.differs import Differences
from server.graph import OnnxFile
from tests import bare
from tests.models import FLOAT, INT64, _ints, _save, _value, _weights
from tests.process import ROOT, serve


def lagging(file: Path, lag: int, factor: float = 1.0) -> Path:
    """x [b, t, 3], h [b, 3] → y [b, t, 3], each step's y being `factor` times x of `lag` steps before; h_out [b, 3] sums all up."""
    file.parent.mkdir(parents=True, exist_ok=True)
    initial = _ints(pads=[0, lag, 0, 0, 0, 0], zero=[0], end=[-lag], time=[1])
    initial.append(onnx.numpy_helper.from_array(np.array(factor, np.float32), "factor"))
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["longer"]),
        helper.make_node("Slice", ["longer", "zero", "end", "time"], ["late"]),
        helper.make_node("Mul", ["late", "factor"], ["y"]),
        helper.make_node("ReduceSum", ["x", "time"], ["sum"], keepdims=0),
        helper.make_node("Add", ["h", "sum"], ["h_out"]),
    ]
    inputs = [_value("x", FLOAT, "b", "t", 3), _value("h", FLOAT, "b", 3)]
    _save(file, nodes, inputs, [_value("y", FLOAT, "b", "t", 3), _value("h_out", FLOAT, "b", 3)], initial)
    return file


def mixing(file: Path, factor: float) -> Path:
    """x [b, 3], h [b, 3] → y [b, 3], to which the mean of all rows is added; h_out [b, 3]."""
    initial = [*_ints(rows=[0]), onnx.numpy_helper.from_array(np.array(factor, np.float32), "factor")]
    nodes = [
        helper.make_node("Tanh", ["x"], ["h_out"]),
        helper.make_node("ReduceMean", ["x", "rows"], ["mean"], keepdims=1),
        helper.make_node("Add", ["x", "mean"], ["mixed"]),
        helper.make_node("Mul", ["mixed", "factor"], ["small"]),
        helper.make_node("Add", ["small", "h"], ["y"]),
    ]
    inputs = [_value("x", FLOAT, "b", 3), _value("h", FLOAT, "b", 3)]
    _save(file, nodes, inputs, [_value("y", FLOAT, "b", 3), _value("h_out", FLOAT, "b", 3)], initial)
    return file


def summing(file: Path, first: str, second: str) -> Path:
    """x [first, second, 3] → y of the same form: the sum along the first axis so far."""
    nodes = [helper.make_node("CumSum", ["x", "axis"], ["y"])]
    axes = (first, second, 3)
    _save(file, nodes, [_value("x", FLOAT, *axes)], [_value("y", FLOAT, *axes)], [onnx.numpy_helper.from_array(np.array(0), "axis")])
    return file


@pytest.mark.parametrize("lag", [3, 12, 20, 40, 100, 300, 650])
def test_how_far_back_a_file_looks(lag: int, tmp_path: Path) -> None:
    """A file that looks further back than short trials are long is not cut, be it small what it gives."""
    for factor in (1.0, 1e-6):
        seen = dropin.understand(lagging(tmp_path / "lag.onnx", lag, factor))
        assert (seen.faults, seen.graph.cut) == ((), False)
        assert "'y' would differ if a sequence were cut: each call or turn runs whole" in seen.remarks


@pytest.mark.parametrize("file", sorted((ROOT / "models").glob("*/*/bundle.json")), ids=lambda file: str(file.parent.parent.name))
def test_shipped_models_in_long_sequences(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What we ship and say may be cut gives the same bits in pieces of 1,025 steps, or of as many as it takes."""
    monkeypatch.setattr(differs, "PATIENCE", 60.0)
    bundle = contract.load(file.parent)
    for graph in bundle.graphs.values():
        if graph.cut and graph.max_time > 1 and any(t.time_axis is not None for t in graph.data):
            found = differs.cut_differs(OnnxFile(file.parent / graph.file), graph)
            assert (found.wrong, found.rounded) == ({}, {})
            assert found.steps == min(differs.LONG[0], graph.max_time)


def test_a_long_call_of_what_looks_back(tmp_path: Path) -> None:
    """Served, such a file gives a call of many steps what it gives by itself."""
    lagging(tmp_path / "lag" / "1" / "model.onnx", 40)
    x = np.random.default_rng(0).normal(size=(1, 300, 3)).astype(np.float32)
    with serve(tmp_path) as served, Client(f"localhost:{served.port}") as client:
        found = client.infer("lag", {"x": x}).outputs["y"]
    assert np.array_equal(found[:, 40:], x[:, :-40])
    assert not found[:, :40].any()


def test_slow_files_are_looked_at_for_less_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where long runs take long, shorter ones must do, and what that leaves open is said."""
    monkeypatch.setattr(differs, "PATIENCE", 0.0)
    bare.voice(tmp_path / "voice.onnx")
    seen = dropin.understand(tmp_path / "voice.onnx")
    assert seen.graph.cut
    assert "it is slow, so pieces were held against the whole over 65 steps: what looks further back is not seen" in seen.remarks
    assert not dropin.understand(lagging(tmp_path / "lag.onnx", 40)).graph.cut


@pytest.mark.parametrize("factor", [1.0, 1e-4, 1e-8])
def test_rows_that_alter_each_other_ever_so_little(factor: float, tmp_path: Path) -> None:
    seen = dropin.understand(mixing(tmp_path / "mixing.onnx", factor))
    assert (seen.faults, seen.graph.shared) == ((), False)


def test_what_counts_as_rounding() -> None:
    """By the size of all values: of what is small throughout, little counts; of small values among large ones it does not; texts, numbers
    of things and truths are the same or not."""
    ones = np.array([1.0, -0.5, 1e-7], np.float32)
    cases: list[tuple[Any, Any, str]] = [
        (ones, ones.copy(), ""), (ones, ones + np.float32(1e-6), "rounded"), (ones, ones + np.float32(1e-2), "wrong"),
        (ones * 1e-6, ones * 1e-6 + 1e-13, "rounded"), (ones * 1e-6, ones * 1e-6 + 1e-8, "wrong"), (ones, ones[:2], "wrong"),
        (np.float16([1, 0.1]), np.float16([1.003, 0.1]), "rounded"), (np.float16([1, 0.1]), np.float16([1.1, 0.1]), "wrong"),
        (np.array([np.nan, 1.0]), np.array([np.nan, 1.0]), ""), (np.array([np.nan, 1.0]), np.array([0.0, 1.0]), "wrong"),
        (np.array([7]), np.array([8]), "wrong"), (np.array(["a"]), np.array(["a"]), ""), (np.array([True]), np.array([False]), "wrong"),
        (np.zeros(3), np.zeros(3), ""), (np.zeros(3), np.full(3, 1e-30), "wrong"),
    ]  # fmt: skip
    for wanted, found, verdict in cases:
        seen = Differences()
        seen.see("y", found, wanted)
        assert ("rounded" if seen.rounded else "wrong" if seen.wrong else "") == verdict, (wanted, found)
    row = Differences()
    row.see("y", np.float32([1e-7]), np.float32([0]), np.float32([1, 0]))
    assert row.rounded, "one row's, of values as large as 1"


def test_rounding_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that are the same but for their last bits, by where they are cut or by who runs along, are named."""
    bare.voice(tmp_path / "voice.onnx")
    exact = Differences.see

    def off(self: Differences, name: str, one: Any, other: Any, all: Any = None) -> None:
        exact(self, name, one * np.float32(1 + 1e-6), other, all)

    monkeypatch.setattr(Differences, "see", off)
    remarks = dropin.understand(tmp_path / "voice.onnx").remarks
    assert any("'output'" in r and r.endswith("may differ in the last bits by where a sequence is cut") for r in remarks)
    assert any("'output'" in r and r.endswith("of a row may differ in the last bits by how many run together") for r in remarks)


def test_rows_and_steps_by_name_and_by_what_runs_show(tmp_path: Path) -> None:
    """`rows` and `steps` are what they say; names that say nothing are told apart by which of them alters the other."""
    for names in (("steps", "rows"), ("alpha", "beta"), ("t", "b")):
        seen = dropin.understand(summing(tmp_path / "sum.onnx", *names))
        assert seen.graph.inputs[0].axes == ("time", "batch", 3), names
        assert (seen.faults, seen.graph.shared) == ((), True)


def test_a_length_that_an_exporter_wired_in(tmp_path: Path) -> None:
    """A file whose nodes take the example's number of steps only is served by windows of that size, which its outputs name."""
    nodes = [
        helper.make_node("Reshape", ["x", "form"], ["five"]),
        helper.make_node("Unsqueeze", ["h", "one"], ["wide"]),
        helper.make_node("Add", ["five", "wide"], ["y"]),
        helper.make_node("ReduceSum", ["y", "one"], ["h_out"], keepdims=0),
    ]
    inputs = [_value("x", FLOAT, "b", "t", 3), _value("h", FLOAT, "b", 3)]
    outputs = [_value("y", FLOAT, "b", 5, 3), _value("h_out", FLOAT, "b", 3)]
    _save(tmp_path / "five.onnx", nodes, inputs, outputs, _ints(form=[-1, 5, 3], one=[1]))
    seen = dropin.understand(tmp_path / "five.onnx")
    assert seen.faults == ()
    assert (seen.graph.inputs[0].axes, seen.graph.outputs[0].axes) == (("batch", 5, 3), ("batch", 5, 3))


def test_one_row_of_one_number(tmp_path: Path) -> None:
    """A decoding step for one row, as exported without a thought of a batch: token [1]."""
    nodes = [
        helper.make_node("Gather", ["table", "token"], ["read"]),
        helper.make_node("Add", ["read", "h"], ["h_out"]),
        helper.make_node("MatMul", ["h_out", "out"], ["logits"]),
    ]
    inputs = [_value("token", INT64, 1), _value("h", FLOAT, 1, 4)]
    outputs = [_value("logits", FLOAT, 1, 6), _value("h_out", FLOAT, 1, 4)]
    _save(tmp_path / "step.onnx", nodes, inputs, outputs, _weights(1, table=(9, 4), out=(4, 6)))
    seen = dropin.understand(tmp_path / "step.onnx")
    assert seen.faults == ()
    assert (seen.graph.inputs[0].axes, seen.graph.max_rows) == (("batch",), 1)


def only_states(file: Path) -> None:
    """x [b, 3], h [b, 4] → h_out [b, 4], as nn.GRUCell is exported: nothing else comes out."""
    file.parent.mkdir(parents=True, exist_ok=True)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "h"], ["sum"]),
        helper.make_node("Tanh", ["sum"], ["h_out"]),
    ]
    inputs = [_value("x", FLOAT, "b", 3), _value("h", FLOAT, "b", 4)]
    _save(file, nodes, inputs, [_value("h_out", FLOAT, "b", 4)], _weights(2, w=(3, 4)))


@pytest.mark.parametrize("state", ["host", "device"])
def test_a_cell_that_gives_its_state_only(state: str, tmp_path: Path) -> None:
    """Callers get the next state, and the session goes on from it."""
    only_states(tmp_path / "cell" / "1" / "model.onnx")
    weights = onnx.numpy_helper.to_array(onnx.load(tmp_path / "cell" / "1" / "model.onnx").graph.initializer[0])
    x = np.random.default_rng(0).normal(size=(5, 1, 3)).astype(np.float32)
    with serve(tmp_path, "--state", state) as served, Client(f"localhost:{served.port}") as client, client.session("cell") as session:
        h = np.zeros((1, 4), np.float32)
        for step in x:
            h = np.tanh(step @ weights + h)
            np.testing.assert_allclose(session.send({"x": step}).outputs["h_out"], h, 1e-5, 1e-6)


def test_a_state_that_no_name_tells(tmp_path: Path) -> None:
    """Two ports of one form that might be a state are named; of a file with one input they are what they are."""
    nodes = [helper.make_node("MatMul", ["in0", "w"], ["a"]), helper.make_node("Add", ["a", "in1"], ["o1"])]
    nodes.append(helper.make_node("MatMul", ["o1", "v"], ["o0"]))
    inputs = [_value("in0", FLOAT, "b", 3), _value("in1", FLOAT, "b", 6)]
    outputs = [_value("o0", FLOAT, "b", 2), _value("o1", FLOAT, "b", 6)]
    _save(tmp_path / "odd.onnx", nodes, inputs, outputs, _weights(1, w=(3, 6), v=(6, 2)))
    seen = dropin.understand(tmp_path / "odd.onnx")
    assert seen.graph.states == ()
    assert seen.remarks == ("'in1' may be a state that becomes 'o1', by form; by name it is not: say so if it is",)
    _save(tmp_path / "plain.onnx", [helper.make_node("Neg", ["x"], ["z"])], [_value("x", FLOAT, "b", 6)], [_value("z", FLOAT, "b", 6)], [])
    assert dropin.understand(tmp_path / "plain.onnx").remarks == ()


def test_an_output_may_declare_another_size(tmp_path: Path) -> None:
    """What inspect calls fit is served: an output's size in the file is the example's, what comes out is what counts."""
    nodes = [
        helper.make_node("Reshape", ["x", "form"], ["halved"]),
        helper.make_node("ReduceSum", ["x", "one"], ["sum"], keepdims=0),
        helper.make_node("Add", ["h", "sum"], ["h_out"]),
    ]
    inputs = [_value("x", FLOAT, "b", 8, 3), _value("h", FLOAT, "b", 3)]
    file = tmp_path / "down" / "1" / "model.onnx"
    file.parent.mkdir(parents=True)
    _save(file, nodes, inputs, [_value("halved", FLOAT, "b", 2, 6), _value("h_out", FLOAT, "b", 3)], _ints(form=[0, -1, 6], one=[1]))
    assert dropin.understand(file).graph.outputs[0].axes == ("batch", 4, 6)
    with serve(tmp_path) as served, Client(f"localhost:{served.port}") as client:
        assert client.infer("down", {"x": np.ones((1, 8, 3), np.float32)}).outputs["halved"].shape == (1, 4, 6)


def test_what_looks_far_back_is_not_adapted(tmp_path: Path) -> None:
    """`seqserve adapt` finds it too, names the node, and writes nothing."""
    bare.whole(tmp_path / "plain.onnx")
    model = onnx.load(tmp_path / "plain.onnx")
    model.graph.initializer.extend(_ints(pads=[0, 48, 0, 0, 0, 0], start=[0], stop=[-48], along=[1]))
    model.graph.node.append(helper.make_node("Pad", ["y", "pads"], ["longer"], "days.pad"))
    model.graph.node.append(helper.make_node("Slice", ["longer", "start", "stop", "along"], ["late"], "days.slice"))
    model.graph.output.append(_value("late", FLOAT, "b", "t", 2))
    onnx.save(model, tmp_path / "days.onnx")
    with pytest.raises(adapt.CantAdapt, match=r"another 'late' than whole; node 'days\.pad' \(Pad\) looks beyond its own step"):
        adapt.adapt(tmp_path / "days.onnx", tmp_path / "out" / "1", "days")
    assert not (tmp_path / "out" / "1").exists()
