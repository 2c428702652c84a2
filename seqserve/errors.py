"""What can go wrong, as one tree, and how a gRPC status becomes a place in it.

    Error                     everything this package raises on purpose
    ├── InvalidInput          the request can't be served as it is; also a ValueError
    │   └── TooLarge          more than the server, or this client, takes at once
    ├── NotFound              no such model, version or method; the message names what exists
    │   └── SessionNotFound   no such session: it never was, or the server has forgotten it
    ├── FailedPrecondition    fine by itself, but not in the state the server is in
    │   ├── SessionGone       the session has ended; `reason` says how
    │   └── SessionConflict   not the turn, or the session, that comes next: does someone else write to it?
    ├── Denied                no credentials, or not enough
    ├── Cancelled             somebody ended the call: this side, the server, or a proxy
    ├── DeadlineExceeded      no answer within the timeout; also a TimeoutError
    ├── Overloaded            the queue is full: try again after `retry_after` seconds
    ├── Unavailable           no server there, or it is starting or draining
    └── ServerError           the server's own fault, or a reply that makes no sense

This file must not know channels or messages of the API: only statuses and the google.rpc details that come with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

DETAILS_KEY = "grpc-status-details-bin"
BAD_REPLY = "BAD_REPLY"


class Error(Exception):
    """A call that failed.

    `status` is the name of the gRPC status, `reason` the server's own word for what happened ("" where it gave none),
    `details` what it said beside it (what was expected and what came, for instance), `retry_after` the seconds after
    which the same call may succeed, None where the server promises nothing.
    """

    def __init__(
        self,
        message: str,
        *,
        status: str = "UNKNOWN",
        reason: str = "",
        details: Mapping[str, str] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.reason = reason
        self.details = dict(details or {})
        self.retry_after = retry_after

    @property
    def turn(self) -> int | None:
        """The last turn applied to the session that this is about; None where the server named none."""
        turn = self.details.get("turn", "")
        return int(turn) if turn.isdecimal() else None

    def __str__(self) -> str:  # TimeoutError, a base below, would print it as an errno
        return self.message


class InvalidInput(Error, ValueError): ...


class TooLarge(InvalidInput): ...


class NotFound(Error): ...


class SessionNotFound(NotFound): ...


class FailedPrecondition(Error): ...


class SessionGone(FailedPrecondition): ...


class SessionConflict(FailedPrecondition): ...


class Denied(Error): ...


class Cancelled(Error): ...


class DeadlineExceeded(Error, TimeoutError): ...


class Overloaded(Error): ...


class Unavailable(Error): ...


class ServerError(Error): ...


_BY_STATUS: Mapping[grpc.StatusCode, type[Error]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
    grpc.StatusCode.OUT_OF_RANGE: InvalidInput,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNIMPLEMENTED: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ALREADY_EXISTS: FailedPrecondition,
    grpc.StatusCode.ABORTED: FailedPrecondition,
    grpc.StatusCode.UNAUTHENTICATED: Denied,
    grpc.StatusCode.PERMISSION_DENIED: Denied,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}
_BY_REASON: Mapping[tuple[grpc.StatusCode, str], type[Error]] = {
    (grpc.StatusCode.NOT_FOUND, "UNKNOWN_SESSION"): SessionNotFound,
    **{
        (grpc.StatusCode.FAILED_PRECONDITION, f"SESSION_{how}"): SessionGone
        for how in ("CLOSED", "EXPIRED", "EVICTED", "MOVED", "UNLOADED")
    },
    **{
        (grpc.StatusCode.FAILED_PRECONDITION, reason): SessionGone  # it survived, and can't go on
        for reason in (
            "MODEL_GONE",
            "FINGERPRINT_MISMATCH",
            "STATE_MISMATCH",
            "RECORD_FOREIGN",
            "RECORD_OTHER_FORMAT",
            "RECORD_SHORT",
            "RECORD_DAMAGED",
        )
    },
    **{
        (grpc.StatusCode.FAILED_PRECONDITION, reason): SessionConflict
        for reason in ("GAP", "OTHER_INPUT", "ACKNOWLEDGED", "ACKNOWLEDGED_AHEAD", "SESSION_EXISTS")
    },
}
_CODES: Mapping[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def invalid(message: str) -> InvalidInput:
    """A fault seen on this side, before anything was sent."""
    return InvalidInput(message, status="INVALID_ARGUMENT")


def bad_reply(message: str) -> ServerError:
    """An answer that came through whole but can't be read."""
    return ServerError(f"the server's reply makes no sense: {message}", status="INTERNAL", reason=BAD_REPLY)


def from_rpc(error: grpc.RpcError) -> Error:
    """The error for a call that gRPC raised for, blocking or asyncio."""
    trailing: Any = error.trailing_metadata()  # the stubs know of no pairs here, the two clients give nothing else
    return from_status(error.code(), error.details() or "", trailing or ())


def from_status(code: grpc.StatusCode, message: str, trailing: Iterable[tuple[str, str | bytes]]) -> Error:
    """The error for a call's status and trailing metadata.

    RESOURCE_EXHAUSTED is Overloaded where the server says when to come back, else TooLarge: gRPC itself gives that
    status to a message over the size limit. Details that can't be read are left out: the status stands without them.
    """
    reason, retry_after = "", None
    details: Mapping[str, str] = {}
    for value in (value for key, value in trailing if key == DETAILS_KEY and isinstance(value, bytes)):
        try:
            status = status_pb2.Status.FromString(value)
            message = status.message or message
            for packed in status.details:
                info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
                if packed.Unpack(info):
                    reason, details = info.reason, dict(info.metadata)
                elif packed.Unpack(retry):
                    retry_after = retry.retry_delay.ToNanoseconds() / 1e9
        except DecodeError:
            continue
    return _made(code, message, reason, details, retry_after)


def from_refusal(code: int, message: str, reason: str, details: Mapping[str, str], retry_after: float | None) -> Error:
    """The error for a refusal that came as a message of a stream: the stream itself lives on."""
    return _made(_CODES.get(code, grpc.StatusCode.UNKNOWN), message, reason, details, retry_after)


def _made(code: grpc.StatusCode, message: str, reason: str, details: Mapping[str, str], retry_after: float | None) -> Error:
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        kind: type[Error] = TooLarge if retry_after is None else Overloaded
    else:
        kind = _BY_REASON.get((code, reason)) or _BY_STATUS.get(code, ServerError)
    return kind(message or code.name, status=code.name, reason=reason, details=details, retry_after=retry_after)
