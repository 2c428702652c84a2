"""Calls on gRPC's completion queue: how each passes. With `queue_front.py`, which polls, the only files that touch grpcio's private
Cython layer.

In the words of gRPC's core (a *batch* is a list of operations that completes once, as one event with our tag):

    ReceiveCloseOnServer                  -> _on_closed     the call is over, for whatever reason
    ReceiveMessage                        -> _on_message    posted again only after the handler has had the message
    (SendInitialMetadata +) SendMessage   -> _on_sent       one send at a time; further replies queue in the call
    (SendMessage +) SendStatusFromServer  -> no tag         nothing is left to do; of a unary call that was answered soon: _on_sent

A unary call asks for its close only when it grows older (`grow_up`); most are answered before.

What must hold, or gRPC aborts the process: no batch starts after the queue was shut down. A call is marked as closed under the lock
under which its batches start, and the queue is shut down only when the server is down and every call has been marked.
"""

from __future__ import annotations

import importlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import grpc

from server.rpc.front import BAD_TRAILING, HANDLER_FAILED, NO_REQUEST, Kind, Metadata, Options, Receiver, metadata_fault, status_text

logger = logging.getLogger(__name__)

cygrpc: Any = importlib.import_module("grpc._cython.cygrpc")  # no type checker knows it

_NEVER = 1e11  # seconds since 1970; gRPC writes "no deadline" as a time far beyond it


class Home(Protocol):
    """The front that a call belongs to."""

    options: Options
    young: deque[UnaryCall]

    def forget(self, call: Call) -> None: ...


class Call:
    """What calls of every kind share: who calls, and how the call stands.

    `_over`: the handler has ended the call, or cannot any more. `_closed`: gRPC is done with it and no batch may start.
    `_gone`: it was closed before the handler had ended it. All three change under `_lock` only."""

    __slots__ = (
        "__weakref__", "_callbacks", "_closed", "_core", "_details", "_front", "_gone", "_lock", "_over", "_start", "metadata", "method",
    )  # fmt: skip

    def __init__(self, front: Home, method: str, start: Callable[..., Receiver | None], arrival: Any) -> None:
        self.method: str = method
        self.metadata: Metadata = arrival.invocation_metadata
        self._front = front
        self._start = start
        self._core = arrival.call
        self._details = arrival.call_details
        self._lock = threading.Lock()
        self._over = self._closed = self._gone = False
        self._callbacks: tuple[Callable[[], None], ...] = ()

    @property
    def peer(self) -> str:
        peer: bytes = self._core.peer()
        return peer.decode()

    @property
    def deadline(self) -> float | None:
        unix_s: float = self._details.deadline
        return None if unix_s > _NEVER else time.monotonic() + unix_s - time.time()

    def on_gone(self, callback: Callable[[], None]) -> None:
        with self._lock:
            if not self._over:
                self._callbacks += (callback,)
                return
        if self._gone:
            callback()

    def fail(self, status: grpc.StatusCode, message: str, trailing: Metadata = ()) -> None:
        if status is grpc.StatusCode.OK:
            raise ValueError("a call that fails needs a status other than OK")
        self._end(_status(status, message, trailing, self.method))

    def _end(self, status: Any, *before: Any) -> None:
        """Send what ends the call, unless it is over."""
        with self._lock:
            if not self._over:
                self._over = True
                self._callbacks = ()
                self._batch((cygrpc.SendInitialMetadataOperation(None, 0), *before, status), None)

    def _batch(self, operations: Iterable[Any], tag: Callable[[Any], None] | None) -> None:
        """Start a batch. With the lock held, or while no other thread knows the call."""
        if error := self._core.start_server_batch(operations, tag):
            logger.error("gRPC refused a batch of %s with call error %d; the call is cancelled", self.method, error)
            self._core.cancel()

    def begin(self) -> None:
        """Let the call run, once the front knows it."""
        self._watch()
        self._read()

    def _watch(self) -> None:
        """Ask to hear of the call's end, whatever it is; as `_batch`."""
        self._batch((cygrpc.ReceiveCloseOnServerOperation(0),), self._on_closed)

    def _read(self) -> None:
        """Ask for the caller's next message; as `_batch`."""
        self._batch((cygrpc.ReceiveMessageOperation(0),), self._on_message)

    def _on_message(self, event: Any) -> None:
        """The one message of a call that has only one."""
        message: bytes | None = event.batch_operations[0].message()
        if message is None:
            self.fail(grpc.StatusCode.UNIMPLEMENTED, NO_REQUEST)
            return
        self._run(self._start, self, message)

    def _run(self, handler: Callable[..., Any], *arguments: object) -> Any:
        """Run a piece of the handler, and answer for it if it raises."""
        try:
            return handler(*arguments)
        except BaseException:  # even SystemExit must not end the polling thread
            logger.exception("the handler of %s failed", self.method)
            self.fail(grpc.StatusCode.INTERNAL, HANDLER_FAILED)

    def _on_closed(self, _event: Any) -> None:
        with self._lock:
            callbacks, self._callbacks = self._callbacks, ()
            self._gone = not self._over
            self._over = self._closed = True
        self._front.forget(self)
        if self._gone:
            for callback in callbacks:
                self._run(callback)


