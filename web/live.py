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
import math
import re
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from msgspec import Meta
from starlette.routing import BaseRoute, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from seqserve import AsyncClient, AsyncSession, Classification, Forecast, Tensors, errors
from seqserve.results import Answer
from web.inside import Feed, Status, tag
from web.upstream import upstream

log = logging.getLogger(__name__)

TTL = 900.0  # seconds that a session of a page lives after its last turn
WAIT = 60.0  # seconds that a server may be away before a turn is answered with an error
PREFIX = "page-"  # before a page's own id: so it can name no session but a page's
MESSAGE = 64 << 10  # characters of a message
LINES = 16  # of a page
QUEUED = 256  # requests of a page that wait: further ones are not read until there is room
UNREAD = 2048  # messages that a page may leave unread before it is cut off
UNREAD_BYTES = 8 << 20
SESSIONS = 96  # that a page may have begun and not closed
KNOWN = 8192  # sessions that this process remembers between messages, of all pages
REPLIES = 256  # of one session that are kept for a page which has not said that it has them
AGAIN = 0.1  # seconds between tries, while the server is away
SEND_S = 30.0  # seconds that one message may take to be sent

Id = Annotated[int, Meta(ge=0, le=2**53)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{16,64}$")]
Turn = Annotated[int, Meta(ge=1, le=2**53)]
Text = Annotated[str, Meta(max_length=20_000)]
Line = Annotated[str, Meta(min_length=1, max_length=32)]
Row = list[float]
R = TypeVar("R")


class Open(msgspec.Struct, tag_field="do", tag="open", forbid_unknown_fields=True):
    """A session, or the same again."""

    id: Id
    line: Line
    session: Name
    model: Annotated[str, Meta(max_length=128)]


class Turns(msgspec.Struct, tag_field="do", tag="turns", forbid_unknown_fields=True):
    """Turns from number `first` on, one for each of what one of the lists has."""

    id: Id
    line: Line
    session: Name
    first: Turn
    texts: Annotated[list[Text], Meta(max_length=256)] = []
    series: Annotated[list[list[Row]], Meta(max_length=256)] = []  # turns × steps × channels
    rows: Annotated[list[list[Annotated[int, Meta(ge=0, le=255)]]], Meta(max_length=256)] = []  # of greys
    channel: Annotated[int, Meta(ge=0, le=1000)] = 0  # of a forecast, which is shown
    have: Annotated[int, Meta(ge=0, le=2**53)] = 0  # the last turn that the page has the answer of


class Fork(msgspec.Struct, tag_field="do", tag="fork", forbid_unknown_fields=True):
    """Another session that goes on from here, or the same again."""

    id: Id
    line: Line
    session: Name
    fork: Name


class Close(msgspec.Struct, tag_field="do", tag="close", forbid_unknown_fields=True):
    id: Id
    line: Line
    sessions: Annotated[list[Name], Meta(max_length=256)]


class Translate(msgspec.Struct, tag_field="do", tag="translate", forbid_unknown_fields=True):
    id: Id
    text: Text
    beam: Annotated[int, Meta(ge=0, le=10)] = 0


class Generate(msgspec.Struct, tag_field="do", tag="generate", forbid_unknown_fields=True):
    id: Id
    text: Text
    temperature: Annotated[float, Meta(ge=0, le=5)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=1000)] = 0
    seed: Annotated[int, Meta(ge=0, le=2**53)] | None = None
    symbols: Annotated[int, Meta(ge=1, le=2000)] = 400


class Tag(msgspec.Struct, tag_field="do", tag="tag", forbid_unknown_fields=True):
    id: Id
    text: Text


class Models(msgspec.Struct, tag_field="do", tag="models", forbid_unknown_fields=True):
    id: Id


class Watch(msgspec.Struct, tag_field="do", tag="watch", forbid_unknown_fields=True):
    id: Id


class Forget(msgspec.Struct, tag_field="do", tag="forget", forbid_unknown_fields=True):
    """End what was asked with the id `of`."""

    id: Id
    of: Id


class Kill(msgspec.Struct, tag_field="do", tag="kill", forbid_unknown_fields=True):
    """End the server's process with SIGKILL; only where whoever started us has said how (demo.py)."""

    id: Id


OnLine = Open | Turns | Fork | Close
Apart = Translate | Generate | Tag | Models | Kill
_decoder = msgspec.json.Decoder(Open | Turns | Fork | Close | Translate | Generate | Tag | Models | Watch | Forget | Kill)
_encode = msgspec.json.Encoder().encode


