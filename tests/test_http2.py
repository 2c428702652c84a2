"""The direct front's HTTP/2, asked by raw frames and by another implementation of it (the package h2): what it takes, what it refuses,
and that whoever breaks the rules hurts nobody else. What fronts promise to handlers is in test_front.py."""

from __future__ import annotations

import gzip
import random
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
from hpack import Decoder, Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

from server.rpc import h2_connection, h2_frames
from server.rpc.direct_front import DirectFront
from server.rpc.front import Call, Method, Options, server_stream, unary
from server.rpc.front import stream as both_ways
from server.rpc.h2_frames import CONTINUATION, DATA, GOAWAY, HEADERS, PING, PUSH_PROMISE, RST_STREAM, SETTINGS, WINDOW_UPDATE, frame
from tests.test_front import WAIT_S, Echo, Latch

HEAD = [
    (":method", "POST"), (":scheme", "http"), (":path", "/t.S/Echo"), (":authority", "x"), ("te", "trailers"),
    ("content-type", "application/grpc"),
]  # fmt: skip
OPEN = h2_frames.PREFACE + frame(SETTINGS, 0, 0)
END_STREAM, END_HEADERS, PADDED, PRIORITY = 1, 4, 8, 0x20


def message(body: bytes, packed: bool = False) -> bytes:
    return struct.pack(">BL", packed, len(body)) + body


def headers(stream: int, *more: tuple[str, str], path: str = "/t.S/Echo", flags: int = END_HEADERS) -> bytes:
    """Headers of a call that leave no trace in anyone's table."""
    lines = [(name, path if name == ":path" else value) for name, value in HEAD] + list(more)
    block = b"".join(b"\x10" + bytes((len(n),)) + n.encode() + _length(len(v)) + v.encode() for n, v in lines)
    return frame(HEADERS, flags, stream, block)


def _length(n: int) -> bytes:
    if n < 127:
        return bytes((n,))
    out, n = bytearray((127,)), n - 127
    while n >= 128:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes((*out, n))


def call(stream: int, body: bytes, **how: Any) -> bytes:
    return headers(stream, **how) + frame(DATA, END_STREAM, stream, message(body))


