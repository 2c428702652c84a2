"""The page's own server side, without a browser: its files, and what it does over a WebSocket, against a real server that is killed."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import websockets
from websockets.asyncio.client import ClientConnection

import seqserve
from server.app import App
from server.config import Config
from tests import models, process
from tests.process import ROOT, serve
from web import live, page
from web.app import app as web_app
from web.config import Config as WebConfig
from web.wire import Server, listening

WAIT_S = 60
TEXT = ["The", "first", "hour", "is", "slow", ",", "but", "the", "ending", "is", "wonderful", "."]


@contextmanager
def web(target: str, *flags: str) -> Iterator[str]:
    """The web process before a server; gives its address, and sees that it ends well."""
    with process.web(target, *flags) as made:
        yield f"127.0.0.1:{made.port}"
        assert made.terminate() == 0


@pytest.fixture(scope="module")
def app() -> Iterator[App]:
    made = App(Config(models=ROOT / "models", port=0, metrics_port=-1, workers=2))
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def address(app: App) -> Iterator[str]:
    with web(f"127.0.0.1:{app.port}") as address:
        yield address


class Page:
    """What wire.js is to the page."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self._next = 0
        self.said: list[dict[str, Any]] = []

    async def send(self, message: dict[str, Any]) -> int:
        self._next += 1
        await self.socket.send(json.dumps({"id": self._next, **message}))
        return self._next

    async def told(self) -> dict[str, Any]:
        async with asyncio.timeout(WAIT_S):
            message: dict[str, Any] = json.loads(await self.socket.recv())
        self.said.append(message)
        return message

    async def rest(self, id: int) -> tuple[list[dict[str, Any]], Any]:
        """All messages of an id: those before the last, and what the last had. Raises its error."""
        before = []
        while True:
            message = await self.told()
            if message.get("id") != id:
                continue
            if "error" in message:
                raise Refused(message["error"])
            if "done" in message:
                return before, message["done"]
            before.append(message)

    async def ask(self, **message: Any) -> tuple[list[dict[str, Any]], Any]:
        return await self.rest(await self.send(message))

    async def turns(self, session: str, first: int, **brought: Any) -> list[dict[str, Any]]:
        return (await self.ask(do="turns", line="a", session=session, first=first, **brought))[0]


class Refused(Exception):
    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.reason = error["reason"]


@asynccontextmanager
async def opened(address: str) -> AsyncIterator[Page]:
    async with websockets.connect(f"ws://{address}/live", max_size=1 << 24) as socket:
        yield Page(socket)


