"""The Open Inference Protocol's REST face, /v2, with Triton's extensions: what tritonclient.http and KServe's REST client call.

Each request is one call of the server's gRPC face; what JSON and binary bodies are in its messages is in `oip.py`.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import zlib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from google.protobuf.message import Message
from msgspec import Meta, Struct
from starlette.responses import Response
from starlette.routing import BaseRoute

from protos import inference_pb2 as pb
from seqserve import inference, wire
from web import endpoint, oip, problems
from web.endpoint import CODINGS, JSON, Asked, Endpoint, decoded, written
from web.problems import Problem

HEAD = "inference-header-content-length"
MOST_AT_ONCE = 64 << 10  # bytes: more is compressed in a thread, since callers of live sessions wait for this one
WORTH = 256  # bytes: less is sent as it is
M = TypeVar("M", bound=Message)
T = TypeVar("T")


async def _ask(asked: Asked, method: str, request: Message, reply: type[M]) -> M:
    call = wire.Call(inference.SERVICE + method, request.SerializeToString(), lambda raw: wire.parse(reply, raw))
    return await asked.client.call(call, timeout=asked.timeout)


MEDIA = frozenset({JSON, "application/octet-stream", "application/x-www-form-urlencoded"})
"""What bodies may say they are. The last is what curl says of any `-d`, in the protocol's own examples."""


def _check_media(asked: Asked) -> None:
    media = asked.headers.get("content-type", JSON).split(";")[0].strip().lower()
    if media not in MEDIA:
        raise Problem(415, "NOT_JSON", f"the body is {media[:80]!r}: send {JSON}", headers={"accept-post": JSON})


def _json(asked: Asked, kind: type[T]) -> T:
    """A body that may be left out where its type needs nothing."""
    _check_media(asked)
    return decoded(asked.body or b"{}", kind)


# Health and metadata


async def live(asked: Asked) -> Response:
    if not await asked.client.live(timeout=asked.timeout):
        raise Problem(503, "NOT_LIVE", "no server answers behind this face", retry_after=problems.BUSY)
    return written({"live": True})


async def ready(asked: Asked) -> Response:
    if not await asked.client.ready(timeout=asked.timeout):
        raise Problem(503, "NOT_READY", "the server is not there, or does not serve all its models yet", retry_after=problems.BUSY)
    return written({"ready": True})


async def model_ready(asked: Asked) -> Response:
    name = asked.named("model")
    if not await asked.client.model_ready(name, asked.named("version"), timeout=asked.timeout):
        raise Problem(404, "NOT_READY", f"model {name!r} can't be called now, or is none")  # by the protocol, 4xx is false
    return written({"name": name, "ready": True})


async def server_metadata(asked: Asked) -> Response:
    reply = await _ask(asked, "ServerMetadata", pb.ServerMetadataRequest(), pb.ServerMetadataResponse)
    extensions = [*reply.extensions, "binary_tensor_data"]  # the last is HTTP's, and ours
    return written({"name": reply.name, "version": reply.version, "extensions": extensions})


async def model_metadata(asked: Asked) -> Response:
    request = pb.ModelMetadataRequest(name=asked.named("model"), version=asked.named("version"))
    return written(oip.plain(await _ask(asked, "ModelMetadata", request, pb.ModelMetadataResponse)))


async def model_config(asked: Asked) -> Response:
    request = pb.ModelConfigRequest(name=asked.named("model"), version=asked.named("version"))
    return written(oip.plain((await _ask(asked, "ModelConfig", request, pb.ModelConfigResponse)).config))


async def statistics(asked: Asked) -> Response:
    request = pb.ModelStatisticsRequest(name=asked.named("model"), version=asked.named("version"))
    return written(oip.plain(await _ask(asked, "ModelStatistics", request, pb.ModelStatisticsResponse)))


# Inference


