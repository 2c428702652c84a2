"""What the HTTP face does with those who speak no HTTP, send too much, too slowly, do not read, or come from a page elsewhere: a typed
answer, or a connection cut, while a session beside them loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import http.client
import json
import re
import select
import socket
import ssl
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import fakes, models
from tests.process import Served, Web, serve, web
from tests.rest import Reply, Rest, answer, connected, parsed, rest_of
from tests.test_security import Certificates, certificates  # noqa: F401  # a fixture
from web.app import app as web_app
from web.config import Config
from web.wire import Bounded, BoundedSocket, Server, listening

HEAD = 4096  # bytes of a request's head that the face under test takes
BODY = 100_000
FLAGS = (
    "--head-seconds", "1", "--body-seconds", "1", "--write-seconds", "1", "--max-head-bytes", str(HEAD), "--max-body-bytes", str(BODY),
    "--max-connections", "16",
)  # fmt: skip
JSON = "content-type: application/json\r\n"
NOWHERE = "127.0.0.1:1"  # no server is there


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("models")
    models.library(root)
    with serve(root) as server:
        yield server


@pytest.fixture(scope="module")
def face(served: Served) -> Iterator[Web]:
    with web(f"127.0.0.1:{served.port}", *FLAGS) as made:
        yield made


@pytest.fixture(autouse=True)
def neighbour(face: Web) -> Iterator[None]:
    """A session that takes a turn before and after each test; in the end it has the bits of the whole, read at once."""
    rest = Rest(face.port)
    tokens = [3, 1, 4, 1, 5, 9]
    here = rest.post("/v1/sessions", {"model": "reader"}).headers["location"]

    def turn(number: int, part: list[int]) -> Any:
        tensor = {"name": "tokens", "datatype": "INT64", "shape": [1, len(part)], "data": part}
        reply = rest.post(f"{here}/turns", {"turn": number, "tensors": [tensor]})
        assert reply.status == 200, reply
        return {t["name"]: t["data"] for t in reply.json["tensors"]}

    turn(1, tokens[:4])
    yield
    after = turn(2, tokens[4:])
    whole = {"name": "tokens", "datatype": "INT64", "shape": [1, 6], "data": tokens}
    outputs = rest.post("/v2/models/reader/infer", {"inputs": [whole]}).json["outputs"]
    assert after["last"] == next(o["data"] for o in outputs if o["name"] == "last")
    assert rest.ask("DELETE", here).json["turn"] == 2


def sent(face: Web, data: bytes) -> Reply:
    """The answer to these bytes, after which the connection must be closed by the other side."""
    with connected(face.port) as bare:
        bare.sendall(data)
        return parsed(rest_of(bare))


def posted(headers: str, body: bytes = b"", path: str = "/v1/classify") -> bytes:
    return f"POST {path} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n".encode("latin-1") + body


MALFORMED = {
    "nonsense": b"nonsense\r\n\r\n",
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no such version": b"GET / HTTP/9.9\r\nhost: localhost\r\n\r\n",
    "zero bytes": bytes(100),
    "a header without a colon": b"GET / HTTP/1.1\r\nhost localhost\r\n\r\n",
    "a zero in a header": b"GET / HTTP/1.1\r\nhost: local\0host\r\n\r\n",
    "a chunk's size that is none": posted("transfer-encoding: chunked\r\n", b"zz\r\nabc\r\n"),
    "two lengths": posted("content-length: 3\r\ncontent-length: 4\r\n", b"abcd"),
    "a length twice": posted("content-length: 2\r\ncontent-length: 2\r\n", b"{}"),
    "a length and chunks": posted("content-length: 3\r\ntransfer-encoding: chunked\r\n", b"0\r\n\r\n"),
    "a length and a length of chunks": posted("content-length: 0\r\ntransfer-encoding: chunked\r\n", b"0\r\n\r\n"),
    "chunks twice": posted("transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", b"0\r\n\r\n"),
    "two hosts": b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nHost: evil.example\r\n\r\n",
    "a host twice": b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n\r\n",
    "a length below 0": posted("content-length: -1\r\n"),
    "a length of 30 digits": posted(f"content-length: {'9' * 30}\r\n"),
    "a tunnel": b"CONNECT localhost:22 HTTP/1.1\r\nhost: localhost:22\r\n\r\n",
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed(what: str, face: Web) -> None:
    """400 with a reason, as JSON, and the connection is closed."""
    reply = sent(face, MALFORMED[what])
    assert reply.status == 400
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.json["reason"] in ("NOT_HTTP", "BAD_URL")


def test_keys_that_can_not_travel(face: Web) -> None:
    """A key that is not printable ASCII is none of the server's: 401, and nothing breaks at it."""
    rest = Rest(face.port)
    for key in ("\xff\xfe", "Bearer \xe9", "Bearer a\tb"):
        for header in ("x_api_key", "authorization"):
            refused = rest.get("/v1/models", **{header: key})
            assert refused.why == (401, "BAD_KEY")
            assert refused.headers["www-authenticate"] == "Bearer"
            assert rest.get("/v2/models/reader", **{header: key}).json["error"] == refused.json["detail"]
    assert rest.get("/v1/models", x_api_key="a b~").status == 200


