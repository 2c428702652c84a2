"""Several sequences of one call, each of its own length: one reply when the last is done, one error for the first that fails."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

from server.engine import Engine
from server.errors import ServeError
from server.rpc.answer import Asked
from server.sequence import Sequence

R = TypeVar("R")


class Together(Generic[R]):
    """The sequences, and their results as they come from several workers. `fail` and `cancel` end all of them."""

    def __init__(self, engine: Engine, count: int, answer: Asked) -> None:
        self._engine = engine
        self._answer = answer
        self._lock = threading.Lock()  # results come from several workers
        self._missing = count
        self._over = False
        self._begun: list[Sequence] = []
        self._results: list[R | None] = [None] * count
        self._ran: list[Sequence] = []

    @property
    def longest(self) -> Sequence:
        """Of those that ran side by side, the one that took longest."""
        return max(self._ran, key=lambda s: s.queued + s.run)

    @property
    def results(self) -> list[R]:
        return [r for r in self._results if r is not None]

    def started(self, sequence: Sequence) -> None:
        with self._lock:
            self._begun.append(sequence)
            over = self._over
        if over:
            self._engine.cancel(sequence)

    def put(self, at: int, sequence: Sequence, result: R) -> bool:
        """True for the one result that completes the call."""
        with self._lock:
            self._results[at] = result
            self._ran.append(sequence)
            self._missing -= 1
            return self._missing == 0 and not self._over

    def fail(self, error: ServeError) -> None:
        with self._lock:
            first, self._over = not self._over, True
        if first:
            self.cancel()
            self._answer.fail(error)

    def cancel(self) -> None:
        with self._lock:
            self._over = True
            begun = list(self._begun)
        for sequence in begun:
            self._engine.cancel(sequence)