async def infer(asked: Asked) -> Response:
    _check_media(asked)
    head = _head(asked)
    given = oip.Inference(wire.string("model", asked.named("model")), asked.named("version"), asked.body, head)
    reply = await _ask(asked, "ModelInfer", given.message, pb.ModelInferResponse)
    body, json = given.written(reply)
    headers = {} if json is None else {HEAD: str(json)}
    coding = _coding(asked)
    if coding and len(body) >= WORTH:
        headers["content-encoding"] = coding
        body = await asyncio.to_thread(deflated, body, coding) if len(body) > MOST_AT_ONCE else deflated(body, coding)
    headers["vary"] = "accept-encoding"
    return Response(body, headers=headers, media_type=JSON if json is None else "application/octet-stream")


def _head(asked: Asked) -> int | None:
    """Bytes of JSON before binary data; None where all is JSON."""
    given = asked.headers.get(HEAD)
    if given is None:
        return None
    if not (given.isascii() and given.isdecimal() and len(given) < 19 and int(given) <= len(asked.body)):
        raise problems.bad("BAD_HEADER", f"{HEAD} is {given[:40]!r}: how many of the body's {len(asked.body)} bytes are JSON")
    return int(given)


def _coding(asked: Asked) -> str:
    """The first coding that the caller accepts and we know; "" for none."""
    for part in asked.headers.get("accept-encoding", "").lower().split(","):
        name, _, quality = part.partition(";")
        if name.strip() in CODINGS and quality.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000"):
            return name.strip()
    return ""


def deflated(body: bytes, coding: str) -> bytes:
    deflate = zlib.compressobj(1, zlib.DEFLATED, CODINGS[coding])  # 1: floats shrink by a tenth at most, whatever it costs
    return deflate.compress(body) + deflate.flush()


# Models


class IndexBody(Struct):
    ready: Annotated[bool, Meta(description="Only those that can be called.")] = False


class RepositoryBody(Struct):
    parameters: dict[str, oip.Parameter] = {}


async def index(asked: Asked) -> Response:
    body = _json(asked, IndexBody)
    request = pb.RepositoryIndexRequest(repository_name=asked.named("repository"), ready=body.ready)
    reply = await _ask(asked, "RepositoryIndex", request, pb.RepositoryIndexResponse)
    return written([oip.plain(m) for m in reply.models])


async def load(asked: Asked) -> Response:
    body = _json(asked, RepositoryBody)
    request = pb.RepositoryModelLoadRequest(repository_name=asked.named("repository"), model_name=asked.named("model"))
    for name, value in body.parameters.items():
        oip.set_parameter(name, value, request.parameters[name])
    await _ask(asked, "RepositoryModelLoad", request, pb.RepositoryModelLoadResponse)
    return written({})


async def unload(asked: Asked) -> Response:
    body = _json(asked, RepositoryBody)
    request = pb.RepositoryModelUnloadRequest(repository_name=asked.named("repository"), model_name=asked.named("model"))
    for name, value in body.parameters.items():
        oip.set_parameter(name, value, request.parameters[name])
    await _ask(asked, "RepositoryModelUnload", request, pb.RepositoryModelUnloadResponse)
    return written({})


# Settings

LogSettings = dict[str, bool | Annotated[int, Meta(ge=0, le=2**32 - 1)] | str]
TraceSettings = dict[str, str | list[str] | None]


async def logging(asked: Asked) -> Response:
    request = pb.LogSettingsRequest()
    given = _json(asked, LogSettings) if asked.body else {}
    for name, value in given.items():
        setting = request.settings[name]
        match value:
            case bool():
                setting.bool_param = value
            case int():
                setting.uint32_param = value
            case str():
                setting.string_param = value
    reply = await _ask(asked, "LogSettings", request, pb.LogSettingsResponse)
    return written({name: getattr(s, s.WhichOneof("parameter_choice") or "string_param") for name, s in sorted(reply.settings.items())})