class Wire:
    """A connection of bare frames."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), WAIT_S)
        self._data = b""
        self._decoder = Decoder()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def frames(self) -> Iterator[tuple[int, int, int, bytes]]:
        """What comes, until the server closes."""
        while True:
            while len(self._data) >= 9:
                high, low, kind, flags, stream = h2_frames.HEAD.unpack_from(self._data)
                end = 9 + (high << 8 | low)
                if len(self._data) < end:
                    break
                payload, self._data = self._data[9:end], self._data[end:]
                yield kind, flags, stream, payload
            try:
                more = self.socket.recv(65536)
            except ConnectionResetError:
                return
            if not more:
                return
            self._data += more

    def answers(self, count: int) -> dict[int, tuple[dict[str, str], bytes]]:
        """The trailers (with headers) and messages of so many calls, by stream."""
        said: dict[int, dict[str, str]] = {}
        bodies: dict[int, bytes] = {}
        ended = 0
        for kind, flags, stream, payload in self.frames():
            assert kind != GOAWAY, payload
            if kind == HEADERS:
                said.setdefault(stream, {}).update(self._decoder.decode(payload))
            elif kind == DATA:
                bodies[stream] = bodies.get(stream, b"") + payload
            if kind in (HEADERS, DATA) and flags & END_STREAM:
                ended += 1
                if ended == count:
                    break
        return {stream: (lines, bodies.get(stream, b"")) for stream, lines in said.items()}

    def goaway(self) -> tuple[int, str]:
        """Why the server ended the connection, which it then does."""
        found = None
        for kind, _, _, payload in self.frames():
            if kind == GOAWAY:
                found = struct.unpack_from(">L", payload, 4)[0], payload[8:].decode()
        assert found is not None
        return found

    def close(self) -> None:
        self.socket.close()


class Served:
    def __init__(self, front: DirectFront, port: int) -> None:
        self.front, self.port = front, port
        self.wires: list[Wire] = []

    def wire(self) -> Wire:
        self.wires.append(Wire(self.port))
        return self.wires[-1]

    def well(self) -> bool:
        """Whether another caller, an ordinary one, is served."""
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            return channel.unary_unary("/t.S/Echo")(b"well", timeout=WAIT_S) == b"well"


Serve = Callable[..., Served]


def echo(call: Call, request: bytes) -> None:
    call.reply(request)


def twice(call: Call, request: bytes) -> None:
    call.reply(request)
    call.reply(request[::-1])
    call.finish()


METHODS = {"/t.S/Echo": unary(echo), "/t.S/Twice": server_stream(twice), "/t.S/Talk": both_ways(Echo)}


@pytest.fixture
def serve() -> Iterator[Serve]:
    running: list[Served] = []

    def start(methods: dict[str, Method] | None = None, **options: Any) -> Served:
        front = DirectFront({**METHODS, **(methods or {})}, Options(**options))
        running.append(Served(front, front.listen("127.0.0.1:0")))
        front.start()
        return running[-1]

    yield start
    for served in running:
        for wire in served.wires:
            wire.close()
        served.front.stop(0)
        assert served.front.live == 0


# ---- Others' HTTP/2 ----


CODES = h2.settings.SettingCodes


class Peer:
    """The package h2 as a caller."""

    def __init__(self, port: int, wishes: dict[Any, int]) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), WAIT_S)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.local_settings = h2.settings.Settings(client=True, initial_values={**dict(self.h2.local_settings), **wishes})
        self.h2.decoder.header_table_size = wishes.get(CODES.HEADER_TABLE_SIZE, 4096)
        self.h2.max_inbound_frame_size = wishes.get(CODES.MAX_FRAME_SIZE, 16_384)
        self.h2.initiate_connection()

    def ask(self, path: str, bodies: list[bytes]) -> list[tuple[dict[str, str], bytes]]:
        """Calls all at once; their headers with trailers, and bytes."""
        ids = []
        for body in bodies:
            ids.append(self.h2.get_next_available_stream_id())
            self.h2.send_headers(ids[-1], [(n, path if n == ":path" else v) for n, v in HEAD])
            whole = message(body)
            for at in range(0, len(whole), 16_384):
                self.h2.send_data(ids[-1], whole[at : at + 16_384], end_stream=at + 16_384 >= len(whole))
        self.socket.sendall(self.h2.data_to_send())
        said: dict[int, dict[str, str]] = {id: {} for id in ids}
        data: dict[int, bytes] = dict.fromkeys(ids, b"")
        ended = 0
        while ended < len(ids):
            got = self.socket.recv(65536)
            assert got
            for event in self.h2.receive_data(got):
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    said[event.stream_id].update(event.headers)
                elif isinstance(event, h2.events.DataReceived):
                    data[event.stream_id] += event.data
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.StreamEnded):
                    ended += 1
                assert not isinstance(event, h2.events.ConnectionTerminated), event
            self.socket.sendall(self.h2.data_to_send())
        return [(said[id], data[id]) for id in ids]


@pytest.mark.parametrize(
    "wishes",
    [{}, {CODES.HEADER_TABLE_SIZE: 0}, {CODES.INITIAL_WINDOW_SIZE: 1}, {CODES.INITIAL_WINDOW_SIZE: 100}, {CODES.MAX_FRAME_SIZE: 1 << 20}],
    ids=["as it is", "no table", "a byte at a time", "small windows", "large frames"],
)
def test_another_http2_is_served(serve: Serve, wishes: dict[Any, int]) -> None:
    """Whatever tables, windows and frames a caller wants: every answer whole, the first and the last alike."""
    peer = Peer(serve().port, wishes)
    with peer.socket:
        ask_all(peer, wishes)


def ask_all(peer: Peer, wishes: dict[Any, int]) -> None:
    bodies = [b"", b"a", b"b" * 50, *([b"c" * 40_000] if wishes != {CODES.INITIAL_WINDOW_SIZE: 1} else [])]
    for _ in range(3):
        answers = peer.ask("/t.S/Echo", bodies)
        assert [body for _, body in answers] == [message(body) for body in bodies]
        for lines, _ in answers:
            assert lines == {
                ":status": "200", "content-type": "application/grpc", "grpc-accept-encoding": "identity, deflate, gzip", "grpc-status": "0",
            }  # fmt: skip
    assert [body for _, body in peer.ask("/t.S/Twice", [b"xy"] * 3)] == [message(b"xy") + message(b"yx")] * 3
    [(lines, body)] = peer.ask("/t.S/None", [b""])
    assert (lines["grpc-status"], body) == ("12", b"")


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_bytes_cut_anywhere_make_the_same_calls(data: st.DataObject) -> None:
    """Calls that arrive in any pieces, with padding, priorities, headers and messages in several frames, get the same answers."""
    front = DirectFront(METHODS, Options())
    port = front.listen("127.0.0.1:0")
    front.start()
    wire = Wire(port)
    try:
        bodies = data.draw(st.lists(st.binary(max_size=300), min_size=1, max_size=4))
        out = OPEN
        for i, body in enumerate(bodies):
            stream = 2 * i + 1
            block = headers(stream)[9:]
            at = data.draw(st.integers(0, len(block)))
            pad = data.draw(st.integers(0, 255))
            out += frame(HEADERS, PADDED | PRIORITY, stream, bytes((pad,)) + b"\0\0\0\0\x10" + block[:at] + bytes(pad))
            out += frame(CONTINUATION, END_HEADERS, stream, block[at:])
            whole = message(body)
            cut = data.draw(st.integers(0, len(whole)))
            out += frame(DATA, 0, stream, whole[:cut]) + frame(PING, 0, 0, b"12345678")
            out += frame(DATA, PADDED | END_STREAM, stream, bytes((pad,)) + whole[cut:] + bytes(pad))
        places = sorted(data.draw(st.lists(st.integers(0, len(out)), max_size=8)))
        wire.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for begin, end in zip([0, *places], [*places, len(out)], strict=True):
            wire.send(out[begin:end])
        answers = wire.answers(len(bodies))
        assert [answers[2 * i + 1][1] for i in range(len(bodies))] == [message(body) for body in bodies]
        assert {lines["grpc-status"] for lines, _ in answers.values()} == {"0"}
    finally:
        wire.close()
        front.stop(0)


def test_a_caller_whose_headers_fill_its_table(serve: Serve) -> None:
    """Headers by reference to earlier ones, of which some change from call to call: each call has its own."""
    seen: list[str] = []

    def note(call: Call, request: bytes) -> None:
        seen.append(dict(call.metadata).get("who", ""))  # type: ignore[arg-type]
        call.reply(b"")

    wire = serve({"/t.S/Note": unary(note)}).wire()
    encoder = Encoder()
    out = OPEN
    names = [f"caller {i // 3}" for i in range(300)]  # the same three times, so that blocks come again
    for i, name in enumerate(names):
        lines = [(n, "/t.S/Note" if n == ":path" else v) for n, v in HEAD] + [("who", name)]
        out += frame(HEADERS, END_HEADERS, 2 * i + 1, encoder.encode(lines)) + frame(DATA, END_STREAM, 2 * i + 1, message(b""))
    wire.send(out)
    assert len(wire.answers(len(names))) == len(names)
    assert seen == names


# ---- What messages are made of ----


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_messages_are_read(serve: Serve, encoding: str, pack: Callable[[bytes], bytes]) -> None:
    wire = serve().wire()
    wire.send(OPEN + headers(1, ("grpc-encoding", encoding)) + frame(DATA, END_STREAM, 1, message(pack(b"hello" * 100), True)))
    assert wire.answers(1)[1][1] == message(b"hello" * 100)


@pytest.mark.parametrize(  # no time of day in what is packed: workers must collect the same tests
    ("encoding", "body", "status", "why"),
    [
        ("gzip", gzip.compress(bytes(1 << 20), mtime=0), "8", "unpacked"),  # a kilobyte that would be a megabyte
        ("gzip", b"not packed", "13", "is not"),
        ("gzip", gzip.compress(b"hello", mtime=0)[:-1], "13", "cut off"),
        ("deflate", zlib.compress(b"hello")[:-1], "13", "cut off"),
        ("gzip", b"", "13", "cut off"),
        ("gzip", gzip.compress(b"hello", mtime=0) + b"more", "13", "4 bytes after its end"),
        ("gzip", gzip.compress(b"hello", mtime=0) * 2, "13", "bytes after its end"),
        ("snappy", b"x", "12", "snappy"),
    ],
)
def test_messages_that_cannot_be_unpacked_are_refused(serve: Serve, encoding: str, body: bytes, status: str, why: str) -> None:
    served = serve(max_receive_bytes=10_000)
    wire = served.wire()
    wire.send(OPEN + headers(1, ("grpc-encoding", encoding)) + frame(DATA, END_STREAM, 1, message(body, True)))
    lines, _ = wire.answers(1)[1]
    assert lines["grpc-status"] == status
    assert why in lines["grpc-message"]
    assert served.well()


def test_a_call_that_ends_within_a_message_is_refused(serve: Serve) -> None:
    wire = serve().wire()
    wire.send(OPEN + headers(1) + frame(DATA, END_STREAM, 1, message(b"hello")[:-1]))
    assert wire.answers(1)[1][0]["grpc-status"] == "13"


# ---- Callers that speak something else ----


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ([(":method", "GET")], {":status": "405"}),
        ([("content-type", "text/html")], {":status": "415"}),
        ([("content-type", "application/grpcish")], {":status": "415"}),
        ([("content-type", "application/grpc+proto")], {"grpc-status": "0"}),
        ([("grpc-timeout", "soon")], {"grpc-status": "3"}),
        ([("grpc-timeout", "123456789S")], {"grpc-status": "3"}),
        ([("grpc-timeout", "0n")], {"grpc-status": "4"}),
        ([("raw-bin", "*")], {"grpc-status": "3"}),
        ([("large", "x" * 17_000)], {"grpc-status": "8"}),
    ],
)
def test_headers_that_are_no_call_of_ours(serve: Serve, lines: list[tuple[str, str]], status: dict[str, str]) -> None:
    """Each is told by the status that belongs to it, and the connection goes on."""
    hold = {"/t.S/Echo": unary(lambda call, request: call.reply(request) if call.deadline is None else None)}
    wire = serve(hold).wire()
    changed = dict(lines)
    every = [(n, changed.pop(n, v)) for n, v in HEAD] + list(changed.items())
    block = Encoder().encode(every)
    parts = [block[i : i + 16_000] for i in range(0, len(block), 16_000)]
    wire.send(OPEN + frame(HEADERS, 0 if len(parts) > 1 else END_HEADERS, 1, parts[0]))
    for i, part in enumerate(parts[1:], 2):
        wire.send(frame(CONTINUATION, END_HEADERS if i == len(parts) else 0, 1, part))
    wire.send(frame(DATA, END_STREAM, 1, message(b"x")) + call(3, b"y"))
    answers = wire.answers(2)
    assert status.items() <= answers[1][0].items()
    assert answers[3][1] == message(b"y")


def test_http_1_is_told_so(serve: Serve) -> None:
    served = serve()
    with socket.create_connection(("127.0.0.1", served.port), WAIT_S) as caller:
        caller.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        said = b""
        while more := caller.recv(4096):
            said += more
    assert b"HTTP/1.1 505" in said
    assert b"gRPC" in said
    assert served.well()


# ---- Callers that break the rules ----

FAULTS = {
    "no preface": (b"\x16\x03\x01 a TLS hello, or anything else", 1),
    "a frame too long": (OPEN + b"\x00\x40\x01\x00\x00\x00\x00\x00\x01", 6),
    "DATA of nothing": (OPEN + frame(DATA, 0, 1, b"x"), 1),
    "DATA after the end": (OPEN + call(1, b"", path="/t.S/Hold") + frame(DATA, 0, 1, b"x"), 1),
    "more padding than data": (OPEN + headers(1) + frame(DATA, PADDED, 1, b"\xff1234"), 1),
    "a stream that is not the caller's": (OPEN + headers(2), 1),
    "headers that are none": (OPEN + frame(HEADERS, END_HEADERS, 1, b"\xff\xff\xff\xff\xff"), 9),
    "headers amid a stream": (OPEN + headers(1, path="/t.S/Hold") + headers(1, path="/t.S/Hold"), 1),
    "headers too short for a priority": (OPEN + frame(HEADERS, END_HEADERS | PRIORITY, 1, b"123"), 6),
    "CONTINUATION of nothing": (OPEN + frame(CONTINUATION, END_HEADERS, 1, b""), 1),
    "another frame amid headers": (OPEN + headers(1, flags=0) + frame(PING, 0, 0, bytes(8)), 1),
    "DATA amid headers": (OPEN + headers(1, flags=0) + frame(DATA, 0, 1, b""), 1),
    "endless headers": (OPEN + frame(HEADERS, 0, 1, b"") + frame(CONTINUATION, 0, 1, bytes(16_000)) * 5, 11),
    "a window opened by 0": (OPEN + frame(WINDOW_UPDATE, 0, 0, bytes(4)), 1),
    "a window too wide": (OPEN + frame(WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff"), 3),
    "a window of 3 bytes": (OPEN + frame(WINDOW_UPDATE, 0, 0, b"\0\0\1"), 6),
    "a window of nothing": (OPEN + frame(WINDOW_UPDATE, 0, 5, b"\0\0\0\1"), 1),
    "RST_STREAM of nothing": (OPEN + frame(RST_STREAM, 0, 1, bytes(4)), 1),
    "RST_STREAM of 3 bytes": (OPEN + headers(1) + frame(RST_STREAM, 0, 1, bytes(3)), 6),
    "SETTINGS of 5 bytes": (OPEN + frame(SETTINGS, 0, 0, bytes(5)), 6),
    "SETTINGS of a stream": (OPEN + frame(SETTINGS, 0, 1), 1),
    "SETTINGS of a window too wide": (OPEN + frame(SETTINGS, 0, 0, b"\0\4\xff\xff\xff\xff"), 3),
    "SETTINGS of frames too short": (OPEN + frame(SETTINGS, 0, 0, b"\0\5\0\0\0\1"), 1),
    "PING of 7 bytes": (OPEN + frame(PING, 0, 0, bytes(7)), 6),
    "a promise": (OPEN + frame(PUSH_PROMISE, END_HEADERS, 1, bytes(4)), 1),
}


@pytest.mark.parametrize(("sent", "code"), FAULTS.values(), ids=FAULTS)
def test_a_fault_ends_its_connection_and_no_other(serve: Serve, sent: bytes, code: int) -> None:
    """GOAWAY with the code of RFC 9113; calls of the connection are gone for their handlers; others go on."""
    begun, gone = Latch(), Latch()

    def hold(call: Call, request: bytes) -> None:
        call.on_gone(gone.down)
        begun.down()

    served = serve({"/t.S/Hold": unary(hold)})
    with grpc.insecure_channel(f"127.0.0.1:{served.port}") as other:
        held = other.stream_stream("/t.S/Talk")(iter([b"before"]), timeout=WAIT_S)
        assert next(held) == b"before"
        wire = served.wire()
        wire.send(sent)
        assert wire.goaway()[0] == code
        assert other.unary_unary("/t.S/Echo")(b"after", timeout=WAIT_S) == b"after"


def test_who_cancels_too_many_calls_is_cut_off(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rapid reset: begin, cancel, begin, cancel. A few are anyone's right; thousands a second end the connection."""
    monkeypatch.setattr(h2_connection, "RESETS", (100, 1.0))
    served = serve()
    fair, wire = served.wire(), served.wire()
    storm = b"".join(headers(i) + frame(RST_STREAM, 0, i, b"\0\0\0\x08") for i in range(1, 161, 2))
    fair.send(OPEN + storm + call(161, b"x"))
    assert fair.answers(1)[161][1] == message(b"x")
    storm += b"".join(headers(i) + frame(RST_STREAM, 0, i, b"\0\0\0\x08") for i in range(161, 401, 2))
    wire.send(OPEN + storm)
    assert wire.goaway()[0] == 11
    assert served.well()