def run(address: str, story: Callable[[Page], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with opened(address) as page:
            await story(page)

    asyncio.run(whole())


def new_id(name: str) -> str:
    return f"{name}-{os.urandom(8).hex()}"


def expected(app: App, texts: list[str]) -> list[float]:
    """The scores that a session of our own client gets."""
    with seqserve.Client(f"127.0.0.1:{app.port}") as client, client.session("sentiment") as session:
        return [answer.scores["positive"] for answer in session.send_all(texts)]


# The files


def get(address: str, path: str, **headers: str) -> Any:
    return urllib.request.urlopen(urllib.request.Request(f"http://{address}{path}", headers=headers), timeout=WAIT_S)


def test_files(address: str) -> None:
    """Each file as it is on disk, under headers that let a browser do no more with it than is meant; 304 where it has it."""
    for path, file in page.files().items():
        with get(address, path) as reply:
            assert reply.read() == file.plain
            assert reply.headers["content-type"] == file.media
            policy = reply.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert reply.headers["x-content-type-options"] == "nosniff"
            tag = reply.headers["etag"]
        with get(address, path, **{"accept-encoding": "gzip"}) as reply:
            assert reply.headers["content-encoding"] == "gzip"
            assert reply.read() == file.packed
        with pytest.raises(HTTPError) as caught:
            get(address, path, **{"if-none-match": tag})
        assert caught.value.code == 304
        caught.value.close()


def test_nothing_from_elsewhere() -> None:
    """No file names another host to be loaded from, has a script or a style in it, or more of it than a page needs."""
    packed = 0
    for path, file in page.files().items():
        text = file.plain.decode()
        if file.media.startswith(("text/html", "text/css", "text/javascript")):
            assert re.findall(r"https?://[^\s\"'`]+", text.replace("http://www.w3.org/2000/svg", "")) == [], path
            assert "innerHTML" not in text, path
            packed += len(file.packed)
        if path == "/":
            assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=", text)
    assert packed < 40_000, "of HTML, CSS and JavaScript together"


def test_every_module_is_there() -> None:
    """What a file names of the others exists."""
    files = page.files()
    for path, file in files.items():
        text = file.plain.decode()
        named = re.findall(r"from \"\./([\w.]+)\"", text) + re.findall(r"(?:src|href)=\"([\w]+\.\w+)\"", text)
        for name in named:
            assert f"/{name}" in files, (path, name)


# Over the socket


def test_a_word_a_turn(app: App, address: str) -> None:
    """Turns of a session have the scores that any client's have; sent again, also over another connection, they are the same and
    advance nothing; what was forked goes on from where it was."""
    texts = [f"{word} " for word in TEXT]
    scores = expected(app, texts)
    session, fork = new_id("session"), new_id("fork")

    async def story(one: Page) -> None:
        _, done = await one.ask(do="open", line="a", session=session, model="sentiment")
        assert re.fullmatch(r"[0-9a-f]{8}", done["tag"])
        told = await one.turns(session, 1, texts=texts[:4])
        assert [(t["turn"], t["scores"]["positive"]) for t in told] == list(enumerate(scores[:4], 1))
        await one.ask(do="fork", line="a", session=session, fork=fork)
        told = await one.turns(session, 5, texts=texts[4:])
        assert [t["scores"]["positive"] for t in told] == scores[4:]
        async with opened(address) as other:  # the same page, after its connection broke: it asks all of it again
            await other.ask(do="open", line="a", session=session, model="sentiment")
            again = await other.turns(session, 1, texts=texts)
            assert [(t["turn"], t["scores"]["positive"]) for t in again] == list(enumerate(scores, 1))
            await other.ask(do="fork", line="a", session=session, fork=fork)
            told = await other.turns(fork, 5, texts=texts[4:])
            assert [t["scores"]["positive"] for t in told] == scores[4:]
            await other.ask(do="close", line="a", sessions=[session, fork])
            with pytest.raises(Refused) as caught:
                await other.turns(session, 13, texts=["more "])
            assert caught.value.reason in ("SESSION_CLOSED", "UNKNOWN_SESSION")

    run(address, story)


def test_another_process_goes_on(app: App, address: str) -> None:
    """A page whose web process was started anew goes on at the new one, and what had no answer is answered once."""
    texts = [f"{word} " for word in TEXT]
    scores = expected(app, texts)
    session = new_id("session")

    async def story(one: Page) -> None:
        await one.ask(do="open", line="a", session=session, model="sentiment")
        await one.turns(session, 1, texts=texts[:5])

    with web(f"127.0.0.1:{app.port}") as first:
        run(first, story)

    async def goes_on(one: Page) -> None:
        await one.ask(do="open", line="a", session=session, model="sentiment")
        told = await one.turns(session, 5, texts=texts[4:])  # the fifth had an answer that did not arrive
        assert [(t["turn"], t["scores"]["positive"]) for t in told] == list(enumerate(scores[4:], 5))

    run(address, goes_on)


def test_killed_server(tmp_path: Path) -> None:
    """SIGKILL between turns, and a new server on the same store and port: pages are told, and every turn is answered once."""
    texts = [f"{word} " for word in TEXT]
    store = f"lmdb:{tmp_path / 'sessions'}"
    sessions = [new_id(f"s{i}") for i in range(3)]

    async def story(address: str, begin: Callable[[], Any], kill: Callable[[], None]) -> None:
        async with opened(address) as one:
            while (await one.told()).get("server") != "here":
                pass
            for session in sessions:
                await one.ask(do="open", line="a", session=session, model="sentiment")
                await one.turns(session, 1, texts=texts[:3])
            kill()
            asked = [await one.send({"do": "turns", "line": s, "session": s, "first": 4, "texts": texts[3:]}) for s in sessions]
            fork = await one.send({"do": "fork", "line": sessions[0], "session": sessions[0], "fork": new_id("fork")})
            while (await one.told()).get("server") != "away":
                pass
            late = [await one.send({"do": "open", "line": "b", "session": new_id("late"), "model": "sentiment"})]
            late.append(await one.send({"do": "models"}))
            await asyncio.wait_for(one.socket.ping(), WAIT_S)  # and they were read while nobody was there
            with begin():
                told: dict[int, list[dict[str, Any]]] = {id: [] for id in asked}
                over = set()
                while over != {*asked, fork, *late}:
                    message = await one.told()
                    id = message.get("id")
                    if id in told and "turn" in message:
                        told[id].append(message)
                    elif id is not None:
                        assert "error" not in message, message
                        over.add(id)
                for answers in told.values():
                    assert [a["turn"] for a in answers] == list(range(4, len(TEXT) + 1))
                assert len({json.dumps([a["scores"] for a in answers]) for answers in told.values()}) == 1
                scores = [a["scores"]["positive"] for a in told[asked[0]]]
                _, models = await one.ask(do="models")
                assert {m["kind"] for m in models} >= {"classify"}
                while {"server": "here"} not in one.said[-50:]:
                    await one.told()
        assert scores == whole[3:]

    with serve(ROOT / "models", "--store", store) as first:
        port = first.port
        with seqserve.Client(f"127.0.0.1:{port}") as client, client.session("sentiment") as session:
            whole = [answer.scores["positive"] for answer in session.send_all(texts)]

        def kill() -> None:
            first.process.kill()
            first.process.wait()

        with web(f"127.0.0.1:{port}") as address:
            asyncio.run(story(address, lambda: serve(ROOT / "models", "--store", store, "--port", str(port)), kill))


def test_other_inputs(app: App, address: str) -> None:
    """A forecaster's observations and a digit's rows are turns; translations, texts and names are streamed or whole."""

    async def story(one: Page) -> None:
        session = new_id("series")
        await one.ask(do="open", line="a", session=session, model="forecaster")
        series = [[20.0 + hour % 24 + c for c in range(7)] for hour in range(96)]
        (told,) = await one.turns(session, 1, series=[series], channel=6)
        assert len(told["mean"]) == len(told["quantiles"]["0.5"]) == 96
        assert all(a <= b for a, b in zip(told["quantiles"]["0.1"], told["quantiles"]["0.9"], strict=True))
        digit = new_id("digit")
        await one.ask(do="open", line="a", session=digit, model="digits")
        rows = [[0] * 28] * 4 + [[0] * 13 + [255] * 3 + [0] * 12] * 20 + [[0] * 28] * 4
        told_rows = await one.turns(digit, 1, rows=rows)
        assert len(told_rows) == 28
        assert max(range(10), key=told_rows[-1]["scores"].__getitem__) == 1
        pieces, whole = await one.ask(do="translate", text="A dog runs along the beach.")
        assert "".join(p["text"] for p in pieces) == whole["text"]
        assert len(pieces[0]["attention"]) == len(whole["source"])
        assert [t[0] for t in whole["tokens"]] == [p["piece"] for p in pieces]
        pieces, whole = await one.ask(do="generate", text="ROMEO:", seed=7, symbols=40)
        again, _ = await one.ask(do="generate", text="ROMEO:", seed=7, symbols=40)
        assert len(pieces) == 40
        assert pieces[0]["text"] == again[0]["text"]
        assert "".join(p["text"] for p in pieces) == "".join(p["text"] for p in again)
        assert whole["seed"] == "7"
        _, found = await one.ask(do="tag", text="Alicia Keys sang in London.")
        assert "London" in [span["text"] for span in found["spans"]]

    run(address, story)


def test_inside(app: App, address: str) -> None:
    """Pictures show rounds with tags in place of sessions' ids; one feed serves all pages, and ends with the last."""
    session = new_id("watched")

    async def story(one: Page) -> None:
        async with opened(address) as other:
            for each in (one, other):
                await each.send({"do": "watch"})
                while "picture" not in await each.told():
                    pass
            assert app.workers.onlooker is not None
            _, done = await one.ask(do="open", line="a", session=session, model="sentiment")
            await one.turns(session, 1, texts=["Good. "])
            seen: dict[str, Any] = {}
            while not any(part[0] == done["tag"] for round in seen.get("rounds", ()) for part in round["parts"]):
                seen = (await other.told()).get("picture", {})
            assert session not in json.dumps(other.said)
            assert {"sentiment", "translator"} <= {m["model"] for m in seen["models"]}
            await other.ask(do="forget", of=1)
        await one.ask(do="forget", of=1)
        for _ in range(1000):
            if app.workers.onlooker is None:
                break
            await asyncio.sleep(0.01)
        assert app.workers.onlooker is None

    run(address, story)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ("no JSON", "BAD_MESSAGE"),
        ('{"do": "dance", "id": 1}', "BAD_MESSAGE"),
        ('{"do": "open", "id": 1, "line": "a", "session": "short", "model": "sentiment"}', "BAD_MESSAGE"),
        ('{"do": "open", "id": 1, "line": "a", "session": "a/../../../../b0000", "model": "sentiment"}', "BAD_MESSAGE"),
        ('{"do": "open", "id": 1, "line": "a", "session": "0123456789abcdef", "model": "nothing"}', "UNKNOWN_MODEL"),
        ('{"do": "turns", "id": 1, "line": "a", "session": "0123456789abcdef", "first": 1}', "BAD_MESSAGE"),
        ('{"do": "turns", "id": 1, "line": "a", "session": "0123456789abcdef", "first": 1, "texts": ["a"], "rows": [[1]]}', "BAD_MESSAGE"),
        ('{"do": "turns", "id": 1, "line": "a", "session": "0123456789abcdef", "first": 1, "series": [[[1, 2], [3]]]}', "BAD_MESSAGE"),
        ('{"do": "turns", "id": 1, "line": "a", "session": "fedcba9876543210", "first": 1, "texts": ["a"]}', "UNKNOWN_SESSION"),
        ('{"do": "translate", "id": 1, "text": "x", "beam": 11}', "BAD_MESSAGE"),
        ('{"do": "generate", "id": 1, "text": "x", "temperature": -1}', "BAD_MESSAGE"),
        ('{"do": "kill", "id": 1}', "NO_KILL"),
        ("[" * 30_000, "BAD_MESSAGE"),
        ('{"do": "tag", "id": 1, "text": "\\ud800"}', "BAD_MESSAGE"),
    ],
)
def test_bad_messages(address: str, message: str, why: str) -> None:
    """Each is told why, and the connection lives on."""

    async def story(one: Page) -> None:
        await one.socket.send(message)
        while "error" not in (told := await one.told()):
            pass
        assert told["error"]["reason"] == why, told
        assert told["error"]["message"]
        assert (await one.ask(do="models"))[1]

    run(address, story)


