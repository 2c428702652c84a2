"""A session within asyncio: `session.Session`, awaited. What it sends and keeps is in `sessions` and `turns`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import grpc.aio

from seqserve import errors, results, retry, sessions, turns
from seqserve.results import Answer
from seqserve.turns import Inputs, Observations, Piece

if TYPE_CHECKING:
    from seqserve.aio import AsyncClient


class AsyncSession(sessions.Handle):
    """As `seqserve.Session`, with the same methods, for use within asyncio.

        async with client.session("sentiment") as s:
            (await s.send("A slow start, ")).label
            (await s.send("but the last hour is superb.")).label

    Tasks may share it, and take turns then. A turn whose `send` is cancelled is kept, as one that has no answer in time.
    """

    def __init__(self, client: AsyncClient, wanted: sessions.Wanted, close: bool, timeout: float | None) -> None:
        super().__init__(wanted, close, timeout)
        self._client = client
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> AsyncSession:
        return await self.open()

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._close:
            return
        try:
            await self.close(timeout=None if error is None else sessions.CLOSING)
        except errors.Error:
            if error is None:
                raise  # else what went wrong first is what the caller wants to see; the session ends with its ttl

    async def open(self, *, timeout: float | None = None) -> AsyncSession:
        """Opens it now, not at its first use. Raises NotFound for an unknown model or session, SessionConflict for an id in use."""
        async with self._lock:
            await self._opened(timeout)
        return self

    @overload
    async def send(self, piece: str, *, timeout: float | None = None) -> results.Classification: ...
    @overload
    async def send(self, piece: Inputs, *, timeout: float | None = None) -> results.Tensors: ...
    @overload
    async def send(self, piece: Observations, *, timeout: float | None = None) -> results.Forecast: ...
    async def send(self, piece: Piece, *, timeout: float | None = None) -> Answer:
        """One turn: a piece of text (cut anywhere) for a classifier; observations in raw units for a forecaster, one number
        per channel or steps × channels; for any model a dict of tensors with one row. The answer is of all turns so far."""
        return await self._turn(turns.encode(piece), timeout)

    async def generate(
        self,
        text: str = "",
        temperature: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        max_symbols: int = 0,
        stop: Sequence[str] = (),
        *,
        timeout: float | None = None,
    ) -> results.Generation:
        """One turn of a model that goes on with texts, with the wishes of the client's `generate`: it reads `text` after all
        that was read and generated before. A turn sent again gives the same text, whether it has a seed or not."""
        answer = await self._turn(turns.generation(text, temperature, top_k, seed, max_symbols, stop), timeout)
        if not isinstance(answer, results.Generation):
            raise errors.bad_reply(f"a turn that goes on with a text was answered with {type(answer).__name__}")
        return answer

    async def _turn(self, data: bytes, timeout: float | None) -> Answer:
        async with self._lock:
            line = await self._opened(timeout)
            tries = self._client._tries(self._within(timeout), retry.UNLIMITED)
            line.begin()
            while not line.claim(data):
                await self._first(line, tries)
            return await self._first(line, tries)

    def send_all(
        self, pieces: Iterable[Piece] | AsyncIterable[Piece], *, window: int = turns.WINDOW, timeout: float | None = None
    ) -> AsyncGenerator[Answer, None]:
        """A turn for each piece, the answers in order, with up to `window` turns sent ahead of the answer that is due.

        Pieces come from an iterable, which is read as there is room in the window, or from an asynchronous one, whose
        next piece is waited for together with the next answer. `timeout` bounds the wait for each answer. A turn that is
        refused ends it; what was sent behind is not applied then. What was sent ahead stays sent where the loop is left.
        """
        turns.check_window(window)
        return self._send_all(_Source(pieces), window, timeout)

    async def _send_all(self, source: _Source, window: int, timeout: float | None) -> AsyncGenerator[Answer, None]:
        async with self._lock:
            line = await self._opened(timeout)
            owner = line.begin()
        stream: _Stream | None = None
        tries: retry.Tries | None = None
        answer: Answer | None
        alone = False  # the stream failed by something sent over it: only a call of its own tells by which turn
        try:
            while True:
                line.check(owner)
                while len(line) < window and source.ready() and line.claim(source.piece):
                    source.taken()
                if not len(line):
                    if source.ended:
                        return
                    await source.wait()
                    continue
                tries = tries or self._client._tries(self._within(timeout), retry.UNLIMITED)
                try:
                    if alone:
                        answer = await self._client._tried(line.call(), tries)
                    else:
                        stream = stream or _Stream(self._client, line, tries.left())
                        answer = await stream.first(owner, source if len(line) < window else None)
                except errors.Error as failure:
                    line.check(owner)
                    late = isinstance(failure, errors.DeadlineExceeded) and stream is not None and stream.used
                    broken = turns.final(failure) and stream is not None and not stream.refused
                    wait = 0.0 if late or broken else tries.after(failure)  # late: by the deadline of an earlier turn
                    if wait is None:
                        line.failed(failure)
                        raise
                    alone = alone or broken
                    if stream is not None:
                        stream.close()
                        stream = None
                    await self._client._sleep(wait)
                    continue
                if answer is None:
                    continue  # there is a piece to be sent first
                tries = None
                line.check(owner)
                if line.answered():
                    yield answer
        finally:
            source.close()
            if stream is not None:
                stream.close()

    async def fork(self, id: str = "", *, close: bool = True, timeout: float | None = None) -> AsyncSession:
        """Another session that goes on from the last turn of this one; neither sees what the other reads from here on."""
        new = sessions.new_id(id)
        async with self._lock:
            line = await self._opened(timeout)
            tries = self._client._tries(self._within(timeout), retry.UNLIMITED)
            line.begin()
            while len(line):
                await self._first(line, tries)
            wanted = sessions.Wanted(new, sessions.fork(self.id, new), made=not id)
            return await AsyncSession(self._client, wanted, close, self._timeout).open(timeout=timeout)

    async def export(self, *, move: bool = False, timeout: float | None = None) -> bytes:
        """The session as bytes, for the client's `bring`, on this server or another with the same model. `move` ends it here."""
        async with self._lock:
            line = await self._opened(timeout)
            tries = self._client._tries(self._within(timeout), retry.UNLIMITED)
            line.begin()
            while len(line):
                await self._first(line, tries)
            exported = await self._client._call(sessions.export(self.id, move), self._within(timeout))
            self._close = self._close and not move
            return exported

    async def info(self, *, timeout: float | None = None) -> results.SessionInfo:
        """What the server has of this session now."""
        async with self._lock:
            await self._opened(timeout)
        return await self._client._call(sessions.get(self.id), self._within(timeout))

    async def close(self, *, timeout: float | None = None) -> None:
        """Ends the session, which frees its state; nothing happens where it has ended already."""
        if self._closed or self._line is None:
            self._closed = True
            return
        try:
            await self._client._call(sessions.close(self.id), self._within(timeout))
        except errors.Error as e:
            if not sessions.over(e):
                raise
        self._closed = True

    async def _opened(self, timeout: float | None) -> turns.Line:
        """Its line, opened where it was not. The lock is held."""
        self._check_open()
        if self._line is None:
            try:
                info = await self._client._call(self._wanted.call, self._within(timeout))
            except errors.SessionConflict as e:
                if not (self._wanted.made and sessions.exists(e)):
                    raise
                info = await self._client._call(sessions.get(self.id), self._within(timeout))  # an earlier try made it, its reply was lost
            self._line = self._wanted.line(info)
        return self._line

    async def _first(self, line: turns.Line, tries: retry.Tries) -> Answer:
        """The answer to the first turn that has none. The lock is held."""
        try:
            answer = await self._client._tried(line.call(), tries)
        except errors.Error as e:
            line.failed(e)
            raise
        line.answered()
        return answer