def test_too_many_calls_at_once_are_refused_to_be_sent_again(serve: Serve) -> None:
    wire = serve({"/t.S/Hold": unary(lambda call, request: None)}, streams=2).wire()
    wire.send(OPEN + call(1, b"", path="/t.S/Hold") + call(3, b"", path="/t.S/Hold") + call(5, b"x"))
    for kind, _, stream, payload in wire.frames():
        if kind == RST_STREAM:
            assert (stream, payload) == (5, b"\0\0\0\x07")
            break


def test_a_caller_that_sends_much_and_never_ends_a_message(serve: Serve) -> None:
    """Messages that are not whole may hold so much of a connection, and no more."""
    served = serve(max_receive_bytes=600_000)
    wire = served.wire()
    wire.send(OPEN)
    refused = threading.Event()

    def listen() -> None:
        for kind, _, _, payload in wire.frames():
            if kind == HEADERS and b"grpc-status" in payload:
                refused.set()
                return

    reader = threading.Thread(target=listen, daemon=True)
    reader.start()
    begun = struct.pack(">BL", 0, 600_000)
    for stream in range(1, 201, 2):
        try:
            wire.send(headers(stream) + frame(DATA, 0, stream, begun) + frame(DATA, 0, stream, bytes(16_000)) * 30)
        except OSError:
            break
        if refused.is_set():
            break
    assert refused.wait(WAIT_S)
    assert served.well()


