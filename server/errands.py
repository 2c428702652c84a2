"""Work that may wait for a store, off the thread that brings it, in the order in which it came to each session.

A look into Redis or a flushed commit takes milliseconds, and the front's thread carries everyone's calls. What names a session
that has errands waiting runs behind them, so that a turn sent right behind an Open or a Close sees it done. This file knows
neither sessions nor stores.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

from server.errors import Draining

log = logging.getLogger(__name__)

THREADS = 8  # looks into a store at once; commits that wait for a flush share the next one


class _Errand:
    __slots__ = ("ahead", "ids", "work")

    def __init__(self, ids: tuple[str, ...], work: Callable[[], None]) -> None:
        self.ids = ids
        self.work = work
        self.ahead = 0  # lines in which it is not the first


class Errands:
    """Runs what it is given, at once or behind what concerns the same sessions."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._lines: dict[str, deque[_Errand]] = {}  # by session; the first runs, or waits for another line
        self._pool = ThreadPoolExecutor(THREADS, "errand")
        self._commits = ThreadPoolExecutor(1, "commit")

    def waits(self, id: str) -> bool:
        """Whether an errand of that session is not done."""
        return id in self._lines

    def run(self, ids: Iterable[str], work: Callable[[], None]) -> None:
        """Have work done that concerns these sessions; it tells its caller itself what comes of it. Raises Draining."""
        errand = _Errand(tuple(dict.fromkeys(ids)), work)
        with self._lock:
            for id in errand.ids:
                line = self._lines.setdefault(id, deque())
                errand.ahead += bool(line)
                line.append(errand)
            if errand.ahead:
                return
        try:
            self._pool.submit(self._do, errand)
        except RuntimeError:  # the pool was shut down
            self._done(errand)
            raise Draining("DRAINING", "the server is shutting down; send the request again") from None

    def commit(self, work: Callable[[], None]) -> None:
        """Have a round's turns stored, by the one thread that does this; in this thread where that one has ended."""
        try:
            self._commits.submit(_safely, work)
        except RuntimeError:
            work()

    def stop(self) -> None:
        """Take no more, and wait until all is done."""
        self._commits.shutdown()
        self._pool.shutdown()

    def _do(self, errand: _Errand) -> None:
        todo = [errand]
        while todo:
            now = todo.pop()
            _safely(now.work)
            todo += self._done(now)

    def _done(self, errand: _Errand) -> list[_Errand]:
        """An errand is over; gives those that waited only for it."""
        ready = []
        with self._lock:
            for id in errand.ids:
                line = self._lines[id]
                line.popleft()
                if not line:
                    del self._lines[id]
                    continue
                line[0].ahead -= 1
                if not line[0].ahead:
                    ready.append(line[0])
        return ready


def _safely(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception:  # whoever gave it has told its caller; the thread goes on
        log.exception("an errand failed")
