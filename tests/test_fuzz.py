"""Nonsense thrown at a running server, for seconds; `make fuzz MINUTES=n` goes on for longer. What is thrown is in fuzz.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from protos import inference_pb2 as pb
from tests import fuzz

QUICK = settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module", params=["direct", "public"])
def field(request: pytest.FixtureRequest, library: Path) -> Iterator[fuzz.Field]:
    with fuzz.field(library, request.param) as field:
        yield field


def test_requests(field: fuzz.Field) -> None:
    """Whatever is sent to whatever method, the answer is typed, and a neighbour's call and session are what they are alone."""
    for name in fuzz.NAMES:
        count = 40 if fuzz.TARGETS[name].valid else 10
        settings(QUICK, max_examples=count)(given(fuzz.thrown_at(name))(lambda case: field.throw(*case)))()
    field.check()
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} <= set(field.codes), "nonsense that never gets anywhere proves little"


def test_sockets(field: fuzz.Field) -> None:
    """Connections that are not gRPC's, or stop midway, harm nobody."""
    field.sockets()
    field.too_large()
    field.check()


def test_bundles(field: fuzz.Field, library: Path) -> None:
    """Broken bundles and ONNX files are refused, or served with typed answers; the models beside them go on."""
    settings(QUICK, max_examples=40)(given(fuzz.bundles())(lambda case: fuzz.load(field, library, case)))()
    field.check()


def test_what_was_found(field: fuzz.Field, library: Path) -> None:
    """What nonsense has brought to light, once more: a description with null for a file, a name too long for any file."""
    description = fuzz.ORIGINALS["speaker", "bundle.json"]
    for word in (b"null", b"7", b'"' + b"a" * 300 + b'"', b"[]", b"{}"):
        fuzz.load(field, library, ("speaker", "bundle.json", description.replace(b'"vocabulary.json"', word)))
    long = pb.RepositoryModelLoadRequest(model_name="a" * 300)
    field.throw("/inference.GRPCInferenceService/RepositoryModelLoad", [long.SerializeToString()])
    field.throw("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", [b"\xff"])
    field.check()


def test_nothing_grows(field: fuzz.Field) -> None:
    """The same nonsense again takes neither memory nor open files that it had not taken before."""
    again = settings(QUICK, phases=(Phase.generate,))(given(fuzz.throws)(lambda case: field.throw(*case)))
    again()
    field.check()
    before = field.size()
    for _ in range(3):
        again()
    field.check()
    after = field.size()
    assert after[0] <= before[0] + 16, "MiB"
    assert after[1] <= before[1] + 2, "files"
