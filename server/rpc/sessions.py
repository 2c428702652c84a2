"""seqserve.v1.Sessions: state that stays between calls. Wire in, one call, wire out.

Where the store takes its time, nothing here waits for it in the front's thread (errands.py): neither what opens, forks, moves or
ends a session, nor what names one that is not in memory, or behind such a call of the same session. A turn of a session in
memory is taken at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Listed
from functools import lru_cache, partial
from hashlib import blake2b
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from contract.bundle import Tensor
from protos import seqserve_pb2 as tasks_pb
from protos import sessions_pb2 as pb
from server.catalog import Model
from server.errors import Conflict, InvalidInput, ModelFailed, Overloaded, ServeError
from server.inputs import Sizes, check
from server.quotas import Caller
from server.rpc import gate, wire
from server.rpc.answer import Answer, Desk, brief, malformed
from server.rpc.front import Call, Method, Receiver
from server.rpc.generation import read_wishes, write_generated
from server.rpc.tasks import read_series, write_classification, write_series, write_timing
from server.sequence import Inputs, Outputs, Packed, Sequence, Views
from server.sessions import Kept
from server.shares import Claim
from server.shelf import ID_LENGTH, Shelf
from server.tasks.classify import Classifier
from server.tasks.forecast import Forecaster
from server.tasks.generate import Generator
from server.turns import Plan, Turn, Turns

SERVICE = "seqserve.v1.Sessions"
M = TypeVar("M", bound=Message)
_TURNS = b"\x0a"  # the tag of TurnsReply.turns: field 1, a length follows
PAGE = 1000  # sessions that List gives at once


class Sessions:
    def __init__(self, shelf: Shelf, turns: Turns) -> None:
        self._shelf = shelf
        self._turns = turns

    def methods(self, desk: Desk) -> Mapping[str, Method]:
        return {
            f"/{SERVICE}/Open": desk.unary(pb.OpenRequest, self._apart(self.open)),
            f"/{SERVICE}/Turn": desk.unary(pb.TurnRequest, self._apart(self.turn, look=True)),
            f"/{SERVICE}/Turns": desk.stream(lambda call, answer: _Stream(self._turns, call, answer)),
            f"/{SERVICE}/Get": desk.unary(pb.SessionName, self._apart(self.get, look=not self._shelf.shared)),
            f"/{SERVICE}/List": desk.unary(pb.ListRequest, self._apart(self.list)),
            f"/{SERVICE}/Fork": desk.unary(pb.ForkRequest, self._apart(self.fork)),
            f"/{SERVICE}/Export": desk.unary(pb.ExportRequest, self._apart(self.export)),
            f"/{SERVICE}/Import": desk.unary(pb.ImportRequest, self._apart(self.bring)),
            f"/{SERVICE}/Close": desk.unary(pb.SessionName, self._apart(self.close)),
        }

    def _apart(self, handle: Callable[[M, Answer], None], look: bool = False) -> Callable[[M, Answer], None]:
        """The same handler in another thread, where it may wait for the store. To `look` at a session in memory waits for nothing."""
        shelf, errands = self._shelf, self._shelf.errands
        if errands is None:
            return handle

        def start(request: M, answer: Answer) -> None:
            ids = [gate.stored(answer.caller, id) for id in _names(request)]
            if look and ids and not shelf.waits(ids[0]):
                handle(request, answer)
                return

            def work() -> None:
                try:
                    handle(request, answer)
                except Exception as e:  # the caller is told, whatever it is
                    answer.fail(e)

            errands.run(ids, work)

        return start

    def open(self, request: pb.OpenRequest, answer: Answer) -> None:
        caller = answer.caller
        with gate.room(caller, self._shelf):
            id = gate.named(caller, request.session)
            kept = self._shelf.open(request.model.name, request.model.version, id, request.ttl)
        answer.done(_info(kept, caller))

    def turn(self, request: pb.TurnRequest, answer: Answer) -> None:
        try:
            _take(self._turns, request, _InCall(request, answer), answer.caller)
        except Conflict:
            if not self._shelf.shared:
                raise
            self._apart(self.turn_again)(request, answer)

    def turn_again(self, request: pb.TurnRequest, answer: Answer) -> None:
        """A turn that conflicts with what is in memory here, where another server may have gone on with its session."""
        _take(self._turns, request, _InCall(request, answer), answer.caller, sure=True)

    def get(self, request: pb.SessionName, answer: Answer) -> None:
        caller = answer.caller
        answer.done(_info(self._shelf.get(gate.stored(caller, request.session)), caller))

    def fork(self, request: pb.ForkRequest, answer: Answer) -> None:
        caller = answer.caller
        with gate.room(caller, self._shelf):
            kept = self._shelf.fork(gate.stored(caller, request.session), gate.named(caller, request.fork))
        answer.done(_info(kept, caller))

    def close(self, request: pb.SessionName, answer: Answer) -> None:
        caller = answer.caller
        kept = self._turns.close(gate.stored(caller, request.session))
        gate.left(caller)
        answer.done(_info(kept, caller))

    def export(self, request: pb.ExportRequest, answer: Answer) -> None:
        record, pages = self._shelf.export(gate.stored(answer.caller, request.session), request.move)
        if request.move:
            gate.left(answer.caller)
        answer.done(pb.Exported(record=record, pages=pages, session=request.session))

    def bring(self, request: pb.ImportRequest, answer: Answer) -> None:
        caller, exported = answer.caller, request.exported
        id = gate.brought(caller, exported.record, exported.pages.get, exported.session, request.session)
        with gate.room(caller, self._shelf):
            kept = self._shelf.bring(exported.record, exported.pages, id)
        answer.done(_info(kept, caller))

    def list(self, request: pb.ListRequest, answer: Answer) -> None:
        page, total = gate.page(answer.caller, self._shelf, request.after, min(request.limit or PAGE, PAGE))
        answer.done(pb.ListReply(sessions=[_info(kept, answer.caller) for kept in page], total=total))


class _Stream(Receiver):
    """One open stream of turns, of any number of sessions. What one round answers leaves as one message."""

    def __init__(self, turns: Turns, call: Call, answer: Answer) -> None:
        self._turns = turns
        self._errands = turns.shelf.errands
        self._call = call
        self._answer = answer
        self.caller = answer.caller
        self._due = 0  # turns taken and not yet answered; the front's thread counts up, workers count down
        self._lock = threading.Lock()
        self._ended = False
        self._sending = False  # a thread is about it
        self._replies: list[bytes] = []  # to be sent: each a TurnReply, and what stands before it
        self._size = 0
        self._refused: dict[str, int] = {}  # by session, a turn of this stream that was refused
        self._remembered = 0  # bytes that these take
        self._over = False  # they take too many: the stream has ended for it, and no turn is taken any more
        self.claim = answer.claim(lasting=True)
        answer.cancel_by(lambda: None)  # turns that were begun run on: their caller may come back for the replies

    def on_message(self, message: bytes) -> None:
        try:
            request = pb.TurnsRequest.FromString(message)
        except DecodeError:
            self._answer.fail(malformed(pb.TurnsRequest))
            return
        turns = request.turns
        with self._lock:
            self._due += len(turns)
        for turn in turns:
            self._take(turn)
        self.flush()

    def on_end(self) -> None:
        with self._lock:
            self._ended = True
            over = self._due == 0
        if over:
            self._answer.done()

    def tell(self, reply: bytes) -> None:
        """A turn's reply, to be sent at the next flush."""
        with self._lock:
            self._replies += (_before(len(reply)), reply)
            self._size += len(reply)
            large = self._size > JOINED
        if large:
            self.flush()

    def flush(self) -> None:
        """Send what was told, unless another thread is about it, which then sends this too: in the order in which it was told."""
        if not self._replies:
            return
        with self._lock:
            if self._sending:
                return
            self._sending = True
        try:
            while replies := self._next():
                self._call.reply(b"".join(replies))
                with self._lock:
                    self._due -= len(replies) // 2
                    over = self._ended and self._due == 0
                if over:
                    self._answer.done()
        except BaseException:
            self._sending = False
            raise

    def _next(self) -> list[bytes]:
        """What is to be sent as one message; where there is nothing, another thread may send from now on."""
        with self._lock:
            replies = self._replies
            if self._size <= JOINED:
                self._replies, self._size = [], 0
            else:  # told while others were sent
                size = count = 0
                while size <= JOINED and count < len(replies):
                    size += len(replies[count + 1])
                    count += 2
                replies, self._replies = replies[:count], replies[count:]
                self._size -= size
            self._sending = bool(replies)
            return replies

    def _take(self, turn: pb.TurnRequest) -> None:
        work = _InStream(turn, self)
        if self._errands is not None and self._turns.shelf.waits(id := gate.stored(self.caller, turn.session)):
            try:
                self._errands.run((id,), lambda: self._begin_apart(turn, work))
            except ServeError as e:
                work.told(e)
        else:
            self._begin(turn, work)

    def _begin_apart(self, turn: pb.TurnRequest, work: _InStream, sure: bool = False) -> None:
        try:
            self._begin(turn, work, sure)
        finally:
            self.flush()

    def _begin(self, turn: pb.TurnRequest, work: _InStream, sure: bool = False) -> None:
        try:
            if self.caller is not None:
                self.caller.spend()
            if self._refused:
                if self._over:
                    return
                refused = self._refused.get(turn.session)
                if refused is not None:
                    if turn.turn > refused:
                        # Sent ahead of the refusal: on top of whatever is in the refused turn's place it would be another turn.
                        raise _behind(turn, refused)
                    self._forget(turn.session)
            _take(self._turns, turn, work, self.caller, sure)
        except ServeError as e:
            if isinstance(e, Conflict) and self._errands is not None and self._turns.shelf.shared and not sure:
                ids = [gate.stored(self.caller, turn.session)]
                self._errands.run(ids, lambda: self._begin_apart(turn, work, sure=True))
                return
            self._remember(turn)
            work.told(e)
        except Exception:
            work.told(ModelFailed("INTERNAL", "the server failed while it took this turn; its log has the reason"))
            raise

    def _remember(self, turn: pb.TurnRequest) -> None:
        """Turns of the same session sent ahead of this one, which is refused, are to be refused as well. Where that takes too much
        memory the stream ends: to forget one would be to run what was sent behind it."""
        if len(turn.session) > ID_LENGTH:
            return  # no session has such an id, so turns sent ahead are refused for that
        with self._lock:
            if turn.session in self._refused:
                return
            self._refused[turn.session] = turn.turn
            self._remembered += _weight(turn.session)
            self._over = over = self._remembered > REFUSED
        if over:
            message = f"turns of {len(self._refused)} sessions of this stream were refused and not sent again; open another stream"
            self._answer.fail(Overloaded("MANY_REFUSED", message, sessions=len(self._refused)))

    def _forget(self, session: str) -> None:
        """The refused turn was sent again, or one before it."""
        with self._lock:
            if self._refused.pop(session, None) is not None:
                self._remembered -= _weight(session)


