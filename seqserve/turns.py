"""Sessions and their turns as values: the calls, and what this side keeps of a session so that a turn is never applied twice.

Both twins of `Session` are made of this. Pure: it knows messages, but no channel, clock, thread or event loop.

The client numbers the turns. A turn without a final answer is kept, and comes again with the same number and the same
bytes before any other; so the server can tell a turn that it has applied already, and answers it without applying it
again. It is final where the server decided: an answer, or a refusal that another try would meet again.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from protos import sessions_pb2 as pb
from seqserve import errors, results, tensors
from seqserve.wire import Call, classification, count, forecasted, model_named, numbers, parse, series, string

Answer = results.Classification | results.Forecast | results.Tensors
Observations = NDArray[Any] | float | Sequence[float] | Sequence[Sequence[float]] | Sequence[NDArray[Any]]
Inputs = Mapping[str, Any]  # tensors by name
Piece = str | Inputs | Observations

SERVICE = "/seqserve.v1.Sessions/"
STREAM = SERVICE + "Turns"
METADATA = "seqserve-session"  # proxies route by it
WINDOW = 32  # turns sent ahead: enough to fill the rounds of one session, few to send again after a broken connection
MOST = 1024  # what a server keeps unacknowledged
CLOSING = 5.0  # seconds that closing may take while an exception is on its way


# Calls


def metadata(id: str) -> tuple[tuple[str, str], ...]:
    """What goes along with each call of a session; nothing where the id can't travel as a header."""
    return ((METADATA, id),) if id and id.isascii() and id.isprintable() and id == id.strip() else ()


def get(id: str) -> Call[results.SessionInfo]:
    return _named("Get", id, pb.SessionName(session=string("id", id)))


def close(id: str) -> Call[results.SessionInfo]:
    return _named("Close", id, pb.SessionName(session=string("id", id)))


def fork(id: str, new: str) -> Call[results.SessionInfo]:
    return _named("Fork", id, pb.ForkRequest(session=string("id", id), fork=string("fork", new)))


def listed(limit: int, after: str) -> Call[list[results.SessionInfo]]:
    request = pb.ListRequest(limit=count("limit", limit), after=string("after", after))
    return Call(SERVICE + "List", request.SerializeToString(), lambda raw: [_info(i) for i in parse(pb.ListReply, raw).sessions])


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


# Turns


def encode(piece: Piece) -> bytes:
    """What a turn brings, as the bytes of a TurnRequest without its number. Raises InvalidInput."""
    match piece:
        case str():
            request = pb.TurnRequest(text=string("the piece of text", piece))
        case Mapping():
            request = pb.TurnRequest(tensors=pb.Tensors())
            for name, values in piece.items():
                datatype, shape, raw = tensors.pack(name, values)
                request.tensors.tensors.add(name=string("input name", name), datatype=datatype, shape=shape, data=raw)
        case _:
            try:
                values = numbers("observations", piece)
            except errors.InvalidInput as e:
                raise errors.invalid(f"a turn brings text, observations or a dict of tensors: {e}") from None
            # One observation is a number per channel: a flat list is one step here, where `forecast` takes it for one channel.
            step = values.reshape(1, -1) if values.ndim < 2 else values
            request = pb.TurnRequest(observations=series("observations", step))
    return request.SerializeToString(deterministic=True)


def final(failure: errors.Error) -> bool:
    """Whether the server has refused a turn for good, so that it was not applied and will not be."""
    if isinstance(failure, (errors.Overloaded, errors.Unavailable, errors.DeadlineExceeded, errors.Cancelled)):
        return False
    return bool(failure.reason) or isinstance(failure, errors.InvalidInput)