class Refused(Exception):
    """What a page asked that can't be."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


class _Known:
    """A session of some page: its client, and answers that the page may not have got."""

    __slots__ = ("lock", "replies", "session")

    def __init__(self, session: AsyncSession) -> None:
        self.session = session
        self.replies: dict[int, tuple[Any, Answer]] = {}  # by turn: what it brought, and the answer
        self.lock = asyncio.Lock()


class Live:
    """What outlives a page's connection. One for the process."""

    def __init__(self, client: AsyncClient) -> None:
        self.client = client
        self.status = Status(client)
        self.feed = Feed(client)
        self.kill: Callable[[], Awaitable[None]] | None = None
        self._known: OrderedDict[str, _Known] = OrderedDict()  # used longest ago first

    def known(self, id: str, turn: int) -> _Known:
        """The session of that id, taken up after `turn` where this process does not know it."""
        known = self._known.get(id)
        if known is None:
            return self.remember(id, self.client.resume(PREFIX + id, turn, close=False, timeout=WAIT))
        self._known.move_to_end(id)
        return known

    def remember(self, id: str, session: AsyncSession) -> _Known:
        known = self._known[id] = _Known(session)
        while len(self._known) > KNOWN:
            self._known.popitem(last=False)
        return known

    def knows(self, id: str) -> bool:
        return id in self._known

    def drop(self, id: str) -> None:
        self._known.pop(id, None)


async def serve(socket: WebSocket) -> None:
    await socket.accept()
    await _Page(socket, _live(socket)).run()


def routes() -> list[BaseRoute]:
    return [WebSocketRoute("/live", serve, name="live")]


def _live(socket: WebSocket) -> Live:
    state = socket.app.state
    if not hasattr(state, "live"):
        state.live = Live(upstream(socket).of(socket))
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
        self._last = False  # nothing more is read; what is to be told yet is told

    async def run(self) -> None:
        live = self._live
        self._tell({"hello": {"kill": live.kill is not None}})
        live.status.join(self._send)
        reading = asyncio.create_task(self._read())
        writing = asyncio.create_task(self._write())
        code = 1008
        try:
            await asyncio.wait([reading, writing], return_when=asyncio.FIRST_COMPLETED)
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
                self._tell({"id": 0, "error": _error("TOO_LONG", f"a message has at most {MESSAGE} characters")})
                return
            try:
                asked = _decoder.decode(text)
            except (msgspec.MsgspecError, UnicodeError, RecursionError) as e:
                self._tell({"id": _id(text), "error": _error("BAD_MESSAGE", f"this is no message of the page: {e}")})
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
                self._tell({"id": asked.id, "error": _error("LINES", f"a page has at most {LINES} lines")})
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
            self._tell({"id": id, "error": _error(e.reason, e.message)})
        except errors.Error as e:
            self._tell({"id": id, "error": _error(e.reason or e.status, e.message, e.retry_after, e.turn)})
        except Exception:
            log.exception("a page's request failed")
            self._tell({"id": id, "error": _error("INTERNAL", "this process failed at it; its log says how")})

    # What is asked

    async def _open(self, asked: Open) -> Any:
        self._begin(asked.session)
        live = self._live
        if not live.knows(asked.session):
            session = live.client.session(asked.model, id=PREFIX + asked.session, ttl=TTL, close=False, timeout=WAIT)
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
        if not live.knows(asked.fork):
            known = live.known(asked.session, 0) if live.knows(asked.session) else None
            source = known.session if known is not None else live.client.resume(PREFIX + asked.session, close=False, timeout=WAIT)
            try:
                fork = await _insist(lambda: source.fork(PREFIX + asked.fork, close=False, timeout=WAIT))
                live.remember(asked.fork, fork)
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
            known = self._live.known(id, 0).session if self._live.knows(id) else None
            session = known or self._live.client.resume(PREFIX + id, close=False, timeout=WAIT)
            self._live.drop(id)
            try:
                if known is None:
                    await _insist(session.open)
                await _insist(session.close)
            except (errors.SessionGone, errors.SessionNotFound):
                pass
        return True

    async def _turns(self, asked: Turns) -> Any:
        pieces = _pieces(asked)
        known = self._live.known(asked.session, asked.first - 1)
        async with known.lock:  # another connection of the same page may be at it still
            replies = known.replies
            for turn in [turn for turn in replies if turn <= asked.have]:
                del replies[turn]
            turn = asked.first
            while pieces and turn in replies:
                brought, answer = replies[turn]
                if brought != pieces[0][0]:
                    raise Refused("OTHER_INPUT", f"turn {turn} brought something else before")
                self._tell({"id": asked.id, "turn": turn, **_answer(answer, asked.channel)})
                pieces, turn = pieces[1:], turn + 1
            skipped = turn - asked.first
            if not pieces:
                return True
            if known.session.turn != turn - 1:
                known.session = self._resumed(asked.session, turn - 1)
            try:
                async with contextlib.aclosing(known.session.send_all([piece for _, piece in pieces], timeout=WAIT)) as answers:
                    async for answer in answers:
                        replies[turn] = (pieces[turn - asked.first - skipped][0], answer)
                        while len(replies) > REPLIES:
                            del replies[next(iter(replies))]
                        self._tell({"id": asked.id, "turn": turn, **_answer(answer, asked.channel)})
                        turn += 1
            except BaseException:  # this connection's end too: what was sent has answers that nobody read
                known.session = self._resumed(asked.session, turn - 1)
                raise
        return True

    def _resumed(self, id: str, turn: int | None) -> AsyncSession:
        return self._live.client.resume(PREFIX + id, turn, close=False, timeout=WAIT)

    async def _translate(self, asked: Translate) -> Any:
        pieces = self._live.client.translate_stream(asked.text, beam=asked.beam, attention=True, timeout=WAIT)
        async with contextlib.aclosing(pieces):
            async for piece in pieces:
                if piece.done is not None:
                    whole = piece.done
                    tokens = [[t.piece, _short(t.log_probability), _shorts(t.attention)] for t in whole.tokens]
                    return {
                        "text": whole.text, "source": whole.source_tokens, "score": _short(whole.score), "tokens": tokens,
                        "ended": whole.ended, "timing": whole.timing,
                    }  # fmt: skip
                token = piece.token
                assert token is not None
                self._tell({"id": asked.id, "text": piece.text, "piece": token.piece, "attention": _shorts(token.attention)})
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
        self._send(_encode(message))

    def _send(self, message: bytes) -> None:
        self._out.append(message)
        self._unread += len(message)
        self._more.set()

    def _see(self, picture: bytes) -> None:
        self._picture = picture
        self._more.set()

    async def _write(self) -> None:
        """Ends where the page reads too slowly, has gone, or was told the last."""
        while not self._last or self._out:
            await self._more.wait()
            self._more.clear()
            while self._out or self._picture is not None:
                if len(self._out) > UNREAD or self._unread > UNREAD_BYTES:
                    log.info("a page left %d messages unread", len(self._out))
                    return
                if self._out:
                    message = self._out.popleft()
                    self._unread -= len(message)
                else:
                    assert self._picture is not None
                    message, self._picture = self._picture, None
                await asyncio.wait_for(self._socket.send_text(message.decode()), SEND_S)


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