class _Source:
    """Pieces of either kind of iterable, one at hand at a time."""

    def __init__(self, pieces: Iterable[Piece] | AsyncIterable[Piece]) -> None:
        self._pieces: AsyncIterator[Piece] | Iterator[Piece]
        self._pieces = aiter(pieces) if isinstance(pieces, AsyncIterable) else iter(pieces)
        self.pulling: asyncio.Task[Piece] | None = None  # the next piece of an asynchronous iterable
        self.piece = b""  # at hand: what a turn brings; empty: none
        self.ended = False

    def ready(self) -> bool:
        """Whether a piece is at hand now; one is fetched where there is none."""
        if self.piece or self.ended:
            return bool(self.piece)
        try:
            if isinstance(self._pieces, AsyncIterator):
                if self.pulling is None:
                    self.pulling = asyncio.ensure_future(_next(self._pieces))
                if not self.pulling.done():
                    return False
                pulled, self.pulling = self.pulling, None
                self.piece = turns.encode(pulled.result())
            else:
                self.piece = turns.encode(next(self._pieces))
        except (StopIteration, StopAsyncIteration):
            self.ended = True
        return bool(self.piece)

    def taken(self) -> None:
        self.piece = b""

    async def wait(self) -> None:
        """Until the next piece of an asynchronous iterable is there, or its end."""
        if self.pulling is not None:
            await asyncio.wait([self.pulling])

    def close(self) -> None:
        if self.pulling is not None and not self.pulling.cancel():
            self.pulling.exception()