def test_paths_that_are_none(face: Web) -> None:
    """What no path can be, or is not UTF-8, is 400; what leads nowhere 404, dots and slashes too; each as its face has it."""
    rest = Rest(face.port)
    assert sent(face, "GET /ü HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode()).status == 400
    assert rest.get("/v1/sessions/%FF").why == (400, "BAD_URL")
    for path in ("/v1/nothing", "/v1", "/v1/sessions//turns/x", "/v1/../etc/passwd", "/v2/..%2f..%2fetc", "/V1/models"):
        assert rest.get(path).status == 404, path
    assert "error" in rest.get("/v2/nothing").json
    refused = rest.ask("PUT", "/v1/sessions")
    assert refused.why == (405, "NO_SUCH_METHOD")
    assert set(refused.headers["allow"].split(", ")) == {"GET", "HEAD", "POST"}


def test_large_heads(face: Web) -> None:
    """A head beyond its bound is 431, whether it is complete, in one header or many, in the path, or never ends."""
    filler = "x-filler: " + "x" * 100 + "\r\n"
    for data in (
        posted(filler * 100),
        posted("x-long: " + "x" * 2 * HEAD + "\r\n"),
        f"GET /{'a' * 2 * HEAD} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode(),
        f"GET / HTTP/1.1\r\nhost: localhost\r\n{filler * 1000}".encode(),
    ):
        assert sent(face, data).why == (431, "HEAD_TOO_LARGE")


CHUNKED = posted(JSON + "transfer-encoding: chunked\r\nconnection: close\r\n", b"2\r\n{}\r\n")
LARGE_TRAILERS = {
    "many": b"0\r\n" + b"x: y\r\n" * HEAD + b"\r\n",
    "one": b"0\r\nx: " + b"y" * HEAD + b"\r\n\r\n",
    "many without end": b"0\r\n" + b"x: y\r\n" * HEAD,
    "one without end": b"0\r\nx: " + b"y" * 3 * HEAD,
    "beside a chunk, without end": b"2;" + b"y" * 3 * HEAD,
}


@pytest.mark.parametrize("what", LARGE_TRAILERS)
def test_large_trailers(what: str, face: Web) -> None:
    """What stands in a body in chunks and is not the body is bounded as a head is."""
    assert sent(face, CHUNKED + LARGE_TRAILERS[what]).why == (431, "HEAD_TOO_LARGE")


def test_trailers_are_no_headers(face: Web) -> None:
    """Few trailers do no harm, and are not taken for headers: of this request, or of the next."""
    trailers = b"0\r\norigin: http://evil.example\r\nhost: evil.example\r\n\r\n"
    assert sent(face, CHUNKED + trailers).why == (400, "BAD_BODY")
    ahead = CHUNKED.replace(b"connection: close\r\n", b"") + trailers
    with connected(face.port) as bare:
        bare.sendall(ahead + CHUNKED + b"0\r\n\r\n")
        assert rest_of(bare).count(b'"reason":"BAD_BODY"') == 2


def test_a_byte_at_a_time(face: Web) -> None:
    """Requests are the same wherever the network cuts them."""
    ahead = CHUNKED.replace(b"connection: close\r\n", b"") + b"0\r\n\r\n" + posted(JSON + "content-length: 2\r\n", b"{}")
    with connected(face.port) as bare:
        bare.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in ahead + CHUNKED + b"0\r\nx: y\r\n\r\n":
            bare.sendall(bytes((byte,)))
        assert rest_of(bare).count(b'"reason":"BAD_BODY"') == 3


@pytest.mark.parametrize("headers", ["gzip, chunked", "gzip\r\ntransfer-encoding: chunked"])
def test_other_transfer_codings(headers: str, face: Web) -> None:
    """A body that is more than in chunks is not read as if it were not."""
    refused = sent(face, posted(f"{JSON}transfer-encoding: {headers}\r\n", b"2\r\n{}\r\n0\r\n\r\n"))
    assert refused.why == (501, "BAD_CODING")


def test_slow_heads(face: Web) -> None:
    """Who sends nothing, half a head, or half of the next request, is told 408 once its time is over, and cut off."""
    assert sent(face, b"").why == (408, "HEAD_LATE")
    assert sent(face, b"GET / HTTP/1.1\r\nhost: loc").why == (408, "HEAD_LATE")
    with connected(face.port) as bare:
        bare.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\nGET /he")
        first, _, second = rest_of(bare).partition(b"ok\n")
    assert parsed(first).status == 200
    assert parsed(second).why == (408, "HEAD_LATE")


def test_slow_bodies(face: Web) -> None:
    """The same for a body that does not come."""
    assert sent(face, posted(JSON + "content-length: 10\r\n", b"{")).why == (408, "BODY_LATE")
    assert sent(face, posted(JSON + "transfer-encoding: chunked\r\n", b"1\r\n{\r\n")).why == (408, "BODY_LATE")


def test_large_bodies(face: Web) -> None:
    """413 for a body beyond its bound: declared, or sent in chunks without end, at once and before it is all there; and no
    "continue" for one that is announced."""
    assert sent(face, posted(JSON + "content-length: 1000000000000\r\n", b"{")).why == (413, "BODY_TOO_LARGE")
    endless = b"".join(b"4000\r\n" + bytes(0x4000) + b"\r\n" for _ in range(10))
    assert sent(face, posted(JSON + "transfer-encoding: chunked\r\n", endless)).why == (413, "BODY_TOO_LARGE")
    assert sent(face, posted(JSON + f"content-length: {BODY + 1}\r\nexpect: 100-continue\r\n")).why == (413, "BODY_TOO_LARGE")
    assert Rest(face.port).post("/v1/classify", b" " * BODY, content_type="application/json").why == (400, "NOT_JSON")


CODED = {
    "a bomb": ("gzip", gzip.compress(bytes(50_000_000)), (413, "BODY_TOO_LARGE")),
    "a bomb of zlib": ("deflate", zlib.compress(bytes(BODY + 1)), (413, "BODY_TOO_LARGE")),
    "not compressed": ("gzip", b"{}", (400, "BAD_CODING")),
    "cut off": ("gzip", gzip.compress(b'{"texts": ["a"]}')[:-3], (400, "BAD_CODING")),
    "followed by more": ("gzip", gzip.compress(b"{}") + b"more", (400, "BAD_CODING")),
    "unknown": ("br", b"{}", (415, "BAD_CODING")),
    "two": ("gzip, gzip", gzip.compress(gzip.compress(b"{}")), (415, "BAD_CODING")),
}


@pytest.mark.parametrize("what", CODED)
def test_compressed_bodies(what: str, face: Web) -> None:
    """A compressed body is bounded by what it becomes, and refused where it is not what it says."""
    coding, body, expected = CODED[what]
    refused = Rest(face.port).post("/v2/models/reader/infer", body, content_encoding=coding)
    assert (refused.status, refused.json["reason"]) == expected


def test_one_who_does_not_read(face: Web) -> None:
    """A reader that leaves megabytes unread is cut off, unasked."""
    with connected(face.port) as bare:
        bare.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        bare.sendall(b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n" * 200)
        waiting = select.poll()
        waiting.register(bare, 0)  # no reading: only that the other side is gone
        assert waiting.poll(60_000)


@contextlib.asynccontextmanager
async def inside(target: str, **knobs: Any) -> AsyncIterator[Server]:
    """A face in this process, to look at what it keeps; the system keeps little for its connections."""
    config = Config(target=target, port=0, drain_seconds=1, **{"write_seconds": 1, **knobs})
    server = Server(web_app(config), config)
    with listening(config) as heard:
        heard.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 10)
        heard.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 10)
        serving = asyncio.create_task(server.serve([heard]))
        while not server.started:
            await asyncio.sleep(0)
        yield server
        server.should_exit = True
        await serving


