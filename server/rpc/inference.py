"""inference.GRPCInferenceService: the Open Inference Protocol's core. Wire in, one call, wire out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from protos import inference_pb2 as pb
from server import VERSION
from server.catalog import Catalog
from server.errors import InvalidInput, NotFound, listed
from server.rpc import wire
from server.rpc.answer import Answer, Desk
from server.rpc.front import Method
from server.sequence import Outputs, Sequence

SERVICE = "inference.GRPCInferenceService"


class Inference:
    def __init__(self, catalog: Catalog, ready: Callable[[], bool]) -> None:
        self._catalog = catalog
        self._ready = ready

    def methods(self, desk: Desk) -> Mapping[str, Method]:
        return {
            f"/{SERVICE}/ServerLive": desk.unary(pb.ServerLiveRequest, lambda _, answer: answer.done(pb.ServerLiveResponse(live=True))),
            f"/{SERVICE}/ServerReady": desk.unary(pb.ServerReadyRequest, self.server_ready),
            f"/{SERVICE}/ModelReady": desk.unary(pb.ModelReadyRequest, self.model_ready),
            f"/{SERVICE}/ServerMetadata": desk.unary(pb.ServerMetadataRequest, self.server_metadata),
            f"/{SERVICE}/ModelMetadata": desk.unary(pb.ModelMetadataRequest, self.model_metadata),
            f"/{SERVICE}/ModelInfer": desk.unary(pb.ModelInferRequest, self.infer),
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
        answer.done(pb.ServerMetadataResponse(name="seqserve", version=VERSION, extensions=()))

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

    def infer(self, request: pb.ModelInferRequest, answer: Answer) -> None:
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

        def then(sequence: Sequence, outputs: Outputs) -> None:
            response = pb.ModelInferResponse(model_name=model.name, model_version=model.version, id=request.id)
            response.parameters["queue_us"].int64_param = int(sequence.queued * 1e6)
            response.parameters["run_us"].int64_param = int(sequence.run * 1e6)
            response.parameters["rounds"].int64_param = sequence.rounds
            wire.write_outputs(response, ((t, outputs[t.name]) for t in chosen))
            answer.done(response)

        sequence = model.tensors.start(wire.read_inputs(request), then, answer.fail, answer.deadline)
        answer.cancel_by(lambda: model.engine.cancel(sequence))
