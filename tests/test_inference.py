"""All of the Open Inference Protocol beside plain calls: configuration, statistics, texts, every datatype, parameters, pieces."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from onnx import TensorProto, helper

from contract import bundle as contract
from contract.bundle import Bundle, Graph, Tensor
from protos import inference_pb2 as pb
from protos import model_config_pb2 as config_pb
from protos import seqserve_pb2
from tests import models
from tests.figures.bench_models import model_b
from tests.process import FRONTS, ROOT, Served, reason, serve
from tests.test_server import tokens_request

SERVICE = "/inference.GRPCInferenceService"
KINDS = {
    "bool": "BOOL", "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64", "uint8": "UINT8", "uint16": "UINT16",
    "uint32": "UINT32", "uint64": "UINT64", "float16": "FP16", "float32": "FP32", "float64": "FP64", "string": "BYTES",
}  # fmt: skip
TYPED = {
    "bool": "bool", "int8": "int", "int16": "int", "int32": "int", "int64": "int64", "uint8": "uint", "uint16": "uint", "uint32": "uint",
    "uint64": "uint64", "float32": "fp32", "float64": "fp64", "string": "bytes",
}  # fmt: skip
TEXTS = ["A wonderful film.", "Dull, and far too long.", "Not bad."]
SENTENCE = "Two dogs play in the snow."


def _file(file: Path, op: str, *ports: tuple[str, str, int, Sequence[str | int]]) -> None:
    """One node of `op` from each port's input to its output."""
    file.parent.mkdir(parents=True, exist_ok=True)
    nodes = [helper.make_node(op, [a], [b]) for a, b, _, _ in ports]
    inputs = [models._value(a, kind, *shape) for a, _, kind, shape in ports]
    models._save(file, nodes, inputs, [models._value(b, kind, *shape) for _, b, kind, shape in ports], [])


