"""Throws nonsense at a running server and holds what must be true all the while: it lives, it answers each caller with a typed
status, its neighbours' answers stay the same to the bit, and when the callers have gone nothing of them is left.

    python -m tests.fuzz --minutes 5 [--front public]       as tests/test_fuzz.py, for longer; a fault is shrunk and printed

What is thrown: bytes that are no protobuf; valid requests with bytes or fields changed; messages made from the descriptors
alone; tensors whose name, type, shape and bytes disagree; streams of all of these; sockets that speak no HTTP/2; bundles and
ONNX files with bytes or fields changed, loaded while the server runs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import socket
import struct
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import grpc
import numpy as np
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from protos import inference_pb2 as pb
from protos import seqserve_pb2 as tasks_pb
from protos import sessions_pb2
from tests import models
from tests.process import ROOT, Served, serve
from tests.test_server import tokens_request
from tests.test_turns import Calls, scores, turn

WAIT_S = 30
MOST = 1 << 20  # bytes that the server takes in one message: so that too large ones are cheap
FLAGS = ("--max-message-bytes", str(MOST), "--max-sessions", "500", "--session-ttl", "600", "--allow-shared-memory")
OURS = {"INTERNAL", "TURN_FAILED", "STORE_FAILED"}  # reasons that mean a bug of the server's
BARE = {  # statuses that gRPC or the front give without details
    grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED,
}  # fmt: skip
WORDS = (
    "", "reader", "both_ways", "fragile", "speaker", "sentiment", "forecaster", "tokens", "TEXT", "LABEL", "x", "scores", "last", "1", "0",
    "-1", "INT64", "FP32", "BYTES", "BOOL", "FP16", "sequence_id", "sequence_start", "sequence_end", "turn", "timeout", "priority", "kept",
    "a" * 300, "../../etc/passwd", "/dev/shm", "nul\0", "\ud7ff ü 🎬", "shared_memory_region", "shared_memory_byte_size",
    "shared_memory_offset", "classification", "config", '{"max_batch_size": -1}', "file:1/model.onnx", "log_verbose_level", "en", "de",
    "e\u0301" * 20,
)  # fmt: skip
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-310, 3.4e38, 1e308, float("nan"), float("inf"), float("-inf"))
SESSION = "kept"


@dataclass(frozen=True, slots=True)
class Target:
    """One method: how it is called, and requests that it accepts."""

    name: str
    request: type[Message]
    asks: bool  # a stream of requests
    streams: bool  # of replies
    valid: tuple[Message, ...] = ()


def targets() -> dict[str, Target]:
    """Every method that a server has."""
    named = tasks_pb.Model(name="speaker")
    reader = tokens_request([[1, 2, 3], [4, 5, 6]])
    stepped = tokens_request([[1, 2]])
    stepped.parameters["sequence_id"].int64_param = 5
    stepped.parameters["sequence_start"].bool_param = True
    text = pb.ModelInferRequest(model_name="sentiment")
    text.inputs.add(name="TEXT", datatype="BYTES", shape=[1, 1]).contents.bytes_contents.append(b"A film.")
    opened = sessions_pb2.OpenRequest(model=tasks_pb.Model(name="reader"))
    turns = [turn(SESSION, 1, [1, 2]), turn(SESSION, 2, [3], 1)]
    generate = tasks_pb.GenerateRequest(text="abc", max_symbols=5, seed=1, model=named)
    turns.append(sessions_pb2.TurnRequest(session=SESSION, turn=1, text="A film"))
    turns.append(sessions_pb2.TurnRequest(session=SESSION, turn=1, generate=tasks_pb.GenerateRequest(text="a", max_symbols=3)))
    series = tasks_pb.Series(channels=7, values=[0.1] * 7 * 48)
    valid: dict[str, tuple[Message, ...]] = {
        "ModelInfer": (reader, stepped, text),
        "ModelStreamInfer": (reader, stepped, text),
        "Open": (opened, sessions_pb2.OpenRequest(model=tasks_pb.Model(name="reader"), session=SESSION, ttl=60)),
        "Turn": tuple(turns),
        "Turns": (sessions_pb2.TurnsRequest(turns=turns), sessions_pb2.TurnsRequest(turns=turns[:1])),
        "Get": (sessions_pb2.SessionName(session=SESSION),),
        "Close": (sessions_pb2.SessionName(session=SESSION),),
        "Fork": (sessions_pb2.ForkRequest(session=SESSION),),
        "Export": (sessions_pb2.ExportRequest(session=SESSION),),
        "Generate": (generate,),
        "GenerateStream": (generate,),
        "Classify": (tasks_pb.ClassifyRequest(texts=["A film.", ""]),),
        "Forecast": (tasks_pb.ForecastRequest(observations=series, horizon=3),),
        "ServerReflectionInfo": (reflection_pb2.ServerReflectionRequest(list_services=""),),
    }
    found = {}
    for file in (pb, tasks_pb, sessions_pb2, health_pb2, reflection_pb2):
        for service in file.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                made = message_factory.GetMessageClass(method.input_type)
                name = f"/{service.full_name}/{method.name}"
                given = tuple(m for m in valid.get(method.name, ()) if m.DESCRIPTOR is method.input_type)
                found[name] = Target(name, made, method.client_streaming, method.server_streaming, given)
    return found


TARGETS = targets()


# ---- What is thrown ----


def _ints(low: int, high: int) -> st.SearchStrategy[int]:
    edges = [n for n in (0, 1, -1, 2, 3, 64, 65536, 1 << 31, 1 << 40, low, high) if low <= n <= high]
    return st.sampled_from(edges) | st.integers(low, high)


_SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_INT32: _ints(-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.CPPTYPE_INT64: _ints(-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.CPPTYPE_UINT32: _ints(0, (1 << 32) - 1),
    FieldDescriptor.CPPTYPE_UINT64: _ints(0, (1 << 64) - 1),
    FieldDescriptor.CPPTYPE_DOUBLE: st.sampled_from(FLOATS),
    FieldDescriptor.CPPTYPE_FLOAT: st.sampled_from([f for f in FLOATS if abs(f) != 1e308]),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
}
_TEXTS = st.sampled_from(WORDS) | st.text(max_size=8)
_MODELS = ("reader", "both_ways", "fragile", "speaker", "sentiment", "forecaster", "tokens", "x")
_LIKELY = {"name": _MODELS, "model_name": _MODELS, "session": (SESSION,), "datatype": ("INT64", "FP32", "BYTES")}  # or little gets far
_BYTES = st.binary(max_size=40) | st.integers(0, 40).map(bytes) | st.sampled_from([struct.pack("<I", 1 << 31), struct.pack("<q", -1) * 3])


def _value(field: FieldDescriptor, depth: int) -> st.SearchStrategy[Any]:
    if field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        return messages(field.message_type, depth - 1)
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        if field.name in _LIKELY and field.type == FieldDescriptor.TYPE_STRING:
            return st.sampled_from(_LIKELY[field.name]) | _TEXTS
        return _TEXTS if field.type == FieldDescriptor.TYPE_STRING else _BYTES
    if field.enum_type is not None:
        known = [v.number for v in field.enum_type.values]
        return st.sampled_from(known if field.enum_type.is_closed else [*known, -1, 99])
    return _SCALARS[field.cpp_type]


def _set(draw: Any, message: Message, field: FieldDescriptor, depth: int) -> None:
    """Something in a field: valid as protobuf, and no more."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = (field.message_type.fields_by_name[n] for n in ("key", "value"))
        entries = getattr(message, field.name)
        for _ in range(draw(st.integers(0, 2))):
            k = draw(_value(key, depth))
            if value.message_type is not None:
                entries[k].CopyFrom(draw(_value(value, depth)))
            else:
                entries[k] = draw(_value(value, depth))
    elif field.is_repeated:
        getattr(message, field.name).extend(draw(st.lists(_value(field, depth), max_size=3)))
    elif field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE:
        getattr(message, field.name).CopyFrom(draw(_value(field, depth)))
    else:
        setattr(message, field.name, draw(_value(field, depth)))


