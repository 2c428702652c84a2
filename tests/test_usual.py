"""Requests of a known form, which are not parsed: they must mean what they mean when they are. Each is sent to a server that reads known
forms, again and again, and to one that parses everything (it logs its calls): same answers, same refusals, to the byte."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import inference_pb2 as pb
from server.rpc.usual import cut
from tests import models
from tests.process import Served, reason, serve

INFER = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Served]]:
    library = tmp_path_factory.mktemp("models")
    models.library(library)
    with serve(library) as quick, serve(library, "--access-log") as parsing:
        yield quick, parsing


def asked(tokens: Any, id: str = "", outputs: tuple[str, ...] = (), version: str = "", **parameters: Any) -> pb.ModelInferRequest:
    array = np.asarray(tokens, np.int64)
    request = pb.ModelInferRequest(model_name="reader", model_version=version, id=id, raw_input_contents=[array.tobytes()])
    request.inputs.add(name="tokens", datatype="INT64", shape=array.shape)
    for name in outputs:
        request.outputs.add(name=name)
    for name, value in parameters.items():
        kind = "bool_param" if isinstance(value, bool) else "int64_param" if isinstance(value, int) else "string_param"
        setattr(request.parameters[name], kind, value)
    return request


def told(server: Served, data: bytes) -> tuple[Any, ...]:
    """An answer without its times, or a refusal."""
    try:
        response = pb.ModelInferResponse.FromString(server.method(INFER)(data))
    except grpc.RpcError as e:
        code, why, facts, _ = reason(e)
        return code, why, facts
    for name in ("queue_us", "run_us"):
        response.parameters.pop(name, None)
    return (response.SerializeToString(deterministic=True),)


LONG = "an id of more than a hundred and twenty-seven letters " * 4
STORIES = {
    "plain": [asked([[1, 2, 3]])],
    "ids": [asked([[1, 2]], id=id) for id in ("a", "", "ü", LONG, "a")],
    "outputs": [asked([[5]], outputs=tuple(o.split())) for o in ("last", "scores last", "last scores", "last last", "none", "last")],
    "shapes": [asked([[1] * n]) for n in (1, 2, 127, 128, 1)],
    "rows": [asked([[1], [2]]), asked([[1, 2]]), asked([[1], [2]])],
    "values": [asked([[3]]), asked([[99_999]]), asked([[-1]]), asked([[3]])],
    "versions": [asked([[1]], version=v) for v in ("", "1", "9", "one", "1")],
    "a sequence": [
        asked([[1, 2]], "x", ("last",), sequence_id=7, sequence_start=True),
        *[asked([[n]], "x", ("last",), sequence_id=7) for n in (3, 4)],
        asked([[5]], "x", ("last",), sequence_id=7, sequence_end=True),
        asked([[6]], "x", ("last",), sequence_id=7),
    ],
    "ids of sequences": [
        asked([[1]], sequence_id=id, sequence_start=True, sequence_end=True) for id in (1, "one", 2**40, "1", "ü", 0, "", LONG)
    ],
    "numbered": [
        asked([[1]], sequence_id="n", sequence_start=True, turn=1),
        *[asked([[2]], sequence_id="n", turn=n) for n in (2, 2, 4, 3)],
    ],
    "parameters": [asked([[1]], timeout=10_000_000), asked([[1]], timeout="soon"), asked([[1]], unknown=3), asked([[1]], triton_x=3)],
}  # fmt: skip


@pytest.mark.parametrize("story", STORIES)
def test_a_known_form_means_what_it_says(servers: tuple[Served, Served], story: str) -> None:
    """Three times over: the first time nothing is known, then all is."""
    for _ in range(3):
        for request in STORIES[story]:
            data = request.SerializeToString()
            quick, parsed = (told(server, data) for server in servers)
            assert quick == parsed


def test_bytes_that_are_no_request_of_a_known_form(servers: tuple[Served, Served]) -> None:
    """Cut off, too short, twice, with an id that is no text, with a field that nobody knows: as when they are parsed."""
    good = asked([[1, 2, 3]], id="abc").SerializeToString()
    for server in servers:
        told(server, good)
    other = asked([[1, 2]], id="abc").SerializeToString()
    wrong = [
        *(good[:n] for n in range(0, len(good), 7)), good + b"\x1a\x01\xff", good.replace(b"abc", b"a\xffc"), good + good, good + other,
        good + b"\x7a\x01x", good + b"\x08\x01", good + b"\x3a\x80\x80\x80\x80\x80\x80", good + b"\x3a\x08" + bytes(8),
    ]  # fmt: skip
    for data in wrong:
        quick, parsed = (told(server, data) for server in servers)
        assert quick == parsed


@given(st.binary(max_size=60))
def test_cutting_never_fails(data: bytes) -> None:
    """Whatever the bytes: fields that join to no more than was sent, or None."""
    found = cut(data)
    if found is not None:
        form, id, sequence, raw = found
        assert sum(map(len, (*form, id, sequence, *raw))) <= len(data)
