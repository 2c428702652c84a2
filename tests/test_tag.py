"""The Tag task over a real port, with a tagger trained on made-up posts: train → export → serve → client and command."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

import seqserve
from contract import bundle as contract
from contract.chain import Chain, labelled
from contract.words import Words
from export import __main__ as export
from protos import seqserve_pb2 as pb
from seqserve import cli, results, show
from server.catalog import Catalog
from server.graph import OnnxGraph
from server.metrics import Metrics
from server.rounds import Limits
from server.workers import Workers
from tests.process import ROOT, Served, reason, serve
from training import __main__ as train
from training import tagger
from training.data import wnut17

TAG = "/seqserve.v1.Tasks/Tag"
POSTS = tagger.toy(99)[:120]
TEXTS = [" ".join(p.words) for p in POSTS]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of bundles with the toy tagger in it."""
    made = tmp_path_factory.mktemp("tagger")
    assert train.main(["tagger", "--config", "toy", "--out", str(made / "run"), "--no-progress", "--set", "run.epochs=3"]) == 0
    assert export.main([str(made / "run"), "--out", str(made / "models" / "tagger" / "1")]) == 0
    return made / "models"


@pytest.fixture(scope="module", params=["direct", "public"])
def served(request: pytest.FixtureRequest, models: Path) -> Iterator[Served]:
    with serve(models, "--front", request.param) as server:
        yield server


class ByHand:
    """The bundle, run without a server, one text at a time: the slow reference."""

    def __init__(self, models: Path) -> None:
        directory = models / "tagger" / "1"
        self.bundle = contract.load(directory)
        self.words = Words.load(directory / "words.json", self.bundle.task["buckets"])
        self.chain = Chain.load(directory / "chain.json")
        self.graph = OnnxGraph(self.bundle.graph, directory / self.bundle.graph.file)

    def spans(self, words: tuple[str, ...]) -> list[tuple[int, int, str, float]]:
        feeds = {"words": self.words.ids(words)[None], "features": self.words.features(words)[None]}
        (emissions,) = self.graph.run({**feeds, "lengths": np.array([len(words)], np.int32)})
        return [(s.start, s.end, s.label, float(np.float32(s.score))) for s in self.chain.spans(emissions[0])]


def given_back(reply: pb.TagReply) -> list[list[tuple[int, int, str, float]]]:
    return [[(s.first_word, s.end_word, s.label, s.score) for s in r.spans] for r in reply.results]


def test_it_has_learnt_and_is_proved(models: Path) -> None:
    """The toy task is solved from the words alone, and the export found batched = alone bit for bit."""
    by_hand = ByHand(models)
    found = [[span[:3] for span in by_hand.spans(p.words)] for p in POSTS]
    assert wnut17.entity_score([labelled(p.tags) for p in POSTS], found).f1 > 0.95
    assert by_hand.bundle.verified["read"]["batched_is_alone"]
    assert by_hand.bundle.graph.shared
    assert by_hand.bundle.verified["read"]["padded_is_alone"], "the exporter tells it where its rows end"
    assert by_hand.bundle.graph.padded


def test_together_is_alone(served: Served, models: Path) -> None:
    """Texts of all lengths in many calls at once get exactly the spans, and the bits of the scores, of each run by hand."""
    by_hand = ByHand(models)
    ask = served.method(TAG, pb.TagReply)
    inputs = [pb.TagInput(text=t) if i % 2 else pb.TagInput(words=p.words) for i, (p, t) in enumerate(zip(POSTS, TEXTS, strict=True))]
    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda part: ask(pb.TagRequest(inputs=inputs[part::6])), range(6)))
    for part, reply in enumerate(replies):
        assert given_back(reply) == [by_hand.spans(p.words) for p in POSTS[part::6]]
        assert [r.words for r in reply.results] == [len(p.words) for p in POSTS[part::6]]
        assert reply.timing.rounds >= 1