@st.composite
def messages(draw: Any, of: Descriptor, depth: int = 3) -> Message:
    """A message made from its descriptor alone."""
    message = message_factory.GetMessageClass(of)()
    for field in of.fields:
        if (depth > 0 or field.message_type is None) and draw(st.booleans()):
            _set(draw, message, field, depth)
    return message


@st.composite
def changed(draw: Any, valid: Message) -> bytes:
    """A valid message with a few fields, at any depth, changed."""
    message = type(valid)()
    message.CopyFrom(valid)
    for _ in range(draw(st.integers(1, 3))):
        at = message
        while True:
            inner = [v for f, values in at.ListFields() for v in _messages_in(f, values)]
            if not inner or draw(st.booleans()):
                break
            at = draw(st.sampled_from(inner))
        fields = at.DESCRIPTOR.fields
        if fields:
            field = draw(st.sampled_from(list(fields)))
            if draw(st.booleans()):
                at.ClearField(field.name)
            _set(draw, at, field, 2)
    return message.SerializeToString()


def _messages_in(field: FieldDescriptor, values: Any) -> list[Message]:
    if field.message_type is None:
        return []
    if field.message_type.GetOptions().map_entry:
        return [v for v in values.values() if isinstance(v, Message)]
    return list(values) if field.is_repeated else [values]


