"""A session, blocking. What it sends and keeps is in `sessions` and `turns`; `aio_session` is its asyncio twin, with the same methods."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, overload

import grpc

from seqserve import errors, results, retry, sessions, turns
from seqserve.results import Answer
from seqserve.turns import Inputs, Observations, Piece

if TYPE_CHECKING:
    from seqserve.client import Client


class Session(sessions.Handle):
    """State on the server that goes on from call to call; made by `Client.session`, `Client.resume` and `fork`.

        with client.session("sentiment") as s:
            s.send("A slow start, ").label
            s.send("but the last hour is superb.").label

    Turns are numbered, and one that is sent again advances nothing. So a call whose connection breaks, or whose server is
    restarting or full, is sent again until its timeout is over. A turn that has no answer even then is kept: sending the
    same again asks for its answer, and sending anything else sends it first.

    One session has one line of turns: threads may share it, and take turns then. It is opened at its first use, or by
    `with`, which closes it in the end unless it is told otherwise (`close=False`, `detach`).
    """

    def __init__(self, client: Client, wanted: sessions.Wanted, close: bool, timeout: float | None) -> None:
        super().__init__(wanted, close, timeout)
        self._client = client
        self._lock = threading.RLock()

    def __enter__(self) -> Session:
        return self.open()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._close:
            return
        try:
            self.close(timeout=None if error is None else sessions.CLOSING)
        except errors.Error:
            if error is None:
                raise  # else what went wrong first is what the caller wants to see; the session ends with its ttl

    def open(self, *, timeout: float | None = None) -> Session:
        """Opens it now, not at its first use. Raises NotFound for an unknown model or session, SessionConflict for an id in use."""
        with self._lock:
            self._opened(timeout)
        return self

    @overload
    def send(self, piece: str, *, timeout: float | None = None) -> results.Classification: ...
    @overload
    def send(self, piece: Inputs, *, timeout: float | None = None) -> results.Tensors: ...
    @overload
    def send(self, piece: Observations, *, timeout: float | None = None) -> results.Forecast: ...
    def send(self, piece: Piece, *, timeout: float | None = None) -> Answer:
        """One turn: a piece of text (cut anywhere) for a classifier; observations in raw units for a forecaster, one number
        per channel or steps × channels; for any model a dict of tensors with one row. The answer is of all turns so far."""
        return self._turn(turns.encode(piece), timeout)

    def generate(
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
        answer = self._turn(turns.generation(text, temperature, top_k, seed, max_symbols, stop), timeout)
        if not isinstance(answer, results.Generation):
            raise errors.bad_reply(f"a turn that goes on with a text was answered with {type(answer).__name__}")
        return answer

    def _turn(self, data: bytes, timeout: float | None) -> Answer:
        with self._lock:
            line = self._opened(timeout)
            tries = self._client._tries(self._within(timeout), retry.UNLIMITED)
            line.begin()
            while not line.claim(data):
                self._first(line, tries)
            return self._first(line, tries)

    def send_all(
        self, pieces: Iterable[Piece], *, window: int = turns.WINDOW, timeout: float | None = None
    ) -> Generator[Answer, None, None]:
        """A turn for each piece, the answers in order, with up to `window` turns sent ahead of the answer that is due.

        Pieces are read as there is room in the window, before the next answer is waited for: use `send`, or a window of 1,
        for a source that comes slowly. `timeout` bounds the wait for each answer. A turn that is refused ends it; what was
        sent behind is not applied then. What was sent ahead stays sent where the loop is left.
        """
        turns.check_window(window)
        return self._send_all(pieces, window, timeout)

    def _send_all(self, pieces: Iterable[Piece], window: int, timeout: float | None) -> Generator[Answer, None, None]:
        with self._lock:
            line = self._opened(timeout)
            owner = line.begin()
        source, held, more = iter(pieces), None, True
        stream: _Stream | None = None
        tries: retry.Tries | None = None
        alone = False  # the stream failed by something sent over it: only a call of its own tells by which turn
        try:
            while True:
                while more and len(line) < window:
                    if held is None:
                        try:
                            held = turns.encode(next(source))
                        except StopIteration:
                            more = False
                            break
                    with self._lock:
                        line.check(owner)
                        if not line.claim(held):
                            break  # turns from before must be answered first
                    held = None
                if not len(line):
                    return
                tries = tries or self._client._tries(self._within(timeout), retry.UNLIMITED)
                try:
                    if alone:
                        with self._lock:
                            line.check(owner)
                            call = line.call()
                        answer = self._client._tried(call, tries)
                    else:
                        stream = stream or _Stream(self._client, line, tries.left())
                        answer = stream.first(self._lock, owner)
                except errors.Error as failure:
                    with self._lock:
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
                    self._client._sleep(wait)
                    continue
                tries = None
                with self._lock:
                    line.check(owner)
                    claimed = line.answered()
                if claimed:
                    yield answer
        finally:
            if stream is not None:
                stream.close()

    def fork(self, id: str = "", *, close: bool = True, timeout: float | None = None) -> Session:
        """Another session that goes on from the last turn of this one; neither sees what the other reads from here on."""
        new = sessions.new_id(id)
        with self._lock:
            line = self._opened(timeout)
            tries = self._client._tries(self._within(timeout), retry.UNLIMITED)
            line.begin()
            while len(line):
                self._first(line, tries)
            wanted = sessions.Wanted(new, sessions.fork(self.id, new), made=not id)
            return Session(self._client, wanted, close, self._timeout).open(timeout=timeout)

    def export(self, *, move: bool = False, timeout: float | None = None) -> bytes:
        """The session as bytes, for the client's `bring`, on this server or another with the same model. `move` ends it here."""
        with self._lock:
            line = self._opened(timeout)
            tries = self._client._tries(self._within(timeout), retry.UNLIMITED)
            line.begin()
            while len(line):
                self._first(line, tries)
            exported = self._client._call(sessions.export(self.id, move), self._within(timeout))
            self._close = self._close and not move
            return exported

    def info(self, *, timeout: float | None = None) -> results.SessionInfo:
        """What the server has of this session now."""
        with self._lock:
            self._opened(timeout)
        return self._client._call(sessions.get(self.id), self._within(timeout))

    def close(self, *, timeout: float | None = None) -> None:
        """Ends the session, which frees its state; nothing happens where it has ended already."""
        if self._closed or self._line is None:
            self._closed = True
            return
        try:
            self._client._call(sessions.close(self.id), self._within(timeout))
        except errors.Error as e:
            if not sessions.over(e):
                raise
        self._closed = True

    def _opened(self, timeout: float | None) -> turns.Line:
        """Its line, opened where it was not. The lock is held."""
        self._check_open()
        if self._line is None:
            try:
                info = self._client._call(self._wanted.call, self._within(timeout))
            except errors.SessionConflict as e:
                if not (self._wanted.made and sessions.exists(e)):
                    raise
                info = self._client._call(sessions.get(self.id), self._within(timeout))  # an earlier try made it, and its reply was lost
            self._line = self._wanted.line(info)
        return self._line

    def _first(self, line: turns.Line, tries: retry.Tries) -> Answer:
        """The answer to the first turn that has none. The lock is held."""
        try:
            answer = self._client._tried(line.call(), tries)
        except errors.Error as e:
            line.failed(e)
            raise
        line.answered()
        return answer


