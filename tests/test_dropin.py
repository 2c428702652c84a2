"""Bare files over a real server: dropped in, or adapted from files that never thought of state."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from export import adapt
from seqserve import Client, errors
from server.graph import Array
from tests import bare
from tests.process import Served, serve


def torch_file(file: Path) -> None:
    """A model as torch exports it: two LSTM layers, a GRU, a linear layer, no state among its ports."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(3, 8, 2, batch_first=True)
            self.gru = nn.GRU(8, 8, batch_first=True)
            self.out = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.out(self.gru(self.lstm(x)[0])[0])
            return out

    torch.manual_seed(0)
    with warnings.catch_warnings():
        # The older exporter, which warns that it is: the newer one of torch 2.13 fixes the steps where a GRU follows an LSTM.
        warnings.simplefilter("ignore")
        open_axes = {0: "rows", 1: "steps"}
        torch.onnx.export(
            Model().eval(), (torch.zeros(4, 5, 3),), file, dynamo=False, dynamic_axes={"x": open_axes, "y": open_axes}, input_names=["x"],
            output_names=["y"],
        )  # fmt: skip


def noted(file: Path, steps: int) -> None:
    """The outputs of a file said to have so many steps, as torch's exporter notes those of its example; its nodes take any."""
    model = onnx.load(file)
    for output in model.graph.output:
        for dim in output.type.tensor_type.shape.dim:
            if dim.dim_param == "t":
                dim.dim_value = steps
    onnx.save(model, file)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bare")
    bare.voice(root / "voice" / "1" / "model.onnx")
    bare.voice(root / "alone" / "1" / "model.onnx", 1)
    bare.whole(root / "noted" / "1" / "model.onnx")
    noted(root / "noted" / "1" / "model.onnx", 5)
    bare.cell(root / "cell" / "1" / "model.onnx")
    bare.rowless(root / "rowless" / "1" / "model.onnx")
    bare.whole(root.parent / "plain.onnx", ending=["last"])
    adapt.adapt(root.parent / "plain.onnx", root / "adapted" / "1", "adapted")
    torch_file(root.parent / "torch.onnx")
    adapt.adapt(root.parent / "torch.onnx", root / "torch" / "1", "torch")
    return root


@pytest.fixture(scope="module")
def served(library: Path) -> Iterator[Served]:
    with serve(library) as server:
        yield server


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(f"127.0.0.1:{served.port}") as client:
        yield client


def run(file: Path, feeds: dict[str, Array]) -> dict[str, Array]:
    """A file in plain onnxruntime."""
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))


RANDOM = np.random.default_rng(7)
RATE = np.array(8000, np.int64)


@pytest.mark.parametrize("model", ["voice", "alone"])
def test_a_dropped_in_file_has_sessions(model: str, client: Client, library: Path) -> None:
    """A session's turns give what the file gives with its state carried by hand, whether its batch is open or fixed to 1."""
    file = library / model / "1" / "model.onnx"
    state = np.zeros((2, 1, 16), np.float32)
    with client.session(model) as session:
        for steps in (3, 1, 40, 7):
            chunk = RANDOM.normal(size=(1, steps)).astype(np.float32)
            wanted = run(file, {"input": chunk, "state": state, "sr": RATE})
            state = wanted["stateN"]
            got = session.send({"input": chunk, "sr": RATE})
            np.testing.assert_allclose(got["output"], wanted["output"], rtol=1e-5, atol=1e-6)
            assert list(got) == ["output"]


def test_an_output_may_note_another_length(client: Client, library: Path) -> None:
    """A file that notes 5 steps of its output, and takes any, is served for any."""
    x = RANDOM.normal(size=(1, 9, 3)).astype(np.float32)
    wanted = run(library / "noted" / "1" / "model.onnx", {"x": x})
    np.testing.assert_allclose(client.infer("noted", {"x": x})["y"], wanted["y"], rtol=1e-5, atol=1e-6)


