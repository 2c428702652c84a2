"""Everything that can be refused or go wrong, and what the caller should do.

    ServeError
    ├── InvalidInput     INVALID_ARGUMENT     correct the request; the message says what is allowed
    ├── NotFound         NOT_FOUND            use one of the names in the message
    ├── Unsupported      UNIMPLEMENTED        do without: this server, or as it was started, has no such thing
    ├── Exists           ALREADY_EXISTS       the name is taken: use another, or free it first
    ├── Gone             FAILED_PRECONDITION  the session has ended, the reason says why; open a new one
    ├── Conflict         FAILED_PRECONDITION  not the turn that comes next; go on from the last applied turn, in the facts
    ├── Unauthenticated  UNAUTHENTICATED      show a key of this server (keys.py)
    ├── Denied           PERMISSION_DENIED    not with this key: ask an operator
    ├── Overloaded       RESOURCE_EXHAUSTED   send again after `retry_after`
    ├── DeadlineExceeded DEADLINE_EXCEEDED    allow more time; nothing was changed
    ├── StoreFailed      UNAVAILABLE          the session's store did not write; nothing was applied, send the turn again (store.py)
    ├── Draining         UNAVAILABLE          send again: another server, or this one restarted, will take it
    ├── DeviceLost       UNAVAILABLE          likewise: the device is out of order, and the server ends for that
    └── ModelFailed      INTERNAL             the model could not run this input; neighbours were not harmed

This file knows words and statuses; it must not know gRPC's types (rpc/ turns these into google.rpc.Status details).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar


class ServeError(Exception):
    """A refusal that a caller can act on: `reason` for programs, the message for people, `facts` for both."""

    status: ClassVar[str] = "INTERNAL"

    def __init__(self, reason: str, message: str, *, retry_after: float | None = None, **facts: object) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.retry_after = retry_after
        self.facts = {key: str(value) for key, value in facts.items()}


class InvalidInput(ServeError):
    status = "INVALID_ARGUMENT"


class NotFound(ServeError):
    status = "NOT_FOUND"


class Unsupported(ServeError):
    status = "UNIMPLEMENTED"


class Exists(ServeError):
    status = "ALREADY_EXISTS"


class Gone(ServeError):
    status = "FAILED_PRECONDITION"


class Conflict(ServeError):
    status = "FAILED_PRECONDITION"


class Unauthenticated(ServeError):
    status = "UNAUTHENTICATED"


class Denied(ServeError):
    status = "PERMISSION_DENIED"


class Overloaded(ServeError):
    status = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(ServeError):
    status = "DEADLINE_EXCEEDED"


class Draining(ServeError):
    status = "UNAVAILABLE"


class DeviceLost(ServeError):
    status = "UNAVAILABLE"


class ModelFailed(ServeError):
    status = "INTERNAL"


def listed(names: Iterable[object], most: int = 20) -> str:
    """Names for a message: "a, b, c", the rest counted."""
    spelled = [str(n) for n in names]
    more = len(spelled) - most
    return ", ".join(spelled[:most]) + (f" and {more} more" if more > 0 else "") if spelled else "none"
