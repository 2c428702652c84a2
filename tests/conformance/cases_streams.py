"""ModelStreamInfer: many requests on one stream, errors in-band, final responses, streams taken back."""

from __future__ import annotations

from typing import Any

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from tests.conformance.case import PATIENCE, Server, case, check_sums, pair, same, tensor


@case("simple")
def answered_each(server: Server) -> None:
    """Each request of a stream is answered once, with its id."""
    with server.stream() as (client, came):
        asked = {str(rows): pair(rows) for rows in range(1, 9)}
        for id, (inputs, _, _) in asked.items():
            client.async_stream_infer("simple", inputs, request_id=id)
        for _ in range(len(asked)):
            result = came.get(timeout=PATIENCE)
            if isinstance(result, Exception):
                raise result
            _, total, difference = asked.pop(result.get_response().id)
            check_sums(result, total, difference)
    same(came.empty(), True)


@case("simple")
def errors_in_band(server: Server) -> None:
    """A wrong request is answered by an error with its id in its place; the stream goes on."""
    inputs, total, difference = pair()
    with server.stream() as (client, came):
        client.async_stream_infer("simple", inputs[:1])
        client.async_stream_infer("no_such_model", inputs)
        client.async_stream_infer("simple", inputs, request_id="right")
        answers = [came.get(timeout=PATIENCE) for _ in range(3)]
    same(sorted(isinstance(a, InferenceServerException) for a in answers), [False, True, True])
    (right,) = (a for a in answers if not isinstance(a, InferenceServerException))
    same(right.get_response().id, "right")
    check_sums(right, total, difference)


@case("simple")
def errors_that_end_the_stream(server: Server) -> None:
    """With the header triton_grpc_error: true, a wrong request ends its stream with the status that a unary call would have."""
    with server.stream({"triton_grpc_error": "true"}) as (client, came):
        client.async_stream_infer("simple", pair()[0][:1])
        answer = came.get(timeout=PATIENCE)
    same(isinstance(answer, InferenceServerException), True)
    same(str(answer.status()), "StatusCode.INVALID_ARGUMENT")


@case("simple")
def final_responses(server: Server) -> None:
    """With enable_empty_final_response, the last response of a request says that it is."""
    with server.stream() as (client, came):
        client.async_stream_infer("simple", pair()[0], enable_empty_final_response=True)
        response = came.get(timeout=PATIENCE).get_response()
    same(response.parameters["triton_final_response"].bool_param, True)


@case("simple")
def streams_side_by_side(server: Server) -> None:
    """Streams know nothing of each other."""
    inputs, total, difference = pair()
    with server.stream() as (one, ones), server.stream() as (other, others):
        one.async_stream_infer("simple", inputs[:1])
        other.async_stream_infer("simple", inputs)
        check_sums(others.get(timeout=PATIENCE), total, difference)
        same(isinstance(ones.get(timeout=PATIENCE), InferenceServerException), True)


@case("simple")
def a_stream_taken_back(server: Server) -> None:
    """A stream that is cancelled with requests under way harms nothing."""
    came: list[Any] = []
    with triton.InferenceServerClient(server.url) as client:
        client.start_stream(lambda result, error: came.append(error or result))
        for _ in range(20):
            client.async_stream_infer("simple", pair()[0])
        client.stop_stream(cancel_requests=True)
    inputs, total, difference = pair()
    check_sums(server.client.infer("simple", inputs), total, difference)


@case("repeat_int32")
def many_responses_to_one_request(server: Server) -> None:
    """A decoupled model answers as often as it will; its configuration says so."""
    same(server.client.get_model_config("repeat_int32").config.model_transaction_policy.decoupled, True)
    inputs = [
        tensor("IN", np.arange(4, dtype=np.int32), "INT32"), tensor("DELAY", np.ones(4, np.uint32), "UINT32"),
        tensor("WAIT", np.ones(1, np.uint32), "UINT32"),
    ]  # fmt: skip
    with server.stream() as (client, came):
        client.async_stream_infer("repeat_int32", inputs)
        same([int(came.get(timeout=PATIENCE).as_numpy("OUT").item()) for _ in range(4)], [0, 1, 2, 3])
