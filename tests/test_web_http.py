"""The HTTP face before a real server with the shipped models: tasks, streams, sessions, keys, deadlines, typed errors."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message

import seqserve
from seqserve import errors
from tests import fakes, models
from tests.fakes import Fake, failure
from tests.process import ROOT, Served, Web, serve, web
from tests.rest import Rest, connected
from tests.test_security import FILE, KEYS
from web import problems

Code = grpc.StatusCode
REVIEW = "A wonderful film, and the best ending that I ever saw. Go and see it."
SERIES = [[20.0 + hour % 24 + channel for channel in range(7)] for hour in range(96)]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serve(ROOT / "models") as server:
        yield server


@pytest.fixture(scope="module")
def face(served: Served) -> Iterator[Web]:
    with web(f"127.0.0.1:{served.port}") as made:
        yield made


@pytest.fixture
def rest(face: Web) -> Rest:
    return Rest(face.port)


@pytest.fixture
def client(served: Served) -> Iterator[seqserve.Client]:
    with seqserve.Client(f"127.0.0.1:{served.port}") as made:
        yield made


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fakes.serving() as made:
        yield made


# ---- Tasks: what the Python client gets, as JSON ----


def test_models(rest: Rest, client: seqserve.Client) -> None:
    """What is served, as the client has it."""
    listed = rest.get("/v1/models").json["models"]
    assert [(m["name"], m["version"], m["kind"], m["facts"]) for m in listed] == [
        (m.name, m.version, m.kind, dict(m.facts)) for m in client.models()
    ]


def test_classify(rest: Rest, client: seqserve.Client) -> None:
    """Texts are labelled, in order, with the client's very numbers."""
    texts = [REVIEW, "Bad. Just bad."]
    reply = rest.post("/v1/classify", {"texts": texts}).json
    assert (reply["model"], reply["version"]) == ("sentiment", "1")
    assert reply["timing"]["rounds"] > 0
    for got, expected in zip(reply["results"], client.classify(texts), strict=True):
        assert (got["label"], got["tokens"]) == (expected.label, expected.tokens)
        assert {k: np.float32(v) for k, v in got["scores"].items()} == {k: np.float32(v) for k, v in expected.scores.items()}


def test_tag(rest: Rest) -> None:
    """Spans of a text, and of words that were split elsewhere."""
    given = ["Anna lives in London.", ["Anna", "lives", "in", "London"]]
    one, other = rest.post("/v1/tag", {"texts": given}).json["results"]
    assert [(s["label"], given[0][s["start"] : s["end"]]) for s in one["spans"]] == [("person", "Anna"), ("location", "London")]
    assert [(s["label"], s["first_word"]) for s in other["spans"]] == [("person", 0), ("location", 3)]


def test_translate_whole_and_in_pieces(rest: Rest) -> None:
    """The pieces of a stream together are the whole; attention has a weight for every token of the source."""
    asked = {"text": "A dog runs on the beach.", "attention": True}
    whole = rest.post("/v1/translate", asked).json
    assert whole["ended"]
    assert {len(t["attention"]) for t in whole["tokens"]} == {len(whole["source_tokens"])}
    *tokens, (last, done) = rest.events("/v1/translate", asked)
    assert {name for name, _ in tokens} == {"token"}
    assert last == "done"
    assert "".join(data["text"] for _, data in tokens) == whole["text"] == done["text"]
    assert [data["token"] for _, data in tokens] == done["tokens"] == whole["tokens"]


def test_generate_whole_and_in_pieces(rest: Rest, client: seqserve.Client) -> None:
    """The same seed gives the same text: whole, in pieces, and to the client."""
    asked = {"text": "ROMEO:", "seed": 2**63 + 1, "temperature": 0.5, "max_symbols": 40}
    whole = rest.post("/v1/generate", asked).json
    *symbols, (last, done) = rest.events("/v1/generate", asked)
    assert last == "done"
    assert "".join(data["text"] for _, data in symbols) == whole["text"] == done["text"]
    assert whole["seed"] == done["seed"] == 2**63 + 1
    assert client.generate("ROMEO:", 0.5, seed=2**63 + 1, max_symbols=40).text == whole["text"]


