"""Who may call from a browser: whatever a page of another origin could send is refused before a handler sees it.

The rules. A request that carries an Origin which is neither this server's own nor allowed by name may read what anybody may (GET
answers it, but without the headers that would let its page see the answer), and is refused where it would change or cost anything:
every other method, and every WebSocket. While listening on this machine only, a Host that isn't this machine's is refused, since a
page elsewhere can give its own name our address and would be our own origin then (DNS rebinding).
"""

from __future__ import annotations

from urllib.parse import quote, unquote, urlsplit

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from web import problems
from web.config import Config
from web.problems import Problem

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
FACES = ("/v1/", "/v2/")  # whose paths name models and sessions, which may contain anything, a slash too
_PLAIN = "!$&'()*+,;=:@~"  # what quote need not touch within a segment


class Guard:
    """The outermost layer. What is refused here costs no call to the server."""

    def __init__(self, app: ASGIApp, config: Config) -> None:
        self._app = app
        self._origins = config.origins
        self._hosts = config.hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        try:
            self._check(scope)
            if scope["path"].startswith(FACES):
                scope = {**scope, "path": canonical(scope["raw_path"])}
        except Problem as problem:
            if scope["type"] == "websocket":
                await _deny(scope, receive, send, problem)
            else:
                protocol = scope["path"] == "/v2" or scope["path"].startswith("/v2/")
                await problem.response(protocol)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._hosts and _name(host) not in self._hosts:
            detail = f"host {host!r} is not one of {', '.join(sorted(self._hosts))}: add it with --allow-host, if it is yours"
            raise Problem(421, "WRONG_HOST", detail)
        origin = headers.get("origin")
        if origin is None or (scope["type"] == "http" and scope["method"] in SAFE):
            return
        if origin in self._origins or "*" in self._origins or (origin != "null" and urlsplit(origin).netloc == host):
            return
        detail = f"pages of {origin[:200]!r} may not call here: allow them with --allow-origin, if they are yours"
        raise Problem(403, "WRONG_ORIGIN", detail)


async def _deny(scope: Scope, receive: Receive, send: Send, problem: Problem) -> None:
    """A WebSocket that is not accepted, with a response where the server can send one instead of the handshake."""
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008, "reason": problem.reason})
        return
    response: Response = problem.response()
    await send({"type": "websocket.http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "websocket.http.response.body", "body": response.body})


def canonical(raw: bytes) -> str:
    """A path with every segment quoted the same way, so that a name may contain a slash as %2F. Raises Problem."""
    try:
        return "/".join(quote(unquote(segment, errors="strict"), safe=_PLAIN) for segment in raw.decode("ascii").split("/"))
    except UnicodeDecodeError:
        raise problems.bad("BAD_URL", "the path is not UTF-8, percent-encoded") from None


def _name(host: str) -> str:
    """The host's name without its port, in lower case; "" for what is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""
