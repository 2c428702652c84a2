"""Calls of the direct front: what `front.Call` promises, on the streams of an HTTP/2 connection.

A call is written to from any thread, under its connection's lock; what it writes lies in the connection until the front's thread sends it
with all else. Messages arrive on the front's thread only. Replies that the caller's windows have no room for wait in the call.
"""

from __future__ import annotations

import logging
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc

from server.rpc import h2_frames as h2
from server.rpc.ending import Ending
from server.rpc.front import NO_REQUEST, Kind, Metadata, Receiver
from server.rpc.h2_headers import Asked, failed

if TYPE_CHECKING:
    from server.rpc.h2_connection import Connection

logger = logging.getLogger(__name__)

STREAM_WINDOW = 1 << 20  # bytes of one call's messages that may be under way to us; what is not read for a slow reader lies here
BACKLOG = 256 << 10  # bytes of one connection that may wait for its socket before its calls' replies wait in the calls

_LENGTH = struct.Struct(">BL")  # gRPC's five bytes before a message: compressed or not, its length
_INFLATE = {"gzip": 31, "deflate": 15}
_UNREAD = grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]


class Call(Ending):
    """What calls of every kind share. Its way is the connection."""

    __slots__ = (
        "__weakref__", "_asked", "_asked_for", "_connection", "_kept", "_partial", "_queue", "_queued", "_sent", "_start", "_status",
        "begun", "blocked", "deadline", "ended", "received", "stream", "window",
    )  # fmt: skip

    def __init__(self, connection: Connection, stream: int, method: str, start: Callable[..., Receiver | None], asked: Asked) -> None:
        super().__init__(connection, method)
        self._connection = connection
        self.stream = stream
        self._start = start
        self._asked = asked
        self._asked_for = False  # the handler has its message, or will have it
        self._kept = b""  # that message, where it waits for the caller to read other calls' replies
        self.deadline = None if asked.timeout is None else time.monotonic() + asked.timeout
        self.window = connection.first_window  # bytes that the caller takes of this call
        self.received = 0  # bytes since the caller was last told that it may send more
        self.ended = False  # by the caller: it sends no more
        self.begun = False  # headers were written
        self.blocked = False  # waits in the connection for room
        self._partial: bytearray | None = None  # what came of a message that is not whole
        self._queue: deque[bytes] | None = None  # messages, framed, that wait for room
        self._sent = 0  # bytes of the first of them
        self._queued = 0  # bytes in the queue
        self._status: tuple[int, str, Metadata] | None = None  # to be sent after the queue

    @property
    def metadata(self) -> Metadata:
        return self._asked.metadata

    @property
    def peer(self) -> str:
        return self._connection.peer

    @property
    def peer_certificate(self) -> bytes | None:
        """What the caller proved itself with, in DER; None without mutual TLS."""
        return self._connection.certificate

    @property
    def waiting(self) -> int:
        return len(self._queue) if self._queue else 0

    # ---- What comes in, on the front's thread ----

    def begin(self) -> None:
        """The headers have come."""

    def message(self, message: bytes) -> None:
        """One whole message: the one that the handler begins with, unless it takes more."""
        if not self._asked_for:
            self._asked_for = True
            if self._connection.full:
                self._kept = message
                self._connection.keep(self)
                return
            self._run(self._start, self, message)

    def go_on(self) -> None:
        """The caller has read enough of what waited for it: the handler may begin. The connection has let go of the call."""
        message, self._kept = self._kept, b""
        if not self._over:
            self._run(self._start, self, message)

    def end(self) -> None:
        """The caller has sent its last message."""
        if not self._asked_for:
            self.fail(grpc.StatusCode.UNIMPLEMENTED, NO_REQUEST)

    def data(self, payload: bytes) -> None:
        """A piece of the caller's messages, cut anywhere."""
        if self._partial is None:
            self._partial = bytearray()
        partial = self._partial
        partial += payload
        most = self._connection.options.max_receive_bytes
        at = 0
        while len(partial) - at >= 5:
            packed, length = _LENGTH.unpack_from(partial, at)
            if length > most:
                self._partial = None
                self.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"a message larger than max ({length} vs. {most} bytes)")
                return
            if len(partial) - at - 5 < length:
                break
            message = bytes(memoryview(partial)[at + 5 : at + 5 + length])
            at += 5 + length
            if packed:
                inflated = self._inflated(message)
                if inflated is None:
                    return
                message = inflated
            self.message(message)
            if self._over:
                self._partial = None
                return
        del partial[:at]

    def _inflated(self, message: bytes) -> bytes | None:
        """A compressed message; None, and the call is over, where it can't be read or is too large."""
        encoding = self._asked.encoding
        most = self._connection.options.max_receive_bytes
        if encoding not in _INFLATE:
            self.abort(grpc.StatusCode.UNIMPLEMENTED, f"messages may be compressed by gzip or deflate, not {encoding!r}")
            return None
        inflate = zlib.decompressobj(_INFLATE[encoding])
        try:
            plain = inflate.decompress(message, most + 1)
        except zlib.error as e:
            self.abort(grpc.StatusCode.INTERNAL, f"a message that says it is {encoding} is not: {e}")
            return None
        if len(plain) > most:
            self.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"a message larger than max ({len(plain)} or more vs. {most} bytes), unpacked")
            return None
        if not inflate.eof:
            self.abort(grpc.StatusCode.INTERNAL, f"a message that says it is {encoding} is cut off: it has no end")
            return None
        if inflate.unused_data:
            self.abort(grpc.StatusCode.INTERNAL, f"a message that says it is {encoding} has {len(inflate.unused_data)} bytes after its end")
            return None
        return plain

    @property
    def partial(self) -> int:
        """Bytes held of a message that is not whole."""
        return len(self._partial) if self._partial else 0

    # ---- What goes out, under the connection's lock ----

    def _room(self, n: int) -> bool:
        """Whether so many bytes can be written now, in one frame."""
        connection = self._connection
        return (
            n <= connection.window and n <= self.window and n <= connection.longest and connection.size < BACKLOG and not connection.blocked
        )

    def _put(self, message: bytes) -> None:
        """Have a message wait for room."""
        if self._queue is None:
            self._queue = deque()
        n = len(message) + 5
        self._queue.append(_LENGTH.pack(0, n - 5) + message)
        self._queued += n
        self._connection.waits(n)

    def _finish(self, status: int, text: str, trailing: Metadata, message: bytes | None) -> None:
        if message is not None:
            if self._connection.flooded:
                status, text, trailing = _UNREAD, f"the answer was dropped: {self._connection.unread} bytes of others wait to be read", ()
            else:
                self._put(message)
        self._status = (status, text, trailing)
        self._write()

    def _drop(self) -> None:
        self._connection.taken(self._queued)
        self._connection.kept.pop(self, None)
        self._queue = self._status = None
        self._queued = 0
        self._kept = b""

    def _write(self) -> None:
        """Write what there is room for; the rest waits in the connection's line. A status alone needs no room."""
        if (not self.blocked or not self._queue) and not self.pump():
            self.blocked = True
            self._connection.blocked.append(self)

    def pump(self) -> bool:
        """Write messages, then the status, as far as there is room. True when nothing is left to write."""
        connection = self._connection
        queue = self._queue
        while queue:
            framed = queue[0]
            room = min(connection.window, self.window, BACKLOG - connection.size, connection.longest)
            if room <= 0:
                return False
            part = framed[self._sent : self._sent + room]
            self._sent += len(part)
            connection.window -= len(part)
            self.window -= len(part)
            self._open()
            connection.write(h2.frame(h2.DATA, 0, self.stream, part))
            if self._sent == len(framed):
                queue.popleft()
                self._sent = 0
                self._queued -= len(framed)
                connection.taken(len(framed))
        if self._status is not None:
            status, self._status = self._status, None
            self._close(*status)
        return True

    def _open(self) -> None:
        if not self.begun:
            self.begun = True
            writer = self._connection.writer
            self._connection.write(h2.headers(self.stream, writer.prefix() + writer.begun, False))
            writer.began()

    def _close(self, status: int, message: str, trailing: Metadata) -> None:
        """Write how the call ended; the connection lets go of it."""
        connection, stream = self._connection, self.stream
        writer = connection.writer
        if status == 0:
            self._open()
        if status == 0 and not trailing:
            connection.write(h2.headers(stream, writer.prefix() + writer.ended, True))
            writer.finished()
        else:
            block = writer.prefix() + failed(status, message, trailing, self.begun)
            connection.write(h2.headers(stream, block, True, connection.longest))
        if not self.ended:
            connection.write(h2.reset(stream, h2.NO_ERROR))  # we read no more of it (RFC 9113 §8.1)
        connection.forget(self)


