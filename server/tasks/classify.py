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
from server.shares import ANYONE, Claim
from server.tasks.limits import check_letters

_TAG = 16  # letters after "<" within which ">" may still come: the vocabulary reads a tag such as "<br />" as one space
_WORD = 1000  # letters of a word without an end: it is read anew with every piece


@dataclass(frozen=True, slots=True)
class Classified:
    """What the model makes of a text: a probability for each label, in the model's order."""

    probabilities: tuple[float, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Read:
    """A piece of a text as ids: `words` to be read for good, `glance` for this answer only, being the last word, and its
    letters as `rest`."""

    words: Array | None
    glance: Array
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
        self, text: str, then: Callable[[Sequence, Classified], None], failed: Callable[[ServeError], None], claim: Claim = ANYONE
    ) -> Sequence:
        """Queue one text. Raises InvalidInput where it has no words, or more tokens than the model reads."""
        ids = self.ids(text)
        count = len(ids)

        def answer(sequence: Sequence, outputs: Outputs) -> None:
            then(sequence, self.result(outputs, count))

        sequence = Sequence(self._engine.bundle.main, {"tokens": ids[None]}, Sizes(1, count), answer, failed)
        self._engine.submit(sequence, claim)
        return sequence

    def ids(self, text: str) -> Array:
        """A whole text's tokens, int64 [time]; raises as `start`."""
        check_letters(text)
        ids = self._vocabulary.encode(text)
        count, most = len(ids), self._graph.max_time
        if not count:
            raise InvalidInput("EMPTY_TEXT", "the text has no words; send at least one", got=repr(text[:40]))
        if count > most:
            raise InvalidInput("TOO_LONG", f"the text has {count} tokens; at most {most} are allowed", expected=f"1..{most}", got=count)
        return ids

    def result(self, outputs: Outputs, tokens: int) -> Classified:
        return Classified(tuple(outputs["probabilities"][0].tolist()), tokens)

    def read(self, piece: str, rest: str) -> Read:
        """A text cut anywhere, so that its pieces make the tokens of the whole: from the last word on, which may go on in the
        next piece, it is only glanced at, and kept as `rest`. Raises InvalidInput where there is no word yet."""
        text = rest + piece
        check_letters(text)
        cut, glance = len(text), self._vocabulary.encode("")
        while not len(glance) and cut > 0 and len(text) - cut <= _WORD:
            cut = _boundary(text, cut)
            glance = self._vocabulary.encode(text[cut:])
        if not len(glance):
            raise InvalidInput("EMPTY_TEXT", "the text so far has no words; send at least one", got=repr(piece[:40]))
        if len(text) - cut > _WORD:
            message = f"the last word has {len(text) - cut} letters, spaces after it counted; at most {_WORD} are allowed"
            raise InvalidInput("TOO_LONG", message, expected=f"1..{_WORD}", got=len(text) - cut)
        words, most = self._vocabulary.encode(text[:cut]), self._graph.max_time
        if len(words) > most:
            message = f"the piece has {len(words)} tokens; at most {most} are allowed"
            raise InvalidInput("TOO_LONG", message, expected=f"1..{most}", got=len(words))
        return Read(words if len(words) else None, glance, text[cut:])


def _boundary(text: str, before: int) -> int:
    """The last place before `before` where a text may be cut: after a space, and not in what may be a tag; else its start,
    or wherever a word is longer than allowed."""
    earliest = max(0, before - 2 - _WORD)
    for cut in range(before - 1, earliest, -1):
        if not text[cut - 1].isspace():
            continue
        tag = text.rfind("<", 0, cut)
        end = text.find(">", tag, tag + _TAG)
        within = tag >= 0 and (end >= cut or (end < 0 and len(text) - tag < _TAG))
        if not within:
            return cut
    return earliest