def test_too_much(address: str) -> None:
    """A page that sends too long a message is told and cut off; one with too many sessions, lines or sockets is told."""

    async def story(one: Page) -> None:
        for line in range(live.LINES):
            await one.ask(do="close", line=f"l{line}", sessions=[])
        with pytest.raises(Refused) as caught:
            await one.ask(do="close", line="one more", sessions=[])
        assert caught.value.reason == "LINES"
        for i in range(live.SESSIONS):
            await one.send({"do": "open", "line": "l0", "session": new_id(f"s{i}"), "model": "sentiment"})
        with pytest.raises(Refused) as caught:
            await one.ask(do="open", line="l0", session=new_id("more"), model="sentiment")
        assert caught.value.reason == "SESSIONS"
        await one.send({"do": "tag", "text": "x" * live.MESSAGE})
        with pytest.raises(websockets.ConnectionClosed):
            await one.rest(-1)
        assert one.said[-1]["error"]["reason"] == "TOO_LONG"

    run(address, story)


def test_other_origins(address: str) -> None:
    """Another site's page can't open the socket."""

    async def attempt() -> None:
        async with websockets.connect(f"ws://{address}/live", origin="http://elsewhere.example"):  # type: ignore[arg-type]
            pass

    with pytest.raises(websockets.InvalidStatus) as caught:
        asyncio.run(attempt())
    assert caught.value.response.status_code == 403