def test_a_caller_that_asks_and_never_reads(serve: Serve) -> None:
    """Pings whose answers nobody takes: when enough wait, the server reads no more of them, and keeps no more."""
    served = serve()
    wire = served.wire()
    wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    wire.socket.setblocking(False)
    pings = frame(PING, 0, 0, b"12345678") * 10_000
    rest = OPEN
    full = 0
    while not any(c.stuck for c in served.front._connections):
        try:
            rest = rest[wire.socket.send(rest) :] or pings
        except BlockingIOError:
            full += 1
            assert full < 1_000
            assert served.well()
    assert max(c.size for c in served.front._connections) < 4 * h2_connection.STUCK
    assert served.well()


READ_NOTHING = h2_frames.PREFACE + h2_frames.settings({h2_frames.INITIAL_WINDOW_SIZE: 0})
READ_ALL = h2_frames.settings({h2_frames.INITIAL_WINDOW_SIZE: 1 << 30}) + h2_frames.window_update(0, 1 << 30)


class Big:
    """A unary handler that gives so many bytes, and notes for whom."""

    def __init__(self, size: int) -> None:
        self.begun: list[bytes] = []
        self._answer = bytes(size)

    def __call__(self, call: Call, request: bytes) -> None:
        self.begun.append(request)
        call.reply(self._answer)


