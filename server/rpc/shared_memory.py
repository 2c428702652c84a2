"""POSIX shared memory that callers on this machine name in place of bytes: regions, and where in them a tensor lies.

Regions are read and written as files, never mapped: a caller may shorten one at any moment, and a mapped page that is gone
kills the process. It costs one copy, which also keeps a round's inputs as they were when they were checked.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protos import inference_pb2 as pb
from server.errors import Exists, InvalidInput, NotFound, Unsupported, listed
from server.rpc.answer import Answer, Desk
from server.rpc.front import Method
from server.rpc.parameters import SERVICE, whole

REGION = "shared_memory_region"
_SIZE = "shared_memory_byte_size"
_OFFSET = "shared_memory_offset"
_ROOT = Path("/dev/shm")  # where Linux keeps what shm_open makes
MOST = 4096  # regions: each holds a file open


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor lies: `size` bytes of a region, from `offset` on."""

    tensor: str
    region: str
    offset: int
    size: int

    def tell(self, parameters: Any, size: int) -> None:
        """Write into a response's map of parameters that `size` bytes are there."""
        parameters[REGION].string_param = self.region
        parameters[_SIZE].int64_param = size
        if self.offset:
            parameters[_OFFSET].int64_param = self.offset


@dataclass(frozen=True, slots=True)
class Region:
    name: str
    key: str
    offset: int
    size: int
    file: int  # descriptor


def place(tensor: str, parameters: Mapping[str, pb.InferParameter]) -> Place:
    """Where a tensor's parameters say that it lies. Raises InvalidInput."""
    region = parameters[REGION]
    if region.WhichOneof("parameter_choice") != "string_param":
        raise InvalidInput("BAD_PARAMETER", f"tensor {tensor!r}: {REGION} is the name of a region, a string", tensor=tensor)
    if _SIZE not in parameters:
        raise InvalidInput("BAD_PARAMETER", f"tensor {tensor!r}: {REGION} needs {_SIZE} beside it", tensor=tensor)
    return Place(tensor, region.string_param, _count(tensor, parameters, _OFFSET), _count(tensor, parameters, _SIZE))


def _count(tensor: str, parameters: Mapping[str, pb.InferParameter], name: str) -> int:
    return whole(f"{name} of {tensor}", parameters[name]) if name in parameters else 0