def _names(request: Message) -> list[str]:
    """The sessions that a request names."""
    if isinstance(request, pb.ForkRequest):
        names = [request.session, request.fork]
    elif isinstance(request, pb.ImportRequest):
        names = [request.session or request.exported.session]
    else:
        names = [getattr(request, "session", "")]
    return [name for name in names if name]


FORMS = 4096  # of turns and replies that are known of a model; then all are forgotten
REFUSED = 32 << 20  # bytes that a stream's refused turns may take until they are sent again: those of 190,000 sessions with ids of ours
JOINED = 256 << 10  # bytes: replies of one round are sent together up to this, or a message could outgrow what clients accept


@lru_cache(maxsize=1024)
def _before(length: int) -> bytes:
    """What stands before a TurnReply of that length in a TurnsReply."""
    return _TURNS + wire.varint(length)


def _weight(session: str) -> int:
    """Bytes that a refused turn takes until it is sent again, about: its session's id and what holds it."""
    return 150 + len(session) * (1 if session.isascii() else 4)


def _behind(turn: pb.TurnRequest, refused: int) -> Conflict:
    message = f"session {turn.session!r}: turn {refused}, before this one, was refused; send it again first"
    return Conflict("GAP", message, session=turn.session, refused=refused)


class _Asked(Turn):
    """A turn as it came over the wire; read when it is its time to run."""

    __slots__ = ("data", "id", "kind", "number", "request")

    def __init__(self, request: pb.TurnRequest, claim: Claim) -> None:
        super().__init__(claim)
        self.request = request
        self.id = request.session
        self.number = request.turn
        self.kind: str | None = request.WhichOneof("input")
        self.data = b""  # what it brings, serialised

    def brought(self, model: Model, rest: str) -> Plan:
        if self.kind == "tensors":
            return _tensors(model, self)
        if self.kind == "text":
            return _text(model, self.request, rest)
        if self.kind == "generate":
            return _generate(model, self.request, rest)
        return _observations(model, self.request)


