"""What is wrong with a request is said with the right status code, and harms nobody else."""

from __future__ import annotations

import time

import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as pb
from tritonclient.utils import InferenceServerException

from tests.conformance.case import PATIENCE, Server, case, check_sums, pair, refused, request, same, tensor


@case()
def unknown_model(server: Server) -> None:
    """NOT_FOUND."""
    with refused("NOT_FOUND"):
        server.client.infer("no_such_model", pair()[0])


@case("simple")
def unknown_version(server: Server) -> None:
    """NOT_FOUND; a version that is no number is INVALID_ARGUMENT at least."""
    with refused("NOT_FOUND"):
        server.client.infer("simple", pair()[0], model_version="999")
    with refused("NOT_FOUND", "INVALID_ARGUMENT"):
        server.client.infer("simple", pair()[0], model_version="one")


@case("simple")
def unknown_input(server: Server) -> None:
    """INVALID_ARGUMENT, also where all that is needed is there too."""
    extra = tensor("INPUT2", np.zeros((1, 16), np.int32), "INT32")
    with refused("INVALID_ARGUMENT"):
        server.client.infer("simple", [*pair()[0], extra])


@case("simple")
def missing_input(server: Server) -> None:
    """INVALID_ARGUMENT."""
    with refused("INVALID_ARGUMENT"):
        server.client.infer("simple", pair()[0][:1])


@case("simple")
def repeated_input(server: Server) -> None:
    """INVALID_ARGUMENT."""
    inputs = pair()[0]
    with refused("INVALID_ARGUMENT"):
        server.client.infer("simple", [*inputs, inputs[0]])


@case("simple")
def unknown_output(server: Server) -> None:
    """INVALID_ARGUMENT."""
    with refused("INVALID_ARGUMENT"):
        server.client.infer("simple", pair()[0], outputs=[triton.InferRequestedOutput("OUTPUT9")])


@case("simple")
def wrong_datatype(server: Server) -> None:
    """INVALID_ARGUMENT: values are not converted."""
    with refused("INVALID_ARGUMENT"):
        server.client.infer("simple", pair(1, np.float32, "FP32")[0])


@case("simple")
def no_such_datatype(server: Server) -> None:
    """INVALID_ARGUMENT."""
    asked = request()
    asked.inputs[0].datatype = "INT33"
    with refused("INVALID_ARGUMENT"):
        server.stub.ModelInfer(asked, timeout=PATIENCE)


@case("simple")
def wrong_shape(server: Server) -> None:
    """INVALID_ARGUMENT: another width, another count of dims, rows that differ between inputs."""
    for shape in ((1, 15), (16,), (1, 1, 16)):
        with refused("INVALID_ARGUMENT"):
            server.client.infer("simple", [tensor(f"INPUT{i}", np.zeros(shape, np.int32), "INT32") for i in (0, 1)])
    with refused("INVALID_ARGUMENT"):
        server.client.infer("simple", [tensor(f"INPUT{i}", np.zeros((1 + i, 16), np.int32), "INT32") for i in (0, 1)])


@case("simple")
def no_rows(server: Server) -> None:
    """INVALID_ARGUMENT, or an answer without rows."""
    asked = request()
    for at in (0, 1):
        asked.inputs[at].shape[0] = 0
        asked.raw_input_contents[at] = b""
    try:
        response = server.stub.ModelInfer(asked, timeout=PATIENCE)
    except Exception:
        with refused("INVALID_ARGUMENT"):
            server.stub.ModelInfer(asked, timeout=PATIENCE)
    else:
        same([o.shape[0] for o in response.outputs], [0, 0])


@case("simple")
def negative_and_vast_shapes(server: Server) -> None:
    """INVALID_ARGUMENT, at once."""
    for length in (-1, -(2**62), 2**62):
        asked = request()
        asked.inputs[0].shape[0] = length
        with refused("INVALID_ARGUMENT"):
            server.stub.ModelInfer(asked, timeout=PATIENCE)


@case("simple")
def bytes_that_do_not_fit_the_shape(server: Server) -> None:
    """INVALID_ARGUMENT: too few, too many."""
    for content in (b"\0" * 63, b"\0" * 65, b""):
        asked = request()
        asked.raw_input_contents[0] = content
        with refused("INVALID_ARGUMENT"):
            server.stub.ModelInfer(asked, timeout=PATIENCE)


