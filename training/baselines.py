"""What a forecaster must beat: the last season again, and autoregressions (Box & Jenkins 1970).

statsmodels fits; the forecasts of many windows are made here at once, for its own are made one by one. It must not know
data sets or neural models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Autoregression:
    """y[t] = constant + Σ weights[n] · y[t - 1 - n] + noise of standard deviation `deviation`."""

    constant: float
    weights: Array
    deviation: float

    @property
    def order(self) -> int:
        return len(self.weights)


def fit(series: Array, order: int) -> Autoregression:
    """AR(order) with a constant, by conditional least squares; series [time]."""
    from statsmodels.tsa.ar_model import AutoReg  # a second to import

    return _of(AutoReg(series, order).fit())


def fit_best(series: Array, most: int) -> Autoregression:
    """AR(p) with the p from 0 to `most` that has the lowest Akaike criterion."""
    from statsmodels.tsa.ar_model import ar_select_order

    return _of(ar_select_order(series, most, ic="aic").model.fit())


def _of(fitted: Any) -> Autoregression:
    return Autoregression(float(fitted.params[0]), np.asarray(fitted.params[1:], np.float64), float(np.sqrt(fitted.sigma2)))


def roll(model: Autoregression, past: Array, ahead: int) -> Array:
    """Forecasts fed back; past [rows, time], at least the order's time, oldest first → [rows, ahead]."""
    order = model.order
    known = np.concatenate([past[:, past.shape[1] - order :], np.zeros((len(past), ahead))], 1)
    for step in range(ahead):
        known[:, order + step] = model.constant + known[:, step : step + order] @ model.weights[::-1]
    return known[:, order:]


def spread(model: Autoregression, ahead: int) -> Array:
    """Standard deviation of the forecast's error at each step, [ahead]: the noise so far, each through the moving-average
    weight that it has by then."""
    answer = np.zeros(model.order + ahead)  # to one unit of noise, after `order` zeros
    answer[model.order] = 1.0
    for step in range(1, ahead):
        answer[model.order + step] = answer[step : step + model.order] @ model.weights[::-1]
    reached: Array = model.deviation * np.sqrt(np.cumsum(answer[model.order :] ** 2))
    return reached


def seasonal(past: Array, season: int, ahead: int) -> Array:
    """The newest season again and again; past [rows, time] → [rows, ahead]. A season of 1 repeats the last value."""
    return np.tile(past[:, past.shape[1] - season :], -(-ahead // season))[:, :ahead]
