"""The front on grpcio's own server, by its public API: for whoever trusts that more than ours, and to compare with.

grpc.aio runs in an event loop on a thread of its own, so a call that waits for the engine costs no thread (a thread pool would need
one for each). The price is the loop itself: four to six times the CPU per call, and a wake-up of the loop between a round's end and
the socket. Every method is carried as a stream, which is the same on the wire; only how many messages pass differs.
"""

import asyncio
import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import grpc
import grpc.aio

from server.rpc.front import (
    BAD_TRAILING,
    DEFAULTS,
    HANDLER_FAILED,
    NO_REQUEST,
    Besides,
    Metadata,
    Method,
    Options,
    Receiver,
    Tls,
    cannot_listen,
    certificate,
    channel_arguments,
    metadata_fault,
    no_such_method,
    status_text,
)

logger = logging.getLogger(__name__)

_FOREVER = 1e8  # seconds; grpc.aio takes no infinite grace

T = TypeVar("T")
if TYPE_CHECKING:  # at run time it takes no types
    Handler = grpc.RpcMethodHandler[bytes, bytes]
Context = grpc.aio.ServicerContext[bytes, bytes]


class _Call:
    """One call. Handlers write to it under `_lock`; the loop's coroutine `carry` is woken to send what they left."""

    def __init__(self, front: "PublicFront", name: str, kind: str, context: Context) -> None:
        self.method = name
        self.metadata: Metadata = tuple((key, value) for key, value in context.invocation_metadata() or ())
        remaining: float | None = context.time_remaining()
        self.deadline = None if remaining is None else time.monotonic() + remaining
        self._front = front
        self._kind = kind
        self.peer = context.peer()  # now: afterwards grpc.aio would ask a call it has freed
        self._context = context
        self._lock = threading.Lock()
        self._over = self._gone = False
        self._callbacks: list[Callable[[], None]] = []
        self._queue: deque[bytes] = deque()
        self._bytes = 0  # in `_queue`
        self._sending = False
        self._status: tuple[grpc.StatusCode, str, Metadata] | None = None
        self._ended: Receiver | None = None  # is to be told that the caller has sent its last message
        self._work = asyncio.Event()  # one of the three above wants something
        self._room = asyncio.Event()  # the queue is at most half full

    @property
    def peer_certificate(self) -> bytes | None:
        return certificate(self._context.auth_context())

    @property
    def waiting(self) -> int:
        return len(self._queue) + self._sending

    def reply(self, message: bytes, trailing: Metadata = ()) -> None:
        unary = self._kind == "unary"
        if trailing and not unary:
            raise TypeError(f"{self.method} is a stream: give trailing metadata to finish()")
        if not isinstance(message, bytes):
            raise TypeError(f"{self.method} replied with {type(message).__name__}; messages are bytes")
        with self._lock:
            if self._over:
                return
            self._queue.append(message)
            self._bytes += len(message)
            if unary:
                self._conclude(grpc.StatusCode.OK, "", trailing)
        self._wake()

    def finish(self, trailing: Metadata = ()) -> None:
        if self._kind == "unary":
            raise TypeError(f"{self.method} has one answer: end it with reply() or fail()")
        with self._lock:
            self._conclude(grpc.StatusCode.OK, "", trailing)
        self._wake()

    def fail(self, status: grpc.StatusCode, message: str, trailing: Metadata = ()) -> None:
        if status is grpc.StatusCode.OK:
            raise ValueError("a call that fails needs a status other than OK")
        with self._lock:
            self._conclude(status, message, trailing)
        self._wake()

    def _conclude(self, status: grpc.StatusCode, text: str, trailing: Metadata) -> None:
        if self._over:
            return
        if trailing and (fault := metadata_fault(trailing)):
            logger.error("%s: %s", self.method, fault)
            status, text, trailing = grpc.StatusCode.INTERNAL, BAD_TRAILING, ()
        self._over = True
        self._callbacks = []
        self._status = (status, status_text(text), trailing)

    def _wake(self) -> None:
        self._front.loop.call_soon_threadsafe(self._work.set)

    def on_gone(self, callback: Callable[[], None]) -> None:
        with self._lock:
            if not self._over:
                self._callbacks.append(callback)
                return
        if self._gone:
            callback()

    def run(self, handler: Callable[..., Any], *arguments: object) -> Any:
        """Run a piece of the handler, and answer for it if it raises."""
        try:
            return handler(*arguments)
        except BaseException:  # even SystemExit must not end the loop
            logger.exception("the handler of %s failed", self.method)
            self.fail(grpc.StatusCode.INTERNAL, HANDLER_FAILED)

    async def carry(self, method: Method) -> None:
        """Begin the call, then send what the handler gives until it has ended the call."""
        reader: asyncio.Task[None] | None = None
        try:
            if method.kind == "stream":
                receiver: Receiver | None = self.run(method.start, self)
                if receiver is not None:
                    reader = asyncio.create_task(self._read(receiver))
            else:
                request = await self._context.read()
                if isinstance(request, bytes):
                    self.run(method.start, self, request)
                else:
                    self.fail(grpc.StatusCode.UNIMPLEMENTED, NO_REQUEST)
            status, text, trailing = await self._send()
        finally:
            self._close()
            if reader is not None:
                reader.cancel()
        if status is grpc.StatusCode.OK:
            self._context.set_trailing_metadata(trailing)
        else:
            await self._context.abort(status, text, trailing)

    async def _read(self, receiver: Receiver) -> None:
        while not self._over:
            message = await self._context.read()
            if not isinstance(message, bytes):
                break
            if not self._over:
                self.run(receiver.on_message, message)
            while self._full():
                self._room.clear()
                await self._room.wait()
        # The caller has sent its last message, or it has gone. To ask again is answered behind the news of that, and `carry` learns
        # of a cancellation before anything else: if it hears that the messages have ended, they have.
        await self._context.read()
        self._ended = receiver
        self._work.set()

    async def _send(self) -> tuple[grpc.StatusCode, str, Metadata]:
        while True:
            await self._work.wait()
            self._work.clear()
            while self._queue or self._ended is not None:
                if self._ended is not None:
                    receiver, self._ended = self._ended, None
                    if not self._over:
                        self.run(receiver.on_end)
                    continue
                with self._lock:
                    message = self._queue.popleft()
                    self._bytes -= len(message)
                    self._sending = True
                await self._context.write(message)
                self._sending = False
                if not self._full(0.5):
                    self._room.set()
            if self._status is not None:
                return self._status

    def _full(self, share: float = 1.0) -> bool:
        options = self._front.options
        return len(self._queue) > share * options.backlog_messages or self._bytes > share * options.backlog_bytes

    def _close(self) -> None:
        with self._lock:
            callbacks, self._callbacks = self._callbacks, []
            self._gone = not self._over
            self._over = True
            self._queue.clear()
        for callback in callbacks if self._gone else ():
            self.run(callback)