def test_forecast(rest: Rest, client: seqserve.Client) -> None:
    """Steps × channels, as the client has them, to the last bit."""
    reply = rest.post("/v1/forecast", {"observations": SERIES, "horizon": 12, "quantiles": [0.1, 0.9]}).json
    expected = client.forecast(SERIES, 12, [0.1, 0.9])
    assert reply["channels"] == list(expected.channels)
    assert np.array_equal(np.array(reply["mean"], np.float32), expected.mean)
    for got, (quantile, values) in zip(reply["quantiles"], expected.quantiles.items(), strict=True):
        assert got["quantile"] == quantile
        assert np.array_equal(np.array(got["values"], np.float32), values)


def _tensors(datatype: str, depth: int) -> bytes:
    tensor = f'"name": "x", "datatype": "{datatype}", "shape": [1, 2], "data": '
    return b'{"turn": 1, "tensors": [{' + tensor.encode() + b"[" * depth + b"1" + b"]" * depth + b"}]}"


def _shaped(*shape: int) -> dict[str, Any]:
    """A tensor of that shape, without data."""
    return {"name": "tokens", "datatype": "INT64", "shape": shape, "data": []}


TURN, INFER = "/v1/sessions/x/turns", "/v2/models/sentiment/infer"
BROKEN = {
    "no JSON": ("/v1/classify", b"{", "NOT_JSON"),
    "no body": ("/v1/classify", b"", "NOT_JSON"),
    "not UTF-8": ("/v1/classify", b'{"texts": ["\xff"]}', "NOT_JSON"),
    "half a surrogate pair": ("/v1/classify", b'{"texts": ["\\ud800"]}', "NOT_JSON"),
    "another type": ("/v1/classify", {"texts": "a text"}, "BAD_BODY"),
    "a misspelt member": ("/v1/translate", {"text": "A dog.", "beams": 5}, "BAD_BODY"),
    "no texts": ("/v1/classify", {"texts": []}, "BAD_BODY"),
    "too many texts": ("/v1/classify", {"texts": ["x"] * 257}, "BAD_BODY"),
    "nested too deeply": ("/v1/sessions/x/turns", _tensors("INT64", 100_000), "NOT_JSON"),
    "nested deeply": ("/v1/sessions/x/turns", _tensors("INT64", 200), "WRONG_SHAPE"),
    "texts nested deeply": ("/v1/sessions/x/turns", _tensors("BYTES", 200), "WRONG_SIZE"),
    "a mixture": ("/v1/forecast", {"observations": [[1.0] * 7, 2.0]}, "WRONG_SHAPE"),
    "uneven steps": ("/v1/forecast", {"observations": [[1.0] * 7, [2.0]]}, "WRONG_SHAPE"),
    "beyond 32 bits": ("/v1/forecast", {"observations": [[1e39] * 7]}, "INVALID_ARGUMENT"),
    "other channels": ("/v1/forecast", {"observations": [[1.0] * 3]}, "WRONG_CHANNELS"),
    "another language": ("/v1/translate", {"text": "A dog.", "target": "fr"}, "UNKNOWN_LANGUAGES"),
    "a seed below 0": ("/v1/generate", {"seed": -1}, "INVALID_ARGUMENT"),
    "a length beyond 64 bits": (TURN, {"turn": 1, "tensors": [_shaped(2**64, 0)]}, "WRONG_SHAPE"),
    "a length below 0": (INFER, {"inputs": [_shaped(1, -1)]}, "WRONG_SHAPE"),
    "a negative length and no data": (INFER, {"inputs": [_shaped(-1, 0)]}, "WRONG_SHAPE"),
    "lengths of which there is no array": (INFER, {"inputs": [_shaped(2**62, 4, 0)]}, "WRONG_SHAPE"),
    "65 axes": (INFER, {"inputs": [_shaped(*[0] * 65)]}, "WRONG_RANK"),
    "65 axes of a session's turn": (TURN, {"turn": 1, "tensors": [_shaped(*[0] * 65)]}, "WRONG_RANK"),
    "more axes than can be multiplied": (INFER, {"inputs": [_shaped(*[2**62] * 10_000)]}, "WRONG_RANK"),
    "two inputs": ("/v1/sessions/x/turns", {"turn": 1, "text": "a", "observations": [1.0]}, "BAD_BODY"),
    "no input": ("/v1/sessions/x/turns", {"turn": 1}, "BAD_BODY"),
    "turn 0": ("/v1/sessions/x/turns", {"turn": 0, "text": "a"}, "BAD_BODY"),
    "no session's bytes": ("/v1/sessions/import", b"\xff\xff", "INVALID_ARGUMENT"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_bad_bodies(case: str, rest: Rest) -> None:
    """400, and a reason; the neighbour's answer is what it was."""
    path, body, reason = BROKEN[case]
    headers = {"content_type": "application/json"} if isinstance(body, bytes) and "import" not in path else {}
    status, got = rest.post(path, body, **headers).why
    assert status == 400
    assert got == reason
    assert rest.post("/v1/classify", {"texts": [REVIEW]}).json["results"][0]["label"] == "positive"


# ---- Sessions: exactly once over HTTP ----


def test_a_session(rest: Rest) -> None:
    """Opened, advanced, looked at, listed, ended; what ended is gone, what never was is not found."""
    opened = rest.post("/v1/sessions", {"model": "sentiment", "session": "a/b c", "ttl": 60})
    assert (opened.status, opened.headers["location"]) == (201, "/v1/sessions/a%2Fb%20c")
    assert rest.post("/v1/sessions", {"model": "sentiment", "session": "a/b c"}).why == (409, "SESSION_EXISTS")
    here = opened.headers["location"]
    first = rest.post(f"{here}/turns", {"turn": 1, "text": REVIEW[:20]})
    assert first.status == 200
    whole = rest.post(f"{here}/turns", {"turn": 2, "acknowledged": 1, "text": REVIEW[20:]}).json["classification"]
    expected = rest.post("/v1/classify", {"texts": [REVIEW]}).json["results"][0]
    assert (whole["label"], whole["scores"]) == (expected["label"], expected["scores"]), "cut anywhere, the same bits"
    info = rest.get(here).json
    assert (info["session"], info["turn"], info["acknowledged"], info["ttl"]) == ("a/b c", 2, 1, 60.0)
    assert rest.get("/v1/sessions?after=a/b").json == {"sessions": [info], "total": 1}
    assert rest.ask("DELETE", here).json["turn"] == 2
    assert rest.get(here).why == (404, "UNKNOWN_SESSION") or rest.get(here).why == (410, "SESSION_CLOSED")
    assert rest.get("/v1/sessions/never").why == (404, "UNKNOWN_SESSION")
    assert rest.post("/v1/sessions", {"model": "nope"}).why == (404, "UNKNOWN_MODEL")


def test_a_turn_sent_again_is_the_same_bytes(rest: Rest) -> None:
    """A replay advances nothing; a gap, another input and an acknowledged turn are refused with the last turn applied."""
    here = rest.post("/v1/sessions", {"model": "shakespeare"}).headers["location"]
    asked = {"turn": 1, "generate": {"text": "JULIET:", "max_symbols": 12}}  # the server draws the seed
    first = rest.post(f"{here}/turns", asked)
    assert first.status == 200
    with ThreadPoolExecutor(8) as pool:
        again = list(pool.map(lambda _: rest.post(f"{here}/turns", asked).body, range(8)))
    assert set(again) == {first.body}
    gap = rest.post(f"{here}/turns", {"turn": 3, "generate": {}})
    assert gap.why == (409, "GAP")
    assert gap.json["facts"]["turn"] == "1"
    assert rest.post(f"{here}/turns", {**asked, "generate": {"text": "ROMEO:"}}).why == (409, "OTHER_INPUT")
    assert rest.post(f"{here}/turns", {"turn": 2, "acknowledged": 1, "generate": {"max_symbols": 1}}).status == 200
    assert rest.post(f"{here}/turns", asked).why == (409, "ACKNOWLEDGED")
    assert rest.get(here).json["turn"] == 2


def test_a_forecaster_by_observations_and_tensors(rest: Rest) -> None:
    """One step a turn or many, in raw units; and plain tensors, whose answer is tensors."""
    one = rest.post("/v1/sessions", {"model": "forecaster"}).headers["location"]
    many = rest.post("/v1/sessions", {"model": "forecaster"}).headers["location"]
    for at, step in enumerate(SERIES[:3], 1):
        stepped = rest.post(f"{one}/turns", {"turn": at, "observations": step})
    at_once = rest.post(f"{many}/turns", {"turn": 1, "observations": SERIES[:3]})
    assert stepped.json["forecast"] == at_once.json["forecast"]
    words = rest.post("/v1/sessions", {"model": "sentiment"}).headers["location"]
    tensor = {"name": "tokens", "datatype": "INT64", "shape": [1, 3], "data": [[11, 7, 42]]}
    answer = rest.post(f"{words}/turns", {"turn": 1, "tensors": [tensor]}).json["tensors"]
    assert {t["name"]: t["shape"] for t in answer} == {"probabilities": [1, 2], "logits": [1, 2]}
    wrong = {**tensor, "data": [[11, 7, 4.5]]}
    assert rest.post(f"{words}/turns", {"turn": 2, "tensors": [wrong]}).why == (400, "WRONG_DTYPE")


def test_forks_exports_and_other_faces(rest: Rest, client: seqserve.Client) -> None:
    """A fork goes its own way; an export taken up under another id goes on with the same bits; the gRPC client sees them all."""
    rest.post("/v1/sessions", {"model": "sentiment", "session": "trunk"})
    rest.post("/v1/sessions/trunk/turns", {"turn": 1, "text": "The first hour is slow, "})
    assert rest.post("/v1/sessions/trunk/fork", {"session": "twig"}).status == 201
    exported = rest.post("/v1/sessions/trunk/export")
    assert exported.headers["content-type"] == "application/octet-stream"
    assert rest.post("/v1/sessions/import?session=copy", exported.body).status == 201
    ends = [rest.post(f"/v1/sessions/{id}/turns", {"turn": 2, "text": "but the ending is wonderful."}).json for id in ("trunk", "copy")]
    assert ends[0]["classification"] == ends[1]["classification"]
    other = rest.post("/v1/sessions/twig/turns", {"turn": 2, "text": "and so is the rest, a disaster."}).json
    assert other["classification"] != ends[0]["classification"]
    with client.resume("copy", close=False) as session:
        assert session.turn == 2
        assert session.send(" Truly.").tokens > 0
    assert rest.get("/v1/sessions/copy").json["turn"] == 3
    assert rest.post("/v1/sessions/trunk/export", {"move": True}).status == 200
    assert rest.post("/v1/sessions/trunk/turns", {"turn": 3, "text": "x"}).why == (410, "SESSION_MOVED")


def test_a_kill_of_either_process_loses_nothing(tmp_path: Path) -> None:
    """Turns answered before the server, and then the web process, is killed are answered with the same bytes after it; the session
    goes on where it was."""
    models.speaker(tmp_path / "models" / "speaker" / "1")
    flags = ("--store", f"lmdb:{tmp_path / 'store'}")
    texts = ["a cab, ", "a bed. ", "a fad"]
    with serve(tmp_path / "models", *flags) as server, web(f"127.0.0.1:{server.port}") as face:
        port = server.port
        rest = Rest(face.port)
        rest.post("/v1/sessions", {"model": "speaker", "session": "s"})
        turns = [{"turn": at, "generate": {"text": text, "max_symbols": 5}} for at, text in enumerate(texts, 1)]
        said = [rest.post("/v1/sessions/s/turns", turn).body for turn in turns[:2]]
        server.process.kill()
        server.process.wait()
        away = rest.post("/v1/sessions/s/turns", turns[2])
        assert away.why[0] == 503
        assert away.headers["retry-after"] == "1"
        assert rest.get("/v2/health/ready").status == 503
        assert rest.get("/healthz").status == 200
        with serve(tmp_path / "models", *flags, "--port", str(port)):
            again = [_until_there(rest, turn) for turn in turns[:2]]
            assert again == said
            face.process.send_signal(signal.SIGKILL)
            face.process.wait()
            with web(f"127.0.0.1:{port}") as second:
                assert [_until_there(Rest(second.port), turn) for turn in turns[:2]] == said
                assert Rest(second.port).post("/v1/sessions/s/turns", turns[2]).status == 200


def _until_there(rest: Rest, turn: dict[str, Any]) -> bytes:
    """A turn sent again, as any client would, until the server behind is back."""
    while (reply := rest.post("/v1/sessions/s/turns", turn)).status == 503:
        pass
    assert reply.status == 200, reply
    return reply.body


# ---- Who calls ----


def test_keys_and_tenants(tmp_path: Path) -> None:
    """A caller's key goes on to the server in either header; tenants do not meet; what is for operators is; 401 names the scheme.
    A face with a key of its own shows it for those that bring none, and theirs for those that do."""
    models.library(tmp_path / "models")
    keys, mine = tmp_path / "keys.toml", tmp_path / "ann.key"
    keys.write_text(FILE)
    mine.write_text(KEYS["ann"])
    with serve(tmp_path / "models", "--keys", str(keys)) as server, web(f"127.0.0.1:{server.port}") as face:
        nobody = Rest(face.port)
        ann, bob = Rest(face.port, authorization=f"Bearer {KEYS['ann']}"), Rest(face.port, x_api_key=KEYS["bob"])
        refused = nobody.get("/v1/models")
        assert refused.why == (401, "NO_KEY")
        assert refused.headers["www-authenticate"] == "Bearer"
        assert Rest(face.port, x_api_key="wrong").get("/v1/models").why == (401, "BAD_KEY")
        assert nobody.get("/v2/health/ready").status == 200
        for owner in (ann, bob):
            assert owner.post("/v1/sessions", {"model": "reader", "session": "s"}).status == 201
        assert ann.post("/v2/repository/models/reader/load").json["reason"] == "OPERATORS_ONLY"
        assert Rest(face.port, x_api_key=KEYS["boss"]).post("/v2/repository/models/reader/load").status == 200
        small = Rest(face.port, x_api_key=KEYS["slow"])
        last = [small.get("/v1/models") for _ in range(3)][-1]
        assert last.why == (429, "TENANT_RATE")
        assert int(last.headers["retry-after"]) >= last.json["retry_after"] > 0
        with web(f"127.0.0.1:{server.port}", "--api-key-file", str(mine)) as open_to_all:
            assert [s["session"] for s in Rest(open_to_all.port).get("/v1/sessions").json["sessions"]] == ["s"]
            assert Rest(open_to_all.port, x_api_key="wrong").get("/v1/models").why == (401, "BAD_KEY")
        log = "".join([*face.log, *server.log])
    assert not [key for key in KEYS.values() if key in log]


# ---- Time, and callers who leave ----


def test_deadlines(rest: Rest) -> None:
    """A caller's own time is the server's deadline: past it 504, and a time that is none is refused."""
    asked = {"text": "ROMEO:", "max_symbols": 2000}
    assert rest.post("/v1/generate", asked, x_request_timeout="0.005").why == (504, "DEADLINE_EXCEEDED")
    for wrong in ("0", "-1", "nan", "soon", "601", "inf"):
        assert rest.get("/v1/models", x_request_timeout=wrong).why == (400, "BAD_TIMEOUT")


def test_a_deadline_passes_on(fake: Fake) -> None:
    """What the server is given is what the caller gave."""
    with web(fake.target) as face:
        Rest(face.port).get("/v1/models", x_request_timeout="7")
        Rest(face.port).get("/v1/models")
    first, second = fake.left
    assert first is not None
    assert second is not None
    assert 5 < first < 8
    assert 55 < second < 62


def test_who_leaves_frees_the_server(fake: Fake) -> None:
    """A reader of events that goes away cancels the call behind them; so does one that waits for a whole answer."""
    with web(fake.target) as face:
        rest = Rest(face.port)
        events = rest.events("/v1/translate", {"text": f"{fakes.HOLD} it"})
        assert next(events)[0] == "token"
        events.close()
        assert fake.gone.wait(30)
        arrived, left = threading.Event(), threading.Event()

        def held(method: str, request: Message, context: grpc.ServicerContext) -> None:
            context.add_callback(left.set)
            arrived.set()
            left.wait(30)

        fake.note = held  # type: ignore[method-assign]
        body = b'{"texts": ["x"]}'
        head = f"POST /v1/classify HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        with connected(face.port) as bare:
            bare.sendall(head.encode() + body)
            assert arrived.wait(30)
            assert not left.is_set()
        assert left.wait(30)


def test_a_stream_that_breaks_says_so(fake: Fake) -> None:
    """An error before the first piece is a status, one behind it an event."""
    with web(fake.target) as face:
        rest = Rest(face.port)
        (first, _), (last, said) = rest.events("/v1/translate", {"text": f"{fakes.BREAK} it"})
        assert (first, last, said["status"], said["grpc_status"]) == ("token", "error", 503, "UNAVAILABLE")
        fake.failures.append(failure(Code.RESOURCE_EXHAUSTED, "full", "QUEUE_FULL", 2.5))
        refused = rest.post("/v1/translate", {"text": "x"}, accept="text/event-stream")
        assert refused.why == (429, "QUEUE_FULL")
        assert (refused.headers["retry-after"], refused.json["retry_after"]) == ("3", 2.5)
        assert refused.headers["content-type"] == "application/problem+json"


STATUSES = {
    Code.INVALID_ARGUMENT: 400, Code.OUT_OF_RANGE: 400, Code.UNAUTHENTICATED: 401, Code.PERMISSION_DENIED: 403, Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409, Code.ABORTED: 409, Code.FAILED_PRECONDITION: 409, Code.RESOURCE_EXHAUSTED: 413, Code.UNIMPLEMENTED: 501,
    Code.UNAVAILABLE: 503, Code.CANCELLED: 503, Code.DEADLINE_EXCEEDED: 504, Code.INTERNAL: 500, Code.UNKNOWN: 500, Code.DATA_LOSS: 500,
}  # fmt: skip


def test_every_status_has_its_own(fake: Fake) -> None:
    """Each gRPC status is an HTTP status, with reason and facts in the body; /v2 says it in the protocol's form too."""
    assert set(STATUSES) | {Code.OK} == set(Code)
    with web(fake.target) as face:
        rest = Rest(face.port)
        for code, status in STATUSES.items():
            fake.failures.append(failure(code, "so it is", "WHY", expected="this", got="that"))
            refused = rest.get("/v1/models")
            assert refused.why == (status, "WHY"), code
            assert (refused.json["grpc_status"], refused.json["facts"]) == (code.name, {"expected": "this", "got": "that"})
        fake.failures.append(failure(Code.NOT_FOUND, "there is no model 'x'", "UNKNOWN_MODEL"))
        refused = rest.get("/v2/models/x")
        assert (refused.status, refused.json["error"]) == (404, "there is no model 'x'")
        fake.replies["Models"] = b"\xff"
        assert rest.get("/v1/models").why == (502, errors.BAD_REPLY)
    gone = errors.from_status(
        Code.FAILED_PRECONDITION, "", (("grpc-status-details-bin", failure(Code.FAILED_PRECONDITION, "", "SESSION_EXPIRED")[2]),)
    )
    assert problems.told(gone).status == 410
