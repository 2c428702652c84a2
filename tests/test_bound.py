"""States that stay on the device: the same answers, bit for bit, as with states on the host, whatever sessions do; and how large
rounds are to be. On a CPU here, through the same banks and bindings as on a GPU; what needs one is marked."""

from __future__ import annotations

import gc
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

import seqserve
from contract import bundle as contract
from contract import tolerance
from contract.bundle import Bundle, Graph, State, Tensor
from protos import seqserve_pb2 as tasks_pb
from protos import sessions_pb2 as pb
from server import banks, gather, libraries, trial
from server.app import App
from server.banks import Held
from server.bound import BoundGraph, unbound
from server.catalog import Catalog, Trials
from server.config import Config
from server.devices import CPU, Device, Placement, parse
from server.graph import Binding, Fixed, Memory, OnnxGraph, missing
from server.inputs import Sizes
from server.loading import Loader
from server.metrics import Metrics
from server.rounds import Limits
from server.sequence import Sequence
from server.states import Rows, settle
from server.trial import Notes, Point, choose
from server.workers import Workers
from tests import models
from tests.lost import Far
from tests.models import FLOAT, _ints, _save, _value, _weights
from tests.process import ROOT
from tests.test_engine import Bench, alone, equal
from tests.test_metrics import values
from tests.test_turns import scores, turn

Array = np.ndarray[Any, Any]


def layers(directory: Path, hidden: int = 5) -> Bundle:
    """x [batch, time, 3] → two LSTM layers whose states are [2, batch, 5], a count [batch, 1] and a sum in float16 [batch, 3] → y: states
    of several forms and dtypes, as models/digits and models/forecaster have them."""
    directory.mkdir(parents=True, exist_ok=True)
    h = hidden
    initial = _weights(8, w0=(1, 4 * h, 3), r0=(1, 4 * h, h), b0=(1, 8 * h), w1=(1, 4 * h, h), r1=(1, 4 * h, h), b1=(1, 8 * h), out=(h, 2))
    initial += _ints(one=[1], step=[1])
    nodes = [
        helper.make_node("Split", ["h"], ["h0", "h1"], axis=0, num_outputs=2),
        helper.make_node("Split", ["c"], ["c0", "c1"], axis=0, num_outputs=2),
        helper.make_node("Transpose", ["x"], ["x0"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["x0", "w0", "r0", "b0", "", "h0", "c0"], ["s0", "h0n", "c0n"], hidden_size=h),
        helper.make_node("Squeeze", ["s0", "one"], ["x1"]),
        helper.make_node("LSTM", ["x1", "w1", "r1", "b1", "", "h1", "c1"], ["s1", "h1n", "c1n"], hidden_size=h),
        helper.make_node("Squeeze", ["s1", "one"], ["x2"]),
        helper.make_node("Transpose", ["x2"], ["x2b"], perm=[1, 0, 2]),
        helper.make_node("MatMul", ["x2b", "out"], ["lin"]),
        helper.make_node("Cast", ["seen"], ["seenf"], to=FLOAT),
        helper.make_node("Unsqueeze", ["seenf", "one"], ["seenu"]),
        helper.make_node("Add", ["lin", "seenu"], ["y"]),
        helper.make_node("Concat", ["h0n", "h1n"], ["h_next"], axis=0),
        helper.make_node("Concat", ["c0n", "c1n"], ["c_next"], axis=0),
        helper.make_node("Add", ["seen", "step"], ["seen_next"]),
        helper.make_node("ReduceSum", ["x", "one"], ["xs"], keepdims=0),
        helper.make_node("Cast", ["xs"], ["xh"], to=onnx.TensorProto.FLOAT16),
        helper.make_node("Add", ["total", "xh"], ["total_next"]),
    ]
    half = onnx.TensorProto.FLOAT16
    inputs = [_value("x", FLOAT, "b", "t", 3), _value("h", FLOAT, 2, "b", h), _value("c", FLOAT, 2, "b", h)]
    inputs += [_value("seen", models.INT64, "b", 1), _value("total", half, "b", 3)]
    outputs = [_value("y", FLOAT, "b", "t", 2), _value("h_next", FLOAT, 2, "b", h), _value("c_next", FLOAT, 2, "b", h)]
    outputs += [_value("seen_next", models.INT64, "b", 1), _value("total_next", half, "b", 3)]
    _save(directory / "step.onnx", nodes, inputs, outputs, initial)
    states = (
        State("h", "h_next", "float32", (2, "batch", h), 0.25), State("c", "c_next", "float32", (2, "batch", h)),
        State("seen", "seen_next", "int64", ("batch", 1)), State("total", "total_next", "float16", ("batch", 3)),
    )  # fmt: skip
    x, y = Tensor("x", "float32", ("batch", "time", 3)), Tensor("y", "float32", ("batch", "time", 2))
    # `seen` counts runs, so that it isn't the same wherever a sequence is cut: rounds here are the same on both sides.
    return contract.save(Bundle(directory.parent.name, {"step": Graph("step.onnx", (x,), (y,), states, cut=False)}, "step"), directory)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    models.library(root)
    layers(root / "layers" / "1")
    return root


def pair(library: Path, name: str, sessions: int = 40, rows: int = 4, **how: Any) -> tuple[BoundGraph, OnnxGraph]:
    bundle = contract.load(library / name / "1")
    file = library / name / "1" / bundle.graph.file
    return BoundGraph(bundle.graph, file, CPU, Placement(banks=True, sessions=sessions, **how), rows), OnnxGraph(bundle.graph, file)


def same(one: Rows, other: Rows) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one.arrays(), other.arrays(), strict=True))


