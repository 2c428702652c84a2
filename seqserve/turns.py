"""The turns of a session: what they bring and are answered with, and what this side keeps so that none is applied twice.

Both twins of `Session` are made of this. Pure: it knows messages, but no channel, clock, thread or event loop.

The client numbers the turns. A turn without a final answer is kept, and comes again with the same number and the same
bytes before any other; so the server can tell a turn that it has applied already, and answers it without applying it
again. It is final where the server decided: an answer, or a refusal that another try would meet again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from protos import sessions_pb2 as pb
from seqserve import errors, results, tensors
from seqserve import generation as generate
from seqserve.results import Answer
from seqserve.wire import Call, classification, forecasted, numbers, parse, read_timing, series, string

Observations = NDArray[Any] | float | Sequence[float] | Sequence[Sequence[float]] | Sequence[NDArray[Any]]
Inputs = Mapping[str, Any]  # tensors by name
Piece = str | Inputs | Observations

SERVICE = "/seqserve.v1.Sessions/"
STREAM = SERVICE + "Turns"
METADATA = "seqserve-session"  # proxies route by it
WINDOW = 32  # turns sent ahead: enough to fill the rounds of one session, few to send again after a broken connection
MOST = 1024  # what a server keeps unacknowledged


def metadata(id: str) -> tuple[tuple[str, str], ...]:
    """What goes along with each call of a session; nothing where the id can't travel as a header."""
    return ((METADATA, id),) if id and id.isascii() and id.isprintable() and id == id.strip() else ()


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


def generation(text: str, temperature: float, top_k: int, seed: int | None, max_symbols: int, stop: Sequence[str]) -> bytes:
    """A turn that goes on with a text, as `encode` gives others."""
    asked = generate.request(text, temperature, top_k, seed, max_symbols, stop)
    return pb.TurnRequest(generate=asked).SerializeToString(deterministic=True)


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
        timing = read_timing(reply.timing)
        match reply.WhichOneof("output"):
            case "classification":
                return classification(reply.classification, self.model, self.version, timing)
            case "forecast":
                return forecasted(reply.forecast, self.model, self.version, timing)
            case "tensors":
                listed = reply.tensors.tensors
                outputs = {t.name: tensors.unpack(t.name, t.datatype, t.shape, t.data) for t in listed}
                return results.Tensors(outputs, self.model, self.version, timing)
            case "generated":
                return generate.generated(reply.generated, self.model, self.version, timing)
            case other:
                raise errors.bad_reply(f"turn {reply.turn} of session {reply.session!r} has no output this release knows ({other})")


class Ahead:
    """What was sent and what came over one stream of turns. A new stream has a new one, and sends all that is unanswered."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._sent = line.turn
        self._answered = False
        self._came: dict[int, Answer | errors.Error] = {}

    def due(self) -> list[bytes]:
        """Messages with the turns that this stream has not carried yet.

        Until the first is answered there is only that one: had somebody else written to the session meanwhile, the first
        would be refused, but those behind it taken for turns that follow on what the other wrote.
        """
        first, last = self._sent + 1, self._line.turn + (len(self._line) if self._answered else 1)
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
        outcome = self._came.pop(self._line.turn + 1, None)
        self._answered = self._answered or (outcome is not None and not isinstance(outcome, errors.Error))
        return outcome

    def quiet(self) -> bool:
        """Whether every turn behind a refused one was refused too, so that none can be applied after what is sent next."""
        return all(turn in self._came for turn in range(self._line.turn + 2, self._sent + 1))


def check_window(window: int) -> None:
    if not 1 <= window <= MOST:
        raise errors.invalid(f"window is {window}: 1 to {MOST} turns may be sent ahead")


def stream_ended() -> errors.Error:
    return errors.Unavailable("the stream of turns ended before all were answered", status="UNAVAILABLE")


def stream_failed(failure: errors.Error) -> errors.Error:
    """What a stream failed by. Where the server gave no reason for a fault of its own it did not speak: the connection broke
    (grpc.aio says INTERNAL where it was writing just then)."""
    if isinstance(failure, errors.ServerError) and not failure.reason:
        return errors.Unavailable(f"the stream of turns broke: {failure}", status=failure.status)
    return failure
