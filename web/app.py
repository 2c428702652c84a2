"""Puts the faces together: each module gives `routes()`, all of them reach the server through one `Upstream`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from web import live, openapi, page, problems, rest, tasks
from web.config import Config
from web.endpoint import TIMEOUT
from web.guard import Guard
from web.problems import Problem
from web.upstream import Upstream

EXPOSED = ("retry-after", "location", "content-encoding", rest.HEAD)
ALLOWED = ("content-type", "authorization", "x-api-key", TIMEOUT, rest.HEAD)


def app(config: Config) -> Starlette:
    """The application. Its connection to the server is made by the first call and closed with the application.

    `app.state.upstream` and `app.state.config` are for handlers (`web.upstream.upstream(request)`). Raises OSError or ValueError
    for files of `config` that can't be used.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await app.state.upstream.close()

    guards = [Middleware(Guard, config=config)]
    if config.origins:
        guards.append(
            Middleware(
                CORSMiddleware, allow_origins=sorted(config.origins), allow_methods=["GET", "POST", "DELETE"], allow_headers=ALLOWED,
                expose_headers=EXPOSED,
            )
        )  # fmt: skip
    endpoints = [*tasks.ENDPOINTS, *rest.ENDPOINTS]
    made = Starlette(
        routes=[
            *rest.routes(),
            *tasks.routes(),
            *live.routes(),
            *(openapi.routes(endpoints, config.max_timeout) if config.docs else []),
            Route("/healthz", healthy, methods=["GET"]),
            *page.routes(),
        ],
        middleware=guards,
        exception_handlers={HTTPException: _refused},
        lifespan=lifespan,
    )
    made.state.config = config
    made.state.upstream = Upstream(config.target, timeout=config.timeout, **config.shown())
    return made


async def healthy(request: Request) -> Response:
    """This process is up, whatever the server behind is; that is /v2/health/ready's."""
    return Response(b"ok\n", media_type="text/plain")


async def _refused(request: Request, error: Exception) -> Response:
    """What the router refuses: no such path, no such method."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    match error.status_code:
        case 404:
            problem = Problem(404, "NO_SUCH_PATH", f"there is nothing at {request.url.path!r}: {openapi.PATH} lists what there is")
        case 405:
            allowed = headers.get("Allow", "")
            problem = Problem(405, "NO_SUCH_METHOD", f"{request.method} is not known here: {allowed}", headers={"allow": allowed})
        case status:
            problem = Problem(status, "HTTP", error.detail, headers=headers)
    return problem.response(problems.of_protocol(request))