KINDS = [*["advance"] * 6, "open", "open", "fork", "leave", "export", "settle", "pick", "host"]
ACTS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 2**20)), min_size=1, max_size=40)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["reader", "layers"]),
    acts=ACTS,
    sessions=st.sampled_from([0, 6, 60]),
    buckets=st.booleans(),
    captured=st.booleans(),
)
def test_banks_are_slots_of_the_same_states(
    library: Path, name: str, acts: list[tuple[str, int]], sessions: int, buckets: bool, captured: bool
) -> None:
    """Sessions that open, advance in any company, fork, leave, are exported and brought back, settled, picked from, or come from the
    host: answers and states are those of the host's path, bit for bit, with room for all of them or hardly any; and when all have
    left, every slot is free."""
    key = (name, sessions, buckets, captured)
    bound, host = PAIRS.pop(key, None) or pair(library, name, sessions, rows=2, buckets=buckets, captured=captured)
    live_through(bound, host, acts)
    assert only_the_fresh_row(bound)
    PAIRS[key] = bound, host  # loading a model takes longer than all of this; one that failed is not used again


PAIRS: dict[tuple[str, int, bool, bool], tuple[BoundGraph, OnnxGraph]] = {}


def only_the_fresh_row(bound: BoundGraph) -> bool:
    """Whether one row's slots are taken, when all that nobody holds is counted free: at once, no garbage collector is waited for."""
    probe = bound.banks.take(1)
    return probe is not None and bound.banks.slots.taken == 2 * bound.banks.grain


@pytest.fixture(autouse=True)
def aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is bound to a place begins where a GPU's kernels may read 16 bytes at once."""
    for name in ("take", "leave"):
        bind = getattr(Binding, name)

        def bound(self: Binding, port: str, memory: Memory, start: int, shape: Any, bind: Any = bind) -> None:
            assert (memory.address + start * memory.size) % 16 == 0, f"{port} at {start}"
            bind(self, port, memory, start, shape)

        monkeypatch.setattr(Binding, name, bound)


def live_through(bound: BoundGraph, host: OnnxGraph, acts: list[tuple[str, int]]) -> None:
    graph = host.graph
    live: dict[int, tuple[Rows, Rows]] = {}
    count = 0
    for act, seed in acts:
        rng = np.random.default_rng(seed)
        ids = list(live)
        some = [i for i in ids if rng.random() < 0.6]
        if act == "open":
            for _ in range(int(rng.integers(1, 5))):
                count += 1
                live[count] = (bound.fresh(1), host.fresh(1))
        elif act == "advance" and some:
            rng.shuffle(some)
            steps = int(rng.integers(1, 4))
            feeds = {t.name: trial.drawn(t, len(some), steps, rng) for t in graph.inputs}
            found, mine, _ = bound.advance(dict(feeds), [live[i][0] for i in some])
            wanted, theirs, _ = host.advance(dict(feeds), [live[i][1] for i in some])
            assert all(np.array_equal(a, b) and a.shape == b.shape for a, b in zip(found, wanted, strict=True))
            for at, i in enumerate(some):
                live[i] = (Rows(graph.state_axes, mine, at, 1), Rows(graph.state_axes, theirs, at, 1))
        elif act == "fork" and some:
            count += 1
            live[count] = live[some[0]]
        elif act == "leave" and some:
            for i in some:
                del live[i]
        elif act == "export" and some:
            arrays = live[some[0]][0].arrays()
            assert all(np.array_equal(a, b) for a, b in zip(arrays, live[some[0]][1].arrays(), strict=True))
            live[some[0]] = (Rows(graph.state_axes, tuple(a.copy() for a in arrays), 0, 1), live[some[0]][1])
        elif act == "settle" and some:
            for i, rows in zip(some, settle([live[i][0] for i in some]), strict=True):
                live[i] = (rows, live[i][1])
        elif act == "pick" and some:
            chosen = [0, 0, 0]
            mine_rows, their_rows = live[some[0]][0].pick(chosen), live[some[0]][1].pick(chosen)
            assert same(mine_rows, their_rows)
            feeds = {t.name: trial.drawn(t, 3, 1, rng) for t in graph.inputs}
            found, mine, _ = bound.advance(dict(feeds), [mine_rows])
            wanted, theirs, _ = host.advance(dict(feeds), [their_rows])
            assert np.array_equal(found[0], wanted[0])
            picks = (Rows(graph.state_axes, mine, 0, 3), Rows(graph.state_axes, theirs, 0, 3))
            assert same(*picks)
            twice = picks[0].pick([2, 0])
            assert same(Rows(twice.axes, twice.bank, 1, 1).pick([0]), picks[1].pick([0]))
            live[some[0]] = (picks[0].pick([2]).pick([0]), picks[1].pick([2]))
        elif act == "host" and some:
            live[some[0]] = (live[some[0]][1], live[some[0]][1])
    for mine_rows, their_rows in live.values():
        assert same(mine_rows, their_rows)


def test_what_stays_together_is_never_copied(library: Path) -> None:
    """Rows that meet again in the same order go to and fro between two blocks: gathered once, then bound; no byte comes to the host."""
    for name in ("reader", "layers"):
        bound, host = pair(library, name)
        graph = host.graph
        rng = np.random.default_rng(1)
        carried = [bound.fresh(1) for _ in range(5)]
        places = []
        for _ in range(6):
            feeds = {t.name: trial.drawn(t, 5, 1, rng) for t in graph.inputs}
            _, block, _ = bound.advance(feeds, carried)
            places.append(block.place)  # type: ignore[union-attr]
            carried = [Rows(graph.state_axes, block, i, 1) for i in range(5)]
        assert (bound.banks.gathered, bound.banks.bound) == (1, 5)
        assert places[2:4] == places[4:6]
        assert abs(places[4] - places[5]) == bound.banks.slots.each
        assert bound.banks.fetched == bound.banks.brought == 0


