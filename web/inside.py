"""What the page is shown of the server: whether it is there, and pictures of its inside, one feed for all pages.

Session ids in a picture would let whoever sees it go on with others' sessions: pages are shown tags in their place, made with a
secret of this process. A page knows the tags of its own sessions (live.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import Callable
from dataclasses import asdict
from hashlib import blake2b
from typing import Any

import msgspec

from seqserve import AsyncClient, errors
from seqserve.inside import Picture

log = logging.getLogger(__name__)

LOOK = 0.25  # seconds between looks at whether the server is there, while any page is open
INTERVAL = 0.2  # between pictures
ROUNDS = 120  # of a picture: more in a fifth of a second can't be told apart
PARTS = 16  # of a round that are shown
AGAIN = 0.5  # seconds after which a feed that broke is asked for again
LASTS = 3600.0  # seconds after which a feed is asked for anew
_SECRET = secrets.token_bytes(16)

Tell = Callable[[bytes], None]


def tag(session: str) -> str:
    """What a session is called in pictures: the same for the life of this process."""
    return blake2b(session.encode(), key=_SECRET, digest_size=4).hexdigest()


class Status:
    """Whether the server answers, told to all open pages when it changes."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._pages: set[Tell] = set()
        self._looking: asyncio.Task[None] | None = None
        self._here: bool | None = None

    @property
    def pages(self) -> int:
        """How many are open."""
        return len(self._pages)

    def join(self, tell: Tell) -> None:
        self._pages.add(tell)
        if self._here is not None:
            tell(_status(self._here))
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())

    def leave(self, tell: Tell) -> None:
        self._pages.discard(tell)
        if not self._pages and self._looking is not None:
            self._looking.cancel()
            self._looking = self._here = None

    async def _look(self) -> None:
        while True:
            try:
                here = await self._client.health(timeout=2.0) == "SERVING"
            except errors.Error:
                here = False
            if here is not self._here:
                self._here = here
                for tell in tuple(self._pages):
                    tell(_status(here))
            await asyncio.sleep(LOOK)


class Feed:
    """Pictures, from one watch for all pages that want them."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._pages: set[Tell] = set()
        self._watching: asyncio.Task[None] | None = None

    def join(self, tell: Tell) -> None:
        self._pages.add(tell)
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())

    def leave(self, tell: Tell) -> None:
        self._pages.discard(tell)
        if not self._pages and self._watching is not None:
            self._watching.cancel()
            self._watching = None

    def _tell(self, message: bytes) -> None:
        for tell in tuple(self._pages):
            tell(message)

    async def _watch(self) -> None:
        while True:
            try:
                async with contextlib.aclosing(self._client.watch(INTERVAL, ROUNDS, timeout=LASTS)) as pictures:
                    async for picture in pictures:
                        self._tell(shown(picture))
            except errors.Denied as e:  # an operator's key is needed, and this process has none
                self._tell(msgspec.json.encode({"picture": None, "why": e.message}))
            except errors.Error as e:
                log.info("the feed broke: %s", e)
            await asyncio.sleep(AGAIN)


def shown(picture: Picture) -> bytes:
    """A picture as pages get it."""
    plain: dict[str, Any] = asdict(picture)
    for round in plain["rounds"]:
        round["began"] = round_to(round["began"])
        round["seconds"] = round_to(round["seconds"])
        round["parts"] = [
            [tag(part["session"]) if part["session"] else "", part["turn"], part["turns"], part["rows"], part["sequence"]]
            for part in round["parts"][:PARTS]
        ]
    return msgspec.json.encode({"picture": plain})


def round_to(seconds: float) -> float:
    """To microseconds: what is finer is noise, and digits on the wire."""
    return round(seconds, 6)


def _status(here: bool) -> bytes:
    return b'{"server":"here"}' if here else b'{"server":"away"}'
