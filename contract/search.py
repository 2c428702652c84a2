"""Beam search, the same code for training and serving.

This file knows candidates, scores and when to stop; it must not know how a step is computed, nor any text.

The rules, exactly (scores are sums of float64 over the step's float32 log probabilities):

1.  A search starts with one live hypothesis: no tokens, score 0. The first step is fed the start token.
2.  After each step every live hypothesis, in order, has K candidates, best first as the step gave them. Hypothesis
    score + candidate log probability is a candidate's score. All candidates are sorted by score, highest first; equal
    scores keep the order (hypothesis, candidate).
3.  Candidates are walked in that order until live and finished hypotheses together are `beam`: the beam narrows as
    hypotheses finish. A candidate that is the end token becomes a finished hypothesis: its tokens without the end
    token, its value score / length ** length_penalty, where length counts the end token. Any other candidate becomes a
    live hypothesis, with its parent's next state.
4.  The search ends when none is live, or when a finished value is at least that of the best live hypothesis, were it
    to end at once with probability one: live score / (length + 1) ** length_penalty, length counting its tokens so
    far. It also ends when live hypotheses have `max_length` tokens; if nothing has finished then, the live ones are
    taken as they are, valued at score / length ** length_penalty.
5.  The answer is the finished hypothesis of the highest value, the earliest of equals.

With beam 1 this is greedy decoding. K must be at least `beam`. Length normalisation after Wu et al. 2016 (arXiv
1609.08144), in the plain form without its constant 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A beginning of an answer: its tokens, each token's log probability and attention, and their sum."""

    tokens: tuple[int, ...]
    score: float
    log_probabilities: tuple[float, ...] = ()
    attention: tuple[Array, ...] = ()


class Search:
    """The search for one sequence. Feed it the candidates of its live hypotheses until `done`."""

    __slots__ = ("beam", "done", "end", "finished", "length_penalty", "live", "max_length")

    def __init__(self, end: int, beam: int, length_penalty: float, max_length: int) -> None:
        self.end = end
        self.beam = beam
        self.length_penalty = length_penalty
        self.max_length = max_length
        self.live = [Hypothesis((), 0.0)]
        self.finished: list[tuple[float, Hypothesis]] = []
        self.done = False

    def advance(self, log_probs: Array, ids: Array, attention: Sequence[Array] = ()) -> list[int]:
        """log_probs, ids [live, K], attention one array per live hypothesis → for each hypothesis now live, the place
        of its parent among those live before (the state to go on from)."""
        length = len(self.live[0].tokens) + 1
        room = self.beam - len(self.finished)
        candidates = self._candidates(log_probs, ids, room)
        chosen: list[Hypothesis] = []
        parents: list[int] = []
        for parent, token, log_prob, score in candidates:
            before = self.live[parent]
            seen = (*before.attention, attention[parent]) if len(attention) else ()
            log_probabilities = (*before.log_probabilities, log_prob)
            if token == self.end:
                value = score / length**self.length_penalty
                self.finished.append((value, Hypothesis(before.tokens, score, log_probabilities, seen)))
            else:
                chosen.append(Hypothesis((*before.tokens, token), score, log_probabilities, seen))
                parents.append(parent)
        self.live = chosen
        best = max((value for value, _ in self.finished), default=-np.inf)
        if not chosen or best >= chosen[0].score / (length + 1) ** self.length_penalty:
            self.done = True
        elif length >= self.max_length:
            self.done = True
            if not self.finished:
                self.finished = [(h.score / length**self.length_penalty, h) for h in chosen]
        return parents

    def _candidates(self, log_probs: Array, ids: Array, room: int) -> list[tuple[int, int, float, float]]:
        """The `room` best continuations as (parent, token, log probability, score)."""
        if room == 1 and len(self.live) == 1:  # greedy: the step has ranked them already
            log_prob = float(log_probs[0, 0])
            return [(0, int(ids[0, 0]), log_prob, self.live[0].score + log_prob)]
        scores = np.array([h.score for h in self.live])[:, None] + log_probs.astype(np.float64)
        order = np.argsort(-scores, axis=None, kind="stable")[:room]
        places = [divmod(int(place), ids.shape[1]) for place in order]
        return [(p, int(ids[p, rank]), float(log_probs[p, rank]), float(scores[p, rank])) for p, rank in places]

    @property
    def best(self) -> tuple[float, Hypothesis]:
        """The answer of a search that is done, with its value."""
        return max(self.finished, key=lambda item: item[0])

    @property
    def ended(self) -> bool:
        """Whether the answer ended by itself, not by `max_length`."""
        return len(self.best[1].log_probabilities) > len(self.best[1].tokens)

    def settled(self) -> tuple[int, ...]:
        """The tokens that every possible answer begins with, so far."""
        candidates = [h.tokens for h in self.live] + [h.tokens for _, h in self.finished]
        if len(candidates) == 1:
            return candidates[0]
        common = 0
        for column in zip(*candidates, strict=False):
            if len(set(column)) > 1:
                break
            common += 1
        return candidates[0][:common]
