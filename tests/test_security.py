"""Who may call what: keys, roles, tenants and their quotas, TLS and mutual TLS, over real ports and both fronts."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

import seqserve
from protos import inference_pb2 as pb
from protos import seqserve_pb2 as tasks_pb
from protos import sessions_pb2
from seqserve import access
from server import keys as keys_room
from server.app import App
from server.certificates import KINDS, traits
from server.config import Config
from server.errors import Overloaded, ServeError, Unauthenticated
from server.keys import Keys
from server.metrics import Metrics
from server.quotas import Caller, Quota, Tenant
from server.rpc.answer import Desk
from server.rpc.parameters import Parameters
from tests import audit, models, pins
from tests.process import FRONTS, ROOT, Served, reason, serve
from tests.test_server import tokens_request
from tests.test_turns import Calls, scores, turn

INFERENCE = "/inference.GRPCInferenceService"
SESSIONS = "/seqserve.v1.Sessions"
BATCH = "spiffe://acme.example/batch"
KEYS = {name: f"{name}-key-{i:040d}" for i, name in enumerate(("ann", "bob", "boss", "small", "slow", "late"))}
WAIT_S = 30


def entry(name: str, tenant: str, role: str = "user") -> str:
    digest = hashlib.sha256(KEYS[name].encode()).hexdigest()
    return f'[[keys]]\nname = "{name}"\ntenant = "{tenant}"\nrole = "{role}"\nsha256 = "{digest}"\n'


FILE = "\n".join(
    [
        "[tenants.small]\nsessions = 2\ncalls = 1\nstreams = 1\n[tenants.slow]\nrate = 0.001\nburst = 2\n",
        entry("ann", "acme"), entry("bob", "bolt"), entry("boss", "acme", "operator"), entry("small", "small"), entry("slow", "slow"),
    ]
)  # fmt: skip


def _guessed() -> Keys:
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(FILE)
        file.flush()
        return Keys(Path(file.name), 0)


GUESSED = _guessed()


@dataclass(frozen=True, slots=True)
class Running:
    server: Served
    keys: Path


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    models.library(root)
    return root


@pytest.fixture(scope="module", params=list(FRONTS))
def running(request: pytest.FixtureRequest, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    file = tmp_path_factory.mktemp("keys") / "keys.toml"
    file.write_text(FILE)
    with serve(
        library, *FRONTS[request.param], "--keys", str(file), "--keys-interval", "0", "--allow-shared-memory", "--access-log",
        "--log-level", "debug",
    ) as server:  # fmt: skip
        yield Running(server, file)
        log = "".join(server.log)
        assert not [key for key in KEYS.values() if key in log], "no key is ever logged"


class As(Served):
    """A server as one key's owner sees it."""

    def __init__(self, over: Served | grpc.Channel, key: str | None = None, header: str = "authorization") -> None:
        value = f"Bearer {key}" if header == "authorization" else key
        channel = over.channel if isinstance(over, Served) else over
        self.channel = grpc.intercept_channel(channel, _Shown(header, value)) if key is not None else channel


