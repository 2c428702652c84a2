"""The front that drives gRPC's completion queue itself: it polls. How calls pass is queue_calls.py.

One thread polls the queue and runs handlers; replies start from whatever thread gives them, so between a round's end and the socket
no thread is woken. (A second polling thread makes a call 13 % dearer, not cheaper: the two fight for the interpreter's lock.)

    request_call -> _on_arrived    a slot was filled: post it again, then begin the call

When nothing more has arrived, or a round's rows have, the thread does what there is to do besides: brief rounds. Only then it sleeps.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, cast

import grpc

from server.rpc.front import (
    DEFAULTS,
    Besides,
    Method,
    Options,
    Tls,
    cannot_listen,
    channel_arguments,
    no_such_method,
)
from server.rpc.queue_calls import KINDS, Call, UnaryCall, cygrpc

logger = logging.getLogger(__name__)


TESTED = ((1, 81), (1, 85))  # first and last minor version of grpcio under which tests/test_front.py was run
_NEEDED = {
    "BatchOperationEvent": ("batch_operations",),
    "Call": ("start_server_batch", "cancel", "peer"),
    "CallDetails": ("method", "deadline"),
    "CompletionQueue": ("poll", "shutdown"),
    "CompletionType": ("queue_shutdown", "queue_timeout"),
    "ReceiveCloseOnServerOperation": ("__init__",),
    "ReceiveMessageOperation": ("message",),
    "RequestCallEvent": ("success", "call", "call_details", "invocation_metadata"),
    "SendInitialMetadataOperation": ("__init__",),
    "SendMessageOperation": ("__init__",),
    "SendStatusFromServerOperation": ("__init__",),
    "Server": ("register_completion_queue", "add_http2_port", "start", "request_call", "shutdown", "cancel_all_calls", "destroy"),
    "WriteFlag": ("buffer_hint",),
}
EVENTS = 512  # most events handled before the work besides has its turn, however many more there are
LOOKS = 2  # that find nothing: the first may have read from the socket what the next one finds
YOUNG_S = 0.002  # age at which a unary call that is not yet answered is worth an event more, to hear of its caller's leaving


def unusable() -> str | None:
    """Why this front cannot be trusted with the grpcio that is installed; None if it can."""
    version = tuple(int(part) for part in grpc.__version__.split(".")[:2])
    if not TESTED[0] <= version <= TESTED[1]:
        first, last = (".".join(map(str, bound)) for bound in TESTED)
        return f"grpcio {grpc.__version__} is outside the tested range {first} to {last}"
    for name, members in _NEEDED.items():
        for member in members:
            if not hasattr(getattr(cygrpc, name, None), member) or not hasattr(cygrpc, name):
                return f"grpcio {grpc.__version__} has no cygrpc.{name}.{member}"
    return None


def _nobody(call: object, message: bytes) -> None:
    """The handler of methods that do not exist; never reached."""


class QueueFront:
    """A front of one polling thread; see the module for how calls pass and `front.Front` for what each method promises."""

    def __init__(self, methods: Mapping[str, Method], options: Options = DEFAULTS, besides: Besides | None = None) -> None:
        self.options = options
        self._besides = besides
        self._methods = dict(methods)
        self._table = {name.encode(): (KINDS[method.kind], name, method.start) for name, method in methods.items()}
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server(channel_arguments(options), False)
        self._server.register_completion_queue(self._queue)
        self._thread = threading.Thread(target=self._poll, name="seqserve-front", daemon=True)
        self._calls: set[Call] = set()
        self.young: deque[UnaryCall] = deque()  # whose end is not asked for yet, the oldest first; some are over
        self._lock = threading.Lock()  # of the three stages below
        self._started = self._draining = False
        self._down = False  # gRPC has closed every connection

    @property
    def live(self) -> int:
        return len(self._calls)

    def listen(self, address: str, tls: Tls | None = None) -> int:
        secret = () if tls is None else (cast(Any, tls.credentials())._credentials,)
        port: int = self._server.add_http2_port(address.encode(), *secret)
        if not port:
            raise OSError(cannot_listen(address))
        return port

    def start(self) -> None:
        with self._lock:
            self._begin(self.options.slots)

    def _begin(self, slots: int) -> None:
        if self._started:
            raise RuntimeError("this front has been started before")
        self._started = True
        self._server.start()
        for _ in range(slots):
            self._server.request_call(self._queue, self._queue, self._on_arrived)
        self._thread.start()

    def drain(self) -> None:
        with self._lock:
            if self._draining:
                return
            if not self._started:
                self._begin(0)  # gRPC gives a bound port back only through the shutdown of a server that runs
            self._draining = True
            self._server.shutdown(self._queue, self._on_down)
        for call in list(self._calls):
            if isinstance(call, UnaryCall):
                call.grow_up()

    def stop(self, grace_s: float) -> None:
        self.drain()
        self._thread.join(grace_s)
        if self._thread.is_alive():
            self._server.cancel_all_calls()
            self._thread.join()
        self._server.destroy()

    def _poll(self) -> None:
        """The one loop: every event's tag is the method to call with it. Between events, what there is to do besides."""
        besides = self._besides
        poll = self._queue.poll
        timeout = cygrpc.CompletionType.queue_timeout
        events = 0  # since the work besides had its turn
        looked = 0  # times in a row that no event was there
        working = False  # there may be more of it: look for events, but do not sleep
        while True:
            try:
                if working:
                    event = poll(0)
                elif self.young:
                    event = poll(time.time() + YOUNG_S)
                else:
                    event = poll()
                if event.completion_type == timeout:
                    looked += 1
                    if not working or looked >= LOOKS:
                        events = looked = 0
                        working = besides is not None and besides.brief()
                        if self.young:
                            self._grow_up()
                    continue
                looked = 0
                events += 1
                if events > EVENTS or (besides is not None and besides.enough):
                    events = 0
                    working = besides is not None and besides.brief()
                    self._grow_up()
                if besides is not None and not working:
                    besides.attend()
                    working = True
                if event.tag is not None:
                    event.tag(event)
                elif event.completion_type == cygrpc.CompletionType.queue_shutdown:
                    return
            except BaseException:
                logger.exception("an event of gRPC's completion queue could not be handled")
            event = None  # or it would keep its call alive until the next event

    def _grow_up(self) -> None:
        """Unary calls that are not answered soon are watched."""
        young = self.young
        before = time.monotonic() - YOUNG_S
        while young and (young[0]._over or young[0].born <= before or self._draining):
            young.popleft().grow_up()

    def _on_arrived(self, arrival: Any) -> None:
        if not arrival.success:  # the server is shutting down and gives its empty slots back
            return
        if not self._draining:
            with contextlib.suppress(ValueError):  # draining since a moment ago
                self._server.request_call(self._queue, self._queue, self._on_arrived)
        entry = self._table.get(arrival.call_details.method)
        if entry is None:
            name = arrival.call_details.method.decode("utf-8", "replace")
            call: Call = UnaryCall(self, name, _nobody, arrival)
            self._calls.add(call)
            call.fail(grpc.StatusCode.UNIMPLEMENTED, no_such_method(name, self._methods))
        else:
            kind, name, start = entry
            call = kind(self, name, start, arrival)
            self._calls.add(call)
            call.begin()

    def forget(self, call: Call) -> None:
        self._calls.discard(call)
        self._end_if_down()

    def _on_down(self, _event: Any) -> None:
        self._down = True
        self._end_if_down()

    def _end_if_down(self) -> None:
        if self._down and not self._calls:
            self._queue.shutdown()
