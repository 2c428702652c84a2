"""Texts drawn symbol by symbol: a text depends on prompt, manner and seed alone, whoever else is there, however it is asked for;
and the model behind it reads the same whether in lanes, in chunks or whole."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import seqserve
from contract.sampling import Chance, Manner, draw
from contract.text import Vocabulary, of_letters
from protos import seqserve_pb2 as pb
from protos import sessions_pb2 as live
from seqserve import cli
from server import records
from server.catalog import Catalog
from server.graph import OnnxGraph
from server.metrics import Metrics
from server.rounds import Limits
from server.tasks.generate import Generated, Generator, Wanted
from server.workers import Workers
from tests import models
from tests.process import ROOT, Served, reason, serve
from tests.test_server import metric
from training import charlm
from training.config import Config, Run
from training.data.shakespeare import stretches
from training.lanes import Documents

TASKS = "/seqserve.v1.Tasks"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    models.speaker(root / "speaker" / "1")
    return root


@pytest.fixture(scope="module", params=["direct", "public"])
def served(request: pytest.FixtureRequest, directory: Path) -> Iterator[Served]:
    with serve(directory, "--front", request.param) as server:
        yield server


@pytest.fixture(scope="module")
def catalog(directory: Path) -> Iterator[Catalog]:
    """An engine in this process, its rounds run by two workers."""
    workers = Workers(2)
    catalog = Catalog(workers, Limits(workers=2), Metrics(), 256)
    catalog.scan(directory)
    workers.start()
    yield catalog
    workers.stop()


class Alone:
    """The slow reference: one text at a time, a bare run for each symbol."""

    def __init__(self, directory: Path) -> None:
        at = directory / "speaker" / "1"
        bundle = models.contract.load(at)
        self.graph = OnnxGraph(bundle.graph, at / bundle.graph.file)
        self.vocabulary = Vocabulary.load(at / "vocabulary.json")
        self.states = bundle.graph.states

    def text(self, prompt: str, wanted: Wanted) -> tuple[str, list[float], str]:
        """The text, each symbol's log probability, why it ended."""
        assert wanted.seed is not None
        chance, said, probabilities = Chance(wanted.seed), [], []
        unread = [1, *self.vocabulary.encode(prompt)]
        state = {s.input: s.fresh(1) for s in self.states}
        for _ in range(wanted.symbols or 200):
            logits, *after = self.graph.run({"tokens": np.array([unread]), **state})
            state = {s.input: a for s, a in zip(self.states, after, strict=True)}
            symbol, probability = draw(logits[0, -1], wanted.manner, chance, (0, 1))
            if symbol == 2:
                return self.vocabulary.decode(said), probabilities, "end"
            said.append(symbol)
            probabilities.append(probability)
            unread = [symbol]
            if any(stop in self.vocabulary.decode(said) for stop in wanted.stop):
                return self.vocabulary.decode(said), probabilities, "stop"
        return self.vocabulary.decode(said), probabilities, "limit"


@pytest.fixture(scope="module")
def alone(directory: Path) -> Alone:
    return Alone(directory)


WISHES = st.builds(
    Wanted,
    st.builds(Manner, st.sampled_from([0.0, 0.5, 1.0, 3.0]), st.integers(0, 20)),
    st.integers(0, 2**64 - 1),
    st.integers(0, 60),
    st.lists(st.sampled_from([".", "ab", "\n", "hh", "c, "]), max_size=2).map(tuple),
)
PROMPTS = st.text("\n .,abcdefghXÄ", max_size=40)


def generator(catalog: Catalog) -> Generator:
    task = catalog.find("speaker").task
    assert isinstance(task, Generator)
    return task


def together(task: Generator, asked: list[tuple[str, Wanted]]) -> list[Generated]:
    """All texts at once."""

    def begin(prompt: str, wanted: Wanted) -> Future[Generated]:
        future: Future[Generated] = Future()
        task.start(prompt, wanted, lambda _, result: future.set_result(result), future.set_exception)
        return future

    return [future.result(60) for future in [begin(prompt, wanted) for prompt, wanted in asked]]


