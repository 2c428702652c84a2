"""The REST face: tritonclient.http, JSON and binary tensors, compression, sequences, the repository; what is plain HTTP besides."""

from __future__ import annotations

import http.client
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.conformance.case import Array, Server, case, check_sums, same


@contextmanager
def client(server: Server, **more: Any) -> Iterator[Any]:
    with triton.InferenceServerClient(server.http, **more) as made:
        yield made


@contextmanager
def refused(*statuses: int) -> Iterator[None]:
    """What happens inside must be refused with one of these statuses, and a message."""
    try:
        yield
    except InferenceServerException as e:
        if int(str(e.status())) not in statuses or not e.message():
            raise AssertionError(f"refused with {e.status()} ({e.message()}); expected {statuses}") from None
    else:
        raise AssertionError(f"was answered; expected {statuses}")


def pair(rows: int = 1, binary: bool = True, dtype: type = np.int32, datatype: str = "INT32") -> tuple[list[Any], Array, Array]:
    one: Array = np.arange(rows * 16, dtype=dtype).reshape(rows, 16)
    other: Array = np.full((rows, 16), 2, dtype)
    made = []
    for name, array in (("INPUT0", one), ("INPUT1", other)):
        given = triton.InferInput(name, list(array.shape), datatype)
        made.append(given.set_data_from_numpy(array, binary_data=binary))
    return made, one + other, one - other


