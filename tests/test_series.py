"""What `make series` compares with: autoregressions as statsmodels makes them, the competition's measures, a window
perceptron that is served by plain tensors."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export import bundling
from seqserve import Client
from tests.figures import series_page
from tests.figures.series import Comparison, Found
from tests.process import serve
from training import __main__ as train
from training import baselines, config, windows
from training.data import DataError, m4, univariate
from training.forecaster import Dims, Forecaster
from training.window_mlp import Dims as WindowDims
from training.window_mlp import WindowMlp


def walk(rows: int, seed: int = 0) -> np.ndarray:
    """An AR(2) with a cycle."""
    rng = np.random.default_rng(seed)
    made = np.zeros(rows + 50)
    for t in range(2, rows + 50):
        made[t] = 1 + 1.5 * made[t - 1] - 0.8 * made[t - 2] + rng.normal()
    return made[50:]


def test_autoregressions_forecast_as_statsmodels_does() -> None:
    """Many windows at once, and their error's growth, are what statsmodels gives for one series."""
    from statsmodels.tsa.ar_model import AutoReg

    series = walk(400)
    told = AutoReg(series, 5).fit().get_prediction(400, 419)
    model = baselines.fit(series, 5)
    np.testing.assert_allclose(baselines.roll(model, np.stack([series, series]), 20)[1], told.predicted_mean)
    np.testing.assert_allclose(baselines.spread(model, 20), told.se_mean)


def test_the_best_order_is_found_and_none_will_do() -> None:
    """Akaike's criterion finds at least the lags that made a series; noise alone may have none, and its mean is forecast."""
    assert 2 <= baselines.fit_best(walk(2000), 8).order <= 8
    flat = baselines.Autoregression(3.0, np.zeros(0), 2.0)
    assert baselines.roll(flat, np.ones((2, 4)), 3).tolist() == [[3.0] * 3] * 2
    assert baselines.spread(flat, 3).tolist() == [2.0] * 3


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 25))
def test_the_naive_forecast_repeats_the_last_season(season: int, ahead: int) -> None:
    """Each value is that of a whole number of seasons before."""
    past = np.arange(20.0)[None]
    found = baselines.seasonal(past, season, ahead)[0]
    assert [20 - season + step % season for step in range(ahead)] == found.tolist()


def test_the_competition_is_measured_as_it_was() -> None:
    """sMAPE and MASE of worked cases; as good as Naive2 is an overall average of 1."""
    truth, found = np.array([[100.0, 50.0]]), np.array([[50.0, 50.0]])
    assert m4.smape(truth, found) == pytest.approx(200 * 50 / 150 / 2)
    assert m4.mase((np.array([0.0, 1.0, 4.0, 5.0]),), truth, found, season=2) == pytest.approx(25 / 4)
    assert m4.owa(*m4.NAIVE2) == pytest.approx(1)


def test_damaged_series_are_refused(tmp_path: Path) -> None:
    """A file that is not the published one is told, and so is a series there is not."""
    (tmp_path / "monthly-sunspots.csv").write_text('"Month","Sunspots"\n"1749-01",58.0\n')
    (tmp_path / "Hourly-train.csv.gz").write_bytes(gzip.compress(b'"V1","V2"\n"H1","605"\n'))
    with pytest.raises(DataError, match="damaged"):
        univariate.load("monthly-sunspots", tmp_path)
    with pytest.raises(DataError, match="damaged"):
        m4.load(tmp_path)
    with pytest.raises(DataError, match="airline-passengers"):
        univariate.load("rabbits", tmp_path)
    with pytest.raises(config.ConfigError, match="waves"):
        windows.load("tides", "", None, 0)


@pytest.mark.parametrize("season", [3, 6, 12, 24, 48])
def test_the_forecaster_sees_seasons_of_other_lengths(season: int) -> None:
    """The running means that it is fed are those of one season, ending now and a season ago."""
    model = Forecaster(Dims(channels=1, lookback=2 * season, horizon=4, hidden=4, season=season))
    series = torch.randn(1, 2 * season + 20, 1, generator=torch.Generator().manual_seed(1))
    before, values = series[:, : 2 * season], series[:, 2 * season :]
    found = model.features(before, values)[0, :, 0]
    flat = series[0, :, 0]
    for step in range(20):
        now = 2 * season + step
        mean, past = flat[now - season + 1 : now + 1].mean(), flat[now - 2 * season + 1 : now - season + 1].mean()
        wanted = torch.stack([flat[now] - flat[now - 1], flat[now] - flat[now - season], flat[now] - mean, mean - past])
        torch.testing.assert_close(found[step], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("wrong", ["model.season=10", "model.season=48"])
def test_a_season_that_does_not_fit_is_refused(wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not three times a power of two, or more than half of the look-back."""
    assert train.main(["forecaster", "--config", "toy", "--set", wrong, "--out", str(tmp_path)]) == 1
    assert "season" in capsys.readouterr().err


def test_the_perceptron_begins_as_the_last_value_and_follows_a_shift() -> None:
    """Before training it says that the newest value stays; afterwards a shift of level shifts what it says."""
    model = WindowMlp(WindowDims(channels=2, lookback=6, horizon=3, hidden=4)).eval()
    window = torch.randn(5, 6, 2, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(model(window)[0], window[:, -1:].expand(-1, 3, -1))
    with torch.no_grad():
        model.tell.weight.normal_()
    torch.testing.assert_close(model(window + 7)[0], model(window)[0] + 7, atol=1e-4, rtol=1e-4)


def test_the_perceptron_is_trained_exported_and_served(tmp_path: Path) -> None:
    """One command trains, one exports with batched = alone proved; the server answers plain tensors, each as if alone."""
    assert train.main(["window_mlp", "--config", "toy", "--no-progress", "--set", "run.epochs=2", "--out", str(tmp_path / "run")]) == 0
    made = bundling.export(tmp_path / "run", tmp_path / "models" / "window_mlp" / "1")
    assert (made.kind, made.verified["window_mlp"]["batched_is_alone"]) == ("tensors", True)
    many = np.random.default_rng(0).normal(10, 3, (5, 48, 3)).astype(np.float32)
    with serve(tmp_path / "models") as server, Client(f"localhost:{server.port}") as client:
        together = client.infer("window_mlp", {"window": many})["mean"]
        alone = [client.infer("window_mlp", {"window": one[None]})["mean"][0] for one in many]
    assert together.shape == (5, 24, 3)
    assert together.tobytes() == np.stack(alone).tobytes()


def test_the_page_shows_who_is_best(tmp_path: Path) -> None:
    """The least error is in bold, coverage never is; only what lies between the marks is written anew."""
    line = np.arange(4.0)
    drawn = {"AR(p)": Found(line), "forecaster": Found(line, line - 1, line + 1)}
    rows: dict[str, tuple[float | None, ...]] = {"AR(p)": (1.0, 50.0), "forecaster": (2.0, None)}
    c = Comparison("waves", "4 steps", ("MSE", "80 % covers"), rows, {"AR(p)": "p 2"}, past=line, truth=line, drawn=drawn)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{series_page.BEGIN}\nold\n{series_page.END}\nafter\n")
    series_page.write([c], page, tmp_path / "images" / "series.png")
    text = page.read_text()
    assert "| AR(p), p 2 | **1.000** | 50.0 |\n| forecaster | 2.000 |  |" in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert (tmp_path / "images" / "series.png").stat().st_size > 1000
    assert Found(line, line - 1, line + 1).covered(line + np.array([0, 0, 0, 2])) == 75.0
