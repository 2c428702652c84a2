"""Recurrent layers: every kind, activation, depth and direction; where gradients go; what the comparison shows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from export import to_onnx, verify
from server.graph import OnnxGraph
from training import __main__ as command
from training import checkpoint, compare, config, digits
from training.cells import ACTIVATIONS, FORMS, Recurrent, carried, names
from training.config import Cells, ConfigError

SMALL = Cells(hidden=6, layers=2)
EVERY = [replace(SMALL, kind=kind, activation=act) for kind in FORMS for act in ("tanh", "softsign")]


def made(cells: Cells, width: int = 4) -> Recurrent:
    """Layers whose biases are not zero, so that a mistake in them shows."""
    torch.manual_seed(3)
    layers = Recurrent(width, cells).eval()
    with torch.no_grad():
        for name, weight in layers.named_parameters():
            if "bias" in name:
                weight.normal_(std=0.5)
    return layers


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("kind", list(FORMS))
def test_step_by_step_is_what_torch_computes(kind: str, both: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cells written out here, given tanh, give what torch's kernels give, and the same last states."""
    layers = made(replace(SMALL, kind=kind, bidirectional=both))
    given = torch.randn(3, 7, 4)
    wanted, ends = layers(given)
    monkeypatch.setitem(ACTIVATIONS, "softsign", torch.tanh)
    layers.cells = replace(layers.cells, activation="softsign")
    found, other = layers(given)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(other, ends)


@pytest.mark.parametrize("cells", EVERY, ids=lambda c: f"{c.kind}-{c.activation}")
def test_cutting_a_sequence_changes_nothing(cells: Cells) -> None:
    """Read in pieces with states carried, a sequence gives what it gives whole; the contract has one state for each."""
    layers = made(cells)
    given = torch.randn(2, 9, 4)
    whole, _ = layers(given)
    first, states = layers(given[:, :4])
    then, _ = layers(given[:, 4:], states)
    torch.testing.assert_close(torch.cat([first, then], 1), whole)
    assert [s.input for s in carried(cells)] == list(names(cells))


@pytest.mark.parametrize("both", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("cells", EVERY, ids=lambda c: f"{c.kind}-{c.activation}")
def test_every_cell_is_exported_as_one_node_a_layer(cells: Cells, both: bool, tmp_path: Path) -> None:
    """What the server's runner computes is what torch computes; gated cells are the same bits batched and cut."""
    torch.manual_seed(0)
    model = digits.Digits(digits.Dims(replace(cells, bidirectional=both))).eval()
    model.layers = made(replace(cells, bidirectional=both), model.dims.width)
    (graph,), (part,) = digits.describe(model).values(), digits.parts(model).values()
    to_onnx.write(graph, part, tmp_path / graph.file)
    proof = verify.verify("step", graph, part, OnnxGraph(graph, tmp_path / graph.file))
    assert proof.error < verify.ABSOLUTE
    assert proof.cut_is_whole is None if both else proof.cut_is_whole is not None
    if cells.kind != "elman":  # onnxruntime's RNN multiplies rows together, and its sums differ with their number
        assert proof.batched_is_alone
        assert proof.cut_is_whole is not False


def gradients(layers: Recurrent, given: Tensor) -> list[float]:
    given = given.clone().requires_grad_()
    read, _ = layers(given)
    read[:, -1].sum().backward()
    assert given.grad is not None
    return given.grad.norm(dim=(0, 2)).tolist()


def test_truncated_back_propagation_stops_where_it_says() -> None:
    """While training, what is read before the last piece gets no gradient, the values stay; in evaluation all is whole."""
    layers = made(replace(SMALL, truncate=4))
    given = torch.randn(2, 10, 4)
    whole = gradients(layers, given)
    layers.train()
    cut = gradients(layers, given)
    assert min(whole) > 0
    assert cut[:8] == [0.0] * 8
    assert cut[8:] == pytest.approx(whole[8:], rel=1e-4)
    torch.testing.assert_close(layers(given)[0], layers.eval()(given)[0])


def test_layers_start_as_configured() -> None:
    """Forget gates, a gain on recurrent matrices, Xavier or orthogonal; an Elman cell has no forget gate to open."""
    lstm = Recurrent(4, replace(SMALL, forget_bias=0.7, gain=2.0))
    bias = lstm.layers.bias_ih_l0 + lstm.layers.bias_hh_l0
    torch.testing.assert_close(bias, torch.tensor([0.0] * 6 + [0.7] * 6 + [0.0] * 12))
    gate = lstm.layers.weight_hh_l0[:6]
    torch.testing.assert_close(gate @ gate.t(), 4 * torch.eye(6))
    xavier = Recurrent(4, replace(SMALL, recurrent="xavier")).layers.weight_hh_l0[:6]
    assert float((xavier @ xavier.t() - torch.eye(6)).abs().max().detach()) > 0.05
    assert float(Recurrent(4, replace(SMALL, kind="elman")).layers.bias_ih_l0.abs().max().detach()) == 0.0


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("kind=mamba", "elman, gru, lstm"),
        ("activation=relu", "tanh, softsign"),
        ("recurrent=zeros", "orthogonal, xavier"),
        ("layers=0", "at least 1"),
        ("truncate=-1", "one direction"),
        ("hiden=3", "known are kind"),
        ("hidden=many", "must be int"),
    ],
)
def test_a_wrong_cell_is_refused_with_what_is_allowed(setting: str, said: str, tmp_path: Path) -> None:
    """The table within the table is checked like the others."""
    with pytest.raises(ConfigError, match=said):
        digits.prepare(config.load("digits", "toy", [f"model.cells.{setting}"]), None, tmp_path)