def pinged(wire: Wire) -> list[tuple[int, int]]:
    """Have all frames read that were sent; gives the kinds and streams of what came meanwhile."""
    wire.send(frame(PING, 0, 0, b"all read"))
    seen = []
    for kind, flags, stream, _ in wire.frames():
        if kind == PING and flags:
            return seen
        seen.append((kind, stream))
    raise AssertionError("the connection has ended")


def test_calls_wait_while_much_is_unread(serve: Serve) -> None:
    """A caller that reads nothing and asks on: what its calls would answer is not made. They begin, in their order, when it has read;
    until then it may bring no more than one window of requests. One that is cancelled never begins, one whose time passes is told."""
    big = Big(100_000)
    served = serve({"/t.S/Big": unary(big)}, unread_bytes=1_000_000)
    wire = served.wire()
    many = list(range(1, 401, 2))
    wire.send(READ_NOTHING + b"".join(call(i, b"%d" % i, path="/t.S/Big") for i in many))
    pinged(wire)
    assert 11 <= len(big.begun) <= 13
    assert served.front.live == 200
    body = bytes(15_000)
    for i in range(401, 1_001, 2):  # 4.5 MB
        wire.send(call(i, body))
    assert (WINDOW_UPDATE, 0) not in pinged(wire)
    wire.send(headers(1_001, ("grpc-timeout", "30m"), path="/t.S/Big") + frame(DATA, END_STREAM, 1_001, message(b"late")))
    for kind, flags, stream, _ in wire.frames():
        if kind == HEADERS and flags & END_STREAM:
            assert stream == 1_001
            break
    wire.send(frame(RST_STREAM, 0, 399, b"\0\0\0\x08") + frame(RST_STREAM, 0, 1, b"\0\0\0\x08"))
    pinged(wire)
    assert len(big.begun) <= 14
    [kept] = [c.kept for c in served.front._connections if c.kept]
    assert not {399, 1_001} & {held.stream for held in kept}
    assert served.well()
    wire.send(READ_ALL)
    ended, opened = set(), False
    for kind, flags, stream, _ in wire.frames():
        opened |= (kind, stream) == (WINDOW_UPDATE, 0)
        if kind == HEADERS and flags & END_STREAM:
            ended.add(stream)
        if opened and len(ended) == 198 + 300:
            break
    assert big.begun == [b"%d" % i for i in many[:-1]]
    pinged(wire)
    assert served.front.live == 0
    assert not any(c.unread or c.full or c.kept for c in served.front._connections)