def echo(directory: Path, name: str, dtype: str) -> None:
    """x [batch, n] of any dtype → y, the same."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype)) if dtype != "string" else TensorProto.STRING
    _file(directory / "echo.onnx", "Identity", ("x", "y", kind, ("b", "n")))
    graph = Graph("echo.onnx", (Tensor("x", dtype, ("batch", "n")),), (Tensor("y", dtype, ("batch", "n")),), max_time=1)
    contract.save(Bundle(name, {"main": graph}, "main"), directory)


def columns(directory: Path) -> None:
    """x [2, batch] → y, negative: rows lie along the second axis."""
    _file(directory / "columns.onnx", "Neg", ("x", "y", models.FLOAT, (2, "b")))
    graph = Graph("columns.onnx", (Tensor("x", "float32", (2, "batch")),), (Tensor("y", "float32", (2, "batch")),), max_time=1)
    contract.save(Bundle("columns", {"main": graph}, "main"), directory)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    models.reader(root / "reader" / "1")
    model_b(root / "model_b" / "1" / "model.onnx")
    models.both_ways(root / "both_ways" / "1")
    columns(root / "columns" / "1")
    for dtype in KINDS:
        echo(root / dtype / "1", dtype, dtype)
    for name in ("sentiment", "translator"):
        (root / name).symlink_to(ROOT / "models" / name)
    return root


@pytest.fixture(scope="module", params=list(FRONTS))
def served(request: pytest.FixtureRequest, library: Path) -> Iterator[Served]:
    with serve(library, *FRONTS[request.param]) as server:
        yield server


def infer(served: Served, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    response: pb.ModelInferResponse = served.method(f"{SERVICE}/ModelInfer", pb.ModelInferResponse)(request)
    return response


def stream(served: Served, *requests: pb.ModelInferRequest, **options: Any) -> Any:
    method = served.channel.stream_stream(
        f"{SERVICE}/ModelStreamInfer", pb.ModelInferRequest.SerializeToString, pb.ModelStreamInferResponse.FromString
    )
    return method(iter(requests), **options)


def refused(served: Served, request: pb.ModelInferRequest) -> tuple[str, str]:
    """The reason and the message."""
    with pytest.raises(grpc.RpcError) as caught:
        infer(served, request)
    return reason(caught.value)[1], str(caught.value.details())


def packed(texts: Sequence[str | bytes]) -> bytes:
    parts = [t.encode() if isinstance(t, str) else t for t in texts]
    return b"".join(struct.pack("<I", len(p)) + p for p in parts)


def unpacked(raw: bytes) -> list[str]:
    texts = []
    while raw:
        (size,) = struct.unpack_from("<I", raw)
        texts.append(raw[4 : 4 + size].decode())
        raw = raw[4 + size :]
    return texts


def ask(model: str, *texts: str, **parameters: Any) -> pb.ModelInferRequest:
    """A request that brings TEXT."""
    request = pb.ModelInferRequest(model_name=model, raw_input_contents=[packed(texts)])
    request.inputs.add(name="TEXT", datatype="BYTES", shape=[len(texts), 1])
    return give(request, **parameters)


def give(request: pb.ModelInferRequest, **parameters: Any) -> pb.ModelInferRequest:
    for name, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    return request


def outputs(response: pb.ModelInferResponse) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.datatype == "BYTES":
            found[output.name] = unpacked(raw)
        else:
            dtype = next(d for d, kind in KINDS.items() if kind == output.datatype)
            found[output.name] = np.frombuffer(raw, dtype).reshape(output.shape)
    return found


def config(served: Served, name: str) -> config_pb.ModelConfig:
    response = served.method(f"{SERVICE}/ModelConfig", pb.ModelConfigResponse)(pb.ModelConfigRequest(name=name))
    described: config_pb.ModelConfig = response.config
    return described


def test_configuration_and_metadata_agree(served: Served) -> None:
    """For every model: the same tensors; where there is a batch size, metadata has the leading -1 that dims lack."""
    index = served.method(f"{SERVICE}/RepositoryIndex", pb.RepositoryIndexResponse)(b"")
    for name in {m.name for m in index.models}:
        c = config(served, name)
        m = served.method(f"{SERVICE}/ModelMetadata", pb.ModelMetadataResponse)(pb.ModelMetadataRequest(name=name))
        assert c.name == m.name == name
        assert [int(v) for v in m.versions] == [1]
        leading = [-1] if c.max_batch_size else []
        described = [[(d.name, d.data_type, leading + list(d.dims)) for d in part] for part in (c.input, c.output)]
        known = [[(t.name, _type(t.datatype), list(t.shape)) for t in part] for part in (m.inputs, m.outputs)]
        assert described == known


def _type(datatype: str) -> int:
    return config_pb.DataType.Value("TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}")


def test_how_models_are_batched(served: Served) -> None:
    """Sequence batching with its states for a model that has some and takes one step a call, dynamic batching for one that has
    none or takes any number of steps, decoupled for one that answers in pieces, no batch size where rows do not lie first."""
    reader = config(served, "reader")
    assert reader.max_batch_size == 256
    assert reader.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert not reader.model_transaction_policy.decoupled
    step = config(served, "model_b").sequence_batching
    assert [(s.input_name, s.output_name, list(s.dims)) for s in step.state] == [("h0", "hn", [2, 256]), ("c0", "cn", [2, 256])]
    assert step.max_sequence_idle_microseconds == 3_600_000_000
    assert config(served, "both_ways").WhichOneof("scheduling_choice") == "dynamic_batching"
    translator = config(served, "translator")
    assert translator.WhichOneof("scheduling_choice") == "dynamic_batching"
    assert translator.model_transaction_policy.decoupled
    assert [(i.name, i.optional) for i in config(served, "sentiment").input] == [("tokens", True), ("TEXT", True)]
    sentiment = config(served, "sentiment")
    assert sentiment.parameters["initial.highest"].string_value == "-1"
    assert config(served, "columns").max_batch_size == 0
    assert [list(i.dims) for i in config(served, "columns").input] == [[2, -1]]


@pytest.mark.parametrize("dtype", KINDS)
def test_every_datatype(served: Served, dtype: str) -> None:
    """Raw and by type, values come back as they were sent; FP16 travels raw only."""
    values: Any = np.array([["a", "", "ü\0€"], ["1", "22", "x" * 300]], object)
    if dtype != "string":
        limit = 1 if dtype == "bool" else 100
        values = np.random.default_rng(1).uniform(0, limit, (2, 3)).round().astype(dtype)
    raw = packed(values.ravel().tolist()) if dtype == "string" else values.tobytes()
    request = pb.ModelInferRequest(model_name=dtype, raw_input_contents=[raw])
    request.inputs.add(name="x", datatype=KINDS[dtype], shape=[2, 3])
    assert infer(served, request).raw_output_contents == [raw]
    typed = pb.ModelInferRequest(model_name=dtype)
    tensor = typed.inputs.add(name="x", datatype=KINDS[dtype], shape=[2, 3])
    if dtype not in TYPED:
        assert refused(served, typed)[0] == "RAW_ONLY"
        return
    flat = [v.encode() for v in values.ravel()] if dtype == "string" else values.ravel().tolist()
    getattr(tensor.contents, f"{TYPED[dtype]}_contents").extend(flat)
    assert infer(served, typed).raw_output_contents == [raw]


def test_bfloat16_is_widened(served: Served) -> None:
    """BF16 is taken where FP32 is, without a loss."""
    upper = np.array([[0x3F80, 0xC049, 0x0001]], np.uint16)
    request = pb.ModelInferRequest(model_name="float32", raw_input_contents=[upper.tobytes()])
    request.inputs.add(name="x", datatype="BF16", shape=[1, 3])
    assert outputs(infer(served, request))["y"].tobytes() == (upper.astype(np.uint32) << 16).tobytes()


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (packed(["a", b"\xff", "c"]), "NOT_UTF8"), (packed(["a", "b"]), "WRONG_SIZE"), (packed(["a", "b", "c", "d"]), "WRONG_SIZE"),
        (packed(["a", "b", "c"])[:-1], "WRONG_SIZE"), (packed(["a", "b", "c"]) + b"\0", "WRONG_SIZE"), (b"\xff" * 12, "WRONG_SIZE"),
        (b"", "WRONG_SIZE"),
    ],
)  # fmt: skip
def test_texts_that_are_none(served: Served, raw: bytes, why: str) -> None:
    """Lengths that do not fit the bytes, and bytes that are no text, are refused."""
    request = pb.ModelInferRequest(model_name="string", raw_input_contents=[raw])
    request.inputs.add(name="x", datatype="BYTES", shape=[1, 3])
    assert refused(served, request)[0] == why


def test_texts_are_labelled(served: Served) -> None:
    """TEXT gives what Classify gives; several rows what each gives alone; LABEL can be asked for with tokens too."""
    classify = served.method("/seqserve.v1.Tasks/Classify", seqserve_pb2.ClassifyReply)
    reply = classify(seqserve_pb2.ClassifyRequest(model=seqserve_pb2.Model(name="sentiment"), texts=TEXTS))
    found = outputs(infer(served, ask("sentiment", *TEXTS)))
    assert found["LABEL"] == [r.label for r in reply.results]
    assert found["probabilities"].tolist() == [[np.float32(s.score) for s in r.scores] for r in reply.results]
    for i, text in enumerate(TEXTS):
        alone = outputs(infer(served, ask("sentiment", text)))
        assert alone["logits"].tobytes() == found["logits"][i : i + 1].tobytes()
    tokens = tokens_request([[4, 5, 6]], "sentiment")
    assert set(outputs(infer(served, tokens))) == {"probabilities", "logits"}
    tokens.outputs.add(name="LABEL")
    (label,) = outputs(infer(served, tokens))["LABEL"]
    assert label in ("negative", "positive")


def test_a_text_in_a_sequence(served: Served) -> None:
    """Pieces of TEXT cut within a word are scored as all of the text so far."""
    whole = outputs(infer(served, ask("sentiment", "The ending is wonderful.")))
    first = ask("sentiment", "The ending is wonder", sequence_id="t", sequence_start=True)
    last = ask("sentiment", "ful.", sequence_id="t", sequence_end=True)
    infer(served, first)
    assert outputs(infer(served, last))["probabilities"].tobytes() == whole["probabilities"].tobytes()
    two = ask("sentiment", "a", "b", sequence_id="t", sequence_start=True)
    assert refused(served, two)[0] == "BAD_ROWS"


def test_refused_texts(served: Served) -> None:
    """Text and tokens at once, outputs that texts do not have, empty texts, and too many rows."""
    both = ask("sentiment", "a")
    both.inputs.add(name="tokens", datatype="INT64", shape=[1, 1])
    both.raw_input_contents.append(np.array([[1]]).tobytes())
    assert refused(served, both)[0] == "TWO_INPUTS"
    unknown = ask("translator", SENTENCE)
    unknown.outputs.add(name="log_probs")
    assert refused(served, unknown)[0] == "UNKNOWN_OUTPUT"
    assert refused(served, ask("sentiment", "fine", "  "))[0] == "EMPTY_TEXT"
    assert refused(served, ask("sentiment", *["a"] * 257))[0] == "BAD_ROWS"
    assert refused(served, ask("translator", SENTENCE, beam=99))[0] == "BAD_BEAM"
    assert refused(served, ask("translator", SENTENCE, sequence_id=4, sequence_start=True))[0] == "NO_TURNS"


def wish(request: pb.ModelInferRequest, *names: str) -> pb.ModelInferRequest:
    """The same request with outputs asked for by name."""
    for name in names:
        request.outputs.add(name=name)
    return request


def test_an_output_that_is_asked_for_twice(served: Served) -> None:
    """However a request comes, and whether its form was seen before: refused, and nothing is begun; each output once is answered."""
    twice = ("last", "scores", "last")
    for _ in range(2):
        assert refused(served, wish(tokens_request([[1, 2]]), *twice)) == (
            "REPEATED_OUTPUT", "output 'last' is asked for twice; ask for it once",
        )  # fmt: skip
        assert refused(served, wish(ask("sentiment", "a"), "LABEL", "LABEL"))[0] == "REPEATED_OUTPUT"
    given = list(stream(served, wish(tokens_request([[1, 2]]), *twice), wish(tokens_request([[1, 2]]), *twice[:2])))
    (error,) = [r.error_message for r in given if r.error_message]
    assert "asked for twice" in error
    (answer,) = [r.infer_response for r in given if not r.error_message]
    assert [o.name for o in answer.outputs] == ["last", "scores"]
    sequence = give(tokens_request([[1, 2]]), sequence_id="twice", sequence_start=True)
    assert refused(served, wish(sequence, *twice))[0] == "REPEATED_OUTPUT"
    assert refused(served, give(tokens_request([[1, 2]]), sequence_id="twice"))[0] == "UNKNOWN_SESSION"


@pytest.mark.parametrize(("shape", "why"), [((1 << 62, 4, 0), "WRONG_SHAPE"), ((1,) * 65, "WRONG_RANK"), ((1,) * 64, "WRONG_SHAPE")])
def test_texts_of_a_shape_that_no_tensor_has(served: Served, shape: tuple[int, ...], why: str) -> None:
    raw = b"" if 0 in shape else packed(["a"])
    request = pb.ModelInferRequest(model_name="sentiment", raw_input_contents=[raw])
    request.inputs.add(name="TEXT", datatype="BYTES", shape=shape)
    assert refused(served, request)[0] == why
    if raw:
        typed = pb.ModelInferRequest(model_name="sentiment")
        typed.inputs.add(name="TEXT", datatype="BYTES", shape=shape).contents.bytes_contents.append(b"a")
        assert refused(served, typed)[0] == why


def test_a_translation_in_pieces(served: Served) -> None:
    """Over a stream a translation comes piece by piece, then an empty final response; unary it comes whole."""
    (whole,) = outputs(infer(served, ask("translator", SENTENCE)))["TRANSLATION"]
    assert outputs(infer(served, ask("translator", SENTENCE, "Run!")))["TRANSLATION"][0] == whole
    requests = [ask("translator", SENTENCE, triton_enable_empty_final_response=True), ask("translator", SENTENCE), ask("translator", "")]
    for request, id in zip(requests, ("final", "plain", "bad"), strict=True):
        request.id = id
    got = list(stream(served, *requests))
    (error,) = [r for r in got if r.error_message]
    assert error.infer_response.id == "bad"
    for id in ("final", "plain"):
        responses = [r.infer_response for r in got if r.infer_response.id == id]
        pieces = [r for r in responses if r.outputs]
        assert "".join(outputs(r)["TRANSLATION"][0] for r in pieces) == whole
        assert len(pieces) > 3
        assert not any(r.parameters["triton_final_response"].bool_param for r in pieces)
        assert [r.parameters["triton_final_response"].bool_param for r in responses if not r.outputs] == ([True] if id == "final" else [])


def test_an_error_that_ends_the_stream(served: Served) -> None:
    """With triton_grpc_error the stream ends with the first error's status; without it is told in the stream, which lives on."""
    good, bad = tokens_request([[1, 2]]), tokens_request([[99]])
    assert [bool(r.error_message) for r in stream(served, bad, good)] == [True, False]
    with pytest.raises(grpc.RpcError) as caught:
        list(stream(served, bad, metadata=(("triton_grpc_error", "true"),)))
    assert reason(caught.value)[1] == "OUT_OF_RANGE"
    assert len(list(stream(served, good, good, metadata=(("triton_grpc_error", "true"),)))) == 2


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"triton_something": 1}, "UNKNOWN_PARAMETER"), ({"timeout": -1}, "BAD_PARAMETER"), ({"timeout": "soon"}, "BAD_PARAMETER"),
        ({"priority": 0.5}, "BAD_PARAMETER"), ({"sequence_id": 1.5}, "BAD_PARAMETER"), ({"sequence_start": 1}, "BAD_PARAMETER"),
        ({"sequence_start": True}, "BAD_SEQUENCE_ID"), ({"sequence_id": "", "sequence_end": True}, "BAD_SEQUENCE_ID"),
        ({"timeout": 1}, "DEADLINE_EXCEEDED"),
    ],
)  # fmt: skip
def test_bad_parameters(served: Served, parameters: dict[str, Any], why: str) -> None:
    """Parameters of a wrong type or name are refused; a timeout that can't be met is a deadline that passed."""
    assert refused(served, give(tokens_request(np.ones((64, 400))), **parameters))[0] == why


