"""The result of a training run in one file: the best weights and all that is needed to know where they come from.

    kept = checkpoint.load("runs/sentiment/checkpoint.pt")
    model = Sentiment(Dims(**kept.dims))
    model.load_state_dict(kept.weights)

Apart from this, Lightning keeps its own `last.ckpt` (optimiser, schedule, random states) to resume from. This file must
not know any model.
"""

from __future__ import annotations

import pickle
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FILE = "checkpoint.pt"
FORMAT = 1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Best weights of a run, on the CPU, with their origin."""

    task: str
    dims: Mapping[str, Any]  # plain values, to build the model from
    weights: Mapping[str, Tensor]
    scores: Mapping[str, float]  # on the validation set, at these weights
    config: Mapping[str, Any]
    epoch: int
    step: int
    command: str
    revision: str | None  # git commit of the code, with "+" where files differed from it

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.weights.values())


def save(kept: Checkpoint, file: Path) -> None:
    """Write by rename, so that an interrupted run leaves the former best whole."""
    part = file.with_name(file.name + ".part")
    document = {name: getattr(kept, name) for name in kept.__slots__}
    document["weights"] = {name: t.detach().cpu().clone() for name, t in kept.weights.items()}
    torch.save({"format": FORMAT, **{k: dict(v) if isinstance(v, Mapping) else v for k, v in document.items()}}, part)
    part.replace(file)


def load(file: Path | str) -> Checkpoint:
    """Read a checkpoint; nothing in it is executed. A run's directory will do. Raises FileNotFoundError, ValueError."""
    file = Path(file)
    if file.is_dir():
        file = file / FILE
    try:
        document = torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise ValueError(f"{file} is cut short, damaged or no checkpoint: train again, or copy it anew ({str(e).split('. ')[0]})") from None
    if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
        raise ValueError(f"{file} is no checkpoint of this release (format {FORMAT})")
    return Checkpoint(**document)


def revision(directory: Path | None = None) -> str | None:
    """The git commit of the code, "+" appended where tracked files differ from it; None outside a repository."""
    where = directory or Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=where, capture_output=True, text=True, check=False, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return commit + ("+" if git("status", "--porcelain") else "") if commit else None