class _Shown(grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds the key to every call."""

    def __init__(self, header: str, value: str) -> None:
        self._more = (header, value)

    def _with(self, details: Any) -> Any:
        class Details(grpc.ClientCallDetails):
            pass

        changed = Details()
        changed.method, changed.timeout, changed.credentials = details.method, details.timeout or WAIT_S, None
        changed.metadata = [*(details.metadata or ()), self._more]
        changed.wait_for_ready, changed.compression = None, None
        return changed

    def intercept_unary_unary(self, go_on: Any, details: Any, request: Any) -> Any:
        return go_on(self._with(details), request)

    intercept_stream_stream = intercept_unary_stream = intercept_unary_unary


def why(call: Any, *arguments: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments)
    return reason(caught.value)[:2]


def infer(server: Served) -> pb.ModelInferResponse:
    return server.method(f"{INFERENCE}/ModelInfer", pb.ModelInferResponse)(tokens_request([[1, 2, 3]]))


# ---- Keys ----


def test_nothing_without_a_key(running: Running) -> None:
    """Every method of every service but health wants a key, before it looks at a message; a wrong key is as good as none."""
    for server, word in ((running.server, "NO_KEY"), (As(running.server, "guess"), "BAD_KEY"), (As(running.server, ""), "BAD_KEY")):
        for method in (
            f"{INFERENCE}/ModelInfer", f"{INFERENCE}/ModelReady", f"{INFERENCE}/RepositoryIndex", f"{INFERENCE}/LogSettings",
            f"{SESSIONS}/Open", f"{SESSIONS}/List", "/seqserve.v1.Tasks/Models", "/seqserve.v1.Tasks/Classify",
        ):  # fmt: skip
            assert why(server.method(method), b"\xff no protobuf") == (grpc.StatusCode.UNAUTHENTICATED, word), method
        for method in (
            f"{SESSIONS}/Turns",
            f"{INFERENCE}/ModelStreamInfer",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        ):
            stream = server.channel.stream_stream(method)
            assert why(list, stream(iter([b"", b""]))) == (grpc.StatusCode.UNAUTHENTICATED, word), method


def test_probes_need_no_key(running: Running) -> None:
    """Health, and whether the server is live and ready, are for everybody."""
    checked = running.server.method("/grpc.health.v1.Health/Check", health_pb2.HealthCheckResponse)(health_pb2.HealthCheckRequest())
    assert checked.status == health_pb2.HealthCheckResponse.SERVING
    assert running.server.method(f"{INFERENCE}/ServerLive", pb.ServerLiveResponse)(pb.ServerLiveRequest()).live
    assert running.server.method(f"{INFERENCE}/ServerReady", pb.ServerReadyResponse)(pb.ServerReadyRequest()).ready


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_a_key_opens(running: Running, header: str) -> None:
    """A key is taken from either header, the first time and the next."""
    ann = As(running.server, KEYS["ann"], header)
    assert infer(ann).outputs == infer(ann).outputs


def test_roles(running: Running) -> None:
    """Models, log levels and shared memory are an operator's; a user is told so, and the server stays as it was."""
    ann, boss = As(running.server, KEYS["ann"]), As(running.server, KEYS["boss"])
    for method, request in (
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="reader")),
        ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="reader")),
        ("LogSettings", pb.LogSettingsRequest()),
        ("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest()),
        ("SystemSharedMemoryRegister", pb.SystemSharedMemoryRegisterRequest(name="r", key="/none", byte_size=8)),
        ("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest(name="r")),
    ):
        assert why(ann.method(f"{INFERENCE}/{method}"), request) == (grpc.StatusCode.PERMISSION_DENIED, "OPERATORS_ONLY")
    sharing = tokens_request([[1]])
    sharing.inputs[0].parameters["shared_memory_region"].string_param = "r"
    call = f"{INFERENCE}/ModelInfer"
    assert why(ann.method(call), sharing)[1] == "OPERATORS_ONLY"
    assert why(boss.method(call), sharing)[1] != "OPERATORS_ONLY"
    assert infer(ann)
    boss.method(f"{INFERENCE}/RepositoryModelLoad")(pb.RepositoryModelLoadRequest(model_name="reader"))
    boss.method(f"{INFERENCE}/LogSettings")(pb.LogSettingsRequest())


def log_of(running: Running, text: str, times: int) -> None:
    """Wait until the server has logged a text so many times; a heartbeat of calls goes on meanwhile."""
    while sum(text in line for line in running.server.log) < times:
        assert running.server.process.poll() is None
        running.server.method(f"{INFERENCE}/ServerLive")(pb.ServerLiveRequest())


def test_keys_come_and_go(running: Running) -> None:
    """SIGHUP reads the file anew: a new key is let in, one taken out is not, nor the stream it opened; a file with faults, which
    are told without what it holds, changes nothing."""
    late = As(running.server, KEYS["late"])
    assert why(infer, late)[1] == "BAD_KEY"
    running.keys.write_text(FILE + entry("late", "late"))
    running.server.process.send_signal(signal.SIGHUP)
    log_of(running, "6 keys of", 1)
    calls = Calls(late)
    id = calls.new()
    asked: Any = _Asked()
    replies = calls.turns(asked)
    asked.put(sessions_pb2.TurnsRequest(turns=[turn(id, 1, [1])]))
    assert next(replies).turns[0].turn == 1
    running.keys.write_text(FILE + f'[[keys]]\nsha256 = "{KEYS["late"]}"\n')
    running.server.process.send_signal(signal.SIGHUP)
    log_of(running, "the keys of before stay valid", 1)
    assert infer(late)
    running.keys.write_text(FILE)
    running.server.process.send_signal(signal.SIGHUP)
    log_of(running, "5 keys of", 2)
    assert why(infer, late)[1] == "BAD_KEY"
    asked.put(sessions_pb2.TurnsRequest(turns=[turn(id, 2, [1])]))
    refusal = next(replies).turns[0].refusal
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED.value[0], "KEY_REVOKED")
    asked.put(None)
    assert not list(replies)
    log_of(running, "revoked or changed: late/late", 1)
    log_of(running, "tenant 'late'", 1)


class _Asked:
    """Requests of a stream, as they are put."""

    def __init__(self) -> None:
        self._queue: Any = queue.Queue()

    def put(self, request: Any) -> None:
        self._queue.put(request)

    def __iter__(self) -> _Asked:
        return self

    def __next__(self) -> Any:
        request = self._queue.get(timeout=WAIT_S)
        if request is None:
            raise StopIteration
        return request


# ---- Tenants ----


