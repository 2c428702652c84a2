"""What outlives a page's connection: its sessions' clients, and answers that may not have reached it. One for the process.

All of it may be forgotten: a session is taken up again by its id, and the server answers a turn that is sent again with the same bytes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from hashlib import blake2b
from typing import Any

import msgspec

from seqserve import AsyncClient, AsyncSession, Forecast
from seqserve.results import Answer
from web.inside import Feed, Status

TTL = 900.0  # seconds that a session of a page lives after its last turn
WAIT = 60.0  # seconds that a server may be away before a turn is answered with an error
PREFIX = "page-"  # before a page's own id: so it can name no session but a page's
SESSIONS = 8192  # that are remembered, of all pages
BYTES = 64 << 20  # of answers that are kept, of all sessions
SMALL = 1024  # bytes that an answer counts for at least


class Known:
    """A session of some page."""

    __slots__ = ("answers", "bytes", "lock", "session")

    def __init__(self, session: AsyncSession) -> None:
        self.session = session
        self.answers: dict[int, tuple[bytes, Answer]] = {}  # by turn: the digest of what it brought, and the answer
        self.bytes = 0  # of the answers
        self.lock = asyncio.Lock()


class Live:
    """All sessions of pages, whether the server is there, and the feed of its inside."""

    def __init__(self, client: AsyncClient) -> None:
        self.client = client
        self.status = Status(client)
        self.feed = Feed(client)
        self.kill: Callable[[], Awaitable[None]] | None = None
        self.bytes = 0
        self._known: OrderedDict[str, Known] = OrderedDict()  # used longest ago first

    def __contains__(self, id: str) -> bool:
        return id in self._known

    def open(self, id: str, model: str) -> AsyncSession:
        """A session to be opened, and then remembered."""
        return self.client.session(model, id=PREFIX + id, ttl=TTL, close=False, timeout=WAIT)

    def resumed(self, id: str, turn: int | None = None) -> AsyncSession:
        """A session to be taken up after a turn; None: after its last."""
        return self.client.resume(PREFIX + id, turn, close=False, timeout=WAIT)

    def remember(self, id: str, session: AsyncSession) -> Known:
        self.drop(id)
        known = self._known[id] = Known(session)
        while len(self._known) > SESSIONS:
            self.drop(next(iter(self._known)))
        return known

    def known(self, id: str, turn: int | None = None) -> Known:
        """The session of that id, taken up after `turn` where this process does not know it."""
        known = self._known.get(id)
        if known is None:
            return self.remember(id, self.resumed(id, turn))
        self._known.move_to_end(id)
        return known

    def drop(self, id: str) -> None:
        known = self._known.pop(id, None)
        if known is not None:
            self.forget(known, list(known.answers))

    def keep(self, known: Known, turn: int, brought: Any, answer: Answer) -> None:
        """An answer, until the page has said that it has it; past BYTES those of the sessions used longest ago are let go."""
        known.answers[turn] = (digest(brought), answer)
        known.bytes += _size(answer)
        self.bytes += _size(answer)
        while self.bytes > BYTES:
            oldest = next((other for other in self._known.values() if other.answers), known)
            self.forget(oldest, list(oldest.answers))

    def forget(self, known: Known, turns: Iterable[int]) -> None:
        for turn in turns:
            size = _size(known.answers.pop(turn)[1])
            known.bytes -= size
            self.bytes -= size


def digest(brought: Any) -> bytes:
    """What a turn brought, to tell another one by."""
    return blake2b(msgspec.json.encode(brought), digest_size=16).digest()


def _size(answer: Answer) -> int:
    if isinstance(answer, Forecast):
        return SMALL + answer.mean.nbytes + sum(q.nbytes for q in answer.quantiles.values())
    return SMALL