class Regions:
    """All registered regions. Any thread may use it."""

    def __init__(self, allowed: bool) -> None:
        self.allowed = allowed
        self._lock = threading.Lock()  # held while a region is used too, so that its file is not closed meanwhile
        self._regions: dict[str, Region] = {}

    def register(self, name: str, key: str, offset: int, size: int) -> None:
        """Raises Unsupported where shared memory is not allowed, InvalidInput, NotFound or Conflict where this can't be had."""
        if not self.allowed:
            raise Unsupported(
                "SHARED_MEMORY_OFF", "shared memory is off: start the server with --allow-shared-memory, or send the bytes themselves"
            )
        if not name or size < 1:
            raise InvalidInput("BAD_REGION", f"region {name!r} of {size} bytes: give it a name and at least 1 byte", region=name)
        plain = key.removeprefix("/")
        if not plain or "/" in plain or plain in (".", "..") or "\0" in plain:
            raise InvalidInput("BAD_KEY", f"key {key!r} is no name of shared memory: one such as '/frames'", region=name, key=key)
        with self._lock:
            if name in self._regions:
                raise Exists("REGION_EXISTS", f"shared memory region {name!r} is registered already; unregister it first", region=name)
            if len(self._regions) >= MOST:
                raise InvalidInput("REGION_QUOTA", f"{MOST} regions are registered, the most there may be; unregister some", limit=MOST)
            try:
                file = os.open(_ROOT / plain, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError as e:
                message = f"unable to open shared memory region {name!r}, key {key!r}: {e.strerror}"
                raise NotFound("NO_SUCH_MEMORY", message, region=name, key=key) from None
            there = os.fstat(file).st_size
            if offset + size > there:
                os.close(file)
                message = f"region {name!r}: {offset} + {size} bytes asked for, key {key!r} has {there}"
                raise InvalidInput("OUT_OF_BOUNDS", message, region=name, expected=f"0..{there}", got=offset + size)
            self._regions[name] = Region(name, key, offset, size, file)

    def unregister(self, name: str) -> None:
        """Forget one region, or all where no name is given. What is not there is forgotten already."""
        with self._lock:
            for gone in [name] if name else list(self._regions):
                if region := self._regions.pop(gone, None):
                    os.close(region.file)

    def status(self, name: str) -> list[Region]:
        """One region, or all. Raises NotFound."""
        with self._lock:
            return [self._find(name)] if name else list(self._regions.values())

    def read(self, at: Place) -> bytes:
        """Raises InvalidInput where the region has not so many bytes, NotFound where there is none of that name."""
        with self._lock:
            region = self._within(at)
            data = os.pread(region.file, at.size, region.offset + at.offset)
        if len(data) < at.size:
            raise InvalidInput("OUT_OF_BOUNDS", f"region {at.region!r} has become shorter than it was registered", region=at.region)
        return data

    def write(self, at: Place, data: bytes) -> None:
        """Raises InvalidInput where the bytes do not fit the place or the region, NotFound where there is none of that name."""
        if len(data) > at.size:
            message = f"output {at.tensor!r} has {len(data)} bytes; its place in region {at.region!r} has {at.size}"
            raise InvalidInput("OUT_OF_BOUNDS", message, tensor=at.tensor, expected=f"0..{at.size}", got=len(data))
        with self._lock:
            region = self._within(at)
            if os.fstat(region.file).st_size < region.offset + at.offset + len(data):  # writing would lengthen it
                raise InvalidInput("OUT_OF_BOUNDS", f"region {at.region!r} has become shorter than it was registered", region=at.region)
            os.pwrite(region.file, data, region.offset + at.offset)

    def _within(self, at: Place) -> Region:
        region = self._find(at.region)
        if at.offset + at.size > region.size:
            message = f"tensor {at.tensor!r}: {at.offset} + {at.size} bytes asked for, region {at.region!r} has {region.size}"
            raise InvalidInput("OUT_OF_BOUNDS", message, tensor=at.tensor, expected=f"0..{region.size}", got=at.offset + at.size)
        return region

    def _find(self, name: str) -> Region:
        if name not in self._regions:
            known = listed(sorted(self._regions))
            raise NotFound("UNKNOWN_REGION", f"there is no shared memory region {name!r}; there are: {known}", region=name, known=known)
        return self._regions[name]


class SharedMemory:
    """The protocol's methods over the regions."""

    def __init__(self, regions: Regions) -> None:
        self._regions = regions

    def methods(self, desk: Desk) -> Mapping[str, Method]:
        return {
            f"/{SERVICE}/SystemSharedMemoryStatus": desk.unary(pb.SystemSharedMemoryStatusRequest, self.status, operator=True),
            f"/{SERVICE}/SystemSharedMemoryRegister": desk.unary(pb.SystemSharedMemoryRegisterRequest, self.register, operator=True),
            f"/{SERVICE}/SystemSharedMemoryUnregister": desk.unary(pb.SystemSharedMemoryUnregisterRequest, self.unregister, operator=True),
            f"/{SERVICE}/CudaSharedMemoryStatus": desk.unary(
                pb.CudaSharedMemoryStatusRequest, lambda _, answer: answer.done(pb.CudaSharedMemoryStatusResponse())
            ),
            f"/{SERVICE}/CudaSharedMemoryRegister": desk.unary(pb.CudaSharedMemoryRegisterRequest, self.register_cuda),
            f"/{SERVICE}/CudaSharedMemoryUnregister": desk.unary(
                pb.CudaSharedMemoryUnregisterRequest, lambda _, answer: answer.done(pb.CudaSharedMemoryUnregisterResponse())
            ),
        }

    def status(self, request: pb.SystemSharedMemoryStatusRequest, answer: Answer) -> None:
        response = pb.SystemSharedMemoryStatusResponse()
        for r in self._regions.status(request.name):
            region = pb.SystemSharedMemoryStatusResponse.RegionStatus(name=r.name, key=r.key, offset=r.offset, byte_size=r.size)
            response.regions[r.name].CopyFrom(region)
        answer.done(response)

    def register(self, request: pb.SystemSharedMemoryRegisterRequest, answer: Answer) -> None:
        self._regions.register(request.name, request.key, request.offset, request.byte_size)
        answer.done(pb.SystemSharedMemoryRegisterResponse())

    def unregister(self, request: pb.SystemSharedMemoryUnregisterRequest, answer: Answer) -> None:
        self._regions.unregister(request.name)
        answer.done(pb.SystemSharedMemoryUnregisterResponse())

    def register_cuda(self, request: pb.CudaSharedMemoryRegisterRequest, answer: Answer) -> None:
        raise Unsupported(
            "NO_CUDA_MEMORY", "this server has no CUDA shared memory: use system shared memory, or send the bytes", region=request.name
        )
