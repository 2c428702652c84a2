"""A server without models: it answers every call of the API with something simple, and fails on request.

`python -m tests.fakes --port-file FILE` is one in a process of its own, which takes the arguments of the real one.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2

from protos import inference_pb2 as oip
from protos import seqserve_pb2 as pb
from protos import sessions_pb2 as live

CHANNELS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
QUANTILES = (0.1, 0.5, 0.9)
HOLD = "hold"  # a text whose streamed translation never goes on after its first token
BREAK = "break"  # one whose streamed translation fails there

Failure = tuple[grpc.StatusCode, str, bytes]


def failure(code: grpc.StatusCode, message: str, reason: str = "", retry: float | None = None, **facts: str) -> Failure:
    """An error as the server sends it, with google.rpc.Status details."""
    status = Status(code=code.value[0], message=message)
    details: list[Message] = [ErrorInfo(reason=reason, domain="seqserve", metadata=facts)] if reason else []
    if retry is not None:
        delay = Duration()
        delay.FromNanoseconds(int(retry * 1e9))
        details.append(RetryInfo(retry_delay=delay))
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return code, message, status.SerializeToString()


@dataclass
class Kept:
    """A session of the fake: what its turns brought, and what they were answered."""

    info: live.SessionInfo
    brought: list[live.TurnRequest] = field(default_factory=list)
    replies: list[live.TurnReply] = field(default_factory=list)


def abort(context: grpc.ServicerContext, why: Failure) -> NoReturn:
    code, message, details = why
    context.set_trailing_metadata((("grpc-status-details-bin", details),))
    context.abort(code, message)


class Refused(Exception):
    """A session's call that is refused."""

    def __init__(self, why: Failure) -> None:
        self.why = why


