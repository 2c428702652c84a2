"""What the page does, over one WebSocket: live sessions, streams of text, a look inside. JSON both ways.

A page makes its sessions' ids itself (128 random bits), numbers its turns, and keeps each until it has the answer. So everything
it asks can be asked again: after its connection broke, or this process was restarted, it sends what has no answer, and nothing is
lost or doubled. A server that is killed meanwhile is waited for by the client (seqserve's sessions); the page only sees answers
come later.

Requests name a *line*: those of one line are done one after another, as they came; lines run side by side. `forget` ends a stream.
Every request is answered by messages with its `id`, the last of which has `done` or `error`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from seqserve import errors
from web import messages
from web.inside import tag
from web.known import PREFIX, WAIT, Live, digest
from web.messages import (
    Apart,
    Close,
    Forget,
    Fork,
    Generate,
    Kill,
    Models,
    OnLine,
    Open,
    Refused,
    Tag,
    Translate,
    Turns,
    Watch,
    decoder,
    encode,
    error,
    id_of,
    short,
    shorts,
)
from web.upstream import upstream

log = logging.getLogger(__name__)

MESSAGE = 64 << 10  # characters of a message
LINES = 16  # of a page
QUEUED = 256  # requests of a page that wait: further ones are not read until there is room
UNREAD = 2048  # messages that a page may leave unread before it is cut off
UNREAD_BYTES = 8 << 20
SESSIONS = 96  # that a page may have begun and not closed
AGAIN = 0.1  # seconds between tries, while the server is away
SEND_S = 30.0  # seconds that one message may take to be sent

R = TypeVar("R")


async def serve(socket: WebSocket) -> None:
    await socket.accept()
    await _Page(socket, _live(socket)).run()


def routes() -> list[BaseRoute]:
    return [WebSocketRoute("/live", serve, name="live")]


def _live(socket: WebSocket) -> Live:
    state = socket.app.state
    if not hasattr(state, "live"):
        state.live = Live(upstream(socket).by({}))  # all pages are this process' callers: a browser can't show a key of its own
        state.live.kill = getattr(state, "kill", None)
    live = state.live
    assert isinstance(live, Live)
    return live


class _Page:
    """One open page."""

    def __init__(self, socket: WebSocket, live: Live) -> None:
        self._socket = socket
        self._live = live
        self._out: deque[bytes] = deque()
        self._unread = 0
        self._picture: bytes | None = None  # the newest that was not sent yet; older ones are let go
        self._more = asyncio.Event()
        self._room = asyncio.Semaphore(QUEUED)
        self._lines: dict[str, asyncio.Queue[OnLine]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._apart: dict[int, asyncio.Task[None]] = {}
        self._sessions: set[str] = set()
        self._watch: int | None = None
        self._full: asyncio.Future[None] = asyncio.get_running_loop().create_future()  # done: it leaves too much unread
        self._last = False  # nothing more is read; what is to be told yet is told

    async def run(self) -> None:
        live = self._live
        self._tell({"hello": {"kill": live.kill is not None}})
        live.status.join(self._send)
        reading = asyncio.create_task(self._read())
        writing = asyncio.create_task(self._write())
        code = 1008
        try:
            await asyncio.wait([reading, writing, self._full], return_when=asyncio.FIRST_COMPLETED)
            if reading.done() and reading.exception() is None:  # it was sent too much at once: it is told so
                code = 1009
                self._last = True
                self._more.set()
                await writing
        finally:
            live.status.leave(self._send)
            live.feed.leave(self._see)
            every = [reading, writing, *self._tasks]
            for task in every:
                task.cancel()
            for result in await asyncio.gather(*every, return_exceptions=True):
                if isinstance(result, Exception) and not isinstance(result, (WebSocketDisconnect, TimeoutError, RuntimeError)):
                    log.error("a page's connection failed", exc_info=result)
            if self._socket.application_state is WebSocketState.CONNECTED and self._socket.client_state is WebSocketState.CONNECTED:
                with contextlib.suppress(Exception):  # it may have gone
                    await asyncio.wait_for(self._socket.close(code), 1.0)

    # In

    async def _read(self) -> None:
        while True:
            text = await self._socket.receive_text()
            if len(text) > MESSAGE:
                self._tell({"id": 0, "error": error("TOO_LONG", f"a message has at most {MESSAGE} characters")})
                return
            try:
                asked = decoder.decode(text)
            except (msgspec.MsgspecError, UnicodeError, RecursionError) as e:
                self._tell({"id": id_of(text), "error": error("BAD_MESSAGE", f"this is no message of the page: {e}")})
                continue
            if isinstance(asked, Watch):
                self._watch = asked.id
                self._live.feed.join(self._see)
            elif isinstance(asked, Forget):
                self._forget(asked)
            else:
                await self._room.acquire()  # no further message is read until there is
                if isinstance(asked, OnLine):
                    self._line(asked)
                else:
                    self._beside(asked)

    def _beside(self, asked: Apart) -> None:
        task = self._apart[asked.id] = self._start(self._answer(asked))

        def over(_: asyncio.Task[None]) -> None:  # also where it was forgotten before it began
            self._apart.pop(asked.id, None)
            self._room.release()

        task.add_done_callback(over)

    def _forget(self, asked: Forget) -> None:
        if asked.of == self._watch:
            self._watch = None
            self._live.feed.leave(self._see)
            self._picture = None
        elif (task := self._apart.get(asked.of)) is not None:
            task.cancel()
        self._tell({"id": asked.id, "done": True})

    def _line(self, asked: OnLine) -> None:
        queue = self._lines.get(asked.line)
        if queue is None:
            if len(self._lines) >= LINES:
                self._room.release()
                self._tell({"id": asked.id, "error": error("LINES", f"a page has at most {LINES} lines")})
                return
            queue = self._lines[asked.line] = asyncio.Queue()
            self._start(self._walk(queue))
        queue.put_nowait(asked)

    def _start(self, work: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _walk(self, queue: asyncio.Queue[OnLine]) -> None:
        while True:
            await self._answer(await queue.get())
            self._room.release()

    async def _answer(self, asked: OnLine | Apart) -> None:
        """Do it, and say how it ended."""
        id = asked.id
        try:
            self._tell({"id": id, "done": await _DO[type(asked)](self, asked)})
        except Refused as e:
            self._tell({"id": id, "error": error(e.reason, e.message)})
        except errors.Error as e:
            self._tell({"id": id, "error": error(e.reason or e.status, e.message, e.retry_after, e.turn)})
        except Exception:
            log.exception("a page's request failed")
            self._tell({"id": id, "error": error("INTERNAL", "this process failed at it; its log says how")})

    # What is asked

    async def _open(self, asked: Open) -> Any:
        self._begin(asked.session)
        live = self._live
        if asked.session not in live:
            session = live.open(asked.session, asked.model)
            try:
                await _insist(session.open)
                live.remember(asked.session, session)
            except errors.SessionConflict as e:  # it was made before, and the page did not hear of it
                if e.reason != "SESSION_EXISTS":
                    raise
        return {"tag": tag(PREFIX + asked.session)}

    async def _fork(self, asked: Fork) -> Any:
        self._begin(asked.fork)
        live = self._live
        if asked.fork not in live:
            source = live.known(asked.session).session if asked.session in live else live.resumed(asked.session)
            try:
                live.remember(asked.fork, await _insist(lambda: source.fork(PREFIX + asked.fork, close=False, timeout=WAIT)))
            except errors.SessionConflict as e:
                if e.reason != "SESSION_EXISTS":
                    raise
        return {"tag": tag(PREFIX + asked.fork)}

    def _begin(self, session: str) -> None:
        if session not in self._sessions and len(self._sessions) >= SESSIONS:
            raise Refused("SESSIONS", f"a page has at most {SESSIONS} sessions: close some")
        self._sessions.add(session)

    async def _close(self, asked: Close) -> Any:
        for id in asked.sessions:
            self._sessions.discard(id)
            session = self._live.resumed(id)
            self._live.drop(id)
            try:
                await _insist(session.open)
                await _insist(session.close)
            except (errors.SessionGone, errors.SessionNotFound):
                pass
        return True

    async def _turns(self, asked: Turns) -> Any:
        pieces = messages.pieces(asked)
        live = self._live
        known = live.known(asked.session, asked.first - 1)
        async with known.lock:  # another connection of the same page may be at it still
            live.forget(known, [turn for turn in known.answers if turn <= asked.have])
            turn = asked.first
            while pieces and turn in known.answers:
                brought, answer = known.answers[turn]
                if brought != digest(pieces[0][0]):
                    raise Refused("OTHER_INPUT", f"turn {turn} brought something else before")
                self._tell({"id": asked.id, "turn": turn, **messages.answered(answer, asked.channel)})
                pieces, turn = pieces[1:], turn + 1
            if not pieces:
                return True
            if known.session.turn != turn - 1:
                known.session = live.resumed(asked.session, turn - 1)
            told = iter(pieces)
            try:
                async with contextlib.aclosing(known.session.send_all([piece for _, piece in pieces], timeout=WAIT)) as answers:
                    async for answer in answers:
                        live.keep(known, turn, next(told)[0], answer)
                        self._tell({"id": asked.id, "turn": turn, **messages.answered(answer, asked.channel)})
                        turn += 1
            except BaseException:  # this connection's end too: what was sent has answers that nobody read
                known.session = live.resumed(asked.session, turn - 1)
                raise
        return True

    async def _translate(self, asked: Translate) -> Any:
        pieces = self._live.client.translate_stream(asked.text, beam=asked.beam, attention=True, timeout=WAIT)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                if piece.done is not None:
                    whole = piece.done
                    tokens = [[t.piece, short(t.log_probability), shorts(t.attention)] for t in whole.tokens]
                    return {
                        "text": whole.text, "source": whole.source_tokens, "score": short(whole.score), "tokens": tokens,
                        "ended": whole.ended, "timing": whole.timing,
                    }  # fmt: skip
                token = piece.token
                assert token is not None
                self._tell({"id": asked.id, "text": piece.text, "piece": token.piece, "attention": shorts(token.attention)})
        raise errors.bad_reply("a translation without an end")

    async def _generate(self, asked: Generate) -> Any:
        pieces = self._live.client.generate_stream(
            asked.text, temperature=asked.temperature, top_k=asked.top_k, seed=asked.seed, max_symbols=asked.symbols, timeout=WAIT
        )
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                if piece.done is not None:
                    whole = piece.done
                    # A number of 64 bits is not one in JavaScript.
                    return {"seed": str(whole.seed), "ended": whole.ended, "read": whole.read, "unknown": whole.unknown}
                self._tell({"id": asked.id, "text": piece.text})
        raise errors.bad_reply("a text without an end")

    async def _tag(self, asked: Tag) -> Any:
        tagging = await _insist(lambda: self._live.client.tag(asked.text, timeout=WAIT))
        return {"spans": tagging.spans, "words": tagging.words}

    async def _models(self, _: Models) -> Any:
        models = await _insist(lambda: self._live.client.models(timeout=WAIT))
        return [{"name": m.name, "version": m.version, "kind": m.kind, "facts": m.facts} for m in models if m.ready]

    async def _kill(self, _: Kill) -> Any:
        if self._live.kill is None:
            raise Refused("NO_KILL", "this page did not start the server, and may not kill it")
        await self._live.kill()
        return True

    # Out

    def _tell(self, message: Mapping[str, Any]) -> None:
        self._send(encode(message))

    def _send(self, message: bytes) -> None:
        self._out.append(message)
        self._unread += len(message)
        self._more.set()
        if (len(self._out) > UNREAD or self._unread > UNREAD_BYTES) and not self._full.done():
            log.info("a page left %d messages unread", len(self._out))
            self._full.set_result(None)

    def _see(self, picture: bytes) -> None:
        self._picture = picture
        self._more.set()

    async def _write(self) -> None:
        """Ends where the page has gone, takes too long to read one message, or was told the last."""
        while not self._last or self._out:
            await self._more.wait()
            self._more.clear()
            while self._out or self._picture is not None:
                if self._out:
                    message = self._out.popleft()
                    self._unread -= len(message)
                else:
                    assert self._picture is not None
                    message, self._picture = self._picture, None
                async with asyncio.timeout(SEND_S):  # not wait_for, which may forget that it was cancelled: so in Python 3.11
                    await self._socket.send_text(message.decode())


_DO: Mapping[type, Callable[[_Page, Any], Awaitable[Any]]] = {
    Open: _Page._open, Turns: _Page._turns, Fork: _Page._fork, Close: _Page._close, Translate: _Page._translate,
    Generate: _Page._generate, Tag: _Page._tag, Models: _Page._models, Kill: _Page._kill,
}  # fmt: skip


async def _insist(call: Callable[[], Awaitable[R]]) -> R:
    """What changes nothing when it is done twice, until there is a server to do it."""
    until = asyncio.get_running_loop().time() + WAIT
    while True:
        try:
            return await call()
        except errors.Unavailable as e:
            if asyncio.get_running_loop().time() > until:
                raise
            await asyncio.sleep(max(AGAIN, e.retry_after or 0.0))
