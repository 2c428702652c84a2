"""A text → its translation: encode once, then one round per token until the search is done.

The search is contract/search.py, the same that training validates with. Every live hypothesis is a row; translations of
many callers advance in the same rounds, and join and leave at any token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from contract.search import Search
from contract.text import Vocabulary
from server.engine import Engine
from server.errors import InvalidInput, ServeError
from server.inputs import Array, Sizes
from server.sequence import Outputs, Sequence
from server.shares import ANYONE, Claim
from server.states import Rows, fresh
from server.tasks.limits import check_letters


@dataclass(frozen=True, slots=True)
class Wanted:
    """How a caller wants a translation. Zeros: the model's own choice."""

    beam: int = 0
    max_tokens: int = 0
    attention: bool = False


@dataclass(frozen=True, slots=True)
class Said:
    """One token of a translation; `text` is what it adds to the text so far, `attention` [source] on request."""

    text: str
    piece: str
    log_probability: float
    attention: Array | None


@dataclass(frozen=True, slots=True)
class Translated:
    """A whole translation. `score` is the value hypotheses are ranked by; `ended` False where it was cut."""

    text: str
    tokens: tuple[Said, ...]
    score: float
    source_tokens: tuple[str, ...]
    ended: bool


class Translator:
    """Translates between two languages. Graphs: `encode` tokens → memory and first states; the main graph
    tokens, memory, row → log_probs, ids, attention."""

    def __init__(self, engine: Engine, directory: Path) -> None:
        task = engine.bundle.task
        self.engine = engine
        self.source, self.target = str(task["source"]), str(task["target"])
        self.vocabulary = Vocabulary.load(directory / engine.bundle.resources[task["vocabulary"]])
        self.begin, self.end = int(task["start"]), int(task["end"])
        self.max_length = int(task["max_length"])
        self.beam = int(task["beam"])
        self.candidates = int(task["candidates"])
        self.length_penalty = float(task["length_penalty"])
        self.main = engine.bundle.main
        self.step = engine.bundle.graph
        self.encode = engine.bundle.graphs["encode"]

    def start(
        self, text: str, wanted: Wanted, then: Callable[[Sequence, Translated], None], failed: Callable[[ServeError], None],
        said: Callable[[Said], None] | None = None, claim: Claim = ANYONE,
    ) -> Sequence:  # fmt: skip
        """Queue one text; `said` is called with each token as soon as every hypothesis agrees on it. Raises InvalidInput
        where the text is empty or too long, or the beam or limit is not to be had."""
        if wanted.beam > self.candidates:
            message = f"beam {wanted.beam}; allowed are 1 to {self.candidates}"
            raise InvalidInput("BAD_BEAM", message, expected=f"1..{self.candidates}", got=wanted.beam)
        if wanted.max_tokens > self.max_length:
            raise InvalidInput(
                "BAD_LIMIT", f"max_tokens {wanted.max_tokens}; allowed are 1 to {self.max_length}", expected=f"1..{self.max_length}",
                got=wanted.max_tokens,
            )  # fmt: skip
        check_letters(text)
        ids = self.vocabulary.encode(text)
        most = self.encode.max_time - 1  # the end mark takes one
        if not len(ids):
            raise InvalidInput("EMPTY_TEXT", "the text has no words; send at least one", got=repr(text[:40]))
        if len(ids) > most:
            message = f"the text has {len(ids)} tokens; at most {most} are allowed"
            raise InvalidInput("TOO_LONG", message, expected=f"1..{most}", got=len(ids))
        search = Search(self.end, wanted.beam or self.beam, self.length_penalty, wanted.max_tokens or self.max_length)
        under_way = _Translation(self, ids, search, wanted.attention, then, said)
        tokens = np.append(ids, self.end)[None]
        sequence = Sequence("encode", {"tokens": tokens}, Sizes(1, tokens.shape[1]), under_way.encoded, failed)
        self.engine.submit(sequence, claim)
        return sequence


class _Translation:
    """One translation under way."""

    def __init__(
        self, task: Translator, source: Array, search: Search, attention: bool, then: Callable[[Sequence, Translated], None],
        said: Callable[[Said], None] | None,
    ) -> None:  # fmt: skip
        self._task = task
        self._source = source
        self._search = search
        self._attention = attention
        self._then = then
        self._said = said
        self._sent = 0  # tokens told so far
        self._text = ""  # their text
        self._memory: dict[int, Array] = {}  # the source's memory, end to end for as many rows: [rows * source, wide]

    def encoded(self, sequence: Sequence, outputs: Outputs) -> None:
        self._memory[1] = outputs["memory"][0]
        first = fresh(self._task.step, 1)
        states = zip(self._task.step.states, first.arrays(), strict=True)
        state = Rows(first.axes, tuple(outputs.get(s.input, zeros) for s, zeros in states), 0, 1)
        sequence.then = self.stepped
        self._go_on(sequence, [self._task.begin], state)

    def stepped(self, sequence: Sequence, outputs: Outputs) -> None:
        search = self._search
        rows = sequence.rows
        attention: list[Array] = list(outputs["attention"].reshape(rows, -1)) if self._attention else []
        parents = search.advance(outputs["log_probs"], outputs["ids"], attention)
        if search.done:
            self._finish(sequence)
            return
        if self._said is not None:
            self._tell(search.settled())
        assert sequence.state is not None
        state = sequence.state if parents == list(range(rows)) else sequence.state.pick(parents)
        self._go_on(sequence, [h.tokens[-1] for h in search.live], state)

    def _go_on(self, sequence: Sequence, tokens: list[int], state: Rows) -> None:
        rows = len(tokens)
        source = len(self._memory[1])
        if rows not in self._memory:
            self._memory[rows] = np.tile(self._memory[1], (rows, 1))
        inputs = {"tokens": np.array(tokens, np.int64)[:, None], "memory": self._memory[rows]}
        sequence.go_on(self._task.main, inputs, Sizes(rows, 1), state, (source,) * rows)

    def _tell(self, settled: tuple[int, ...]) -> None:
        """Send the tokens that can no longer change."""
        if len(settled) == self._sent or self._said is None:
            return
        agreed = next(h for h in [*self._search.live, *(h for _, h in self._search.finished)] if h.tokens[: len(settled)] == settled)
        for said in self._spell(settled, agreed.log_probabilities, agreed.attention, self._sent):
            self._said(said)
        self._sent = len(settled)

    def _spell(self, tokens: tuple[int, ...], log_probabilities: tuple[float, ...], attention: tuple[Array, ...], first: int) -> list[Said]:
        vocabulary = self._task.vocabulary
        pieces = vocabulary.pieces(tokens)
        result = []
        for i in range(first, len(tokens)):
            text = vocabulary.decode(tokens[: i + 1])
            added = text[len(self._text) :] if text.startswith(self._text) else ""
            self._text += added
            result.append(Said(added, pieces[i], log_probabilities[i], attention[i] if attention else None))
        return result

    def _finish(self, sequence: Sequence) -> None:
        value, best = self._search.best
        if self._said is not None:
            self._tell(best.tokens)
        self._text = ""
        tokens = self._spell(best.tokens, best.log_probabilities, best.attention, 0)
        source = tuple(self._task.vocabulary.pieces([*self._source, self._task.end]))
        text = self._task.vocabulary.decode(best.tokens)
        self._then(sequence, Translated(text, tuple(tokens), value, source, self._search.ended))