class _Router(grpc.GenericRpcHandler):
    """Finds the method of each call."""

    def __init__(self, front: "PublicFront") -> None:
        self._front = front

    def service(self, details: grpc.HandlerCallDetails) -> "Handler":
        name = details.method

        async def carry(_requests: object, context: Context) -> None:
            await self._front.carry(name, context)

        return grpc.stream_stream_rpc_method_handler(cast(Any, carry))


@functools.cache
def _the_loop() -> asyncio.AbstractEventLoop:
    """The one event loop of all fronts of this process. It is never closed: grpc.aio hands late events to the loop in which a call
    ran, and events of other loops are lost if that is closed."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="seqserve-front", daemon=True).start()
    loop.call_soon_threadsafe(grpc.aio.init_grpc_aio)  # keep its own thread as well, from one front to the next
    return loop


class PublicFront:
    """See the module for what it costs and `front.Front` for what each method promises."""

    def __init__(self, methods: Mapping[str, Method], options: Options = DEFAULTS, besides: Besides | None = None) -> None:
        self.options = options
        self.loop = _the_loop()
        self._methods = dict(methods)
        self._calls: set[_Call] = set()
        self._idle = asyncio.Event()  # no calls
        self._idle.set()
        self._lock = threading.Lock()  # of the two stages below
        self._started = False
        self._draining: asyncio.Task[None] | None = None
        self._server = self._do(self._create())

    @property
    def live(self) -> int:
        return len(self._calls)

    def listen(self, address: str, tls: Tls | None = None) -> int:
        try:
            return self._do(self._listen(address, None if tls is None else tls.credentials()))
        except RuntimeError as fault:
            raise OSError(cannot_listen(address)) from fault

    def start(self) -> None:
        with self._lock:
            if self._started:
                raise RuntimeError("this front has been started before")
            self._started = True
            self._do(self._server.start())

    def drain(self) -> None:
        with self._lock:
            if self._draining is None:
                if not self._started:
                    self._started = True  # gRPC gives a bound port back only through the end of a server that runs
                    self._do(self._server.start())
                self._draining = self._do(self._drain())

    def stop(self, grace_s: float) -> None:
        self.drain()
        self._do(self._stop(grace_s))

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    async def _create(self) -> grpc.aio.Server:
        return grpc.aio.server(handlers=[_Router(self)], options=channel_arguments(self.options))

    async def _listen(self, address: str, credentials: grpc.ServerCredentials | None) -> int:
        if credentials is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, credentials)

    async def _drain(self) -> asyncio.Task[None]:
        stopping = asyncio.create_task(self._server.stop(_FOREVER))
        await asyncio.sleep(0)  # it has told gRPC by now
        return stopping

    async def _stop(self, grace_s: float) -> None:
        await self._server.stop(grace_s)
        await self._idle.wait()

    async def carry(self, name: str, context: Context) -> None:
        method = self._methods.get(name)
        if method is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, no_such_method(name, self._methods))
            return
        call = _Call(self, name, method.kind, context)
        self._calls.add(call)
        self._idle.clear()
        try:
            await call.carry(method)
        finally:
            self._calls.discard(call)
            if not self._calls:
                self._idle.set()
