"""The page: plain files, read once, sent with what keeps a browser from doing anything with them that is not meant.

Nothing comes from another host, nothing is inline, and nothing may frame the page or be sent from it elsewhere.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

STATIC = Path(__file__).parent / "static"

MEDIA: Mapping[str, str] = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".csv": "text/csv; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}

HEADERS: Mapping[str, str] = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "cache-control": "no-cache",  # asked for again each time; the answer is 304 where nothing changed
    "vary": "accept-encoding",
}


@dataclass(frozen=True, slots=True)
class File:
    """A file of the page, as it is sent."""

    plain: bytes
    packed: bytes
    media: str
    tag: str


@cache
def files() -> Mapping[str, File]:
    """All files of the page by path."""
    found = {}
    for path in sorted(STATIC.iterdir()):
        plain = path.read_bytes()
        tag = f'"{sha256(plain).hexdigest()[:20]}"'
        found[f"/{path.name}"] = File(plain, gzip.compress(plain, 9, mtime=0), MEDIA[path.suffix], tag)
    found["/"] = found.pop("/index.html")
    return found


async def send(request: Request) -> Response:
    """One file, packed where the browser takes that, or 304 where it has it."""
    file = files()[request.url.path]
    headers = {**HEADERS, "etag": file.tag}
    if file.tag in request.headers.get("if-none-match", ""):
        return Response(b"", 304, headers)
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(file.packed, 200, {**headers, "content-encoding": "gzip"}, file.media)
    return Response(file.plain, 200, headers, file.media)


def routes() -> list[BaseRoute]:
    return [Route(path, send, methods=["GET"]) for path in files()]
