"""ModelMetadata and ModelConfig: a model as the protocol and Triton's configuration describe it."""

from __future__ import annotations

from collections.abc import Iterable

from contract.bundle import BATCH, Tensor
from protos import inference_pb2 as pb
from protos import model_config_pb2 as config_pb
from server.config import Config
from server.rpc import wire
from server.rpc.face import TEXT, Face
from server.shares import DEFAULT, LEVELS

PLATFORM = "onnxruntime_onnx"
_TYPES = {
    "bool": "BOOL", "int8": "INT8", "int16": "INT16", "int32": "INT32", "int64": "INT64", "uint8": "UINT8", "uint16": "UINT16",
    "uint32": "UINT32", "uint64": "UINT64", "float16": "FP16", "float32": "FP32", "float64": "FP64", "string": "STRING",
}  # fmt: skip


def metadata(face: Face, versions: Iterable[str]) -> pb.ModelMetadataResponse:
    model = face.model
    response = pb.ModelMetadataResponse(name=model.name, versions=versions, platform=PLATFORM)
    for tensors, described in ((face.inputs, response.inputs), (face.outputs, response.outputs)):
        for t in tensors:
            described.add(name=t.name, datatype=wire.datatype(t), shape=wire.shape(t))
    response.properties["task"] = model.bundle.kind
    response.properties["fingerprint"] = model.bundle.fingerprint
    return response


def config(face: Face, knobs: Config) -> config_pb.ModelConfig:
    """What perf_analyzer and its like go by. Sequence batching where a call is one step and the model's states go on with the next,
    dynamic batching where one call brings any number of steps and most stand alone; both are the same rounds, and a caller may
    name a sequence_id in either."""
    model, graph, streams = face.model, face.model.bundle.graph, face.texts is not None and face.texts.streams
    batched = face.batched
    described = config_pb.ModelConfig(
        name=model.name, platform=PLATFORM, backend="onnxruntime", max_batch_size=face.most_rows if batched else 0,
        default_model_filename=graph.file,
        version_policy=config_pb.ModelVersionPolicy(all=config_pb.ModelVersionPolicy.All()),
        model_transaction_policy=config_pb.ModelTransactionPolicy(decoupled=streams),
        response_cache=config_pb.ModelResponseCache(enable=False),
    )  # fmt: skip
    described.instance_group.add(name=f"{model.name}_0", count=knobs.workers, kind=config_pb.ModelInstanceGroup.KIND_CPU)
    either = TEXT in face.inputs and len(face.inputs) > 1
    for t in face.inputs:
        _dims(described.input.add(name=t.name, data_type=_type(t.dtype), optional=either), t, batched)
    for t in face.outputs:
        _dims(described.output.add(name=t.name, data_type=_type(t.dtype)), t, batched)
    described.parameters["task"].string_value = model.bundle.kind
    described.parameters["fingerprint"].string_value = model.bundle.fingerprint
    for s in graph.states:
        if s.initial != 0:  # the configuration can say zero or a file, no number
            described.parameters[f"initial.{s.input}"].string_value = f"{s.initial:g}"
    if graph.states and not streams and not any(t.time_axis is not None for t in graph.data):
        _sequences(described, face, knobs)
    else:
        policy = config_pb.ModelQueuePolicy(allow_timeout_override=True, max_queue_size=knobs.max_queue)
        described.dynamic_batching.default_queue_policy.CopyFrom(policy)
        described.dynamic_batching.priority_levels = LEVELS
        described.dynamic_batching.default_priority_level = DEFAULT
    return described


def _sequences(described: config_pb.ModelConfig, face: Face, knobs: Config) -> None:
    batching = described.sequence_batching
    batching.max_sequence_idle_microseconds = int(knobs.session_ttl * 1e6)
    batching.oldest.max_candidate_sequences = knobs.max_sessions
    batching.oldest.preserve_ordering = True  # of one sequence's requests
    for s in face.model.bundle.graph.states:
        dims = [int(a) for a in s.axes if a != BATCH]
        state = batching.state.add(input_name=s.input, output_name=s.output, data_type=_type(s.dtype), dims=dims)
        if s.initial == 0:
            state.initial_state.add(name=s.input, data_type=_type(s.dtype), dims=dims, zero_data=True)


def _dims(given: config_pb.ModelInput | config_pb.ModelOutput, tensor: Tensor, batched: bool) -> None:
    dims = wire.shape(tensor)[1 if batched else 0 :]
    if dims:
        given.dims.extend(dims)
    else:  # the configuration knows no tensor without dims: it is one value, reshaped to none
        given.dims.append(1)
        given.reshape.SetInParent()


def _type(dtype: str) -> config_pb.DataType.ValueType:
    return config_pb.DataType.Value(f"TYPE_{_TYPES[dtype]}")
