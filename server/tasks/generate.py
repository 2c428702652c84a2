"""A text → how it goes on: the prompt is read, then one round per symbol, each drawn from the logits of the one before.

Drawing is contract/sampling.py, with a generator of the request's own: a text depends on prompt, manner and seed, never
on who else is there. Texts of many callers advance in the same rounds, and join and leave at any symbol.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from contract.sampling import Chance, Manner, draw
from contract.text import Vocabulary
from server.engine import Engine
from server.errors import InvalidInput, ServeError
from server.inputs import Array, Sizes
from server.sequence import Outputs, Sequence
from server.shares import ANYONE, Claim
from server.tasks.limits import check_letters

SYMBOLS = 200  # generated where the caller names no limit
HOTTEST = 100.0  # above it every symbol is as likely as any other
STOPS, STOP_LETTERS = 16, 1000  # texts to stop at, and letters of each: all are looked for after every symbol


@dataclass(frozen=True, slots=True)
class Wanted:
    """How a caller wants a text. `seed` None: one is drawn; `symbols` 0: the server's own limit. The text ends after any of
    `stop`, which is its end then."""

    manner: Manner = Manner()
    seed: int | None = None
    symbols: int = 0
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Drawn:
    """One symbol: what it adds to the text, how the vocabulary spells it, its log probability by the model."""

    text: str
    piece: str
    log_probability: float


@dataclass(frozen=True, slots=True)
class Generated:
    """A whole text, without what it goes on from. `ended` says why it is no longer: "end", the model's own mark; "stop", one
    of the caller's texts; "limit". Symbols of the caller's text: `read`, and `unknown` of them not in the vocabulary."""

    text: str
    symbols: tuple[Drawn, ...]
    seed: int
    ended: str
    read: int
    unknown: int


class Drawing:
    """One text under way: which ids to read first, and after each round's logits what comes next.

    It knows neither engine nor reply, so a session's turn can run it too. `pending` is what is still unread when it is
    over: the last symbol, which whoever goes on from the state reads first.
    """

    def __init__(self, task: Generator, ids: Array, before: tuple[int, ...], wanted: Wanted) -> None:
        self.first = np.array([*before, *ids], np.int64)
        self.pending = before
        self.seed = secrets.randbits(63) if wanted.seed is None else wanted.seed
        self._task = task
        self._manner = wanted.manner
        self._most = wanted.symbols or min(SYMBOLS, task.most)
        self._stop = wanted.stop
        self._longest = max(map(len, wanted.stop), default=0)
        self._chance = Chance(self.seed)
        self._spell = task.vocabulary.stream()
        self._symbols: list[Drawn] = []
        self._tail = ""  # the end of the text so far, long enough for any stop
        self._read, self._unknown = len(ids), int((ids == task.vocabulary.unknown).sum())
        self.ended = ""

    def advance(self, logits: Array) -> Drawn | None:
        """Draw one symbol from logits [vocabulary]; None where it was the end mark. `ended` says whether there are more."""
        task = self._task
        chosen, log_probability = draw(logits, self._manner, self._chance, task.never)
        if chosen == task.end:
            self.ended = "end"
            self.pending = (task.begin,)
            return None
        self.pending = (chosen,)
        text = self._spell(chosen)
        drawn = Drawn(text, task.vocabulary.pieces([chosen])[0], log_probability)
        self._symbols.append(drawn)
        if self._stop:
            seen = self._tail + text
            # A stop may lie within what one symbol adds, so not only at the very end; what lies before was looked at.
            if any(stop in seen for stop in self._stop):
                self.ended = "stop"
            self._tail = seen[-(self._longest - 1) :] if self._longest > 1 else ""
        if not self.ended and len(self._symbols) >= self._most:
            self.ended = "limit"
        return drawn

    def result(self) -> Generated:
        symbols = tuple(self._symbols)
        return Generated("".join(s.text for s in symbols), symbols, self.seed, self.ended, self._read, self._unknown)


class Generator:
    """Goes on with texts. Tensors of the main graph: tokens [batch, time] → logits [batch, time, vocabulary], each of the
    symbol after."""

    def __init__(self, engine: Engine, directory: Path) -> None:
        task = engine.bundle.task
        self._engine = engine
        self.vocabulary = Vocabulary.load(directory / engine.bundle.resources[task["vocabulary"]])
        self.begin, self.end = int(task["start"]), int(task["end"])
        self.never = tuple(int(i) for i in task["never"])
        self.most = int(task["most"])
        self._main = engine.bundle.main
        self._longest = engine.bundle.graph.max_time

    def read(self, text: str, wanted: Wanted, before: tuple[int, ...] | None = None) -> Drawing:
        """Check what a caller asks for. `before` are the ids that a session has yet to read; None: a text begins. Raises
        InvalidInput where the text is too long or a wish can't be had."""
        _check(wanted, self.most)
        check_letters(text)
        ids = self.vocabulary.encode(text)
        drawing = Drawing(self, ids, (self.begin,) if before is None else before, wanted)
        if len(drawing.first) > self._longest:
            most = self._longest - (len(drawing.first) - len(ids))
            message = f"the text has {len(ids)} symbols; at most {most} are read at once"
            raise InvalidInput("TOO_LONG", message, expected=f"0..{most}", got=len(ids))
        return drawing

    def following(self, drawing: Drawing) -> tuple[dict[str, Array], Sizes]:
        """What the next round reads: the symbol just drawn."""
        return {"tokens": np.array([drawing.pending], np.int64)}, Sizes(1, 1)

    def start(
        self, text: str, wanted: Wanted, then: Callable[[Sequence, Generated], None], failed: Callable[[ServeError], None],
        drawn: Callable[[Drawn], None] | None = None, claim: Claim = ANYONE,
    ) -> Sequence:  # fmt: skip
        """Queue one text; `drawn` is called with each symbol. Raises InvalidInput as `read` does."""
        drawing = self.read(text, wanted)

        def stepped(sequence: Sequence, outputs: Outputs) -> None:
            symbol = drawing.advance(outputs["logits"][0, -1])
            if symbol is not None and drawn is not None:
                drawn(symbol)
            if drawing.ended:
                then(sequence, drawing.result())
            else:
                sequence.go_on(self._main, *self.following(drawing), sequence.state)

        sequence = Sequence(self._main, {"tokens": drawing.first[None]}, Sizes(1, len(drawing.first)), stepped, failed)
        self._engine.submit(sequence, claim)
        return sequence


def _check(wanted: Wanted, most: int) -> None:
    heat = wanted.manner.temperature
    if not (math.isfinite(heat) and 0 <= heat <= HOTTEST) or 0 < heat < 1e-3:
        message = f"temperature {heat:g}; allowed are 0 (the likeliest symbol) and 0.001 to {HOTTEST:g}"
        raise InvalidInput("BAD_TEMPERATURE", message, expected=f"0 or 0.001..{HOTTEST:g}", got=heat)
    if wanted.symbols > most:
        raise InvalidInput("BAD_LIMIT", f"max_symbols {wanted.symbols}; allowed are 1 to {most}", expected=f"1..{most}", got=wanted.symbols)
    longest = max(map(len, wanted.stop), default=0)
    if len(wanted.stop) > STOPS or longest > STOP_LETTERS or "" in wanted.stop:
        allowed = f"0 to {STOPS} texts of 1 to {STOP_LETTERS} letters"
        message = f"{len(wanted.stop)} texts to stop at, the longest of {longest} letters; allowed are {allowed}"
        raise InvalidInput("BAD_STOP", message, expected=allowed, got=len(wanted.stop))