class Fake:
    """What the server was asked, and what it shall answer next."""

    def __init__(self) -> None:
        self.failures: list[Failure] = []  # given to the next calls, one each
        self.replies: dict[str, bytes] = {}  # by method: this instead of the answer
        self.calls: list[str] = []  # methods, in order of arrival
        self.requests: list[Message] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.left: list[float | None] = []  # seconds that each call still had
        self.gone = threading.Event()  # a caller left a translation that was held
        self.sessions: dict[str, Kept] = {}
        self.busy: list[int] = []  # turns that a stream refuses once, to be sent again
        self.port = 0

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def note(self, method: str, request: Message, context: grpc.ServicerContext) -> None:
        self.calls.append(method)
        self.requests.append(request)
        self.metadata.append({item[0]: item[1] for item in context.invocation_metadata()})
        self.left.append(context.time_remaining())
        if self.failures:
            abort(context, self.failures.pop(0))

    def classify(self, request: pb.ClassifyRequest) -> pb.ClassifyReply:
        reply = pb.ClassifyReply(model=pb.Model(name="sentiment", version="1"), timing=pb.Timing(queue=0.001, run=0.002, rounds=3))
        for text in request.texts:
            good = 0.0625 if "bad" in text else 0.9375
            scores = [pb.LabelScore(label="negative", score=1 - good), pb.LabelScore(label="positive", score=good)]
            best = max(scores, key=lambda s: s.score)
            reply.results.add(label=best.label, score=best.score, scores=scores, tokens=len(text.split()))
        return reply

    def translate(self, request: pb.TranslateRequest) -> pb.TranslateReply:
        """Every word in capitals; each looked at the word it comes from."""
        words = request.text.split()
        said = words[: request.max_tokens or None]
        reply = pb.TranslateReply(
            model=pb.Model(name="en-de", version="1"), text=" ".join(said).upper(), score=-0.5, source_tokens=words, ended=said == words
        )
        for at, word in enumerate(said):
            weights = [float(at == other) for other in range(len(words))] if request.attention else []
            reply.tokens.add(piece=word.upper(), log_probability=-0.5, attention=weights)
        return reply

    def translate_stream(self, request: pb.TranslateRequest, context: grpc.ServicerContext) -> Iterator[pb.TranslatePiece]:
        whole = self.translate(request)
        if request.text.startswith(HOLD) and not context.add_callback(self.gone.set):
            self.gone.set()  # the caller has left already
        for at, token in enumerate(whole.tokens):
            yield pb.TranslatePiece(text=token.piece if at == 0 else " " + token.piece, token=token)
            if request.text.startswith(HOLD):
                self.gone.wait(60)
                return
            if request.text.startswith(BREAK):
                context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        yield pb.TranslatePiece(done=whole)

    def forecast(self, request: pb.ForecastRequest) -> pb.ForecastReply:
        """The last step goes on; quantiles lie around it."""
        channels, horizon = request.observations.channels, request.horizon or 24
        last = list(request.observations.values[-channels:])
        names = CHANNELS if channels == len(CHANNELS) else tuple(f"c{i}" for i in range(channels))
        reply = pb.ForecastReply(model=pb.Model(name="ett", version="2"), channels=names)
        reply.mean.CopyFrom(pb.Series(channels=channels, values=last * horizon))
        for q in request.quantiles or QUANTILES:
            reply.quantiles.add(quantile=q, series=pb.Series(channels=channels, values=[v + q - 0.5 for v in last] * horizon))
        return reply

    def models(self, request: pb.ModelsRequest) -> pb.ModelsReply:
        reply = pb.ModelsReply()
        reply.models.add(name="sentiment", version="1", kind="classify", ready=True, facts={"labels": "negative,positive"})
        reply.models.add(name="en-de", version="1", kind="translate", ready=True, facts={"languages": "en-de"})
        for version in ("1", "2"):
            facts = {"channels": ",".join(CHANNELS), "lookback": "96", "horizon": "24"}
            reply.models.add(name="ett", version=version, kind="forecast", ready=True, facts=facts, fingerprint="sha256:0")
        return reply

    def open(self, request: live.OpenRequest) -> live.SessionInfo:
        if request.session in self.sessions:
            raise Refused(failure(grpc.StatusCode.FAILED_PRECONDITION, "it is open", "SESSION_EXISTS", turn="0"))
        version = request.model.version or "1"
        info = live.SessionInfo(session=request.session, model=pb.Model(name=request.model.name, version=version), ttl=request.ttl or 3600)
        self.sessions[request.session] = Kept(info)
        return info

    def find(self, id: str) -> Kept:
        if id not in self.sessions:
            raise Refused(failure(grpc.StatusCode.NOT_FOUND, f"there is no session {id!r}", "UNKNOWN_SESSION", session=id))
        return self.sessions[id]

    def get(self, request: live.SessionName) -> live.SessionInfo:
        return self.find(request.session).info

    def listed(self, request: live.ListRequest) -> live.ListReply:
        after = [self.sessions[id].info for id in sorted(self.sessions) if id > request.after]
        return live.ListReply(sessions=after[: request.limit or 1000], total=len(self.sessions))

    def fork(self, request: live.ForkRequest) -> live.SessionInfo:
        old = self.find(request.session)
        info = live.SessionInfo(
            session=request.fork, model=old.info.model, turn=old.info.turn, acknowledged=old.info.turn, ttl=old.info.ttl
        )
        self.sessions[request.fork] = Kept(info, list(old.brought), list(old.replies))
        return info

    def close(self, request: live.SessionName) -> live.SessionInfo:
        kept = self.find(request.session)
        del self.sessions[request.session]
        return kept.info

    def turn(self, request: live.TurnRequest) -> live.TurnReply:
        """Text is classified with all before it, a series goes on from its last step, tensors come back."""
        kept = self.find(request.session)
        if request.turn > kept.info.turn + 1:
            raise Refused(failure(grpc.StatusCode.FAILED_PRECONDITION, "that leaves a gap", "GAP", turn=str(kept.info.turn)))
        kept.info.acknowledged = max(kept.info.acknowledged, request.acknowledged)
        if request.turn == kept.info.turn + 1:
            reply = live.TurnReply(session=request.session, turn=request.turn, timing=pb.Timing(queue=0.001, run=0.002, rounds=3))
            match request.WhichOneof("input"):
                case "text":
                    text = "".join(t.text for t in kept.brought) + request.text
                    reply.classification.CopyFrom(self.classify(pb.ClassifyRequest(texts=[text])).results[0])
                case "observations":
                    reply.forecast.CopyFrom(self.forecast(pb.ForecastRequest(observations=request.observations)))
                case _:
                    reply.tensors.CopyFrom(request.tensors)
            kept.brought.append(request)
            kept.replies.append(reply)
            kept.info.turn = request.turn
        return kept.replies[request.turn - 1]

    def infer(self, request: oip.ModelInferRequest) -> oip.ModelInferResponse:
        """Every input comes back under its own name, or those that are asked for."""
        wanted = [o.name for o in request.outputs] or [i.name for i in request.inputs]
        reply = oip.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
        for name, value in request.parameters.items():
            reply.parameters[name].CopyFrom(value)
        reply.parameters["queue_us"].int64_param = 1500
        reply.parameters["run_us"].int64_param = 2500
        reply.parameters["rounds"].int64_param = 4
        for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
            if tensor.name in wanted:
                reply.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
                reply.raw_output_contents.append(raw)
        return reply

    def model_metadata(self, request: oip.ModelMetadataRequest) -> oip.ModelMetadataResponse:
        reply = oip.ModelMetadataResponse(name=request.name, versions=["1"], platform="onnx", properties={"task": "classify"})
        reply.inputs.add(name="tokens", datatype="INT64", shape=[-1, -1])
        reply.inputs.add(name="words", datatype="BYTES", shape=[-1])
        reply.outputs.add(name="scores", datatype="FP32", shape=[-1, 2])
        return reply

    def health(self, request: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckResponse:
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


@contextmanager
def serving(port: int = 0) -> Iterator[Fake]:
    """A fake that serves while the block runs."""
    fake = Fake()

    def unary(method: str, kind: type[Message], answer: Callable[[Any], Message]) -> grpc.RpcMethodHandler[Any, Any]:
        def handle(request: Message, context: grpc.ServicerContext) -> bytes:
            fake.note(method, request, context)
            try:
                return fake.replies.get(method) or answer(request).SerializeToString()
            except Refused as e:
                abort(context, e.why)

        return grpc.unary_unary_rpc_method_handler(handle, kind.FromString, None)

    def stream(request: pb.TranslateRequest, context: grpc.ServicerContext) -> Iterator[bytes]:
        fake.note("TranslateStream", request, context)
        for piece in fake.translate_stream(request, context):
            yield piece.SerializeToString()

    def turns(requests: Iterator[live.TurnsRequest], context: grpc.ServicerContext) -> Iterator[bytes]:
        refused = 0  # the turn of this stream that was; those behind it are too, whatever other streams do meanwhile
        for request in requests:
            fake.note("Turns", request, context)
            (turn,) = request.turns
            reply = live.TurnReply(session=turn.session, turn=turn.turn)
            try:
                if refused and turn.turn > refused:
                    raise Refused(failure(grpc.StatusCode.FAILED_PRECONDITION, "the one before was refused", "GAP", turn=str(refused)))
                refused = 0
                if turn.turn in fake.busy:
                    refused = turn.turn
                    fake.busy.remove(turn.turn)
                    reply.refusal.MergeFrom(live.Refusal(code=8, message="full", reason="QUEUE_FULL", retry_after=0.25))
                else:
                    reply = fake.turn(turn)
            except Refused as e:
                code, message, _ = e.why
                reply.refusal.MergeFrom(live.Refusal(code=code.value[0], message=message, reason="GAP"))
            yield live.TurnsReply(turns=[reply]).SerializeToString()

    tasks = {
        "Classify": unary("Classify", pb.ClassifyRequest, fake.classify),
        "Translate": unary("Translate", pb.TranslateRequest, fake.translate),
        "TranslateStream": grpc.unary_stream_rpc_method_handler(stream, pb.TranslateRequest.FromString, None),
        "Forecast": unary("Forecast", pb.ForecastRequest, fake.forecast),
        "Models": unary("Models", pb.ModelsRequest, fake.models),
    }
    sessions = {
        "Open": unary("Open", live.OpenRequest, fake.open),
        "Turn": unary("Turn", live.TurnRequest, lambda r: fake.turn(r)),
        "Turns": grpc.stream_stream_rpc_method_handler(turns, live.TurnsRequest.FromString, None),
        "Get": unary("Get", live.SessionName, fake.get),
        "List": unary("List", live.ListRequest, fake.listed),
        "Fork": unary("Fork", live.ForkRequest, fake.fork),
        "Close": unary("Close", live.SessionName, fake.close),
    }
    inference = {
        "ServerLive": unary("ServerLive", oip.ServerLiveRequest, lambda _: oip.ServerLiveResponse(live=True)),
        "ServerReady": unary("ServerReady", oip.ServerReadyRequest, lambda _: oip.ServerReadyResponse(ready=True)),
        "ModelReady": unary("ModelReady", oip.ModelReadyRequest, lambda r: oip.ModelReadyResponse(ready=r.name == "ett")),
        "ServerMetadata": unary(
            "ServerMetadata", oip.ServerMetadataRequest, lambda _: oip.ServerMetadataResponse(name="fake", version="0", extensions=["x"])
        ),
        "ModelMetadata": unary("ModelMetadata", oip.ModelMetadataRequest, fake.model_metadata),
        "ModelInfer": unary("ModelInfer", oip.ModelInferRequest, fake.infer),
    }
    health = {"Check": unary("Check", health_pb2.HealthCheckRequest, fake.health)}
    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
    for service, methods in (
        ("seqserve.v1.Tasks", tasks),
        ("seqserve.v1.Sessions", sessions),
        ("inference.GRPCInferenceService", inference),
        ("grpc.health.v1.Health", health),
    ):
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, methods),))
    fake.port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield fake
    finally:
        fake.gone.set()
        server.stop(None).wait()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port-file", type=Path, required=True)
    parser.add_argument("--exit", type=int, default=0)
    parser.add_argument("--refuse", action="store_true")
    options, _ = parser.parse_known_args(argv)
    if options.refuse:
        print("no bundles here")
        return 3
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    with serving() as fake:
        part = options.port_file.with_suffix(".part")
        part.write_text(str(fake.port))
        part.rename(options.port_file)
        stop.wait()
    return int(options.exit)


if __name__ == "__main__":
    sys.exit(main())
