"""Plain inference: sync, async, asyncio; typed and raw contents; BYTES; batches; requested outputs; parameters."""

from __future__ import annotations

import asyncio
import queue
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import deserialize_bytes_tensor

from tests.conformance.case import PATIENCE, Array, Server, case, check_sums, pair, request, same, tensor


@case("simple")
def sync_infer(server: Server) -> None:
    """A request is answered, with its id, the model's name and its version."""
    inputs, total, difference = pair()
    result = server.client.infer("simple", inputs, request_id="a request")
    check_sums(result, total, difference)
    response = result.get_response()
    same((response.model_name, response.model_version, response.id), ("simple", "1", "a request"))


@case("simple")
def async_infer(server: Server) -> None:
    """Many requests at once are each answered with their own answer."""
    came: queue.SimpleQueue[tuple[int, Any, Any]] = queue.SimpleQueue()
    asked = {}
    for rows in range(1, 9):
        inputs, *asked[rows] = pair(rows)
        server.client.async_infer("simple", inputs, lambda result, error, rows=rows: came.put((rows, result, error)))
    for _ in asked:
        rows, result, error = came.get(timeout=PATIENCE)
        if error:
            raise error
        check_sums(result, *asked[rows])


@case("simple")
def asyncio_infer(server: Server) -> None:
    """The same through tritonclient.grpc.aio."""

    async def ask() -> None:
        async with triton_aio.InferenceServerClient(server.url) as client:
            same(await client.is_server_live(), True)
            asked = [pair(rows) for rows in range(1, 9)]
            results = await asyncio.gather(*(client.infer("simple", inputs) for inputs, _, _ in asked))
            for result, (_, total, difference) in zip(results, asked, strict=True):
                check_sums(result, total, difference)

    asyncio.run(ask())


@case("simple")
def a_version(server: Server) -> None:
    """A version may be named."""
    inputs, total, difference = pair()
    check_sums(server.client.infer("simple", inputs, model_version="1"), total, difference)


@case("simple")
def a_batch(server: Server) -> None:
    """Several rows in one request come back as several rows."""
    inputs, total, difference = pair(8)
    check_sums(server.client.infer("simple", inputs), total, difference)


@case("simple")
def requested_outputs(server: Server) -> None:
    """Only the outputs asked for come back, in the order asked for."""
    inputs, total, difference = pair()
    one = server.client.infer("simple", inputs, outputs=[triton.InferRequestedOutput("OUTPUT1")])
    same([o.name for o in one.get_response().outputs], ["OUTPUT1"])
    same(one.as_numpy("OUTPUT1"), difference)
    both = server.client.infer("simple", inputs, outputs=[triton.InferRequestedOutput(f"OUTPUT{i}") for i in (1, 0)])
    check_sums(both, total, difference)


@case("simple")
def inputs_in_any_order(server: Server) -> None:
    """Tensors go by their names."""
    inputs, total, difference = pair()
    check_sums(server.client.infer("simple", inputs[::-1]), total, difference)


@case("simple")
def typed_contents(server: Server) -> None:
    """int_contents instead of raw bytes."""
    asked = pb.ModelInferRequest(model_name="simple")
    for at, value in (("INPUT0", 7), ("INPUT1", 3)):
        given = asked.inputs.add(name=at, datatype="INT32", shape=[1, 16])
        given.contents.int_contents[:] = [value] * 16
    response = server.stub.ModelInfer(asked, timeout=PATIENCE)
    same(_numbers(response, "OUTPUT0", np.int32, "int_contents"), [10] * 16)


@case("simple_int8")
def typed_contents_of_small_integers(server: Server) -> None:
    """INT8 travels in int_contents."""
    asked = pb.ModelInferRequest(model_name="simple_int8")
    for at, value in (("INPUT0", -100), ("INPUT1", 3)):
        given = asked.inputs.add(name=at, datatype="INT8", shape=[1, 16])
        given.contents.int_contents[:] = [value] * 16
    response = server.stub.ModelInfer(asked, timeout=PATIENCE)
    same(_numbers(response, "OUTPUT0", np.int8, "int_contents"), [-97] * 16)


