"""inference.GRPCInferenceService: calls by tensors and by texts. Wire in, one call, wire out."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Listed
from dataclasses import replace
from typing import Protocol

import numpy as np
from google.protobuf.message import DecodeError

from contract.bundle import Tensor
from protos import inference_pb2 as pb
from server import VERSION
from server.catalog import Catalog, Model
from server.config import Config
from server.engine import Engine
from server.errors import Conflict, Denied, InvalidInput, NotFound, ServeError
from server.inputs import Array, Sizes, check
from server.quotas import Caller
from server.rpc import gate, model_config, parameters, wire
from server.rpc.answer import Answer, Asked, Desk, malformed
from server.rpc.face import TEXT, Face
from server.rpc.front import Method
from server.rpc.parameters import SERVICE, Parameters
from server.rpc.shared_memory import REGION, Place, Regions
from server.rpc.tasks import MOST_LETTERS
from server.rpc.together import Together
from server.rpc.usual import Cut, Forms, Usual, cut, echoed
from server.rpc.wire import Values
from server.sequence import Outputs, Sequence
from server.shelf import Shelf
from server.turns import Plan, Turn, Turns

EXTENSIONS = (
    "sequence", "sequence(string_id)", "model_repository", "schedule_policy", "model_configuration", "parameters", "statistics", "logging",
)  # fmt: skip

Chosen = tuple[Listed[Tensor], Mapping[str, Place]]  # outputs, and where in shared memory some of them go
_NOWHERE: Mapping[str, Place] = {}


class Pieces(Protocol):
    """Who asks for an answer in pieces: `last` says that no more will come."""

    def read(self, id: str, given: Parameters) -> None:
        """What the request says of itself."""

    def send(self, response: bytes) -> None: ...

    def last(self) -> None: ...


class Inference:
    def __init__(self, catalog: Catalog, shelf: Shelf, turns: Turns, ready: Callable[[], bool], regions: Regions, config: Config) -> None:
        self._catalog = catalog
        self._shelf = shelf
        self._turns = turns
        self._ready = ready
        self._regions = regions
        self._config = config
        self._faces: dict[Engine, Face] = {}  # replaced, never changed: readers need no lock
        self._lock = threading.Lock()  # of the line below
        self._ending: dict[str, list[_Step]] = {}  # sequences whose end is under way → what came behind it
        self._forms = Forms()
        self._quick = not config.access_log  # whose lines say what was asked
        self._extensions = (*EXTENSIONS, "system_shared_memory") if regions.allowed else EXTENSIONS

    def methods(self, desk: Desk) -> Mapping[str, Method]:
        anyone = desk.anyone  # probes have no key
        return {
            f"/{SERVICE}/ServerLive": anyone.unary(pb.ServerLiveRequest, lambda _, answer: answer.done(pb.ServerLiveResponse(live=True))),
            f"/{SERVICE}/ServerReady": anyone.unary(pb.ServerReadyRequest, self.server_ready),
            f"/{SERVICE}/ModelReady": desk.unary(pb.ModelReadyRequest, self.model_ready),
            f"/{SERVICE}/ServerMetadata": desk.unary(pb.ServerMetadataRequest, self.server_metadata),
            f"/{SERVICE}/ModelMetadata": desk.unary(pb.ModelMetadataRequest, self.model_metadata),
            f"/{SERVICE}/ModelConfig": desk.unary(pb.ModelConfigRequest, self.model_config),
            f"/{SERVICE}/ModelInfer": desk.raw(self.take),
        }

    def server_ready(self, request: pb.ServerReadyRequest, answer: Answer) -> None:
        answer.done(pb.ServerReadyResponse(ready=self._ready()))

    def model_ready(self, request: pb.ModelReadyRequest, answer: Answer) -> None:
        try:
            self._catalog.find(request.name, request.version)
        except NotFound:
            answer.done(pb.ModelReadyResponse(ready=False))
        else:
            answer.done(pb.ModelReadyResponse(ready=self._ready()))

    def server_metadata(self, request: pb.ServerMetadataRequest, answer: Answer) -> None:
        answer.done(pb.ServerMetadataResponse(name=self._config.server_name, version=VERSION, extensions=self._extensions))

    def model_metadata(self, request: pb.ModelMetadataRequest, answer: Answer) -> None:
        model = self._catalog.find(request.name, request.version)
        answer.done(model_config.metadata(self._face(model), [m.version for m in self._catalog.models() if m.name == model.name]))

    def model_config(self, request: pb.ModelConfigRequest, answer: Answer) -> None:
        face = self._face(self._catalog.find(request.name, request.version))
        answer.done(pb.ModelConfigResponse(config=model_config.config(face, self._config)))

    def take(self, data: bytes, answer: Asked, pieces: Pieces | None = None) -> None:
        """Answer one request, as it came. Raises InvalidInput, NotFound, Overloaded."""
        fields = cut(data) if self._quick else None
        if fields is not None:
            form, id, sequence, raw = fields
            usual = self._forms.find(form, raw)
            if usual is not None and self._usual(usual, form, id, sequence, raw, answer, pieces):
                return
        try:
            request = pb.ModelInferRequest.FromString(data)
        except DecodeError:
            raise malformed(pb.ModelInferRequest) from None
        answer.asked(request)
        given = parameters.read(request)
        if pieces is not None:
            pieces.read(request.id, given)
        if fields is not None:
            self._learn(request, given, fields)
        self.infer(request, given, answer, pieces)

    def _learn(self, request: pb.ModelInferRequest, given: Parameters, fields: Cut) -> None:
        """A request of a new form, or of a new sequence: what is asked again is read by `_usual` from now on."""
        form, _, sequence, raw = fields
        if sequence and given.sequence:
            self._forms.learn_sequence(sequence, given.sequence)
        if self._forms.find(form, raw) is not None:
            return
        model = self._catalog.find(request.model_name, request.model_version)
        face = self._face(model)
        packed = _packed(face, request)
        if packed is None or _shares(request):
            return
        chosen = face.chosen(request) if request.outputs else None
        wanted, places = chosen or (face.own, _NOWHERE)
        if places or any(t not in face.own for t in wanted):
            return
        self._forms.learn(form, Usual(request, model, face, replace(given, sequence=""), wanted, packed[1]))

    def _usual(
        self, usual: Usual, form: tuple[bytes, ...], id: bytes, sequence: bytes, raw: list[bytes], answer: Asked, pieces: Pieces | None
    ) -> bool:
        """Answer a request of a known form; False where it is to be looked at in full after all."""
        model = usual.model
        if self._catalog.find(usual.name, usual.version) is not model:
            self._forms.forget(form)
            return False
        given = usual.given
        name = ""
        if sequence:
            known = self._forms.sequence(sequence)
            if known is None:
                return False
            name = known
        try:
            text = id.decode()
        except UnicodeDecodeError:
            return False
        if pieces is not None:
            pieces.read(text, given)
        if name:
            key = gate.stored(answer.caller, f"{usual.face.model.name}/{name}")
            self._stepped(_UsualStep(self, usual, id, echoed(sequence), tuple(raw), answer, key))
            return True

        def then(s: Sequence, outputs: Outputs) -> None:
            answer.done_bytes(usual.response(id, wire.told(s), outputs))

        queued = model.tensors.start_packed(tuple(raw), usual.sizes.steps, then, answer.fail, given.claim(answer))
        answer.cancel_by(lambda: model.engine.cancel(queued))
        return True

    def infer(self, request: pb.ModelInferRequest, given: Parameters, answer: Asked, pieces: Pieces | None = None) -> None:
        """Answer one request; through `pieces`, where they are wanted and the model gives some."""
        model = self._catalog.find(request.model_name, request.model_version)
        face = self._faces.get(model.engine) or self._face(model)
        caller = answer.caller
        if caller is not None and not caller.operator and _shares(request):
            raise Denied("OPERATORS_ONLY", "shared memory is for operators; send the bytes themselves", tenant=caller.tenant.name)
        chosen = face.chosen(request) if request.outputs else None
        if given.sequence:
            self._step(request, given, face, chosen, answer)
            return
        wanted, places = chosen or (face.own, _NOWHERE)
        packed = _packed(face, request)
        more = face.texts.more if chosen is not None and face.texts is not None else None
        inputs: Mapping[str, Array] = {}
        if packed is None:
            inputs = wire.read_inputs(request, self._regions)
            if face.texts is not None and TEXT.name in inputs:
                self._texts(request, given, face, chosen, face.rows(inputs), answer, pieces)
                return

        def then(s: Sequence, outputs: Outputs) -> None:
            values = outputs if more is None else more(outputs)
            answer.done_bytes(self._response(request.id, wire.told(s), face, wanted, places, values))

        claim = given.claim(answer)
        if packed is None:
            sequence = model.tensors.start(inputs, then, answer.fail, claim)
        else:
            sequence = model.tensors.start_packed(*packed, then, answer.fail, claim)
        answer.cancel_by(lambda: model.engine.cancel(sequence))

    def _texts(
        self, request: pb.ModelInferRequest, given: Parameters, face: Face, chosen: Chosen | None, texts: list[str], answer: Asked,
        pieces: Pieces | None,
    ) -> None:  # fmt: skip
        """A request that brings texts: each is a sequence of its own, so that none is padded to another's length."""
        task, model = face.texts, face.model
        assert task is not None
        wanted, places = chosen or (task.outputs, _NOWHERE)
        if apart := [t.name for t in wanted if t not in task.outputs]:
            raise InvalidInput("TOKENS_ONLY", f"outputs {', '.join(apart)} are had by tensors only, not by TEXT", tensor=apart[0])
        claim = given.claim(answer)
        model.engine.check(claim)  # before the texts are read
        letters = sum(map(len, texts))
        if letters > MOST_LETTERS:
            message = f"{letters} letters in all; at most {MOST_LETTERS} are allowed in one call: send several"
            raise InvalidInput("TOO_LONG", message, expected=f"1..{MOST_LETTERS}", got=letters)
        streamed = pieces if task.streams and len(texts) == 1 else None

        def said(outputs: Values) -> None:
            assert streamed is not None
            streamed.send(self._response(request.id, b"", face, wanted, places, outputs))

        if streamed is not None and places:
            raise InvalidInput("PIECES_APART", "each piece would overwrite the one before: ask for outputs in the response itself")

        rows: Together[Values] = Together(model.engine, len(texts), answer)

        def then(at: int) -> Callable[[Sequence, Values], None]:
            def row(sequence: Sequence, outputs: Values) -> None:
                if not rows.put(at, sequence, outputs):
                    return
                if streamed is not None:
                    streamed.last()
                    return
                together = {t.name: np.concatenate([outputs[t.name] for outputs in rows.results]) for t in wanted}
                try:
                    response = self._response(request.id, wire.told(rows.longest), face, wanted, places, together)
                except ServeError as e:
                    answer.fail(e)
                else:
                    answer.done_bytes(response)

            return row

        answer.cancel_by(rows.cancel)
        try:
            for i, text in enumerate(texts):
                rows.started(task.start(text, request, then(i), rows.fail, said if streamed is not None else None, claim))
        except ServeError as e:
            rows.fail(e)

    def _step(self, request: pb.ModelInferRequest, given: Parameters, face: Face, chosen: Chosen | None, answer: Asked) -> None:
        """One request of a sequence, as the protocol's sequence extension has it: a turn of a session named by model and
        sequence_id. A start on an id that lives ends what it was and begins anew. The parameter `turn` numbers a request; then it
        may be sent again, and a gap is refused."""
        turn = given.turn
        id = gate.stored(answer.caller, f"{face.model.name}/{given.sequence}")
        step = _Step(self, request, given, face, chosen, answer, id)
        if turn is not None and _shares(request):
            raise InvalidInput("NOT_REPEATABLE", "a numbered request can be sent again, so it brings its bytes along: no shared memory")
        self._stepped(step)

    def _stepped(self, step: _Step) -> None:
        """Take a request of a sequence, in its place."""
        with self._lock:
            behind = self._ending.get(step.id)
            if behind is not None:  # what comes behind an end that is under way is of the next sequence of that id
                behind.append(step)
                return
            if step.given.end:
                self._ending[step.id] = []
        self._send(step)

    def _send(self, step: _Step) -> None:
        """Take a request whose turn it is."""
        errands = self._shelf.errands
        if errands is not None and (step.given.start or self._shelf.waits(step.id)):  # a store that takes its time is to be asked
            errands.run((step.id,), lambda: self._begin_apart(step))
        else:
            self._begin(step)

    def _begin_apart(self, step: _Step) -> None:
        try:
            self._begin(step, sure=True)
        except Exception as e:  # the caller is told, whatever it is
            step.answer.fail(e)

    def _begin(self, step: _Step, sure: bool = False) -> None:
        try:
            self._take(step, sure)
        except BaseException as e:
            errands = self._shelf.errands
            if isinstance(e, Conflict) and errands is not None and self._shelf.shared and not sure:
                errands.run((step.id,), lambda: self._begin_apart(step))  # another server may have gone on with the session
                return
            if step.given.end:
                self.ended(step.id)
            raise

    def _take(self, step: _Step, sure: bool) -> None:
        given, id, turn = step.given, step.id, step.given.turn
        if given.start and not (turn == 1 and self._shelf.lives(id)):  # the first turn sent again is no new start
            caller = step.answer.caller
            if self._shelf.lives(id):
                self._turns.close(id)
                gate.left(caller)
            with gate.room(caller, self._shelf):
                self._shelf.open(step.face.model.name, step.face.model.version, id)
        self._turns.turn(id, turn, b"" if turn is None else step.digest(), step, None, sure=sure)

    def end(self, id: str, caller: Caller | None) -> None:
        """The request that ends a sequence ran: the session behind it ends."""
        if self._shelf.lives(id):
            self._turns.close(id)
            gate.left(caller)

    def ended(self, id: str) -> None:
        """The request that ends a sequence was answered: what came behind it has its turn, up to the next that ends one. Until
        that line is empty whoever comes joins its end, or it would overtake."""
        while True:
            with self._lock:
                behind = self._ending.get(id)
                if not behind:
                    self._ending.pop(id, None)
                    return
                step = behind.pop(0)
            try:
                self._send(step)
            except Exception as e:  # each has a caller of its own
                step.answer.fail(e)
            if step.given.end:
                return

    def plan(self, step: _Step, rest: str) -> Plan:
        """How a sequence's request is run."""
        request, face, chosen = step.request, step.face, step.chosen
        texts = face.texts
        packed = _packed(face, request)
        if packed is not None:
            return Plan(step.reply, inputs=(packed[0], Sizes(1, packed[1])))
        inputs = wire.read_inputs(request, self._regions)
        if texts is not None and TEXT.name in inputs:
            rows = face.rows(inputs)
            if len(rows) > 1:
                raise InvalidInput("BAD_ROWS", f"{len(rows)} texts in one request of a sequence; send one", expected=1, got=len(rows))
            step.chosen = chosen or (texts.outputs, _NOWHERE)
            return texts.turn(rows[0], rest, step.reply_texts)
        return Plan(step.reply, inputs=(inputs, check(face.model.bundle.graph, inputs, 1)))

    def _response(
        self, id: str, parameters: bytes, face: Face, wanted: Listed[Tensor], places: Mapping[str, Place], outputs: Values
    ) -> bytes:
        """A serialised ModelInferResponse. Raises InvalidInput where shared memory is too small for an output."""
        if not places:
            return wire.response(face.head, parameters, id, wanted, outputs)
        response = pb.ModelInferResponse(id=id)
        wire.share_outputs(response, wanted, outputs, places, self._regions)
        return face.head + parameters + response.SerializeToString()

    def _face(self, model: Model) -> Face:
        face = self._faces.get(model.engine)
        if face is None:
            face = Face(model)
            live = {m.engine for m in self._catalog.models()}
            self._faces = {**{engine: f for engine, f in self._faces.items() if engine in live}, model.engine: face}
        return face


