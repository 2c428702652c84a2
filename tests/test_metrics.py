"""The table of metrics: in the docs as it is in the code, and counting what it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

import seqserve
from protos import sessions_pb2 as pb
from server.app import App
from server.catalog import Catalog
from server.config import Config
from server.metrics import TABLE, Metrics
from server.rounds import Limits
from server.workers import Workers
from tests.process import ROOT

PAGE = ROOT / "docs" / "metrics.md"
FROM, TO = "<!-- from server/metrics.py -->\n", "<!-- to here -->\n"


def table() -> str:
    """The table as Markdown."""
    lines = ["| metric | kind | labels | meaning |", "|---|---|---|---|"]
    for m in TABLE:
        labels = ", ".join(m.labels) or "–"
        lines.append(f"| `{m.name}` | {m.kind.__name__.lower()} | {labels} | {m.meaning} |")
    return "\n".join(lines) + "\n"


def test_page(request: pytest.FixtureRequest) -> None:
    """docs/metrics.md has the table of server/metrics.py; `pytest --update` writes it anew."""
    text = PAGE.read_text()
    before, _, rest = text.partition(FROM)
    _, _, after = rest.partition(TO)
    wanted = before + FROM + table() + TO + after
    if request.config.getoption("--update"):
        PAGE.write_text(wanted)
    assert text == wanted


def named(text: str) -> set[str]:
    """Names of metrics that a text uses, without what Prometheus adds to a histogram's."""
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in re.findall(r"\bseqserve_[a-z_]+\b", text)}


def test_queries_name_metrics() -> None:
    """Every metric that the docs and the deployment's dashboards and alerts ask for exists."""
    known = {m.name for m in TABLE}
    asking = [PAGE, *(p for p in (ROOT / "deploy").rglob("*") if p.suffix in (".json", ".yml", ".yaml", ".rules") and p.is_file())]
    for file in asking:
        queries = "\n".join(line for line in file.read_text().splitlines() if re.search(r"rate|sum|expr|seqserve_\w+[{\[]", line))
        assert named(queries) <= known, file


@pytest.fixture
def app(tmp_path: Path) -> Iterator[App]:
    # One session in memory, so that others are in the store.
    app = App(Config(models=ROOT / "models", port=0, metrics_port=-1, workers=1, resident_sessions=1, store=f"lmdb:{tmp_path}"))
    app.start()
    yield app
    app.stop()


def values(registry: CollectorRegistry) -> dict[tuple[str, ...], float]:
    """Every sample: name and labels' values → value."""
    return {(s.name, *s.labels.values()): s.value for family in registry.collect() for s in family.samples}


def test_counts_what_was_done(app: App) -> None:
    """Known calls and turns are counted as often as they were made: by task, model, session, place, and why they were refused."""
    with seqserve.Client(f"127.0.0.1:{app.port}") as client:
        client.classify(["A good film.", "A bad film."])
        with client.session("sentiment", id="again"), grpc.insecure_channel(f"127.0.0.1:{app.port}") as channel:
            turn = pb.TurnRequest(session="again", turn=1, text="One. ").SerializeToString()
            answers = {channel.unary_unary("/seqserve.v1.Sessions/Turn")(turn) for _ in range(3)}
            assert len(answers) == 1
        with client.session("sentiment", id="first", close=False) as first:
            first.send("A slow start, ")
            first.send("but superb. ")
            with first.fork("second") as second:
                second.send("And so on.")
            first.send("The end.")
        with pytest.raises(seqserve.NotFound):
            client.classify("x", model="nothing")
        counted = values(app.metrics.registry)
    assert counted["seqserve_task_seconds_count", "classify", "sentiment", "1"] == 2 + 5
    assert counted["seqserve_sequences_total", "sentiment", "1", "answered"] == 2 + 5
    assert counted["seqserve_busy_seconds_total", "sentiment", "1"] == counted["seqserve_round_seconds_sum", "sentiment", "1"] > 0
    assert counted["seqserve_turns_total", "applied"] == 5
    assert counted["seqserve_turns_total", "replayed"] == 2
    assert counted["seqserve_sessions_begun_total", "opened"] == 2
    assert counted["seqserve_sessions_begun_total", "forked"] == 1
    assert counted["seqserve_sessions_begun_total", "resumed"] == 1  # the fork had sent it to the store
    assert counted["seqserve_sessions_ended_total", "closed"] == 2
    assert counted["seqserve_sessions", "memory"] + counted["seqserve_sessions", "store"] == 1
    assert counted["seqserve_refusals_total", "UNKNOWN_MODEL"] == 1
    assert counted["seqserve_workers",] == 1
    assert counted["seqserve_queue_age_seconds", "sentiment", "1"] == 0
    graph = app.catalog.find("sentiment", "").bundle.graph
    row = sum(np.prod(s.fresh(1).shape) * s.fresh(1).itemsize for s in graph.states)
    assert counted["seqserve_state_bytes", "sentiment", "1"] == row


def test_whoever_waits_longest() -> None:
    """The age of the queue is that of who waits longest for a round, by the clock; nobody waits, it is 0."""
    now = 100.0
    workers = Workers(0, lambda: now)
    catalog = Catalog(workers, Limits(), Metrics(), 256)
    catalog.scan(ROOT / "models")
    model = catalog.find("sentiment")
    assert model.engine.waited() == (0.0, 0.0)
    tokens = {"tokens": np.ones((1, 40), np.int64)}
    now = 101.0
    model.tensors.start(tokens, lambda *_: None, lambda _: None)
    now = 103.0
    model.tensors.start(tokens, lambda *_: None, lambda _: None)
    now = 104.0
    assert model.engine.waited()[0] == 3.0
    while workers.step():
        pass
    assert model.engine.waited() == (0.0, 0.0)