@settings(max_examples=25, deadline=None)
@given(asked=st.lists(st.tuples(PROMPTS, WISHES), min_size=1, max_size=12))
def test_a_text_among_many_is_the_text_alone(asked: list[tuple[str, Wanted]], catalog: Catalog, alone: Alone) -> None:
    """Whatever else is being generated, each text and each log probability are, bit for bit, those of bare runs one by one."""
    for (prompt, wanted), found in zip(asked, together(generator(catalog), asked), strict=True):
        text, probabilities, ended = alone.text(prompt, wanted)
        assert (found.text, found.ended, found.seed) == (text, ended, wanted.seed)
        assert [s.log_probability for s in found.symbols] == probabilities
        assert "".join(s.text for s in found.symbols) == text
        assert (found.read, found.unknown) == (len(prompt), sum(letter in "XÄ" for letter in prompt))


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=4, max_size=30), heat=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    top_k=st.integers(0, 40), seed=st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_what_is_drawn_is_allowed(logits: list[float], heat: float, top_k: int, seed: int) -> None:
    """A drawn symbol is none of those that must never come, and among the top_k likeliest of the others; its log probability
    is the model's; temperature 0 takes the likeliest."""
    array = np.array(logits, np.float32)
    symbol, probability = draw(array, Manner(heat, top_k), Chance(seed), (0, 2))
    left = np.delete(array, [0, 2]).astype(np.float64)
    assert symbol not in (0, 2)
    better = int((left > array[symbol]).sum())
    assert better == 0 if heat == 0 else better < (top_k or len(logits))
    assert probability == pytest.approx(array[symbol] - np.log(np.exp(left - left.max()).sum()) - left.max(), abs=1e-9)


@pytest.mark.parametrize(("heat", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 3)])
def test_symbols_come_as_often_as_their_probability_says(heat: float, top_k: int) -> None:
    """Of 20,000 draws each symbol's share is softmax(logits / temperature) of the symbols left, within five deviations."""
    logits = np.array([0.3, -1.0, 1.2, 0.0, 0.9], np.float32)
    chance, manner, count = Chance(7), Manner(heat, top_k), 20_000
    found = np.bincount([draw(logits, manner, chance)[0] for _ in range(count)], minlength=5) / count
    expected = np.exp(logits.astype(np.float64) / heat)
    if top_k:
        expected[np.argsort(logits)[:-top_k]] = 0
    expected /= expected.sum()
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all()


def test_chance_is_the_same_in_every_release() -> None:
    """A seed's numbers are written down here: a text that was noted with its seed can be had again."""
    chance = Chance(42)
    assert [chance.next() for _ in range(3)] == [0.7739560485559633, 0.4388784397520523, 0.8585979199113825]


