"""What passes between the server and its carriers, and the server's end of it: a front whose connections live in other processes.

A *carrier* (carrier.py) is a process that does what the direct front's thread does otherwise: sockets, TLS, HTTP/2, slow callers. It
hands messages as they are over one Unix socket, its *lane*, to the one process that has models and sessions, and takes replies from it.
Nothing is parsed or pickled on the way; all that a turn of either end's loop has to say is one write. So many cores can carry calls for
one interpreter.

A lane's frame is a head (kind, call, length) and a payload:

    carrier -> server                               server -> carrier
    CALLER   who calls, told once of each           REPLY    a message of a stream
    BEGIN    a call, by caller, with its deadline   ANSWER   a unary call's message; all is well
             and, but for streams, its message      FINISH   how a call ended: status, text, metadata, message
    MESSAGE  of a stream                            HOLD     read no more of this stream, for now
    END      of a stream's messages                 RESUME   go on
    GONE     the caller has left                    DRAIN    take no more calls
    TAKEN    so many replies were passed on
"""

from __future__ import annotations

import marshal
import socket as sockets
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

import grpc

from server.rpc.ending import Ending
from server.rpc.front import DRAINING, Metadata, Method, Options, Receiver
from server.rpc.h2_socket import Socket

CALLER, BEGIN, MESSAGE, END, GONE, TAKEN = range(1, 7)
REPLY, ANSWER, FINISH, HOLD, RESUME, DRAIN = range(7, 13)
FRAME: Final = struct.Struct(">BLL")  # kind, call, bytes of payload
BEGINS: Final = struct.Struct(">HLd")  # method, caller, deadline on the monotonic clock, which processes of a machine share; 0: none
COUNT: Final = struct.Struct(">L")
READY: Final = b"!"  # a carrier's first byte: from now on it takes connections
PIECE = 256 << 10  # bytes read at once
MUCH = 8 << 20  # bytes that may wait for the other end, before a carrier waits for it and the server takes no more calls of that carrier
Caller = tuple[Metadata, str, bytes | None]
"""Metadata, peer, certificate."""


def frame(kind: int, call: int, payload: bytes = b"") -> bytes:
    return FRAME.pack(kind, call, len(payload)) + payload


class Reader:
    """Bytes to frames, cut anywhere."""

    def __init__(self) -> None:
        self._rest: list[bytes] = []
        self._have = 0
        self._need = FRAME.size

    def frames(self, data: bytes) -> list[tuple[int, int, bytes]]:
        self._rest.append(data)
        self._have += len(data)
        if self._have < self._need:  # a large message in many pieces is put together once
            return []
        data = b"".join(self._rest) if len(self._rest) > 1 else data
        found = []
        at, n = 0, len(data)
        self._need = FRAME.size
        while n - at >= FRAME.size:
            kind, call, length = FRAME.unpack_from(data, at)
            end = at + FRAME.size + length
            if end > n:
                self._need = FRAME.size + length
                break
            found.append((kind, call, data[at + FRAME.size : end]))
            at = end
        self._rest = [data[at:]] if at < n else []
        self._have = n - at
        return found


class Relayed(Ending):
    """One call that a carrier carries. Satisfies front.Call. Its way is the lane."""

    __slots__ = (
        "__weakref__", "_inbox", "_lane", "_receiver", "_sizes", "_waiting_bytes", "caller", "deadline", "ended", "held", "kind", "number",
    )  # fmt: skip

    def __init__(self, lane: Lane, number: int, kind: str, method: str, caller: Caller, deadline: float | None) -> None:
        super().__init__(lane, method)
        self._lane = lane
        self.number = number
        self.kind = kind
        self.caller = caller
        self.deadline = deadline
        self._receiver: Receiver | None = None
        self._sizes: deque[int] = deque()  # of replies that the carrier has not passed on yet
        self._waiting_bytes = 0
        self._inbox: deque[bytes] = deque()
        self.held = self.ended = False

    @property
    def metadata(self) -> Metadata:
        return self.caller[0]

    @property
    def peer(self) -> str:
        return self.caller[1]

    @property
    def peer_certificate(self) -> bytes | None:
        return self.caller[2]

    @property
    def waiting(self) -> int:
        return len(self._sizes)

    def reply(self, message: bytes, trailing: Metadata = ()) -> None:
        unary = self.kind == "unary"
        if trailing and not unary:
            raise TypeError(f"{self.method} is a stream: give trailing metadata to finish()")
        if not isinstance(message, bytes):
            raise TypeError(f"{self.method} replied with {type(message).__name__}; messages are bytes")
        if unary:
            self._end(grpc.StatusCode.OK, "", trailing, message)
            return
        lane = self._lane
        with lane.lock:
            if self._over:
                return
            self._sizes.append(len(message))
            self._waiting_bytes += len(message)
            lane.write(frame(REPLY, self.number, message))
        lane.touch()

    def finish(self, trailing: Metadata = ()) -> None:
        if self.kind == "unary":
            raise TypeError(f"{self.method} has one answer: end it with reply() or fail()")
        self._end(grpc.StatusCode.OK, "", trailing)

    def _finish(self, status: int, text: str, trailing: Metadata, message: bytes | None) -> None:
        if message is not None and not trailing:
            self._lane.write(frame(ANSWER, self.number, message))
        else:
            self._lane.write(frame(FINISH, self.number, marshal.dumps((status, text, tuple(trailing), message))))
        self._drop()

    def _drop(self) -> None:
        self._lane.calls.pop(self.number, None)
        self._receiver = None  # it knows its call: leave no ring for the garbage collector

    # ---- What comes in, on the front's thread ----

    def begin(self, start: Callable[..., Receiver | None], message: bytes) -> None:
        if self.kind == "stream":
            self._receiver = self._run(start, self)
        else:
            self._run(start, self, message)

    def message(self, message: bytes) -> None:
        if self.held:
            self._inbox.append(message)
            return
        receiver = self._receiver
        if receiver is not None and not self._over:
            self._run(receiver.on_message, message)
            if self._sizes and self._full(1.0):
                self.held = True
                self._lane.tell(HOLD, self.number)

    def end(self) -> None:
        self.ended = True
        receiver = self._receiver
        if not self.held and receiver is not None and not self._over:
            self._run(receiver.on_end)

    def taken(self, count: int) -> None:
        """The carrier has passed so many replies on."""
        with self._lane.lock:
            for _ in range(min(count, len(self._sizes))):
                self._waiting_bytes -= self._sizes.popleft()
        if self.held and not self._full(0.5):
            self.held = False
            while self._inbox and not self.held:
                self.message(self._inbox.popleft())
            if not self.held:
                self._lane.tell(RESUME, self.number)
                if self.ended:
                    self.end()

    def _full(self, share: float) -> bool:
        sizes, options = self._sizes, self._lane.options  # of what waits behind the one in hand, as in h2_calls.py
        if not sizes:
            return False
        return len(sizes) - 1 > share * options.backlog_messages or self._waiting_bytes - sizes[0] > share * options.backlog_bytes


