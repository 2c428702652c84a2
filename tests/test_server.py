"""A real server over a real port: the Open Inference Protocol's core, refusals, health, reflection, metrics, the end.

Every test of the first part runs through both fronts.
"""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from contract import bundle as contract
from protos import inference_pb2 as pb
from server.graph import OnnxGraph
from server.metrics import TABLE
from tests import models
from tests.process import FRONTS, Served, reason, serve

INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good models, and beside them a damaged and a half-written one."""
    root = tmp_path_factory.mktemp("models")
    models.library(root)
    models.reader(root / "damaged" / "1", "damaged")
    (root / "damaged" / "1" / "step.onnx").write_bytes(b"not onnx")
    models.reader(root / "reader" / "2", seed=2)
    models.reader(root / "heavy" / "1", "heavy", hidden=256)  # a call of 64 rows by 190 steps takes it 50 ms or more
    (root / "half" / "1").mkdir(parents=True)
    (root / "half" / "1" / "bundle.json").write_text('{"format": 1, "graphs": {}, "wrong": 1}')
    return root


@pytest.fixture(scope="module", params=list(FRONTS))
def served(request: pytest.FixtureRequest, library: Path) -> Iterator[Served]:
    with serve(library, *FRONTS[request.param], "--max-message-bytes", "100000") as server:
        yield server


def tokens_request(tokens: Any, model: str = "reader", **fields: Any) -> pb.ModelInferRequest:
    array = np.asarray(tokens, np.int64)
    request = pb.ModelInferRequest(model_name=model, raw_input_contents=[array.tobytes()], **fields)
    request.inputs.add(name="tokens", datatype="INT64", shape=array.shape)
    return request


def test_what_is_there(served: Served) -> None:
    """Live, ready, and each model described with the protocol's words."""
    service = "/inference.GRPCInferenceService"
    assert served.method(f"{service}/ServerLive", pb.ServerLiveResponse)(b"").live
    assert served.method(f"{service}/ServerReady", pb.ServerReadyResponse)(b"").ready
    ready = served.method(f"{service}/ModelReady", pb.ModelReadyResponse)
    assert ready(pb.ModelReadyRequest(name="reader")).ready
    assert ready(pb.ModelReadyRequest(name="reader", version="1")).ready
    assert not ready(pb.ModelReadyRequest(name="reader", version="3")).ready
    assert not ready(pb.ModelReadyRequest(name="damaged")).ready
    assert served.method(f"{service}/ServerMetadata", pb.ServerMetadataResponse)(b"").name == "seqserve"
    described = served.method(f"{service}/ModelMetadata", pb.ModelMetadataResponse)(pb.ModelMetadataRequest(name="reader"))
    assert list(described.versions) == ["1", "2"]
    assert [(t.name, t.datatype, list(t.shape)) for t in described.inputs] == [("tokens", "INT64", [-1, -1])]
    assert [(t.name, t.datatype, list(t.shape)) for t in described.outputs] == [("scores", "FP32", [-1, -1, 2]), ("last", "FP32", [-1, 2])]


def test_served_is_alone(served: Served, library: Path) -> None:
    """300 calls at once, of all lengths and several rows, are each answered as if alone, bit for bit."""
    bundle = contract.load(library / "reader" / "1")
    onnx = OnnxGraph(bundle.graph, library / "reader" / "1" / "step.onnx")
    infer = served.method(INFER, pb.ModelInferResponse)
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, models.VOCABULARY, (int(rng.integers(1, 4)), int(rng.integers(1, 90)))) for _ in range(300)]
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda t: infer(tokens_request(t, model_version="1", id=f"id {t.shape}")), texts))
    for text, answer in zip(texts, answers, strict=True):
        expected = onnx.run({"tokens": text, **{s.input: s.fresh(len(text)) for s in bundle.graph.states}})
        assert answer.id == f"id {text.shape}"
        assert [o.name for o in answer.outputs] == ["scores", "last"]
        for output, raw, array in zip(answer.outputs, answer.raw_output_contents, expected, strict=False):
            assert list(output.shape) == list(array.shape)
            assert raw == array.tobytes()
        assert answer.parameters["rounds"].int64_param >= 1
        assert answer.parameters["run_us"].int64_param > 0


def test_typed_contents_and_chosen_outputs(served: Served) -> None:
    """Values by type give the same answer as raw ones; only the outputs asked for come, in the order asked."""
    infer = served.method(INFER, pb.ModelInferResponse)
    typed = pb.ModelInferRequest(model_name="reader")
    typed.inputs.add(name="tokens", datatype="INT64", shape=[1, 3]).contents.int64_contents.extend([4, 5, 6])
    assert infer(typed).raw_output_contents == infer(tokens_request([[4, 5, 6]])).raw_output_contents
    chosen = tokens_request([[4, 5, 6]])
    chosen.outputs.add(name="last")
    chosen.outputs.add(name="scores")
    answer = infer(chosen)
    assert [o.name for o in answer.outputs] == ["last", "scores"]
    assert answer.model_version == "2"


