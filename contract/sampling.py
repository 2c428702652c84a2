"""How the next symbol is drawn from a model's logits, the same wherever a text is generated.

It knows numbers only: neither vocabularies nor models nor who asks. What is drawn depends on the logits, the caller's
wishes and the caller's seed, and on nothing else, so a text can be had again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Manner:
    """How symbols are drawn. `temperature` divides the logits, 0 takes the likeliest; `top_k` leaves the so many likeliest
    to draw from, 0 all."""

    temperature: float = 1.0
    top_k: int = 0


class Chance:
    """Uniform numbers of one text, from its seed alone.

    Taken from the bit generator itself, whose stream numpy promises to keep the same over releases; `Generator.random`
    has no such promise.
    """

    __slots__ = ("_bits",)

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def next(self) -> float:
        """The next number in [0, 1)."""
        return float((int(self._bits.random_raw()) >> 11) * 2.0**-53)


def draw(logits: Array, manner: Manner, chance: Chance, never: Sequence[int] = ()) -> tuple[int, float]:
    """A symbol from logits float32 [vocabulary], and its natural log probability by the model itself, before temperature
    and top_k; `never` are symbols that must not come. One number of `chance` is used whatever the manner.

    In float64, and the cumulative sum in the vocabulary's order: the same logits give the same symbol, bit for bit.
    """
    scores = logits.astype(np.float64)
    if len(never):
        scores[list(never)] = -np.inf
    at = chance.next()
    shifted = scores - scores.max()
    total = np.log(np.exp(shifted).sum())
    if manner.temperature == 0:
        best = int(shifted.argmax())
        return best, float(shifted[best] - total)
    weights = np.exp(shifted / manner.temperature)
    if 0 < manner.top_k < len(weights):
        # Of equals at the edge the lower ids stay: a stable order, not whichever partition leaves.
        kept = np.argsort(-scores, kind="stable")[: manner.top_k]
        left = np.zeros_like(weights)
        left[kept] = weights[kept]
        weights = left
    sums = weights.cumsum()
    chosen = int(np.searchsorted(sums, at * sums[-1], side="right"))
    return chosen, float(shifted[chosen] - total)