def test_a_crowd(app: App, address: str) -> None:
    """Fifty open pages, each with a session of its own, read at once and have the same scores."""
    texts = [f"{word} " for word in TEXT]
    scores = expected(app, texts)

    async def reader() -> list[float]:
        async with opened(address) as one:
            session = new_id("crowd")
            await one.send({"do": "open", "line": "a", "session": session, "model": "sentiment"})
            asked = [
                await one.send({"do": "turns", "line": "a", "session": session, "first": i, "texts": [t]}) for i, t in enumerate(texts, 1)
            ]
            await one.rest(asked[-1])
            await one.ask(do="close", line="a", sessions=[session])
            return [m["scores"]["positive"] for m in one.said if "scores" in m]

    async def all_of_them() -> list[list[float]]:
        return await asyncio.gather(*(reader() for _ in range(50)))

    assert asyncio.run(all_of_them()) == [scores] * 50


def test_forget_ends_a_stream(app: App, address: str) -> None:
    """A text that nobody waits for any more is not written on."""

    async def story(one: Page) -> None:
        id = await one.send({"do": "generate", "text": "ROMEO:", "symbols": 2000})
        while "text" not in await one.told():
            pass
        await one.ask(do="forget", of=id)
        for _ in range(1000):
            if not any(m.engine.rounds.tickets for m in app.catalog.models()):
                break
            await asyncio.sleep(0.01)
        assert not any(m.engine.rounds.tickets for m in app.catalog.models())
        assert not any(m.get("id") == id and "done" in m for m in one.said)

    run(address, story)