class UnaryCall(Call):
    """A call with one answer. Most are answered within a millisecond or two; to be told of their end costs an event, and it is not
    asked for until they grow older: 15 of the 100 µs that a call takes."""

    __slots__ = ("_watched", "born")

    waiting = 0

    def __init__(self, front: Home, method: str, start: Callable[..., Receiver | None], arrival: Any) -> None:
        super().__init__(front, method, start, arrival)
        self._watched = False
        self.born = time.monotonic()

    def begin(self) -> None:
        self._front.young.append(self)
        self._read()

    def grow_up(self) -> None:
        """From now on its caller's leaving is noticed."""
        with self._lock:
            if not (self._watched or self._over or self._closed):
                self._watched = True
                self._watch()

    def reply(self, message: bytes, trailing: Metadata = ()) -> None:
        self._end(_ok(trailing, self.method), cygrpc.SendMessageOperation(message, 0))

    def finish(self, trailing: Metadata = ()) -> None:
        raise TypeError(f"{self.method} has one answer: end it with reply() or fail()")

    def _end(self, status: Any, *before: Any) -> None:
        with self._lock:
            if not self._over:
                self._over = True
                self._callbacks = ()
                self._batch((cygrpc.SendInitialMetadataOperation(None, 0), *before, status), None if self._watched else self._on_sent)

    def _on_sent(self, _event: Any) -> None:
        with self._lock:
            self._closed = True
        self._front.forget(self)


class StreamCall(Call):
    """A call with any number of replies. gRPC takes one message at a time; those given meanwhile wait in `_queue`."""

    __slots__ = ("_bytes", "_held", "_opened", "_queue", "_receiver", "_sending", "_status")

    def __init__(self, front: Home, method: str, start: Callable[..., Receiver | None], arrival: Any) -> None:
        self._queue: deque[bytes] = deque()
        self._bytes = 0  # in `_queue`
        self._sending = False
        self._opened = False  # initial metadata has been sent
        self._status: Any = None  # to be sent after the queue
        self._receiver: Receiver | None = None
        self._held = False  # not reading, until the queue is half empty
        super().__init__(front, method, start, arrival)

    @property
    def waiting(self) -> int:
        return len(self._queue) + self._sending

    def reply(self, message: bytes, trailing: Metadata = ()) -> None:
        if trailing:
            raise TypeError(f"{self.method} is a stream: give trailing metadata to finish()")
        if not isinstance(message, bytes):
            raise TypeError(f"{self.method} replied with {type(message).__name__}; messages are bytes")
        with self._lock:
            if self._over:
                return
            if self._sending:
                self._queue.append(message)
                self._bytes += len(message)
            else:
                self._send(message)

    def finish(self, trailing: Metadata = ()) -> None:
        self._end(_ok(trailing, self.method))

    def _end(self, status: Any, *before: Any) -> None:
        with self._lock:
            if not self._over:
                self._over = True
                self._callbacks = ()
                self._status = status
                if not self._sending:
                    self._send(None)

    def _send(self, message: bytes | None) -> None:
        """Start the next send: a message, the status if nothing else waits, or both. With the lock held."""
        operations = [] if self._opened else [cygrpc.SendInitialMetadataOperation(None, 0)]
        if message is not None:
            # With more to come gRPC may gather up to 64 KiB before it writes to the socket: 6.6 µs a message in bursts, not 8.6.
            more = cygrpc.WriteFlag.buffer_hint if self._queue else 0
            operations.append(cygrpc.SendMessageOperation(message, more))
        last = self._status is not None and not self._queue
        if last:
            operations.append(self._status)
        self._batch(operations, None if last else self._on_sent)
        self._opened = self._sending = True

    def _on_sent(self, _event: Any) -> None:
        with self._lock:
            self._sending = False
            if self._closed:
                self._queue.clear()
            elif self._queue:
                message = self._queue.popleft()
                self._bytes -= len(message)
                self._send(message)
            elif self._status is not None:
                self._send(None)
            if self._held and not self._over and not self._full(0.5):
                self._held = False
                self._read()

    def _full(self, share: float = 1.0) -> bool:
        options = self._front.options
        return len(self._queue) > share * options.backlog_messages or self._bytes > share * options.backlog_bytes


class OpenCall(StreamCall):
    """A stream that the caller writes to as well."""

    __slots__ = ()

    def begin(self) -> None:
        self._watch()
        self._receiver = self._run(self._start, self)
        with self._lock:
            if not self._over:
                self._read()

    def _on_message(self, event: Any) -> None:
        message: bytes | None = event.batch_operations[0].message()
        receiver = self._receiver
        if receiver is None or self._over:
            return
        if message is None:
            # The caller has sent its last message, or it has gone and `_on_closed` is on its way. To ask again is answered with
            # None at once, but behind it: by then we know which of the two it was.
            with self._lock:
                if not self._closed:
                    self._batch((cygrpc.ReceiveMessageOperation(0),), self._on_end)
            return
        self._run(receiver.on_message, message)
        with self._lock:
            if not self._over:
                self._held = self._full()
                if not self._held:
                    self._read()

    def _on_end(self, _event: Any) -> None:
        receiver = self._receiver
        if receiver is not None and not self._over:
            self._run(receiver.on_end)

    def _on_closed(self, event: Any) -> None:
        super()._on_closed(event)
        self._receiver = None  # it knows its call: leave no ring for the garbage collector


def _ok(trailing: Metadata, method: str) -> Any:
    """The operation that ends a call well."""
    if trailing:
        return _status(grpc.StatusCode.OK, "", trailing, method)
    return cygrpc.SendStatusFromServerOperation(None, 0, b"", 0)


def _status(status: grpc.StatusCode, text: str, trailing: Metadata, method: str) -> Any:
    """The operation that ends a call; INTERNAL if the trailing metadata cannot be sent, since the call must end all the same."""
    if trailing and (fault := metadata_fault(trailing)):
        logger.error("%s: %s", method, fault)
        status, text, trailing = grpc.StatusCode.INTERNAL, BAD_TRAILING, ()
    return cygrpc.SendStatusFromServerOperation(trailing or None, status.value[0], status_text(text), 0)


KINDS: dict[Kind, type[Call]] = {"unary": UnaryCall, "server_stream": StreamCall, "stream": OpenCall}
