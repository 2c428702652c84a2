"""A series → its continuation, with quantiles."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from server.engine import Engine
from server.errors import InvalidInput, ServeError, listed
from server.inputs import Array, Sizes, check
from server.sequence import Outputs, Sequence
from server.shares import ANYONE, Claim


@dataclass(frozen=True, slots=True)
class Forecasted:
    """mean [horizon, channels], and [horizon, channels] for each quantile asked for, in raw units."""

    mean: Array
    quantiles: tuple[tuple[float, Array], ...]


class Forecaster:
    """Reads observations step by step and continues them. Tensors: the one input [batch, time, channels] → mean
    [batch, horizon, channels], quantiles [batch, horizon, channels, quantiles]."""

    def __init__(self, engine: Engine, directory: Path) -> None:
        self._engine = engine
        task = engine.bundle.task
        self.channels: tuple[str, ...] = tuple(str(c) for c in task["channels"])
        (self._input,) = (t.name for t in engine.bundle.graph.data)
        self.horizon = int(task["horizon"])
        self.lookback = int(task["lookback"])
        self.quantiles: tuple[float, ...] = tuple(float(q) for q in task["quantiles"])

    def start(
        self, observations: Array, horizon: int, quantiles: Listed[float], then: Callable[[Sequence, Forecasted], None],
        failed: Callable[[ServeError], None], claim: Claim = ANYONE,
    ) -> Sequence:  # fmt: skip
        """Queue one series, float32 [steps, channels]; horizon 0 and no quantiles mean all the model gives. Raises
        InvalidInput where the model has no such horizon, quantile or number of channels, or a quantile is asked for twice."""
        inputs, sizes, result = self.plan(observations, horizon, quantiles)
        sequence = Sequence(self._engine.bundle.main, inputs, sizes, lambda s, outputs: then(s, result(outputs)), failed)
        self._engine.submit(sequence, claim)
        return sequence

    def plan(
        self, observations: Array, horizon: int, quantiles: Listed[float]
    ) -> tuple[dict[str, Array], Sizes, Callable[[Outputs], Forecasted]]:
        """What to run, and what to make of it; raises as `start`."""
        steps = horizon or self.horizon
        if not 1 <= steps <= self.horizon:
            raise InvalidInput(
                "BAD_HORIZON", f"horizon {steps}; allowed are 1 to {self.horizon} steps", expected=f"1..{self.horizon}", got=steps
            )
        places = self._places(quantiles) if quantiles else list(range(len(self.quantiles)))
        inputs = {self._input: observations[None]}
        sizes = check(self._engine.bundle.graph, inputs, 1)

        def result(outputs: Outputs) -> Forecasted:
            values = outputs["quantiles"][0, :steps]
            chosen = tuple((self.quantiles[p], values[..., p]) for p in places)
            return Forecasted(outputs["mean"][0, :steps], chosen)

        return inputs, sizes, result

    def _places(self, quantiles: Listed[float]) -> list[int]:
        """Where in the model's outputs they are: each once, so that no answer outgrows what the model gives."""
        places: list[int] = []
        for quantile in quantiles:
            place = self._place(quantile)
            if place in places:
                message = f"quantile {self.quantiles[place]:g} is asked for twice; ask for it once"
                raise InvalidInput("REPEATED_QUANTILE", message, got=self.quantiles[place])
            places.append(place)
        return places

    def _place(self, quantile: float) -> int:
        distance = np.abs(np.array(self.quantiles) - quantile)
        if not distance.min() < 1e-6:  # float32 on the wire; NaN is no quantile either
            raise InvalidInput(
                "UNKNOWN_QUANTILE", f"quantile {quantile:g} is not one of the model's: {listed(self.quantiles)}",
                expected=listed(self.quantiles), got=quantile,
            )  # fmt: skip
        return int(distance.argmin())
