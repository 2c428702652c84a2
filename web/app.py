"""Puts the faces together: each module gives `routes()`, all of them reach the server through one `Upstream`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette

from web import live, page, rest, tasks
from web.config import Config
from web.upstream import Upstream


def app(config: Config) -> Starlette:
    """The application. Its connection to the server is made by the first call and closed with the application.

    `app.state.upstream` and `app.state.config` are for handlers (`web.upstream.upstream(request)`).
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await app.state.upstream.close()

    made = Starlette(routes=[*rest.routes(), *tasks.routes(), *live.routes(), *page.routes()], lifespan=lifespan)
    made.state.config = config
    made.state.upstream = Upstream(config.target, timeout=config.timeout, **config.shown())
    return made