@contextlib.asynccontextmanager
async def deaf(server: Server) -> AsyncIterator[socket.socket]:
    """A connection whose answers nobody reads."""
    with socket.socket() as made:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 10)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 10)
        made.setblocking(False)
        await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", server.port))
        yield made


async def heard(bare: socket.socket, what: bytes) -> bytes:
    """All that comes, until that is in it."""
    said = b""
    while what not in said:
        part = await asyncio.get_running_loop().sock_recv(bare, 65536)
        assert part, said
        said += part
    return said


async def until_cut_off(bare: socket.socket, piece: bytes, seen: Callable[[int], None]) -> None:
    """Send it again and again; `seen` is told how many bytes are sent."""
    sent = 0
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(60):
            while True:
                await asyncio.get_running_loop().sock_sendall(bare, piece)
                sent += len(piece)
                seen(sent)
                await asyncio.sleep(0)


HANDSHAKE = (
    b"GET /live HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


def frame(kind: int, data: bytes, last: bool = True) -> bytes:
    """A WebSocket's frame, masked with zeros."""
    assert len(data) < 126
    return bytes((0x80 * last + kind, 0x80 + len(data), 0, 0, 0, 0)) + data


@pytest.mark.parametrize("path", ["/healthz", "/v2/health/live"])
def test_requests_without_end(path: str) -> None:
    """Who sends requests and reads no answer is not read any further, and cut off."""

    def few(sent: int) -> None:
        assert sent < 400_000

    async def story() -> None:
        async with inside(NOWHERE) as server, deaf(server) as bare:
            await until_cut_off(bare, f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode() * 100, few)

    asyncio.run(story())


def test_requests_behind_one_that_takes_long() -> None:
    """They are not looked at before it is answered: of their bytes a few are kept, and no more are read. Then each is answered."""
    many = 5000
    held = json.dumps({"text": f"{fakes.HOLD} the line"}).encode()
    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(held), held)
    first = posted(f"{JSON}accept: text/event-stream\r\ntransfer-encoding: chunked\r\n", chunks, "/v1/translate")
    ahead = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n" * (many - 1)
    last = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"

    async def story() -> None:
        loop = asyncio.get_running_loop()
        with fakes.serving() as fake:
            async with inside(fake.target) as server, deaf(server) as bare, asyncio.timeout(60):
                await loop.sock_sendall(bare, first[:-1])  # its end comes with what is behind it
                while not (found := list(server.server_state.connections)) or found[0].cycle is None:
                    await asyncio.sleep(0)
                sending = asyncio.create_task(loop.sock_sendall(bare, first[-1:] + ahead + last))
                said = await heard(bare, b"event: token")
                (connection,) = server.server_state.connections
                assert isinstance(connection, Bounded)
                while not connection.flow.read_paused:
                    await asyncio.sleep(0)
                assert len(connection._held) < 400_000
                assert not connection.pipeline
                assert not sending.done()
                fake.gone.set()
                while part := await loop.sock_recv(bare, 65536):
                    said += part
                await sending
        assert said.count(b"HTTP/1.1 200 OK") == 1 + many

    asyncio.run(story())