def _pieces(asked: Turns) -> list[tuple[Any, Any]]:
    """What each turn brings: as the page says it, to compare it by, and as a session takes it. Raises Refused."""
    kinds = [kind for kind in (asked.texts, asked.series, asked.rows) if kind]
    if len(kinds) != 1:
        raise Refused("BAD_MESSAGE", "turns bring texts, series or rows")
    if asked.texts:
        return [(text, text) for text in asked.texts]
    if asked.series:
        for steps in asked.series:
            if not steps or len({len(step) for step in steps}) != 1 or not all(map(math.isfinite, (v for step in steps for v in step))):
                raise Refused("BAD_MESSAGE", "a series has steps of as many numbers each")
        return [(steps, np.asarray(steps, np.float32)) for steps in asked.series]
    if len({len(row) for row in asked.rows}) != 1 or not asked.rows[0]:
        raise Refused("BAD_MESSAGE", "rows have as many greys each")
    return [(row, {"rows": np.asarray([[row]], np.uint8)}) for row in asked.rows]


def _answer(answer: Answer, channel: int) -> dict[str, Any]:
    """An answer as the page reads it."""
    match answer:
        case Classification():
            return {"scores": dict(answer.scores), "tokens": answer.tokens}
        case Forecast():
            at = min(channel, answer.mean.shape[1] - 1)
            return {"mean": _shorts(answer.mean[:, at]), "quantiles": {f"{q:g}": _shorts(a[:, at]) for q, a in answer.quantiles.items()}}
        case Tensors():
            return {"scores": [float(p) for p in answer["probabilities"][0]]} if "probabilities" in answer else {}
    raise Refused("BAD_MODEL", "this page does not know what such a model answers")


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _shorts(values: Any) -> list[float]:
    return [_short(v) for v in values]


def _error(reason: str, message: str, retry_after: float | None = None, turn: int | None = None) -> dict[str, Any]:
    return {"reason": reason, "message": message, "retry_after": retry_after, "turn": turn}


def _id(text: str) -> int:
    """Of a message that could not be read, as far as it can be seen."""
    found = re.search(r'"id":\s*(\d{1,15})', text[:200])
    return int(found[1]) if found else 0