def test_served_is_offline(served: Served, models: Path) -> None:
    """The task in this process, through catalog and engine, answers as the server does."""
    workers = Workers(1)
    catalog = Catalog(workers, Limits(workers=1), Metrics(), 256)
    catalog.scan(models)
    task: Any = catalog.find("tagger").task
    futures: list[Future[Any]] = [Future() for _ in TEXTS[:20]]
    workers.start()
    try:
        for text, future in zip(TEXTS, futures, strict=False):
            task.start(text, lambda _, tagged, future=future: future.set_result(tagged), future.set_exception)
        found = [future.result(60) for future in futures]
    finally:
        workers.stop()
    reply = served.method(TAG, pb.TagReply)(pb.TagRequest(inputs=[pb.TagInput(text=t) for t in TEXTS[:20]]))
    told = [[(s.label, s.text, s.start, s.end, s.first_word, s.end_word, s.score) for s in r.spans] for r in reply.results]
    assert told == [[(s.label, s.text, s.start, s.end, s.first, s.last, float(np.float32(s.score))) for s in t.spans] for t in found]


def test_offsets_are_of_the_text(served: Served) -> None:
    """Start and end cut the span out of what was sent, in characters, past wide ones and odd spaces too."""
    text = "  😀 é and we met Tomas  Rileas today it rained in\tOlinet ."
    (result,) = served.method(TAG, pb.TagReply)(pb.TagRequest(inputs=[pb.TagInput(text=text)])).results
    # What the toy makes of the emoji, of which it has seen none, does not matter here.
    assert [(s.label, s.text) for s in result.spans][-2:] == [("person", "Tomas  Rileas"), ("location", "Olinet")]
    assert all(text[s.start : s.end] == s.text and 0 < s.score <= 1 for s in result.spans)


def one(**fields: Any) -> pb.TagRequest:
    return pb.TagRequest(inputs=[pb.TagInput(**fields)])


