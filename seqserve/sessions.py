"""The calls of sessions as values, like those of the tasks in `wire`, and what both twins of `Session` have in common.

Their turns are in `turns`.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from google.protobuf.message import DecodeError, Message

from protos import sessions_pb2 as pb
from seqserve import errors, results
from seqserve.turns import SERVICE, Line, metadata
from seqserve.wire import Call, count, model_named, parse, string

CLOSING = 5.0  # seconds that closing may take at most while an exception is on its way


def get(id: str) -> Call[results.SessionInfo]:
    return _named("Get", id, pb.SessionName(session=string("id", id)))


def close(id: str) -> Call[results.SessionInfo]:
    return _named("Close", id, pb.SessionName(session=string("id", id)))


def fork(id: str, new: str) -> Call[results.SessionInfo]:
    return _named("Fork", id, pb.ForkRequest(session=string("id", id), fork=string("fork", new)))


def export(id: str, move: bool) -> Call[bytes]:
    request = pb.ExportRequest(session=string("id", id), move=bool(move))
    return Call(SERVICE + "Export", request.SerializeToString(), bytes, metadata=metadata(id))


def bringing(exported: bytes, id: str) -> Wanted:
    """A session that `export` gave as bytes, to be opened from them. Raises InvalidInput for other bytes."""
    try:
        part = pb.Exported.FromString(exported)
    except (DecodeError, TypeError):
        raise errors.invalid("these are not the bytes of an exported session") from None
    name = string("id", id) or part.session
    return Wanted(name, _named("Import", name, pb.ImportRequest(exported=part, session=name)))


def listed(limit: int, after: str) -> Call[list[results.SessionInfo]]:
    request = pb.ListRequest(limit=count("limit", limit), after=string("after", after))
    return Call(SERVICE + "List", request.SerializeToString(), lambda raw: [info(i) for i in parse(pb.ListReply, raw).sessions])


def new_id(id: str) -> str:
    """`id`, or one made here where it is empty: so a call that makes a session can be sent twice."""
    return id or secrets.token_urlsafe(12)


def exists(failure: errors.Error) -> bool:
    return failure.reason == "SESSION_EXISTS"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A session to be: opened under an id that is given or was `made` here, or taken up again after turn `turn`."""

    id: str
    call: Call[results.SessionInfo]
    made: bool = False
    turn: int | None = None

    def line(self, info: results.SessionInfo) -> Line:
        """The session as the server has it. Raises SessionConflict where it can't go on after `turn`."""
        turn = info.turn if self.turn is None else self.turn
        if not info.acknowledged <= turn <= info.turn:
            why = "it was applied no further" if turn > info.turn else "later turns were acknowledged"
            message = f"session {self.id!r} can't go on after turn {turn}: {why}; go on after turn {info.turn}"
            raise errors.SessionConflict(
                message, status="FAILED_PRECONDITION", reason="WRONG_TURN", details={"session": self.id, "turn": str(info.turn)}
            )
        return Line(self.id, info.model, info.version, turn)


def opening(model: str, version: str, id: str, ttl: float) -> Wanted:
    name = new_id(string("id", id))
    try:
        request = pb.OpenRequest(session=name, model=model_named(model, version), ttl=ttl)
    except TypeError:
        raise errors.invalid(f"ttl must be seconds, not {ttl!r}") from None
    return Wanted(name, _named("Open", name, request), made=not id)


def resuming(id: str, turn: int | None) -> Wanted:
    if turn is not None:
        count("turn", turn)
    return Wanted(id, get(id), turn=turn)


class Handle:
    """What both twins of a session know without asking."""

    def __init__(self, wanted: Wanted, close: bool, timeout: float | None) -> None:
        self._wanted = wanted
        self._timeout = timeout  # of its calls; None: the client's
        self._line: Line | None = None  # None: not opened yet
        self._close = close
        self._closed = False

    @property
    def id(self) -> str:
        return self._wanted.id

    @property
    def turn(self) -> int:
        """The last turn that was answered."""
        return self._line.turn if self._line is not None else self._wanted.turn or 0

    @property
    def unanswered(self) -> int:
        """Turns that were sent and have no final answer: they are sent again before any other."""
        return len(self._line) if self._line is not None else 0

    @property
    def model(self) -> str:
        """The model's name; empty until the session is open."""
        return self._line.model if self._line is not None else ""

    @property
    def version(self) -> str:
        return self._line.version if self._line is not None else ""

    def detach(self) -> None:
        """Leaving the `with` block will not close the session: it lives on for its ttl, and can be resumed by its id."""
        self._close = False

    def __repr__(self) -> str:
        return f"<Session {self.id}{f' of {self.model}' if self.model else ''}, turn {self.turn}>"

    def _within(self, timeout: float | None) -> float | None:
        return self._timeout if timeout is None else timeout

    def _check_open(self) -> None:
        if self._closed:
            raise errors.SessionGone(
                f"session {self.id!r} was closed after turn {self.turn}; open a new one",
                status="FAILED_PRECONDITION",
                reason="SESSION_CLOSED",
                details={"session": self.id, "turn": str(self.turn)},
            )


def over(failure: errors.Error) -> bool:
    """Whether closing a session failed because there is nothing left to close."""
    return isinstance(failure, (errors.SessionGone, errors.SessionNotFound))


def _named(method: str, id: str, request: Message) -> Call[results.SessionInfo]:
    return Call(SERVICE + method, request.SerializeToString(), lambda raw: info(parse(pb.SessionInfo, raw)), metadata=metadata(id))


def info(sent: pb.SessionInfo) -> results.SessionInfo:
    model = sent.model
    return results.SessionInfo(sent.session, model.name, model.version, sent.turn, sent.acknowledged, sent.ttl, sent.fingerprint)