def get(server: Server, path: str, body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """A plain request."""
    connection = http.client.HTTPConnection(server.http, timeout=30)
    try:
        connection.request("GET" if body is None else "POST", path, body, {k.replace("_", "-"): v for k, v in headers.items()})
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


@case("simple")
def live_and_ready(server: Server) -> None:
    """200 for a live server, a ready one, a ready model, with or without a version; 4xx for a model that is none."""
    with client(server) as c:
        same([c.is_server_live(), c.is_server_ready()], [True, True])
        same([c.is_model_ready("simple"), c.is_model_ready("simple", "1"), c.is_model_ready("no_such_model")], [True, True, False])


@case("simple")
def metadata(server: Server) -> None:
    """Server and model describe themselves as they do over gRPC."""
    with client(server) as c:
        said = c.get_server_metadata()
        same({"name", "version", "extensions"} - said.keys(), set())
        same("binary_tensor_data" in said["extensions"], True)
        model = c.get_model_metadata("simple")
        same([(t["name"], t["datatype"], t["shape"]) for t in model["inputs"]], [(f"INPUT{i}", "INT32", [-1, 16]) for i in (0, 1)])
        same(model["versions"], ["1"])


@case("simple")
def config_and_statistics(server: Server) -> None:
    """A model's configuration and counts, numbers as numbers."""
    with client(server) as c:
        config = c.get_model_config("simple")
        same((config["name"], config["input"][0]["dims"], config["input"][0]["data_type"]), ("simple", [16], "TYPE_INT32"))
        before = c.get_inference_statistics("simple")["model_stats"][0]["inference_count"]
        c.infer("simple", pair(3)[0])
        same(c.get_inference_statistics("simple")["model_stats"][0]["inference_count"] - before, 3)
        same(len(c.get_inference_statistics()["model_stats"]) > 1, True)


@case("simple")
def binary_both_ways(server: Server) -> None:
    """Tensors as binary data behind the JSON, and back; the request's id comes back."""
    inputs, total, difference = pair(4)
    with client(server) as c:
        result = c.infer("simple", inputs, request_id="a request")
    check_sums(result, total, difference)
    said = result.get_response()
    same((said["model_name"], said["model_version"], said["id"]), ("simple", "1", "a request"))


@case("simple")
def json_both_ways(server: Server) -> None:
    """Tensors as JSON, and back."""
    inputs, total, difference = pair(4, binary=False)
    with client(server) as c:
        outputs = [triton.InferRequestedOutput(f"OUTPUT{i}", binary_data=False) for i in (0, 1)]
        result = c.infer("simple", inputs, outputs=outputs)
    check_sums(result, total, difference)
    same("data" in result.get_output("OUTPUT0"), True)


@case("simple")
def mixed(server: Server) -> None:
    """One input in JSON and one binary, one output each way; only what is asked for, in the order asked for."""
    inputs, total, difference = pair(2)
    inputs[0] = pair(2, binary=False)[0][0]
    with client(server) as c:
        outputs = [triton.InferRequestedOutput("OUTPUT1", binary_data=True), triton.InferRequestedOutput("OUTPUT0", binary_data=False)]
        result = c.infer("simple", inputs, outputs=outputs)
        check_sums(result, total, difference)
        same([o["name"] for o in result.get_response()["outputs"]], ["OUTPUT1", "OUTPUT0"])
        one = c.infer("simple", inputs, outputs=[triton.InferRequestedOutput("OUTPUT1")])
        same([o["name"] for o in one.get_response()["outputs"]], ["OUTPUT1"])


@case("simple_int8")
def small_integers(server: Server) -> None:
    """INT8 in JSON and binary."""
    with client(server) as c:
        for binary in (True, False):
            inputs, total, difference = pair(2, binary, np.int8, "INT8")
            check_sums(c.infer("simple_int8", inputs), total, difference)


@case("simple_identity")
def texts(server: Server) -> None:
    """BYTES in JSON and binary: empty, long, with a zero inside, in any script."""
    said = ["", "a", "he\0llo", "日本語", "x" * 10_000, "ö" * 100, *map(str, range(10))]
    given = np.array([[t.encode() for t in said]], object)
    with client(server) as c:
        for binary in (True, False):
            tensor = triton.InferInput("INPUT0", [1, 16], "BYTES").set_data_from_numpy(given, binary_data=binary)
            outputs = [triton.InferRequestedOutput("OUTPUT0", binary_data=binary)]
            came = c.infer("simple_identity", [tensor], outputs=outputs).as_numpy("OUTPUT0").ravel()
            same([t if isinstance(t, str) else t.decode() for t in came], said)


@case("simple")
def compression(server: Server) -> None:
    """Requests and responses compressed, gzip and deflate."""
    inputs, total, difference = pair(64)
    with client(server) as c:
        for how in ("gzip", "deflate"):
            result = c.infer("simple", inputs, request_compression_algorithm=how, response_compression_algorithm=how)
            check_sums(result, total, difference)


@case("simple")
def many_at_once(server: Server) -> None:
    """async_infer: each is answered with its own answer."""
    with client(server, concurrency=8) as c:
        asked = []
        for rows in range(1, 17):
            inputs, *expected = pair(rows)
            asked.append((c.async_infer("simple", inputs), expected))
        for request, (total, difference) in asked:
            check_sums(request.get_result(), total, difference)


@case("simple_accumulate")
def sequences(server: Server) -> None:
    """sequence_id, a number or a text, with start and end."""
    with client(server) as c:
        for id in (uuid.uuid4().int >> 66, str(uuid.uuid4())):
            came = []
            for v in (1, 2, 3):
                given = triton.InferInput("INPUT", [1, 1], "INT32").set_data_from_numpy(np.array([[v]], np.int32))
                result = c.infer("simple_accumulate", [given], sequence_id=id, sequence_start=v == 1, sequence_end=v == 3)
                came.append(int(result.as_numpy("OUTPUT").item()))
            same(came, [1, 3, 6])


@case("simple")
def what_is_wrong_is_said(server: Server) -> None:
    """4xx with a message for unknown models, versions and tensors, wrong types and shapes; then all is well."""
    inputs, total, difference = pair()
    with client(server) as c:
        with refused(404, 400):
            c.infer("no_such_model", inputs)
        with refused(404, 400):
            c.infer("simple", inputs, model_version="999")
        with refused(400):
            c.infer("simple", inputs[:1])
        with refused(400):
            c.infer("simple", [*inputs, inputs[0]])
        with refused(400):
            c.infer("simple", inputs, outputs=[triton.InferRequestedOutput("OUTPUT9")])
        wrong = triton.InferInput("INPUT0", [1, 16], "FP32").set_data_from_numpy(np.zeros((1, 16), np.float32))
        with refused(400):
            c.infer("simple", [wrong, inputs[1]])
        short = triton.InferInput("INPUT0", [1, 15], "INT32").set_data_from_numpy(np.zeros((1, 15), np.int32))
        with refused(400):
            c.infer("simple", [short, inputs[1]])
        with refused(404):
            c.get_model_metadata("no_such_model")
        check_sums(c.infer("simple", inputs), total, difference)


@case("simple")
def bodies_that_lie(server: Server) -> None:
    """Binary data that is cut, too long or sized wrongly, headers that are no number, bodies that are no JSON: 400 each."""
    inputs, total, difference = pair()
    body, size = triton.InferenceServerClient.generate_request_body(inputs)
    path = "/v2/models/simple/infer"
    name = "Inference-Header-Content-Length"
    for sent, head in ((body[:-1], size), (body + b"x", size), (body, size - 1), (body, len(body) + 1), (body, None), (b"", None)):
        status, _, said = get(server, path, sent, **({} if head is None else {name: str(head)}))
        same((status, bool(json.loads(said)["error"])), (400, True))
    for head in ("-1", "ten", "1e3", "9" * 30):
        same(get(server, path, body, **{name: head})[0], 400)
    status, headers, said = get(server, path, body, **{name: str(size)})
    same(status, 200)
    result = triton.InferenceServerClient.parse_response_body(said, header_length=int(headers[name.lower()]))
    check_sums(result, total, difference)


@case("simple")
def data_nested_or_flat(server: Server) -> None:
    """JSON data may be nested or flat; a value that does not fit its type is refused."""

    def ask(data: object) -> tuple[int, Any]:
        ones = {"name": "INPUT1", "shape": [1, 16], "datatype": "INT32", "data": [1] * 16}
        request = {"inputs": [{"name": "INPUT0", "shape": [1, 16], "datatype": "INT32", "data": data}, ones]}
        status, _, said = get(server, "/v2/models/simple/infer", json.dumps(request).encode())
        return status, json.loads(said)

    for given in ([7] * 16, [[7] * 16], [[[7, 7]] * 8]):
        status, said = ask(given)
        same((status, said["outputs"][0]["data"]), (200, [8] * 16))
    for wrong in ([7] * 15, [[7] * 17], [7.5] * 16, ["7"] * 16, [True] * 16, [2**31] * 16, [None] * 16, [[7], [7, 7]], [2**70] * 16, {}):
        same(ask(wrong)[0], 400)


@case("simple")
def shared_memory_and_settings(server: Server) -> None:
    """Status of shared memory is a list; logging and tracing say what they are."""
    with client(server) as c:
        same(isinstance(c.get_system_shared_memory_status(), list), True)
        same(c.get_cuda_shared_memory_status(), [])
        same(isinstance(c.get_log_settings()["log_info"], bool), True)
        same("trace_level" in c.get_trace_settings(), True)
        same("trace_level" in c.get_trace_settings("simple"), True)


@case("simple_again")
def unload_and_load(server: Server) -> None:
    """The repository's index, and a model taken away and brought back."""
    with client(server) as c:
        found = {m["name"]: m["state"] for m in c.get_model_repository_index()}
        same(found["simple_again"], "READY")
        c.unload_model("simple_again")
        try:
            same(c.is_model_ready("simple_again"), False)
            with refused(404):
                c.infer("simple_again", pair()[0])
        finally:
            c.load_model("simple_again")
        inputs, total, difference = pair()
        check_sums(c.infer("simple_again", inputs), total, difference)
        with refused(400, 404):
            c.load_model("no_such_model")


@case("simple")
def paths_and_methods(server: Server) -> None:
    """404 for a path that is none, 405 for a method that a path hasn't, each with a message."""
    for path, body, expected in (("/v2/nothing", None, 404), ("/v2/models/simple/infer", None, 405), ("/v2/models/simple", b"", 405)):
        status, _, said = get(server, path, body)
        same((status, bool(json.loads(said)["error"])), (expected, True))
