"""The calls that go on with a text: as values, like those in `wire`. This file must not know channels, time or retries."""

from __future__ import annotations

import math
from collections.abc import Sequence

from protos import seqserve_pb2 as pb
from seqserve import errors, results, wire


def generate(
    text: str, temperature: float, top_k: int, seed: int | None, max_symbols: int, stop: Sequence[str], model: str, version: str
) -> wire.Call[results.Generation]:
    asked = request(text, temperature, top_k, seed, max_symbols, stop, model, version).SerializeToString()
    return wire.Call(wire.TASKS + "Generate", asked, lambda raw: generated(wire.parse(pb.GenerateReply, raw)))


def generate_stream(
    text: str, temperature: float, top_k: int, seed: int | None, max_symbols: int, stop: Sequence[str], model: str, version: str
) -> wire.Call[results.GenerationPiece]:
    def read(raw: bytes) -> results.GenerationPiece:
        piece = wire.parse(pb.GeneratePiece, raw)
        if piece.HasField("done"):
            return results.GenerationPiece(piece.text, None, generated(piece.done))
        return results.GenerationPiece(piece.text, _symbol(piece.token), None)

    asked = request(text, temperature, top_k, seed, max_symbols, stop, model, version).SerializeToString()
    return wire.Call(wire.TASKS + "GenerateStream", asked, read)


def request(
    text: str, temperature: float, top_k: int, seed: int | None, max_symbols: int, stop: Sequence[str], model: str = "", version: str = ""
) -> pb.GenerateRequest:
    """A call's message, or what a session's turn brings. Raises InvalidInput for what can't travel."""
    if seed is not None and not 0 <= seed < 2**64:
        raise errors.invalid(f"seed is {seed}: it can't be below 0 or above {2**64 - 1}")
    if isinstance(stop, str):
        raise errors.invalid(f"stop must be a list of texts: write [{stop!r}]")
    if not math.isfinite(temperature):
        raise errors.invalid(f"temperature is {temperature}: it must be a number")
    return pb.GenerateRequest(
        model=wire.model_named(model, version) if model or version else None,
        text=wire.string("text", text),
        temperature=temperature,
        top_k=wire.count("top_k", top_k),
        seed=seed,
        max_symbols=wire.count("max_symbols", max_symbols),
        stop=[wire.string(f"stop[{i}]", s) for i, s in enumerate(stop)],
    )


def generated(reply: pb.GenerateReply, model: str = "", version: str = "", timing: results.Timing | None = None) -> results.Generation:
    """A call's reply, or a turn's, which names no model and whose timing stands beside it."""
    return results.Generation(
        reply.text,
        tuple(map(_symbol, reply.tokens)),
        reply.seed,
        reply.ended,
        reply.read,
        reply.unknown,
        reply.model.name or model,
        reply.model.version or version,
        timing or wire.read_timing(reply.timing),
    )


def _symbol(token: pb.Token) -> results.Symbol:
    return results.Symbol(token.piece, token.log_probability)