class _InStream(_Asked):
    """A turn of a stream."""

    __slots__ = ("stream",)

    def __init__(self, request: pb.TurnRequest, stream: _Stream) -> None:
        super().__init__(request, stream.claim)
        self.stream = stream

    def told(self, reply: bytes | ServeError) -> None:
        if isinstance(reply, ServeError):
            request = self.request
            if self.stream.caller is not None:
                reply = gate.told(self.stream.caller, reply)
            reply = pb.TurnReply(session=request.session, turn=request.turn, refusal=_refusal(reply)).SerializeToString()
        self.stream.tell(reply)

    def flush(self) -> None:
        self.stream.flush()


class _InCall(_Asked):
    """A turn that is a call of its own."""

    __slots__ = ("answer",)

    def __init__(self, request: pb.TurnRequest, answer: Answer) -> None:
        super().__init__(request, answer.claim(lasting=True))
        self.answer = answer

    def told(self, reply: bytes | ServeError) -> None:
        if isinstance(reply, ServeError):
            self.answer.fail(reply)
        else:
            self.answer.done_bytes(reply)


def _take(turns: Turns, request: pb.TurnRequest, work: _Asked, caller: Caller | None, sure: bool = False) -> None:
    """Hand a turn over; `sure`: as Turns.turn."""
    kind = work.kind
    if kind is None:
        raise InvalidInput(
            "NO_INPUT", "the turn brings nothing; send tensors, observations, text or generate", session=request.session, turn=request.turn
        )
    part = getattr(request, kind)
    work.data = data = part.encode() if isinstance(part, str) else part.SerializeToString(deterministic=True)
    digest = blake2b(data, digest_size=16, person=_PERSONS[kind]).digest()
    id = work.id if caller is None else caller.tenant.prefix + work.id
    turns.turn(id, work.number, digest, work, request.acknowledged, sure=sure)