def test_parameters_that_change_nothing(served: Served) -> None:
    """Sequence 0 and the empty id mean no sequence; priority, a generous timeout and a caller's own parameters are taken."""
    plain = infer(served, tokens_request([[1, 2]])).raw_output_contents
    for given in ({"sequence_id": 0}, {"sequence_id": ""}, {"priority": 1, "timeout": 60_000_000}, {"mine": "x", "yours": 0.5}):
        assert infer(served, give(tokens_request([[1, 2]]), **given)).raw_output_contents == plain


def test_a_sequence_of_one_request(served: Served) -> None:
    """Start and end in one request begin and end a sequence; the id is free at once; more rows than one are refused."""
    plain = infer(served, tokens_request([[1, 2]])).raw_output_contents
    for _ in range(100):
        request = give(tokens_request([[1, 2]]), sequence_id=7, sequence_start=True, sequence_end=True)
        assert infer(served, request).raw_output_contents == plain
    assert refused(served, give(tokens_request([[1, 2]]), sequence_id=7))[0] == "SESSION_CLOSED"
    two = give(tokens_request([[1], [2]]), sequence_id=8, sequence_start=True)
    assert refused(served, two)[0] == "BAD_ROWS"


def test_sequences_of_one_id_follow_each_other(served: Served) -> None:
    """Whole sequences of one id sent ahead over one stream, each begun before the last one's end was answered, give what each
    gives alone, in the order sent."""
    steps = [[1, 2], [3], [4, 5, 6]]
    alone = []
    for i, step in enumerate(steps):
        request = give(tokens_request([step]), sequence_id=70, sequence_start=i == 0, sequence_end=i == 2)
        alone.append(infer(served, request).raw_output_contents)
    sent = []
    for number in range(20):
        for i, step in enumerate(steps):
            request = give(tokens_request([step]), sequence_id=71, sequence_start=i == 0, sequence_end=i == 2)
            request.id = f"{number}/{i}"
            sent.append(request)
    came = [r.infer_response for r in stream(served, *sent)]
    assert [r.id for r in came] == [r.id for r in sent]
    assert [r.raw_output_contents for r in came] == alone * 20


