"""Texts → the spans in them: one round over the whole text, then the likeliest row of labels.

Splitting, features and decoding are contract/words.py and contract/chain.py, the same that training validates with.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Listed
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from contract.chain import Chain, Span
from contract.words import FEATURES, Words
from server.engine import Engine
from server.errors import InvalidInput, ServeError
from server.inputs import Sizes
from server.sequence import Outputs, Sequence
from server.shares import ANYONE, Claim
from server.tasks.limits import check_letters


@dataclass(frozen=True, slots=True)
class Found:
    """A span: its label, where it begins and ends, in characters and in words, and the probability that it is just that."""

    label: str
    text: str
    start: int
    end: int
    first: int  # word
    last: int  # the word after its last
    score: float


@dataclass(frozen=True, slots=True)
class Tagged:
    """The spans of a text, in order, and how many words it has."""

    spans: tuple[Found, ...]
    words: int


class Tagger:
    """Labels words. Tensors: words [batch, time], features [batch, time, features] → emissions [batch, time, labels]."""

    def __init__(self, engine: Engine, directory: Path) -> None:
        self._engine = engine
        task, resources = engine.bundle.task, engine.bundle.resources
        self._words = Words.load(directory / resources[task["vocabulary"]], int(task["buckets"]))
        self._chain = Chain.load(directory / resources[task["chain"]])
        self._graph = engine.bundle.graph
        axes = [(t, t.axes[-1]) for t in (self._graph.input("features"), self._graph.output("emissions")) if t is not None]
        for (tensor, found), wanted in zip(axes, (len(FEATURES), len(self._chain.labels)), strict=True):
            if found != wanted:
                raise ValueError(f"{tensor.name} has {found} numbers a word, this release makes {wanted}")
        self.labels = tuple(dict.fromkeys(label[2:] for label in self._chain.labels if label[:2] == "B-"))

    def start(
        self, given: str | Listed[str], then: Callable[[Sequence, Tagged], None], failed: Callable[[ServeError], None],
        claim: Claim = ANYONE,
    ) -> Sequence:  # fmt: skip
        """Queue one text, or the words of one, whose text is then the words with a space between them. Raises InvalidInput
        where it has no words, an empty one, or more than the model reads."""
        if isinstance(given, str):
            text = given
            check_letters(text)
            places = self._words.split(text)
        else:
            text = " ".join(given)
            check_letters(text)
            if empty := [i for i, word in enumerate(given) if not word.strip()]:
                raise InvalidInput("EMPTY_WORD", f"words[{empty[0]}] is empty or only spaces; leave it out", word=empty[0])
            ends = list(accumulate(len(word) + 1 for word in given))
            places = [(end - len(word) - 1, end - 1) for word, end in zip(given, ends, strict=True)]
        count, most = len(places), self._graph.max_time
        if not count:
            raise InvalidInput("EMPTY_TEXT", "the text has no words; send at least one", got=repr(text[:40]))
        if count > most:
            raise InvalidInput("TOO_LONG", f"the text has {count} words; at most {most} are allowed", expected=f"1..{most}", got=count)
        words = [text[start:end] for start, end in places]

        def answer(sequence: Sequence, outputs: Outputs) -> None:
            spans = tuple(_found(text, places, span) for span in self._chain.spans(outputs["emissions"][0]))
            then(sequence, Tagged(spans, count))

        inputs = {"words": self._words.ids(words)[None], "features": self._words.features(words)[None]}
        sequence = Sequence(self._engine.bundle.main, inputs, Sizes(1, count), answer, failed)
        self._engine.submit(sequence, claim)
        return sequence


def _found(text: str, places: Listed[tuple[int, int]], span: Span) -> Found:
    start, end = places[span.start][0], places[span.end - 1][1]
    return Found(span.label, text[start:end], start, end, span.start, span.end, span.score)
