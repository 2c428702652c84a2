"""A training run as data: one TOML file, checked, changeable from the command line, copied beside the result.

It knows the sections every run has; `model`, `data` and `init` are left to the task's own file, which reads them with `section`.
It must not know torch or any model.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

CONFIGS = Path(__file__).parent / "configs"
T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that can't be run; the message says which key and what is allowed."""


@dataclass(frozen=True, slots=True)
class Optimiser:
    kind: str = "adam"  # adam, adamw, rmsprop, adagrad, nesterov
    lr: float = 1e-3
    weight_decay: float = 0.0  # on matrices only: biases are left alone; L2, which adamw keeps out of its moments
    l1: float = 0.0  # times the sum of the matrices' absolute values, added to what is minimised, not to the loss told
    momentum: float = 0.9  # rmsprop and nesterov
    betas: tuple[float, float] = (0.9, 0.999)  # adam and adamw


@dataclass(frozen=True, slots=True)
class Schedule:
    kind: str = "constant"  # constant, cosine, plateau
    warmup: int = 0  # optimiser steps of linear rise, for every kind but plateau
    floor: float = 0.0  # cosine: the share of lr it ends at
    factor: float = 0.5  # plateau: multiply lr by this ...
    patience: int = 1  # ... after so many validations without gain


@dataclass(frozen=True, slots=True)
class Run:
    epochs: int = 10
    patience: int = 3  # validations without gain before the run stops early
    validate_every: float = 1.0  # in epochs; below 1 several times an epoch
    gradient_clip: float = 1.0  # largest norm of the whole gradient, or value of each of its numbers; 0 leaves it
    gradient_clip_by: str = "norm"  # norm, value
    accumulate: int = 1  # batches per optimiser step
    average: float = 0.0  # decay of a moving average of the weights, which is then what is scored and kept; 0: none
    max_minutes: float = 0.0  # stop after so long; 0: no limit
    accelerator: str = "auto"
    devices: int | str = 1
    num_nodes: int = 1
    strategy: str = "auto"
    local_steps: int = 0  # local SGD: steps that each process makes alone between averages of the weights; 0: average gradients
    precision: str = "32-true"
    threads: int = 0  # torch's intra-op threads; 0 leaves its default
    workers: int = 0  # processes that load data


@dataclass(frozen=True, slots=True)
class Cells:
    """Recurrent layers: the section `model.cells` of every model whose Dims has such a field; built by cells.py."""

    kind: str = "lstm"  # elman, gru, lstm
    hidden: int = 128
    layers: int = 1
    activation: str = "tanh"  # tanh, softsign; gates are sigmoids always
    bidirectional: bool = False  # only where a sequence is there as a whole: it can't be served in pieces
    forget_bias: float = 1.0  # lstm
    recurrent: str = "orthogonal"  # orthogonal, xavier: what recurrent matrices start as; those of inputs start as xavier
    gain: float = 1.0  # recurrent matrices start so many times as large
    dropout: float = 0.0  # between layers, and on what the last gives
    truncate: int = 0  # back-propagate through so many steps at a time; 0: through all


@dataclass(frozen=True, slots=True)
class Config:
    """Everything that decides a run, beside the data themselves and the code's revision."""

    task: str
    seed: int = 1
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    init: Mapping[str, Any] = field(default_factory=dict)  # what weights start from, where a task knows more than random numbers
    optimiser: Optimiser = field(default_factory=Optimiser)
    schedule: Schedule = field(default_factory=Schedule)
    run: Run = field(default_factory=Run)

    def plain(self) -> dict[str, Any]:
        """The configuration as nested dicts of plain values; `init` only where it says something, its paths for any machine."""
        plain = {key: value for key, value in asdict(self).items() if value or key != "init"}
        if self.init:
            plain["init"] = {key: portable(value) for key, value in self.init.items()}
        return plain

    def to_toml(self) -> str:
        sections = self.plain()
        lines = [f"{key} = {_toml(value)}" for key, value in sections.items() if not isinstance(value, dict)]
        for name, table in sections.items():
            if isinstance(table, dict):
                lines += _table(name, table)
        return "\n".join(lines) + "\n"


def portable(path: Any) -> Any:
    """An absolute path as runs/ and its last part, as directories of one machine mean nothing on another."""
    return f"runs/{Path(path).name}" if isinstance(path, str) and Path(path).is_absolute() else path