_PERSONS = {kind: kind.encode() for kind in ("tensors", "observations", "text", "generate")}


def _tensors(model: Model, work: _Asked) -> Plan:
    data = work.data
    form: _Form | None = model.noted.get(len(data))
    if form is not None and (packed := form.read(data)) is not None:
        return Plan(partial(_reply, work.id, work.number, model), inputs=(packed, form.sizes))
    graph = model.bundle.graph
    tensors = work.request.tensors.tensors
    if graph.packed is not None and len(tensors) == len(graph.inputs):
        steps, packed = wire.read_packed(graph, tensors, [t.data for t in tensors])
        if packed is not None:
            _note(model, work, packed, sizes := Sizes(1, steps))
            return Plan(partial(_reply, work.id, work.number, model), inputs=(packed, sizes))
    if graph.ragged:
        raise InvalidInput("TASK_ONLY", f"model {model.name!r} can't be called by tensors", model=model.name)
    inputs: dict[str, Any] = {}
    for t in tensors:
        if t.name in inputs:
            raise wire.repeated(t.name)
        inputs[t.name] = wire.read(t.name, t.datatype, t.shape, t.data)
    return Plan(partial(_reply, work.id, work.number, model), inputs=(inputs, check(graph, inputs, 1)))


class _Form:
    """Serialised Tensors of a form that was seen before, but for their values: read without a look at what never changes."""

    __slots__ = ("_parts", "sizes")

    def __init__(self, parts: Listed[tuple[bytes, int]], sizes: Sizes) -> None:
        self._parts = parts  # of each tensor what stands before its values, and their bytes
        self.sizes = sizes

    def read(self, data: bytes) -> Packed | None:
        """The values; None where these are of another form. `data` is as long as this one is."""
        packed = []
        at = 0
        for head, size in self._parts:
            if not data.startswith(head, at):
                return None
            at += len(head)
            packed.append(data[at : at + size])
            at += size
        return tuple(packed)