def test_statistics(served: Served) -> None:
    """Requests, rows and rounds are counted, the three parts of computing equally often; a deadline that passes is a failure."""
    method = served.method(f"{SERVICE}/ModelStatistics", pb.ModelStatisticsResponse)

    def count(more_than: int) -> pb.ModelStatistics:
        for _ in range(1000):  # a reply leaves before its round is counted
            (stats,) = method(pb.ModelStatisticsRequest(name="reader", version="1")).model_stats
            if stats.inference_stats.success.count > more_than:
                break
        assert isinstance(stats, pb.ModelStatistics)
        return stats

    was = count(-1).inference_stats.success.count
    infer(served, tokens_request(np.ones((3, 40))))
    before = count(was)
    for _ in range(5):
        infer(served, tokens_request(np.ones((3, 40))))
    after = count(before.inference_stats.success.count + 4)
    assert after.inference_count - before.inference_count == 15
    assert after.execution_count - before.execution_count == 10  # 40 steps are two rounds of at most 32
    s, b = after.inference_stats, before.inference_stats
    assert s.success.count - b.success.count == s.queue.count - b.queue.count == 5
    assert s.compute_input.count == s.compute_infer.count == s.compute_output.count == s.success.count
    assert s.success.ns == pytest.approx(s.queue.ns + s.compute_input.ns + s.compute_infer.ns + s.compute_output.ns, abs=4)
    assert min(s.compute_input.ns, s.compute_output.ns) > 0
    assert all(min(b.compute_input.ns, b.compute_infer.ns, b.compute_output.ns) > 0 for b in after.batch_stats)
    assert s.compute_infer.ns > b.compute_infer.ns
    rounds = {batch.batch_size: batch.compute_infer.count for batch in after.batch_stats}
    assert sum(rounds.values()) == after.execution_count
    assert after.last_inference > before.last_inference > 0
    assert {m.name for m in method(pb.ModelStatisticsRequest()).model_stats} >= {"reader", "both_ways", "sentiment"}
    with pytest.raises(grpc.RpcError) as caught:
        method(pb.ModelStatisticsRequest(name="nope"))
    assert reason(caught.value)[1] == "UNKNOWN_MODEL"


