"""What can't be cut, in rounds of different lengths: the shorter rows filled up, and nobody can tell from an answer."""

from __future__ import annotations

import tempfile
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from contract import bundle as contract
from contract.bundle import Bundle, Graph, Tensor
from export import adapt, convert, lengths
from seqserve import Client
from server import dropin
from server.graph import OnnxGraph
from server.inputs import Sizes
from server.pieces import ROUND_S, ROW_S, choose
from server.sequence import Sequence, split, stack
from server.tickets import Ticket
from tests import models
from tests.process import Served, serve

ENDS = Tensor("n", "int64", ("batch",), role="lengths")


def told(directory: Path) -> Bundle:
    """The bidirectional model of the tests, told how long each row is."""
    with tempfile.TemporaryDirectory() as name:
        models.both_ways(Path(name, "both_ways", "1"))
        return lengths.adapt(Path(name, "both_ways", "1"), directory)[0]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    library = tmp_path_factory.mktemp("models")
    told(library / "both_ways" / "1")
    bare = library / "bare" / "1"
    bare.mkdir(parents=True)
    (bare / "model.onnx").write_bytes((library / "both_ways" / "1" / "read.onnx").read_bytes())
    with serve(library, "--metrics-port", "0", "--max-rows", "8") as server:
        yield server


@pytest.mark.parametrize("model", ["both_ways", "bare"])
def test_answers_are_those_of_each_alone(served: Served, model: str, tmp_path: Path) -> None:
    """Callers by the dozen, of lengths from 1 to 40 and one to three rows, at once: bit for bit what the model that was never told
    of lengths gives each of them alone; and they did share rounds, filled up."""
    alone = models.both_ways(tmp_path / "1")
    plain = OnnxGraph(alone.graph, tmp_path / "1" / "read.onnx")
    rng = np.random.default_rng(5)
    inputs = [rng.normal(size=(rng.integers(1, 4), rng.integers(1, 41), 3)).astype(np.float32) for _ in range(300)]
    with Client(f"127.0.0.1:{served.port}") as client, ThreadPoolExecutor(48) as pool:
        answers = list(pool.map(lambda x: client.infer(model, {"x": x})["y"], inputs))
    for x, y in zip(inputs, answers, strict=True):
        wanted = plain.run({"x": x})[0]
        assert y.shape == wanted.shape
        assert y.tobytes() == wanted.tobytes()
    of = f'{{model="{model}",version="1"}}'
    assert counted(served, f"seqserve_row_steps_total{of}") == sum(x.shape[0] * x.shape[1] for x in inputs)
    assert counted(served, f"seqserve_padded_row_steps_total{of}") > 0
    assert counted(served, f"seqserve_round_rows_count{of}") < len(inputs)


def counted(served: Served, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{served.metrics_port}/metrics") as page:
        return next(float(line.rpartition(" ")[2]) for line in page.read().decode().splitlines() if line.startswith(name))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 20)), min_size=1, max_size=9), st.integers(0, 2**16))
def test_filled_up_and_parted_again(sizes: list[tuple[int, int]], seed: int) -> None:
    """Rows side by side and apart again, whatever their lengths: the graph is asked for the longest, and told of each one's own."""
    x = Tensor("x", "float32", ("batch", "time", 2), low=1.0, high=2.0)
    ends = Tensor("ends", "int64", ("batch",), role="lengths")
    out = (Tensor("y", "float32", ("time", "batch")), Tensor("z", "float32", ("batch", 2)), Tensor("w", "float32", ("batch", "time", 2)))
    graph = Graph("f", (x, ends), out, cut=False, padded=True)
    rng = np.random.default_rng(seed)
    drawn = [rng.uniform(1, 2, (rows, steps, 2)).astype(np.float32) for rows, steps in sizes]
    sequences = [Sequence("g", {"x": a}, Sizes(*a.shape[:2]), _never, _never) for a in drawn]
    longest = max(steps for _, steps in sizes)
    feeds = stack(graph, sequences, longest)
    assert feeds["x"].shape == (sum(rows for rows, _ in sizes), longest, 2)
    assert feeds["x"].min() >= 1.0, "filled up with what is allowed"
    assert feeds["ends"].tolist() == [steps for rows, steps in sizes for _ in range(rows)]
    split(graph, sequences, [feeds["x"][:, :, 0].T, feeds["x"][:, 0], feeds["x"]], (), longest)
    for s, a in zip(sequences, drawn, strict=True):
        got = s.outputs(graph)
        assert np.array_equal(got["y"], a[:, :, 0].T)
        assert np.array_equal(got["z"], a[:, 0])
        assert np.array_equal(got["w"], a)
        data, shape = got.data(out[2])
        assert (data, shape) == (a.tobytes(), a.shape)