def _note(model: Model, work: _Asked, packed: Packed, sizes: Sizes) -> None:
    """Know a turn's form again, by its length: of two of one length the last that was seen counts."""
    shapes = [tuple(t.shape) for t in work.request.tensors.tensors]
    heads = [_head(t, shape, len(values)) for t, shape, values in zip(model.bundle.graph.inputs, shapes, packed, strict=True)]
    parts = [(head, len(values)) for head, values in zip(heads, packed, strict=True)]
    if b"".join(part for pair in zip(heads, packed, strict=True) for part in pair) == work.data:
        _keep(model, len(work.data), _Form(parts, sizes))


def _keep(model: Model, key: object, found: object) -> None:
    if len(model.noted) >= FORMS:
        model.noted.clear()
    model.noted[key] = found


def _reply(id: str, turn: int, model: Model, outputs: Views, ran: Sequence) -> bytes:
    """A serialised TurnReply, put together from parts: most of it is the same for every turn of a model. It is not given the turn,
    which knows it: that would be a ring, left for the garbage collector."""
    values: list[bytes] = []
    size = 0
    noted = model.noted
    for place, tensor in enumerate(model.bundle.graph.outputs):
        data, shape = wire.bytes_of(tensor, outputs)
        key = (place, len(data), shape)
        head: bytes | None = noted.get(key)
        if head is None:
            head = _head(tensor, shape, len(data))
            _keep(model, key, head)
        size += len(head) + len(data)
        values += (head, data)
    session = id.encode()
    number, timing = wire.varint(turn), wire.timing(_TIMING, ran)
    return b"".join((b"\x0a", wire.varint(len(session)), session, b"\x10", number, b"\x1a", wire.varint(size), *values, timing))


_TIMING = pb.TurnReply.TIMING_FIELD_NUMBER


def _told(request: pb.TurnRequest, ran: Sequence, **output: Message) -> bytes:
    """A serialised TurnReply of a task."""
    reply = pb.TurnReply(session=request.session, turn=request.turn, timing=write_timing(ran), **output)  # type: ignore[arg-type]  # one of the oneof
    return reply.SerializeToString(deterministic=True)


@lru_cache(maxsize=1024)
def _head(tensor: Tensor, shape: tuple[int, ...], size: int) -> bytes:
    """What stands before an output's bytes in Tensors."""
    about = pb.Tensor(name=tensor.name, datatype=wire.datatype(tensor), shape=shape).SerializeToString(deterministic=True)
    about += b"\x22" + wire.varint(size)
    return b"\x0a" + wire.varint(len(about) + size) + about