def test_tenants_do_not_meet(running: Running) -> None:
    """The same id in two tenants is two sessions; what one has the other can't see, resume, fork, export, close or list, and is told
    exactly what it is told of an id that never was."""
    ann, bob, boss = (Calls(As(running.server, KEYS[name])) for name in ("ann", "bob", "boss"))
    mine, his = ann.new(session="same"), bob.new(session="same")
    assert mine == his == "same"
    first = ann.turn(turn("same", 1, [1, 2]))
    assert boss.get(sessions_pb2.SessionName(session="same")).turn == 1, "an operator of the tenant has its sessions"
    assert bob.get(sessions_pb2.SessionName(session="same")).turn == 0
    assert bob.turn(turn("same", 1, [3])) != first
    ann.new(session="secret")
    for other in ("secret", "acme|secret", "bolt|same", "acme|same"):
        for call, request in (
            (bob.get, sessions_pb2.SessionName(session=other)),
            (bob.turn, turn(other, 1, [1])),
            (bob.fork, sessions_pb2.ForkRequest(session=other)),
            (bob.close, sessions_pb2.SessionName(session=other)),
            (As(running.server, KEYS["bob"]).method(f"{SESSIONS}/Export"), sessions_pb2.ExportRequest(session=other)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(request)
            code, word, facts, _ = reason(caught.value)
            assert (code, word, facts["session"]) == (grpc.StatusCode.NOT_FOUND, "UNKNOWN_SESSION", other)
            assert caught.value.details() == f"there is no session {other!r}; open one"
    listed = bob.list(sessions_pb2.ListRequest())
    assert ([s.session for s in listed.sessions], listed.total) == (["same"], 1)
    listed = ann.list(sessions_pb2.ListRequest(after="same"))
    assert ([s.session for s in listed.sessions], listed.total) == (["secret"], 2)
    with pytest.raises(grpc.RpcError) as caught:
        ann.new(session="same")
    assert reason(caught.value)[1] == "SESSION_EXISTS"
    assert "acme" not in caught.value.details()
    for calls, ids in ((ann, ("same", "secret")), (bob, ("same",))):
        for id in ids:
            assert calls.close(sessions_pb2.SessionName(session=id)).session == id
    with pytest.raises(grpc.RpcError) as caught:
        ann.get(sessions_pb2.SessionName(session="same"))
    assert "session 'same' was closed" in caught.value.details()


def test_an_export_is_its_tenants(running: Running) -> None:
    """An exported session goes on with its own tenant, under its id or another; another tenant's bytes are refused."""
    ann, bob = As(running.server, KEYS["ann"]), As(running.server, KEYS["bob"])
    calls = Calls(ann)
    id = calls.new(session="exported")
    whole = scores(sessions_pb2.TurnReply.FromString(calls.turn(turn(calls.new(session="whole"), 1, [4, 5, 6]))))
    first = scores(sessions_pb2.TurnReply.FromString(calls.turn(turn(id, 1, [4, 5]))))
    export = sessions_pb2.ExportRequest(session=id, move=True)
    exported = ann.method(f"{SESSIONS}/Export", sessions_pb2.Exported)(export)
    assert exported.session == id
    importing = [sessions_pb2.ImportRequest(exported=exported, session=name) for name in ("", "stolen")]
    for request in importing:
        assert why(bob.method(f"{SESSIONS}/Import"), request) == (grpc.StatusCode.PERMISSION_DENIED, "OTHER_TENANT")
    brought = ann.method(f"{SESSIONS}/Import", sessions_pb2.SessionInfo)(importing[0])
    assert (brought.session, brought.turn) == (id, 1)
    assert first + scores(sessions_pb2.TurnReply.FromString(calls.turn(turn(id, 2, [6])))) == whole
    for name in (id, "whole"):
        calls.close(sessions_pb2.SessionName(session=name))


def test_sequences_of_tenants(running: Running) -> None:
    """The Open Inference Protocol's sequences are their tenant's as well: the same id in both, two sequences."""

    def step(server: Served, tokens: list[int], **flags: bool) -> bytes:
        request = tokens_request([tokens])
        request.parameters["sequence_id"].int64_param = 77
        for flag, value in flags.items():
            request.parameters[flag].bool_param = value
        response = server.method(f"{INFERENCE}/ModelInfer", pb.ModelInferResponse)(request)
        return bytes(response.raw_output_contents[[o.name for o in response.outputs].index("scores")])

    ann, bob = As(running.server, KEYS["ann"]), As(running.server, KEYS["bob"])
    first = step(ann, [1, 2], sequence_start=True)
    step(bob, [9, 9, 9], sequence_start=True)
    rest = step(ann, [3], sequence_end=True)
    step(bob, [1], sequence_end=True)
    assert first + rest == step(ann, [1, 2, 3], sequence_start=True, sequence_end=True)
    assert not Calls(bob).list(sessions_pb2.ListRequest()).total


def test_a_tenants_sessions_come_back(library: Path, tmp_path: Path) -> None:
    """After a restart, each tenant has its own sessions again and no other's, and counts them against its quota."""
    file = tmp_path / "keys.toml"
    file.write_text(FILE)
    flags = ("--store", f"lmdb:{tmp_path / 'store'}", "--keys", str(file))
    with serve(library, *flags) as server:
        for name in ("ann", "small"):
            calls = Calls(As(server, KEYS[name]))
            calls.turn(turn(calls.new(session="kept"), 1, [1]))
        server.terminate()
    with serve(library, *flags) as server:
        ann, small, bob = (Calls(As(server, KEYS[name])) for name in ("ann", "small", "bob"))
        assert ann.get(sessions_pb2.SessionName(session="kept")).turn == 1
        assert not bob.list(sessions_pb2.ListRequest()).total
        small.new()
        assert why(small.new)[1] == "TENANT_SESSIONS"


# ---- Quotas ----


def test_a_quota_of_sessions(running: Running) -> None:
    """One session too many is refused with a time to retry after, however it is made; a closed one makes room."""
    small = As(running.server, KEYS["small"])
    calls = Calls(small)
    one, two = calls.new(), calls.new()
    with pytest.raises(grpc.RpcError) as caught:
        calls.new()
    code, word, facts, delay = reason(caught.value)
    assert (code, word, facts["limit"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TENANT_SESSIONS", "2")
    assert delay is not None
    assert delay > 0
    assert why(calls.fork, sessions_pb2.ForkRequest(session=one))[1] == "TENANT_SESSIONS"
    calls.close(sessions_pb2.SessionName(session=one))
    assert why(calls.new, "nobody")[1] != "TENANT_SESSIONS", "what failed takes no place"
    calls.close(sessions_pb2.SessionName(session=calls.fork(sessions_pb2.ForkRequest(session=two)).session))
    calls.close(sessions_pb2.SessionName(session=two))
    assert Calls(As(running.server, KEYS["bob"])).new()


def test_a_quota_of_streams(running: Running) -> None:
    """A stream too many is refused with a time to retry after; one that ended makes room, other tenants have theirs."""
    small = As(running.server, KEYS["small"])
    calls = Calls(small)
    id = calls.new()
    asked: Any = _Asked()
    replies = calls.turns(asked)
    asked.put(sessions_pb2.TurnsRequest(turns=[turn(id, 1, [1])]))
    assert next(replies).turns[0].turn == 1
    with pytest.raises(grpc.RpcError) as caught:
        list(calls.turns(iter(())))
    code, word, _, delay = reason(caught.value)
    assert (code, word, delay is not None) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TENANT_STREAMS", True)
    assert list(Calls(As(running.server, KEYS["bob"])).turns(iter(()))) == []
    assert infer(small), "calls have places of their own"
    asked.put(None)
    assert not list(replies)
    assert not list(calls.turns(iter(())))
    calls.close(sessions_pb2.SessionName(session=id))


def test_a_quota_of_requests(running: Running) -> None:
    """Beyond its rate a tenant is refused at once, with the time until it may ask again; its neighbours are not."""
    slow = As(running.server, KEYS["slow"])
    assert infer(slow)
    assert infer(slow)
    with pytest.raises(grpc.RpcError) as caught:
        infer(slow)
    code, word, _, delay = reason(caught.value)
    assert (code, word) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TENANT_RATE")
    assert delay is not None
    assert 900 < delay <= 1000
    assert infer(As(running.server, KEYS["ann"]))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_token_bucket() -> None:
    """A tenant has its rate, saved up to its burst and no further; the delay of a refusal is the time until it holds."""
    clock = Clock()
    tenant = Tenant("t", Quota(rate=10, burst=3), clock)

    def spend(count: int) -> float:
        for _ in range(count):
            tenant.spend()
        with pytest.raises(Overloaded) as caught:
            tenant.spend()
        assert caught.value.retry_after is not None
        return caught.value.retry_after

    clock.now += spend(3)
    clock.now += spend(1)
    clock.now += 60
    assert spend(3) == pytest.approx(0.1)
    tenant.change(Quota())
    for _ in range(100):
        tenant.spend()


def test_places_of_calls() -> None:
    """So many calls at once and no more; each that ends makes room for one."""
    tenant = Tenant("t", Quota(calls=2))
    leave = [tenant.enter(False) for _ in range(2)]
    assert tenant.enter(True) is None, "streams are not limited, so not counted"
    with pytest.raises(Overloaded, match="2 calls at once"):
        tenant.enter(False)
    leave.pop()()
    leave.append(tenant.enter(False))
    assert tenant.calls == 2


def test_sessions_are_counted_again() -> None:
    """Sessions that expired leave the count once it is full, not before, and not at every refusal."""
    clock = Clock()
    tenant = Tenant("t", Quota(sessions=2), clock)
    live = 0
    counted = 0

    def living() -> int:
        nonlocal counted
        counted += 1
        return live

    tenant.open(living)
    tenant.open(living)
    assert counted == 1
    clock.now += 10
    live = 2
    for _ in range(5):
        with pytest.raises(Overloaded):
            tenant.open(living)
    assert counted == 2
    clock.now += 10
    live = 1
    tenant.open(living)
    assert counted == 3


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["authorization", "x-api-key", "authorization-bin", "cookie"]),
            st.text()
            | st.binary()
            | st.sampled_from(list(KEYS.values())).flatmap(lambda k: st.sampled_from([k[:-1], k + "x", k.upper(), "Bearer"])),
        )
    )
)
def test_no_guess_lets_in(shown: list[tuple[str, str | bytes]]) -> None:
    """Whatever is shown that is no key, the answer is one and the same error, and nothing is remembered of it."""
    with pytest.raises(Unauthenticated):
        GUESSED.who(shown)
    assert not GUESSED._known


