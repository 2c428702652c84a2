"""Texts → labels with probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from contract.text import Vocabulary
from server.engine import Engine
from server.errors import InvalidInput, ServeError
from server.inputs import Array, Sizes
from server.sequence import Outputs, Sequence

_TAG = 16  # letters after "<" within which ">" may still come: the vocabulary reads a tag such as "<br />" as one space
_WORD = 1000  # letters of a word without an end: it is read anew with every piece


@dataclass(frozen=True, slots=True)
class Classified:
    """What the model makes of a text: a probability for each label, in the model's order."""

    probabilities: tuple[float, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Read:
    """A piece of a text as ids: whole words, to be read for good; a word not yet ended, to be glanced at; and its letters."""

    words: Array | None
    glance: Array | None
    rest: str


class Classifier:
    """Reads a text token by token and labels it. Tensors: tokens [batch, time] → probabilities [batch, labels]."""

    def __init__(self, engine: Engine, directory: Path) -> None:
        self._engine = engine
        task = engine.bundle.task
        self.labels: tuple[str, ...] = tuple(str(label) for label in task["labels"])
        self._vocabulary = Vocabulary.load(directory / engine.bundle.resources[task["vocabulary"]])
        self._graph = engine.bundle.graph

    def start(
        self, text: str, then: Callable[[Sequence, Classified], None], failed: Callable[[ServeError], None], deadline: float | None = None
    ) -> Sequence:
        """Queue one text. Raises InvalidInput where it has no words, or more tokens than the model reads."""
        ids = self._vocabulary.encode(text)
        count, most = len(ids), self._graph.max_time
        if not count:
            raise InvalidInput("EMPTY_TEXT", "the text has no words; send at least one", got=repr(text[:40]))
        if count > most:
            raise InvalidInput("TOO_LONG", f"the text has {count} tokens; at most {most} are allowed", expected=f"1..{most}", got=count)

        def answer(sequence: Sequence, outputs: Outputs) -> None:
            then(sequence, self.result(outputs, count))

        sequence = Sequence(self._engine.bundle.main, {"tokens": ids[None]}, Sizes(1, count), answer, failed)
        self._engine.submit(sequence, deadline)
        return sequence

    def result(self, outputs: Outputs, tokens: int) -> Classified:
        return Classified(tuple(outputs["probabilities"][0].tolist()), tokens)

    def read(self, piece: str, rest: str) -> Read:
        """A text cut anywhere, so that its pieces make the tokens of the whole: what may go on in the next piece, a word or
        a tag without its end, is only glanced at, and kept as `rest`. Raises InvalidInput where a piece brings nothing."""
        text = rest + piece
        cut = max((i + 1 for i, letter in enumerate(text) if letter.isspace()), default=0)
        tag = text.rfind("<", 0, cut)
        if tag >= 0 and ">" not in text[tag:cut] and len(text) - tag < _TAG:
            cut = tag
        most = self._graph.max_time
        if len(text) - cut > _WORD:
            raise InvalidInput(
                "TOO_LONG", f"a word of {len(text) - cut} letters; at most {_WORD} are allowed", expected=_WORD, got=len(text) - cut
            )
        words, glance = self._vocabulary.encode(text[:cut]), self._vocabulary.encode(text[cut:])
        if not len(words) and not len(glance):
            raise InvalidInput("EMPTY_TEXT", "the piece has no words and ends none; send at least one", got=repr(piece[:40]))
        if len(words) > most:
            raise InvalidInput(
                "TOO_LONG", f"the piece has {len(words)} tokens; at most {most} are allowed", expected=f"1..{most}", got=len(words)
            )
        return Read(words if len(words) else None, glance if len(glance) else None, text[cut:])
