"""What can be trained, and what the file of each model offers to the loop and to export.

Files are imported only when their task is asked for. It must not know what is inside them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from torch import nn

from contract.bundle import Graph
from training.config import Config
from training.loop import Training

TASKS: Mapping[str, str] = {
    "sentiment": "training.sentiment",
    "pretrain": "training.pretrain",  # what sentiment can start from; never exported
    "translator": "training.translator",
    "forecaster": "training.forecaster",
    "window_mlp": "training.window_mlp",
    "charlm": "training.charlm",
    "digits": "training.digits",
    "tagger": "training.tagger",
}


@dataclass(frozen=True, slots=True)
class About:
    """What a model card says that no run can know."""

    title: str
    use: str  # what it is for, and what it is not
    data: str
    licence: str
    design: str
    limits: str


class Task(Protocol):
    """A model's file, seen as a whole: these are functions and constants of the module, beside its Dims and nn.Module."""

    ABOUT: About

    def prepare(self, config: Config, data: Path | None, out: Path) -> Training:
        """Load the data (under `data`, else from their official address), save the vocabulary and the like into `out`,
        build the model. Random numbers are seeded already."""

    def rebuild(self, dims: Mapping[str, Any]) -> nn.Module:
        """The model of a checkpoint's `dims`, in eval mode, weights not loaded."""

    def describe(self, model: nn.Module) -> Mapping[str, Graph]:
        """The contract of each graph to be exported; the first is the bundle's main graph unless `task` names "main"."""

    def parts(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """For each graph a module whose forward takes tensors in the contract's order (inputs, then states) and returns
        a tuple of them (outputs, then next states)."""

    def task(self, model: nn.Module, run: Path) -> Mapping[str, Any]:
        """The `task` object of bundle.json; `run` is the directory of the training run."""

    def resources(self, run: Path) -> Mapping[str, Path]:
        """Resource name → file in the run's directory; each is copied into the bundle under its own file name."""


def find(name: str) -> Task:
    """The file of a task. Raises KeyError where there is no such task."""
    return cast(Task, importlib.import_module(TASKS[name]))