BAD: dict[str, tuple[Any, str, str]] = {
    "nothing": (pb.TagRequest(), "BAD_COUNT", "allowed are 1 to 256"),
    "too many": (pb.TagRequest(inputs=[pb.TagInput(text="a")] * 257), "BAD_COUNT", "257 texts"),
    "no words": (one(text=" \n"), "EMPTY_TEXT", "send at least one"),
    "neither": (one(), "EMPTY_TEXT", "send at least one"),
    "both": (one(text="a b", words=["a", "b"]), "TEXT_AND_WORDS", "inputs[0] has a text and words"),
    "an empty word": (one(words=["a", " "]), "EMPTY_WORD", "words[1] is empty"),
    "too long": (one(text="so " * 1001), "TOO_LONG", "1001 words; at most 1000"),
    "too many words": (one(words=["a"] * 1001), "TOO_LONG", "1001 words; at most 1000"),
    "too many letters": (one(words=["a" * 100_001]), "TOO_LONG", "at most 100000"),
    "too many letters in all": (pb.TagRequest(inputs=[pb.TagInput(text="a" * 90_000)] * 6), "TOO_LONG", "540000 letters in all"),
    "not UTF-8": (b"\x12\x04\x0a\x02\xc3\x28", "NOT_PROTOBUF", "must be UTF-8"),
    "another version": (pb.TagRequest(model=pb.Model(name="tagger", version="7")), "UNKNOWN_VERSION", "it has: 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(served: Served, case: str) -> None:
    """Each fault gets its typed error, and a good call made at the same time is answered as ever."""
    request, why, says = BAD[case]
    ask = served.method(TAG, pb.TagReply)
    neighbour = ask.future(one(text="we met Tomas ."))
    with pytest.raises(grpc.RpcError) as caught:
        ask(request)
    code, found, _, _ = reason(caught.value)
    assert (code.name, found) == ("NOT_FOUND" if why == "UNKNOWN_VERSION" else "INVALID_ARGUMENT", why)
    assert says in caught.value.details()
    assert [s.text for s in neighbour.result().results[0].spans] == ["Tomas"]


def test_wrong_task(served: Served) -> None:
    """A tagger asked to classify says what it can."""
    with pytest.raises(grpc.RpcError) as caught:
        served.method("/seqserve.v1.Tasks/Classify")(pb.ClassifyRequest(texts=["a"], model=pb.Model(name="tagger")))
    assert reason(caught.value)[1] == "WRONG_TASK"
    assert "can tag, not classify" in caught.value.details()


def test_clients(served: Served) -> None:
    """The blocking client and its asyncio twin give a result for a text and a list for a list, of texts or of words."""
    target = f"localhost:{served.port}"

    async def twin() -> Any:
        async with seqserve.AsyncClient(target) as client:
            return await client.tag(TEXTS[0]), await client.tag(TEXTS[:3])

    with seqserve.Client(target) as client:
        found = client.tag("we met Tomas .")
        assert (found.spans[0].label, found.spans[0].text, found.words, found.model) == ("person", "Tomas", 4, "tagger")
        assert repr(found).startswith("<Tagging <Span person 'Tomas'")
        assert client.tag([["we", "met", "Tomas", "."]]) == [found]
        assert (client.tag(TEXTS[0]), client.tag(TEXTS[:3])) == asyncio.run(twin())
        facts = {m.kind: m.facts for m in client.models()}
        assert facts["tag"]["labels"].split(",") == list(wnut17.TYPES)
        with pytest.raises(seqserve.InvalidInput, match="send at least one"):
            client.tag("")


def test_command(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """`seqserve tag` marks spans in brackets, in colour on request, and gives offsets as JSON."""
    at = ["--server", f"localhost:{served.port}"]
    assert cli.main(["tag", "we met Tomas Rileas .", "they left .", *at]) == 0
    assert re.fullmatch(r"we met \[Tomas Rileas\]\(person \d+%\) \.\nthey left \.\n", capsys.readouterr().out)
    assert cli.main(["tag", "--color", "always", "it rained in Olinet .", *at]) == 0
    assert re.fullmatch(r"it rained in \x1b\[1;32mOlinet\x1b\[0m\x1b\[2;32m location \d+%\x1b\[0m \.\n", capsys.readouterr().out)
    assert cli.main(["tag", "--json", "--words", "it  rained in Olinet", *at]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == "it rained in Olinet"
    assert [(s["label"], s["text"], s["start"], s["end"]) for s in found["spans"]] == [("location", "Olinet", 13, 19)]
    assert cli.main(["tag", " ", *at]) == 2


def test_example(served: Served) -> None:
    """docs/examples/names.py gathers the names of the posts it is given, from texts and from words."""
    posts = "we met Tomas Rileas .\nit rained in Olinet .\nwe met Tomas Rileas today\n"
    ran = subprocess.run(
        [sys.executable, ROOT / "docs" / "examples" / "names.py", f"localhost:{served.port}"],
        input=posts, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    lines = ran.stdout.splitlines()
    assert lines[0] == "3 posts, 2 names"
    assert [line.split(maxsplit=2) for line in lines[1:3]] == [["person", "2", "Tomas Rileas"], ["location", "1", "Olinet"]]
    assert lines[3] == "of split words: [('person', 2, 4)]"


def test_any_label_is_shown() -> None:
    """A label that no colour was chosen for gets one of its own, always the same."""
    span = results.Span("ship", "Ark", 0, 3, 0, 1, 0.5)
    tagging = results.Tagging((span,), "Ark sails", 2, "m", "1", results.Timing())
    assert re.fullmatch(r"\x1b\[1;3[1-6]mArk\x1b\[0m\x1b\[2;3[1-6]m ship 50%\x1b\[0m sails", show.tagging(tagging, True))


def test_a_damaged_bundle_is_refused(models: Path, tmp_path: Path) -> None:
    """A chain of other labels than the graph's, or none at all, is told when the model is loaded."""
    source = models / "tagger" / "1"
    directory = tmp_path / "tagger" / "1"
    directory.mkdir(parents=True)
    for file in source.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    chain = Chain.load(source / "chain.json")
    for broken in ("{}", None):
        if broken is None:
            Chain(chain.labels[:3], chain.after[:3, :3], chain.first[:3], chain.last[:3]).save(directory / "chain.json")
        else:
            (directory / "chain.json").write_text(broken)
        contract.save(contract.load(source), directory)
        catalog = Catalog(Workers(1), Limits(workers=1), Metrics(), 256)
        catalog.scan(tmp_path)
        assert "task 'tag' can't be set up" in catalog.refused["tagger/1"][0]
