"""The system shared memory extension. A server may leave it out or have it turned off: then these are not offered."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as shm
from tritonclient.utils import InferenceServerException

from tests.conformance.case import NotOffered, Server, case, check_sums, pair, refused, same

SIZE = 64  # bytes of one tensor [1, 16] of int32
OFF = ("UNIMPLEMENTED", "UNAVAILABLE", "PERMISSION_DENIED", "FAILED_PRECONDITION")


@contextmanager
def _region(server: Server, size: int = 4 * SIZE) -> Iterator[tuple[str, Any]]:
    """A region of this process that the server knows by name."""
    name, key = f"r{uuid.uuid4().hex}", f"/c{uuid.uuid4().hex}"
    handle = shm.create_shared_memory_region(name, key, size)
    try:
        try:
            server.client.register_system_shared_memory(name, key, size)
        except InferenceServerException as e:
            status = str(e.status()).removeprefix("StatusCode.")
            if "system_shared_memory" in server.extensions or status not in OFF:
                raise
            raise NotOffered(f"system shared memory: {status}") from None
        yield name, handle
    finally:
        try:
            server.client.unregister_system_shared_memory(name)
        except InferenceServerException as e:
            if "system_shared_memory" in server.extensions:
                raise AssertionError(f"unregister: {e}") from None
        shm.destroy_shared_memory_region(handle)


def _inputs(name: str, handle: Any) -> list[Any]:
    """INPUT0 and INPUT1 of `simple` as the first two quarters of a region."""
    shm.set_shared_memory_region(handle, [np.arange(16, dtype=np.int32), np.full(16, 2, np.int32)])
    made = []
    for at in (0, 1):
        given = triton.InferInput(f"INPUT{at}", [1, 16], "INT32")
        given.set_shared_memory(name, SIZE, at * SIZE)
        made.append(given)
    return made


@case("simple")
def inputs_in_shared_memory(server: Server) -> None:
    """Inputs may lie in a region."""
    with _region(server) as (name, handle):
        check_sums(server.client.infer("simple", _inputs(name, handle)), *pair()[1:])


@case("simple")
def outputs_in_shared_memory(server: Server) -> None:
    """Outputs may be asked for in a region; the response has their form and none of their bytes."""
    with _region(server) as (name, handle):
        outputs = [triton.InferRequestedOutput(f"OUTPUT{at}") for at in (0, 1)]
        for at, output in enumerate(outputs):
            output.set_shared_memory(name, SIZE, (2 + at) * SIZE)
        response = server.client.infer("simple", _inputs(name, handle), outputs=outputs).get_response()
        same([tuple(o.shape) for o in response.outputs], [(1, 16)] * 2)
        same([c for c in response.raw_output_contents if c], [])
        whole = shm.get_contents_as_numpy(handle, np.int32, [4, 16])
        same(whole[2:3].copy(), pair()[1])
        same(whole[3:4].copy(), pair()[2])
        del whole


@case("simple")
def what_is_registered(server: Server) -> None:
    """The status lists regions; a name taken twice is refused; what is unregistered is known no more."""
    with _region(server) as (name, _):
        found = server.client.get_system_shared_memory_status()
        same(found.regions[name].byte_size, 4 * SIZE)
        with refused("ALREADY_EXISTS", "INVALID_ARGUMENT"):
            server.client.register_system_shared_memory(name, "/another", SIZE)
    same(name in server.client.get_system_shared_memory_status().regions, False)


@case("simple")
def beyond_a_region(server: Server) -> None:
    """A tensor that would reach beyond its region is refused, as are unknown regions and files that are none."""
    with _region(server) as (name, handle):
        inputs = _inputs(name, handle)
        for offset in (4 * SIZE - 1, 2**40):
            inputs[0].set_shared_memory(name, SIZE, offset)
            with refused("INVALID_ARGUMENT", "OUT_OF_RANGE"):
                server.client.infer("simple", inputs)
        inputs[0].set_shared_memory("no_such_region", SIZE)
        with refused("INVALID_ARGUMENT", "NOT_FOUND"):
            server.client.infer("simple", inputs)
        for key in ("/no_such_key_at_all", "../etc/passwd"):
            with refused("INVALID_ARGUMENT", "NOT_FOUND", "INTERNAL"):
                server.client.register_system_shared_memory("another", key, SIZE)