def test_a_step_a_call_needs_no_time_axis(client: Client, library: Path) -> None:
    """A cell without any time axis is served too: each turn is one step."""
    h = np.zeros((1, 4), np.float32)
    with client.session("cell") as session:
        for _ in range(5):
            x = RANDOM.normal(size=(1, 3)).astype(np.float32)
            wanted = run(library / "cell" / "1" / "model.onnx", {"x": x, "h_in": h})
            h = wanted["h_out"]
            np.testing.assert_allclose(session.send({"x": x})["y"], wanted["y"], rtol=1e-5, atol=1e-6)


def test_many_sessions_of_one_row_files(client: Client, library: Path) -> None:
    """Sessions of a file whose batch is fixed to 1 run one after another, none disturbed; two rows at once are refused."""
    chunks = RANDOM.normal(size=(6, 4, 1, 5)).astype(np.float32)
    sessions = [client.session("alone") for _ in chunks]
    last = [[session.send({"input": chunks[s, turn], "sr": RATE}) for s, session in enumerate(sessions)] for turn in range(4)][-1]
    for s, session in enumerate(sessions):
        whole = np.concatenate(list(chunks[s]), 1)
        zeros = np.zeros((2, 1, 16), np.float32)
        wanted = run(library / "alone" / "1" / "model.onnx", {"input": whole, "state": zeros, "sr": RATE})
        np.testing.assert_allclose(last[s]["output"], wanted["output"], rtol=1e-5, atol=1e-6)
        session.close()
    with pytest.raises(errors.InvalidInput, match="2 rows in one request; allowed are 1 to 1"):
        client.infer("alone", {"input": np.zeros((2, 5), np.float32), "sr": RATE})


def test_what_was_proposed_is_logged(served: Served) -> None:
    """The log has the remarks of each proposal, and each fault of a file that fits none with what to do."""
    log = "".join(served.log)
    assert "proposed a contract for" in log
    assert "input 'sr' has no axis of rows" in log
    assert "no input has a batch axis" in log
    assert "seqserve inspect" in log


@pytest.mark.parametrize(("model", "original"), [("adapted", "plain.onnx"), ("torch", "torch.onnx")])
def test_sessions_of_an_adapted_file_equal_the_whole_run(model: str, original: str, client: Client, library: Path) -> None:
    """Turns of any lengths give, laid end to end, what the file from before gives for the whole."""
    x = RANDOM.normal(size=(1, 60, 3)).astype(np.float32)
    wanted = run(library.parent / original, {"x": x})
    with client.session(model) as session:
        answers = [session.send({"x": x[:, a:b]}) for a, b in ((0, 1), (1, 8), (8, 50), (50, 60))]
    np.testing.assert_allclose(np.concatenate([a["y"] for a in answers], 1), wanted["y"], rtol=1e-4, atol=1e-5)
    if "last" in wanted:
        np.testing.assert_allclose(answers[-1]["last"], wanted["last"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"direction": "bidirectional"}, "node 'rnn.lstm' (LSTM) is bidirectional"),
        ({"direction": "reverse"}, "node 'rnn.lstm' (LSTM) runs in reverse"),
        ({"ending": ["mean"]}, "node 'head.pool' (ReduceMean) looks beyond its own step"),
    ],
)
def test_what_cannot_be_cut_is_said_by_node(how: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A layer that reads backwards and a mean over all steps are refused by their names, and nothing is written."""
    file = tmp_path / "model.onnx"
    bare.whole(file, **how)
    assert adapt.main([str(file), "--out", str(tmp_path / "out" / "1")]) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out" / "1").exists()


def test_adapt_prints_its_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command says which states it made, and 2 where there is no file."""
    bare.whole(tmp_path / "model.onnx")
    assert adapt.main([str(tmp_path / "model.onnx"), "--out", str(tmp_path / "tagger" / "1")]) == 0
    shown = capsys.readouterr().out
    assert "rnn_lstm_c_in → rnn_lstm_c_out" in shown
    assert "tagger: " in shown
    assert adapt.main([str(tmp_path / "none.onnx"), "--out", str(tmp_path / "x" / "1")]) == 2
