"""inference.GRPCInferenceService: calls by tensors and by texts. Wire in, one call, wire out."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Listed
from typing import Protocol

import numpy as np

from contract.bundle import Tensor
from protos import inference_pb2 as pb
from server import VERSION
from server.catalog import Catalog, Model
from server.config import Config
from server.engine import Engine
from server.errors import InvalidInput, NotFound, ServeError
from server.inputs import check
from server.rpc import model_config, parameters, wire
from server.rpc.answer import Answer, Asked, Desk
from server.rpc.face import TEXT, Face
from server.rpc.front import Method
from server.rpc.parameters import SERVICE, Parameters
from server.rpc.shared_memory import REGION, Place, Regions
from server.rpc.tasks import MOST_LETTERS
from server.rpc.wire import Values
from server.sequence import Outputs, Sequence
from server.shelf import Shelf
from server.turns import Asked as AskedTurn
from server.turns import Plan, Turns

EXTENSIONS = (
    "sequence", "sequence(string_id)", "model_repository", "schedule_policy", "model_configuration", "parameters", "statistics", "logging",
)  # fmt: skip

Chosen = tuple[Listed[Tensor], Mapping[str, Place]]  # outputs, and where in shared memory some of them go
_NOWHERE: Mapping[str, Place] = {}


class Pieces(Protocol):
    """Who asks for an answer in pieces: `last` says that no more will come."""

    def send(self, response: pb.ModelInferResponse) -> None: ...

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
        self._extensions = (*EXTENSIONS, "system_shared_memory") if regions.allowed else EXTENSIONS

    def methods(self, desk: Desk) -> Mapping[str, Method]:
        return {
            f"/{SERVICE}/ServerLive": desk.unary(pb.ServerLiveRequest, lambda _, answer: answer.done(pb.ServerLiveResponse(live=True))),
            f"/{SERVICE}/ServerReady": desk.unary(pb.ServerReadyRequest, self.server_ready),
            f"/{SERVICE}/ModelReady": desk.unary(pb.ModelReadyRequest, self.model_ready),
            f"/{SERVICE}/ServerMetadata": desk.unary(pb.ServerMetadataRequest, self.server_metadata),
            f"/{SERVICE}/ModelMetadata": desk.unary(pb.ModelMetadataRequest, self.model_metadata),
            f"/{SERVICE}/ModelConfig": desk.unary(pb.ModelConfigRequest, self.model_config),
            f"/{SERVICE}/ModelInfer": desk.unary(pb.ModelInferRequest, lambda r, answer: self.infer(r, parameters.read(r), answer)),
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

    def infer(self, request: pb.ModelInferRequest, given: Parameters, answer: Asked, pieces: Pieces | None = None) -> None:
        """Answer one request; through `pieces`, where they are wanted and the model gives some."""
        model = self._catalog.find(request.model_name, request.model_version)
        face = self._faces.get(model.engine) or self._face(model)
        chosen = face.chosen(request) if request.outputs else None
        if given.sequence:
            self._step(request, given, face, chosen, answer)
            return
        inputs = wire.read_inputs(request, self._regions)
        if face.texts is not None and TEXT.name in inputs:
            self._texts(request, given, face, chosen, face.rows(inputs), answer, pieces)
            return
        more = face.texts.more if chosen is not None and face.texts is not None else None
        wanted, places = chosen or (face.own, _NOWHERE)

        def then(sequence: Sequence, outputs: Outputs) -> None:
            try:
                response = self._response(request, given, model, wanted, places, outputs if more is None else more(outputs))
            except ServeError as e:  # shared memory that the outputs don't fit
                answer.fail(e)
                return
            response.parameters["queue_us"].int64_param = int(sequence.queued * 1e6)
            response.parameters["run_us"].int64_param = int(sequence.run * 1e6)
            response.parameters["rounds"].int64_param = sequence.rounds
            answer.done(response)

        sequence = model.tensors.start(inputs, then, answer.fail, given.deadline(answer.deadline))
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
        letters = sum(map(len, texts))
        if letters > MOST_LETTERS:
            message = f"{letters} letters in all; at most {MOST_LETTERS} are allowed in one call: send several"
            raise InvalidInput("TOO_LONG", message, expected=f"1..{MOST_LETTERS}", got=letters)
        deadline = given.deadline(answer.deadline)
        streamed = pieces if task.streams and len(texts) == 1 else None

        def said(outputs: Values) -> None:
            assert streamed is not None
            streamed.send(self._response(request, given, model, wanted, places, outputs))

        if streamed is not None and places:
            raise InvalidInput("PIECES_APART", "each piece would overwrite the one before: ask for outputs in the response itself")

        def done(results: list[Values]) -> None:
            if streamed is not None:
                streamed.last()
                return
            together = {t.name: np.concatenate([outputs[t.name] for outputs in results]) for t in wanted}
            try:
                response = self._response(request, given, model, wanted, places, together)
            except ServeError as e:
                answer.fail(e)
            else:
                answer.done(response)

        rows = _Rows(model.engine, len(texts), done, answer)
        answer.cancel_by(rows.cancel)
        try:
            for i, text in enumerate(texts):
                rows.begun(task.start(text, request, rows.put(i), rows.fail, said if streamed is not None else None, deadline))
        except ServeError as e:
            rows.fail(e)

    def _step(self, request: pb.ModelInferRequest, given: Parameters, face: Face, chosen: Chosen | None, answer: Asked) -> None:
        """One request of a sequence, as the protocol's sequence extension has it: a turn of a session named by model and
        sequence_id. A start on an id that lives ends what it was and begins anew. The parameter `turn` numbers a request; then it
        may be sent again, and a gap is refused."""
        model, turn = face.model, given.turn
        id = f"{model.name}/{given.sequence}"
        if turn is not None and _shares(request):
            raise InvalidInput("NOT_REPEATABLE", "a numbered request can be sent again, so it brings its bytes along: no shared memory")
        if given.start and not (turn == 1 and self._shelf.lives(id)):  # the first turn sent again is no new start
            if self._shelf.lives(id):
                self._turns.close(id)
            self._shelf.open(model.name, model.version, id)

        def told(reply: bytes | ServeError) -> None:
            if isinstance(reply, ServeError):
                answer.fail(reply)
                return
            try:
                if given.end and self._shelf.lives(id):  # before the answer: after it, its caller may begin the id anew
                    self._turns.close(id)
            finally:
                answer.done_bytes(reply)

        def brought(model: Model, rest: str) -> Plan:
            inputs = wire.read_inputs(request, self._regions)
            texts = face.texts
            if texts is not None and TEXT.name in inputs:
                rows = face.rows(inputs)
                if len(rows) > 1:
                    raise InvalidInput("BAD_ROWS", f"{len(rows)} texts in one request of a sequence; send one", expected=1, got=len(rows))
                seen, apart = chosen or (texts.outputs, _NOWHERE)
                return texts.turn(rows[0], rest, lambda o: self._response(request, given, model, seen, apart, o).SerializeToString())
            more = texts.more if chosen is not None and texts is not None else None
            wanted, places = chosen or (face.own, _NOWHERE)

            def reply(outputs: Outputs) -> bytes:
                known = outputs if more is None else more(outputs)
                return self._response(request, given, model, wanted, places, known).SerializeToString()

            return Plan(reply, inputs=(inputs, check(model.bundle.graph, inputs, 1)))

        self._turns.turn(id, turn, b"" if turn is None else _digest(request), AskedTurn(brought, told), None)

    def _response(
        self, request: pb.ModelInferRequest, given: Parameters, model: Model, wanted: Listed[Tensor], places: Mapping[str, Place],
        outputs: Values,
    ) -> pb.ModelInferResponse:  # fmt: skip
        response = pb.ModelInferResponse(model_name=model.name, model_version=model.version, id=request.id)
        if given.sequence:
            response.parameters["sequence_id"].CopyFrom(request.parameters["sequence_id"])
        if places:
            wire.share_outputs(response, wanted, outputs, places, self._regions)
        else:
            wire.write_outputs(response, wanted, outputs)
        return response

    def _face(self, model: Model) -> Face:
        face = self._faces.get(model.engine)
        if face is None:
            face = Face(model)
            live = {m.engine for m in self._catalog.models()}
            self._faces = {**{engine: f for engine, f in self._faces.items() if engine in live}, model.engine: face}
        return face


class _Rows:
    """The sequences of one request's texts: one answer when the last is done, one error for the first that fails."""

    def __init__(self, engine: Engine, count: int, done: Callable[[list[Values]], None], answer: Asked) -> None:
        self._engine = engine
        self._done = done
        self._answer = answer
        self._lock = threading.Lock()  # results come from several workers
        self._results: list[Values] = [{}] * count
        self._missing = count
        self._over = False
        self._sequences: list[Sequence] = []

    def begun(self, sequence: Sequence) -> None:
        with self._lock:
            self._sequences.append(sequence)
            over = self._over
        if over:
            self._engine.cancel(sequence)

    def put(self, at: int) -> Callable[[Sequence, Values], None]:
        def then(sequence: Sequence, outputs: Values) -> None:
            with self._lock:
                self._results[at] = outputs
                self._missing -= 1
                complete = self._missing == 0 and not self._over
            if complete:
                self._done(self._results)

        return then

    def fail(self, error: ServeError) -> None:
        with self._lock:
            first, self._over = not self._over, True
        if first:
            self.cancel()
            self._answer.fail(error)

    def cancel(self) -> None:
        with self._lock:
            self._over = True
            begun = list(self._sequences)
        for sequence in begun:
            self._engine.cancel(sequence)


def _shares(request: pb.ModelInferRequest) -> bool:
    return any(REGION in t.parameters for tensors in (request.inputs, request.outputs) for t in tensors)


def _digest(request: pb.ModelInferRequest) -> bytes:
    """What a request brings; sent again it may be given another id, the reply has the first one's."""
    unnamed = pb.ModelInferRequest()
    unnamed.CopyFrom(request)
    unnamed.ClearField("id")
    return hashlib.blake2b(unnamed.SerializeToString(deterministic=True), digest_size=16, person=b"infer").digest()
