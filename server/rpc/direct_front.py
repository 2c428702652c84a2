"""The front that speaks HTTP/2 itself, on the server's own thread: what it costs is paid once for all that arrived together.

One thread waits for sockets, reads all that has arrived, runs handlers, and sends what was answered meanwhile: one system call for
everything of one connection, where gRPC's core takes several for each call. How calls pass is h2_connection.py and h2_calls.py.

When nothing more has arrived, or a round's rows have, the thread does what there is to do besides: brief rounds. Only then it sleeps.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import socket as sockets
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping

import grpc

from server.rpc import h2_frames as h2
from server.rpc.front import DEFAULTS, Besides, Method, Options, Tls, cannot_listen
from server.rpc.h2_calls import KINDS
from server.rpc.h2_connection import Connection, Entry
from server.rpc.h2_frames import Fault
from server.rpc.h2_socket import Socket, TlsSocket

logger = logging.getLogger(__name__)

LOOKS = 4  # at the sockets in a row, however much they bring, before the work besides has its turn
TICK_S = 1.0  # between two looks at who has fallen silent
GREETING_S = 20.0  # a connection that has not said what it speaks by then is closed
LINGER_S = 0.5  # for a caller to hear that we drain, or to close what is over, before we do
BACKLOG_OF_CONNECTIONS = 1024

_NO_DEADLINE = float("inf")
_FULL = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class DirectFront:
    """A front of one thread; see the module for how calls pass and `front.Front` for what each method promises."""

    accepts = 64  # connections taken at once

    def __init__(self, methods: Mapping[str, Method], options: Options = DEFAULTS, besides: Besides | None = None) -> None:
        self.options = options
        self.table: dict[str, Entry] = {name: (KINDS[m.kind], name, m.start) for name, m in methods.items()}
        self.draining = False
        self._besides = besides
        self._selector = selectors.DefaultSelector()
        self._listeners: list[tuple[sockets.socket, ssl.SSLContext | None]] = []
        self._resting: list[tuple[sockets.socket, Callable[[int], None]]] = []  # of these, while no connection can be taken
        self._connections: set[Connection] = set()
        self._writing: set[Connection] = set()  # whose socket is full
        self._dirty: deque[Connection] = deque()  # that have something to send; one object for good, since any thread adds to it
        self._thread = threading.Thread(target=self._work, name="seqserve-front", daemon=True)
        self._lock = threading.Lock()  # of the stages below
        self._started = self._stopping = self._closed = False
        self._sleeping = False
        self._soonest = _NO_DEADLINE
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._woken, False)
        os.set_blocking(self._waker, False)
        self._selector.register(self._woken, selectors.EVENT_READ, self._wake_up)

    # ---- Any thread ----

    @property
    def live(self) -> int:
        return sum(len(c.calls) for c in list(self._connections))

    def listen(self, address: str, tls: Tls | None = None) -> int:
        host, _, port = address.rpartition(":")
        context = None if tls is None else tls.context()
        bound = int(port)
        opened: list[sockets.socket] = []
        try:
            found = sockets.getaddrinfo(host.strip("[]"), bound, type=sockets.SOCK_STREAM, flags=sockets.AI_PASSIVE)
            for family, kind, proto, _, where in found:
                listener = sockets.socket(family, kind, proto)
                opened.append(listener)
                listener.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
                if family == sockets.AF_INET6:
                    listener.setsockopt(sockets.IPPROTO_IPV6, sockets.IPV6_V6ONLY, host.strip("[]") != "::")
                listener.bind((where[0], bound, *where[2:]))
                bound = listener.getsockname()[1]  # of the others too, where the first took any free one
                listener.listen(BACKLOG_OF_CONNECTIONS)
                listener.setblocking(False)
        except OSError as e:
            for listener in opened:
                listener.close()
            raise OSError(f"{cannot_listen(address)} ({e})") from None
        self._listeners += [(listener, context) for listener in opened]
        return bound

    def start(self) -> None:
        with self._lock:
            if self._started:
                raise RuntimeError("this front has been started before")
            self._started = True
            self._open()
            self._thread.start()

    def _open(self) -> None:
        """Begin to take connections."""
        for listener, context in self._listeners:
            self._selector.register(listener, selectors.EVENT_READ, self._acceptor(listener, context))

    def _shut(self) -> None:
        """Take no more."""
        self._rested()
        for listener, _ in self._listeners:
            self._selector.unregister(listener)
            listener.close()
        self._listeners = []

    def _rested(self) -> None:
        """Look again for connections, where none could be taken."""
        for listener, accept in self._resting:
            self._selector.register(listener, selectors.EVENT_READ, accept)
        self._resting = []

    def drain(self) -> None:
        with self._lock:
            self.draining = True
            started = self._started
        if started:
            self._wake()
        else:
            self._close()

    def stop(self, grace_s: float) -> None:
        self.drain()
        if not self._started:
            return
        self._thread.join(grace_s)
        if self._thread.is_alive():
            self._stopping = True
            self._wake()
            self._thread.join()

    def touch(self, connection: Connection) -> None:
        """Have what was written sent: at the end of this turn of the front's thread, which is woken if it sleeps."""
        self._dirty.append(connection)
        if self._sleeping:
            self._sleeping = False
            self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):  # full: it has been woken; closed: it has ended
            os.write(self._waker, b"x")

    # ---- The front's thread ----

    def sooner(self, deadline: float) -> None:
        if deadline < self._soonest:
            self._soonest = deadline

    def _work(self) -> None:
        try:
            self._loop()
        except BaseException:
            logger.exception("the front's thread failed")
            raise
        finally:
            self._close()

    def _loop(self) -> None:
        besides = self._besides
        select = self._selector.select
        working = False  # there may be work besides: look for more, but do not sleep
        looks = 0
        tick = time.monotonic() + TICK_S
        while True:
            if working:
                events = select(0)
            else:
                self._sleeping = True
                pause = 0.0 if self._dirty or self.draining else max(0.0, min(tick, self._soonest) - time.monotonic())
                if self.draining and not self._dirty:
                    pause = LINGER_S / 5
                events = select(pause)
                self._sleeping = False
            if events:
                if besides is not None and not working:
                    besides.attend()
                    working = True
                for key, mask in events:
                    try:
                        key.data(mask)
                    except BaseException:
                        logger.exception("a connection could not be handled")
                    if besides is not None and besides.enough:
                        if not besides.brief():
                            besides.attend()  # there is more to take, so it still comes by here again
                        self._send()
                        looks = 0
                looks += 1
            if besides is not None and working and (not events or looks >= LOOKS):
                looks = 0
                working = besides.brief()
            elif not events:
                working = False
            self._settle()
            now = time.monotonic()
            if now >= tick or now >= self._soonest or self.draining:
                self._tick(now)
                tick = now + TICK_S
                if self._stopping or (self.draining and not self._connections):
                    return

    def _settle(self) -> None:
        """The end of a turn: what it wrote is sent."""
        if self._dirty:
            self._send()

    def _send(self) -> None:
        """Send what was written, connection by connection."""
        for _ in range(len(self._dirty)):
            connection = self._dirty.popleft()
            if connection not in self._connections:
                continue
            try:
                connection.flush()
            except Fault as e:
                connection.end(e.code, str(e))
            except OSError:
                self._lost(connection)
                continue
            self._watch(connection)

    def _watch(self, connection: Connection) -> None:
        """What to hear of: of room in its socket where it is full, of nothing to read where too much waits to be sent."""
        pending = connection.socket.pending > 0
        if pending or connection in self._writing:
            if pending:
                self._writing.add(connection)
            else:
                self._writing.discard(connection)
            events = selectors.EVENT_WRITE if pending else 0
            if not connection.stuck:
                events |= selectors.EVENT_READ
            self._selector.modify(connection.socket.socket, events, self._carrier(connection))
        if connection.over and not pending:
            with contextlib.suppress(OSError):
                connection.socket.finish()  # and wait for its own end, or what we said last could be lost

    def _wake_up(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._woken, 4096)

    def _acceptor(self, listener: sockets.socket, context: ssl.SSLContext | None) -> Callable[[int], None]:
        def accept(_mask: int) -> None:
            for _ in range(self.accepts):
                try:
                    socket, where = listener.accept()
                except BlockingIOError:
                    return
                except OSError as e:
                    if e.errno in _FULL:  # it stays ready to be taken: to be told so again and again would take the whole thread
                        logger.error("no connection can be taken for a second: %s", e)
                        self._selector.unregister(listener)
                        self._resting.append((listener, accept))
                        return
                    continue  # it has gone again
                self._take(socket, where, context)

        return accept

    def _take(self, socket: sockets.socket, where: tuple[str, int], context: ssl.SSLContext | None) -> None:
        try:
            socket.setblocking(False)
            socket.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_NODELAY, 1)
        except OSError:
            socket.close()
            return
        lock = threading.Lock()
        carried = Socket(socket) if context is None else TlsSocket(socket, context, lock)
        peer = f"ipv6:[{where[0]}]:{where[1]}" if socket.family == sockets.AF_INET6 else f"ipv4:{where[0]}:{where[1]}"
        connection = Connection(self, carried, peer, lock)
        self._connections.add(connection)
        self._selector.register(socket, selectors.EVENT_READ, self._carrier(connection))
        connection.greet()
        if self.draining:
            connection.drain()

    def _carrier(self, connection: Connection) -> Callable[[int], None]:
        def carry(mask: int) -> None:
            try:
                if mask & selectors.EVENT_WRITE:
                    with connection.lock:
                        connection.socket.push()
                    connection.touch()
                if mask & selectors.EVENT_READ and not connection.read():
                    self._lost(connection)
            except OSError:
                self._lost(connection)

        return carry

    def _lost(self, connection: Connection) -> None:
        """The connection has ended, or is of no more use."""
        if connection in self._connections:
            self._connections.discard(connection)
            self._writing.discard(connection)
            self._selector.unregister(connection.socket.socket)
            connection.socket.socket.close()
            connection.lose()

    def _tick(self, now: float) -> None:
        """Who has fallen silent, whose time is up; and what a drain has come to."""
        if self.draining and self._listeners:
            self._shut()
        self._rested()
        late = now >= self._soonest
        soonest = _NO_DEADLINE
        for c in list(self._connections):
            if late:
                for call in list(c.calls.values()):
                    if call.deadline is not None:
                        if call.deadline <= now:
                            call.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed")
                        else:
                            soonest = min(soonest, call.deadline)
            if c.over:
                if now - c.over > LINGER_S:
                    self._lost(c)
            elif not c.greeted:
                if self.draining or now - c.born > GREETING_S:
                    self._lost(c)
            elif self.draining:
                c.drain()
                if not c.calls and (c.settled or now - c.drained > LINGER_S):
                    c.end()
            elif c.pinged:
                if c.heard > c.pinged:
                    c.pinged = 0.0  # any sign of life will do
                elif now - c.pinged > self.options.keepalive_timeout_s:
                    logger.info("%s: no answer for %.0f s; its %d calls are given up", c.peer, now - c.heard, len(c.calls))
                    self._lost(c)
            elif now - c.heard > self.options.keepalive_s and not c.stuck:  # of those nothing is read
                c.ask()
        if late:
            self._soonest = soonest
        if self._dirty:
            self._send()

    def _close(self) -> None:
        """The end: what still runs is told, what was written is sent as far as it can be within a moment."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for c in list(self._connections):
            for call in list(c.calls.values()):
                call.abort(grpc.StatusCode.UNAVAILABLE, "the server has stopped; send the request again")
            c.end(h2.NO_ERROR, "the server has stopped")
        until = time.monotonic() + LINGER_S
        while self._connections and time.monotonic() < until:
            self._send()
            for key, mask in self._selector.select(LINGER_S / 10):
                if key.fileobj != self._woken and all(key.fileobj is not listener for listener, _ in self._listeners):
                    key.data(mask)
        for c in list(self._connections):
            self._lost(c)
        for listener, _ in self._listeners:
            listener.close()
        self._selector.close()
        os.close(self._woken)
        os.close(self._waker)