class _Step(Turn):
    """One request of a sequence: a turn of the session behind it."""

    __slots__ = ("answer", "chosen", "face", "given", "id", "inference", "request")

    def __init__(
        self, inference: Inference, request: pb.ModelInferRequest, given: Parameters, face: Face, chosen: Chosen | None, answer: Asked,
        id: str,
    ) -> None:  # fmt: skip
        super().__init__(given.claim(answer, lasting=True))
        self.inference = inference
        self.request = request
        self.given = given
        self.face = face
        self.chosen = chosen
        self.answer = answer
        self.id = id

    def digest(self) -> bytes:
        """Of what it brings, where it is numbered."""
        return _digest(self.request)

    def brought(self, model: Model, rest: str) -> Plan:
        return self.inference.plan(self, rest)

    def reply(self, outputs: Outputs, ran: Sequence) -> bytes:
        texts = self.face.texts
        return self.reply_texts(outputs if self.chosen is None or texts is None else texts.more(outputs), ran)

    def reply_texts(self, outputs: Values, ran: Sequence) -> bytes:
        wanted, places = self.chosen or (self.face.own, _NOWHERE)
        echo = pb.ModelInferResponse()
        echo.parameters["sequence_id"].CopyFrom(self.request.parameters["sequence_id"])
        parameters = echo.SerializeToString() + wire.told(ran)
        return self.inference._response(self.request.id, parameters, self.face, wanted, places, outputs)

    def told(self, reply: bytes | ServeError) -> None:
        refused = isinstance(reply, ServeError)
        try:
            if self.given.end and not refused:  # before the answer: after it, its caller may begin the id anew
                self.inference.end(self.id, self.answer.caller)
        finally:
            try:
                if isinstance(reply, ServeError):
                    self.answer.fail(reply)
                else:
                    self.answer.done_bytes(reply)
            finally:
                if self.given.end:
                    self.inference.ended(self.id)