def test_a_large_head_behind_one_that_takes_long() -> None:
    """Where heads may be larger than what is kept, reading goes on once there is room."""
    held = json.dumps({"text": f"{fakes.HOLD} the line"}).encode()
    first = posted(f"{JSON}accept: text/event-stream\r\ncontent-length: {len(held)}\r\n", held, "/v1/translate")
    half = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx: " + b"y" * 100_000

    async def story() -> None:
        loop = asyncio.get_running_loop()
        with fakes.serving() as fake:
            async with inside(fake.target, max_head_bytes=200_000) as server, deaf(server) as bare, asyncio.timeout(60):
                await loop.sock_sendall(bare, first)
                sending = asyncio.create_task(loop.sock_sendall(bare, half + b"\r\n\r\n"))
                said = await heard(bare, b"event: token")
                (connection,) = server.server_state.connections
                assert isinstance(connection, Bounded)
                while not connection.flow.full:
                    await asyncio.sleep(0)
                fake.gone.set()
                while part := await loop.sock_recv(bare, 65536):
                    said += part
                await sending
        assert said.endswith(b"ok\n")

    asyncio.run(story())


def test_what_is_behind_an_unread_answer() -> None:
    """It is not begun before that is read: a WebSocket would not know that its connection is full."""

    async def story() -> None:
        loop = asyncio.get_running_loop()
        async with inside(NOWHERE, write_seconds=60) as server, deaf(server) as bare, asyncio.timeout(60):
            hasty = frame(1, b"sent before there is a WebSocket")  # it is not read as a request
            asked = (b"GET %s HTTP/1.1\r\nhost: localhost\r\n\r\n" % path for path in (b"/etth1.csv", b"/openapi.json"))
            await loop.sock_sendall(bare, b"".join(asked) + HANDSHAKE + hasty)
            connection = None
            while not (isinstance(connection, Bounded) and connection.flow.write_paused and connection.cycle.response_complete):
                await asyncio.sleep(0)
                (connection,) = server.server_state.connections or [None]
                assert not isinstance(connection, BoundedSocket)
            assert connection._held == HANDSHAKE + hasty
            said = await heard(bare, b"hello")
        assert re.findall(rb"HTTP/1.1 (\d+)", said) == [b"200", b"200", b"101"]

    asyncio.run(story())


