"""One caller's connection: HTTP/2 (RFC 9113) as gRPC speaks it, from bytes to calls and back.

The front's thread reads: all that has arrived at once, frame by frame. Any thread writes, under `lock`, into `out`; the front's thread
sends all of it in one piece. Callers that send too much, too often or too slowly cost no more than their own connection.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Protocol

import grpc

from server.rpc import h2_frames as h2
from server.rpc.front import DRAINING, Options, Receiver, no_such_method
from server.rpc.h2_calls import BACKLOG, STREAM_WINDOW, Call, OpenCall, StreamCall, UnaryCall
from server.rpc.h2_frames import Fault
from server.rpc.h2_headers import MOST_BYTES, MOST_READ, Asked, Reader, Unreadable, Writer, no_grpc
from server.rpc.h2_socket import Socket

logger = logging.getLogger(__name__)

WINDOW = 8 << 20  # bytes of all calls' messages that may be under way to us on one connection
PIECE = 128 << 10  # bytes read at once; then others have their turn
STUCK = 4 * BACKLOG  # bytes waiting for the socket beyond which no more is read, since what is read may have to be answered
RESETS = 2_000, 500.0  # calls that a caller may cancel at once, and a second: more is an attack (CVE-2023-44487)
_DROPPED = 4  # times `unread_bytes`: unary answers that come on top of so much are dropped, whenever their calls began
_PARTIAL = 4  # times the longest message: what one connection's messages may hold before they are whole
_DRAIN = b"drain..."
_ALIVE = b"alive?.."
_HTTP1 = (
    b"HTTP/1.1 505 HTTP Version Not Supported\r\nconnection: close\r\ncontent-length: 43\r\n\r\n"
    b"This port speaks gRPC, which needs HTTP/2.\n"
)

Entry = tuple[type[UnaryCall] | type[StreamCall] | type[OpenCall], str, Callable[..., Receiver | None]]
"""How calls of a method begin: their class, the method's name, its handler."""


class Home(Protocol):
    """The front that a connection belongs to."""

    options: Options
    table: dict[str, Entry]
    draining: bool

    def touch(self, connection: Connection) -> None:
        """It has something to send, or calls to go on with."""

    def sooner(self, deadline: float) -> None:
        """A call with this deadline has begun."""


