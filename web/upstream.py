"""The server behind: one connection for all callers, with each call the key of whoever makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import grpc
from starlette.requests import HTTPConnection

from seqserve import AsyncClient
from web.problems import Problem

Metadata = Sequence[tuple[str, str | bytes]]
KEYS = ("authorization", "x-api-key")
"""Headers that go on as they are: server/keys.py reads them."""


class Upstream:
    """Where calls go. `metadata` is shown for callers that show no key of their own."""

    def __init__(
        self, target: str, *, credentials: grpc.ChannelCredentials | None = None, metadata: Metadata = (), timeout: float = 60.0
    ) -> None:
        self.target = target
        self.timeout = timeout  # seconds, of a call whose caller names none
        self._anyone = AsyncClient(target, timeout=timeout, credentials=credentials, metadata=metadata, retries=0)
        # Callers of a page and of the REST face may try again themselves, and are told when: no retries here.

    def of(self, connection: HTTPConnection) -> AsyncClient:
        """The client for one caller: the shared connection with the caller's own key. Not to be closed."""
        return self.by(connection.headers)

    def by(self, headers: Mapping[str, str]) -> AsyncClient:
        """As `of`. Raises Problem for a key that can't travel."""
        shown = [(name, value) for name in KEYS if (value := headers.get(name, ""))]
        for name, value in shown:
            if not (value.isascii() and value.isprintable()):
                raise Problem(401, "BAD_KEY", f"{name} is none of the server's keys: those are printable ASCII")
        return self._anyone.with_metadata(shown) if shown else self._anyone

    async def close(self) -> None:
        await self._anyone.close()


def upstream(connection: HTTPConnection) -> Upstream:
    """Of the app that a request, or a WebSocket, came to."""
    found = connection.app.state.upstream
    assert isinstance(found, Upstream)
    return found
