"""Training in lanes: each chunk goes on from the state that the one before left, without its gradient (truncated
backpropagation through time).

It knows the state's life; it must not know what is read or what the loss is.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor
from torch.nn import Module

from training.config import Config, ConfigError
from training.loop import Training

State = tuple[Tensor, Tensor]
"""h and c, each [layers, rows, hidden]."""


class Reader(Protocol):
    """A model that reads a chunk from a state."""

    def zero(self, rows: int) -> State: ...

    def __call__(self, given: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


class CarriedTraining(Training):
    """The state of each lane lives here between chunks; it is zero where a document begins, an epoch or a validation."""

    def __init__(self, model: Module, dims: dict[str, Any], config: Config) -> None:
        super().__init__(model, dims, config)
        if config.run.devices not in (1, "1", "auto") or config.run.num_nodes != 1:
            raise ConfigError("run.devices and run.num_nodes: 1 here, as each chunk goes on from the state of the one before")
        self._state: State | None = None

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._state = None

    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._trained, self._state = self._state, None

    def on_validation_end(self) -> None:
        super().on_validation_end()
        self._state = self._trained  # a validation may come in the middle of an epoch

    def carry(self, model: Reader, given: Tensor, fresh: Tensor) -> Tensor:
        """What the model makes of a chunk [rows, time, …]; `fresh` [rows]: whose lane begins a document."""
        h, c = model.zero(len(given)) if self._state is None else self._state
        gone_on = (~fresh).to(h.dtype)[None, :, None]
        made, h, c = model(given, h * gone_on, c * gone_on)
        self._state = h.detach().float(), c.detach().float()
        return made