def broken(**change: Any) -> pb.ModelInferRequest:
    request = tokens_request([[1, 2]])
    for name, value in change.items():
        setattr(request.inputs[0], name, value)
    return request


def _typed_too() -> pb.ModelInferRequest:
    request = tokens_request([[1]])
    request.inputs[0].contents.int64_contents.append(1)
    return request


def _shape(*shape: int) -> pb.ModelInferRequest:
    request = tokens_request([[1, 2]])
    del request.inputs[0].shape[:]
    request.inputs[0].shape.extend(shape)
    return request


def _twice() -> pb.ModelInferRequest:
    request = tokens_request([[1]])
    request.inputs.add().CopyFrom(request.inputs[0])
    request.raw_input_contents.append(request.raw_input_contents[0])
    return request


def _output(*names: str) -> pb.ModelInferRequest:
    request = tokens_request([[1]])
    for name in names:
        request.outputs.add(name=name)
    return request


def _nothing(*shape: int, typed: bool = False) -> pb.ModelInferRequest:
    """A shape of which one length is 0, so that its bytes are right whatever the others are."""
    request = tokens_request([[]])
    request.inputs[0].shape[:] = shape
    if typed:
        del request.raw_input_contents[:]
    return request


BAD: list[tuple[str, Any, str, str]] = [
    ("unknown model", tokens_request([[1]], "nope"), "UNKNOWN_MODEL", "there are: both_ways, fragile, heavy, reader"),
    ("unknown version", tokens_request([[1]], model_version="9"), "UNKNOWN_VERSION", "it has: 1, 2"),
    ("version no number", tokens_request([[1]], model_version="x" * 30), "UNKNOWN_VERSION", "it has: 1, 2"),
    ("refused at load", tokens_request([[1]], "damaged"), "MODEL_REFUSED", "could not be loaded"),
    ("unknown output", _output("nope"), "UNKNOWN_OUTPUT", "scores, last"),
    ("output twice", _output("last", "scores", "last"), "REPEATED_OUTPUT", "'last' is asked for twice"),
    ("one output", _output(*["scores"] * 4_000), "REPEATED_OUTPUT", "'scores' is asked for twice"),
    ("no input", pb.ModelInferRequest(model_name="reader"), "MISSING_INPUT", "'tokens' is missing"),
    ("other name", broken(name="token"), "UNKNOWN_INPUT", "'token' is not one of the model's: tokens"),
    ("other dtype", broken(datatype="FP64"), "WRONG_DTYPE", "expected int64 [batch, time], got float64 [1, 2]"),
    ("no dtype", broken(datatype="LONG"), "WRONG_DTYPE", "allowed are BOOL"),
    ("too few bytes", _shape(1, 3), "WRONG_SIZE", "takes 24 raw bytes, got 16"),
    ("negative shape", _shape(-1, -2), "WRONG_SHAPE", "negative"),
    ("huge shape", _shape(1 << 40, 1 << 40), "WRONG_SIZE", "got 16"),
    ("huge and 0", _nothing(1 << 62, 4, 0), "WRONG_SHAPE", "more than 1099511627776 values"),
    ("huge and 0, typed", _nothing((1 << 63) - 1, (1 << 63) - 1, 0, typed=True), "WRONG_SHAPE", "other than 0"),
    ("long and 0", _nothing(1 << 40, 1, 0), "WRONG_RANK", "expected int64 [batch, time]"),
    ("65 axes", _shape(1, 2, *[1] * 63), "WRONG_RANK", "a shape of 65 axes; at most 64"),
    ("64 axes", _shape(1, 2, *[1] * 62), "WRONG_RANK", "expected int64 [batch, time], got int64 [1, 2, 1, 1"),
    ("rank", _shape(2), "WRONG_RANK", "expected int64 [batch, time], got int64 [2]"),
    ("two contents", _typed_too(), "TWO_CONTENTS", "send one of them"),
    (
        "raw count",
        pb.ModelInferRequest(model_name="reader", raw_input_contents=[b"", b""]),
        "WRONG_RAW_COUNT",
        "has 2 entries for 0 inputs",
    ),
    ("input twice", _twice(), "REPEATED_INPUT", "is there twice"),
    ("id out of range", tokens_request([[1, 50]]), "OUT_OF_RANGE", "allowed are 0..49"),
    ("negative id", tokens_request([[-1]]), "OUT_OF_RANGE", "allowed are 0..49"),
    ("empty sequence", tokens_request([[]]), "EMPTY_SEQUENCE", "send at least one"),
    ("no rows", tokens_request(np.zeros((0, 3))), "BAD_ROWS", "1 to 256"),
    ("too many rows", tokens_request(np.zeros((257, 1))), "BAD_ROWS", "1 to 256"),
    ("too long", tokens_request(np.zeros((1, 401))), "TOO_LONG", "at most 400"),
    ("fails in the model", tokens_request([[99]], "fragile"), "MODEL_FAILED", "could not run this input"),
    ("no protobuf", b"\xff\xff\xff", "NOT_PROTOBUF", "not a valid inference.ModelInferRequest"),
    ("invalid UTF-8", b"\x0a\x02\xc3\x28", "NOT_PROTOBUF", "must be UTF-8"),
]
STATUS = {"UNKNOWN_MODEL": "NOT_FOUND", "UNKNOWN_VERSION": "NOT_FOUND", "MODEL_REFUSED": "NOT_FOUND", "MODEL_FAILED": "INTERNAL"}


