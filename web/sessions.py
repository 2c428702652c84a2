"""Sessions over HTTP, /v1/sessions: exactly once, as over gRPC, since the caller numbers its turns.

A turn that was sent and not answered is sent again with its number and the same body: what was applied is answered with the same
bytes, what was not is applied now. So a client may retry any request here but Open without an id, and loses nothing by a connection
that breaks, this process or the server that is killed.
"""

from __future__ import annotations

from urllib.parse import quote

from msgspec import UNSET
from starlette.responses import Response

from protos import sessions_pb2 as pb
from seqserve import generation, results, turns, wire
from seqserve import sessions as calls
from web import bodies, problems, tensors
from web.endpoint import Asked, Endpoint, Query, written

LIMIT = 1000  # sessions that are listed at once, as the server has it
BYTES = "application/octet-stream"


def _info(info: results.SessionInfo, status: int = 200) -> Response:
    reply = bodies.session(info)
    return written(reply, status, {"location": f"/v1/sessions/{_segment(reply.session)}"} if status == 201 else None)


async def open(asked: Asked) -> Response:
    body = asked.json(bodies.OpenBody)
    wanted = calls.opening(body.model, body.version, body.session, body.ttl)
    return _info(await asked.client.call(wanted.call, timeout=asked.timeout), 201)


async def listed(asked: Asked) -> Response:
    request = pb.ListRequest(limit=_limit(asked), after=wire.string("after", asked.query("after")))

    def read(raw: bytes) -> bodies.SessionsReply:
        reply = wire.parse(pb.ListReply, raw)
        return bodies.SessionsReply([bodies.session(calls.info(i)) for i in reply.sessions], reply.total)

    call = wire.Call(turns.SERVICE + "List", request.SerializeToString(), read)
    reply = await asked.client.call(call, timeout=asked.timeout)
    return written(reply)


async def get(asked: Asked) -> Response:
    return _info(await asked.client.call(calls.get(asked.named("session")), timeout=asked.timeout))


async def close(asked: Asked) -> Response:
    return _info(await asked.client.call(calls.close(asked.named("session")), timeout=asked.timeout))


async def fork(asked: Asked) -> Response:
    body = asked.json(bodies.ForkBody, optional=True)
    call = calls.fork(asked.named("session"), calls.new_id(body.session))
    return _info(await asked.client.call(call, timeout=asked.timeout), 201)


async def export(asked: Asked) -> Response:
    body = asked.json(bodies.ExportBody, optional=True)
    exported = await asked.client.call(calls.export(asked.named("session"), body.move), timeout=asked.timeout)
    return Response(exported, media_type=BYTES)


async def bring(asked: Asked) -> Response:
    wanted = calls.bringing(asked.body, asked.query("session"))
    return _info(await asked.client.call(wanted.call, timeout=asked.timeout), 201)


async def turn(asked: Asked) -> Response:
    body = asked.json(bodies.TurnBody)
    id = asked.named("session")
    request = pb.TurnRequest(session=wire.string("session", id), turn=_counted("turn", body.turn))
    request.acknowledged = _counted("acknowledged", body.acknowledged)
    request.MergeFromString(brought(body))
    call = wire.Call(turns.SERVICE + "Turn", request.SerializeToString(), _answer, metadata=turns.metadata(id))
    reply = await asked.client.call(call, timeout=asked.timeout)
    return written(reply)