def test_a_caller_with_more_to_ask_hangs_up() -> None:
    """That is noticed, and its call cancelled, although another request waits behind it."""
    held = json.dumps({"text": f"{fakes.HOLD} the line"}).encode()
    first = posted(f"{JSON}accept: text/event-stream\r\ncontent-length: {len(held)}\r\n", held, "/v1/translate")
    with fakes.serving() as fake, web(fake.target) as face:
        with connected(face.port) as bare:
            bare.sendall(first + b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            while b"event: token" not in (said := bare.recv(65536)):
                assert said
        assert fake.gone.wait(30)


def test_a_body_behind_another_request(face: Web) -> None:
    """A request whose body comes later than its head is waited for, when the one before it is answered already too."""
    with connected(face.port) as bare:
        head = posted(f"{JSON}content-length: 2\r\nconnection: close\r\n", b"{")
        bare.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n" + head)
        while b"ok\n" not in (said := bare.recv(65536)):
            assert said
        bare.sendall(b"}")
        assert parsed(rest_of(bare)).why == (400, "BAD_BODY")


def test_pings_without_end() -> None:
    """Who asks a WebSocket whether it lives, and reads no answer, has few answers kept, and is cut off."""

    async def story() -> None:
        async with inside(NOWHERE) as server, deaf(server) as bare:
            await asyncio.get_running_loop().sock_sendall(bare, HANDSHAKE)
            await heard(bare, b"HTTP/1.1 101")
            (connection,) = server.server_state.connections
            assert isinstance(connection, BoundedSocket)

            def few(_: int) -> None:
                assert connection.transport.get_write_buffer_size() < 400_000

            await until_cut_off(bare, frame(9, bytes(125)) * 20, few)

    asyncio.run(story())


def test_pieces_of_nothing() -> None:
    """A WebSocket's message may come in pieces; empty ones are not kept."""

    async def story() -> None:
        async with inside(NOWHERE) as server, deaf(server) as bare:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(bare, HANDSHAKE)
            await heard(bare, b"hello")
            await loop.sock_sendall(bare, frame(1, b"no ", last=False) + frame(0, b"", last=False) * 10_000)
            (connection,) = server.server_state.connections
            assert isinstance(connection, BoundedSocket)
            assert len(connection.frames) < 100
            await loop.sock_sendall(bare, frame(0, b"message", last=False) + frame(0, b""))
            await heard(bare, b"BAD_MESSAGE")

    asyncio.run(story())


def test_connections_are_counted(face: Web) -> None:
    """One connection too many is told to come back; when others have left, there is room again."""
    with contextlib.ExitStack() as stack:
        for _ in range(16):
            bare = stack.enter_context(connected(face.port))
            bare.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert bare.recv(65536).startswith(b"HTTP/1.1 200")
        with connected(face.port) as one_more:
            refused = parsed(rest_of(one_more))
        assert refused.why == (503, "TOO_MANY_CONNECTIONS")
        assert refused.headers["retry-after"] == "1"
    while Rest(face.port).get("/healthz").status == 503:
        pass


def test_requests_one_behind_the_other(face: Web) -> None:
    """Requests sent ahead on one connection are answered in order; one that is refused in between harms none behind it."""
    tensor = {"name": "tokens", "datatype": "INT64", "shape": [1, 1], "data": [7]}
    body = json.dumps({"inputs": [tensor], "id": "%d"}).encode()
    request = posted(f"content-length: {len(body)}\r\n", body, "/v2/models/reader/infer")
    with connected(face.port) as bare:
        bare.sendall(b"".join(request.replace(b"%d", b"%d" % (10 + i)) for i in range(20)))
        bare.sendall(b"GET /v2/models/nope HTTP/1.1\r\nhost: localhost\r\n\r\n")
        bare.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        said = rest_of(bare)
    assert [said.index(b'"id":"%d"' % (10 + i)) for i in range(20)] == sorted(said.index(b'"id":"%d"' % (10 + i)) for i in range(20))
    assert said.index(b"404 Not Found") < said.index(b"ok\n")


# ---- Browsers ----


def test_wrong_origins(face: Web) -> None:
    """A page elsewhere may change nothing; it may send a GET, whose answer its browser keeps from it."""
    rest = Rest(face.port)
    for origin in ("http://evil.example", "null", "http://localhost", f"http://localhost.evil.example:{face.port}", "https://"):
        assert rest.post("/v1/sessions", {"model": "reader"}, origin=origin).why == (403, "WRONG_ORIGIN")
        assert rest.ask("DELETE", "/v1/sessions/x", origin=origin).why == (403, "WRONG_ORIGIN")
        allowed = rest.get("/v1/models", origin=origin)
        assert allowed.status == 200
        assert not [name for name in allowed.headers if name.startswith("access-control")]
    refused = rest.post("/v2/models/reader/infer", {"inputs": []}, origin="http://evil.example")
    assert (refused.status, bool(refused.json["error"])) == (403, True)
    own = f"http://localhost:{face.port}"
    assert rest.post("/v1/sessions", {"model": "reader", "session": "own"}, origin=own).status == 201
    assert rest.ask("DELETE", "/v1/sessions/own", origin=own).status == 200
    assert rest.ask("OPTIONS", "/v1/sessions", origin="http://evil.example", access_control_request_method="POST").status == 405


def test_wrong_hosts(face: Web) -> None:
    """While listening on this machine only, requests must be to this machine by name: another name may be a page's own."""
    rest = Rest(face.port)
    for host in ("evil.example", f"evil.example:{face.port}", "", "localhost.evil.example", "[::1", "127.0.0.2"):
        refused = rest.get("/v1/models", host=host)
        assert refused.status in (400, 421), host
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000"):
        assert rest.get("/v1/models", host=host).status == 200
    assert sent(face, b"GET /v1/models HTTP/1.1\r\nconnection: close\r\n\r\n").why == (421, "WRONG_HOST")


def test_allowed_origins_and_hosts(served: Served) -> None:
    """An origin that is named may do all that our own page may, asked beforehand or not; so may a host."""
    flags = ("--allow-origin", "https://app.example, http://other.example:8080", "--allow-host", "models.example")
    with web(f"127.0.0.1:{served.port}", *flags) as face:
        rest = Rest(face.port)
        asked = rest.ask(
            "OPTIONS", "/v1/sessions", origin="https://app.example", access_control_request_method="POST",
            access_control_request_headers="content-type, authorization",
        )  # fmt: skip
        assert (asked.status, asked.headers["access-control-allow-origin"]) == (200, "https://app.example")
        opened = rest.post("/v1/sessions", {"model": "reader"}, origin="https://app.example")
        assert (opened.status, opened.headers["access-control-allow-origin"]) == (201, "https://app.example")
        assert "location" in opened.headers["access-control-expose-headers"].lower()
        assert rest.post("/v1/sessions", {"model": "reader"}, origin="http://other.example").why == (403, "WRONG_ORIGIN")
        assert rest.get("/v1/models", host="models.example").status == 200
        assert rest.get("/v1/models", host="other.example").why == (421, "WRONG_HOST")


def test_websockets_of_wrong_origins(face: Web) -> None:
    """A WebSocket's handshake from a page elsewhere is refused before anybody sees it."""
    rest = Rest(face.port)
    handshake = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec_websocket_version": "13",
        "sec_websocket_key": "x3JJHMbDL1EzLkh9GBhXDw==",
    }
    assert rest.get("/v1/nothing", **handshake, origin="http://evil.example").why == (403, "WRONG_ORIGIN")
    own = rest.get("/v1/nothing", **handshake, origin=f"http://localhost:{face.port}")
    assert b"WRONG_ORIGIN" not in own.body