@pytest.mark.parametrize(("request_", "expected", "says"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input(served: Served, request_: Any, expected: str, says: str) -> None:
    """Each fault gets its typed error, and a good call made at the same time is answered as ever."""
    infer = served.method(INFER, pb.ModelInferResponse)
    neighbour = infer.future(tokens_request([[7, 8, 9]]))
    with pytest.raises(grpc.RpcError) as caught:
        infer(request_)
    code, why, _, _ = reason(caught.value)
    assert (code.name, why) == (STATUS.get(expected, "INVALID_ARGUMENT"), expected)
    assert says in caught.value.details()
    assert neighbour.result().raw_output_contents == infer(tokens_request([[7, 8, 9]])).raw_output_contents


def test_too_large_a_message(served: Served) -> None:
    """A message over the limit is refused by size; the connection lives on."""
    infer = served.method(INFER, pb.ModelInferResponse)
    with pytest.raises(grpc.RpcError) as caught:
        infer(tokens_request(np.zeros((200, 100))))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "100000" in caught.value.details()
    assert infer(tokens_request([[1]])).outputs


def test_unknown_method(served: Served) -> None:
    """A method that isn't there is UNIMPLEMENTED, by name."""
    with pytest.raises(grpc.RpcError) as caught:
        served.method("/inference.GRPCInferenceService/NoSuch")(b"")
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_callers_who_leave(served: Served) -> None:
    """Calls cancelled, or past their deadline, end at once for the caller, and the rows they held are freed."""
    infer = served.method(INFER, pb.ModelInferResponse)
    calls = [infer.future(tokens_request(np.ones((64, 190)), "heavy")) for _ in range(20)]
    late = infer.future(tokens_request(np.ones((64, 190)), "heavy"), timeout=0.02)
    for call in calls:
        call.cancel()
    with pytest.raises(grpc.RpcError) as caught:
        late.result()
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert infer(tokens_request([[1, 2, 3]])).outputs
    waiting = 1.0
    for _ in range(2000):  # each look is a real call; rows are free as soon as the round under way ends
        waiting = sum(metric(served, "seqserve_waiting"))
        if not waiting:
            break
    assert waiting == 0


def metric(served: Served, name: str) -> list[float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{served.metrics_port}/metrics") as page:
        lines = page.read().decode().splitlines()
    return [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ") if name[-1] != " " else name)]


def test_metrics(served: Served) -> None:
    """Every metric of the table is on the page, and a call is counted."""
    with urllib.request.urlopen(f"http://127.0.0.1:{served.metrics_port}/metrics") as page:
        text = page.read().decode()
    for m in TABLE:
        assert f"# HELP {m.name} {m.meaning}" in text
    mine = 'seqserve_row_steps_total{model="fragile",version="1"} '  # of which no other test leaves work behind
    served.method(INFER, pb.ModelInferResponse)(tokens_request(np.ones((3, 5)), "fragile"))
    (before,) = metric(served, mine)
    served.method(INFER, pb.ModelInferResponse)(tokens_request(np.ones((3, 5)), "fragile"))
    assert metric(served, mine) == [before + 15]


def test_health(served: Served) -> None:
    """Check and Watch tell that each service serves; unknown ones are NOT_FOUND, or unknown to a watcher."""
    check = served.method("/grpc.health.v1.Health/Check", health_pb2.HealthCheckResponse)
    for service in ("", "inference.GRPCInferenceService", "seqserve.v1.Tasks"):
        assert check(health_pb2.HealthCheckRequest(service=service)).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        check(health_pb2.HealthCheckRequest(service="nope"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND
    watch = served.stream("/grpc.health.v1.Health/Watch", health_pb2.HealthCheckResponse)
    for service, status in (("", health_pb2.HealthCheckResponse.SERVING), ("nope", health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)):
        call = watch(health_pb2.HealthCheckRequest(service=service))
        assert next(call).status == status
        call.cancel()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection(served: Served, version: str) -> None:
    """A client that knows nothing can list the services and fetch their descriptions."""
    call = served.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="seqserve.v1.Tasks"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.Such"),
    ]
    listed, file, missing = call(iter(asked))
    assert {s.name for s in listed.list_services_response.service} >= {"inference.GRPCInferenceService", "seqserve.v1.Tasks"}
    assert b"TranslateStream" in file.file_descriptor_response.file_descriptor_proto[0]
    assert missing.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_refused_bundles_are_told(served: Served) -> None:
    """The log lists every fault of a bundle that could not be loaded, at once."""
    log = "".join(served.log)
    assert "a file differs from what was exported (fingerprint)" in log
    assert "graphs: must be an object with at least one graph" in log
    assert "unknown key 'wrong'" in log


@pytest.mark.parametrize("front", FRONTS)
def test_a_full_queue(library: Path, front: str) -> None:
    """Past the queue callers get RESOURCE_EXHAUSTED with a delay; those taken are answered, and later ones too."""
    with serve(library, *FRONTS[front], "--max-queue", "2", "--chunk", "1") as server:
        infer = server.method(INFER, pb.ModelInferResponse)
        calls = [infer.future(tokens_request(np.ones((64, 190)), "heavy")) for _ in range(10)]
        refused = [e for e in (call.exception() for call in calls) if e is not None]
        assert 0 < len(refused) < 10
        for error in refused:
            code, why, facts, delay = reason(error)
            assert (code.name, why, facts["limit"]) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL", "2")
            assert delay is not None
            assert delay > 0
        assert infer(tokens_request([[1]])).outputs


@pytest.mark.parametrize("front", FRONTS)
def test_a_long_queue(library: Path, front: str) -> None:
    """Past a full round, who would wait longer than anyone may is refused with how long it takes; the others are answered."""
    with serve(library, *FRONTS[front], "--max-wait", "0.001", "--max-rows", "1", "--chunk", "1") as server:
        infer = server.method(INFER, pb.ModelInferResponse)
        calls = [infer.future(tokens_request(np.ones((1, 190)), "heavy")) for _ in range(20)]
        refused = [e for e in (call.exception() for call in calls) if e is not None]
        assert 0 < len(refused) < 20
        for error in refused:
            code, why, _, delay = reason(error)
            assert (code.name, why) == ("RESOURCE_EXHAUSTED", "QUEUE_LONG")
            assert delay is not None
            assert delay > 0.001


@pytest.mark.parametrize("front", FRONTS)
def test_sigterm_drains(library: Path, front: str) -> None:
    """On SIGTERM what runs is answered, what comes too late is told to go elsewhere, watchers are told, exit status 0."""
    with serve(library, *FRONTS[front]) as server:
        infer = server.method(INFER, pb.ModelInferResponse)
        watch = server.stream("/grpc.health.v1.Health/Watch", health_pb2.HealthCheckResponse)(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        first = [infer.future(tokens_request(np.ones((64, 100)), "heavy")) for _ in range(10)]
        first[0].result()
        assert server.terminate() == 0
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        codes = {call.code() for call in first}
        assert codes <= {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
        assert first[0].code() == grpc.StatusCode.OK
        with pytest.raises(grpc.RpcError) as caught:
            infer(tokens_request([[1]]))
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE


def test_a_taken_port(library: Path, served: Served) -> None:
    """Starting on a port in use says so and ends; it does not share it silently."""
    with pytest.raises(AssertionError, match="did not start"), serve(library, "--port", str(served.port)):
        pass


@pytest.mark.parametrize("front", FRONTS)
def test_a_taken_metrics_port(library: Path, front: str) -> None:
    """It is told which of the two ports it is, and the flag."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = rf"seqserve serve: metrics: cannot listen on 127.0.0.1:{port}: .*--metrics-port"
        with pytest.raises(AssertionError, match=said), serve(library, *FRONTS[front], "--metrics-port", str(port)):
            pass


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("there", [True, False])
def test_a_certificate_that_is_none(library: Path, tmp_path: Path, front: str, there: bool) -> None:
    """Both files are named, whether they have something else in them or are not there."""
    cert, key = tmp_path / "a.pem", tmp_path / "b.pem"
    if there:
        cert.write_text("")
        key.write_text("")
    said = f"--tls-cert {cert} and --tls-key {key}: no PEM"
    with pytest.raises(AssertionError, match=said), serve(library, *FRONTS[front], "--tls-cert", str(cert), "--tls-key", str(key)):
        pass