@st.composite
def broken(draw: Any, valid: bytes) -> bytes:
    """Bytes cut, changed, put in, doubled or taken out."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(1, 8)))
        match draw(st.integers(0, 4)):
            case 0:
                del data[at:]
            case 1:
                data[at:end] = draw(st.binary(min_size=end - at, max_size=end - at))
            case 2:
                data[at:at] = draw(st.binary(min_size=1, max_size=8))
            case 3:
                data[at:at] = data[at:end]
            case 4:
                del data[at:end]
    return bytes(data)


@st.composite
def tensors(draw: Any) -> bytes:
    """A ModelInfer whose tensors' names, types, shapes and bytes may disagree."""
    request = pb.ModelInferRequest(
        model_name=draw(st.sampled_from(["reader", "both_ways", "fragile", "speaker", "sentiment", "forecaster"]))
    )
    for _ in range(draw(st.integers(1, 2))):
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 400, 401, -1, 1 << 20, 1 << 31, (1 << 62) + 1]), max_size=4))
        size = int(np.prod([abs(n) for n in shape], dtype=object)) * 8
        name = draw(st.sampled_from(["tokens", "x", "TEXT", "values", "h", ""]))
        request.inputs.add(name=name, datatype=draw(st.sampled_from(["INT64", "FP32", "BYTES", "BOOL", "FP16", "nonsense"])), shape=shape)
        wrong = draw(st.sampled_from([0, 0, 0, 1, -1, 4]))
        fill = draw(st.sampled_from([b"\0", b"\1\0\0\0\0\0\0\0", b"\xff", b"\0\0\xc0\x7f", b"\4\0\0\0abcd"]))
        length = max(0, min(size, 65536) + wrong)
        request.raw_input_contents.append((fill * (length // len(fill) + 1))[:length])
    for name in draw(st.lists(st.sampled_from(["scores", "last", "y", "LABEL", "no such"]), max_size=2)):
        request.outputs.add(name=name)
    if draw(st.booleans()):
        request.parameters["sequence_id"].int64_param = draw(st.integers(1, 3))
        request.parameters["sequence_start"].bool_param = draw(st.booleans())
    return request.SerializeToString()


def requests(target: Target) -> st.SearchStrategy[bytes]:
    """Requests of all kinds to one method."""
    kinds = [st.binary(max_size=64), messages(target.request.DESCRIPTOR).map(lambda m: m.SerializeToString())]
    for valid in target.valid:
        kinds += [changed(valid), broken(valid.SerializeToString()), st.just(valid.SerializeToString())]
    if target.name.endswith("Infer"):
        kinds.append(tensors())
    return st.one_of(kinds)


# The neighbour's model must stay; what an operator may do to a server is no nonsense.
NAMES = [name for name in TARGETS if not name.endswith("RepositoryModelUnload")]


def thrown_at(name: str) -> st.SearchStrategy[tuple[str, list[bytes]]]:
    """A call of one method: its request, or those of its stream."""
    return st.tuples(st.just(name), st.lists(requests(TARGETS[name]), min_size=1, max_size=4 if TARGETS[name].asks else 1))


throws = st.sampled_from(NAMES).flatmap(thrown_at)


# ---- How it is thrown, and what must be true ----


class Field:
    """A server, a neighbour that works beside the nonsense, and the nonsense."""

    def __init__(self, server: Served) -> None:
        self.server = server
        self.asked = tokens_request([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
        self.infer = server.method("/inference.GRPCInferenceService/ModelInfer")
        self.expected = _tensors_of(self.infer(self.asked))
        self.calls = Calls(server)
        self.codes: dict[str, int] = {}
        self.thrown = 0
        self._session = ""
        self._read: list[int] = []
        self._said = b""
        self._begin()

    def _begin(self) -> None:
        self._session = self.calls.new(session=f"neighbour-{self.thrown}")
        self._read, self._said = [], b""

    def _neighbour(self) -> grpc.Future:
        """A call and a turn of a well-behaved caller, under way."""
        n = self.thrown % 7
        self._read.append(n)
        reply = self.calls.turn(turn(self._session, len(self._read), [n], len(self._read) - 1), timeout=WAIT_S)
        self._said += scores(sessions_pb2.TurnReply.FromString(reply))
        return self.infer.future(self.asked, timeout=WAIT_S)

    def settle(self) -> None:
        """The neighbour's session was, cut into single steps amid it all, what the whole is alone."""
        if self._read:
            whole = pb.ModelInferResponse.FromString(self.infer(tokens_request([self._read])))
            names = [o.name for o in whole.outputs]
            assert self._said == whole.raw_output_contents[names.index("scores")], "the neighbour's session was harmed"
        self.calls.close(sessions_pb2.SessionName(session=self._session))
        self._session = ""

    def throw(self, name: str, data: Sequence[bytes]) -> None:
        """Send requests to a method, and judge the answer. Raises AssertionError."""
        target = TARGETS[name]
        neighbour = self._neighbour()
        if target.asks:
            self._judge(name, lambda: list(self.server.channel.stream_stream(name)(iter(data), timeout=WAIT_S)))
        elif target.streams:
            most = 1 if name.endswith("/Watch") else 3  # a watch has no end
            self._judge(name, lambda: _some(self.server.channel.unary_stream(name)(data[0], timeout=WAIT_S), most))
        else:
            self._judge(name, lambda: [self.server.method(name)(data[0], timeout=WAIT_S)])
        assert _tensors_of(neighbour.result()) == self.expected, "the neighbour's answer was harmed"
        self.thrown += 1
        if len(self._read) == 300:  # what the model reads at once is limited
            self.settle()
            self._begin()
        if self.thrown % 100 == 0:
            self._close()

    def _judge(self, name: str, call: Callable[[], list[bytes]]) -> None:
        try:
            for reply in call():
                self._judge_reply(name, reply)
            self._count("OK")
        except grpc.RpcError as e:
            self._judge_error(name, e)

    def _judge_error(self, name: str, error: grpc.RpcError) -> None:
        code, details = error.code(), dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
        self._count(code.name)
        said = f"{name}: {code.name}: {error.details()}"
        if details is None:
            assert code in BARE, f"without details: {said}"
            return
        info = ErrorInfo()
        assert Status.FromString(details).details[0].Unpack(info), said
        assert info.reason, said
        assert info.reason not in OURS, said
        assert code not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE), said

    def _judge_reply(self, name: str, reply: bytes) -> None:
        """Refusals that come as messages of a stream are typed as well."""
        if name.endswith("/Turns"):
            for t in sessions_pb2.TurnsReply.FromString(reply).turns:
                if t.HasField("refusal"):
                    assert t.refusal.code, t
                    assert t.refusal.reason, t
                    assert t.refusal.reason not in OURS, t
        elif name.endswith("/ModelStreamInfer"):
            told = pb.ModelStreamInferResponse.FromString(reply).error_message
            assert "the server failed" not in told, told

    def _count(self, code: str) -> None:
        self.codes[code] = self.codes.get(code, 0) + 1

    def sockets(self) -> None:
        """Connections that speak no HTTP/2, stop midway, or say nothing: they end, or may stay, and nobody else notices."""
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        frames = (b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00", os.urandom(400), preface, preface + os.urandom(200),
            preface + b"\0\0\0\4\0\0\0\0\0" + b"\xff\xff\xff\1\5\0\0\0\1" + b"\0" * 100, preface + b"\0\0\0\4\0\0\0\0\0" * 50)  # fmt: skip
        for data in frames:
            neighbour = self._neighbour()
            with socket.create_connection(("127.0.0.1", self.server.port), WAIT_S) as sock:
                with contextlib.suppress(OSError):
                    sock.sendall(data)
                assert _tensors_of(neighbour.result()) == self.expected
            self.thrown += 1

    def too_large(self) -> None:
        """Messages over the limit, of calls and of streams: refused, and not read."""
        for name in ("/inference.GRPCInferenceService/ModelInfer", "/seqserve.v1.Sessions/Turns", "/seqserve.v1.Tasks/Classify"):
            before = self.codes.get("RESOURCE_EXHAUSTED", 0)
            self.throw(name, [bytes(MOST + 1)])
            assert self.codes.get("RESOURCE_EXHAUSTED", 0) == before + 1, name

    def _close(self) -> None:
        """End every session that the nonsense has opened."""
        for session in self.calls.list(sessions_pb2.ListRequest()).sessions:
            if session.session != self._session:
                self.calls.close(sessions_pb2.SessionName(session=session.session))

    def check(self) -> None:
        """Its callers gone, nothing waits, no session lives, the log tells of no bug. Raises AssertionError."""
        self.settle()
        self._close()
        assert self.server.process.poll() is None, "".join(self.server.log)[-3000:]
        assert not self.calls.list(sessions_pb2.ListRequest()).total
        until = time.monotonic() + WAIT_S
        while waiting := self._waiting():
            assert time.monotonic() < until, f"sequences are left behind: {waiting}"
        log = "".join(self.server.log)
        assert "Traceback" not in log, log[max(0, log.index("Traceback") - 500) :][:3000]
        self._begin()

    def _waiting(self) -> list[str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.server.metrics_port}/metrics", timeout=WAIT_S) as page:
            text = page.read().decode()
        return [line for line in text.splitlines() if line.startswith("seqserve_waiting{") and not line.endswith(" 0.0")]

    def size(self) -> tuple[int, int]:
        """Resident MiB and open files of the server."""
        proc = Path(f"/proc/{self.server.process.pid}")
        pages = int((proc / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") >> 20, len(list((proc / "fd").iterdir()))


def _some(replies: Any, most: int) -> list[bytes]:
    """The first replies of a stream; then its caller leaves."""
    try:
        return list(itertools.islice(replies, most))
    finally:
        replies.cancel()


def _tensors_of(reply: bytes) -> list[bytes]:
    return list(pb.ModelInferResponse.FromString(reply).raw_output_contents)


# ---- Files ----


@st.composite
def bundles(draw: Any) -> tuple[str, str, bytes]:
    """Which bundle, which of its files, and what is in it instead."""
    name, files = draw(
        st.sampled_from([("reader", ("bundle.json", "step.onnx")), ("speaker", ("bundle.json", "step.onnx", "vocabulary.json"))])
    )
    file = draw(st.sampled_from(files))
    original = ORIGINALS[name, file]
    if file.endswith(".json") and draw(st.booleans()):
        return name, file, json.dumps(_rewritten(draw, json.loads(original))).encode()
    if file.endswith(".onnx") and draw(st.booleans()):
        return name, file, draw(changed(_onnx(original)))
    return name, file, draw(broken(original))


def _rewritten(draw: Any, value: Any) -> Any:
    """The same JSON with one value, anywhere, another."""
    nonsense = [None, True, -1, 0, 1 << 70, 1e400, "", "..", "a" * 300, [], {}, [[]], "batch", "time", "float32"]
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        if not draw(st.integers(0, 9)):
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: _rewritten(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], _rewritten(draw, value[at]), *value[at + 1 :]]
    return draw(st.sampled_from(nonsense))


def _onnx(data: bytes) -> Message:
    import onnx

    return onnx.ModelProto.FromString(data)


ORIGINALS: dict[tuple[str, str], bytes] = {}


def load(field: Field, library: Path, case: tuple[str, str, bytes]) -> None:
    """Put a broken bundle where models lie, have it loaded, and, where it is served, called. Raises AssertionError."""
    name, file, data = case
    place = library / "odd" / "1"
    shutil.rmtree(place.parent, ignore_errors=True)
    place.mkdir(parents=True)
    for (of, other), original in ORIGINALS.items():
        if of == name:
            (place / other).write_bytes(data if other == file else original.replace(b'"%s"' % name.encode(), b'"odd"', 1))
    service = "/inference.GRPCInferenceService"
    field.throw(f"{service}/RepositoryModelLoad", [pb.RepositoryModelLoadRequest(model_name="odd").SerializeToString()])
    request = tokens_request([[1, 2, 3]])
    request.model_name = "odd"
    field.throw(f"{service}/ModelInfer", [request.SerializeToString()])
    field.throw(
        "/seqserve.v1.Tasks/Generate", [tasks_pb.GenerateRequest(model=tasks_pb.Model(name="odd"), max_symbols=3).SerializeToString()]
    )
    with contextlib.suppress(grpc.RpcError):
        field.server.method(f"{service}/RepositoryModelUnload")(pb.RepositoryModelUnloadRequest(model_name="odd"))


@contextlib.contextmanager
def field(library: Path, front: str) -> Iterator[Field]:
    """A server with a few models of every kind, and what must be true at the end."""
    models.library(library)
    models.speaker(library / "speaker" / "1")
    for name in ("sentiment", "forecaster"):
        if not (library / name).exists():
            (library / name).symlink_to(ROOT / "models" / name)
    for name, file in (
        ("reader", "step.onnx"),
        ("reader", "bundle.json"),
        *(("speaker", f) for f in ("step.onnx", "bundle.json", "vocabulary.json")),
    ):
        ORIGINALS[name, file] = (library / name / "1" / file).read_bytes()
    with serve(library, "--front", front, *FLAGS) as server:
        f = Field(server)
        yield f
        f.check()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Throw nonsense at a server for a while.")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--front", choices=("direct", "public"), default="direct")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    asked = parser.parse_args(argv)
    ends = time.monotonic() + asked.minutes * 60
    calm = settings(
        max_examples=300, deadline=None, database=None, phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck)
    )
    with TemporaryDirectory() as root, field(Path(root), asked.front) as f:
        n = asked.seed
        sizes = []
        while time.monotonic() < ends:
            print(f"seed {n}", end=": ", flush=True)
            seed(n)(calm(given(throws)(lambda case: f.throw(*case))))()
            seed(n)(settings(calm, max_examples=40)(given(bundles())(lambda case: load(f, Path(root), case))))()
            f.sockets()
            f.too_large()
            f.check()
            sizes.append(f.size())
            print(f"{f.thrown} thrown, {sizes[-1][0]} MiB, {sizes[-1][1]} files, {f.codes}", flush=True)
            n += 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