class UnaryCall(Call):
    """A call with one message in and one answer."""

    __slots__ = ()

    def reply(self, message: bytes, trailing: Metadata = ()) -> None:
        if not isinstance(message, bytes):
            raise TypeError(f"{self.method} replied with {type(message).__name__}; messages are bytes")
        connection, writer = self._connection, self._connection.writer
        n = len(message) + 5
        with connection.lock:
            if self._over:
                return
            quick = self.ended and not trailing and writer.settled and self._room(n)
            if quick:  # what nearly every answer is: three frames at once
                self._over = True
                self._callbacks = ()
                connection.window -= n
                stream = self.stream
                connection.write(
                    b"".join(
                        (
                            h2.frame(h2.HEADERS, h2.END_HEADERS, stream, writer.begun),
                            h2.HEAD.pack(n >> 8, n & 255, h2.DATA, 0, stream),
                            _LENGTH.pack(0, n - 5),
                            message,
                            h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, stream, writer.ended),
                        )
                    )
                )
                connection.forget(self)
        if quick:
            connection.touch()
        else:
            self._end(grpc.StatusCode.OK, "", trailing, message)

    def finish(self, trailing: Metadata = ()) -> None:
        raise TypeError(f"{self.method} has one answer: end it with reply() or fail()")


class StreamCall(Call):
    """A call with one message in and any number of replies."""

    __slots__ = ()

    def reply(self, message: bytes, trailing: Metadata = ()) -> None:
        if trailing:
            raise TypeError(f"{self.method} is a stream: give trailing metadata to finish()")
        if not isinstance(message, bytes):
            raise TypeError(f"{self.method} replied with {type(message).__name__}; messages are bytes")
        connection = self._connection
        n = len(message) + 5
        with connection.lock:
            if self._over:
                return
            if self.begun and not self._queue and self._room(n):
                connection.window -= n
                self.window -= n
                connection.write(h2.HEAD.pack(n >> 8, n & 255, h2.DATA, 0, self.stream) + _LENGTH.pack(0, n - 5) + message)
            else:
                self._put(message)
                self._write()
        connection.touch()

    def finish(self, trailing: Metadata = ()) -> None:
        self._end(grpc.StatusCode.OK, "", trailing)


