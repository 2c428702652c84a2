"""Tasks over HTTP, /v1: texts and series in and out. JSON in, one call, JSON out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Any

from starlette.responses import Response
from starlette.routing import BaseRoute

from web import bodies, endpoint, sessions, sse
from web.endpoint import Asked, Endpoint, written


async def models(asked: Asked) -> Response:
    listed = await asked.client.models(timeout=asked.timeout)
    infos = [bodies.ModelInfo(m.name, m.version, m.kind, m.ready, dict(m.facts), m.fingerprint) for m in listed]
    return written(bodies.ModelsReply(infos))


async def classify(asked: Asked) -> Response:
    body = asked.json(bodies.ClassifyBody)
    done = await asked.client.classify(body.texts, body.model, body.version, timeout=asked.timeout)
    one, labels = done[0], list(map(bodies.label, done))
    return written(bodies.ClassifyReply(results=labels, model=one.model, version=one.version, timing=bodies.timing(one.timing)))


async def tag(asked: Asked) -> Response:
    body = asked.json(bodies.TagBody)
    texts: list[Any] = list(body.texts)  # the client's own types tell a list of texts from one of words
    done = await asked.client.tag(texts, body.model, body.version, timeout=asked.timeout)
    one, found = done[0], list(map(bodies.tagged, done))
    return written(bodies.TagReply(results=found, model=one.model, version=one.version, timing=bodies.timing(one.timing)))


async def translate(asked: Asked) -> Response:
    b = asked.json(bodies.TranslateBody)
    wishes = (b.text, b.source, b.target, b.beam, b.max_tokens, b.attention, b.model, b.version)
    if not asked.accepts(sse.MEDIA):
        return written(bodies.translated(await asked.client.translate(*wishes, timeout=asked.timeout)))
    pieces = asked.client.translate_stream(*wishes, timeout=asked.timeout)
    return await _streamed(pieces, lambda p: None if p.token is None else ("token", bodies.token(p.token)), bodies.translated)


async def generate(asked: Asked) -> Response:
    b = asked.json(bodies.GenerateBody)
    wishes = (b.text, b.temperature, b.top_k, b.seed, b.max_symbols, b.stop, b.model, b.version)
    if not asked.accepts(sse.MEDIA):
        return written(bodies.generate_reply(await asked.client.generate(*wishes, timeout=asked.timeout)))
    pieces = asked.client.generate_stream(*wishes, timeout=asked.timeout)
    return await _streamed(pieces, lambda p: None if p.symbol is None else ("symbol", bodies.symbol(p.symbol)), bodies.generate_reply)


async def _streamed(
    pieces: AsyncGenerator[Any, None], part: Callable[[Any], tuple[str, bodies.Token] | None], whole: Callable[[Any], Any]
) -> Response:
    """An answer in pieces as events: each with its token, under the name that `part` gives it, and at last the whole."""

    async def source() -> AsyncGenerator[sse.Event, None]:
        try:
            async for piece in pieces:
                if (named := part(piece)) is not None:
                    yield named[0], bodies.Piece(piece.text, named[1])
                elif piece.done is not None:
                    yield "done", whole(piece.done)
        finally:
            await pieces.aclose()

    return await sse.events(source())


async def forecast(asked: Asked) -> Response:
    body = asked.json(bodies.ForecastBody)
    observations = bodies.series(body.observations)
    done = await asked.client.forecast(observations, body.horizon, body.quantiles, body.model, body.version, timeout=asked.timeout)
    return written(bodies.forecast_reply(done))


ENDPOINTS = (
    Endpoint(
        method="GET", path="/v1/models", run=models, tag="tasks", summary="What the server serves, every version of it",
        gives=bodies.ModelsReply, refusals=(),
    ),
    Endpoint(
        method="POST", path="/v1/classify", run=classify, tag="tasks", summary="Label texts",
        takes=bodies.ClassifyBody, gives=bodies.ClassifyReply,
    ),
    Endpoint(
        method="POST", path="/v1/tag", run=tag, tag="tasks", summary="Find spans, such as names, in texts",
        takes=bodies.TagBody, gives=bodies.TagReply,
    ),
    Endpoint(
        method="POST", path="/v1/translate", run=translate, tag="tasks", summary="Translate a text, whole or token by token",
        takes=bodies.TranslateBody, gives=bodies.TranslateReply, streams={"token": bodies.Piece, "done": bodies.TranslateReply},
    ),
    Endpoint(
        method="POST", path="/v1/generate", run=generate, tag="tasks", summary="Go on with a text, whole or symbol by symbol",
        takes=bodies.GenerateBody, gives=bodies.GenerateReply, streams={"symbol": bodies.Piece, "done": bodies.GenerateReply},
    ),
    Endpoint(
        method="POST", path="/v1/forecast", run=forecast, tag="tasks", summary="Continue a series, with quantiles",
        takes=bodies.ForecastBody, gives=bodies.ForecastReply,
    ),
    *sessions.ENDPOINTS,
)  # fmt: skip


def routes() -> list[BaseRoute]:
    return endpoint.routes(ENDPOINTS)