def ask(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(**fields)  # type: ignore[arg-type]  # the fields of the message


def test_streamed_is_whole_is_the_clients(served: Served, alone: Alone) -> None:
    """Streamed and whole, by message, blocking client and asyncio client: one text, the reference's."""
    prompt, wanted = "abc, dead", Wanted(Manner(0.8, 9), 5, 50)
    text, probabilities, ended = alone.text(prompt, wanted)
    *pieces, last = served.stream(f"{TASKS}/GenerateStream", pb.GeneratePiece)(
        ask(text=prompt, temperature=0.8, top_k=9, seed=5, max_symbols=50)
    )
    assert "".join(p.text for p in pieces) == text == last.done.text
    assert [p.token.log_probability for p in pieces] == [t.log_probability for t in last.done.tokens]
    assert [t.log_probability for t in last.done.tokens] == np.float32(probabilities).tolist()
    assert (last.done.ended, last.done.seed, last.done.read, last.done.unknown) == (ended, 5, 9, 0)
    assert last.done.timing.rounds == len(pieces) + (ended == "end")
    wishes = (prompt, 0.8, 9, 5, 50)

    async def awaited() -> list[seqserve.Generation | None]:
        async with seqserve.AsyncClient(f"localhost:{served.port}") as client:
            streamed = [piece.done async for piece in client.generate_stream(*wishes)]
            return [await client.generate(*wishes), streamed[-1]]

    with seqserve.Client(f"localhost:{served.port}") as client:
        found = [client.generate(*wishes), list(client.generate_stream(*wishes))[-1].done, *asyncio.run(awaited())]
    for g in found:
        assert g is not None
        assert (g.text, g.ended, g.seed, g.model, g.version) == (text, ended, 5, "speaker", "1")


def test_a_text_without_a_seed_can_be_had_again(served: Served) -> None:
    """The server draws a seed where none is given, another each time, and tells it; with it the text comes again."""
    with seqserve.Client(f"localhost:{served.port}") as client:
        first, second = client.generate("ab"), client.generate("ab")
        assert first.seed != second.seed
        assert client.generate("ab", seed=first.seed) == first


def test_a_stream_cancelled_midway(served: Served) -> None:
    """Callers who leave in the middle of a text free their rows."""
    stream = served.stream(f"{TASKS}/GenerateStream", pb.GeneratePiece)
    for seed in range(20):
        call = stream(ask(text="abc", seed=seed, max_symbols=400))
        next(call)
        call.cancel()
    waiting = 1.0
    for _ in range(2000):  # each look is a real call; rows are free as soon as the round under way ends
        waiting = sum(metric(served, "seqserve_waiting"))
        if not waiting:
            break
    assert waiting == 0


BAD = [
    ("temperature", ask(temperature=-0.5), "BAD_TEMPERATURE", "0.001 to 100"),
    ("hardly a temperature", ask(temperature=1e-9), "BAD_TEMPERATURE", "0.001 to 100"),
    ("NaN", ask(temperature=float("nan")), "BAD_TEMPERATURE", "0.001 to 100"),
    ("limit", ask(max_symbols=401), "BAD_LIMIT", "1 to 400"),
    ("an empty stop", ask(stop=["a", ""]), "BAD_STOP", "0 to 16 texts"),
    ("too many stops", ask(stop=["a"] * 17), "BAD_STOP", "0 to 16 texts"),
    ("too much to read", ask(text="a" * 300), "TOO_LONG", "at most 299"),
    ("far too much", ask(text="a" * 100_001), "TOO_LONG", "at most 100000"),
    ("another model", ask(model=pb.Model(name="no")), "UNKNOWN_MODEL", "there are: speaker"),
]


@pytest.mark.parametrize(("request_", "expected", "says"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_wishes(served: Served, request_: pb.GenerateRequest, expected: str, says: str) -> None:
    """Each wish that can't be had gets its typed error, and a text under way is not harmed."""
    generate = served.method(f"{TASKS}/Generate", pb.GenerateReply)
    neighbour = generate.future(ask(text="ab", seed=1))
    with pytest.raises(grpc.RpcError) as caught:
        generate(request_)
    _, why, _, _ = reason(caught.value)
    assert why == expected
    assert says in caught.value.details()
    assert neighbour.result().text == generate(ask(text="ab", seed=1)).text


def test_a_text_ends_after_a_stop(catalog: Catalog) -> None:
    """The first stop to come ends the text and is its end; without it the same text goes on."""
    task = generator(catalog)
    free = next(g for g in together(task, [("ab", Wanted(seed=seed, symbols=60)) for seed in range(50)]) if len(g.text) > 20)
    stop = free.text[10:13]
    (cut,) = together(task, [("ab", Wanted(seed=free.seed, symbols=60, stop=("never that", stop)))])
    assert cut.ended == "stop"
    assert cut.text == free.text[: free.text.index(stop) + 3]


def test_the_command(served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`seqserve generate` prints what it was given and what comes; --json gives both apart; the seed makes it come again."""
    monkeypatch.setenv("SEQSERVE_SERVER", f"localhost:{served.port}")
    with seqserve.Client(f"localhost:{served.port}") as client:
        wanted = client.generate("ab", 0.7, seed=3, max_symbols=30, stop=["\n\n"])
    argv = ["generate", "ab", "--temperature", "0.7", "--seed", "3", "--max-symbols", "30", "--stop", "\\n\\n"]
    assert cli.main(argv) == 0
    printed = capsys.readouterr()
    assert printed.out == f"ab{wanted.text}\n"
    assert printed.err == f"seed 3, ended by {wanted.ended}\n"
    assert cli.main([*argv, "--json"]) == 0
    assert f'"seed": 3, "ended": "{wanted.ended}"' in capsys.readouterr().out
    assert cli.main(["generate", "ab", "--seed", "-1"]) == 2


# Sessions.

SEEDED = [("abc", 8, 20), ("", 9, 15), (" dead", 10, 30), ("", 11, 1), ("", 12, 12)]
"""Turns: text, seed, symbols; with these seeds none of them ends by the model's own mark."""


def in_turns(session: seqserve.Session, turns: list[tuple[str, int, int]]) -> list[seqserve.Generation]:
    return [session.generate(text, 0.8, seed=seed, max_symbols=symbols) for text, seed, symbols in turns]


def test_likeliest_turns_are_the_likeliest_text(served: Served) -> None:
    """At temperature 0 turns without new text make, symbol for symbol, the text of one call: nothing is lost between turns."""
    with seqserve.Client(f"localhost:{served.port}") as client:
        whole = client.generate("abc", 0, max_symbols=40)
        with client.session("speaker") as session:
            turns = [session.generate(text, 0, max_symbols=n) for text, n in (("abc", 7), ("", 1), ("", 12), ("", 20))]
    assert "".join(t.text for t in turns) == whole.text
    assert tuple(itertools.chain.from_iterable(t.symbols for t in turns)) == whole.symbols
    assert [t.ended for t in turns] == ["limit"] * 4
    assert {(t.model, t.version) for t in turns} == {("speaker", "1")}


def test_turns_are_bare_runs(served: Served, alone: Alone) -> None:
    """Each turn's log probabilities are those of one bare run over all that was read and drawn before it."""
    with seqserve.Client(f"localhost:{served.port}") as client, client.session("speaker") as session:
        turns = in_turns(session, SEEDED)
    unread = [1]
    for (text, seed, symbols), turn in zip(SEEDED, turns, strict=True):
        unread += alone.vocabulary.encode(text).tolist()
        said = alone.vocabulary.encode(turn.text).tolist()
        feeds = {"tokens": np.array([unread + said[:-1]]), **{s.input: s.fresh(1) for s in alone.states}}
        logits = alone.graph.run(feeds)[0][0, len(unread) - 1 :]
        chance = Chance(seed)
        drawn = [draw(row, Manner(0.8), chance, (0, 1)) for row in logits]
        assert [symbol for symbol, _ in drawn] == said
        assert [s.log_probability for s in turn.symbols] == np.float32([p for _, p in drawn]).tolist()
        assert (turn.ended, len(said)) == ("limit", symbols)
        unread += said


def test_a_turn_sent_again_and_a_fork(served: Served) -> None:
    """A turn sent again is answered with the same bytes, though it has no seed; a fork goes on as the session would have, or
    otherwise, and the session does not notice."""
    turn = served.method("/seqserve.v1.Sessions/Turn", live.TurnReply)
    with seqserve.Client(f"localhost:{served.port}") as client, client.session("speaker", id=f"again-{served.port}") as session:
        in_turns(session, SEEDED[:2])
        request = live.TurnRequest(session=session.id, turn=3, generate=ask(text="a", max_symbols=30))
        first = turn(request)
        assert turn(request).SerializeToString() == first.SerializeToString()
        assert not first.generated.HasField("model")
        session = client.resume(session.id)
        with session.fork() as same, session.fork() as other:
            expected = in_turns(same, SEEDED[2:])
            assert in_turns(other, [(" dead", 99, 30)])[0].text != expected[0].text
            assert in_turns(session, SEEDED[2:]) == expected


def test_what_is_unread_is_a_symbol(served: Served) -> None:
    """An exported session whose unread symbol is none of the model's is not taken up; as it was, it goes on."""
    calls = {name: served.method(f"/seqserve.v1.Sessions/{name}") for name in ("Open", "Turn", "Export", "Import")}
    calls["Open"](live.OpenRequest(session="unread", model=pb.Model(name="speaker")))
    calls["Turn"](live.TurnRequest(session="unread", turn=1, generate=ask(text="ab", seed=1, max_symbols=5)))
    exported = live.Exported.FromString(calls["Export"](live.ExportRequest(session="unread", move=True)))
    record = records.decode(exported.record, lambda first: None).record
    assert record.rest.isdecimal()
    for rest in ("abc", "-1", "9999999", "9" * 50, " 5", "٥"):
        made_up = records.encode(replace(record, rest=rest))[0]
        with pytest.raises(grpc.RpcError) as refused:
            calls["Import"](live.ImportRequest(exported=live.Exported(record=made_up, session="unread")))
        assert reason(refused.value)[1] == "STATE_MISMATCH"
    calls["Import"](live.ImportRequest(exported=exported))
    calls["Turn"](live.TurnRequest(session="unread", turn=2, generate=ask(text="", seed=1, max_symbols=5)))


def test_turns_sent_ahead_are_turns_one_by_one(served: Served) -> None:
    """All turns in one message give what they give one after another: each begins with what the one before left unread."""
    with seqserve.Client(f"localhost:{served.port}") as client:
        with client.session("speaker") as session:
            expected = [g.text for g in in_turns(session, SEEDED)]
        with client.session("speaker") as session:
            session.open()
            wishes = enumerate(SEEDED, 1)
            asked = [
                live.TurnRequest(session=session.id, turn=n, generate=ask(text=t, temperature=0.8, seed=seed, max_symbols=most))
                for n, (t, seed, most) in wishes
            ]
            stream = served.channel.stream_stream(
                "/seqserve.v1.Sessions/Turns", live.TurnsRequest.SerializeToString, live.TurnsReply.FromString
            )
            replies = [r for message in stream(iter([live.TurnsRequest(turns=asked)])) for r in message.turns]
    assert [r.generated.text for r in replies] == expected


def test_after_the_models_end_a_turn_begins_another_text(served: Served) -> None:
    """Where the model ended the text, the next turn is what it would be in a new session."""
    with seqserve.Client(f"localhost:{served.port}") as client, client.session("speaker") as session:
        ended = next(g for g in (session.generate("ab", seed=seed, max_symbols=400) for seed in range(200)) if g.ended == "end")
        assert session.generate("abc", seed=1).text == client.generate("abc", seed=1).text
        assert ended.symbols


def test_turns_of_another_kind_are_refused(served: Served) -> None:
    """A session that goes on with texts takes no pieces of text to be labelled, no observations, and no other model's name; it
    lives on."""

    async def refused() -> str:
        async with seqserve.AsyncClient(f"localhost:{served.port}") as client, client.session("speaker") as session:
            for piece in ("abc", [1.0]):
                with pytest.raises(seqserve.InvalidInput, match="can generate"):
                    await session.send(piece)
            with pytest.raises(seqserve.InvalidInput, match="allowed are 0"):
                await session.generate(temperature=-1)
            return (await session.generate("abc", seed=1)).text

    turn = served.method("/seqserve.v1.Sessions/Turn", live.TurnReply)
    with seqserve.Client(f"localhost:{served.port}") as client, client.session("speaker") as session:
        session.open()
        with pytest.raises(grpc.RpcError, match="leave the turn's empty"):
            turn(live.TurnRequest(session=session.id, turn=1, generate=ask(model=pb.Model(name="speaker"))))
        assert asyncio.run(refused()) == client.generate("abc", seed=1).text


def test_the_example_runs(served: Served) -> None:
    """docs/examples/generate.py goes on with a text three times over, and the same seed gives it the same text."""
    example = ROOT / "docs" / "examples" / "generate.py"
    ran = subprocess.run([sys.executable, example, f"localhost:{served.port}", "abc"], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("nats a symbol") == 3
    assert "the same seed, the same text: True" in ran.stdout


# The vocabulary, and the model in training.


@given(st.text("\n .,<>/sabc", max_size=60))
def test_letters_come_back(text: str) -> None:
    """A text of known letters is its ids' text again, whole and id by id; one that spells a mark is read letter by letter."""
    vocabulary = of_letters(["\n .,<>/sabc"])
    ids = vocabulary.encode(text)
    assert len(ids) == len(text)
    assert vocabulary.decode(ids.tolist()) == text
    step = vocabulary.stream()
    assert [step(int(i)) for i in ids] == list(text)


@given(st.text("ab\n", max_size=300), st.integers(10, 100))
def test_stretches_are_the_text(text: str, longest: int) -> None:
    """A text cut in documents is the text, none of them longer than allowed."""
    found = stretches(text, longest)
    assert "".join(found) == text
    assert all(0 < len(s) <= longest for s in found)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=8), rows=st.integers(1, 6), steps=st.integers(1, 12), epoch=st.integers(0, 3)
)
def test_lanes_read_everything_in_order(lengths: list[int], rows: int, steps: int, epoch: int) -> None:
    """In an epoch each lane reads its share of the documents on and on, nothing twice and at most a lane's rest not at all; rows
    are fresh exactly where a document begins; no chunk is longer than asked."""
    starts = np.cumsum([0, *lengths])
    documents = Documents([np.arange(a, b) for a, b in itertools.pairwise(starts)])
    lanes = documents.lanes(rows, steps)
    lanes.set_epoch(epoch)
    seen: list[int] = []
    last = None
    for asked in lanes:
        given_, wanted, fresh = documents[asked]
        assert 1 <= given_.shape[1] <= steps
        assert torch.equal(wanted, given_ + 1)  # never across two documents
        assert fresh.tolist() == [int(g) in starts for g in given_[:, 0]]
        assert not any(int(g) in starts for g in given_[:, 1:].flatten())
        if last is not None:
            assert all(f or int(g) == int(p) for f, g, p in zip(fresh, given_[:, 0], last, strict=True))
        last = wanted[:, -1]
        seen += given_.flatten().tolist()
    assert len(seen) == len(set(seen)) == len(documents) // lanes.rows * lanes.rows


def small(**fields: float) -> charlm.CharacterModel:
    torch.manual_seed(0)
    return charlm.CharacterModel(charlm.Dims(vocabulary=12, embedding=6, hidden=10, **fields))  # type: ignore[arg-type]  # floats all


def test_state_is_carried_across_chunks_and_ends_with_its_document() -> None:
    """The loss over chunks of many documents is that of each document read whole from a state of zero."""
    random = np.random.default_rng(0)
    texts = [random.integers(3, 12, n) for n in (40, 9, 25, 2)]
    documents = Documents(texts)
    model = small().eval()
    training = charlm.CharacterTraining(model, Config("charlm", run=Run()), charlm.Data(), documents, documents)
    total = 0.0
    with torch.no_grad():
        for asked in documents.lanes(1, 7, shuffle=False):
            mean, count = training.scores(documents[asked])["loss"]
            total += float(mean) * count
        whole = 0.0
        for text in texts:
            ids = torch.from_numpy(text)
            logits, _, _ = model(ids[None, :-1], *model.zero(1))
            whole += float(torch.nn.functional.cross_entropy(logits[0], ids[1:], reduction="sum"))
    assert total == pytest.approx(whole, rel=1e-5)


def test_what_is_served_is_what_was_trained() -> None:
    """The module that is exported gives the trained model's logits and states; with dropout of its weights only while training."""
    model = small(recurrent_dropout=0.5, dropout=0.5).eval()
    tokens = torch.randint(12, (3, 9))
    state = tuple(torch.randn(2, 3, 10) for _ in range(2))
    with torch.no_grad():
        for ours, theirs in zip(model(tokens, *state), charlm.parts(model)["step"](tokens, *state), strict=True):
            torch.testing.assert_close(ours, theirs)
        model.train()
        assert not torch.equal(model(tokens, *state)[1], model(tokens, *state)[1])