class OpenCall(StreamCall):
    """A stream that the caller writes to as well. While too many replies wait for it, its own or its connection's, what it sends is kept,
    and it is soon told to send no more: its window is not opened again."""

    __slots__ = ("_inbox", "_paused", "_receiver", "held")

    def __init__(self, connection: Connection, stream: int, method: str, start: Callable[..., Receiver | None], asked: Asked) -> None:
        super().__init__(connection, stream, method, start, asked)
        self._receiver: Receiver | None = None
        self._inbox: deque[bytes] = deque()
        self.held = False
        self._paused = False

    def hold(self, on: bool) -> None:
        """Its handler wants no more messages for now, or wants them again. On the front's thread."""
        self._paused = on
        if on:
            self.held = True
        elif not self._full(0.5):
            with self._connection.lock:
                self._connection.resumed(self)
            self._connection.touch()

    def begin(self) -> None:
        self._receiver = self._run(self._start, self)

    def message(self, message: bytes) -> None:
        if self.held:
            self._inbox.append(message)
        elif self._connection.full:
            self.held = True
            self._inbox.append(message)
            self._connection.keep(self)
        else:
            self._deliver(message)

    def end(self) -> None:
        receiver = self._receiver  # another thread may end the call
        if not self.held and receiver is not None and not self._over:
            self._run(receiver.on_end)

    def _deliver(self, message: bytes) -> None:
        receiver = self._receiver
        if receiver is not None and not self._over:
            self._run(receiver.on_message, message)
            if self._queue and self._full():
                with self._connection.lock:
                    self.held = self._paused or (not self._over and self._full())

    def resume(self) -> None:
        """The caller has read half of what waited: go on with what it sent meanwhile. On the front's thread."""
        if self._paused:
            return
        if self._connection.full:
            self._connection.keep(self)  # much of other calls waits
            return
        self.go_on()

    def go_on(self) -> None:
        if self._paused:
            return
        connection = self._connection
        self.held = False
        while self._inbox and not self.held:
            if connection.brimming:
                self.held = True
                connection.keep(self)
                return
            self._deliver(self._inbox.popleft())
        if not self.held and self.ended:
            self.end()

    def gone(self) -> None:
        super().gone()
        self._receiver = None  # it knows its call: leave no ring for the garbage collector

    def pump(self) -> bool:
        done = super().pump()
        if self.held and not self._paused and not self._full(0.5) and self not in self._connection.kept:
            self._connection.resumed(self)
        return done

    def _close(self, status: int, message: str, trailing: Metadata) -> None:
        super()._close(status, message, trailing)
        self._receiver = None
        self._inbox.clear()

    def _full(self, share: float = 1.0) -> bool:
        queue = self._queue
        if not queue:
            return False
        options = self._connection.options  # of what waits behind the one in hand
        return len(queue) - 1 > share * options.backlog_messages or self._queued - len(queue[0]) > share * options.backlog_bytes


KINDS: dict[Kind, type[UnaryCall] | type[StreamCall] | type[OpenCall]] = {
    "unary": UnaryCall,
    "server_stream": StreamCall,
    "stream": OpenCall,
}