class Line:
    """A session's turns as this side has them: the last that is answered, and those after it, in order.

    One caller at a time has the line: who begins takes it over from whoever had it. A caller claims the turns whose
    answers it is to give out.
    """

    __slots__ = ("_claimed", "_inputs", "_owner", "id", "model", "turn", "version")

    def __init__(self, id: str, model: str, version: str, turn: int) -> None:
        self.id, self.model, self.version = id, model, version
        self.turn = turn
        self._inputs: deque[bytes] = deque()  # of the turns turn + 1, turn + 2, …
        self._claimed = 0  # how many of them, from the first, the caller claims
        self._owner = 0

    def __len__(self) -> int:
        """Turns that are not answered."""
        return len(self._inputs)

    def begin(self) -> int:
        """Another caller takes the line over, and gets the mark to `check` whether it still has it."""
        self._owner += 1
        self._claimed = 0
        return self._owner

    def check(self, owner: int) -> None:
        """Raises FailedPrecondition where somebody else has the line by now."""
        if owner != self._owner:
            message = f"session {self.id!r} was used otherwise while send_all was under way; its turns were sent, their answers are lost"
            raise errors.FailedPrecondition(message, status="FAILED_PRECONDITION", reason="TAKEN_OVER")

    def claim(self, input: bytes) -> bool:
        """Claim the turn that brings `input`: the next that is unanswered where that brought the same, else a new one.

        False where unanswered turns with other inputs must be answered first.
        """
        if self._claimed == len(self._inputs):
            self._inputs.append(input)
        elif self._inputs[self._claimed] != input:
            return False
        self._claimed += 1
        return True

    def answered(self) -> bool:
        """The first turn has its answer. Whether it was claimed: else the answer is nobody's."""
        self._inputs.popleft()
        self.turn += 1
        claimed = self._claimed > 0
        self._claimed -= claimed
        return claimed

    def failed(self, failure: errors.Error) -> None:
        """The first turn failed, and no more tries are made. Where that is final, those behind it can't be applied either."""
        if failure.reason == errors.BAD_REPLY:
            self.answered()  # applied it was
        elif final(failure):
            self._inputs.clear()

    def request(self, turn: int) -> pb.TurnRequest:
        request = pb.TurnRequest(session=self.id, turn=turn, acknowledged=self.turn)
        request.MergeFromString(self._inputs[turn - self.turn - 1])
        return request

    def call(self) -> Call[Answer]:
        """The first unanswered turn as a call of its own."""
        turn = self.turn + 1

        def read(raw: bytes) -> Answer:
            reply = parse(pb.TurnReply, raw)
            if reply.turn != turn:
                raise errors.bad_reply(f"turn {reply.turn} where {turn} was sent")
            return self._read(reply)

        return Call(SERVICE + "Turn", self.request(turn).SerializeToString(), read, metadata=metadata(self.id))

    def outcome(self, reply: pb.TurnReply) -> Answer | errors.Error:
        """What a stream says of a turn."""
        r = reply.refusal
        if reply.HasField("refusal"):
            return errors.from_refusal(r.code, r.message, r.reason, dict(r.facts), r.retry_after or None)
        try:
            return self._read(reply)
        except errors.Error as e:
            return e

    def _read(self, reply: pb.TurnReply) -> Answer:
        match reply.WhichOneof("output"):
            case "classification":
                return classification(reply.classification, self.model, self.version, results.Timing())
            case "forecast":
                return forecasted(reply.forecast, self.model, self.version)
            case "tensors":
                listed = reply.tensors.tensors
                outputs = {t.name: tensors.unpack(t.name, t.datatype, t.shape, t.data) for t in listed}
                return results.Tensors(outputs, self.model, self.version)
            case other:
                raise errors.bad_reply(f"turn {reply.turn} of session {reply.session!r} has no output this release knows ({other})")


class Ahead:
    """What was sent and what came over one stream of turns. A new stream has a new one, and sends all that is unanswered."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._sent = line.turn
        self._came: dict[int, Answer | errors.Error] = {}

    def due(self) -> list[bytes]:
        """Messages with the turns that this stream has not carried yet."""
        first, last = self._sent + 1, self._line.turn + len(self._line)
        self._sent = last
        return [pb.TurnsRequest(turns=[self._line.request(turn)]).SerializeToString() for turn in range(first, last + 1)]

    def take(self, raw: bytes) -> None:
        """A message of the server; turns may come out of order."""
        for reply in parse(pb.TurnsReply, raw).turns:
            if reply.session != self._line.id or not self._line.turn < reply.turn <= self._sent:
                continue
            outcome = self._line.outcome(reply)
            if reply.turn > self._line.turn + 1 and isinstance(outcome, errors.Error) and outcome.reason == "GAP":
                # One before it was refused. Should that have been on an older stream, this turn is simply sent again.
                outcome = errors.Unavailable(outcome.message, status="UNAVAILABLE", details=outcome.details)
            self._came[reply.turn] = outcome

    def first(self) -> Answer | errors.Error | None:
        """What became of the first unanswered turn; None where the server has not said."""
        return self._came.pop(self._line.turn + 1, None)

    def quiet(self) -> bool:
        """Whether every turn behind a refused one was refused too, so that none can be applied after what is sent next."""
        return all(turn in self._came for turn in range(self._line.turn + 2, self._sent + 1))


class Handle:
    """What both twins of a session know without asking."""

    def __init__(self, wanted: Wanted, close: bool) -> None:
        self._wanted = wanted
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

    def _check_open(self) -> None:
        if self._closed:
            raise errors.SessionGone(
                f"session {self.id!r} was closed after turn {self.turn}; open a new one",
                status="FAILED_PRECONDITION",
                reason="SESSION_CLOSED",
                details={"session": self.id, "turn": str(self.turn)},
            )


def check_window(window: int) -> None:
    if not 1 <= window <= MOST:
        raise errors.invalid(f"window is {window}: 1 to {MOST} turns may be sent ahead")


def over(failure: errors.Error) -> bool:
    """Whether closing a session failed because there is nothing left to close."""
    return isinstance(failure, (errors.SessionGone, errors.SessionNotFound))


def stream_ended() -> errors.Error:
    return errors.Unavailable("the stream of turns ended before all were answered", status="UNAVAILABLE")


def _named(method: str, id: str, request: Any) -> Call[results.SessionInfo]:
    return Call(SERVICE + method, request.SerializeToString(), lambda raw: _info(parse(pb.SessionInfo, raw)), metadata=metadata(id))


def _info(info: pb.SessionInfo) -> results.SessionInfo:
    model = info.model
    return results.SessionInfo(info.session, model.name, model.version, info.turn, info.acknowledged, info.ttl, info.fingerprint)