def test_keys(tmp_path: Path) -> None:
    """Before a server that asks for keys, the page shows what its process' key may see: no inside for a user's."""
    from tests.test_security import FILE, KEYS

    (tmp_path / "keys.toml").write_text(FILE)
    (tmp_path / "key").write_text(KEYS["ann"])
    with (
        serve(ROOT / "models", "--keys", str(tmp_path / "keys.toml"), "--keys-interval", "0") as server,
        web(f"127.0.0.1:{server.port}", "--api-key-file", str(tmp_path / "key")) as address,
    ):

        async def story(one: Page) -> None:
            session = new_id("keyed")
            await one.ask(do="open", line="a", session=session, model="sentiment")
            assert await one.turns(session, 1, texts=["Good. "])
            await one.send({"do": "watch"})
            while "picture" not in (told := await one.told()):
                pass
            assert told["picture"] is None
            assert "operators" in told["why"]

        run(address, story)


def test_who_does_not_read_is_cut_off(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page that asks and does not read is let go once too much waits for it, and what waits with it; others notice nothing."""
    monkeypatch.setattr(live, "UNREAD_BYTES", 200_000)
    config = WebConfig(target=f"127.0.0.1:{app.port}", port=0, drain_seconds=1)

    async def ask_on(deaf: ClientConnection) -> None:
        while True:
            await deaf.send('{"do": "models", "id": 1}')

    async def story() -> None:
        made = web_app(config)
        server = Server(made, config)
        with listening(config) as heard, socket.socket() as small:
            heard.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 << 10)  # or the system would keep some megabytes for it
            small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 10)
            serving = asyncio.create_task(server.serve([heard]))
            while not server.started:
                await asyncio.sleep(0.01)
            async with opened(f"127.0.0.1:{server.port}") as neighbour:
                small.connect(("127.0.0.1", server.port))
                deaf = await websockets.connect(f"ws://127.0.0.1:{server.port}/live", sock=small, max_queue=1, ping_interval=None)
                asking = asyncio.create_task(ask_on(deaf))
                async with asyncio.timeout(WAIT_S):
                    for pages in (2, 1):
                        while made.state.live.status.pages != pages:
                            await asyncio.sleep(0.01)
                asking.cancel()
                deaf.transport.abort()
                assert (await neighbour.ask(do="models"))[1]
            server.should_exit = True
            await serving

    asyncio.run(story())


def test_who_asks_too_much_at_once_is_cut_off(app: App) -> None:
    """Its task ends with it: nothing is left for the process's own end to wait for."""
    nonsense = bytes((0x81, 0x80 + 1, 0, 0, 0, 0)) + b"?"  # a WebSocket's frame, masked with zeros

    async def story() -> None:
        async with opened(address) as one:
            one.socket.transport.write(nonsense * 2 * live.UNREAD)
            with pytest.raises(websockets.ConnectionClosed):
                await one.rest(-1)

    with process.web(f"127.0.0.1:{app.port}") as made:
        address = f"127.0.0.1:{made.port}"
        asyncio.run(story())
        assert made.terminate() == 0
    log = "".join(made.log)
    assert "messages unread" in log
    assert "Traceback" not in log
    assert "Cancel" not in log


@contextmanager
def demo(*flags: str) -> Iterator[str]:
    """`python -m web.demo`, as `make web` starts it; gives the page's address."""
    command = [sys.executable, "-m", "web.demo", "--port", "0", "--pause", "0.1", *flags]
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    try:
        for line in running.stderr:
            if found := re.search(r"web\.wire: serving \S+ on http://\S+:(\d+)", line):
                break
        else:
            raise AssertionError("it did not start")
        draining = threading.Thread(target=running.stderr.read, daemon=True)  # or it would wait for its log to be read
        draining.start()
        yield f"127.0.0.1:{found[1]}"
        running.send_signal(signal.SIGTERM)
        assert running.wait(WAIT_S) == 0
        draining.join()
    finally:
        running.kill()
        running.wait()
        running.stderr.close()


def test_killed_by_the_page(tmp_path: Path) -> None:
    """The page of `make web` kills the server, which is started again on the same port and the same sessions; one that others can
    reach may not."""
    library, store = tmp_path / "models", ("--store", str(tmp_path / "sessions"))
    models.library(library)

    async def story(one: Page) -> None:
        while (told := await one.told()) != {"server": "here"}:
            assert told == {"hello": {"kill": True}}
        session = new_id("survivor")
        await one.ask(do="open", line="a", session=session, model="reader")
        assert (await one.ask(do="kill"))[1] is True
        while await one.told() != {"server": "away"}:
            pass
        while await one.told() != {"server": "here"}:
            pass
        await one.ask(do="fork", line="a", session=session, fork=new_id("fork"))
        with pytest.raises(Refused) as caught:
            await one.ask(do="fork", line="a", session=new_id("unknown"), fork=new_id("fork"))
        assert caught.value.reason == "UNKNOWN_SESSION"

    async def others(one: Page) -> None:
        assert await one.told() == {"hello": {"kill": False}}
        with pytest.raises(Refused) as caught:
            await one.ask(do="kill")
        assert caught.value.reason == "NO_KILL"

    with demo("--models", str(library), *store) as address:
        run(address, story)
    with demo("--models", str(library), *store, "--host", "0.0.0.0") as address:
        run(address, others)
