"""What every handler needs, once for all: a table entry per endpoint, bodies read within bounds, deadlines, errors, callers who leave.

A handler gets an `Asked` and returns a response. The same table makes the routes and the OpenAPI document (`openapi.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import zlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import unquote

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from seqserve import AsyncClient, errors
from web import problems
from web.config import Config
from web.problems import Problem
from web.upstream import upstream

log = logging.getLogger(__name__)

T = TypeVar("T")
Handler = Callable[["Asked"], Coroutine[Any, Any, Response]]

TIMEOUT = "x-request-timeout"  # seconds, as a decimal number
JSON = "application/json"
CODINGS: Mapping[str, int] = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}  # HTTP's deflate is zlib's form


@dataclass(frozen=True, slots=True)
class Query:
    """A parameter of an endpoint's query string."""

    name: str
    says: str
    kind: type = str


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One method of one path. `{name}` in a path is one segment, percent-encoded where it has to be."""

    method: str
    path: str
    run: Handler
    tag: str
    summary: str
    takes: type | None = None  # of a JSON body
    takes_bytes: bool = False
    optional: bool = False  # whether the body may be left out
    gives: Any = None  # of a JSON answer; None: an empty one
    gives_bytes: bool = False
    binary: bool = False  # whether tensors may follow the JSON, either way
    streams: Any = None  # of the events' data, by event, where the answer may come as server-sent events
    status: int = 200
    query: Sequence[Query] = ()
    refusals: Sequence[int] = field(default=(400, 404))  # besides those that any request may meet


class Asked:
    """One request."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.headers = request.headers
        self.body = b""  # decompressed

    @property
    def config(self) -> Config:
        config: Config = self.request.app.state.config
        return config

    @property
    def client(self) -> AsyncClient:
        """The server, as this caller."""
        return upstream(self.request).of(self.request)

    @property
    def timeout(self) -> float:
        """Seconds that the server may take. Raises Problem for a header that is none."""
        given = self.headers.get(TIMEOUT)
        if given is None:
            return self.config.timeout
        try:
            seconds = float(given)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds <= self.config.max_timeout:
            raise problems.bad("BAD_TIMEOUT", f"{TIMEOUT} is {given[:40]!r}: seconds above 0, at most {self.config.max_timeout:g}")
        return seconds

    def named(self, parameter: str) -> str:
        """A segment of the path as it was meant; "" where the path has none of that name."""
        return unquote(self.request.path_params.get(parameter, ""))

    def query(self, name: str, default: str = "") -> str:
        return self.request.query_params.get(name, default)

    def number(self, name: str) -> int:
        """A whole number of the query; 0 where there is none. Raises Problem."""
        given = self.query(name, "0")
        if not (given.isascii() and given.isdecimal() and len(given) <= 10):
            raise problems.bad("BAD_QUERY", f"{name} is {given[:40]!r}: a whole number from 0")
        return int(given)

    def flag(self, name: str) -> bool:
        given = self.query(name, "false")
        if given not in ("true", "false"):
            raise problems.bad("BAD_QUERY", f"{name} is {given[:40]!r}: true or false")
        return given == "true"

    def accepts(self, media: str) -> bool:
        return any(part.split(";")[0].strip().lower() == media for part in self.headers.get("accept", "").split(","))

    async def read(self) -> None:
        """Read the body. Raises Problem where it is too large, or not in the coding that it says."""
        limit = self.config.max_body_bytes
        declared = self.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            raise _too_large(limit)
        parts: list[bytes] = []
        size = 0
        async for part in self.request.stream():
            size += len(part)
            if size > limit:
                raise _too_large(limit)
            parts.append(part)
        whole = b"".join(parts)
        coding = self.headers.get("content-encoding", "identity").strip().lower()
        self.body = whole if coding == "identity" else inflated(whole, coding, limit)

    def json(self, kind: type[T], optional: bool = False) -> T:
        """The body as a value of that type. Raises Problem, naming the place, where it is none."""
        body = self.body
        media = self.headers.get("content-type", JSON).split(";")[0].strip().lower()
        if body and media != JSON:
            raise Problem(415, "NOT_JSON", f"the body is {media[:80]!r}: send {JSON}", headers={"accept-post": JSON})
        return decoded(body or (b"{}" if optional else b""), kind)


def decoded(body: bytes, kind: type[T]) -> T:
    """JSON as a value of that type. Raises Problem."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as e:
        raise problems.bad("BAD_BODY", f"the body is not what is asked for: {e}") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise problems.bad("NOT_JSON", f"the body is no JSON: {e}" if body else "there is no body: send a JSON object") from None
    except RecursionError:
        raise problems.bad("NOT_JSON", "the body is nested too deeply") from None


def inflated(body: bytes, coding: str, limit: int) -> bytes:
    """A compressed body, never more than `limit` bytes of it. Raises Problem."""
    if coding not in CODINGS:
        known = ", ".join(CODINGS)
        raise Problem(415, "BAD_CODING", f"content-encoding {coding[:40]!r}: {known} are known", headers={"accept-encoding": known})
    inflate = zlib.decompressobj(CODINGS[coding])
    try:
        plain = inflate.decompress(body, limit + 1)
        ended = inflate.eof
    except zlib.error:
        raise problems.bad("BAD_CODING", f"the body is not {coding}, as its content-encoding says") from None
    if len(plain) > limit:
        raise _too_large(limit)
    if not ended or inflate.unused_data:
        raise problems.bad("BAD_CODING", f"the {coding} body is {'cut off' if not ended else 'followed by something else'}")
    return plain


def _too_large(limit: int) -> Problem:
    return Problem(413, "BODY_TOO_LARGE", f"the body is over {limit} bytes: send less at once")


def written(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(msgspec.json.encode(value), status, headers, JSON)


def routes(endpoints: Sequence[Endpoint]) -> list[BaseRoute]:
    """A route for each path; a method that it hasn't is answered with those it has."""
    by_path: dict[str, dict[str, Endpoint]] = {}
    for endpoint in endpoints:
        assert endpoint.method not in by_path.setdefault(endpoint.path, {})
        by_path[endpoint.path][endpoint.method] = endpoint
    return [Route(path, _handle(methods), methods=list(methods)) for path, methods in by_path.items()]


def _handle(methods: Mapping[str, Endpoint]) -> Callable[[Request], Awaitable[Response]]:
    async def handle(request: Request) -> Response:
        endpoint = methods["GET" if request.method == "HEAD" else request.method]
        return await answered(request, endpoint.run)

    return handle


async def answered(request: Request, run: Handler) -> Response:
    """A handler's response, or what it was refused with. Where the caller leaves, the handler is cancelled, and its call with it."""
    protocol = problems.of_protocol(request)
    try:
        asked = Asked(request)
        if request.method == "POST":
            await asked.read()
        return await _unless_gone(request, run(asked))
    except Problem as problem:
        return problem.response(protocol)
    except errors.Error as e:
        return problems.told(e).response(protocol)
    except ClientDisconnect:
        return Response(status_code=499)  # nobody reads it
    except Exception:
        log.exception("%s %s failed", request.method, request.url.path)
        return problems.unexpected().response(protocol)


async def _unless_gone(request: Request, answer: Coroutine[Any, Any, Response]) -> Response:
    task = asyncio.ensure_future(answer)
    watch = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for ours in (task, watch):
            if not ours.done():
                ours.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await ours


async def _gone(request: Request) -> None:
    """Returns when the caller has left. Its body was read by then, or there is none that counts."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