def test_a_failed_round_leaves_all_as_it_was(library: Path) -> None:
    """A run that fails takes no slot and changes no state; the next one goes on from it."""
    bound, _ = pair(library, "fragile")
    graph = bound.graph
    _, block, _ = bound.advance({"tokens": np.full((2, 3), 3)}, [bound.fresh(2)])
    rows = Rows(graph.state_axes, block, 0, 2)
    before = rows.arrays()
    taken = bound.banks.slots.taken
    with pytest.raises(Exception, match="indices"):
        bound.advance({"tokens": np.full((2, 3), 10_000)}, [rows])
    assert all(np.array_equal(a, b) for a, b in zip(before, rows.arrays(), strict=True))
    bound.banks.take(1)
    assert bound.banks.slots.taken <= taken + 1


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40)), min_size=1, max_size=12),
    chunk=st.integers(1, 20), rows=st.integers(3, 16), seed=st.integers(0, 99), state_rows=st.sampled_from([0, 500]),
)  # fmt: skip
def test_together_is_alone_with_banks(
    library: Path, lengths: list[tuple[int, int]], chunk: int, rows: int, seed: int, state_rows: int
) -> None:
    """The law of the engine, with states in banks: whatever runs alongside and wherever rounds cut, not one bit differs."""
    bench = Placed(library, Limits(rows=rows, chunk=chunk), Placement(banks=True, sessions=state_rows))
    assert isinstance(bench.catalog.find("reader").engine.graphs["step"], BoundGraph)
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, models.VOCABULARY, size) for size in lengths]
    for i, tokens in enumerate(texts):
        bench.ask("reader", i, tokens=tokens)
    bench.run()
    for i, tokens in enumerate(texts):
        assert equal(bench.answers[i], alone(bench.catalog.find("reader"), tokens=tokens))


class Placed(Bench):
    """The engine's bench with its models on other devices."""

    def __init__(self, library: Path, limits: Limits, placement: Placement, threads: int = 0, trials: Trials | None = None) -> None:
        super().__init__(library, limits, threads)
        self.workers = Workers(threads, lambda: self.now)
        self.catalog = Catalog(self.workers, limits, self.metrics, 256, placement, trials)
        self.catalog.scan(library)


def test_two_devices_share_a_model(library: Path) -> None:
    """Two engines of one catalog entry: newcomers are shared out, a sequence's rounds stay where its state lies, a caller that leaves
    is found, and the model's counts are those of both."""
    twins = Placement((CPU, Device("cpu", 1)), banks=True, sessions=50)
    bench = Placed(library, Limits(rows=4, chunk=3, lanes=1), twins)
    model = bench.catalog.find("reader")
    engine = model.engine
    assert len(engine.engines) == 2
    rng = np.random.default_rng(2)
    texts = [rng.integers(0, models.VOCABULARY, (1, 11)) for _ in range(12)]
    asked = [bench.ask("reader", i, tokens=tokens) for i, tokens in enumerate(texts)]
    assert {e.rounds.tickets for e in engine.engines} == {6}
    engine.cancel(asked[3])
    assert sorted(e.rounds.tickets for e in engine.engines) == [5, 6]
    bench.workers.step()
    moved = next(s for s in asked if s.state is not None)
    assert moved.state is not None
    home = [e for e in engine.engines if e.graphs["step"].keeps(moved.state)]
    assert [moved.engine] == home
    bench.run()
    for i, tokens in enumerate(texts):
        if i != 3:
            assert equal(bench.answers[i], alone(model, tokens=tokens))
    for other in engine.engines:
        state = other.graphs["step"].fresh(1)
        answered: list[Sequence] = []
        goes_on = Sequence("step", {"tokens": texts[0]}, Sizes(1, 11), lambda s, _: answered.append(s), lambda e: None, state)  # noqa: B023
        engine.submit(goes_on)
        assert goes_on.engine is other
        bench.run()
        assert answered == [goes_on]
    assert all(e.graphs["step"].busy > 0 for e in engine.engines)  # type: ignore[attr-defined]
    assert bench.counts("reader") == (0, 0, 0, 0)
    bench.metrics.watch_queue(engine)
    assert values(bench.metrics.registry)["seqserve_sequences_total", "reader", "1", "answered"] == 13


def test_what_is_unloaded_gives_its_slots_back(library: Path) -> None:
    """The banks of an unloaded model go with the last who held it, without a garbage collector, which does not look at what was there when
    a server began to serve: on one device, and on two."""
    for devices in ((CPU,), (CPU, Device("cpu", 1))):
        bench = Placed(library, Limits(), Placement(devices, banks=True))
        gone: list[weakref.ref[Any]] = []
        known = [bench.catalog.find(name) for name in ("reader", "layers")]
        for name in ("reader", "layers"):
            gone += [weakref.ref(e.graphs["step"].banks) for e in bench.catalog.find(name).engine.engines]  # type: ignore[attr-defined]
        bench.ask("reader", "one", tokens=np.ones((1, 5), np.int64))
        bench.run()
        gc.disable()
        try:
            for name in ("reader", "layers"):
                bench.catalog.unload(name)
            assert [ref() for ref in gone] == [None] * len(gone)
            assert all(model.engine.retired for model in known), "who still knows them"
        finally:
            gc.enable()