def test_settings(served: Served) -> None:
    """Log verbosity can be read and set; nothing can be traced; what can't be had is refused."""
    log = served.method(f"{SERVICE}/LogSettings", pb.LogSettingsResponse)
    trace = served.method(f"{SERVICE}/TraceSetting", pb.TraceSettingResponse)

    def wish(**settings: Any) -> pb.LogSettingsRequest:
        request = pb.LogSettingsRequest()
        for name, value in settings.items():
            kind = {bool: "bool_param", int: "uint32_param", str: "string_param"}[type(value)]
            setattr(request.settings[name], kind, value)
        return request

    assert log(b"").settings["log_info"].bool_param
    assert log(wish(log_verbose_level=3)).settings["log_verbose_level"].uint32_param == 1
    quiet = log(wish(log_verbose_level=0, log_info=False)).settings
    assert (quiet["log_info"].bool_param, quiet["log_warning"].bool_param) == (False, True)
    assert log(wish(log_info=True, log_file="")).settings["log_info"].bool_param
    for bad in (wish(log_error=False), wish(log_file="x"), wish(log_format="ISO8601"), wish(nope=1), wish(log_info=1)):
        with pytest.raises(grpc.RpcError):
            log(bad)
    assert log(b"").settings["log_error"].bool_param
    assert list(trace(b"").settings["trace_level"].value) == ["OFF"]
    request = pb.TraceSettingRequest()
    request.settings["trace_level"].value.append("TIMESTAMPS")
    with pytest.raises(grpc.RpcError) as caught:
        trace(request)
    assert reason(caught.value)[1] == "NO_TRACE"