@case("simple_int8")
def raw_small_integers(server: Server) -> None:
    """INT8, raw."""
    inputs, total, difference = pair(2, np.int8, "INT8")
    check_sums(server.client.infer("simple_int8", inputs), total, difference)


@case("simple_string")
def typed_bytes(server: Server) -> None:
    """bytes_contents: texts of numbers in, texts of their sums out."""
    asked = pb.ModelInferRequest(model_name="simple_string")
    for at, value in (("INPUT0", b"7"), ("INPUT1", b"3")):
        given = asked.inputs.add(name=at, datatype="BYTES", shape=[1, 16])
        given.contents.bytes_contents[:] = [value] * 16
    response = server.stub.ModelInfer(asked, timeout=PATIENCE)
    place = [o.name for o in response.outputs].index("OUTPUT0")
    if response.raw_output_contents:
        texts = list(deserialize_bytes_tensor(response.raw_output_contents[place]))
    else:
        texts = list(response.outputs[place].contents.bytes_contents)
    same(texts, [b"10"] * 16)


@case("simple_string")
def raw_bytes(server: Server) -> None:
    """BYTES of several lengths, raw: each with its length before it."""
    one, other = np.array([[str(i * i).encode() for i in range(16)]], object), np.array([[b"100"] * 16], object)
    result = server.client.infer("simple_string", [tensor("INPUT0", one, "BYTES"), tensor("INPUT1", other, "BYTES")])
    same([int(t) for t in result.as_numpy("OUTPUT0").ravel()], [i * i + 100 for i in range(16)])


@case("simple_identity")
def any_text(server: Server) -> None:
    """Texts come back as they went: empty ones, long ones, with a zero inside, in any script."""
    texts = ["", "a", "he\0llo", "日本語", "x" * 10_000, "ö" * 100, *map(str, range(10))]
    given = np.array([[t.encode() for t in texts]], object)
    result = server.client.infer("simple_identity", [tensor("INPUT0", given, "BYTES")])
    same(list(result.as_numpy("OUTPUT0").ravel()), list(given.ravel()))


@case("simple")
def priority_and_timeout(server: Server) -> None:
    """The parameters priority and timeout (microseconds) are understood; one with ample time is answered."""
    inputs, total, difference = pair()
    check_sums(server.client.infer("simple", inputs, priority=1, timeout=30_000_000), total, difference)


@case("simple")
def parameters_of_ones_own(server: Server) -> None:
    """Parameters that nobody knows do no harm."""
    inputs, total, difference = pair()
    check_sums(server.client.infer("simple", inputs, parameters={"mine": "text", "number": 3, "flag": True}), total, difference)


@case("simple")
def compression(server: Server) -> None:
    """Messages may be compressed."""
    inputs, total, difference = pair(8)
    for how in ("gzip", "deflate"):
        check_sums(server.client.infer("simple", inputs, compression_algorithm=how), total, difference)


@case("simple")
def headers(server: Server) -> None:
    """Metadata of a caller's own does no harm."""
    inputs, total, difference = pair()
    check_sums(server.client.infer("simple", inputs, headers={"test": "1"}), total, difference)


@case("simple")
def unchanged_by_neighbours(server: Server) -> None:
    """An answer is the same bytes, whoever else asks at the time."""
    alone = server.client.infer("simple", pair(3)[0]).get_response().raw_output_contents
    others = [server.stub.ModelInfer.future(request(rows), timeout=PATIENCE) for rows in (1, 2, 3, 5) * 8]
    for at, call in enumerate(others):
        if at % 4 == 2:
            same(list(call.result().raw_output_contents), list(alone))
        call.result()


def _numbers(response: Any, name: str, dtype: type, typed: str) -> list[int]:
    """An output's values, raw or typed: the protocol allows either."""
    at = [o.name for o in response.outputs].index(name)
    if response.raw_output_contents:
        values: Array = np.frombuffer(response.raw_output_contents[at], dtype)
        return [int(v) for v in values]
    return [int(v) for v in getattr(response.outputs[at].contents, typed)]