def _observations(model: Model, request: pb.TurnRequest) -> Plan:
    task = model.task
    if not isinstance(task, Forecaster):
        raise InvalidInput("WRONG_TASK", f"model {model.name!r} can {model.bundle.kind}; it takes no observations", model=model.name)
    inputs, sizes, result = task.plan(read_series(request.observations, task.channels), 0, ())

    def answer(outputs: Outputs, ran: Sequence) -> bytes:
        f = result(outputs)
        forecast = tasks_pb.ForecastReply(channels=task.channels, mean=write_series(f.mean))
        for quantile, values in f.quantiles:
            forecast.quantiles.add(quantile=quantile, series=write_series(values))
        return _told(request, ran, forecast=forecast)

    return Plan(answer, inputs=(inputs, sizes))


def _text(model: Model, request: pb.TurnRequest, rest: str) -> Plan:
    task = model.task
    if not isinstance(task, Classifier):
        raise InvalidInput("WRONG_TASK", f"model {model.name!r} can {model.bundle.kind}; it takes no pieces of text", model=model.name)
    read = task.read(request.text, rest)
    tokens = len(read.glance) + (len(read.words) if read.words is not None else 0)

    def answer(outputs: Outputs, ran: Sequence) -> bytes:
        result = write_classification(task.labels, task.result(outputs, tokens))
        return _told(request, ran, classification=result)

    glance = ({"tokens": read.glance[None]}, Sizes(1, len(read.glance)))
    if read.words is None:
        return Plan(answer, read.rest, glance=glance)
    return Plan(answer, read.rest, ({"tokens": read.words[None]}, Sizes(1, len(read.words))), glance)


def _generate(model: Model, request: pb.TurnRequest, rest: str) -> Plan:
    """A turn of as many rounds as it has symbols. The last of them no round has read: it is the session's `rest`, as its id."""
    task, asked = model.task, request.generate
    if not isinstance(task, Generator):
        raise InvalidInput("WRONG_TASK", f"model {model.name!r} can {model.bundle.kind}; it does not go on with texts", model=model.name)
    if asked.HasField("model"):
        raise InvalidInput("NAME_NO_MODEL", f"a session has its model, {model.name!r}; leave the turn's empty", model=model.name)
    drawing = task.read(asked.text, read_wishes(asked), (int(rest),) if rest else None)

    def answer(_: Outputs, ran: Sequence) -> bytes:
        return _told(request, ran, generated=write_generated(drawing.result()))

    def more(outputs: Views) -> tuple[Inputs, Sizes] | None:
        drawing.advance(outputs["logits"][0, -1])
        if not drawing.ended:
            return task.following(drawing)
        plan.fresh = drawing.ended == "end"  # the next turn begins another text
        plan.rest = "" if plan.fresh else str(drawing.pending[0])
        return None

    plan = Plan(answer, inputs=({"tokens": drawing.first[None]}, Sizes(1, len(drawing.first))))
    plan.more = more
    return plan


def _refusal(error: ServeError) -> pb.Refusal:
    error = brief(error)
    code = grpc.StatusCode[error.status].value[0]
    return pb.Refusal(code=code, message=error.message, reason=error.reason, facts=error.facts, retry_after=error.retry_after or 0.0)


def _info(kept: Kept, caller: Caller | None) -> pb.SessionInfo:
    return pb.SessionInfo(
        session=gate.plain(caller, kept.id),
        model=tasks_pb.Model(name=kept.model, version=kept.version),
        turn=kept.turn,
        acknowledged=kept.acknowledged,
        ttl=kept.ttl,
        fingerprint=kept.fingerprint,
    )


__all__ = ["SERVICE", "Sessions"]
