"""The sequence extension: START, END, ids of numbers and texts; sync, stream, asyncio."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import tritonclient.grpc.aio as triton_aio

from tests.conformance.case import PATIENCE, Server, case, number, refused, same

GONE = ("INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION")  # Triton says INVALID_ARGUMENT to all that has no START


def _fresh() -> int:
    """An id that no other case uses."""
    return uuid.uuid4().int >> 66  # below 2**62


@case("simple_sequence")
def a_sequence(server: Server) -> None:
    """The first request has START, the last END; the state in between is the sequence's own."""
    id = _fresh()
    same([server.step("simple_sequence", v, id, v == 10, v == 13) for v in range(10, 14)], [11, 11, 12, 13])


@case("simple_accumulate")
def state_is_carried(server: Server) -> None:
    """Each answer follows from all requests before."""
    id = _fresh()
    same([server.step("simple_accumulate", v, id, v == 1, v == 5) for v in range(1, 6)], [1, 3, 6, 10, 15])


@case("simple_accumulate")
def ids_of_text(server: Server) -> None:
    """An id may be a text."""
    id = str(uuid.uuid4())
    same([server.step("simple_accumulate", v, id, v == 1, v == 3) for v in (1, 2, 3)], [1, 3, 6])


@case("simple_accumulate")
def sequences_apart(server: Server) -> None:
    """Sequences that take turns know nothing of each other."""
    ids: list[int | str] = [_fresh(), str(uuid.uuid4()), _fresh()]
    seen = [[server.step("simple_accumulate", (at + 1) * v, id, v == 1, v == 3) for at, id in enumerate(ids)] for v in (1, 2, 3)]
    same(seen, [[1, 2, 3], [3, 6, 9], [6, 12, 18]])


@case("simple_accumulate")
def the_same_id_of_two_models(server: Server) -> None:
    """An id is a model's: another model's sequence of that id is another."""
    id = _fresh()
    server.step("simple_accumulate", 5, id, start=True)
    same(server.step("simple_sequence", 1, id, start=True, end=True), 2)
    same(server.step("simple_accumulate", 5, id, end=True), 10)


@case("simple_accumulate")
def no_start(server: Server) -> None:
    """A sequence that was never begun is refused."""
    with refused(*GONE):
        server.step("simple_accumulate", 1, _fresh())


@case("simple_accumulate")
def after_the_end(server: Server) -> None:
    """What comes after END is refused."""
    id = _fresh()
    server.step("simple_accumulate", 1, id, start=True)
    server.step("simple_accumulate", 1, id, end=True)
    with refused(*GONE):
        server.step("simple_accumulate", 1, id)


@case("simple_accumulate")
def start_and_end_at_once(server: Server) -> None:
    """A sequence of one request; afterwards it is over, and its id may begin anew."""
    id = _fresh()
    same(server.step("simple_accumulate", 4, id, start=True, end=True), 4)
    with refused(*GONE):
        server.step("simple_accumulate", 1, id)
    same(server.step("simple_accumulate", 5, id, start=True, end=True), 5)


@case("simple_accumulate")
def start_again(server: Server) -> None:
    """START under a live id begins anew."""
    id = _fresh()
    server.step("simple_accumulate", 4, id, start=True)
    same(server.step("simple_accumulate", 5, id, start=True), 5)
    same(server.step("simple_accumulate", 5, id, end=True), 10)


@case("simple_accumulate")
def a_fault_amid_a_sequence(server: Server) -> None:
    """A refused request changes nothing: the sequence goes on."""
    id = _fresh()
    server.step("simple_accumulate", 4, id, start=True)
    with refused("INVALID_ARGUMENT"):
        server.client.infer("simple_accumulate", [], sequence_id=id)
    same(server.step("simple_accumulate", 5, id, end=True), 9)


@case("simple_accumulate")
def sent_ahead_on_a_stream(server: Server) -> None:
    """Requests of many sequences sent without waiting, on one stream, are answered in each sequence's order."""
    ids: list[int | str] = [_fresh() if at % 2 else str(uuid.uuid4()) for at in range(8)]
    values = range(1, 33)
    with server.stream() as (client, came):
        for value in values:
            for at, id in enumerate(ids):
                client.async_stream_infer(
                    "simple_accumulate", [number(value)], request_id=f"{at}", sequence_id=id, sequence_start=value == 1,
                    sequence_end=value == values[-1],
                )  # fmt: skip
        seen: dict[str, list[int]] = {str(at): [] for at in range(8)}
        for _ in range(8 * len(values)):
            result = came.get(timeout=PATIENCE)
            if isinstance(result, Exception):
                raise result
            seen[result.get_response().id].append(int(result.as_numpy("OUTPUT").item()))
    same(seen, {str(at): [v * (v + 1) // 2 for v in values] for at in range(8)})


@case("simple_accumulate")
def on_a_stream_and_off_it(server: Server) -> None:
    """A sequence is not a stream's: it goes on over unary calls, and outlives the stream."""
    id = _fresh()
    with server.stream() as (client, came):
        client.async_stream_infer("simple_accumulate", [number(1)], sequence_id=id, sequence_start=True)
        same(int(came.get(timeout=PATIENCE).as_numpy("OUTPUT").item()), 1)
    same(server.step("simple_accumulate", 2, id, end=True), 3)


@case("simple_accumulate")
def asyncio_stream(server: Server) -> None:
    """Sequences on a stream through tritonclient.grpc.aio."""
    id = _fresh()

    async def requests() -> AsyncIterator[dict[str, Any]]:
        for value in (1, 2, 3):
            yield {
                "model_name": "simple_accumulate", "inputs": [number(value)], "sequence_id": id, "sequence_start": value == 1,
                "sequence_end": value == 3,
            }  # fmt: skip

    async def ask() -> list[int]:
        async with triton_aio.InferenceServerClient(server.url) as client:
            seen = []
            async for result, error in client.stream_infer(requests(), stream_timeout=PATIENCE):
                if error:
                    raise error
                seen.append(int(result.as_numpy("OUTPUT").item()))
            return seen

    same(asyncio.run(ask()), [1, 3, 6])
