"""What goes wrong, as HTTP tells it: the server's typed errors and this process's own, as statuses and JSON.

Bodies are application/problem+json (RFC 9457) with the server's `reason`, `facts` and gRPC status beside the standard's own
members. Under /v2 there is also `error`, the Open Inference Protocol's only one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.requests import HTTPConnection
from starlette.responses import Response

from seqserve import errors

MEDIA = "application/problem+json"
BUSY = 1.0  # seconds to wait before another try, where nobody says

_STATUS: Mapping[str, int] = {
    "INVALID_ARGUMENT": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "FAILED_PRECONDITION": 409,  # SessionGone: 410
    "RESOURCE_EXHAUSTED": 429,  # TooLarge: 413
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "CANCELLED": 503,  # not by its caller, who would not read this: by a server that stopped, or a proxy before it
    "DEADLINE_EXCEEDED": 504,
}


class ProblemBody(Struct, omit_defaults=True):
    """What went wrong, for programs (`reason`, `facts`) and for people (`detail`)."""

    title: str
    status: Annotated[int, Meta(ge=400, le=599)]
    detail: str
    reason: Annotated[str, Meta(description="The server's word for what happened, such as QUEUE_FULL; lasting.")]
    grpc_status: Annotated[str, Meta(description="The gRPC status behind it, where the server spoke.")] = ""
    facts: Annotated[dict[str, str], Meta(description="What was expected, what came, the last turn applied.")] = {}
    retry_after: Annotated[float, Meta(description="Seconds after which the same request may succeed.")] | UnsetType = UNSET
    error: Annotated[str, Meta(description="Under /v2 only: `detail`, as the Open Inference Protocol has it.")] | UnsetType = UNSET


class Problem(Exception):
    """A request that is refused by this process, before or after the server was asked."""

    def __init__(
        self,
        status: int,
        reason: str,
        detail: str,
        *,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
        grpc_status: str = "",
        facts: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.reason, self.detail = status, reason, detail
        self.retry_after, self.headers = retry_after, dict(headers or {})
        self.grpc_status, self.facts = grpc_status, dict(facts or {})

    def body(self, protocol: bool = False) -> bytes:
        """`protocol`: as the Open Inference Protocol's clients read it."""
        title = HTTPStatus(self.status).phrase
        made = ProblemBody(title, self.status, self.detail, self.reason, self.grpc_status, self.facts)
        if self.retry_after is not None:
            made.retry_after = self.retry_after
        if protocol:
            made.error = self.detail
        return msgspec.json.encode(made)

    def response(self, protocol: bool = False) -> Response:
        headers = dict(self.headers)
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))  # whole seconds is all that HTTP has
        if self.status == 401:
            headers.setdefault("www-authenticate", "Bearer")
        return Response(self.body(protocol), self.status, headers, "application/json" if protocol else MEDIA)


def told(error: errors.Error) -> Problem:
    """An error of the server, or of the way to it."""
    status = _STATUS.get(error.status, 500)
    wait = error.retry_after
    match error:
        case errors.TooLarge():
            status = 413
        case errors.SessionGone():
            status = 410
        case errors.ServerError() if error.reason == errors.BAD_REPLY:
            status = 502
    if status == 503 and wait is None:
        wait = BUSY
    return Problem(status, error.reason or error.status, error.message, retry_after=wait, grpc_status=error.status, facts=error.details)


def bad(reason: str, detail: str) -> Problem:
    return Problem(400, reason, detail)


def of_protocol(connection: HTTPConnection) -> bool:
    """Whether a request is one of the Open Inference Protocol, whose errors have their own form."""
    path: str = connection.scope["path"]
    return path == "/v2" or path.startswith("/v2/")


def raw(problem: Problem) -> bytes:
    """A whole HTTP/1.1 response, for those that never became a request. The connection is closed after it."""
    body = problem.body()
    head = f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}\r\ncontent-type: {MEDIA}\r\ncontent-length: {len(body)}\r\n"
    if problem.retry_after is not None:
        head += f"retry-after: {max(1, math.ceil(problem.retry_after))}\r\n"
    return head.encode("ascii") + b"connection: close\r\n\r\n" + body


def unexpected() -> Problem:
    return Problem(500, "INTERNAL", "the web process failed while it handled this request; its log has the reason")
