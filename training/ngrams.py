"""Scores of words and of pairs of words: a log-linear model of a whole text, for two labels (Wang & Manning, ACL 2012).

Each word and each pair counts, over the square root of the text's length, times its log-count ratio between the labels; how much
of that ratio it keeps is fitted by logistic regression. What comes out is a number a word and a number a pair, to be added up while
reading. Pairs that few texts have are left out; the others lie in a hashed table, each with a mark by which nearly every other pair
that comes to the same place is told from it, and brings nothing. It knows counts and the fit; it must not know torch or the model
that adds them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, sparse

Array = np.ndarray[Any, Any]

NOTHING = 0  # stands before the first word: the id of padding, which is no word of any text
MIX = 40_503  # an odd number, so that words after a common one do not lie one beside the other's
MARKS = 251  # a prime
LENGTH = 16.0  # counts are over the square root of the length in units of such texts of 256 words, to be of the order of 1


@dataclass(frozen=True, slots=True)
class Scores:
    """Of a text of n words: sum of `words` and `pairs` of what is in it, over the square root of n, plus `bias`; the logit of
    label 1."""

    words: Array  # float32 [vocabulary]
    pairs: Array  # float32 [buckets]
    marks: Array  # uint8 [buckets], 0 where there is none
    bias: float

    def of(self, text: Array) -> float:
        """The logit of one text [time]."""
        first = before(text)
        at = bucket(first, text, len(self.pairs))
        known = self.marks[at] == mark(first, text)
        added = self.words[text].sum() + self.pairs[at][known].sum()
        return float(added / np.sqrt(max(1, len(text)))) + self.bias


def before(text: Array) -> Array:
    """The word before each of a text's [time]."""
    return np.concatenate([[NOTHING], text[:-1]])[: len(text)]


def bucket(first: Any, second: Any, buckets: int) -> Any:
    """Where a pair's score lies; arrays of numpy and of torch alike."""
    return (first * MIX + second) % buckets


def mark(first: Any, second: Any) -> Any:
    """Of a pair, 1 to MARKS; for the same arrays."""
    return (first * 7_919 + second * 104_729) % MARKS + 1


def fit(
    texts: Sequence[Array], labels: Array, vocabulary: int, buckets: int, *, least: int = 3, strength: float = 0.3, steps: int = 40
) -> Scores:
    """Scores of texts [time] of word ids with labels [texts], 0 or 1, or between where another model says how far they are either.

    A pair in fewer than `least` texts is left out. `strength` is the inverse of the penalty on squares, `steps` are those of
    L-BFGS, from zero: stopping early counts as a penalty too.
    """
    counted = [_counts(np.asarray(text, np.int64), vocabulary) for text in texts]
    kinds, found = np.unique(np.concatenate([kind for kind, _ in counted]), return_counts=True)
    kept = kinds[(found >= least) | (kinds < vocabulary)]
    matrix = _matrix(counted, kept, [len(text) for text in texts])  # [texts, kept]
    truth = np.asarray(labels, np.float64)
    ratios = _ratios(matrix, truth)
    weights, bias = _regression(matrix @ sparse.diags_array(ratios), truth, strength, steps)
    scores = np.asarray(weights * ratios * LENGTH, np.float32)
    words, pairs, marks = np.zeros(vocabulary, np.float32), np.zeros(buckets, np.float32), np.zeros(buckets, np.uint8)
    of_words = kept < vocabulary
    words[kept[of_words]] = scores[of_words]
    weight = np.abs(scores) * found[(found >= least) | (kinds < vocabulary)]
    order = np.argsort(weight, kind="stable")  # of two in one place the one that says more is written last, and stays
    order = order[~of_words[order]]
    first, second = np.divmod(kept[order] - vocabulary, vocabulary)
    at = bucket(first, second, buckets)
    pairs[at], marks[at] = scores[order], mark(first, second)
    return Scores(words, pairs, marks, bias)


def _counts(text: Array, vocabulary: int) -> tuple[Array, Array]:
    """Which words and pairs a text has and how often, pairs numbered after words."""
    return np.unique(np.concatenate([text, vocabulary + before(text) * vocabulary + text]), return_counts=True)


def _matrix(counted: Sequence[tuple[Array, Array]], kept: Array, lengths: Sequence[int]) -> sparse.csr_array:
    """Counts over the root of the length [texts, kept]."""
    columns, values, ends = [], [], [0]
    for (kinds, counts), length in zip(counted, lengths, strict=True):
        places = np.minimum(np.searchsorted(kept, kinds), len(kept) - 1)
        there = kept[places] == kinds
        columns.append(places[there].astype(np.int32))
        values.append((counts[there] * (LENGTH / np.sqrt(max(1, length)))).astype(np.float32))
        ends.append(ends[-1] + len(columns[-1]))
    return sparse.csr_array((np.concatenate(values), np.concatenate(columns), np.asarray(ends)), shape=(len(counted), len(kept)))


def _ratios(matrix: sparse.csr_array, truth: Array) -> Array:
    """log(share of label 1's / share of label 0's) of each column, by how many texts have it, smoothed by one."""
    there = matrix.astype(bool).astype(np.float32).T
    one, other = 1 + there @ truth, 1 + there @ (1 - truth)
    ratios: Array = np.log(one / one.sum()) - np.log(other / other.sum())
    return ratios.astype(np.float32)


def _regression(matrix: sparse.csr_array, truth: Array, strength: float, steps: int) -> tuple[Array, float]:
    """Weights [columns] and bias of a logistic regression."""
    rows, columns = matrix.shape
    matrix = matrix.tocsr()
    turned = matrix.T.tocsr()

    def loss(point: Array) -> tuple[float, Array]:
        weights, bias = point[:-1], point[-1]
        scores = matrix @ weights.astype(np.float32) + bias
        off = (1 / (1 + np.exp(-scores)) - truth) / rows
        penalty = weights / (strength * rows)
        value = (np.logaddexp(0, scores) - truth * scores).mean() + 0.5 * float(penalty @ weights)
        return float(value), np.append(turned @ off.astype(np.float32) + penalty, off.sum())

    found = optimize.minimize(loss, np.zeros(columns + 1), jac=True, method="L-BFGS-B", options={"maxiter": steps})
    return found.x[:-1], float(found.x[-1])


def weigh(columns: Array, truth: Array) -> Array:
    """How much each of several logits [columns, texts] counts, and a bias, fitted to truth [texts] by logistic regression
    without any penalty: [columns + 1]."""
    given = np.vstack([columns, np.ones(columns.shape[1])])

    def loss(weights: Array) -> tuple[float, Array]:
        scores = weights @ given
        off = (1 / (1 + np.exp(-scores)) - truth) / len(truth)
        return float((np.logaddexp(0, scores) - truth * scores).mean()), given @ off

    found: Array = optimize.minimize(loss, np.zeros(len(given)), jac=True, method="BFGS").x
    return found