def test_a_table_within_a_table_survives_being_written_and_read(tmp_path: Path) -> None:
    """The TOML copied beside a result has the cells as they ran."""
    first = config.load("digits", "toy", ["model.cells.kind=gru", "optimiser.l1=0.5"])
    (tmp_path / "config.toml").write_text(first.to_toml(), encoding="utf-8")
    assert config.load("digits", tmp_path / "config.toml") == first
    assert config.section(digits.Dims, first.model, "model").cells.kind == "gru"


FEW = ["digits", "--config", "toy", "--no-progress", "--set", "data.train=256", "--set", "run.epochs=1", "--set", "data.validation=100"]


def test_l1_draws_weights_to_zero_and_clipping_by_value_is_had(tmp_path: Path) -> None:
    """A penalty on absolute values leaves smaller matrices; a gradient may be clipped number by number; else it is refused."""
    runs: dict[str, tuple[str, ...]] = {"plain": (), "l1": ("optimiser.l1=0.01",), "norm": ("run.gradient_clip=0.001",)}
    runs["value"] = (*runs["norm"], "run.gradient_clip_by=value")
    size: dict[str, float] = {}
    for name, settings in runs.items():
        assert command.main([*FEW, *(f"--set={s}" for s in settings), "--out", str(tmp_path / name)]) == 0
        size[name] = sum(float(w.abs().sum()) for w in checkpoint.load(tmp_path / name).weights.values() if w.ndim > 1)
    assert size["l1"] < 0.95 * size["plain"]
    assert len(set(size.values())) == len(runs)
    assert command.main([*FEW, "--set", "run.gradient_clip_by=magic", "--out", str(tmp_path / "no")]) == 1


def test_gradients_fade_grow_and_are_clipped() -> None:
    """Elman cells lose the gradient with the lag, an open forget gate keeps it, large recurrent weights make it grow, and
    clipping bounds what the weights get."""
    found = {name: compare.gradient_by_lag(made_plain(cells)) for name, cells in CELLS.items()}
    share = {name: norms[20] / norms[0] for name, norms in found.items()}
    assert share["elman"] < 1e-2 < share["open"]
    assert share["closed"] < 0.1 * share["open"]
    grown = compare.grown()
    assert grown["Elman × 3"][-1] > 1e3 * grown["Elman × 3"][0] > 1e3 * max(grown["Elman"][-1], 1e-30)
    assert max(grown["Elman × 3, clipped to norm 1"]) <= 1.0 < max(grown["Elman × 3"])


CELLS = {
    "elman": Cells(kind="elman", hidden=24, recurrent="xavier"),
    "open": Cells(hidden=24, recurrent="xavier"),
    "closed": Cells(hidden=24, recurrent="xavier", forget_bias=0.0),
}


def made_plain(cells: Cells) -> Recurrent:
    torch.manual_seed(0)
    return Recurrent(28, cells)


def test_the_comparison_prints_a_table_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two kinds on a tiny task: a row for each, figures as JSON and the picture; a wrong setting is told in a line."""
    tiny = ["cells", "--only", "GRU", "--only", "Elman", "--out", str(tmp_path)]
    tiny += ["--set", "run.epochs=1", "--set", "data.length=4", "--set", "data.train=200", "--set", "data.validation=100"]
    assert compare.main(tiny) == 0
    told = capsys.readouterr().out
    assert "GRU" in told
    assert "Elman" in told
    assert (tmp_path / "cells.png").stat().st_size > 10_000
    assert (tmp_path / "cells.json").is_file()
    assert compare.main([*tiny, "--set", "run.epoch=1"]) == 1
