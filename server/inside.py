"""What is kept of rounds while somebody watches them: the last few thousand, and how long answers took.

Written by the threads that run rounds, one entry a round into a bounded deque; read by whoever draws a picture (rpc/inside.py),
at its own pace. What a reader was too late for, it is told the number of. The lock is held for an append or a copy. Nothing of a
sequence is kept but numbers and its session's id. This file knows no gRPC.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Listed
from typing import NamedTuple

from server.abreast import Abreast
from server.engine import Engine
from server.rounds import Round
from server.sequence import Sequence
from server.turns import Turn
from server.workers import Workers

log = logging.getLogger(__name__)

KEPT = 4096  # rounds, and answers' times, that are kept: about a second of a busy server's
PARTS = 64  # sequences of one round that are told of
RECENT = 10.0  # seconds that percentiles look back


class Seen(NamedTuple):
    """A sequence in a round: a number that is its own for as long as it lives, its session, turn, turns, rows."""

    sequence: int
    session: str
    turn: int
    turns: int
    rows: int


class Ran(NamedTuple):
    """A round that was run. Times are the workers' clock's."""

    number: int
    model: str
    version: str
    graph: str
    rows: int
    steps: int
    started: float
    ended: float
    parts: tuple[Seen, ...]


class Spread(NamedTuple):
    """How long answers took, from arrival to answer, in seconds."""

    answers: int
    p50: float
    p99: float


NOTHING = Spread(0, 0.0, 0.0)


class Feed:
    """The rounds of late. Satisfies workers.Onlooker while it is watched, and is told nothing while it is not."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._lock = threading.Lock()
        self._watched = 0
        self._number = 0  # of the last round
        self._rounds: deque[Ran] = deque(maxlen=KEPT)
        self._took: deque[tuple[float, tuple[str, str], float]] = deque(maxlen=KEPT)
        self._last = 0.0  # when the last round ended: the answers that come right after it are of that time
        self._salt = secrets.randbits(32) | 1

    def open(self) -> None:
        """Somebody watches; each `open` needs its `close`."""
        with self._lock:
            self._watched += 1
            self._workers.onlooker = self

    def close(self) -> None:
        with self._lock:
            self._watched -= 1
            if not self._watched:
                self._workers.onlooker = None
                self._rounds.clear()
                self._took.clear()

    @property
    def newest(self) -> int:
        """The number of the newest round."""
        return self._number

    def since(self, number: int, most: int) -> tuple[list[Ran], int]:
        """The rounds after that number, the newest `most` of them, oldest first; and how many there were besides."""
        found: list[Ran] = []
        with self._lock:
            kept = list(self._rounds)
        for ran in reversed(kept):
            if ran.number <= number or len(found) == most:
                break
            found.append(ran)
        found.reverse()
        last = kept[-1].number if kept else number
        return found, max(0, last - number) - len(found)

    def spreads(self, now: float) -> Mapping[tuple[str, str], Spread]:
        """By model and version, how long recent answers took."""
        times: dict[tuple[str, str], list[float]] = {}
        with self._lock:
            kept = list(self._took)
        for at, model, seconds in kept:
            if at >= now - RECENT:
                times.setdefault(model, []).append(seconds)
        spreads = {}
        for model, every in times.items():
            every.sort()
            spreads[model] = Spread(len(every), every[(len(every) - 1) // 2], every[(len(every) - 1) * 99 // 100])
        return spreads

    def round(self, engine: Engine, graph: str, round: Round[Sequence], started: float, ended: float) -> None:
        try:
            parts = tuple(part for s in round.tickets[:PARTS] for part in self._seen(s))[:PARTS]
            with self._lock:
                self._number += 1
                self._rounds.append(Ran(self._number, engine.name, engine.version, graph, round.rows, round.steps, started, ended, parts))
                self._last = ended
        except Exception:  # whatever is wrong here must not be the round's concern
            log.exception("a round could not be noted for those who watch")

    def left(self, engine: Engine, sequences: Listed[Sequence], how: str) -> None:
        if how == "answered":
            model = (engine.name, engine.version)
            with self._lock:
                last = self._last
                self._took.extend([(last, model, s.queued + s.run) for s in sequences])

    def _seen(self, s: Sequence) -> Listed[Seen]:
        then = s.then
        what = getattr(then, "__func__", None)
        if what is _TURN:
            turn: Turn = then.__self__  # type: ignore[attr-defined]
            return (self._turn(s, turn, s.rows),)
        if what is _TURNS:
            together: Abreast[Turn] = then.__self__  # type: ignore[attr-defined]
            return [self._turn(turn, turn, 1) for turn in together.works]
        return (_seen((self._told_apart(s), "", 0, 0, s.rows)),)

    def _turn(self, of: object, turn: Turn, rows: int) -> Seen:
        session = turn.session
        line = session.line
        try:
            first = line[0].turn
        except IndexError:  # closed meanwhile
            first = session.turn
        return _seen((self._told_apart(of), session.id, first, 1 + len(turn.joined), rows))

    def _told_apart(self, of: object) -> int:
        """A number that tells sequences apart, and nothing of where they lie."""
        return (id(of) >> 4) * self._salt & 0xFFFF_FFFF


_TURN, _TURNS = Turn._ran, Abreast.ran  # what a turn's sequence calls at its end, and that of several sessions' turns
_seen = Seen._make