def brought(body: bodies.TurnBody) -> bytes:
    """What a turn brings, as part of a TurnRequest: the bytes that the Python client would send. Raises Problem or InvalidInput."""
    given = [name for name in ("text", "observations", "generate", "tensors") if getattr(body, name) is not UNSET]
    if len(given) != 1:
        has = " and ".join(given) or "none of them"
        raise problems.bad("BAD_BODY", f"a turn brings one of text, observations, generate, tensors; this one has {has}")
    if body.text is not UNSET:
        return turns.encode(body.text)
    if body.observations is not UNSET:
        return turns.encode(bodies.series(body.observations))
    if body.generate is not UNSET:
        w = body.generate
        return turns.generation(w.text, w.temperature, w.top_k, w.seed, w.max_symbols, w.stop)
    request = pb.TurnRequest(tensors=pb.Tensors())
    for t in body.tensors or ():
        raw = tensors.packed(t.name, t.datatype, t.shape, t.data)
        request.tensors.tensors.add(name=wire.string("name", t.name), datatype=t.datatype, shape=t.shape, data=raw)
    return request.SerializeToString(deterministic=True)


def _answer(raw: bytes) -> bodies.TurnReply:
    reply = wire.parse(pb.TurnReply, raw)
    answer = bodies.TurnReply(reply.session, reply.turn)
    match reply.WhichOneof("output"):
        case "classification":
            answer.classification = bodies.label(wire.classification(reply.classification, "", "", results.Timing()))
        case "forecast":
            answer.forecast = bodies.forecasted(wire.forecasted(reply.forecast, "", "", results.Timing()))
        case "generated":
            answer.generated = bodies.generated(generation.generated(reply.generated))
        case "tensors":
            answer.tensors = [bodies.tensor(t) for t in reply.tensors.tensors]
    return answer


def _counted(what: str, value: int) -> int:
    if not 0 <= value < 2**63:
        raise problems.bad("BAD_BODY", f"{what} is {value}: from 0, and below 2^63")
    return value


def _limit(asked: Asked) -> int:
    limit = asked.number("limit")
    if limit > LIMIT:
        raise problems.bad("BAD_QUERY", f"limit is {limit}: at most {LIMIT}")
    return limit


def _segment(id: str) -> str:
    return quote(id, safe="")


_NAMED = (400, 404, 409, 410)
ENDPOINTS = (
    Endpoint(
        method="POST", path="/v1/sessions", run=open, tag="sessions", summary="Open a session",
        takes=bodies.OpenBody, gives=bodies.SessionReply, status=201, refusals=(400, 404, 409),
    ),
    Endpoint(
        method="GET", path="/v1/sessions", run=listed, tag="sessions", summary="The open sessions, by id", gives=bodies.SessionsReply,
        query=(Query("limit", "At most so many; 0: 1,000.", int), Query("after", "From the first id after this one.")), refusals=(400,),
    ),
    Endpoint(
        method="POST", path="/v1/sessions/import", run=bring, tag="sessions", summary="Take a session up from the bytes of an export",
        takes_bytes=True, gives=bodies.SessionReply, status=201, query=(Query("session", "Its id here; left out, the one it had."),),
        refusals=_NAMED,
    ),
    Endpoint(
        method="GET", path="/v1/sessions/{session}", run=get, tag="sessions", summary="What the server has of a session",
        gives=bodies.SessionReply, refusals=_NAMED,
    ),
    Endpoint(
        method="DELETE", path="/v1/sessions/{session}", run=close, tag="sessions", summary="End a session",
        gives=bodies.SessionReply, refusals=_NAMED,
    ),
    Endpoint(
        method="POST", path="/v1/sessions/{session}/turns", run=turn, tag="sessions", summary="One numbered turn, applied exactly once",
        takes=bodies.TurnBody, gives=bodies.TurnReply, refusals=_NAMED,
    ),
    Endpoint(
        method="POST", path="/v1/sessions/{session}/fork", run=fork, tag="sessions", summary="Another session that goes on from here",
        takes=bodies.ForkBody, optional=True, gives=bodies.SessionReply, status=201, refusals=_NAMED,
    ),
    Endpoint(
        method="POST", path="/v1/sessions/{session}/export", run=export, tag="sessions", summary="A session as bytes, for an import",
        takes=bodies.ExportBody, optional=True, gives_bytes=True, refusals=_NAMED,
    ),
)  # fmt: skip
