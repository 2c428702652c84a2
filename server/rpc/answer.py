"""What every handler needs, once for all: parsing, typed errors, deadlines, cancellation, metrics and the access log.

A handler is given a request and an Answer; it answers once, from any thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Protocol, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from server import logs
from server.errors import InvalidInput, ModelFailed, ServeError
from server.metrics import Metrics
from server.rpc.front import Call, Metadata, Method, Receiver, server_stream, stream, unary
from server.shares import DEFAULT, Claim

if TYPE_CHECKING:
    from server.quotas import Caller

log = logging.getLogger(__name__)

DOMAIN = "seqserve"
M = TypeVar("M", bound=Message)


class Cancel(Protocol):
    """What frees a caller's rows: Engine.cancel of its sequences."""

    def __call__(self) -> None: ...


class Answer:
    """The one answer to a call, whatever it turns out to be."""

    __slots__ = ("_desk", "_ended", "_method", "_since", "about", "call")

    about: Message  # the request; set only where calls are logged

    caller: Caller | None = None
    """Whose key came with the call; None where this server asks for none."""

    def __init__(self, desk: Desk, call: Call, method: str) -> None:
        self.call = call
        self._desk = desk
        self._method = method
        self._since = time.monotonic()
        self._ended = False

    @property
    def deadline(self) -> float | None:
        return self.call.deadline

    @property
    def flow(self) -> Hashable:
        return self.call.peer if self.caller is None else self.caller.tenant

    def claim(self, lasting: bool = False) -> Claim:
        """What a request of this call may claim, that says nothing of it itself; a `lasting` one is run however long it takes."""
        caller = self.caller
        return Claim(None if lasting else self.call.deadline, DEFAULT if caller is None else caller.tenant.level(DEFAULT), self.flow)

    def asked(self, request: Message) -> None:
        """What was asked, for the log of calls."""
        if self._desk.access_log:
            self.about = request

    def send(self, message: Message) -> None:
        """Unary: the answer. Streams: one message more."""
        self.call.reply(message.SerializeToString())

    def done(self, message: Message | None = None) -> None:
        """The call ends well: a unary call with its message, a stream after its last."""
        if message is not None:
            self.call.reply(message.SerializeToString())
        else:
            self.call.finish()
        self._end("OK")

    def done_bytes(self, message: bytes) -> None:
        """A unary call ends well with a message that is serialised already."""
        self.call.reply(message)
        self._end("OK")

    def fail(self, error: Exception) -> None:
        """The call ends with an error; what is no ServeError is a bug of ours, logged and told as INTERNAL."""
        if not isinstance(error, ServeError):
            log.exception("%s failed", self._method, exc_info=error)
            error = ModelFailed("INTERNAL", "the server failed while it handled this call; its log has the reason")
        self._desk.metrics.refused(error.reason)
        error = brief(error)
        self.call.fail(grpc.StatusCode[error.status], error.message, details(error))
        self._end(error.status)

    def cancel_by(self, cancel: Cancel) -> None:
        """What to do when the caller leaves before it is answered."""

        def gone() -> None:
            cancel()
            self._end("CANCELLED")

        self.call.on_gone(gone)

    def _end(self, code: str) -> None:
        if self._ended:
            return
        self._ended = True
        seconds = time.monotonic() - self._since
        self._desk.metrics.call(self._method, code, seconds)
        if self._desk.access_log:
            logs.ended(self._method, self.call, self.caller, getattr(self, "about", None), code, seconds)


class Asked(Protocol):
    """What a handler needs of whoever asks: a call's Answer, or one request of a stream."""

    @property
    def deadline(self) -> float | None: ...

    @property
    def caller(self) -> Caller | None: ...

    @property
    def flow(self) -> Hashable:
        """Whose share of the server its work is charged to: the tenant's, without keys the connection's."""

    def asked(self, request: Message) -> None: ...

    def done(self, message: Message) -> None: ...

    def done_bytes(self, message: bytes) -> None: ...

    def fail(self, error: Exception) -> None: ...

    def cancel_by(self, cancel: Cancel) -> None: ...


class Gate(Protocol):
    """Who may call."""

    def admit(self, desk: Desk, call: Call, operator: bool, stream: bool) -> Answer:
        """The answer to a call that may go on. Raises ServeError."""


class _Refused(Receiver):
    """An open stream that was not let in."""

    def on_message(self, message: bytes) -> None:
        return

    def on_end(self) -> None:
        return


