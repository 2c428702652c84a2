"""The OpenAPI 3.1 document, from the tables that make the routes: what is served is what it says. At /openapi.json."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from importlib import metadata
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from web import problems, sse
from web.endpoint import JSON, TIMEOUT, Endpoint
from web.problems import ProblemBody
from web.rest import HEAD

PATH = "/openapi.json"
BYTES = "application/octet-stream"
REFERENCE = "#/components/schemas/{name}"

ALWAYS = (400, 401, 403, 408, 413, 421, 429, 431, 500, 502, 503, 504)
"""What any request may be answered with: keys, origins and hosts, slow or large requests, a busy or absent server."""

SAYS: Mapping[int, str] = {
    400: "The request can't be served as it is; `detail` says what is allowed.",
    401: "No key of this server came along.",
    403: "Not with this key, or not from a page of this origin.",
    404: "No such model, session or version; `detail` names what exists.",
    406: "The answer can't be written in the form that was asked for.",
    408: "The request did not arrive in time.",
    409: "Not in the state that things are in: another turn is next, the id is taken.",
    410: "The session has ended; `reason` says how.",
    413: "More than is taken at once.",
    415: "A content type or coding that is not known here.",
    421: "For another host.",
    429: "Too busy, or over a quota: again after Retry-After.",
    431: "More headers than are taken.",
    500: "The server's own fault.",
    501: "This server, or as it was started, has no such thing.",
    502: "The server behind answered with something that can't be read.",
    503: "No server there, or it is starting or draining: again after Retry-After.",
    504: "No answer within the time that was allowed.",
}


def document(endpoints: Sequence[Endpoint], longest: float) -> dict[str, Any]:
    """The whole document, as JSON values. `longest`: seconds that a caller may allow a request."""
    types: list[Any] = [ProblemBody]
    for e in endpoints:
        types += [t for t in (e.takes, e.gives, *(e.streams or {}).values()) if t is not None]
    schemas, components = msgspec.json.schema_components(types, ref_template=REFERENCE)
    known = dict(zip(map(_key, types), schemas, strict=True))
    _one_input(components["TurnBody"])
    paths: dict[str, dict[str, Any]] = {}
    for e in endpoints:
        paths.setdefault(e.path, {})[e.method.lower()] = _operation(e, known)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "seqserve",
            "version": metadata.version("seqserve"),
            "summary": "ONNX models that remember, over HTTP.",
            "description": "/v1: tasks and sessions. /v2: the Open Inference Protocol.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "tags": [
            {"name": "tasks", "description": "Texts and series in and out."},
            {"name": "sessions", "description": "State that stays on the server between requests, advanced in numbered turns."},
            {"name": "Open Inference Protocol", "description": "Version 2 with Triton's extensions: tensors in and out."},
        ],
        "security": [{}, {"bearer": []}, {"key": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
            "responses": {str(status): _refusal(status, known) for status in sorted({*SAYS})},
            "parameters": {"timeout": _timeout(longest)},
        },
    }


def _timeout(longest: float) -> dict[str, Any]:
    return {
        "name": TIMEOUT,
        "in": "header",
        "required": False,
        "description": "Seconds that the server may take.",
        "schema": {"type": "number", "exclusiveMinimum": 0, "maximum": longest},
    }


def _operation(e: Endpoint, known: Mapping[str, Any]) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"{(\w+)}", e.path)
    ]
    for q in e.query:
        kind = {"type": "integer", "minimum": 0, "maximum": 1000} if q.kind is int else {"type": "string"}
        parameters.append({"name": q.name, "in": "query", "required": False, "description": q.says, "schema": kind})
    made: dict[str, Any] = {
        "operationId": _named(e),
        "tags": [e.tag],
        "summary": e.summary,
        "parameters": [*parameters, {"$ref": "#/components/parameters/timeout"}],
        "responses": {str(e.status): _success(e, known)},
    }
    statuses = {*ALWAYS, *e.refusals} | ({415} if e.method == "POST" else set())
    for status in sorted(statuses):
        made["responses"][str(status)] = {"$ref": f"#/components/responses/{status}"}
    if e.takes is not None:
        content: dict[str, Any] = {JSON: {"schema": known[_key(e.takes)]}}
        if e.binary:
            content[BYTES] = {"schema": {"type": "string", "description": f"JSON of {HEAD} bytes, then the inputs' binary data, in order."}}
        made["requestBody"] = {"required": not e.optional, "content": content}
    elif e.takes_bytes:
        made["requestBody"] = {"required": True, "content": {BYTES: {"schema": {"type": "string"}}}}
    return made


def _success(e: Endpoint, known: Mapping[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if e.gives_bytes or e.binary:
        content[BYTES] = {"schema": {"type": "string"}}
    if e.gives is not None:
        content[JSON] = {"schema": known[_key(e.gives)]}
    if e.streams:
        said = "Events, each with JSON as its data: `x-events` has the schema of each kind."
        shapes = {name: known[_key(kind)] for name, kind in {**e.streams, "error": ProblemBody}.items()}  # OpenAPI 3.1 has no word for it
        content[sse.MEDIA] = {"schema": {"type": "string", "description": said}, "x-events": shapes}
    headers = {"location": {"schema": {"type": "string"}}} if e.status == 201 else {}
    return {"description": HTTPStatus(e.status).phrase, "content": content, **({"headers": headers} if headers else {})}


def _refusal(status: int, known: Mapping[str, Any]) -> dict[str, Any]:
    schema = known[_key(ProblemBody)]
    made: dict[str, Any] = {"description": SAYS[status], "content": {problems.MEDIA: {"schema": schema}, JSON: {"schema": schema}}}
    if status in (429, 503):
        made["headers"] = {"retry-after": {"schema": {"type": "string"}, "description": "Whole seconds; `retry_after` is exact."}}
    return made


def _one_input(turn: dict[str, Any]) -> None:
    """What a type can't say: one of four."""
    turn["oneOf"] = [{"required": [name]} for name in ("text", "observations", "generate", "tensors")]


def _named(e: Endpoint) -> str:
    words = [re.sub(r"\W", "", part) for part in e.path.split("/") if part]
    return "_".join((e.method.lower(), *words))


def _key(kind: Any) -> str:
    return repr(kind)


def routes(endpoints: Sequence[Endpoint], longest: float) -> list[BaseRoute]:
    written = msgspec.json.encode(document(endpoints, longest))

    async def answer(request: Request) -> Response:
        return Response(written, media_type=JSON)

    return [Route(PATH, answer, methods=["GET"])]
