"""What holds for the forecaster: cutting changes nothing, level changes nothing, quantiles are ordered, and training
sees what serving gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from contract.bundle import Bundle, validate
from export import to_onnx, verify
from server.graph import OnnxGraph
from training import __main__ as command
from training import checkpoint
from training.forecaster import QUANTILES, Dims, Forecaster, calibrate, describe, pinball, ridge
from training.windows import waves

DIMS = Dims(channels=3, lookback=48, horizon=6, hidden=8, dropout=0.0)


@pytest.fixture(scope="module", params=[False, True], ids=["", "regression"])
def model(request: pytest.FixtureRequest) -> Forecaster:
    torch.manual_seed(5)
    made = Forecaster(replace(DIMS, regression=request.param)).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
        made.centre.copy_(torch.tensor([1.0, -20.0, 300.0]))
        made.scale.copy_(torch.tensor([2.0, 0.5, 70.0]))
        if request.param:
            made.share.fill_(0.4)
    return made


def series(rows: int, time: int, seed: int = 0) -> Tensor:
    noise = torch.randn(rows, time, DIMS.channels, generator=torch.Generator().manual_seed(seed))
    return noise.cumsum(1) * torch.tensor([2.0, 0.5, 70.0])


def fresh(rows: int) -> list[Tensor]:
    (graph,) = describe(Forecaster(DIMS)).values()
    return [torch.from_numpy(state.fresh(rows)) for state in graph.states]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(0, 1000))
def test_cutting_a_series_changes_nothing(model: Forecaster, pieces: list[int], seed: int) -> None:
    """A series given in pieces ends in the same forecast and the same states as given whole."""
    values = series(2, sum(pieces), seed)
    with torch.inference_mode():
        whole = model(values, *fresh(2))
        state = fresh(2)
        for piece in torch.split(values, pieces, dim=1):
            mean, quantiles, *state = model(piece, *state)
    for found, wanted in zip((mean, quantiles, *state), whole, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-5)


def test_a_session_that_goes_on_is_not_taken_for_a_fresh_one(model: Forecaster) -> None:
    """In one round, the first observation fills the past of a fresh session and of no other."""
    values = series(2, 5)
    with torch.inference_mode():
        _, _, *states = model(values[:1], *fresh(1))
        (graph,) = describe(model).values()
        both = [torch.cat(pair, s.batch_axis) for pair, s in zip(zip(states, fresh(1), strict=True), graph.states, strict=True)]
        together = model(values, *both)
        alone = model(values[:1], *states), model(values[1:], *fresh(1))
    for n, one in enumerate(alone):
        torch.testing.assert_close(together[0][n], one[0][0])
        torch.testing.assert_close(together[1][n], one[1][0])
    assert together[3].tolist() == [[10], [5]]


def test_training_sees_what_serving_gives(model: Forecaster) -> None:
    """The forecasts that the loss is computed from are those of `forward`, in standardised units."""
    values = series(2, 70)
    positions = torch.tensor([1, 13, 48, 70])
    with torch.inference_mode():
        found = model.at(model.standardise(values), positions)
        for n, position in enumerate(positions.tolist()):
            mean, quantiles, *_ = model(values[:, :position], *fresh(2))
            torch.testing.assert_close(found.mean[:, n], model.standardise(mean), atol=1e-4, rtol=1e-4)
            moved = (quantiles - model.centre[:, None]) / model.scale[:, None]
            torch.testing.assert_close(found.quantiles[:, n], moved, atol=1e-4, rtol=1e-4)


def test_a_shift_of_level_shifts_the_forecast(model: Forecaster) -> None:
    """Adding a constant to all that was observed adds it to all that is forecast; a regression leads back to the level it knows."""
    if model.dims.regression:
        pytest.skip("knows levels")
    values, shift = series(1, 60), torch.tensor([3.0, -7.0, 500.0])
    with torch.inference_mode():
        here, there = model(values, *fresh(1)), model(values + shift, *fresh(1))
    torch.testing.assert_close(here[0] + shift, there[0], atol=2e-2, rtol=1e-4)
    torch.testing.assert_close(here[1] + shift[:, None], there[1], atol=2e-2, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 1e3))
def test_quantiles_never_cross(model: Forecaster, seed: int, size: float) -> None:
    """Each quantile is at least the one below it, however wild the series."""
    with torch.inference_mode():
        _, quantiles, *_ = model(series(2, 30, seed) * size, *fresh(2))
    assert (quantiles.diff(dim=-1) >= -1e-5 * quantiles.abs().max()).all()


def test_pinball_is_least_at_the_quantiles() -> None:
    """Of all constant forecasts the loss prefers the quantiles of what happens."""
    truth = torch.linspace(0, 1, 1001)
    best = torch.tensor(QUANTILES).expand(1001, -1)
    least = pinball(best, truth)
    for moved in (-0.05, 0.05):
        assert pinball(best + moved, truth) > least


def test_the_width_is_set_to_cover_what_is_promised(model: Forecaster) -> None:
    """After calibration 80 % of the values it was made on lie between the outer deciles."""
    data = waves(400, DIMS.channels, 1)
    values = model.standardise(torch.from_numpy(data.values) * 10)
    batches = [values[n : n + 54][None] for n in range(0, 340, 4)]
    torch.manual_seed(0)
    made = Forecaster(model.dims).eval()
    made.load_state_dict(model.state_dict())
    with torch.inference_mode():
        made.width.copy_(torch.tensor(calibrate(made, batches)))
        inside = [made.at(b[:, :48], torch.tensor([48])).quantiles for b in batches]
        share = np.mean([
            float(((b[:, None, 48:] >= q[..., 0]) & (b[:, None, 48:] <= q[..., -1])).float().mean())
            for q, b in zip(inside, batches, strict=True)
        ])  # fmt: skip
    assert share == pytest.approx(0.8, abs=0.01) or made.width == pytest.approx(4.0, rel=1e-3)


def test_the_regression_reads_each_channel_by_its_own_map(tmp_path: Path) -> None:
    """A channel's part of the mean is its own window times its own map, and nothing of another channel; exported too, where it is
    computed another way, which keeps batched = alone."""
    torch.manual_seed(3)
    made = Forecaster(replace(DIMS, regression=True)).eval()
    with torch.inference_mode():
        made.regression.normal_()
        made.share.fill_(0.0)
        window = torch.randn(2, 3, DIMS.lookback)
        mean = made.forecast(torch.zeros(2, 3, DIMS.hidden), window).mean
        alone = [window[:, c] @ made.regression[c] for c in range(3)]
    torch.testing.assert_close(mean, torch.stack(alone, -1), atol=1e-4, rtol=1e-4)
    (graph,) = describe(made).values()
    to_onnx.write(graph, made, tmp_path / graph.file)
    proof = verify.verify("forecaster", graph, made, OnnxGraph(graph, tmp_path / graph.file))
    assert proof.batched_is_alone
    assert proof.cut_is_whole


def test_ridge_finds_the_map_there_is() -> None:
    """Of values made by a linear map the solution is that map; a penalty makes it smaller."""
    random = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 5, 3, generator=random, dtype=torch.float64)
    past = torch.randn(200, 5, 2, generator=random, dtype=torch.float64)
    ahead = torch.einsum("nlc,clh->nhc", past, maps)
    torch.testing.assert_close(ridge(past, ahead, 1e-9), maps)
    assert ridge(past, ahead, 1e3).norm() < 0.5 * maps.norm()


def test_the_share_is_chosen_by_the_validation_months(tmp_path: Path) -> None:
    """A run with a regression ends with a smaller squared error on the validation months than its LSTM alone has, with the scores of
    both together in its checkpoint."""
    few = ["--config", "toy", "--no-progress", "--set", "run.epochs=1", "--set", "data.sessions=64", "--set", "model.regression=true"]
    assert command.main(["forecaster", *few, "--out", str(tmp_path)]) == 0
    alone = json.loads((tmp_path / "history.jsonl").read_text().splitlines()[-1])
    kept = checkpoint.load(tmp_path)
    assert kept.scores["validation_mse"] < alone["validation_mse"]
    assert kept.scores.keys() == {name for name in alone if name.startswith("validation_")}
    assert json.loads((tmp_path / "scores.json").read_text())["scores"] == kept.scores
    assert 0 <= float(kept.weights["share"]) < 1


def test_the_contract_can_be_served(model: Forecaster) -> None:
    """bundle.py finds no fault in the described graph."""
    assert validate(Bundle("forecaster", describe(model), "forecaster", {"kind": "forecast"})) == []