def test_streams_are_read_no_further_while_much_is_unread(serve: Serve) -> None:
    """What calls leave unread holds up the messages of their connection's streams too; then they come, all and in order."""
    seen: list[bytes] = []

    class Noting(Echo):
        def on_message(self, message: bytes) -> None:
            seen.append(message)
            super().on_message(message)

    served = serve({"/t.S/Big": unary(Big(1_000)), "/t.S/Note": both_ways(Noting)}, unread_bytes=10_000)
    wire = served.wire()
    wire.send(READ_NOTHING + headers(1, path="/t.S/Note") + frame(DATA, 0, 1, message(b"before")))
    wire.send(b"".join(call(i, b"", path="/t.S/Big") for i in range(3, 43, 2)))
    wire.send(b"".join(frame(DATA, 0, 1, message(b"%d" % i)) for i in range(20)) + frame(DATA, END_STREAM, 1, b""))
    pinged(wire)
    assert seen == [b"before"]
    wire.send(READ_ALL)
    answers = wire.answers(21)
    assert {lines["grpc-status"] for lines, _ in answers.values()} == {"0"}
    assert answers[1][1] == message(b"before") + b"".join(message(b"%d" % i) for i in range(20))


def test_one_large_answer_holds_nobody_up(serve: Serve) -> None:
    big, small = Big(5_000_000), Big(10)
    served = serve({"/t.S/Big": unary(big), "/t.S/Small": unary(small)}, unread_bytes=1_000_000)
    wire = served.wire()
    wire.send(READ_NOTHING + call(1, b"", path="/t.S/Big") + call(3, b"x", path="/t.S/Small"))
    pinged(wire)
    assert small.begun == [b"x"]
    wire.send(READ_ALL)
    assert {stream: len(body) for stream, (_, body) in wire.answers(2).items()} == {1: 5_000_005, 3: 15}


