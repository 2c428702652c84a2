"""Tensors in POSIX shared memory: what is there is what would have been sent; nothing outside a region is read or written."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos import inference_pb2 as pb
from server.errors import InvalidInput, NotFound, Unsupported
from server.rpc.shared_memory import Place, Regions
from tests import models
from tests.process import Served, reason, serve
from tests.test_inference import SERVICE, echo, infer, packed, refused, unpacked
from tests.test_server import tokens_request


@pytest.fixture
def memory() -> Iterator[Path]:
    """4096 bytes of shared memory."""
    file = Path("/dev/shm") / f"seqserve-test-{secrets.token_hex(8)}"
    file.write_bytes(bytes(4096))
    yield file
    file.unlink()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("models")
    models.reader(root / "reader" / "1")
    echo(root / "string" / "1", "string", "string")
    with serve(root, "--allow-shared-memory") as server:
        yield server


def register(served: Served, name: str, memory: Path, offset: int = 0, size: int = 4096) -> None:
    request = pb.SystemSharedMemoryRegisterRequest(name=name, key=f"/{memory.name}", offset=offset, byte_size=size)
    served.method(f"{SERVICE}/SystemSharedMemoryRegister")(request)


def unregister(served: Served, name: str = "") -> None:
    served.method(f"{SERVICE}/SystemSharedMemoryUnregister")(pb.SystemSharedMemoryUnregisterRequest(name=name))


def put(tensor: Any, region: str, offset: int, size: int) -> None:
    tensor.parameters["shared_memory_region"].string_param = region
    tensor.parameters["shared_memory_byte_size"].int64_param = size
    if offset:
        tensor.parameters["shared_memory_offset"].int64_param = offset


def test_inputs_and_outputs(served: Served, memory: Path) -> None:
    """Tokens are read from one place and scores written to another, the output beside them travels as ever; the same bits."""
    tokens = np.array([[3, 1, 4], [1, 5, 9]])
    sent = infer(served, tokens_request(tokens))
    with memory.open("r+b") as file:
        file.seek(256 + 16)
        file.write(tokens.tobytes())
    register(served, "region", memory, 256, 1024)
    request = pb.ModelInferRequest(model_name="reader")
    put(request.inputs.add(name="tokens", datatype="INT64", shape=[2, 3]), "region", 16, 48)
    put(request.outputs.add(name="scores"), "region", 512, 512)
    request.outputs.add(name="last")
    answer = infer(served, request)
    assert list(answer.raw_output_contents) == [b"", sent.raw_output_contents[1]]
    told = answer.outputs[0].parameters
    assert (told["shared_memory_region"].string_param, told["shared_memory_offset"].int64_param) == ("region", 512)
    assert told["shared_memory_byte_size"].int64_param == len(sent.raw_output_contents[0])
    assert memory.read_bytes()[256 + 512 :].startswith(sent.raw_output_contents[0])
    status = served.method(f"{SERVICE}/SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusResponse)(b"")
    assert [(r.name, r.key, r.offset, r.byte_size) for r in status.regions.values()] == [("region", f"/{memory.name}", 256, 1024)]
    unregister(served)
    assert refused(served, request)[0] == "UNKNOWN_REGION"


def test_texts(served: Served, memory: Path) -> None:
    """Texts too; and an output that does not fit is refused, not cut."""
    texts = ["a", "", "ü€", "x" * 99]
    raw = packed(texts)
    with memory.open("r+b") as file:
        file.write(raw)
    register(served, "texts", memory)
    request = pb.ModelInferRequest(model_name="string")
    put(request.inputs.add(name="x", datatype="BYTES", shape=[4, 1]), "texts", 0, len(raw))
    put(request.outputs.add(name="y"), "texts", 2048, 1024)
    infer(served, request)
    assert unpacked(memory.read_bytes()[2048 : 2048 + len(raw)]) == texts
    request.outputs[0].parameters["shared_memory_byte_size"].int64_param = len(raw) - 1
    assert refused(served, request)[0] == "OUT_OF_BOUNDS"
    numbered = tokens_request([[1]])
    numbered.parameters["sequence_id"].int64_param = 1
    numbered.parameters["turn"].int64_param = 1
    numbered.parameters["sequence_start"].bool_param = True
    put(numbered.outputs.add(name="last"), "texts", 0, 8)
    assert refused(served, numbered)[0] == "NOT_REPEATABLE"
    unregister(served, "texts")


def test_what_cannot_be_registered(served: Served, memory: Path) -> None:
    """A name twice, keys that leave shared memory or are not there, sizes beyond its end; CUDA memory at all."""

    def why(name: str, key: str, offset: int = 0, size: int = 4096) -> str:
        request = pb.SystemSharedMemoryRegisterRequest(name=name, key=key, offset=offset, byte_size=size)
        with pytest.raises(grpc.RpcError) as caught:
            served.method(f"{SERVICE}/SystemSharedMemoryRegister")(request)
        return reason(caught.value)[1]

    register(served, "here", memory)
    assert why("here", f"/{memory.name}") == "REGION_EXISTS"
    for key in ("", "/", "..", "/../x", "/a/b", "a\0b"):
        assert why("x", key) == "BAD_KEY"
    assert why("x", "/seqserve-no-such-memory") == "NO_SUCH_MEMORY"
    assert why("x", f"/{memory.name}", 1) == "OUT_OF_BOUNDS"
    assert why("x", f"/{memory.name}", (1 << 64) - 1, 2) == "OUT_OF_BOUNDS"
    assert why("x", f"/{memory.name}", 0, 0) == "BAD_REGION"
    assert why("", f"/{memory.name}") == "BAD_REGION"
    unregister(served)
    assert not served.method(f"{SERVICE}/CudaSharedMemoryStatus", pb.CudaSharedMemoryStatusResponse)(b"").regions
    served.method(f"{SERVICE}/CudaSharedMemoryUnregister")(b"")
    with pytest.raises(grpc.RpcError) as caught:
        served.method(f"{SERVICE}/CudaSharedMemoryRegister")(pb.CudaSharedMemoryRegisterRequest(name="x", byte_size=8))
    assert reason(caught.value)[:2] == (grpc.StatusCode.UNIMPLEMENTED, "NO_CUDA_MEMORY")


def test_off_unless_allowed() -> None:
    """Where the server does not allow it, nothing can be registered; to forget all is no error."""
    regions = Regions(allowed=False)
    with pytest.raises(Unsupported):
        regions.register("x", "/x", 0, 1)
    regions.unregister("")


def test_memory_that_shrinks(memory: Path) -> None:
    """A region that its maker cuts short is told as such: neither is it read past its end nor made longer again."""
    regions = Regions(allowed=True)
    regions.register("x", memory.name, 0, 4096)
    assert regions.read(Place("t", "x", 4000, 96)) == bytes(96)
    with memory.open("r+b") as file:
        file.truncate(100)
    with pytest.raises(InvalidInput, match="shorter"):
        regions.read(Place("t", "x", 90, 20))
    with pytest.raises(InvalidInput, match="shorter"):
        regions.write(Place("t", "x", 90, 20), bytes(20))
    assert memory.stat().st_size == 100
    regions.unregister("x")
    with pytest.raises(NotFound):
        regions.read(Place("t", "x", 0, 1))
