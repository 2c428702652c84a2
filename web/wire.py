"""How connections are carried: uvicorn's HTTP/1.1 protocol with bounds on time and size, each kept with a typed answer.

uvicorn leaves three things to a proxy before it: a client that sends its request slowly, or not at all; one that sends headers
without end; one that does not read what it is sent. Nothing stands before this process on a laptop, so they are bounded here.
The only file that knows uvicorn's protocol classes; its range in pyproject.toml is the one this is tested with.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from web import problems
from web.config import Config
from web.problems import Problem

log = logging.getLogger(__name__)

LINGER = 2.0  # seconds
PAGE_BYTES = 256 << 10  # of a WebSocket's message: a page sends far less (live.MESSAGE characters)


class Bounded(HttpToolsProtocol):
    """One connection. Timers: a request's head, then its body, must be there in time; what is written must be read in time."""

    bounds: Config  # set on a subclass, one for each server: see `protocol`

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]  # a stream's, as uvicorn has it
        self._incoming: asyncio.TimerHandle | None = None  # until the head, or the body, must be there
        self._writing: asyncio.TimerHandle | None = None
        self._head = 0  # bytes of a head that is not complete
        self._within_head = True
        self._complete = True  # whether the request's body is there
        self._over = False  # nothing more is taken: what still comes is read and dropped
        if len(self.connections) > self.bounds.max_connections:
            message = f"{self.bounds.max_connections} connections are open: try again later"
            self._refuse(Problem(503, "TOO_MANY_CONNECTIONS", message, retry_after=problems.BUSY))
            return
        self._await(self.bounds.head_seconds, self._head_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        if self._writing is not None:
            self._writing.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._over or self.parser is None:
            return
        if self._within_head:
            self._head += len(data)
            if self._incoming is None:
                self._await(self.bounds.head_seconds, self._head_late)
        super().data_received(data)
        if self._within_head and not self._over and self._head > self.bounds.max_head_bytes:
            self._too_much_head()

    def send_400_response(self, msg: str) -> None:
        self._refuse(Problem(400, "NOT_HTTP", "this is no HTTP/1.1 request that can be read"))

    # Parser callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._within_head = True
        if self._incoming is None:
            self._await(self.bounds.head_seconds, self._head_late)

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        self._within_head, self._head = False, 0
        self._cancel()
        if size > self.bounds.max_head_bytes:
            self._too_much_head()
            return
        try:
            httptools.parse_url(self.url).path.decode("ascii")
        except (httptools.HttpParserInvalidURLError, UnicodeDecodeError, AttributeError):
            self._refuse(Problem(400, "BAD_URL", "the request's target is no path: percent-encode what is not ASCII"))
            return
        self._complete = False
        super().on_headers_complete()
        self._await(self.bounds.body_seconds, self._body_late)

    def on_body(self, body: bytes) -> None:
        if self.cycle is not None and not self._over:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._cancel()
        self._complete = True
        self._within_head = True  # of the next request, whose timer starts with its first byte
        if self.cycle is not None and not self._over:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._complete and not self.pipeline:  # it was refused before its end, which may never come
            self._unset_keepalive_if_required()
            self._linger()

    def handle_websocket_upgrade(self) -> None:
        self._cancel()
        super().handle_websocket_upgrade()

    # What is late

    def _await(self, seconds: float, late: Callable[[], None]) -> None:
        self._cancel()
        self._incoming = self.loop.call_later(seconds, late)

    def _cancel(self) -> None:
        if self._incoming is not None:
            self._incoming.cancel()
            self._incoming = None

    def _head_late(self) -> None:
        self._incoming = None
        message = f"the request's headers were not there within {self.bounds.head_seconds:g} seconds"
        self._refuse(Problem(408, "HEAD_LATE", message))

    def _body_late(self) -> None:
        self._incoming = None
        if self.flow.read_paused:  # it is us who do not read: an earlier request of this connection is being answered
            self._await(self.bounds.body_seconds, self._body_late)
            return
        message = f"the request's body was not there within {self.bounds.body_seconds:g} seconds"
        self._refuse(Problem(408, "BODY_LATE", message))

    def _too_much_head(self) -> None:
        message = f"the request's line and headers are over {self.bounds.max_head_bytes} bytes"
        self._refuse(Problem(431, "HEAD_TOO_LARGE", message))

    def _refuse(self, problem: Problem) -> None:
        """Say so, if nothing was said yet, and close."""
        if self._over or self.transport.is_closing():
            return
        log.info("%s: %s", self.client, problem.reason)
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            self.transport.write(problems.raw(problem))
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        self._linger()

    def _linger(self) -> None:
        """Close, but read on for a while: to close upon unread bytes is a reset, and the client would lose what was just said."""
        self._over = True
        self.flow.resume_reading()
        if self.transport.is_closing() or not self.transport.can_write_eof():
            self._close()
            return
        self.transport.write_eof()
        self._await(LINGER, self._unread if self.transport.get_write_buffer_size() else self._close)

    # What is not read

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(self.bounds.write_seconds, self._unread)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def _close(self) -> None:
        """Closes once what was written is read, and not much later."""
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._writing = self._writing or self.loop.call_later(self.bounds.write_seconds, self._unread)

    def _unread(self) -> None:
        log.info("%s: what was sent was not read within %g seconds", self.client, self.bounds.write_seconds)
        # By a reset: else the kernel would keep what is unread, and try to deliver it, long after we have forgotten it.
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


def protocol(config: Config) -> type[Bounded]:
    return type("Bounded", (Bounded,), {"bounds": config})


class Server(uvicorn.Server):
    """uvicorn's, which tells its port and leaves signals to whoever runs it."""

    def __init__(self, app: ASGIApp, config: Config) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol(config),
                ws="websockets-sansio",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=config.access_log,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=math.ceil(config.idle_seconds),
                timeout_graceful_shutdown=math.ceil(config.drain_seconds),
                ws_max_size=PAGE_BYTES,
                ssl_certfile=config.tls_cert,
                ssl_keyfile=config.tls_key,
            )
        )
        self._bounds = config
        self.port = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.started:
            return
        config = self._bounds
        self.port = self.servers[0].sockets[0].getsockname()[1]
        if config.port_file is not None:
            _written(config.port_file, self.port)
        scheme, host = "http" if config.tls_cert is None else "https", f"[{config.host}]" if ":" in config.host else config.host
        log.info("serving %s on %s://%s:%d", config.target, scheme, host, self.port)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _written(file: Path, port: int) -> None:
    """Whole or not at all: whoever started us waits for it."""
    part = file.with_name(file.name + ".part")
    part.write_text(f"{port}\n", encoding="ascii")
    part.replace(file)


def listening(config: Config) -> socket.socket:
    """Raises OSError where the port is taken or the host is none."""
    family, _, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    # The protocol by name: asyncio turns Nagle's algorithm off only for sockets that say TCP, and with it a response, which is two
    # writes, waits 40 ms for its reader's delayed acknowledgement.
    made = socket.socket(family, socket.SOCK_STREAM, protocol)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.setblocking(False)
    except OSError:
        made.close()
        raise
    return made