def test_a_device_apart(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: answers held against the CPU's at load, two rounds of a model under way at most, of which one runs, none of them on the
    thread that brings work; and the answers are those of one run alone."""
    held: list[str] = []
    agree = trial.agree
    monkeypatch.setattr(trial, "agree", lambda onnx, *rest: held.append(onnx.graph.file) or agree(onnx, *rest))
    bench = Placed(library, Limits(rows=8, chunk=5, share=2, workers=3), Placement((Far("cpu", 1),), banks=True), threads=4)
    assert sorted(held) == ["read.onnx", "step.onnx", "step.onnx", "step.onnx"]
    engine = bench.catalog.find("reader").engine
    graph = engine.graphs["step"]
    assert isinstance(graph, BoundGraph)
    at_once, most, under_way = [0], [0], [0]
    advance, run = graph.advance, graph.loaded.run

    def watched(*given: Any) -> Any:
        under_way[0] = max(under_way[0], engine.rounds.under_way)
        assert threading.current_thread() is not threading.main_thread()
        return advance(*given)

    def alone_at_it(*given: Any) -> Any:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        try:
            return run(*given)
        finally:
            at_once[0] -= 1

    monkeypatch.setattr(graph, "advance", watched)
    monkeypatch.setattr(graph.loaded, "run", alone_at_it)
    rng = np.random.default_rng(7)
    texts = [rng.integers(0, models.VOCABULARY, (1, int(n))) for n in rng.integers(1, 60, 120)]
    bench.expected = len(texts)
    bench.workers.start()
    bench.workers.attend()
    for i, tokens in enumerate(texts):
        bench.ask("reader", i, tokens=tokens)
    while bench.workers.brief():
        pass
    assert bench.all_in.wait(60)
    assert bench.workers.drain(10)
    bench.workers.stop()
    for i, tokens in enumerate(texts):
        assert equal(bench.answers[i], alone(bench.catalog.find("reader"), tokens=tokens))
    assert most == [1]
    assert under_way[0] <= 2


def test_lanes_bound_what_is_under_way() -> None:
    """As many rounds as there are lanes run at once; the next is chosen when one is done."""
    from server.rounds import Rounds
    from server.tickets import Ticket

    rounds: Rounds[Ticket] = Rounds(Limits(rows=2, lanes=2))
    for _ in range(6):
        rounds.admit(Ticket("g", 1, 1), 0.0)
    first, second = rounds.next(0.0), rounds.next(0.0)
    assert first is not None
    assert second is not None
    assert rounds.next(0.0) is None
    assert rounds.first() is None
    assert rounds.peek() is None
    rounds.done(first, 0.1)
    assert rounds.first() is not None
    assert rounds.next(0.0) is not None


@pytest.fixture
def app(library: Path) -> Iterator[Callable[..., App]]:
    started: list[App] = []

    def start(**how: Any) -> App:
        made = App(Config(**{"models": library, "port": 0, "metrics_port": -1, "workers": 2, **how}))
        made.start()
        started.append(made)
        return made

    yield start
    for made in started:
        made.stop()


def test_a_block_is_bound_only_where_rows_lie_so(library: Path) -> None:
    """Others' order, a part of a block, or rows of two blocks are gathered where the form of the states asks for it; never wrong."""
    for name, parts_bound in (("reader", 2), ("layers", 0)):
        bound, host = pair(library, name)
        graph = host.graph
        rng = np.random.default_rng(4)
        feeds = {t.name: trial.drawn(t, 4, 1, rng) for t in graph.inputs}
        _, block, _ = bound.advance(dict(feeds), [bound.fresh(4)])
        _, bank, _ = host.advance(dict(feeds), [host.fresh(4)])
        bound.banks.bound = bound.banks.gathered = 0
        for chosen in ([0, 1], [2, 3], [1, 0], [0, 2], [3]):
            feeds = {t.name: trial.drawn(t, len(chosen), 1, rng) for t in graph.inputs}
            found, _, _ = bound.advance(dict(feeds), [Rows(graph.state_axes, block, i, 1) for i in chosen])
            wanted, _, _ = host.advance(dict(feeds), [Rows(graph.state_axes, bank, i, 1) for i in chosen])
            assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert bound.banks.bound == parts_bound + (name == "reader")
        assert bound.banks.gathered == 5 - bound.banks.bound


def test_rows_at_the_banks_end_are_made_up_elsewhere(library: Path) -> None:
    """Where a round is made up to a size, what lies behind its rows is read too: not beyond the end of the banks."""
    bound, host = pair(library, "reader", sessions=0, rows=4, buckets=True)
    graph = host.graph
    count = bound.banks.slots.count
    (last,) = bound.banks.slots.take_last(5)
    assert last == (count - 5, 5)
    bound.banks._move(bound.banks.find([bound.fresh(5)]), count - 5, 5)
    block = Held(bound.banks, count - 5, 5)
    feeds = {t.name: trial.drawn(t, 5, 1, np.random.default_rng(0)) for t in graph.inputs}
    found, _, _ = bound.advance(dict(feeds), [Rows(graph.state_axes, block, i, 1) for i in range(5)])
    wanted, _, _ = host.advance(dict(feeds), [host.fresh(5)])
    assert np.array_equal(found[0], wanted[0])
    assert (bound.banks.bound, bound.banks.gathered) == (0, 1)


def test_banks_are_as_large_as_a_gather_can_count(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No state has more values than CUDA's Gather tells apart, however much room it is given; and what a row's slots are made up to goes
    out of no border."""
    monkeypatch.setattr(banks, "PLACES", 2000)
    bound, _ = pair(library, "layers", sessions=10_000)
    assert 1500 < bound.banks.slots.count * 10 <= 2000
    assert bound.banks.grain == 8, "of three values in float16"
    assert bound.banks.slots.each % 8 == 0
    assert pair(library, "reader")[0].banks.grain == 1, "of eight in float32"


def test_an_idle_row_keeps_no_block(library: Path) -> None:
    """Settled, one row of a large round takes what one row takes; where slots are scarce it goes to the host."""
    bound, host = pair(library, "layers", sessions=30, rows=10)
    graph = host.graph
    feeds = {t.name: trial.drawn(t, 10, 2, np.random.default_rng(0)) for t in graph.inputs}
    _, block, _ = bound.advance(feeds, [bound.fresh(10)])
    rows = [Rows(graph.state_axes, block, i, 1) for i in range(10)]
    before = [r.arrays() for r in rows]
    kept = settle(rows[3:5])
    rows = block = None  # type: ignore[assignment]
    bound.banks.take(1)
    assert bound.banks.slots.taken == (1 + 1 + len(kept)) * bound.banks.grain, "the one just taken, the fresh row, and these"
    assert all(np.array_equal(a, b) for a, b in zip(before[3], kept[0].arrays(), strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(before[4], kept[1].arrays(), strict=True))
    full = [bound.banks.take(1) for _ in range(int(bound.banks.slots.count * 0.9) // bound.banks.grain)]
    _, block, _ = bound.advance(feeds, [bound.fresh(10)])
    crowded = settle([Rows(graph.state_axes, block, 0, 1)])
    assert isinstance(crowded[0].bank, tuple)
    assert len(full) > 0


class Caller:
    """Turns of one model over a real port."""

    def __init__(self, server: App) -> None:
        self._channel = grpc.insecure_channel(f"127.0.0.1:{server.port}")

    def ask(self, name: str, request: Message, answer: type[Message]) -> Any:
        return self._channel.unary_unary(f"/seqserve.v1.Sessions/{name}", type(request).SerializeToString, answer.FromString)(request)

    def turn(self, session: str, number: int, tokens: Array) -> bytes:
        return scores(self.ask("Turn", turn(session, number, tokens), pb.TurnReply))

    @property
    def turns(self) -> Any:
        return self._channel.stream_stream("/seqserve.v1.Sessions/Turns", pb.TurnsRequest.SerializeToString, pb.TurnsReply.FromString)

    def close(self) -> None:
        self._channel.close()


def test_a_session_moves_between_host_and_device(library: Path, app: Callable[..., App], tmp_path: Path) -> None:
    """A session goes on from where it was, host → device → host, by export and import, and through a store that both had in turn; forks
    of it too. Under durability none no state comes from the device but for these."""
    host = app(state="host")
    device = app(state="device", store=f"lmdb:{tmp_path / 'a'}", durability="none")
    callers = [Caller(host), Caller(device)]
    tokens = np.random.default_rng(3).integers(0, models.VOCABULARY, 60)
    pieces = np.split(tokens, [7, 8, 20, 33, 50])
    whole = alone(host.catalog.find("reader"), tokens=tokens[None])["scores"].tobytes()
    callers[0].ask("Open", pb.OpenRequest(session="s", model=tasks_pb.Model(name="reader")), pb.SessionInfo)
    read, at = b"", 0
    for number, piece in enumerate(pieces, 1):
        read += callers[at].turn("s", number, piece)
        moved = callers[at].ask("Export", pb.ExportRequest(session="s", move=True), pb.Exported)
        at = 1 - at
        callers[at].ask("Import", pb.ImportRequest(exported=moved), pb.SessionInfo)
    assert read == whole
    callers[at].ask("Fork", pb.ForkRequest(session="s", fork="t"), pb.SessionInfo)
    assert callers[at].turn("t", 7, tokens[:5]) == callers[at].turn("s", 7, tokens[:5])
    banks = device.catalog.find("reader").engine.graphs["step"].banks  # type: ignore[attr-defined]
    row = banks.row_bytes
    assert (banks.brought, banks.fetched) == (3 * row, 3 * row)
    counted = values(device.metrics.registry)
    assert counted["seqserve_device_state_bytes_total", "reader", "1", "step", "cpu", "from"] == 3 * row
    assert counted["seqserve_device_slots", "reader", "1", "step", "cpu", "taken"] >= 1
    for caller in callers:
        caller.close()


def test_what_a_store_keeps_comes_from_the_device_once_a_round(library: Path, tmp_path: Path) -> None:
    """With durability, a round's states are fetched for its commit and no more often; a server that starts on that store goes on."""
    tokens = np.random.default_rng(5).integers(0, models.VOCABULARY, 24)
    server = App(Config(models=library, port=0, metrics_port=-1, workers=1, store=f"lmdb:{tmp_path / 'b'}", state="device"))
    server.start()
    caller = Caller(server)
    names = ["one", "two", "three", "four", "five"]
    for name in names:
        caller.ask("Open", pb.OpenRequest(session=name, model=tasks_pb.Model(name="reader")), pb.SessionInfo)
    request = pb.TurnsRequest(turns=[turn(name, 1, tokens[:9]) for name in names])
    replies = [reply for message in caller.turns(iter([request])) for reply in message.turns]
    first = {scores(reply) for reply in replies}
    assert len(first) == 1
    banks = server.catalog.find("reader").engine.graphs["step"].banks  # type: ignore[attr-defined]
    assert banks.fetched == len(names) * banks.row_bytes
    caller.close()
    server.stop()
    again = App(Config(models=library, port=0, metrics_port=-1, workers=1, store=f"lmdb:{tmp_path / 'b'}", state="host"))
    again.start()
    caller = Caller(again)
    whole = alone(again.catalog.find("reader"), tokens=tokens[None])["scores"].tobytes()
    assert {first_part + caller.turn(name, 2, tokens[9:]) for name in names for first_part in first} == {whole}
    caller.close()
    again.stop()


@pytest.mark.parametrize("state", ["host", "device"])
def test_an_idle_session_keeps_no_round(library: Path, app: Callable[..., App], state: str) -> None:
    """A session that others' turns have passed by for long has a place of its own; it goes on from there. Until as many turns were applied
    as there are sessions, nobody is idle."""
    server = app(state=state)
    caller = Caller(server)
    tokens = np.random.default_rng(6).integers(0, models.VOCABULARY, 20)
    names = [f"s{n}" for n in range(5)]
    for name in [*names, *(f"more{n}" for n in range(100))]:
        caller.ask("Open", pb.OpenRequest(session=name, model=tasks_pb.Model(name="reader")), pb.SessionInfo)
    first = [scores(r) for m in caller.turns(iter([pb.TurnsRequest(turns=[turn(n, 1, tokens[:9]) for n in names])])) for r in m.turns]

    def rows(name: str) -> Rows:
        live = server.shelf.sessions.live(name)
        assert live is not None
        return live.state.rows  # type: ignore[no-any-return]

    idle = next(name for name in names[1:] if not rows(name).whole)
    for number in range(2, 102):
        caller.turn("s0", number, tokens[:1])
    assert not rows(idle).whole, "100 turns, and 105 sessions"
    for number in range(102, 112):
        caller.turn("s0", number, tokens[:1])
    assert rows(idle).whole
    whole = alone(server.catalog.find("reader"), tokens=tokens[None])["scores"].tobytes()
    assert first[0] + caller.turn(idle, 2, tokens[9:]) == whole
    caller.close()


@pytest.mark.parametrize("state", ["host", "device"])
def test_states_that_are_over_keep_nothing(library: Path, app: Callable[..., App], state: str) -> None:
    """Sessions that advance together leave the banks of the rounds before at once, and closed ones the last. It ends by its timeout where
    they don't."""
    server = app(state=state)
    caller = Caller(server)
    names = [f"s{n}" for n in range(16)]
    for name in names:
        caller.ask("Open", pb.OpenRequest(session=name, model=tasks_pb.Model(name="reader")), pb.SessionInfo)
    seen: list[weakref.ref[Any]] = []  # arrays on the host

    def held() -> int:
        """Rows of states that are kept; of the host's the least that there may be."""
        if state == "host":
            return 16 * len({id(array) for at in seen if (array := at()) is not None})
        return int(values(server.metrics.registry)["seqserve_device_slots", "reader", "1", "step", "cpu", "taken"])

    for number in range(1, 31):
        request = pb.TurnsRequest(turns=[turn(name, number, np.array([number])) for name in names])
        assert sum(len(m.turns) for m in caller.turns(iter([request]))) == 16
        if state == "host":
            lives = [server.shelf.sessions.live(name) for name in names]
            seen += [weakref.ref(session.state.rows.bank[0]) for session in lives if session is not None]
            del lives
        while held() > 2 * 16 + 1:  # the last round's, what it began with, and what fresh sessions begin with
            os.sched_yield()  # whoever ran it lets go a moment after the replies
    for name in names:
        caller.ask("Close", pb.SessionName(session=name), pb.SessionInfo)
    while held() > 1:
        os.sched_yield()
    caller.close()


def test_few_sessions_of_many_turns_grow_old(library: Path, app: Callable[..., App]) -> None:
    """However few the rounds, one that twice as many turns have passed by as there are sessions has a place of its own."""
    server = app(state="device", resident_sessions=4)
    caller = Caller(server)
    names = ["idle", "b", "c", "d"]
    for name in names:
        caller.ask("Open", pb.OpenRequest(session=name, model=tasks_pb.Model(name="reader")), pb.SessionInfo)
    list(caller.turns(iter([pb.TurnsRequest(turns=[turn(n, 1, np.array([7])) for n in names])])))
    for number in range(2, 6):
        list(caller.turns(iter([pb.TurnsRequest(turns=[turn(n, number, np.array([7])) for n in names[1:]])])))
    live = server.shelf.sessions.live("idle")
    assert live is not None
    assert live.state.rows.whole
    caller.close()


def test_every_task_answers_the_same(app: Callable[..., App]) -> None:
    """The shipped models with states in banks, made up to sizes and captured as far as a CPU can be: labels, texts, spans and forecasts are
    those with states on the host, to the last digit; translations pick among hypotheses on the device."""
    host = app(models=ROOT / "models", state="host")
    banks = app(models=ROOT / "models", state="device", row_buckets=True, cuda_graphs=True)
    texts = ["Two dogs run over the snow .", "A man sleeps .", "A girl in a red dress plays the violin on a street ."]

    def ask(server: App) -> Any:
        with seqserve.Client(f"127.0.0.1:{server.port}") as client, ThreadPoolExecutor(4) as pool:
            translated = list(pool.map(lambda text: client.translate(text, beam=4), texts))
            return (
                [(t.text, t.score) for t in translated],
                [(c.label, c.score) for c in client.classify(texts)],
                client.generate("First ", seed=3, max_symbols=30).text,
                [(s.text, s.label) for s in client.tag("Anna lives in Paris.").spans],
                np.asarray(client.forecast(np.ones((96, 7), np.float32), horizon=30).mean).tobytes(),
            )

    assert ask(banks) == ask(host)
    step = banks.catalog.find("translator").engine.graphs["step"]
    assert isinstance(step, BoundGraph)
    assert step.banks.gathered > 0
    assert step.banks.fetched == 0
    translator, sentiment = (banks.catalog.find(name).engine.graphs for name in ("translator", "sentiment"))
    assert not translator["step"].loaded.captured, "the source's length is another for each"
    assert not translator["encode"].loaded.captured, "it has no states, and may run several times at once"
    assert next(iter(sentiment.values())).loaded.captured


def test_a_device_that_is_not_there(library: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`--device cuda` refuses to start on a machine without one, and says what to do; `auto` warns and runs on the CPU."""
    if missing(Device("cuda")) is None:
        pytest.skip("there is a GPU")
    with pytest.raises(
        ValueError, match=r"--device cuda:0: (this onnxruntime has no CUDA|onnxruntime can't use it).*--device auto runs on the CPU"
    ):
        App(Config(models=library, device="cuda"))
    assert "libcuda.so.1" in libraries.lacking(Path(ort.__file__).parent)
    with caplog.at_level(logging.WARNING):
        made = App(Config(models=library, port=0, metrics_port=-1, device="auto"))
    assert "no GPU, so rounds run on the CPU" in caplog.text
    made.store.close()


def test_devices_are_named() -> None:
    assert parse("cpu") == (CPU,)
    assert parse("cuda") == (Device("cuda", 0),)
    assert parse("cuda:0,cuda:3") == (Device("cuda", 0), Device("cuda", 3))
    assert parse("auto") == ()
    for wrong in ("gpu", "cuda:x", "cuda:0,cuda", "cpu,cuda", "cpu:1", ""):
        with pytest.raises(ValueError, match="--device"):
            parse(wrong)
        with pytest.raises(ValueError, match="--device"):
            Config(device=wrong)


def test_the_tiny_model_is_onnx() -> None:
    """What is written by hand is a model by onnx's own checker, for every dtype that a state may have, and picks what it should."""
    arrays = [(name, i % 2) for i, name in enumerate(contract.DTYPES)]
    made = onnx.load_from_string(gather.model(arrays))
    onnx.checker.check_model(made, full_check=True)
    session = ort.InferenceSession(gather.model(arrays), providers=["CPUExecutionProvider"])
    data = {f"data{i}": np.arange(6).reshape(3, 2).astype(name) for i, (name, _) in enumerate(arrays)}
    picked = session.run(None, {**data, "at0": np.array([2, 0]), "at1": np.array([1, 1])})
    for i, (name, group) in enumerate(arrays):
        assert picked[i].dtype == np.dtype(name)
        assert np.array_equal(picked[i], data[f"data{i}"][[1, 1] if group else [2, 0]])


def test_what_can_not_be_bound(library: Path) -> None:
    """Texts can't be bound to a place, and a graph without states has nothing to keep: they run as before, beside those that can."""
    text = Graph(
        "f", (Tensor("t", "string", ("batch", 1)),), (Tensor("y", "float32", ("batch", 1)),), (State("s", "n", "float32", ("batch", 1)),)
    )
    assert "is text" in str(unbound(text))
    bench = Placed(library, Limits(), Placement(banks=True))
    assert not isinstance(bench.catalog.find("both_ways").engine.graphs["read"], BoundGraph)
    assert isinstance(bench.catalog.find("layers").engine.graphs["step"], BoundGraph)


def test_sizes_are_chosen_by_what_was_measured() -> None:
    """The fewest rows that come near the best rate, within what may be waited for; then the fewest steps."""
    flat = [Point(r, 1, 0.001 + r * 1e-6) for r in (1, 4, 16, 64, 256, 1024, 4096)]  # a device: a round costs about the same
    assert choose(flat) == trial.Sizes(4096, 1, 256)
    linear = [Point(r, 1, 50e-6 + r * 60e-6) for r in (1, 4, 16, 64, 256, 1024)]  # a CPU: a row costs the same from some on
    assert choose(linear) == trial.Sizes(16, 1, 1)
    longer = [*linear, *(Point(16, s, 50e-6 + 16 * s * 20e-6) for s in (8, 32, 128))]
    assert choose(longer) == trial.Sizes(16, 8, 1)
    slow = [Point(1, 1, 0.2), Point(4, 1, 0.7)]
    assert choose(slow) == trial.Sizes(1, 1, 1), "nothing is bearable, so the shortest"


def test_measured_at_load(library: Path, tmp_path: Path) -> None:
    """Sizes not given are measured, within bounds, by the same rounds that serve; told in the log and the metrics; noted, so that the next
    load measures nothing; a damaged note costs a measuring."""
    notes = tmp_path / "measured.json"
    trials = Trials(None, None, 0.05, notes)
    for placement in (Placement(), Placement(banks=True)):
        bench = Placed(library, Limits(), placement, trials=trials)
        engine = bench.catalog.find("reader").engine
        assert engine.rounds.limits.rows in trial.ROWS
        assert engine.rounds.limits.chunk in trial.STEPS
        assert {(p.rows, p.steps) for p in engine.measured} >= {(1, 1)}
        bench.metrics.watch_queue(engine)
        counted = values(bench.metrics.registry)
        assert counted["seqserve_round_limit", "reader", "1", "rows"] == engine.rounds.limits.rows
        assert counted["seqserve_round_cost_seconds", "reader", "1", "1", "1"] > 0
        noted = Placed(library, Limits(), placement, trials=trials).catalog.find("reader").engine
        assert noted.measured == engine.measured
    assert bench.catalog.find("fragile").engine.graphs["step"].graph.shared
    notes.write_text("{ half")
    assert Notes(notes).get("x") is None
    assert Placed(library, Limits(), Placement(), trials=trials).catalog.find("reader").engine.measured
    rows, given = Trials(7, None, 0.05), Placed(library, Limits(), Placement(), trials=Trials(7, None, 0.05))
    assert given.catalog.find("reader").engine.rounds.limits.rows == rows.rows


def test_what_does_not_fit_is_not_measured(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds too large for a device's memory end the measuring, not the load; where none can be run the bundle is refused, with why."""
    _, host = pair(library, "reader")
    advance, most = OnnxGraph.advance, [20]

    def full(self: OnnxGraph, feeds: dict[str, Array], carried: Any) -> Any:
        if len(feeds["tokens"]) > most[0]:
            raise MemoryError("Failed to allocate memory")
        return advance(self, feeds, carried)

    monkeypatch.setattr(OnnxGraph, "advance", full)
    points = trial.measure(host, 5, clock=lambda: 0.0)
    assert {p.rows for p in points} == {1, 4, 16}
    assert {p.steps for p in points} == set(trial.STEPS)
    assert choose(points).rows <= 16
    most[0] = 0
    loader = Loader(Placement(), Trials(None, None), Limits())
    bundle = contract.load(library / "reader" / "1")
    monkeypatch.setattr(trial, "first_run", lambda onnx: ([], []))
    with pytest.raises(contract.BundleError, match="could not be measured: Failed to allocate memory"):
        loader.load(bundle, library / "reader" / "1", CPU)


def test_a_bundle_is_held_to_what_it_states(library: Path) -> None:
    """A device whose answers are off by more than the bundle states is refused, and one within it isn't; float16's own tolerance counts."""
    bound, host = pair(library, "reader")
    stated = tolerance.allowed(contract.load(library / "reader" / "1").verified, "step")
    assert trial.agree(bound, host, stated) == []
    exact = bound.advance

    def off(feeds: dict[str, Array], carried: Any) -> Any:
        outputs, bank, seconds = exact(feeds, carried)
        return [o * np.float32(1.001) for o in outputs], bank, seconds

    bound.advance = off  # type: ignore[method-assign]
    assert "times what the bundle states" in trial.agree(bound, host, stated)[0]
    assert trial.agree(bound, host, {"relative_norm": 0.01}) == []
    half = {"step": {"allowed": {"relative_norm": 0.01}}}
    assert tolerance.allowed(half, "step") == {"relative_norm": 0.01}
    assert tolerance.allowed(half, "other") == tolerance.allowed({}, "step") == {"absolute": 2e-5, "relative": 1e-4}
    assert tolerance.allowed({"step": {"allowed": {"absolute": "much"}}}, "step") == tolerance.allowed({}, "step")
    ones = np.ones(4, np.float32)
    assert tolerance.excess(ones * np.nan, ones, stated) == float("inf")
    assert tolerance.excess(np.arange(4), np.ones(4, np.int64), stated) == 0


def test_captured_rounds_are_held_against_others(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of one step between the same two blocks are captured; where what they give differs, or one fails, none is any more."""
    bound, _ = pair(library, "reader", captured=True)
    assert bound.check_captured(trial.drawing(bound.graph)) is None
    assert sum(c is not None for c in bound._captured.values()) == 2, "to and fro"
    monkeypatch.setattr(bound.loaded, "replay", lambda binding, number: None)
    assert "came to something else" in str(bound.check_captured(trial.drawing(bound.graph)))
    assert not bound._captures
    recorded, _ = pair(library, "reader", captured=True)
    write, written = Fixed.write, []

    def once(fixed: Fixed, array: Array) -> None:
        if fixed not in written:
            written.append(fixed)
            write(fixed, array)

    with monkeypatch.context() as patch:  # as an input is that a node takes on the CPU: its value is part of the recording
        patch.setattr(Fixed, "write", once)
        assert "came to something else" in str(recorded.check_captured(trial.drawing(recorded.graph)))
    other, _ = pair(library, "layers", captured=True)
    monkeypatch.setattr(other.loaded, "replay", lambda binding, number: 1 / 0)
    assert "division" in str(other.check_captured(trial.drawing(other.graph)))
    assert other.check_captured(trial.drawing(other.graph)) is None


GPU = pytest.mark.gpu


@GPU
@pytest.mark.skipif(missing(Device("cuda")) is not None, reason="needs a GPU and onnxruntime-gpu")
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("name", ["reader", "layers"])
def test_a_gpu_answers_as_the_cpu(library: Path, name: str, captured: bool) -> None:
    """Within what the bundle states; sessions that advance together on the device bring no byte of state to the host."""
    bundle = contract.load(library / name / "1")
    file = library / name / "1" / bundle.graph.file
    cuda = Device("cuda")
    bound = BoundGraph(bundle.graph, file, cuda, Placement((cuda,), True, captured=captured), 64)
    assert trial.first_run(bound)[0] == []
    assert trial.agree(bound, OnnxGraph(bundle.graph, file), tolerance.allowed(bundle.verified, "step")) == []
    bound.check_captured(trial.drawing(bound.graph))
    fetched = bound.banks.fetched
    rng = np.random.default_rng(0)
    carried = [bound.fresh(1) for _ in range(32)]
    for _ in range(20):
        _, block, _ = bound.advance({t.name: trial.drawn(t, 32, 1, rng) for t in bundle.graph.inputs}, carried)
        carried = [Rows(bundle.graph.state_axes, block, i, 1) for i in range(32)]
    assert bound.banks.fetched == fetched


@GPU
@pytest.mark.skipif(missing(Device("cuda")) is not None, reason="needs a GPU and onnxruntime-gpu")
def test_shipped_models_on_a_gpu() -> None:
    """Every bundle under models/ loads on the device, within what it states."""
    cuda = Device("cuda")
    workers = Workers(0)
    catalog = Catalog(workers, Limits(), Metrics(), 256, Placement((cuda,), True), Trials())
    catalog.scan(ROOT / "models")
    assert catalog.refused == {}
