"""Frozen dataclasses ↔ JSON objects, with every fault of form told at once.

This file knows field names and annotations; it must not know what they mean (bundle.py does).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

FORMS: Mapping[str, tuple[type, ...]] = {
    "str": (str,), "int": (int,), "float": (int, float), "bool": (bool,),
    "float | None": (int, float, type(None)), "tuple[Axis, ...]": (list, tuple),
    "tuple[Tensor, ...]": (tuple,), "tuple[State, ...]": (tuple,),
    "Mapping[str, Graph]": (dict,), "Mapping[str, Any]": (dict,), "Mapping[str, str]": (dict,),
}  # fmt: skip


def build(kind: type, item: Any, at: str, faults: list[str]) -> Any:
    """One dataclass from one JSON object: unknown, missing and ill-typed keys are faults, all of them."""
    if not isinstance(item, dict):
        faults.append(f"{at}: must be an object")
        return None
    known = {f.name: f for f in fields(kind)}
    before = len(faults)
    for key in item.keys() - known.keys():
        faults.append(f"{at}: unknown key {key!r}; known are {', '.join(known)}")
    values: dict[str, Any] = {}
    for key, f in known.items():
        if key not in item:
            if _required(f):
                faults.append(f"{at}: {key!r} is missing")
            continue
        form = FORMS[str(f.type)]
        value: Any = item[key]
        fits: bool = isinstance(value, form)
        if not fits or (isinstance(value, bool) and bool not in form):
            faults.append(f"{at}.{key}: must be {' or '.join(t.__name__ for t in form if t is not tuple)}, got {value!r}"[:300])
            continue
        if f.type == "tuple[Axis, ...]":
            if not all(isinstance(a, str | int) and not isinstance(a, bool) for a in value):
                faults.append(f"{at}.{key}: each must be a name or a number, got {value!r}")
                continue
            value = tuple(value)
        if f.type == "Mapping[str, str]" and not all(isinstance(v, str) for v in value.values()):
            faults.append(f"{at}.{key}: each must be a text, got {value!r}"[:300])
            continue
        values[key] = value
    return kind(**values) if len(faults) == before else None


def plain(value: Any) -> Any:
    """Dataclasses as JSON objects; what is at its default is left out, but for what a reader looks for first."""
    if hasattr(value, "__dataclass_fields__"):
        kept = {f.name: getattr(value, f.name) for f in fields(value) if _required(f) or f.name in _SHOWN or not _default(f, value)}
        return {key: plain(inner) for key, inner in kept.items()}
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


_SHOWN = {"format", "task", "fingerprint"}


def _required(f: Field[Any]) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _default(f: Field[Any], value: Any) -> bool:
    return getattr(value, f.name) in (f.default, {}, ())