def _never(*_: object) -> None:
    raise AssertionError("nobody is answered here")


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 60)), min_size=1, max_size=40), st.integers(3, 32))
def test_nobody_goes_along_at_a_loss(waiting: list[tuple[int, int]], most: int) -> None:
    """A round of different lengths is expected to take no longer than its lengths by themselves; the first is in it, and whoever
    has its length as far as they fit."""

    def each(rows: int) -> float:
        return 2e-5 if rows == 1 else 1e-5

    def cost(rows: int, steps: int) -> float:
        return ROUND_S + rows * (ROW_S + steps * each(rows))

    line = [Ticket("read", rows, steps, cut=False, padded=True) for rows, steps in waiting]
    chosen, steps = choose(line[0], line, most, 32, each)
    assert chosen[0] is line[0]
    assert len(chosen) == len(set(chosen))
    assert sum(t.rows for t in chosen) <= max(most, line[0].rows)
    assert steps == max(t.remaining for t in chosen)
    apart: dict[int, int] = {}
    for t in chosen:
        apart[t.remaining] = apart.get(t.remaining, 0) + t.rows
    assert cost(sum(apart.values()), steps) <= sum(cost(rows, n) for n, rows in apart.items()) + 1e-12
    equal, _ = choose(line[0], [t for t in line if t.remaining == line[0].remaining], most, 32, each)
    assert set(equal) <= set(chosen)


def test_near_lengths_go_together_far_ones_do_not() -> None:
    """Of 20, 22, 23 and 60 steps: the near ones, since many rows cost less each; 60 would have each of them run 60."""

    def each(rows: int) -> float:
        return 2e-5 if rows < 3 else 1e-5

    line = [Ticket("read", 1, steps, cut=False, padded=True) for steps in (22, 60, 20, 23)]
    chosen, steps = choose(line[0], line, 8, 32, each)
    assert sorted(t.remaining for t in chosen) == [20, 22, 23]
    assert steps == 23
    for t in line:
        t.padded = False
    assert choose(line[0], line, 8, 32, each) == ([line[0]], 22)
    line[0].padded = True
    assert choose(line[0], line, 8, 32, lambda rows: 0.0) == ([line[0]], 22), "where nothing is known of costs, nobody is filled up for"


