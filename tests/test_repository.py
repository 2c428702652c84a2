"""Models loaded, changed and unloaded while calls and sessions run, over a real port."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from contract import bundle as contract
from protos import inference_pb2 as pb
from protos import sessions_pb2
from server.graph import OnnxGraph
from tests import models
from tests.process import Served, reason, serve
from tests.test_server import tokens_request
from tests.test_turns import Calls, scores, turn

SERVICE = "/inference.GRPCInferenceService"


@pytest.fixture
def library(tmp_path: Path) -> Path:
    models.library(tmp_path)
    return tmp_path


@pytest.fixture
def served(library: Path) -> Iterator[Served]:
    with serve(library) as server:
        yield server


def load(server: Served, name: str) -> None:
    server.method(f"{SERVICE}/RepositoryModelLoad")(pb.RepositoryModelLoadRequest(model_name=name))


def unload(server: Served, name: str) -> None:
    server.method(f"{SERVICE}/RepositoryModelUnload")(pb.RepositoryModelUnloadRequest(model_name=name))


def index(server: Served) -> dict[tuple[str, str], str]:
    reply = server.method(f"{SERVICE}/RepositoryIndex", pb.RepositoryIndexResponse)(pb.RepositoryIndexRequest())
    return {(m.name, m.version): m.state for m in reply.models}


def read(calls: Calls, session: str, number: int, *tokens: int) -> bytes:
    return scores(sessions_pb2.TurnReply.FromString(calls.turn(turn(session, number, tokens))))


def why(call: Any, *arguments: Any, **more: Any) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **more)
    return reason(caught.value)[1]


def test_a_new_version_under_live_sessions(served: Served, library: Path) -> None:
    """Sessions finish on the version they began with; new ones, and plain calls, get the new one."""
    calls = Calls(served)
    uncut, old = calls.new(), calls.new()
    whole = read(calls, uncut, 1, 1, 2, 3, 4)
    first = read(calls, old, 1, 1, 2)
    models.reader(library / "reader" / "2", seed=9)
    load(served, "reader")
    assert index(served)["reader", "2"] == "READY"
    assert first + read(calls, old, 2, 3, 4) == whole
    new = calls.new()
    assert calls.get(sessions_pb2.SessionName(session=new)).model.version == "2"
    assert read(calls, new, 1, 1, 2, 3, 4) != whole
    assert served.method(f"{SERVICE}/ModelInfer", pb.ModelInferResponse)(tokens_request([[1]])).model_version == "2"


def test_unloaded_and_loaded_again(served: Served, library: Path) -> None:
    """Calls and turns of an unloaded model are told so; when it is back, its sessions go on; when another is in its place,
    they are told that."""
    calls = Calls(served)
    uncut, a = calls.new(), calls.new()
    whole = read(calls, uncut, 1, 1, 2, 3, 4)
    first = read(calls, a, 1, 1, 2)
    unload(served, "reader")
    assert index(served)["reader", "1"] == "UNAVAILABLE"
    assert why(served.method(f"{SERVICE}/ModelInfer"), tokens_request([[1]])) == "UNKNOWN_MODEL"
    assert why(calls.turn, turn(a, 2, [3])) == "MODEL_GONE"
    assert why(unload, served, "reader") == "UNKNOWN_MODEL"
    load(served, "reader")
    assert first + read(calls, a, 2, 3, 4) == whole
    models.reader(library / "reader" / "1", seed=9)
    load(served, "reader")
    assert why(calls.turn, turn(a, 3, [3])) == "FINGERPRINT_MISMATCH"
    shutil.rmtree(library / "reader" / "1")
    models.reader(library / "reader" / "3", seed=9)
    load(served, "reader")
    assert [version for name, version in index(served) if name == "reader"] == ["3"]


def test_what_cannot_be_served_harms_nothing(served: Served, library: Path) -> None:
    """A damaged new version is refused with its faults, stands in the index, and the old one serves on."""
    models.reader(library / "reader" / "2")
    (library / "reader" / "2" / "step.onnx").write_bytes(b"damaged")
    assert why(load, served, "reader") == "MODEL_REFUSED"
    assert index(served)["reader", "2"] == "UNAVAILABLE"
    assert served.method(f"{SERVICE}/ModelInfer", pb.ModelInferResponse)(tokens_request([[1]])).model_version == "1"
    for name in ("nope", "", "../reader", "*"):
        assert why(load, served, name) == "UNKNOWN_MODEL"


def test_what_a_load_may_say(served: Served) -> None:
    """The row limit can be set by a configuration, and goes back to the server's with the next load; another configuration, other
    files, other parameters and other repositories are refused, and nothing changes."""
    method = served.method(f"{SERVICE}/RepositoryModelLoad")

    def load_with(**parameters: str | bytes) -> None:
        request = pb.RepositoryModelLoadRequest(model_name="reader")
        for key, value in parameters.items():
            given = request.parameters[key.replace("__", ":")]
            if isinstance(value, bytes):
                given.bytes_param = value
            else:
                given.string_param = value
        method(request)

    def limit() -> int:
        config = served.method(f"{SERVICE}/ModelConfig", pb.ModelConfigResponse)(pb.ModelConfigRequest(name="reader")).config
        return int(config.max_batch_size)

    load_with(config='{"max_batch_size": "2"}')
    assert limit() == 2
    assert why(served.method(f"{SERVICE}/ModelInfer"), tokens_request([[1], [2], [3]])) == "BAD_ROWS"
    assert why(load_with, config='{"max_batch_size": -1}') == "BAD_CONFIG"
    assert why(load_with, config="{{") == "BAD_CONFIG"
    assert why(load_with, config='{"name": "another"}') == "FIXED_CONFIG"
    with pytest.raises(grpc.RpcError) as caught:
        load_with(config="{}", file__x=b"1")
    assert reason(caught.value)[:2] == (grpc.StatusCode.INTERNAL, "NO_FILES")
    assert why(load_with, mode="fast") == "UNKNOWN_PARAMETER"
    assert why(method, pb.RepositoryModelLoadRequest(repository_name="other", model_name="reader")) == "UNKNOWN_REPOSITORY"
    assert limit() == 2
    load(served, "reader")
    assert limit() == 256
    request = pb.RepositoryModelUnloadRequest(model_name="reader")
    request.parameters["unload_dependents"].bool_param = True
    served.method(f"{SERVICE}/RepositoryModelUnload")(request)
    ready = served.method(f"{SERVICE}/RepositoryIndex", pb.RepositoryIndexResponse)(pb.RepositoryIndexRequest(ready=True))
    assert "reader" not in {m.name for m in ready.models}


def test_changes_amid_calls(served: Served, library: Path) -> None:
    """While a model is loaded and unloaded over and over, every call is answered rightly or told that the model is gone."""
    infer = served.method(f"{SERVICE}/ModelInfer", pb.ModelInferResponse)
    expected = infer(tokens_request(np.ones((2, 60)))).raw_output_contents

    def ask(_: int) -> str:
        try:
            return "right" if infer(tokens_request(np.ones((2, 60)))).raw_output_contents == expected else "wrong"
        except grpc.RpcError as e:
            return reason(e)[1]

    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(ask, range(400))
        for _ in range(10):
            unload(served, "reader")
            load(served, "reader")
        assert set(answers) <= {"right", "UNKNOWN_MODEL", "UNLOADED"}
    assert ask(0) == "right"


@pytest.fixture(params=["memory", "lmdb"])
def moving(request: pytest.FixtureRequest, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = "memory" if request.param == "memory" else f"lmdb:{tmp_path_factory.mktemp('store')}"
    with serve(library, "--move-sessions", "compatible", "--store", place, "--resident-sessions", "2") as server:
        yield server


def test_sessions_move_where_states_agree(moving: Served, library: Path) -> None:
    """Told to, live sessions go on with a compatible new version from their next turn: their turn number stays, what was answered is
    answered as before, and the rest is what the new version makes of the state. Those away from memory move as well."""
    calls = Calls(moving)
    ids = [calls.new() for _ in range(4)]
    first = [calls.turn(turn(id, 1, [1, 2])) for id in ids]
    bundle = models.reader(library / "reader" / "2", seed=9)
    load(moving, "reader")
    for id in ids:
        assert calls.get(sessions_pb2.SessionName(session=id)).model.version == "1"
        assert calls.turn(turn(id, 1, [1, 2])) == first[ids.index(id)]
    old, new = (OnnxGraph(bundle.graph, library / "reader" / version / "step.onnx") for version in "12")
    _, _, *states = old.run({"tokens": np.array([[1, 2]]), **{s.input: s.fresh(1) for s in bundle.graph.states}})
    expected = new.run({"tokens": np.array([[3, 4]]), **{s.input: a for s, a in zip(bundle.graph.states, states, strict=True)}})[0]
    assert {read(calls, id, 2, 3, 4) for id in ids} == {expected.tobytes()}
    for id in ids:
        info = calls.get(sessions_pb2.SessionName(session=id))
        assert (info.model.version, info.turn, info.fingerprint) == ("2", 2, bundle.fingerprint)
    shutil.rmtree(library / "reader" / "1")
    load(moving, "reader")
    assert read(calls, ids[0], 3, 5)


def test_sessions_move_to_the_same_under_another_number(moving: Served, library: Path) -> None:
    """A version's files under the next number, and the version gone: its sessions go on there, as if nothing had been."""
    calls = Calls(moving)
    a = calls.new()
    uncut = read(calls, calls.new(), 1, 1, 2, 3, 4)
    first = read(calls, a, 1, 1, 2)
    shutil.copytree(library / "reader" / "1", library / "reader" / "2")
    load(moving, "reader")
    shutil.rmtree(library / "reader" / "1")
    load(moving, "reader")
    assert first + read(calls, a, 2, 3, 4) == uncut
    assert calls.get(sessions_pb2.SessionName(session=a)).model.version == "2"