class Desk:
    """Turns typed handlers into what a front carries. `operator`: only for operators, where there is a gate."""

    def __init__(self, metrics: Metrics, access_log: bool, gate: Gate | None = None) -> None:
        self.metrics = metrics
        self.access_log = access_log
        self._gate = gate

    @property
    def anyone(self) -> Desk:
        """The same for whoever comes, without a key."""
        return Desk(self.metrics, self.access_log)

    def unary(self, request: type[M], handle: Callable[[M, Answer], None], operator: bool = False) -> Method:
        return unary(self._start(request, handle, operator, False))

    def raw(self, handle: Callable[[bytes, Answer], None]) -> Method:
        """A unary method whose handler parses for itself."""
        gate = self._gate

        def start(call: Call, data: bytes) -> None:
            try:
                answer = Answer(self, call, call.method) if gate is None else gate.admit(self, call, False, False)
            except ServeError as e:
                Answer(self, call, call.method).fail(e)
                return
            try:
                handle(data, answer)
            except Exception as e:  # one caller's fault must not reach another's call
                answer.fail(e)

        return unary(start)

    def server_stream(self, request: type[M], handle: Callable[[M, Answer], None], operator: bool = False) -> Method:
        return server_stream(self._start(request, handle, operator, True))

    def stream(self, begin: Callable[[Call, Answer], Receiver]) -> Method:
        """`begin` gives what takes the messages of a call, and is to end it through its answer."""
        gate = self._gate
        if gate is None:
            return stream(lambda call: begin(call, Answer(self, call, call.method)))

        def start(call: Call) -> Receiver:
            try:
                answer = gate.admit(self, call, False, True)
            except ServeError as e:
                Answer(self, call, call.method).fail(e)
                return _Refused()
            try:
                return begin(call, answer)
            except Exception as e:
                answer.fail(e)
                return _Refused()

        return stream(start)

    def _start(self, request: type[M], handle: Callable[[M, Answer], None], operator: bool, streams: bool) -> Callable[[Call, bytes], None]:
        gate = self._gate
        if gate is not None:

            def start_known(call: Call, data: bytes) -> None:
                try:
                    answer = gate.admit(self, call, operator, streams)  # before a byte of the message is looked at
                except ServeError as e:
                    Answer(self, call, call.method).fail(e)
                    return
                try:
                    try:
                        message = request.FromString(data)
                    except DecodeError:
                        raise malformed(request) from None
                    if self.access_log:
                        answer.about = message
                    handle(message, answer)
                except Exception as e:
                    answer.fail(e)

            return start_known

        def start(call: Call, data: bytes) -> None:
            answer = Answer(self, call, call.method)
            try:
                try:
                    message = request.FromString(data)
                except DecodeError:
                    raise malformed(request) from None
                if self.access_log:
                    answer.about = message
                handle(message, answer)
            except Exception as e:  # one caller's fault must not reach another's call
                answer.fail(e)

        return start


def malformed(request: type[Message]) -> InvalidInput:
    name = request.DESCRIPTOR.full_name
    return InvalidInput("NOT_PROTOBUF", f"the message is not a valid {name}: text must be UTF-8, fields as in its .proto")


MESSAGE = 4_700  # bytes that a message may take of a caller's limit for headers: once percent-encoded, once in base64
CUT = 1_000  # bytes of UTF-8 of a message that takes more; whatever is in it, it fits then
FACTS = 1_200  # bytes of UTF-8 of all facts
_ASIS = bytes(c for c in range(0x20, 0x7F) if c != 0x25)  # what is not percent-encoded


def brief(error: ServeError) -> ServeError:
    """The error as it can be told. Messages and facts repeat what callers named, which may be of any length; but a client that gets
    trailers of more than 8 KiB drops them, and with them what went wrong."""
    said = _utf8(error.message)
    long = len(said) * 7 // 3 + 2 * len(said.translate(None, _ASIS)) > MESSAGE
    facts = error.facts
    much = sum(len(_utf8(value)) for value in facts.values()) > FACTS
    if not (long or much):
        return error
    message = _shortened(said, CUT) if long else error.message
    if much:
        facts = {key: _shortened(_utf8(value), FACTS // len(facts)) for key, value in facts.items()}
    return type(error)(error.reason, message, retry_after=error.retry_after, **facts)


def _shortened(said: bytes, most: int) -> str:
    """At most so many bytes: how it begins and, since a message says there what to do, how it ends."""
    if len(said) <= most:
        return said.decode()
    end = most // 3
    return f"{said[: most - end - 3].decode('utf-8', 'ignore')}…{said[-end:].decode('utf-8', 'ignore')}"


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def details(error: ServeError) -> Metadata:
    """The error as google.rpc.Status in trailing metadata, where gRPC libraries look for it."""
    status = Status(code=grpc.StatusCode[error.status].value[0], message=error.message)
    info = AnyMessage()
    info.Pack(ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.facts))
    status.details.append(info)
    if error.retry_after is not None:
        retry = AnyMessage()
        duration = Duration()
        duration.FromNanoseconds(int(error.retry_after * 1e9))
        retry.Pack(RetryInfo(retry_delay=duration))
        status.details.append(retry)
    return (("grpc-status-details-bin", status.SerializeToString()),)