def test_answers_on_top_of_too_much_that_is_unread_are_dropped(serve: Serve) -> None:
    """Calls that had begun before anything was unread: what is too much of their answers is told and not kept."""
    begun, calls = Latch(10), []

    def hold(call: Call, request: bytes) -> None:
        calls.append(call)
        begun.down()

    served = serve({"/t.S/Hold": unary(hold)}, unread_bytes=100_000)
    wire = served.wire()
    wire.send(READ_NOTHING + b"".join(call(i, b"", path="/t.S/Hold") for i in range(1, 21, 2)))
    assert begun.wait()
    for held in calls:
        held.reply(bytes(100_000))
    dropped = wire.answers(5)
    assert [lines["grpc-status"] for lines, _ in dropped.values()] == ["8"] * 5
    assert all("the answer was dropped" in lines["grpc-message"] for lines, _ in dropped.values())
    wire.send(READ_ALL)
    read = wire.answers(5)
    assert [len(body) for _, body in read.values()] == [100_005] * 5
    assert served.front.live == 0


def test_who_reads_again_gets_what_waited(serve: Serve) -> None:
    """A caller whose socket was full, then is emptied at once: what waited in its calls follows, though no frame of its own asks for it."""
    served = serve({"/t.S/Big": unary(Big(400_000))}, keepalive_s=10 * WAIT_S)
    wire = served.wire()
    wire.send(OPEN + READ_ALL + b"".join(call(i, b"", path="/t.S/Big") for i in range(1, 201, 2)))
    while not any(c.socket.pending and c.blocked for c in served.front._connections):
        assert served.well()
    assert {len(body) for _, body in wire.answers(100).values()} == {400_005}


def test_a_caller_that_has_vanished_is_noticed(serve: Serve) -> None:
    """A connection that says nothing, not even that it lives, is given up with its calls; one that answers is kept."""
    begun, gone = Latch(), Latch()

    def hold(call: Call, request: bytes) -> None:
        call.on_gone(gone.down)
        begun.down()

    served = serve({"/t.S/Hold": unary(hold)}, keepalive_s=0.05, keepalive_timeout_s=0.1)
    with grpc.insecure_channel(f"127.0.0.1:{served.port}") as channel:
        lively = channel.stream_stream("/t.S/Talk")(iter([b"x"]))
        assert next(lively) == b"x"
        wire = served.wire()
        wire.send(OPEN + call(1, b"", path="/t.S/Hold"))
        assert begun.wait()
        assert gone.wait()  # it reads nothing, and so answers no ping
        lively.cancel()