async def _next(pieces: AsyncIterator[Piece]) -> Piece:
    return await anext(pieces)


class _Stream:
    """One stream of turns. gRPC reads the messages to send in a task of its own, so sending never waits."""

    def __init__(self, client: AsyncClient, line: turns.Line, timeout: float) -> None:
        self.used = False  # whether it has given an answer
        self.refused = False  # whether it told of a turn that was refused, rather than failing itself
        self._line = line
        self._ahead = turns.Ahead(line)
        self._messages: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._replies: Any = client._turns(self._due(), timeout, turns.metadata(line.id))
        self._reading: asyncio.Task[bytes] | None = None

    async def _due(self) -> AsyncIterator[bytes]:
        while (message := await self._messages.get()) is not None:
            yield message

    async def first(self, owner: int, source: _Source | None) -> Answer | None:
        """Send what is due and wait for the first unanswered turn's answer, or, with None, for another piece of `source`;
        raises what the turn was refused with instead."""
        for message in self._ahead.due():
            self._messages.put_nowait(message)
        while (outcome := self._ahead.first()) is None:
            if not await self._take(owner, source):
                return None
        if isinstance(outcome, errors.Error):
            self.refused = True
            while turns.final(outcome) and outcome.reason != errors.BAD_REPLY and not self._ahead.quiet():
                try:
                    await self._take(owner, None)
                except errors.Error:
                    break
            raise outcome
        self.used = True
        return outcome

    async def _take(self, owner: int, source: _Source | None) -> bool:
        """Wait for a message; False where a piece came first."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._read())
        waited: list[asyncio.Task[Any]] = [self._reading]
        if source is not None and source.pulling is not None:
            waited.append(source.pulling)
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        self._line.check(owner)
        if not self._reading.done():
            return False
        reading, self._reading = self._reading, None
        self._ahead.take(reading.result())
        return True

    async def _read(self) -> bytes:
        try:
            message = await self._replies.read()
        except grpc.aio.AioRpcError as e:
            raise turns.stream_failed(errors.from_rpc(e)) from None
        if message is grpc.aio.EOF:
            raise turns.stream_ended()
        return bytes(message)

    def close(self) -> None:
        self._messages.put_nowait(None)
        self._replies.cancel()
        if self._reading is not None and not self._reading.cancel():
            self._reading.exception()  # seen, so that asyncio does not complain of it