# ---- What is installed ----


def test_what_an_audit_says() -> None:
    """Vulnerable, looked up and not looked up are told apart; what is no report is no clean bill."""
    report = {
        "dependencies": [
            {"name": "a", "version": "1", "vulns": []},
            {"name": "b", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2.1"]}, {"id": "PYSEC-2", "fix_versions": []}]},
            {"name": "c", "skip_reason": "not found"},
        ],
        "fixes": [],
    }
    found = audit.judged(json.dumps(report))
    assert found.vulnerable == ("b 2: PYSEC-1, mended in 2.1", "b 2: PYSEC-2, mended in no release yet")
    assert (found.asked, found.unknown) == (2, ("c",))
    for said in ("exit 1", 'echo "No known vulnerabilities found"', "echo {}"):
        with tempfile.NamedTemporaryFile("w") as program:
            program.write(f"#!/bin/sh\n{said}\n")
            program.flush()
            Path(program.name).chmod(0o700)
            copy = Path(shutil.copy(program.name, f"{program.name}-run"))  # a file that is open for writing can't be run
            with pytest.raises(ValueError):
                audit.audit(copy, ["a==1"])
            copy.unlink()


# ---- The file ----

FAULTS = {
    "no TOML": ('[[keys]\nsha256 = "SECRET"', "is no TOML, at line 1"),
    "no keys": ("", "no \\[\\[keys\\]\\] entry"),
    "the key itself": ('[[keys]]\ntenant = "a"\nsha256 = "SECRET"', "not the key"),
    "a stranger": ('password = "SECRET"', "there are only"),
    "a role": ('[[keys]]\ntenant = "a"\nrole = "SECRET"\nsha256 = "' + "0" * 64 + '"', "role is user or operator"),
    "a tenant": ('[[keys]]\ntenant = "A|B"\nsha256 = "' + "0" * 64 + '"', "tenant is a name"),
    "a quota": ("[tenants.a]\nsessions = -1\n" + entry("ann", "a"), "0 \\(no limit\\) or more"),
    "another quota": ("[tenants.a]\nmodels = 1\n" + entry("ann", "a"), "there are only sessions, calls, streams, rate, burst, priority"),
    "twice": (entry("ann", "a") + entry("ann", "b"), "there twice"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_with_faults(fault: str, tmp_path: Path, library: Path) -> None:
    """A server does not start with a faulty file, and says what is wrong without repeating what is in it."""
    text, expected = FAULTS[fault]
    file = tmp_path / "keys.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=expected) as caught:
        Keys(file, 0)
    assert "SECRET" not in str(caught.value)


def test_a_file_that_anybody_may_write(tmp_path: Path) -> None:
    """Who may write the file may let anybody in: such a file is refused."""
    file = tmp_path / "keys.toml"
    file.write_text(FILE)
    file.chmod(0o666)
    with pytest.raises(ValueError, match="everybody may write"):
        Keys(file, 0)


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    """Without a signal too, within the interval; the caller of a key that stays stays the same."""
    file = tmp_path / "keys.toml"
    file.write_text(FILE)
    keys = Keys(file, 0.01)
    shown = (("x-api-key", KEYS["ann"]),)
    ann = keys.who(shown)
    assert keys.who(shown) is ann
    keys.start()
    part = tmp_path / "part"
    part.write_text(FILE + entry("late", "late"))
    part.replace(file)
    while True:
        try:
            late = keys.who((("authorization", f"bearer {KEYS['late']}"),))
            break
        except Unauthenticated:
            pass
    assert (late.tenant.name, late.operator, keys.who(shown) is ann) == ("late", False, True)
    keys.stop()


def test_a_key_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m server.keys` prints a key and an entry that lets it in."""
    assert keys_room.main(["acme", "--operator", "--name", 'ann\'s "own"\n']) == 0
    printed = capsys.readouterr()
    file = tmp_path / "keys.toml"
    file.write_text(printed.err)
    caller = Keys(file, 0).who((("x-api-key", printed.out.strip()),))
    assert (caller.tenant.name, caller.operator, caller.name) == ("acme", True, 'ann\'s "own"\n')
    assert printed.out.strip() not in printed.err


def test_no_reflection(library: Path) -> None:
    """Reflection can be off; without it nobody is told which messages there are."""
    with serve(library, "--no-reflection") as server:
        ask = server.channel.stream_stream("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.RpcError) as caught:
            list(ask(iter([reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()])))
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert infer(server)


def test_streams_of_a_connection(library: Path) -> None:
    """A connection has so many calls at once: one more waits at its caller until there is room."""
    with serve(library, "--connection-streams", "2") as server:
        asked = [_Asked(), _Asked()]
        calls = Calls(server)
        ids = [calls.new(), calls.new()]
        streams = [calls.turns(a) for a in asked]
        for id, ask, replies in zip(ids, asked, streams, strict=True):  # both have begun
            ask.put(sessions_pb2.TurnsRequest(turns=[turn(id, 1, [1])]))
            assert next(replies).turns[0].turn == 1
        third = server.method(f"{INFERENCE}/ServerLive").future(pb.ServerLiveRequest(), wait_for_ready=True)
        with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.use_local_subchannel_pool", 1)]) as another:
            assert another.unary_unary(f"{INFERENCE}/ServerLive")(b"", timeout=WAIT_S)
        assert not third.done()
        asked[0].put(None)
        assert third.result(WAIT_S)
        asked[1].put(None)
        assert [list(replies) for replies in streams] == [[], []]


# ---- TLS ----


@dataclass(frozen=True, slots=True)
class Certificates:
    """An authority's, a server's and a client's, a stranger's; and those of a service mesh's workload and of somebody unknown."""

    ca: Path
    server: Path
    client: Path
    stranger: Path
    batch: Path
    unknown: Path


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    root = tmp_path_factory.mktemp("tls")

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=root, check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    for ca in ("ca", "other"):
        openssl("req", "-x509", *new, "-days", "2", "-subj", f"/CN={ca}", "-keyout", f"{ca}.key", "-out", f"{ca}.pem")
    (root / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    (root / "batch-names").write_text(f"subjectAltName=DNS:batch.acme.example,URI:{BATCH}\n")
    for name, ca in (("server", "ca"), ("client", "ca"), ("stranger", "other"), ("batch", "ca"), ("unknown", "ca")):
        openssl("req", *new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        names = "batch-names" if name == "batch" else "names"
        signed = ("-CA", f"{ca}.pem", "-CAkey", f"{ca}.key", "-CAcreateserial", "-days", "2", "-extfile", names)
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.pem")
    return Certificates(*(root / f"{name}.pem" for name in ("ca", "server", "client", "stranger", "batch", "unknown")))


@contextmanager
def client_of(server: Served, **files: Path) -> Iterator[seqserve.Client]:
    """As users connect; `localhost`, since the certificate names it."""
    with seqserve.Client(f"localhost:{server.port}", credentials=access.tls(**files), timeout=10, retries=0) as client:
        yield client


@pytest.mark.parametrize("front", FRONTS)
def test_tls(front: str, certificates: Certificates, library: Path, tmp_path: Path) -> None:
    """A client that trusts the authority gets its answers over TLS, by the command too; one in the clear, or that trusts another
    authority, gets none."""
    file, key = tmp_path / "keys.toml", tmp_path / "key"
    file.write_text(FILE)
    key.write_text(KEYS["ann"] + "\n")
    pair = ("--tls-cert", str(certificates.server), "--tls-key", str(certificates.server.with_suffix(".key")))
    with serve(library, *FRONTS[front], "--keys", str(file), *pair) as server:
        with client_of(server, ca=certificates.ca) as client:
            assert client.live()
            with pytest.raises(seqserve.Denied):
                client.models()
        for refused in (
            seqserve.Client(f"localhost:{server.port}", timeout=10, retries=0),
            seqserve.Client(f"localhost:{server.port}", credentials=access.tls(certificates.stranger), timeout=10, retries=0),
        ):
            with refused, pytest.raises(seqserve.Unavailable):
                refused.metadata()
        shown = ("--server", f"localhost:{server.port}", "--tls-ca", str(certificates.ca), "--api-key-file", str(key), "--timeout", "20")
        assert "reader" in command("models", *shown, "--json").stdout
        environment = {"SEQSERVE_CLIENT_TLS_CA": str(certificates.ca), "SEQSERVE_CLIENT_API_KEY_FILE": str(key)}
        assert "reader" in command("models", *shown[:2], "--json", environment=environment).stdout
        denied = command("models", *shown[:4], "--json")
        assert (denied.returncode, "wants a key" in denied.stderr) == (2, True)


@pytest.mark.parametrize("front", FRONTS)
def test_mutual_tls(front: str, certificates: Certificates, library: Path) -> None:
    """With an authority for clients, only who has its certificate is answered, by client and command."""
    pair = ("--tls-cert", str(certificates.server), "--tls-key", str(certificates.server.with_suffix(".key")))
    with serve(library, *FRONTS[front], *pair, "--tls-client-ca", str(certificates.ca)) as server:
        with client_of(server, ca=certificates.ca, cert=certificates.client, key=certificates.client.with_suffix(".key")) as client:
            assert [m.name for m in client.models()]
            with client.session("reader") as session:
                assert session.id
        strange: Mapping[str, Path] = {"cert": certificates.stranger, "key": certificates.stranger.with_suffix(".key")}
        for files in ({}, strange):
            with client_of(server, ca=certificates.ca, **files) as client, pytest.raises(seqserve.Unavailable):
                client.metadata()
        mine = ("--tls-cert", str(certificates.client), "--tls-key", str(certificates.client.with_suffix(".key")))
        where = ("--server", f"localhost:{server.port}", "--tls-ca", str(certificates.ca))
        assert "reader" in command("models", *where, *mine).stdout
        half = command("models", *where, *mine[:2])
        assert (half.returncode, "go together" in half.stderr) == (2, True)


CERTIFIED = f"""
[[certificates]]
name = "batch"
tenant = "acme"
uri = "{BATCH}"

[[certificates]]
name = "boss"
tenant = "acme"
role = "operator"
subject = "CN=client"
"""


@pytest.mark.parametrize("front", FRONTS)
def test_tenants_by_certificate(front: str, certificates: Certificates, library: Path, tmp_path: Path) -> None:
    """Who shows a certificate of an entry is that tenant without a key: its sessions, its role. A key that is shown counts before
    it, right or wrong; who shows neither is told so; and an entry that is taken out is out for connections that are open."""
    file = tmp_path / "keys.toml"
    file.write_text(FILE + CERTIFIED)
    pair = ("--tls-cert", str(certificates.server), "--tls-key", str(certificates.server.with_suffix(".key")))
    listed = sessions_pb2.ListRequest()
    with (
        serve(library, *FRONTS[front], "--keys", str(file), *pair, "--tls-client-ca", str(certificates.ca)) as server,
        ExitStack() as ends,
    ):

        def showing(certificate: Path, key: str | None = None) -> As:
            files = [f.read_bytes() for f in (certificates.ca, certificate.with_suffix(".key"), certificate)]
            channel = ends.enter_context(grpc.secure_channel(f"localhost:{server.port}", grpc.ssl_channel_credentials(*files)))
            return As(channel, key)

        batch, boss, bob = showing(certificates.batch), showing(certificates.client), showing(certificates.batch, KEYS["bob"])
        calls = Calls(batch)
        assert scores(sessions_pb2.TurnReply.FromString(calls.turn(turn(calls.new(session="mine"), 1, [1, 2]))))
        assert [s.session for s in Calls(boss).list(listed).sessions] == ["mine"]
        assert not Calls(bob).list(listed).sessions
        settings = f"{INFERENCE}/LogSettings"
        assert why(batch.method(settings), pb.LogSettingsRequest())[1] == "OPERATORS_ONLY"
        assert boss.method(settings)(pb.LogSettingsRequest())
        assert why(Calls(showing(certificates.batch, "guessed")).list, listed)[1] == "BAD_KEY"
        assert why(Calls(showing(certificates.unknown)).list, listed)[1] == "BAD_CERTIFICATE"
        assert showing(certificates.unknown).method(f"{INFERENCE}/ServerLive")(pb.ServerLiveRequest())
        file.write_text(FILE + CERTIFIED.replace(BATCH, BATCH + "-no-more"))
        server.process.send_signal(signal.SIGHUP)
        assert until_refused(lambda: calls.list(listed)) == "BAD_CERTIFICATE"
        assert Calls(boss).list(listed).total == 1


def until_refused(call: Callable[[], object]) -> str:
    """Why a call is refused in the end."""
    while True:
        try:
            call()
        except grpc.RpcError as e:
            return reason(e)[1]


def test_what_a_certificate_says(certificates: Certificates, tmp_path: Path) -> None:
    """It is found by each of its names however they are written, is refused where two entries claim it, and a file whose entries
    name nothing that can be shown is faulty."""
    der = ssl.PEM_cert_to_DER_cert(certificates.batch.read_text())
    digest = hashlib.sha256(der).hexdigest().upper()
    spellings = (
        f'uri = "{BATCH}"', 'dns = "Batch.ACME.example"', 'subject = " CN=batch"', 'subject = "2.5.4.3=batch"',
        f'sha256 = "{":".join(digest[i : i + 2] for i in range(0, 64, 2))}"',
    )  # fmt: skip
    file = tmp_path / "keys.toml"
    for one in spellings:
        file.write_text(f'[[certificates]]\ntenant = "acme"\n{one}\n')
        keys = Keys(file, 0)
        assert keys.who((), der) is keys.who((), bytes(der)), one
        with pytest.raises(Unauthenticated, match="is of none"):
            keys.who((), ssl.PEM_cert_to_DER_cert(certificates.client.read_text()))
    claims = [f'[[certificates]]\ntenant = "{tenant}"\n{one}\n' for tenant, one in zip("ab", spellings, strict=False)]
    file.write_text("".join(claims))
    with pytest.raises(Unauthenticated, match="is of several"):
        Keys(file, 0).who((), der)
    for fault, expected in (
        ('subject = "batch"', "subject is a name such as"), ('sha256 = "ab"', "fingerprint in 64"), ('dns = ""', "dns is empty"),
        ("", "it has one of uri, dns, email, subject, sha256"), ('dns = "a"\nuri = "b"', "it has one of"),
        ('cn = "batch"', "and nothing else"),
    ):  # fmt: skip
        file.write_text(f'[[certificates]]\ntenant = "acme"\n{fault}\n')
        with pytest.raises(ValueError, match=expected):
            Keys(file, 0)


def test_certificates_that_nobody_can_show(library: Path, tmp_path: Path) -> None:
    """Entries for certificates without an authority for them are a mistake that a server does not start with."""
    file = tmp_path / "keys.toml"
    file.write_text(CERTIFIED)
    with pytest.raises(ValueError, match="only show with --tls-client-ca"):
        App(Config(models=library, keys=file))


@settings(max_examples=300)
@given(st.binary() | st.integers(0, 2**16).flatmap(lambda at: st.binary(min_size=1, max_size=4).map(lambda cut: (at, cut))))
def test_no_certificate_is_too_odd(certificates: Certificates, given: bytes | tuple[int, bytes]) -> None:
    """Whatever bytes a certificate is made of, it is read or refused, and lets nobody in."""
    der = ssl.PEM_cert_to_DER_cert(certificates.batch.read_text())
    if isinstance(given, tuple):
        at = given[0] % len(der)
        given = der[:at] + given[1] + der[at + len(given[1]) :]
    with suppress(ValueError):
        assert {kind for kind, _ in traits(given)} <= set(KINDS)


def command(*words: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "seqserve", *words], cwd=ROOT, env={**os.environ, **(environment or {})}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip


def test_a_key_file_of_the_client(tmp_path: Path) -> None:
    """A file that holds no one key is a user's fault, told before anything is sent."""
    file = tmp_path / "key"
    for text in ("", "two words", "späße"):
        file.write_text(text)
        with pytest.raises(ValueError, match="holds no key"):
            access.read_key(file)


def test_what_is_not_pinned_is_told() -> None:
    """The audit's ground: a package that is installed, or wanted, and not pinned at its version is named."""
    project = {"dependencies": ["numpy>=2"], "optional-dependencies": {"dev": ["types_x[all]>=1", "ruff"]}}
    good = "numpy==2.1\ntypes-x==1.0  # why\nruff==0.1\n"
    installed = [("NumPy", "2.1"), ("types-x", "1.0"), ("torch", "2.0+cpu"), ("pip", "25")]
    assert pins.faults(installed[:2], good, project) == []
    assert pins.faults(installed, good + "torch==2.0\n", project) == []
    assert "torch 2.0+cpu is installed and not" in pins.faults(installed, good, project)[0]
    assert "constraints.txt has 2.1" in pins.faults([("numpy", "2.2")], good, project)[0]
    assert "pyproject.toml names ruff" in pins.faults([], good.replace("ruff==0.1", ""), project)[0]
    assert "is no NAME==VERSION" in pins.faults([], good + "flask>=3\n", project)[0]


def test_every_refusal_has_a_status() -> None:
    """Each kind of refusal maps to a status of gRPC's."""
    kinds = [ServeError]
    while kinds:
        kind = kinds.pop()
        assert grpc.StatusCode[kind.status]
        kinds += kind.__subclasses__()


def test_a_keyless_server_has_no_gate(library: Path) -> None:
    """Without --keys a method is started by the same code as before there were any."""
    started = Desk(Metrics(), False).unary(tasks_pb.ModelsRequest, lambda r, a: None).start
    assert "start_known" not in started.__qualname__


@pytest.mark.parametrize(("asked", "most", "runs"), [(0, 0, 3), (1, 0, 1), (1, 2, 2), (4, 2, 4), (9, 0, 3), (0, 5, 5), (1, 3, 3)])
def test_classes(asked: int, most: int, runs: int) -> None:
    """A request runs in the class that it asks for, the default's where it asks for none or one that there isn't, and in none above
    its tenant's highest; its share of the server is its tenant's."""

    class Asker:
        deadline = None
        flow = "tenant"
        caller = Caller("key", Tenant("t", Quota(priority=most)), False)

    claim = Parameters(priority=asked).claim(Asker())  # type: ignore[arg-type]  # all that is asked of it
    assert (claim.level, claim.flow) == (runs, "tenant")
