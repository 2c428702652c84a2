"""Server-sent events: an answer in pieces, each an event with JSON as its data, the last one `done` or `error`.

An error before the first piece is an ordinary response with its status; one behind it is an event, since the status is sent by then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress
from typing import Any

import msgspec
from starlette.responses import Response, StreamingResponse

from seqserve import errors
from web import problems

log = logging.getLogger(__name__)

MEDIA = "text/event-stream"
BEAT = 15.0  # seconds of silence after which a comment says that the connection lives; proxies cut silent ones

Event = tuple[str, Any]


async def events(source: AsyncGenerator[Event, None]) -> Response:
    """The events of `source`, which has begun well. Raises what its beginning raises; closing the response closes it."""
    try:
        first = await anext(source)
    except BaseException:
        await source.aclose()
        raise
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(_written(first, source), headers=headers, media_type=MEDIA)


async def _written(first: Event, source: AsyncGenerator[Event, None]) -> AsyncIterator[bytes]:
    upcoming: asyncio.Task[Event] | None = None
    try:
        yield event(*first)
        while True:
            upcoming = upcoming or asyncio.ensure_future(_next(source))
            done, _ = await asyncio.wait((upcoming,), timeout=BEAT)
            if not done:
                yield b":\n\n"
                continue
            finished, upcoming = upcoming, None
            yield event(*finished.result())
    except StopAsyncIteration:
        return
    except errors.Error as e:
        yield b"event: error\ndata: " + problems.told(e).body() + b"\n\n"
    except Exception:
        log.exception("a stream of events failed")
        yield b"event: error\ndata: " + problems.unexpected().body() + b"\n\n"
    finally:
        if upcoming is not None:
            upcoming.cancel()
            with suppress(BaseException):
                await upcoming
        await source.aclose()


async def _next(source: AsyncGenerator[Event, None]) -> Event:
    return await anext(source)


def event(name: str, data: Any) -> bytes:
    return f"event: {name}\ndata: ".encode() + msgspec.json.encode(data) + b"\n\n"