@case("simple")
def contents_twice(server: Server) -> None:
    """INVALID_ARGUMENT where a request has raw and typed contents both, or raw ones of some inputs only."""
    asked = request()
    asked.inputs[0].contents.int_contents[:] = [1] * 16
    with refused("INVALID_ARGUMENT"):
        server.stub.ModelInfer(asked, timeout=PATIENCE)
    asked = request()
    del asked.raw_input_contents[1]
    with refused("INVALID_ARGUMENT"):
        server.stub.ModelInfer(asked, timeout=PATIENCE)


@case("simple_identity")
def broken_bytes(server: Server) -> None:
    """INVALID_ARGUMENT where the lengths inside a BYTES tensor lead astray."""
    for content in (b"\xff\xff\xff\xff", b"\x05\0\0\0abc", b"\0\0", b"\0\0\0\0" * 15, b"\0\0\0\0" * 17):
        asked = pb.ModelInferRequest(model_name="simple_identity", raw_input_contents=[content])
        asked.inputs.add(name="INPUT0", datatype="BYTES", shape=[1, 16])
        with refused("INVALID_ARGUMENT"):
            server.stub.ModelInfer(asked, timeout=PATIENCE)


@case("simple_identity")
def bytes_that_are_no_text(server: Server) -> None:
    """BYTES that are no UTF-8 come back as they went, or are refused with INVALID_ARGUMENT; never altered."""
    given = np.array([[b"\xff\xfe\x80"] * 16], object)
    try:
        result = server.client.infer("simple_identity", [tensor("INPUT0", given, "BYTES")])
    except InferenceServerException as e:
        same(str(e.status()), "StatusCode.INVALID_ARGUMENT")
    else:
        same(list(result.as_numpy("OUTPUT0").ravel()), list(given.ravel()))


@case("simple")
def too_many_rows(server: Server) -> None:
    """INVALID_ARGUMENT beyond max_batch_size."""
    most = server.client.get_model_config("simple").config.max_batch_size
    with refused("INVALID_ARGUMENT"):
        server.client.infer("simple", pair(most + 1)[0])


@case("simple")
def reserved_parameters(server: Server) -> None:
    """INVALID_ARGUMENT: names that begin with triton_ belong to the protocol."""
    asked = request()
    asked.parameters["triton_nonsense"].bool_param = True
    with refused("INVALID_ARGUMENT"):
        server.stub.ModelInfer(asked, timeout=PATIENCE)


@case("simple")
def a_callers_own_deadline(server: Server) -> None:
    """A call whose deadline passes ends with DEADLINE_EXCEEDED; the next is answered."""
    with refused("DEADLINE_EXCEEDED"):
        for _ in range(20):  # gRPC rounds a deadline up to a millisecond, in which a quick server answers one call, but not fifty
            for call in [server.stub.ModelInfer.future(request(), timeout=1e-5) for _ in range(50)]:
                call.result()
    inputs, total, difference = pair()
    check_sums(server.client.infer("simple", inputs), total, difference)


@case("simple")
def a_call_taken_back(server: Server) -> None:
    """A cancelled call ends as CANCELLED, and leaves nothing behind: the next are answered."""
    for _ in range(50):
        call = server.stub.ModelInfer.future(request(), timeout=PATIENCE)
        if call.cancel():
            same(call.code().name, "CANCELLED")
    inputs, total, difference = pair()
    check_sums(server.client.infer("simple", inputs), total, difference)


@case("simple")
def many_faults_harm_nobody(server: Server) -> None:
    """Right requests among wrong ones are all answered."""
    wrong = request()
    wrong.raw_input_contents[0] = b""
    calls = [(at, server.stub.ModelInfer.future(wrong if at % 2 else request(), timeout=PATIENCE)) for at in range(64)]
    began = time.monotonic()
    for at, call in calls:
        if at % 2:
            with refused("INVALID_ARGUMENT"):
                call.result()
        else:
            same(len(call.result().outputs), 2)
    same(time.monotonic() - began < PATIENCE, True)
