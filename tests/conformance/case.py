"""What a case is: a title, the models it needs, and a function that asks a server and raises where the answer is not what the
protocol says. Knows tritonclient and outcomes; it must not know any particular server.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

PATIENCE = 30.0  # seconds a case waits for any one answer
Array = np.ndarray[Any, Any]


class NotOffered(Exception):
    """The server leaves out something that the protocol makes optional; says what."""


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    says: str
    needs: tuple[str, ...]
    run: Callable[[Server], None]


class Server:
    """The server under test, through tritonclient and through the plain stubs that it is made of."""

    def __init__(self, url: str, http: str = "") -> None:
        self.url = url
        self._http = http

    @cached_property
    def client(self) -> Any:
        return triton.InferenceServerClient(self.url)

    @property
    def http(self) -> str:
        """Where its REST face is, HOST:PORT. Raises NotOffered."""
        if not self._http:
            raise NotOffered("no REST face: --http HOST:PORT names one")
        return self._http

    @cached_property
    def stub(self) -> Any:
        return service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(self.url))

    @cached_property
    def extensions(self) -> frozenset[str]:
        return frozenset(self.client.get_server_metadata().extensions)

    def has(self, model: str) -> bool:
        return bool(self.client.is_model_ready(model))

    def step(self, model: str, value: int, sequence: int | str, start: bool = False, end: bool = False, **more: Any) -> int:
        """One request of a sequence; the number that comes back."""
        result = self.client.infer(
            model, [number(value)], sequence_id=sequence, sequence_start=start, sequence_end=end, client_timeout=PATIENCE, **more
        )
        return int(result.as_numpy("OUTPUT").item())

    @contextmanager
    def stream(self, headers: dict[str, str] | None = None) -> Iterator[tuple[Any, queue.SimpleQueue[Any]]]:
        """A client with an open stream, and what comes back on it: results, or exceptions."""
        came: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with triton.InferenceServerClient(self.url) as client:
            client.start_stream(lambda result, error: came.put(error if error else result), headers=headers)
            yield client, came
            client.stop_stream()


CASES: list[Case] = []


def case(*needs: str) -> Callable[[Callable[[Server], None]], Callable[[Server], None]]:
    """Register a case; its docstring is what the protocol says."""

    def add(run: Callable[[Server], None]) -> Callable[[Server], None]:
        group = run.__module__.rpartition("_")[2]
        CASES.append(Case(f"{group}: {run.__name__.replace('_', ' ')}", (run.__doc__ or "").strip(), needs, run))
        return run

    return add


def same(got: object, expected: object) -> None:
    """Raises AssertionError where two values or arrays differ."""
    equal = np.array_equal(got, expected) if isinstance(expected, np.ndarray) else got == expected  # type: ignore[arg-type]  # any array
    if not equal:
        raise AssertionError(f"expected {expected!r}, got {got!r}"[:500])


@contextmanager
def refused(*codes: str) -> Iterator[None]:
    """What happens inside must be refused with one of these status codes, and a message."""
    try:
        yield
    except InferenceServerException as e:
        status, message = str(e.status()).removeprefix("StatusCode."), e.message()
    except grpc.RpcError as e:
        status, message = e.code().name, e.details()
    else:
        raise AssertionError(f"was answered; expected {' or '.join(codes)}")
    if status not in codes:
        raise AssertionError(f"refused with {status} ({message}); expected {' or '.join(codes)}"[:500])
    if not message:
        raise AssertionError(f"refused with {status}, and no message")


def tensor(name: str, array: Array, datatype: str) -> Any:
    made = triton.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array)
    return made


def number(value: int) -> Any:
    """INPUT [1, 1] of the sequence models."""
    return tensor("INPUT", np.array([[value]], np.int32), "INT32")


def pair(rows: int = 1, dtype: type = np.int32, datatype: str = "INT32") -> tuple[list[Any], Array, Array]:
    """INPUT0, INPUT1 [rows, 16], and their sum and difference."""
    one: Array = np.arange(rows * 16, dtype=dtype).reshape(rows, 16)
    other: Array = np.full((rows, 16), 2, dtype)
    return [tensor("INPUT0", one, datatype), tensor("INPUT1", other, datatype)], one + other, one - other


def check_sums(result: Any, total: Array, difference: Array) -> None:
    same(result.as_numpy("OUTPUT0"), total)
    same(result.as_numpy("OUTPUT1"), difference)


def request(rows: int = 1) -> Any:
    """A raw ModelInferRequest for `simple`, to be bent."""
    inputs, _, _ = pair(rows)
    made = pb.ModelInferRequest(model_name="simple")
    for given in inputs:
        made.inputs.append(given._get_tensor())
        made.raw_input_contents.append(given._get_content())
    return made