def test_what_looks_at_all_steps_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A mean over all steps behind the layer would see what rows are filled up with: the bundle is refused with the reason."""
    models.both_ways(tmp_path / "whole" / "1")
    file = tmp_path / "whole" / "1" / "read.onnx"
    model = onnx.load(file)
    model.graph.node[-1].output[0] = "all"
    model.graph.node.append(helper.make_node("ReduceMax", ["all", "axis"], ["most"], keepdims=1))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axis"))
    model.graph.node.append(helper.make_node("Add", ["all", "most"], ["y"]))
    onnx.save(model, file)
    bundle = contract.load(_rewritten(tmp_path / "whole" / "1"))
    with pytest.raises(lengths.CantTell, match="looks at all steps"):
        lengths.adapt(tmp_path / "whole" / "1", tmp_path / "other" / "1")
    assert not (tmp_path / "other").exists() or not list((tmp_path / "other").iterdir())
    assert contract.load(tmp_path / "whole" / "1") == bundle
    assert adapt.main([str(tmp_path / "whole" / "1"), "--out", str(tmp_path / "other" / "1")]) == 1
    assert "looks at all steps" in capsys.readouterr().err


def _rewritten(directory: Path) -> Path:
    """The bundle with the fingerprint of what its files are now."""
    (directory / contract.FILE).write_text((directory / contract.FILE).read_text().replace("sha256:", "was:"))
    plain = Bundle("both_ways", {"read": _graph()}, "read")
    contract.save(plain, directory)
    return directory


def _graph() -> Graph:
    return Graph("read.onnx", (Tensor("x", "float32", ("batch", "time", 3)),), (Tensor("y", "float32", ("batch", "time", 10)),), cut=False)


def test_a_bundle_in_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command tells the graph its lengths where the bundle lies, once."""
    at = tmp_path / "both_ways" / "1"
    models.both_ways(at)
    assert adapt.main([str(at), "--out", str(at)]) == 0
    assert "takes rows of different lengths together" in capsys.readouterr().out
    made = contract.load(at)
    assert made.graph.padded
    assert made.verified["read"]["padded_is_alone"]
    assert adapt.main([str(at), "--out", str(at)]) == 1
    assert "told already" in capsys.readouterr().err
    assert contract.load(at) == made


def test_other_precisions_are_proved_anew(tmp_path: Path) -> None:
    """Rounded weights keep the promise; int8 sums, which depend on what is in the round, don't."""
    models.both_ways(tmp_path / "whole" / "1", hidden=40)
    lengths.adapt(tmp_path / "whole" / "1", tmp_path / "told" / "1")
    rounded, _ = convert.convert(tmp_path / "told" / "1", tmp_path / "rounded" / "1", "float16-weights")
    assert rounded.graph.padded
    assert rounded.verified["read"]["padded_is_alone"]
    dynamic, _ = convert.convert(tmp_path / "told" / "1", tmp_path / "dynamic" / "1", "int8-dynamic")
    assert not dynamic.graph.shared
    assert not dynamic.graph.padded


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"cut": True}, "may be cut"),
        ({"inputs": _graph().inputs}, "role 'lengths'"),
        (
            {"inputs": (*_graph().inputs, Tensor("n", "int64", ("batch",), role="lengths"), Tensor("p", "int64", ("time",)))},
            "no batch axis",
        ),
        ({"inputs": (Tensor("x", "string", ("batch", "time")), ENDS)}, "holds texts"),
    ],
)
def test_a_contract_that_can_not_be(change: dict[str, object], says: str) -> None:
    graph = replace(_graph(), inputs=(*_graph().inputs, ENDS), padded=True)
    assert not contract.validate(Bundle("b", {"read": graph}, "read"))
    assert any(says in fault for fault in contract.validate(Bundle("b", {"read": replace(graph, **change)}, "read")))  # type: ignore[arg-type]


def test_a_bare_file_that_is_not_so(tmp_path: Path) -> None:
    """A file with lengths that it doesn't heed is served, but only with equal lengths in a round."""
    bundle = told(tmp_path / "told" / "1")
    model = onnx.load(tmp_path / "told" / "1" / bundle.graph.file)
    for node in model.graph.node:
        if node.op_type == "LSTM":
            node.input[lengths.LENGTHS] = ""
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.int32), "nothing"))
    model.graph.node.insert(0, helper.make_node("Mul", ["lengths", "nothing"], ["unread"]))
    onnx.save(model, tmp_path / "bare.onnx")
    proposal = dropin.understand(tmp_path / "bare.onnx")
    assert not proposal.graph.padded
    assert any("only equal lengths" in remark for remark in proposal.remarks)
    assert dropin.understand(tmp_path / "told" / "1" / bundle.graph.file).graph.padded