class Connection:
    """One connection. What is not said to be any thread's is the front's thread's."""

    def __init__(self, home: Home, socket: Socket, peer: str, lock: threading.Lock) -> None:
        self.options = home.options
        self.peer = peer
        self.certificate: bytes | None = None
        self.socket = socket
        self.lock = lock  # of all that is sent, here and in calls
        self.calls: dict[int, Call] = {}
        self.blocked: deque[Call] = deque()  # that wait for room to write
        self.kept: OrderedDict[Call, None] = OrderedDict()  # that wait for the caller to read what is there, in the order they came
        self.full = False  # so much is unread that calls that come are kept; ends with the last of them
        self.unread = 0  # bytes in all calls' queues
        self._largest = 0  # of the messages in queues, or of one that was: one reply may be of any size and hinders nobody
        self.window = h2.WINDOW  # bytes that the caller takes of all calls
        self.first_window = h2.WINDOW  # of a new call
        self.longest = h2.LONGEST
        self.size = 0  # bytes in `out` and in the socket's hands
        self.writer = Writer()
        self.dirty = False  # the front knows that there is something to send
        self.over = 0.0  # since when nothing is read any more; what is to be sent is sent
        self.born = self.heard = time.monotonic()
        self.pinged = 0.0  # when it was asked whether it lives; 0 when it answered
        self.drained = 0.0  # when it was told that we drain
        self.settled = False  # it has heard so: whatever calls it has begun we have seen
        self.greeted = False
        self._home = home
        self._out: list[bytes] = []
        self._resumed: list[OpenCall] = []
        self._reader = Reader()
        self._rest = b""  # of a frame that is not whole
        self._last = 0  # the newest call's stream
        self._partial = 0  # bytes of messages that are not whole, or some more
        self._received = 0  # bytes since the caller was last told that it may send more
        self._block: tuple[int, int, bytearray] | None = None  # stream, flags and what has come of a header block in several frames
        self._resets = float(RESETS[0])
        self._reset_at = self.born

    # ---- Out, from any thread with the lock ----

    def write(self, data: bytes) -> None:
        self._out.append(data)
        self.size += len(data)

    def forget(self, call: Call) -> None:
        self.calls.pop(call.stream, None)
        if self.kept:
            self.kept.pop(call, None)

    def waits(self, n: int) -> None:
        """A message of so many bytes waits for room."""
        self.unread += n
        if n > self._largest:
            self._largest = n
        if self.brimming:
            self.full = True

    def taken(self, n: int) -> None:
        """So many bytes wait no longer."""
        self.unread -= n
        if not self.unread:
            self._largest = 0

    @property
    def brimming(self) -> bool:
        """So much is unread that no call should begin."""
        return self.unread - self._largest > self.options.unread_bytes

    @property
    def flooded(self) -> bool:
        """So much is unread that no answer is kept."""
        return self.unread - self._largest > _DROPPED * self.options.unread_bytes

    def resumed(self, call: OpenCall) -> None:
        self._resumed.append(call)

    def touch(self) -> None:
        """Without the lock: have what was written sent."""
        if not self.dirty:
            self.dirty = True
            self._home.touch(self)

    # ---- Out, on the front's thread ----

    def flush(self) -> None:
        """Send what there is. Raises OSError."""
        self.dirty = False
        while True:
            with self.lock:
                was = self.size  # also what the socket has taken since: calls found no room then, and may find some now
                self._pump()
                data, self._out = self._out, []
                resumed, self._resumed = self._resumed, []
                if data:
                    self.socket.send(b"".join(data) if len(data) > 1 else data[0])
                self.size = self.socket.pending
                again = bool(self.blocked) and self.size < BACKLOG and self.window > 0 and (bool(data) or was >= BACKLOG)
            for call in resumed:
                call.resume()
                self._open_window(call)
            if self.full and self.unread - self._largest <= self.options.unread_bytes // 2:
                self._release()
            if not again and not resumed:
                return

    def keep(self, call: Call) -> None:
        """Have a call wait until less is unread."""
        with self.lock:
            self.kept[call] = None

    def _release(self) -> None:
        """The caller has read half of what there was: let calls go on that were kept, until too much is unread again."""
        while True:
            with self.lock:
                if self.brimming:
                    return
                if not self.kept:
                    self.full = False
                    break
                call, _ = self.kept.popitem(last=False)
            call.go_on()
            self._open_window(call)
        self._open_own_window()

    def _pump(self) -> None:
        """Let calls write that waited for room, each in its turn."""
        for _ in range(len(self.blocked)):
            if self.window <= 0 or self.size >= BACKLOG:
                return
            call = self.blocked.popleft()
            call.blocked = False
            if not call.pump():
                call.blocked = True
                self.blocked.append(call)

    @property
    def stuck(self) -> bool:
        """Whether so much waits for the socket that nothing more should be read."""
        return self.size > STUCK

    # ---- Its life, on the front's thread ----

    def greet(self) -> None:
        """Say what we take."""
        values = {
            h2.MAX_CONCURRENT_STREAMS: self.options.streams or h2.MOST_WINDOW,
            h2.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            h2.MAX_HEADER_LIST_SIZE: MOST_BYTES,
        }
        with self.lock:
            self.write(h2.settings(values) + h2.window_update(0, WINDOW - h2.WINDOW))
        self.touch()

    def drain(self) -> None:
        """Ask the caller to go elsewhere with new calls. It may have begun some that we have not seen: what it answers to a ping tells."""
        if not self.drained:
            self.drained = time.monotonic()
            with self.lock:
                self.write(h2.goaway(h2.LAST_STREAM, h2.NO_ERROR, "the server is shutting down") + h2.frame(h2.PING, 0, 0, _DRAIN))
            self.touch()

    def ask(self) -> None:
        """Whether anyone is there."""
        self.pinged = time.monotonic()
        with self.lock:
            self.write(h2.frame(h2.PING, 0, 0, _ALIVE))
        self.touch()

    def end(self, code: int = h2.NO_ERROR, why: str = "") -> None:
        """Read no more; calls are gone; the caller is told why."""
        if self.over:
            return
        self.over = time.monotonic()
        with self.lock:
            self.write(h2.goaway(self._last, code, why))
        self.lose()
        self.touch()

    def lose(self) -> None:
        """The calls' caller has gone."""
        self.over = self.over or time.monotonic()
        with self.lock:
            calls = list(self.calls.values())
            self.calls.clear()
            self.blocked.clear()
            self.kept.clear()
        for call in calls:
            call.gone()

    # ---- In, on the front's thread ----

    def read(self) -> bool:
        """Take in what has arrived. False at its end. Raises OSError."""
        data = self.socket.receive(PIECE)
        if data is None:
            return True
        if not data:
            return False
        if self.over:
            return True  # read and dropped, so that what we said last is not lost with what we never read
        self.heard = time.monotonic()
        try:
            self._parse(self._rest + data if self._rest else data)
        except Fault as e:
            logger.info("%s: the connection is ended: %s", self.peer, e)
            self.end(e.code, str(e))
        except Unreadable as e:
            logger.info("%s: the connection is ended: %s", self.peer, e)
            self.end(h2.COMPRESSION_ERROR, str(e))
        self._open_own_window()
        return True

    def _open_own_window(self) -> None:
        """Let the caller send more of all calls, unless calls are kept, which is all that bounds what they bring."""
        if self._received > WINDOW // 2 and not self.over and not self.full:
            with self.lock:
                self.write(h2.window_update(0, self._received))
            self._received = 0
            self.touch()

    def _greeting(self, data: bytes) -> int:
        """Bytes of the caller's preface; 0 while it is not whole. Raises Fault."""
        n = min(len(data), len(h2.PREFACE))
        if data[:n] != h2.PREFACE[:n]:
            if b"HTTP/1" in data[:1024]:
                self.over = time.monotonic()
                with self.lock:
                    self._out.clear()  # it could not read our greeting
                    self.write(_HTTP1)
                self.touch()
                return 0
            raise Fault(h2.PROTOCOL_ERROR, "this port speaks gRPC over HTTP/2")
        if n < len(h2.PREFACE):
            return 0
        self.greeted = True
        self.certificate = self.socket.certificate
        return n

    def _parse(self, data: bytes) -> None:
        """Every whole frame; what is left waits for more. Raises Fault, Unreadable."""
        at = 0
        if not self.greeted:
            at = self._greeting(data)
            if not at:
                self._rest = data
                return
        n = len(data)
        unpack = h2.HEAD.unpack_from
        calls = self.calls
        while n - at >= 9:
            high, low, kind, flags, stream = unpack(data, at)
            length = high << 8 | low
            if length > h2.LONGEST:
                raise Fault(h2.FRAME_SIZE_ERROR, f"a frame of {length} bytes; at most {h2.LONGEST} were agreed upon")
            begin = at + 9
            at = begin + length
            if at > n:
                at = begin - 9
                break
            stream &= h2.MOST_WINDOW
            if kind == h2.DATA:
                if self._block is not None:
                    raise Fault(h2.PROTOCOL_ERROR, "a header block was not ended")
                self._received += length
                call = calls.get(stream)
                if call is None:
                    if stream > self._last or not stream & 1:
                        raise Fault(h2.PROTOCOL_ERROR, f"DATA on stream {stream}, which was not begun")
                    continue  # of a call that is over
                if call.ended:
                    raise Fault(h2.PROTOCOL_ERROR, f"DATA on stream {stream} after its end")
                if flags & h2.END_STREAM:
                    call.ended = True
                else:
                    call.received += length
                if (
                    length >= 5
                    and not flags & h2.PADDED
                    and call._partial is None
                    and not data[begin]
                    and int.from_bytes(data[begin + 1 : begin + 5]) == length - 5 <= self.options.max_receive_bytes
                ):
                    call.message(data[begin + 5 : at])  # one whole message, as nearly always
                else:
                    self._data(call, h2.unpadded(flags & h2.PADDED, data[begin:at]))
                if call.ended:
                    if stream in calls:
                        self._ended(call)
                elif call.received > STREAM_WINDOW // 2:
                    self._open_window(call)
            elif kind == h2.HEADERS:
                if self._block is not None:
                    raise Fault(h2.PROTOCOL_ERROR, "a header block was not ended")
                block = data[begin:at] if not flags & (h2.PADDED | h2.WITH_PRIORITY) else h2.unpadded(flags, data[begin:at])
                if flags & h2.END_HEADERS:
                    self._headers(stream, flags, block)
                else:
                    self._block = (stream, flags, bytearray(block))
            elif kind == h2.WINDOW_UPDATE and stream > self._last:
                raise Fault(h2.PROTOCOL_ERROR, f"stream {stream} was not begun")
            else:
                self._control(kind, flags, stream, data[begin:at])
            if self.over:
                return
        self._rest = data[at:]

    def _data(self, call: Call, payload: bytes) -> None:
        """A piece of a message, or of several."""
        if not payload:
            return
        before = call.partial
        call.data(payload)
        self._partial += call.partial - before
        most = _PARTIAL * self.options.max_receive_bytes
        if self._partial > most:  # so far at most: calls that ended within a message are still in it
            self._partial = sum(c.partial for c in self.calls.values())
        if self._partial > most:
            call.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many large messages at once on one connection; send them one after another")

    def _ended(self, call: Call) -> None:
        if call.partial:
            call.abort(grpc.StatusCode.INTERNAL, "the call ended within a message")
        else:
            call.end()

    def _open_window(self, call: Call) -> None:
        """Let the caller send more of this call, unless what it sent is not read yet."""
        if call.received > STREAM_WINDOW // 2 and not call.ended and not (isinstance(call, OpenCall) and call.held):
            with self.lock:
                self.write(h2.window_update(call.stream, call.received))
            call.received = 0
            self.touch()
        elif call.received > STREAM_WINDOW:
            raise Fault(h2.FLOW_CONTROL_ERROR, f"stream {call.stream} was sent more than was allowed")

    def _headers(self, stream: int, flags: int, block: bytes) -> None:
        """A call begins, or ends with trailers. Raises Fault, Unreadable."""
        asked = self._reader.read(block)
        call = self.calls.get(stream)
        if call is not None:
            if not flags & h2.END_STREAM or call.ended:
                raise Fault(h2.PROTOCOL_ERROR, f"headers amid stream {stream}")
            call.ended = True
            self._ended(call)
            return
        if not stream & 1:
            raise Fault(h2.PROTOCOL_ERROR, f"stream {stream} is not the caller's to begin")
        if stream <= self._last:
            return  # trailers of a call that is over
        self._last = stream
        if 0 < self.options.streams <= len(self.calls):
            with self.lock:
                self.write(h2.reset(stream, h2.REFUSED_STREAM))
            self.touch()
            return
        entry = self._home.table.get(asked.path)
        if entry is None or asked.refusal is not None or self._home.draining:
            self._refuse(stream, flags, asked)
            return
        kind, method, start = entry
        call = kind(self, stream, method, start, asked)
        self.calls[stream] = call
        if call.deadline is not None:
            self._home.sooner(call.deadline)
        if kind is OpenCall:
            call.begin()
        if flags & h2.END_STREAM:
            call.ended = True
            call.end()

    def _refuse(self, stream: int, flags: int, asked: Asked) -> None:
        """A call that no handler sees."""
        refusal = asked.refusal
        if refusal is not None and refusal.http != 200:
            with self.lock:
                self.write(h2.headers(stream, self.writer.prefix() + no_grpc(refusal.http, refusal.message), True))
                if not flags & h2.END_STREAM:
                    self.write(h2.reset(stream, h2.NO_ERROR))
            self.touch()
            return
        call = UnaryCall(self, stream, asked.path, lambda *_: None, asked)
        call.ended = bool(flags & h2.END_STREAM)
        self.calls[stream] = call
        if refusal is not None:
            call.fail(refusal.status, refusal.message)
        elif self._home.draining:
            call.fail(grpc.StatusCode.UNAVAILABLE, DRAINING)
        else:
            call.fail(grpc.StatusCode.UNIMPLEMENTED, no_such_method(asked.path, self._home.table))

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """All other frames. Raises Fault, Unreadable."""
        if self._block is not None and (kind != h2.CONTINUATION or stream != self._block[0]):
            raise Fault(h2.PROTOCOL_ERROR, "a header block was not ended")
        if kind == h2.WINDOW_UPDATE:
            self._window_update(stream, payload)
        elif kind == h2.CONTINUATION:
            if self._block is None:
                raise Fault(h2.PROTOCOL_ERROR, "CONTINUATION of nothing")
            stream, began, block = self._block
            block += payload
            if len(block) > MOST_READ:
                raise Fault(h2.ENHANCE_YOUR_CALM, f"headers of more than {MOST_READ} bytes")
            if flags & h2.END_HEADERS:
                self._block = None
                self._headers(stream, began, bytes(block))
        elif kind == h2.RST_STREAM:
            self._reset(stream, payload)
        elif kind == h2.SETTINGS:
            self._settings(flags, stream, payload)
        elif kind == h2.PING:
            self._ping(flags, stream, payload)
        elif kind == h2.PUSH_PROMISE:
            raise Fault(h2.PROTOCOL_ERROR, "callers promise nothing")
        # GOAWAY: the caller begins no more calls, and closes when the last is over. PRIORITY means nothing any more. Others are unknown.

    def _window_update(self, stream: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Fault(h2.FRAME_SIZE_ERROR, "WINDOW_UPDATE is of 4 bytes")
        more = int.from_bytes(payload) & h2.MOST_WINDOW
        if not more:
            raise Fault(h2.PROTOCOL_ERROR, "a window is not opened by 0")
        with self.lock:
            if not stream:
                self.window += more
                wide = self.window
            else:
                call = self.calls.get(stream)
                if call is None:
                    return
                call.window += more
                wide = call.window
        if wide > h2.MOST_WINDOW:
            raise Fault(h2.FLOW_CONTROL_ERROR, "a window of over 2^31-1 bytes")
        if self.blocked:
            self.touch()

    def _reset(self, stream: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Fault(h2.FRAME_SIZE_ERROR, "RST_STREAM is of 4 bytes")
        if not stream or stream > self._last:
            raise Fault(h2.PROTOCOL_ERROR, f"stream {stream} was not begun")
        most, a_second = RESETS
        now = self.heard
        self._resets = min(most, self._resets + (now - self._reset_at) * a_second) - 1
        self._reset_at = now
        if self._resets < 0:
            raise Fault(h2.ENHANCE_YOUR_CALM, "too many calls were cancelled")
        with self.lock:
            call = self.calls.pop(stream, None)
            if call is not None and call.blocked:
                self.blocked.remove(call)
        if call is not None:
            call.gone()
            if self.full:
                self.touch()  # what it left unread was dropped: others may go on

    def _settings(self, flags: int, stream: int, payload: bytes) -> None:
        if stream:
            raise Fault(h2.PROTOCOL_ERROR, "SETTINGS of a stream")
        if flags & h2.ACK:
            return
        with self.lock:
            for key, value in h2.read_settings(payload):
                if key == h2.INITIAL_WINDOW_SIZE:
                    if value > h2.MOST_WINDOW:
                        raise Fault(h2.FLOW_CONTROL_ERROR, "a window of over 2^31-1 bytes")
                    for call in self.calls.values():
                        call.window += value - self.first_window
                    self.first_window = value
                elif key == h2.MAX_FRAME_SIZE:
                    if not h2.LONGEST <= value < 1 << 24:
                        raise Fault(h2.PROTOCOL_ERROR, "MAX_FRAME_SIZE must be from 2^14 to 2^24-1")
                    self.longest = value
                elif key == h2.HEADER_TABLE_SIZE:
                    self.writer.table(value)
            self.write(h2.frame(h2.SETTINGS, h2.ACK, 0))
        self.touch()

    def _ping(self, flags: int, stream: int, payload: bytes) -> None:
        if len(payload) != 8 or stream:
            raise Fault(h2.FRAME_SIZE_ERROR if not stream else h2.PROTOCOL_ERROR, "PING is of 8 bytes, and of no stream")
        if not flags & h2.ACK:
            with self.lock:
                self.write(h2.frame(h2.PING, h2.ACK, 0, payload))
            self.touch()
        elif payload == _ALIVE:
            self.pinged = 0.0
        elif payload == _DRAIN:
            self.settled = True
