"""How connections are carried: uvicorn's HTTP/1.1 protocol with bounds on time and size, each kept with a typed answer.

uvicorn leaves four things to a proxy before it: a client that sends its request slowly, or not at all; one that sends headers, or
trailers, without end; one that sends requests without end and waits for no answer; one that does not read what it is sent. Nothing
stands before this process on a laptop, so they are bounded here. The only file that knows uvicorn's protocol classes; its range in
pyproject.toml is the one this is tested with.
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
from typing import TypeVar

import httptools
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import Frame

from web import problems
from web.config import Config
from web.problems import Problem

log = logging.getLogger(__name__)

LINGER = 2.0  # seconds
PAGE_BYTES = 256 << 10  # of a WebSocket's message: a page sends far less (live.MESSAGE characters)
END = b"\r\n\r\n"  # of a request's head, and of a body in chunks


class _Flow(FlowControl):
    """uvicorn's, which reads on for no one while enough is held back."""

    full = False

    def resume_reading(self) -> None:
        if not self.full:
            super().resume_reading()


class _Timed(asyncio.Protocol):
    """A connection on which what is written must be read in time."""

    bounds: Config  # set on a subclass, one for each server: see `bounded`
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    client: tuple[str, int] | None
    _writing: asyncio.TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_time()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._must_be_read()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._in_time()

    def _must_be_read(self) -> None:
        self._writing = self._writing or self.loop.call_later(self.bounds.write_seconds, self._unread)

    def _in_time(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _unread(self) -> None:
        log.info("%s: what was sent was not read within %g seconds", self.client, self.bounds.write_seconds)
        # By a reset: else the kernel would keep what is unread, and try to deliver it, long after we have forgotten it.
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


class Bounded(_Timed, HttpToolsProtocol):
    """One connection. A request's head, then its body, must be there in time; the next one is not looked at before it is answered."""

    flow: _Flow

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]  # a stream's, as uvicorn has it
        self.flow = _Flow(self.transport)
        self._incoming: asyncio.TimerHandle | None = None  # until the head, or the body, must be there
        self._held = bytearray()  # what came and was not looked at yet
        self._loose = 0  # bytes of a head, or of what is neither head nor body, that is not complete
        self._trailers = 0  # bytes
        self._left = 0  # bytes of a body of known length that are yet to come
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
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._over:
            self._held += data
            self._go_on()

    def _go_on(self) -> None:
        """Give the parser what came, to the end of a request; of the next one nothing before this one is answered, and the answer read.

        uvicorn would take every request there is, and its body, and keep them. A little is read ahead: else nobody would notice that
        a caller who sent more has hung up.
        """
        most = self.bounds.max_head_bytes
        while self._held and not (self._over or self.parser is None or self.transport.is_closing()):
            if self._complete and (self._answering or self.flow.write_paused):
                break
            if self._within_head and self._incoming is None:
                self._await(self.bounds.head_seconds, self._head_late)
            if self._left:
                size = min(self._left, len(self._held))
                self._left -= size
            else:
                end = self._held.find(END, 0, most)
                # Where there is none, the last bytes may be the beginning of one.
                size = end + len(END) if end >= 0 else min(len(self._held), most) - len(END) + 1
                if size <= 0:
                    break
            part = bytes(self._held[:size])
            del self._held[:size]
            self._loose += size
            super().data_received(part)
            if self._loose > most and not self._over:
                self._too_much_head()
        was_full, self.flow.full = self.flow.full, len(self._held) > HIGH_WATER_LIMIT
        if self.flow.full:
            self.flow.pause_reading()
        elif was_full:
            self.flow.resume_reading()

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def send_400_response(self, msg: str) -> None:
        self._refuse(Problem(400, "NOT_HTTP", "this is no HTTP/1.1 request that can be read"))

    # Parser callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._within_head:
            super().on_header(name, value)
            return
        # A trailer. Let go: among the headers it would be one that nobody checked (RFC 9110, 6.5.1).
        self._trailers += len(name) + len(value) + 4
        if self._trailers > self.bounds.max_head_bytes and not self._over:
            self._too_much_head()

    def on_headers_complete(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        self._within_head, self._loose, self._trailers = False, 0, 0
        self._cancel()
        if size > self.bounds.max_head_bytes:
            self._too_much_head()
            return
        if len(self._given(b"host")) > 1:
            self._refuse(Problem(400, "NOT_HTTP", "the request has several Host headers: who it is for must be said once"))
            return
        if self._given(b"transfer-encoding") not in ([], [b"chunked"]):
            self._refuse(Problem(501, "BAD_CODING", "the request's transfer-encoding is not known here: chunked is"))
            return
        self._left = sum(map(int, self._given(b"content-length")))  # there is one at most: the parser has seen to it
        try:
            httptools.parse_url(self.url).path.decode("ascii")
        except (httptools.HttpParserInvalidURLError, UnicodeDecodeError, AttributeError):
            self._refuse(Problem(400, "BAD_URL", "the request's target is no path: percent-encode what is not ASCII"))
            return
        self._complete = False
        super().on_headers_complete()
        self._await(self.bounds.body_seconds, self._body_late)

    def _given(self, header: bytes) -> list[bytes]:
        return [value.strip().lower() for name, value in self.headers if name == header]

    def on_body(self, body: bytes) -> None:
        self._loose = 0
        if self.cycle is not None and not self._over:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._cancel()
        self._loose = 0
        self._complete = True
        self._within_head = True  # of the next request, whose timer starts with its first byte
        if self.cycle is not None and not self._over:
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self._complete:  # it was refused before its end, which may never come
            self._unset_keepalive_if_required()
            self._linger()
        else:
            self._go_on()

    def handle_websocket_upgrade(self) -> None:
        self._over = True  # for us: the connection is another protocol's from here on
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
        if self.flow.read_paused:  # it is us who do not read
            self._await(self.bounds.body_seconds, self._body_late)
            return
        message = f"the request's body was not there within {self.bounds.body_seconds:g} seconds"
        self._refuse(Problem(408, "BODY_LATE", message))

    def _too_much_head(self) -> None:
        message = f"the request's line and headers, or its trailers, are over {self.bounds.max_head_bytes} bytes"
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
        self._held.clear()
        self.flow.full = False
        self.flow.resume_reading()
        if self.transport.is_closing() or not self.transport.can_write_eof():
            self._close()
            return
        self.transport.write_eof()
        self._await(LINGER, self._unread if self.transport.get_write_buffer_size() else self._close)

    # What is not read

    def resume_writing(self) -> None:
        super().resume_writing()
        self._go_on()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def _close(self) -> None:
        """Closes once what was written is read, and not much later."""
        self.transport.close()
        if self.transport.get_write_buffer_size():
            self._must_be_read()


class BoundedSocket(_Timed, WebSocketsSansIOProtocol):
    """One WebSocket. What its application is sent, and says, is bounded by that (live.py); this is what no application sees."""

    def handle_ping(self) -> None:
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()  # an answer for one who does not read; it may be left out (RFC 6455, 5.5.3)

    def handle_cont(self, event: Frame) -> None:
        if event.data or event.fin:  # else pieces of nothing would be kept, as many as are sent
            super().handle_cont(event)


T = TypeVar("T", bound=_Timed)


def bounded(kind: type[T], config: Config) -> type[T]:
    return type(kind.__name__, (kind,), {"bounds": config})


class Server(uvicorn.Server):
    """uvicorn's, which tells its port and leaves signals to whoever runs it."""

    def __init__(self, app: ASGIApp, config: Config) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=bounded(Bounded, config),
                ws=bounded(BoundedSocket, config),
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

    def load(self) -> None:
        """Read the files of `config`, which else the start does. Raises OSError with those that can't be used."""
        try:
            self.config.load()
        except OSError as e:  # ssl.SSLError is one; neither names a file
            cert, key = self._bounds.tls_cert, self._bounds.tls_key
            raise OSError(f"--tls-cert {cert} and --tls-key {key}: no PEM certificate chain and its private key ({e})") from None

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
    made = None
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, protocol, _, address = found[0]
        # The protocol by name: asyncio turns Nagle's algorithm off only for sockets that say TCP, and with it a response, which is two
        # writes, waits 40 ms for its reader's delayed acknowledgement.
        made = socket.socket(family, socket.SOCK_STREAM, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.setblocking(False)
    except OSError as e:
        if made is not None:
            made.close()
        where = f"{config.host}:{config.port}"
        why = "the port is taken, or the address is not one of this machine, or needs more rights"
        raise OSError(f"cannot listen on {where}: {why} ({e}): --host and --port name another") from None
    return made