def load(task: str, name: str | Path | None = None, settings: Iterable[str] = ()) -> Config:
    """The configuration of a task: its own default, a named variant of it (`toy`), or a file; then `key=value` settings
    such as "run.epochs=3". Raises ConfigError."""
    file = CONFIGS / f"{task}.toml" if name is None else Path(name)
    if not file.is_file():
        file = CONFIGS / f"{task}-{name}.toml"
    if not file.is_file():
        known = sorted(f.stem.removeprefix(task).lstrip("-") or "(none)" for f in CONFIGS.glob(f"{task}*.toml"))
        raise ConfigError(f"no configuration {name!r} of {task}: give a file or one of {', '.join(known) or 'none yet'}")
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:  # not UTF-8, or not TOML
        raise ConfigError(f"{file} is not TOML: {e}") from None
    for setting in settings:
        _set(document, setting)
    return parse({"task": task, **document}, task)


def parse(document: Mapping[str, Any], task: str | None = None) -> Config:
    """A Config from decoded TOML. Raises ConfigError on unknown keys, wrong types or another task's file."""
    if task is not None and document.get("task", task) != task:
        raise ConfigError(f"this configuration is for {document['task']!r}, not for {task!r}")
    parts = {key: section(kind, document.get(key, {}), key) for key, kind in _SECTIONS.items()}
    return section(Config, {**document, **parts}, "configuration")


def section(kind: type[T], table: Mapping[str, Any], name: str) -> T:
    """One dataclass from one table; a field that is a `Cells` from a table within. Raises ConfigError naming every unknown
    key."""
    if not isinstance(table, Mapping):
        raise ConfigError(f"{name} must be a table")
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]  # every caller gives a dataclass
    if unknown := sorted(table.keys() - known.keys()):
        raise ConfigError(f"{name}: unknown {', '.join(unknown)}; known are {', '.join(known)}")
    values: dict[str, Any] = {}
    for key, value in table.items():
        form = str(known[key].type)
        if form == "float" and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if form in _PLAIN and (not isinstance(value, _PLAIN[form]) or (isinstance(value, bool) and form != "bool")):
            raise ConfigError(f"{name}.{key}: must be {form}, got {value!r}")
        if form in _NESTED and not isinstance(value, _NESTED[form]):
            value = section(_NESTED[form], value, f"{name}.{key}")
        low = 0 if known[key].default in (0, MISSING) or key in _FROM_0 else 1
        if form == "int" and value < low and kind is not Cells:  # which cells.py looks at
            raise ConfigError(f"{name}.{key}: must be at least {low}, got {value}")
        if key.endswith("dropout") and not 0 <= value < 1:
            raise ConfigError(f"{name}.{key}: must be from 0 to below 1, got {value}")
        values[key] = tuple(value) if isinstance(value, list) else value
    try:
        return kind(**values)
    except TypeError as e:
        raise ConfigError(f"{name}: {e}") from None


_SECTIONS: Mapping[str, type[Any]] = {"optimiser": Optimiser, "schedule": Schedule, "run": Run}
_NESTED: Mapping[str, type[Any]] = {"Cells": Cells}
_FROM_0 = ("seed", "patience", "noise")
"""Whole numbers that may be 0 though they are not unless somebody says so."""
_PLAIN: Mapping[str, type | tuple[type, ...]] = {"int": int, "float": float, "str": str, "bool": bool}


def _set(document: dict[str, Any], setting: str) -> None:
    """Apply one "section.key=value"; the value is TOML, or a bare word."""
    path, equals, text = setting.partition("=")
    if not equals:
        raise ConfigError(f"--set {setting}: write key=value, such as run.epochs=3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *tables, key = path.strip().split(".")
    for table in tables:
        document = document.setdefault(table, {})
        if not isinstance(document, dict):
            raise ConfigError(f"--set {setting}: {table} is not a section")
    document[key] = value


def _table(name: str, table: Mapping[str, Any]) -> list[str]:
    """A table, then the tables within it, as TOML wants them."""
    lines = ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items() if not isinstance(value, dict))]
    return lines + [line for key, value in table.items() if isinstance(value, dict) for line in _table(f"{name}.{key}", value)]


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)  # strings, whole numbers and booleans are spelled the same in both