class _UsualStep(_Step):
    """The same, of a request whose form is known."""

    __slots__ = ("echo", "name", "raw", "usual")

    def __init__(
        self, inference: Inference, usual: Usual, name: bytes, echo: bytes, raw: tuple[bytes, ...], answer: Asked, id: str
    ) -> None:
        Turn.__init__(self, usual.given.claim(answer, lasting=True))
        self.inference = inference
        self.usual = usual
        self.given = usual.given
        self.face = usual.face
        self.name = name
        self.echo = echo
        self.raw = raw
        self.answer = answer
        self.id = id

    def brought(self, model: Model, rest: str) -> Plan:
        return Plan(self.reply, inputs=(self.raw, self.usual.sizes))

    def reply(self, outputs: Outputs, ran: Sequence) -> bytes:
        return self.usual.response(self.name, self.echo + wire.told(ran), outputs)


def _packed(face: Face, request: pb.ModelInferRequest) -> tuple[tuple[bytes, ...], int] | None:
    """One row's inputs as they came, and its steps, where a request is of the usual form: raw, one row, all in order."""
    graph = face.model.bundle.graph
    sent, raw = request.inputs, request.raw_input_contents
    if graph.packed is None or len(raw) != len(graph.inputs) or len(sent) != len(raw):
        return None
    if any(t.parameters or t.HasField("contents") for t in sent):
        return None
    steps, packed = wire.read_packed(graph, sent, raw)
    return None if packed is None else (packed, steps)


def _shares(request: pb.ModelInferRequest) -> bool:
    return any(REGION in t.parameters for tensors in (request.inputs, request.outputs) for t in tensors)


def _digest(request: pb.ModelInferRequest) -> bytes:
    """What a request brings; sent again it may be given another id, the reply has the first one's."""
    unnamed = pb.ModelInferRequest()
    unnamed.CopyFrom(request)
    unnamed.ClearField("id")
    return hashlib.blake2b(unnamed.SerializeToString(deterministic=True), digest_size=16, person=b"infer").digest()