class _Stream:
    """One stream of turns. gRPC reads the messages to send in a thread of its own, so sending never waits."""

    def __init__(self, client: Client, line: turns.Line, timeout: float) -> None:
        self.used = False  # whether it has given an answer
        self.refused = False  # whether it told of a turn that was refused, rather than failing itself
        self._line = line
        self._ahead = turns.Ahead(line)
        self._messages: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._replies: Any = client._turns(iter(self._messages.get, None), timeout, turns.metadata(line.id))

    def first(self, lock: threading.RLock, owner: int) -> Answer:
        """Send what is due and wait for the first unanswered turn's answer; raises what it was refused with instead."""
        with lock:
            self._line.check(owner)
            for message in self._ahead.due():
                self._messages.put(message)
        while (outcome := self._ahead.first()) is None:
            self._take(lock, owner)
        if isinstance(outcome, errors.Error):
            self.refused = True
            while turns.final(outcome) and outcome.reason != errors.BAD_REPLY and not self._ahead.quiet():
                try:
                    self._take(lock, owner)
                except errors.Error:
                    break
            raise outcome
        self.used = True
        return outcome

    def _take(self, lock: threading.RLock, owner: int) -> None:
        try:
            message = next(self._replies, None)
        except grpc.RpcError as e:
            raise turns.stream_failed(errors.from_rpc(e)) from None
        if message is None:
            raise turns.stream_ended()
        with lock:
            self._line.check(owner)
            self._ahead.take(message)

    def close(self) -> None:
        self._messages.put(None)
        self._replies.cancel()