async def tracing(asked: Asked) -> Response:
    request = pb.TraceSettingRequest(model_name=asked.named("model"))
    given = _json(asked, TraceSettings) if asked.body else {}
    for name, value in given.items():
        request.settings[name].value.extend([] if value is None else [value] if isinstance(value, str) else value)
    reply = await _ask(asked, "TraceSetting", request, pb.TraceSettingResponse)
    return written({name: list(s.value) for name, s in sorted(reply.settings.items())})


# Shared memory


class SystemRegion(Struct):
    key: str
    byte_size: Annotated[int, Meta(ge=0)]
    offset: Annotated[int, Meta(ge=0)] = 0


class Handle(Struct):
    b64: str


class CudaRegion(Struct):
    raw_handle: Handle
    byte_size: Annotated[int, Meta(ge=0)]
    device_id: int = 0


async def system_status(asked: Asked) -> Response:
    request = pb.SystemSharedMemoryStatusRequest(name=asked.named("region"))
    return _regions((await _ask(asked, "SystemSharedMemoryStatus", request, pb.SystemSharedMemoryStatusResponse)).regions)


async def system_register(asked: Asked) -> Response:
    given = _json(asked, SystemRegion)
    request = pb.SystemSharedMemoryRegisterRequest(name=asked.named("region"), key=given.key)
    request.byte_size, request.offset = _sized("byte_size", given.byte_size), _sized("offset", given.offset)
    await _ask(asked, "SystemSharedMemoryRegister", request, pb.SystemSharedMemoryRegisterResponse)
    return written({})


async def system_unregister(asked: Asked) -> Response:
    _check_media(asked)
    request = pb.SystemSharedMemoryUnregisterRequest(name=asked.named("region"))
    await _ask(asked, "SystemSharedMemoryUnregister", request, pb.SystemSharedMemoryUnregisterResponse)
    return written({})


async def cuda_status(asked: Asked) -> Response:
    request = pb.CudaSharedMemoryStatusRequest(name=asked.named("region"))
    return _regions((await _ask(asked, "CudaSharedMemoryStatus", request, pb.CudaSharedMemoryStatusResponse)).regions)


async def cuda_register(asked: Asked) -> Response:
    given = _json(asked, CudaRegion)
    try:
        handle = base64.b64decode(given.raw_handle.b64, validate=True)
    except (binascii.Error, ValueError):
        raise problems.bad("BAD_BODY", "raw_handle is not base64") from None
    request = pb.CudaSharedMemoryRegisterRequest(name=asked.named("region"), raw_handle=handle)
    request.byte_size, request.device_id = _sized("byte_size", given.byte_size), _sized("device_id", given.device_id)
    await _ask(asked, "CudaSharedMemoryRegister", request, pb.CudaSharedMemoryRegisterResponse)
    return written({})


async def cuda_unregister(asked: Asked) -> Response:
    _check_media(asked)
    request = pb.CudaSharedMemoryUnregisterRequest(name=asked.named("region"))
    await _ask(asked, "CudaSharedMemoryUnregister", request, pb.CudaSharedMemoryUnregisterResponse)
    return written({})


def _regions(regions: Mapping[str, Message]) -> Response:
    return written([oip.plain(region) for _, region in sorted(regions.items())])


def _sized(name: str, value: int) -> int:
    if not 0 <= value < 2**63:
        raise problems.bad("BAD_BODY", f"{name} is {value}: from 0, and below 2^63")
    return value


# The table


class Live(Struct):
    live: bool


class Ready(Struct):
    ready: bool


class ModelReady(Struct):
    name: str
    ready: bool


class ServerMetadata(Struct):
    name: str
    version: str
    extensions: list[str]


class TensorMetadata(Struct):
    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(Struct):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class Indexed(Struct):
    name: str
    version: str
    state: str
    reason: str


Settings = dict[str, Any]
_TAG = "Open Inference Protocol"
_MODEL = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")


