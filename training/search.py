"""Translation by beam search over a model in this process: what validation uses and what the served decode is held
against.

The search itself is contract/search.py, the same code that serves. This file must not know torch or onnx: the model is
two functions over arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from contract.search import Hypothesis, Search

Array = np.ndarray[Any, Any]

Encode = Callable[[Array], Sequence[Array]]
"""tokens [batch, time] → memory [batch, time, D], h, c [layers, batch, H]."""

Step = Callable[[Array, Array, Array, Array, Array, Array], Sequence[Array]]
"""tokens [batch, 1], memory [batch*source, D], row [batch*source], h, c [layers, batch, H], feed [batch, E]
→ log_probs, ids [batch, K], attention [batch*source], h, c, feed."""


def translate(
    encode: Encode,
    step: Step,
    sources: Sequence[Array],
    *,
    start: int,
    end: int,
    beam: int,
    length_penalty: float,
    max_length: int,
    feed: int,
    rows: int = 320,
) -> list[Hypothesis]:
    """Translate id sequences (each ending in the end token), some together; `feed` is the width of the fed-back vector
    and `rows` how many hypotheses advance together. The answer for one does not depend on the others."""
    answers: list[Hypothesis] = []
    together = max(1, rows // beam)
    for first in range(0, len(sources), together):
        part = sources[first : first + together]
        searches = [Search(end, beam, length_penalty, max_length) for _ in part]
        encoded = [[np.asarray(value) for value in encode(np.asarray(source)[None])] for source in part]
        memories = [value[0][0] for value in encoded]
        owner = list(range(len(part)))  # which search each live row belongs to
        tokens = np.full((len(part), 1), start, np.int64)
        states = [
            np.concatenate([value[1] for value in encoded], axis=1),
            np.concatenate([value[2] for value in encoded], axis=1),
            np.zeros((len(part), feed), np.float32),
        ]
        while owner:
            lengths = [len(memories[o]) for o in owner]
            row = np.repeat(np.arange(len(owner)), lengths)
            log_probs, ids, weights, h, c, fed = step(tokens, np.concatenate([memories[o] for o in owner]), row, *states)
            by_row = np.split(weights, np.cumsum(lengths)[:-1])
            keep: list[int] = []
            goes_on: list[int] = []
            at = 0
            for o in sorted(set(owner)):
                search = searches[o]
                count = len(search.live)
                parents = search.advance(log_probs[at : at + count], ids[at : at + count], by_row[at : at + count])
                if not search.done:
                    keep += [at + p for p in parents]
                    goes_on += [o] * len(parents)
                at += count
            owner = goes_on
            tokens = np.array([[h.tokens[-1]] for o in sorted(set(owner)) for h in searches[o].live], np.int64)
            states = [h[:, keep], c[:, keep], fed[keep]]
        answers += [search.best[1] for search in searches]
    return answers