# ---- The end, and TLS ----


def test_sigterm_finishes_what_runs(face: Web) -> None:
    """Stopped amid a stream, it takes nobody in, sends the rest of the stream, and ends well."""
    with fakes.serving() as fake, web(fake.target) as stopped:
        events = Rest(stopped.port).events("/v1/translate", {"text": f"{fakes.HOLD} the line"})
        assert next(events)[0] == "token"
        stopped.process.terminate()
        while not _is_closed(stopped.port):
            pass
        fake.gone.set()
        assert list(events) == []
        assert stopped.process.wait(60) == 0


def _is_closed(port: int) -> bool:
    try:
        Rest(port).get("/healthz")
    except OSError:
        return True
    return False


def test_sigterm_does_not_wait_for_ever(face: Web) -> None:
    """What runs longer than it is given is cut, its call cancelled."""
    with fakes.serving() as fake, web(fake.target, "--drain-seconds", "1") as stopped:
        events = Rest(stopped.port).events("/v1/translate", {"text": f"{fakes.HOLD} the line"})
        assert next(events)[0] == "token"
        assert stopped.terminate() == 0
        assert fake.gone.wait(30)
        with contextlib.suppress(http.client.IncompleteRead, ConnectionError):
            assert list(events) == []


def test_tls_both_ways(face: Web, served: Served, certificates: Certificates, tmp_path: Path) -> None:  # noqa: F811
    """HTTPS to callers, TLS with a certificate of its own to the server; who does not trust either is not answered."""
    pair = ("--tls-cert", str(certificates.server), "--tls-key", str(certificates.server.with_suffix(".key")))
    mine = ("--target-cert", str(certificates.client), "--target-key", str(certificates.client.with_suffix(".key")))
    models.reader(tmp_path / "reader" / "1")
    with serve(tmp_path, *pair, "--tls-client-ca", str(certificates.ca)) as server:
        with web(f"localhost:{server.port}", "--target-ca", str(certificates.ca), *mine, *pair) as secure:
            trusting = ssl.create_default_context(cafile=str(certificates.ca))
            connection = http.client.HTTPSConnection("localhost", secure.port, timeout=30, context=trusting)
            assert answer(connection, "GET", "/v1/models", None, {}).json["models"][0]["name"] == "reader"
            connection.close()
            with pytest.raises(ssl.SSLError):
                http.client.HTTPSConnection("localhost", secure.port, timeout=30, context=ssl.create_default_context()).request("GET", "/")
        with web(f"localhost:{server.port}", "--target-ca", str(certificates.ca)) as stranger:
            assert Rest(stranger.port).get("/v1/models").why[0] == 503