def _get(path: str, run: Any, summary: str, gives: Any, refusals: tuple[int, ...] = ()) -> Endpoint:
    return Endpoint(method="GET", path=path, run=run, tag=_TAG, summary=summary, gives=gives, refusals=refusals)


def _post(path: str, run: Any, summary: str, gives: Any, takes: Any, refusals: tuple[int, ...] = (400, 404)) -> Endpoint:
    return Endpoint(
        method="POST", path=path, run=run, tag=_TAG, summary=summary, gives=gives, takes=takes, optional=True, refusals=refusals
    )


def _endpoints() -> list[Endpoint]:
    listed = [
        _get("/v2", server_metadata, "What the server says of itself", ServerMetadata),
        _get("/v2/health/live", live, "Whether a server is there", Live),
        _get("/v2/health/ready", ready, "Whether it serves all its models", Ready),
        _get("/v2/models/stats", statistics, "What was counted of all models", Settings),
        _post("/v2/repository/index", index, "Every version of every model on disk", list[Indexed], IndexBody),
        _post("/v2/repository/{repository}/index", index, "The same of a named repository: there is none", list[Indexed], IndexBody),
        _get("/v2/logging", logging, "What the server logs", Settings),
        _post("/v2/logging", logging, "Change what the server logs", Settings, LogSettings, (400, 501)),
        _get("/v2/trace/setting", tracing, "What the server traces: nothing", Settings),
        _post("/v2/trace/setting", tracing, "Nothing can be traced", Settings, TraceSettings, (400, 501)),
        _get("/v2/models/{model}/trace/setting", tracing, "What is traced of a model: nothing", Settings),
        _post("/v2/models/{model}/trace/setting", tracing, "Nothing can be traced", Settings, TraceSettings, (400, 501)),
    ]
    for path in _MODEL:
        version = "" if path == _MODEL[0] else ", one version"
        listed += [
            _get(path, model_metadata, f"The tensors of a model{version}", ModelMetadata, (404,)),
            _get(f"{path}/ready", model_ready, f"Whether a model can be called{version}", ModelReady, (404,)),
            _get(f"{path}/config", model_config, f"How a model is called and batched{version}", Settings, (404,)),
            _get(f"{path}/stats", statistics, f"What was counted of a model{version}", Settings, (404,)),
            Endpoint(
                method="POST", path=f"{path}/infer", run=infer, tag=_TAG, summary=f"Run a model on tensors or texts{version}",
                takes=oip.InferBody, gives=oip.InferReply, binary=True, refusals=(400, 404, 406, 409, 501),
            ),
        ]  # fmt: skip
    for path in ("/v2/repository/models/{model}", "/v2/repository/{repository}/models/{model}"):
        listed += [
            _post(f"{path}/load", load, "Serve what is on disk of a model", Settings, RepositoryBody),
            _post(f"{path}/unload", unload, "Serve a model no more", Settings, RepositoryBody),
        ]
    for kind, status, register, unregister, region in (
        ("system", system_status, system_register, system_unregister, SystemRegion),
        ("cuda", cuda_status, cuda_register, cuda_unregister, CudaRegion),
    ):
        base = f"/v2/{kind}sharedmemory"
        listed += [
            _get(f"{base}/status", status, "Registered regions", list[Settings], (501,)),
            _get(f"{base}/region/{{region}}/status", status, "One registered region", list[Settings], (404, 501)),
            _post(f"{base}/region/{{region}}/register", register, "Register a region", Settings, region, (400, 404, 409, 501)),
            _post(f"{base}/region/{{region}}/unregister", unregister, "Forget a region", Settings, None, (400, 404, 501)),
            _post(f"{base}/unregister", unregister, "Forget all regions", Settings, None, (400, 501)),
        ]
    return listed


ENDPOINTS = tuple(_endpoints())


def routes() -> list[BaseRoute]:
    return endpoint.routes(ENDPOINTS)
