"""inference.GRPCInferenceService: the Open Inference Protocol's core. Wire in, one call, wire out."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Mapping

from google.protobuf.message import DecodeError, Message

from contract.bundle import Tensor
from protos import inference_pb2 as pb
from server import VERSION
from server.catalog import Catalog, Model
from server.errors import InvalidInput, NotFound, ServeError, listed
from server.inputs import check
from server.rpc import wire
from server.rpc.answer import Answer, Asked, Desk, malformed
from server.rpc.front import Call, Method, Receiver, stream
from server.sequence import Outputs, Sequence
from server.shelf import Shelf
from server.turns import Asked as Asked_
from server.turns import Plan, Turns

log = logging.getLogger(__name__)

SERVICE = "inference.GRPCInferenceService"
EXTENSIONS = ("sequence", "sequence(string_id)", "model_repository")


class Inference:
    def __init__(self, catalog: Catalog, shelf: Shelf, turns: Turns, ready: Callable[[], bool]) -> None:
        self._catalog = catalog
        self._shelf = shelf
        self._turns = turns
        self._ready = ready

    def methods(self, desk: Desk) -> Mapping[str, Method]:
        return {
            f"/{SERVICE}/ServerLive": desk.unary(pb.ServerLiveRequest, lambda _, answer: answer.done(pb.ServerLiveResponse(live=True))),
            f"/{SERVICE}/ServerReady": desk.unary(pb.ServerReadyRequest, self.server_ready),
            f"/{SERVICE}/ModelReady": desk.unary(pb.ModelReadyRequest, self.model_ready),
            f"/{SERVICE}/ServerMetadata": desk.unary(pb.ServerMetadataRequest, self.server_metadata),
            f"/{SERVICE}/ModelMetadata": desk.unary(pb.ModelMetadataRequest, self.model_metadata),
            f"/{SERVICE}/ModelInfer": desk.unary(pb.ModelInferRequest, self.infer),
            f"/{SERVICE}/ModelStreamInfer": stream(lambda call: _Stream(self, call, Answer(desk, call, call.method))),
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
        answer.done(pb.ServerMetadataResponse(name="seqserve", version=VERSION, extensions=EXTENSIONS))

    def model_metadata(self, request: pb.ModelMetadataRequest, answer: Answer) -> None:
        model = self._catalog.find(request.name, request.version)
        versions = [m.version for m in self._catalog.models() if m.name == model.name]
        response = pb.ModelMetadataResponse(name=model.name, versions=versions, platform="onnxruntime_onnx")
        for tensors, described in ((model.bundle.graph.data, response.inputs), (model.bundle.graph.outputs, response.outputs)):
            for t in tensors:
                described.add(name=t.name, datatype=wire.datatype(t), shape=wire.shape(t))
        response.properties["task"] = model.bundle.kind
        response.properties["fingerprint"] = model.bundle.fingerprint
        answer.done(response)

    def infer(self, request: pb.ModelInferRequest, answer: Asked) -> None:
        model = self._catalog.find(request.model_name, request.model_version)
        graph = model.bundle.graph
        chosen = graph.outputs
        if request.outputs:
            known = {t.name: t for t in graph.outputs}
            for output in request.outputs:
                if output.name not in known:
                    raise InvalidInput(
                        "UNKNOWN_OUTPUT", f"output {output.name!r} is not one of the model's: {listed(known)}", tensor=output.name,
                        expected=listed(known),
                    )  # fmt: skip
            chosen = tuple(known[output.name] for output in request.outputs)

        if "sequence_id" in request.parameters:
            self._step(request, model, chosen, answer)
            return

        def then(sequence: Sequence, outputs: Outputs) -> None:
            response = _response(request, model, chosen, outputs)
            response.parameters["queue_us"].int64_param = int(sequence.queued * 1e6)
            response.parameters["run_us"].int64_param = int(sequence.run * 1e6)
            response.parameters["rounds"].int64_param = sequence.rounds
            answer.done(response)

        sequence = model.tensors.start(wire.read_inputs(request), then, answer.fail, answer.deadline)
        answer.cancel_by(lambda: model.engine.cancel(sequence))

    def _step(self, request: pb.ModelInferRequest, model: Model, chosen: tuple[Tensor, ...], answer: Asked) -> None:
        """One request of a sequence, as the protocol's sequence extension has it: a turn of a session named by model and
        sequence_id. The parameter `turn` numbers it; then it may be sent again, and a gap is refused."""
        id = f"{model.name}/{_sequence_id(request)}"
        start, end = _flag(request, "sequence_start"), _flag(request, "sequence_end")
        turn = request.parameters["turn"].int64_param if "turn" in request.parameters else None
        if start and not (turn == 1 and self._shelf.lives(id)):  # the first turn sent again is no new start
            if self._shelf.lives(id):
                self._turns.close(id)
            self._shelf.open(model.name, model.version, id)

        def told(reply: bytes | ServeError) -> None:
            if isinstance(reply, ServeError):
                answer.fail(reply)
                return
            answer.done_bytes(reply)
            if end and self._shelf.lives(id):
                self._turns.close(id)

        def brought(model: Model, rest: str) -> Plan:
            inputs = wire.read_inputs(request)
            return Plan(
                lambda outputs: _response(request, model, chosen, outputs).SerializeToString(),
                inputs=(inputs, check(model.bundle.graph, inputs, 1)),
            )

        unnamed = pb.ModelInferRequest()
        unnamed.CopyFrom(request)
        unnamed.ClearField("id")  # a request sent again may be given another id; the reply has the first one's
        digest = hashlib.blake2b(unnamed.SerializeToString(deterministic=True), digest_size=16, person=b"infer").digest()
        self._turns.turn(id, turn, digest, Asked_(brought, told), None)


class _Stream(Receiver):
    """One ModelStreamInfer: requests in, responses and errors out."""

    def __init__(self, inference: Inference, call: Call, answer: Answer) -> None:
        self.call = call
        self._inference = inference
        self._answer = answer
        self._lock = threading.Lock()
        self._asked: set[_InStream] = set()  # requests not yet answered; workers and the front's thread come and go
        self._ended = False
        answer.cancel_by(self._gone)

    def on_message(self, message: bytes) -> None:
        try:
            request = pb.ModelInferRequest.FromString(message)
        except DecodeError:
            self.send(pb.ModelStreamInferResponse(error_message=malformed(pb.ModelInferRequest).message))
            return
        asked = _InStream(self, request)
        with self._lock:
            self._asked.add(asked)
        try:
            self._inference.infer(request, asked)
        except Exception as e:  # one request's fault must not end the stream
            asked.fail(e)

    def on_end(self) -> None:
        with self._lock:
            self._ended = True
            over = not self._asked
        if over:
            self._answer.done()

    def send(self, response: pb.ModelStreamInferResponse, asked: _InStream | None = None) -> None:
        """One response more; with the last one that is due, the stream ends."""
        self.call.reply(response.SerializeToString())
        with self._lock:
            if asked is None or asked not in self._asked:
                return
            self._asked.remove(asked)
            over = self._ended and not self._asked
        if over:
            self._answer.done()

    def _gone(self) -> None:
        with self._lock:
            asked, self._asked = self._asked, set()
        for a in asked:
            a.cancel()


class _InStream:
    """One request of a stream, to be answered once. Satisfies Asked."""

    def __init__(self, of: _Stream, request: pb.ModelInferRequest) -> None:
        self._of = of
        self._id = request.id
        self._mark_final = _flag(request, "triton_enable_empty_final_response")
        self.cancel: Callable[[], None] = lambda: None

    @property
    def deadline(self) -> float | None:
        return self._of.call.deadline

    def cancel_by(self, cancel: Callable[[], None]) -> None:
        self.cancel = cancel

    def done(self, message: Message) -> None:
        assert isinstance(message, pb.ModelInferResponse)
        if self._mark_final:
            message.parameters["triton_final_response"].bool_param = True
        self._of.send(pb.ModelStreamInferResponse(infer_response=message), self)

    def done_bytes(self, message: bytes) -> None:
        self.done(pb.ModelInferResponse.FromString(message))

    def fail(self, error: Exception) -> None:
        if not isinstance(error, ServeError):
            log.exception("a request of a stream failed", exc_info=error)
        message = (
            error.message if isinstance(error, ServeError) else "the server failed while it handled this request; its log has the reason"
        )
        response = pb.ModelStreamInferResponse(error_message=message)
        response.infer_response.id = self._id
        self._of.send(response, self)


def _response(request: pb.ModelInferRequest, model: Model, chosen: tuple[Tensor, ...], outputs: Outputs) -> pb.ModelInferResponse:
    response = pb.ModelInferResponse(model_name=model.name, model_version=model.version, id=request.id)
    if "sequence_id" in request.parameters:
        response.parameters["sequence_id"].CopyFrom(request.parameters["sequence_id"])
    wire.write_outputs(response, ((t, outputs[t.name]) for t in chosen))
    return response


def _flag(request: pb.ModelInferRequest, name: str) -> bool:
    return name in request.parameters and request.parameters[name].bool_param


def _sequence_id(request: pb.ModelInferRequest) -> str:
    """The id of a sequence, a number above 0 or a text. Raises InvalidInput."""
    given = request.parameters["sequence_id"]
    kind = given.WhichOneof("parameter_choice")
    id = str(getattr(given, kind)) if kind in ("int64_param", "uint64_param", "string_param") else ""
    if id in ("", "0"):
        raise InvalidInput("BAD_SEQUENCE_ID", "sequence_id must be a number above 0 or a text", got=id or str(kind))
    return id