def test_nothing_waits_for_an_acknowledgement() -> None:
    """The socket says that it is TCP: else asyncio leaves Nagle's algorithm on, and every kept connection has 40 ms a request."""
    with listening(Config(port=0)) as heard:
        assert heard.proto == socket.IPPROTO_TCP


def test_a_taken_port(face: Web) -> None:
    """Said in a line, with an exit code that is not 0."""
    said = f"seqserve web: cannot listen on 127.0.0.1:{face.port}: .*in use.*--port"
    with pytest.raises(AssertionError, match=said), web("localhost:1", "--port", str(face.port)):
        pass


def test_a_host_of_another_machine() -> None:
    """Addresses that are not this machine's, and names that are nobody's, are told with the flag."""
    for host in ("192.0.2.1", "nobody.invalid"):
        with pytest.raises(OSError, match=f"cannot listen on {host}:0: .*--host"):
            listening(Config(host=host, port=0))


@pytest.mark.parametrize("there", [True, False])
def test_a_certificate_that_is_none(tmp_path: Path, there: bool) -> None:
    """Both files are named, whether they have something else in them or are not there."""
    cert, key = tmp_path / "a.pem", tmp_path / "b.pem"
    if there:
        cert.write_text("")
        key.write_text("")
    said = f"seqserve web: --tls-cert {cert} and --tls-key {key}: no PEM"
    with pytest.raises(AssertionError, match=said), web("localhost:1", "--tls-cert", str(cert), "--tls-key", str(key)):
        pass