def test_sessions_stay_where_states_differ(moving: Served, library: Path) -> None:
    """A new version with another state, or with its states in another order, takes over no session; where the old one is unloaded, its
    sessions are told so, and a compatible one that comes later takes them up."""
    calls = Calls(moving)
    a = calls.new()
    uncut = read(calls, calls.new(), 1, 1, 2, 3, 4)
    first = read(calls, a, 1, 1, 2)
    models.reader(library / "reader" / "2", hidden=9)
    bundle = models.reader(library / "reader" / "3", seed=4)
    step = bundle.graph
    contract.save(replace(bundle, graphs={"step": replace(step, states=(step.states[1], step.states[0]))}), library / "reader" / "3")
    load(moving, "reader")
    assert first + read(calls, a, 2, 3, 4) == uncut
    assert calls.get(sessions_pb2.SessionName(session=a)).model.version == "1"
    shutil.rmtree(library / "reader" / "1")
    load(moving, "reader")
    assert why(calls.turn, turn(a, 3, [3])) == "MODEL_GONE"
    models.reader(library / "reader" / "4", seed=5)
    load(moving, "reader")
    assert read(calls, a, 3, 5)
    assert calls.get(sessions_pb2.SessionName(session=a)).model.version == "4"


def test_a_turn_fails_on_the_new_version_and_the_session_lives(moving: Served, library: Path) -> None:
    """The first turn on the new version is refused: the session has the turn that it had, and goes on."""
    calls = Calls(moving)
    a = calls.new()
    read(calls, a, 1, 1, 2)
    models.reader(library / "reader" / "2", seed=9)
    load(moving, "reader")
    assert why(calls.turn, turn(a, 2, [99])) == "OUT_OF_RANGE"
    assert calls.get(sessions_pb2.SessionName(session=a)).turn == 1
    assert read(calls, a, 2, 3)
