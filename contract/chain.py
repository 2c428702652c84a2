"""Labels in a row, each likelier after some than after others: the linear-chain CRF, as it is decoded.

Training scores with the same numbers (training/crf.py); here the best row of labels is found, and how sure it is. Sums are in
float64, so what comes out depends on nothing but the numbers that go in. This file must not know any model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

NEVER = -1e4
"""The score of what can't follow: far below any that is learnt, and finite."""

_DEEPEST = 600.0  # emissions further below a step's best are taken for this, so that no weight underflows to 0


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring words with one label, from the first up to, not including, `end`."""

    start: int
    end: int
    label: str
    score: float  # the probability that exactly these words are such a span


@dataclass(frozen=True, slots=True)
class Chain:
    """IOB2 labels ("O", "B-x", "I-x") and the scores of one following another: `after` [from, to], `first` [label], `last` [label]."""

    labels: tuple[str, ...]
    after: Array
    first: Array
    last: Array

    @classmethod
    def load(cls, file: Path | str) -> Chain:
        """Raises ValueError, KeyError where the file does not hold what `save` writes."""
        read = json.loads(Path(file).read_text(encoding="utf-8"))
        labels = tuple(str(label) for label in read["labels"])
        after, first, last = (np.array(read[key], np.float64) for key in ("after", "first", "last"))
        n = len(labels)
        if (after.shape, first.shape, last.shape) != ((n, n), (n,), (n,)) or not all(np.isfinite(a).all() for a in (after, first, last)):
            raise ValueError(f"{file}: scores must be finite and of {n} labels")
        return cls(labels, after, first, last)

    def save(self, file: Path | str) -> None:
        rows = ",\n  ".join(json.dumps(row) for row in self.after.tolist())
        said = {
            key: json.dumps(value)
            for key, value in (("labels", list(self.labels)), ("first", self.first.tolist()), ("last", self.last.tolist()))
        }
        text = "".join(f' "{key}": {value},\n' for key, value in said.items())
        Path(file).write_text(f'{{\n{text} "after": [\n  {rows}\n ]\n}}\n', encoding="utf-8")

    def best(self, emissions: Array) -> list[int]:
        """The likeliest labels of [time, labels], as places in `labels` (Viterbi)."""
        emissions = emissions.astype(np.float64)
        score = self.first + emissions[0]
        back: list[Array] = []
        for emission in emissions[1:]:
            ways = score[:, None] + self.after  # [from, to]
            back.append(ways.argmax(0))
            score = ways.max(0) + emission
        at = int((score + self.last).argmax())
        path = [at]
        for places in reversed(back):
            at = int(places[at])
            path.append(at)
        return path[::-1]

    def spans(self, emissions: Array) -> list[Span]:
        """The spans of the likeliest labels, each with its own probability."""
        found = labelled([self.labels[at] for at in self.best(emissions)])
        if not found:
            return []  # the probabilities cost more than the labels, and most sentences need none
        chances = self.probabilities(emissions, found)
        return [Span(start, end, label, chance) for (start, end, label), chance in zip(found, chances, strict=True)]

    def probabilities(self, emissions: Array, spans: Sequence[tuple[int, int, str]]) -> list[float]:
        """How likely each span (start, end, label) is to be there, no longer and no shorter, whatever else is there."""
        # Forward and backward weights, scaled to a sum of 1 at each step: a third of what sums of logarithms cost.
        emissions = emissions.astype(np.float64)
        here = np.exp(np.maximum(emissions - emissions.max(1, keepdims=True), -_DEEPEST))  # [time, label]
        onward = np.exp(self.after - self.after.max())  # [from, to]
        end_weight = np.exp(self.last - self.last.max())
        steps = len(emissions)
        before, scale = np.empty_like(here), np.empty(steps)  # all that leads to a label, its own emission counted
        reached = np.exp(self.first - self.first.max()) * here[0]
        for t in range(steps):
            if t:
                reached = (before[t - 1] @ onward) * here[t]
            scale[t] = reached.sum()
            before[t] = reached / scale[t]
        end_weight /= before[-1] @ end_weight
        beyond = np.empty_like(here)  # all that follows a label, its own emission not counted
        beyond[-1] = end_weight
        for t in range(steps - 1, 0, -1):
            beyond[t - 1] = onward @ (here[t] * beyond[t]) / scale[t]
        chances = []
        for start, end, label in spans:
            inside = self.labels.index(f"I-{label}")
            at = self.labels.index(f"B-{label}")
            weight = before[start, at]
            for t in range(start + 1, end):
                weight *= onward[at, inside] * here[t, inside] / scale[t]
                at = inside
            if end == steps:
                weight *= end_weight[at]
            else:
                follows = onward[at] * here[end] * beyond[end]
                follows[inside] = 0.0  # or the span would go on
                weight *= follows.sum() / scale[end]
            chances.append(min(1.0, float(weight)))
        return chances


def labelled(tags: Sequence[str]) -> list[tuple[int, int, str]]:
    """The spans (start, end, label) of IOB2 tags; an I- that continues nothing begins one."""
    found: list[tuple[int, int, str]] = []
    start, kind = 0, ""
    for at, tag in enumerate([*tags, "O"]):
        mark, _, of = tag.partition("-")
        if kind and not (mark == "I" and of == kind):
            found.append((start, at, kind))
            kind = ""
        if mark != "O" and not kind:
            start, kind = at, of
    return found


def forbidden(labels: Sequence[str]) -> tuple[Array, Array]:
    """What IOB2 rules out, True where it does: [from, to], and [label] at the start. Only B-x and I-x come before I-x."""
    inside = np.array([label.startswith("I-") for label in labels])
    kinds = [label.partition("-")[2] for label in labels]
    same = np.array([[a == b and a != "" for b in kinds] for a in kinds])
    return inside[None, :] & ~same, inside