class Home(Protocol):
    """The front that lanes belong to."""

    options: Options
    draining: bool

    def touch(self, connection: Any) -> None:
        """It has something to send."""


class Lane:
    """The server's end of one carrier's lane. What h2_connection.Connection is to callers, in what the front's loop asks of it."""

    greeted = settled = True
    over = pinged = drained = 0.0

    def __init__(self, socket: sockets.socket, table: list[tuple[str, Method]], home: Home) -> None:
        self.socket = Socket(socket)
        self.options = home.options
        self.lock = threading.Lock()
        self.calls: dict[int, Relayed] = {}
        self.peer = "carrier"
        self.dirty = False
        self.ready = False  # it takes connections
        self.born = self.heard = time.monotonic()
        self._table = table
        self._home = home
        self._out: list[bytes] = []
        self._callers: dict[int, Caller] = {}
        self._reader = Reader()
        self._frames: list[tuple[int, int, bytes]] = []  # that came while too much waited for the carrier
        self._size = 0  # bytes in `out` and in the socket's hands

    @property
    def stuck(self) -> bool:
        """Whether so much waits for the carrier that no more should be read of it: most of what it says wants an answer."""
        return self._size > MUCH

    def wait(self, seconds: float) -> None:
        """Until the carrier takes connections. Raises OSError where it ends before, or takes too long."""
        self.socket.socket.settimeout(seconds)
        if self.socket.socket.recv(len(READY)) != READY:
            raise OSError("a process that is to carry calls (--rpc-processes) has ended at once; its own words are in the log")
        self.socket.socket.setblocking(False)
        self.ready = True

    def write(self, data: bytes) -> None:
        """With the lock."""
        self._out.append(data)
        self._size += len(data)

    def tell(self, kind: int, call: int) -> None:
        with self.lock:
            self.write(frame(kind, call))
        self.touch()

    def touch(self) -> None:
        if not self.dirty:
            self.dirty = True
            self._home.touch(self)

    def flush(self) -> None:
        """Raises OSError."""
        self.dirty = False
        with self.lock:
            data, self._out = self._out, []
            if data:
                self.socket.send(b"".join(data))
            self._size = self.socket.pending
        if self._frames and not self.stuck:
            frames, self._frames = self._frames, []
            self._take(frames)

    def read(self) -> bool:
        """False at its end. Raises OSError."""
        data = self.socket.receive(PIECE)
        if data is None:
            return True
        if not data:
            return False
        if not self.ready:
            self.ready, data = True, data[len(READY) :]
        frames = self._reader.frames(data) if data else []
        if self._frames:
            self._frames += frames
        else:
            self._take(frames)
        return True

    def _take(self, frames: list[tuple[int, int, bytes]]) -> None:
        """Do what the carrier says, as far as it reads what it is told."""
        for place, (kind, number, payload) in enumerate(frames):
            if self._size > MUCH:
                self._frames = frames[place:]
                return
            if kind == BEGIN:
                method, caller, deadline = BEGINS.unpack_from(payload)
                name, how = self._table[method]
                call = Relayed(self, number, how.kind, name, self._callers[caller], deadline or None)
                with self.lock:
                    self.calls[number] = call
                if self._home.draining:
                    call.abort(grpc.StatusCode.UNAVAILABLE, DRAINING)
                    continue
                call.begin(how.start, payload[BEGINS.size :])
            elif kind == CALLER:
                if payload:
                    self._callers[number] = marshal.loads(payload)
                else:
                    del self._callers[number]
            elif (found := self.calls.get(number)) is not None:
                if kind == MESSAGE:
                    found.message(payload)
                elif kind == END:
                    found.end()
                elif kind == GONE:
                    found.gone()
                elif kind == TAKEN:
                    found.taken(COUNT.unpack(payload)[0])

    def drain(self) -> None:
        if not self.drained:
            self.drained = time.monotonic()
            self.tell(DRAIN, 0)

    def ask(self) -> None:
        """A lane is no network: its end is heard."""

    def end(self, code: int = 0, why: str = "") -> None:
        """Its carrier ends by itself once it is drained, and with it the lane."""

    def lose(self) -> None:
        for call in list(self.calls.values()):
            call.gone()