def test_a_deadline_that_passes_is_told_to_caller_and_handler(serve: Serve) -> None:
    gone = Latch()
    wire = serve({"/t.S/Hold": unary(lambda call, request: call.on_gone(gone.down))}).wire()
    wire.send(OPEN + headers(1, ("grpc-timeout", "30m"), path="/t.S/Hold") + frame(DATA, END_STREAM, 1, message(b"")))
    assert wire.answers(1)[1][0]["grpc-status"] == "4"
    assert gone.wait()


def test_a_drain_is_told_twice(serve: Serve) -> None:
    """First that new calls should go elsewhere, then, when the caller has heard, which was the last that was seen; what runs is answered;
    what was begun in between is refused as what may be sent again."""
    begun, calls = Latch(), []

    def hold(call: Call, request: bytes) -> None:
        calls.append(call)
        begun.down()

    served = serve({"/t.S/Hold": unary(hold)})
    wire = served.wire()
    wire.send(OPEN + call(1, b"", path="/t.S/Hold"))
    assert begun.wait()
    served.front.drain()
    told: list[int] = []
    decoder, said = Decoder(), {}
    for kind, flags, stream, payload in wire.frames():
        if kind == GOAWAY:
            told.append(struct.unpack_from(">L", payload)[0])
        elif kind == PING and not flags:
            wire.send(call(3, b"late") + frame(PING, 1, 0, payload))
        elif kind == HEADERS:
            said.setdefault(stream, {}).update(decoder.decode(payload))
            if stream == 3:
                calls[0].reply(b"done")
    assert told == [h2_frames.LAST_STREAM, 3]
    assert said[1]["grpc-status"] == "0"
    assert said[3]["grpc-status"] == "14"


def test_nonsense_of_any_kind_hurts_nobody(serve: Serve) -> None:
    """Frames of random kinds, flags, streams and contents, on many connections: the server lives on and lets go of all of them."""
    served = serve()
    dice = random.Random(7)
    for _ in range(150):
        wire = served.wire()
        out = OPEN
        for _ in range(dice.randrange(1, 12)):
            known = dice.choice((call(dice.randrange(1, 9, 2), b"x"), headers(dice.randrange(1, 9)), b""))
            out += known + frame(dice.randrange(12), dice.randrange(256), dice.randrange(6), dice.randbytes(dice.randrange(40)))
        wire.send(out[: dice.randrange(len(out) // 2, len(out) + 1)])
        wire.close()
    served.wires.clear()
    assert served.well()


def test_a_front_without_descriptors_left_serves_whom_it_has() -> None:
    """Connections that can't be taken wait; the front says so now and then, not all the time, goes on with its callers, and takes the
    others when some have left."""
    program = f"""
import grpc, logging, resource, socket
from server.rpc.direct_front import DirectFront
from server.rpc.front import unary
said = []
logging.basicConfig(handlers=[type("Said", (logging.Handler,), {{"emit": lambda self, record: said.append(record.getMessage())}})()])
front = DirectFront({{"/t.S/Echo": unary(lambda call, request: call.reply(request))}})
port = front.listen("127.0.0.1:0")
front.start()
channel = grpc.insecure_channel(f"127.0.0.1:{{port}}")
echo = channel.unary_unary("/t.S/Echo")
assert echo(b"first", timeout={WAIT_S}) == b"first"
crowd = [socket.create_connection(("127.0.0.1", port)) for _ in range(8)]
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
while len(front._connections) < 9:
    assert echo(b"wait", timeout={WAIT_S}) == b"wait"
late = [socket.socket() for _ in range(4)]
resource.setrlimit(resource.RLIMIT_NOFILE, (max(s.fileno() for s in late) + 1, hard))
for s in late:
    s.connect(("127.0.0.1", port))
for _ in range(2_000):
    assert echo(b"on", timeout={WAIT_S}) == b"on"
assert 1 <= len(said) <= 10, said
for s in crowd:
    s.close()
while len(front._connections) < 5:
    assert echo(b"wait", timeout={WAIT_S}) == b"wait"
front.stop({WAIT_S})
"""
    subprocess.run([sys.executable, "-c", program], timeout=3 * WAIT_S, check=True)