WRONG = {
    ("--tls-cert", "x"): "go together",
    ("--target-key", "x"): "go together",
    ("--timeout", "0"): "above 0",
    ("--timeout", "nan"): "--timeout must be above 0",
    ("--idle-seconds", "inf"): "at most 1e+09",
    ("--drain-seconds", "nan"): "--drain-seconds must not be negative",
    ("--port", "70000"): "65535",
    ("--allow-origin", "app.example"): "no origin",
    ("--max-body-bytes", "1"): "at least 1024",
    ("--log-level", "loud"): "debug, info",
}


@pytest.mark.parametrize("flags", WRONG)
def test_wrong_flags(flags: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    """Each is named, and ends the process before anything is opened; a variable says the same as its flag, which wins."""
    with pytest.raises(SystemExit, match="2"):
        Config.parse(flags, {})
    assert WRONG[flags] in capsys.readouterr().err
    variable = {"SEQSERVE_WEB_" + flags[0][2:].upper().replace("-", "_"): flags[1]}
    with pytest.raises(SystemExit, match="2"):
        Config.parse((), variable)


def test_files_that_are_not_there() -> None:
    """A key or certificate that can't be read is told before the port is opened."""
    for flag in ("--api-key-file", "--target-ca"):
        with pytest.raises(OSError, match="nowhere"):
            Config.parse((flag, "/nowhere"), {}).shown()
