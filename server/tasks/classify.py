"""Texts → labels with probabilities."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from contract.text import Vocabulary
from server.engine import Engine
from server.errors import InvalidInput, ServeError
from server.inputs import Sizes
from server.sequence import Outputs, Sequence


@dataclass(frozen=True, slots=True)
class Classified:
    """What the model makes of a text: a probability for each label, in the model's order."""

    probabilities: tuple[float, ...]
    tokens: int


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
            then(sequence, Classified(tuple(outputs["probabilities"][0].tolist()), count))

        sequence = Sequence(self._engine.bundle.main, {"tokens": ids[None]}, Sizes(1, count), answer, failed)
        self._engine.submit(sequence, deadline)
        return sequence
