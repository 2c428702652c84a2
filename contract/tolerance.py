"""How far answers may be from those that a bundle was verified with: what its `verified` states, and whether two answers are so near.

The exporter writes it (export/verify.py): where a graph was compared with PyTorch, absolute and relative for each value; where it
is in another precision than it was trained in, relative for each tensor, by norms. A bundle that states nothing is held to what
the exporter asks of float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

ABSOLUTE, RELATIVE = 2e-5, 1e-4

Array = np.ndarray[Any, Any]


def allowed(verified: Mapping[str, Any], graph: str) -> Mapping[str, float]:
    """What a bundle states for a graph: `absolute` and `relative`, or `relative_norm`."""
    about = verified.get(graph)
    stated = about.get("allowed") if isinstance(about, Mapping) else None
    if not isinstance(stated, Mapping) or not all(isinstance(v, int | float) for v in stated.values()):
        stated = {}
    if "relative_norm" in stated or {"absolute", "relative"} <= set(stated):
        return {str(k): float(v) for k, v in stated.items()}
    return {"absolute": ABSOLUTE, "relative": RELATIVE}


def excess(one: Array, other: Array, stated: Mapping[str, float]) -> float:
    """The largest difference of `one` from `other`, by what is allowed of it: up to 1 is near enough, infinity is no number. Whole
    numbers are not compared: they may be ranks, and near ties change places."""
    if other.dtype.kind != "f" or not other.size:
        return 0.0
    a, b = one.astype(np.float64), other.astype(np.float64)
    off = np.abs(a - b)
    if not np.isfinite(off).all():
        return 0.0 if np.array_equal(a, b, equal_nan=True) else float("inf")
    if "relative_norm" in stated:
        return float(np.linalg.norm(off)) / ((float(np.linalg.norm(b)) or 1.0) * stated["relative_norm"])
    return float((off / (stated["absolute"] + stated["relative"] * np.abs(b))).max())
