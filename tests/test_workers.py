"""A thread that attends: it runs what is brief itself, wakes others for the rest, and nobody waits for ever."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from server import shelf
from server.catalog import Catalog, Model
from server.costs import Costs
from server.errors import InvalidInput, ServeError
from server.inputs import Sizes
from server.metrics import Metrics
from server.rounds import Limits
from server.sequence import Outputs, Sequence
from server.shelf import Shelf
from server.store import MemoryStore
from server.turns import Asked, Plan, Turns
from server.workers import Workers
from tests import models


class Attended:
    """A catalog whose rounds of up to `brief` seconds this thread runs; the test says what rounds cost."""

    def __init__(self, root: Path, brief: float, threads: int = 1) -> None:
        models.reader(root / "reader" / "1")
        self.workers = Workers(threads, brief=brief)
        self.catalog = Catalog(self.workers, Limits(workers=threads), Metrics(), 256)
        self.catalog.scan(root)
        self.engine = self.catalog.find("reader").engine
        self.engine.costs.learn("step", 1, 1, 1e-6)
        self.ran_by: list[str] = []
        self.done = threading.Semaphore(0)

    def ask(self, *tokens: int) -> None:
        def then(_: Sequence, outputs: Outputs) -> None:
            self.ran_by.append(threading.current_thread().name)
            self.done.release()

        def failed(error: ServeError) -> None:
            raise error

        self.catalog.find("reader").tensors.start({"tokens": np.array([tokens], np.int64)}, then, failed)


def test_brief_rounds_stay_here(tmp_path: Path) -> None:
    """What this thread brings while it attends runs in this thread, all together, and only when it asks for it."""
    bench = Attended(tmp_path, brief=10.0)
    bench.workers.start()
    bench.workers.attend()
    for _ in range(5):
        bench.ask(1, 2, 3)
    assert not bench.ran_by
    assert bench.workers.brief()
    assert bench.ran_by == [threading.current_thread().name] * 5
    assert not bench.workers.brief()
    bench.workers.stop()


def test_long_rounds_go_to_workers(tmp_path: Path) -> None:
    """Where a round is expected to take longer, this thread declines, and a worker that slept takes it."""
    bench = Attended(tmp_path, brief=1e-9)
    bench.workers.start()
    bench.workers.attend()
    bench.ask(1, 2, 3)
    assert not bench.workers.brief()
    assert bench.done.acquire(timeout=30)
    assert bench.ran_by == ["worker-0"]
    bench.workers.stop()


def test_what_costs_much_in_all_goes_to_workers(tmp_path: Path) -> None:
    """Rounds may be brief: where sequences need many of them, the running is worth another thread."""
    bench = Attended(tmp_path, brief=10.0)
    assert bench.engine.brief(10.0) is False  # nothing waits
    bench.ask(1)
    assert bench.engine.brief(10.0)
    bench.engine.ran(1.0, 1)
    assert not bench.engine.brief(10.0)


def test_nobody_attends(tmp_path: Path) -> None:
    """Once this thread has found nothing to do it may sleep: what others bring then is a worker's, brief or not."""
    bench = Attended(tmp_path, brief=10.0)
    bench.workers.start()
    bench.workers.attend()
    assert not bench.workers.brief()
    thread = threading.Thread(target=bench.ask, args=(1, 2))
    thread.start()
    thread.join()
    assert bench.done.acquire(timeout=30)
    assert bench.ran_by == ["worker-0"]
    bench.workers.stop()


def test_enough(tmp_path: Path) -> None:
    """A full round's rows brought are enough to look up from the wire; running them makes room again."""
    bench = Attended(tmp_path, brief=10.0)
    bench.workers.attend()
    for _ in range(64):
        assert not bench.workers.enough
        bench.ask(1)
    assert bench.workers.enough
    assert bench.workers.brief()
    assert not bench.workers.enough


@pytest.mark.parametrize("culprit", [0, 1, 2])
def test_packed_values_are_checked_in_the_round(tmp_path: Path, culprit: int) -> None:
    """Inputs taken as they came over the wire are looked at when they run: who brought a forbidden value is told which, and its
    neighbours in the round get the bits they get alone."""
    models.reader(tmp_path / "reader" / "1")
    workers = Workers(0)
    catalog = Catalog(workers, Limits(), Metrics(), 256)
    catalog.scan(tmp_path)
    reader = catalog.find("reader")
    told: dict[int, bytes | ServeError] = {}

    def ask(who: int, tokens: list[int]) -> None:
        def then(_: Sequence, outputs: Outputs) -> None:
            told[who] = outputs["scores"].tobytes()

        def failed(error: ServeError) -> None:
            told[who] = error

        engine = reader.engine
        engine.submit(Sequence("step", (np.array(tokens, np.int64).tobytes(),), Sizes(1, len(tokens)), then, failed))

    for who in range(3):
        ask(who, [1, 2, 99 if who == culprit else 3])
    while workers.step():
        pass
    together = dict(told)
    ask(9, [1, 2, 3])
    while workers.step():
        pass
    refused = together.pop(culprit)
    assert isinstance(refused, InvalidInput)
    assert refused.reason == "OUT_OF_RANGE"
    assert set(together.values()) == {told[9]}


def test_costs() -> None:
    """What was measured is expected again; more rows than were ever measured count in full, fewer no more than the fewest known;
    of a graph that never ran nothing is known."""
    costs = Costs()
    assert costs.seconds("step", 4, 1) is None
    costs.learn("step", 4, 2, 0.008)
    assert costs.seconds("step", 4, 1) == pytest.approx(0.004)
    assert costs.seconds("step", 7, 3) == pytest.approx(0.012)
    assert costs.seconds("step", 16, 1) == pytest.approx(0.016)
    assert costs.seconds("step", 1, 1) == pytest.approx(0.004)
    for _ in range(200):
        costs.learn("step", 4, 1, 0.001)
    assert costs.seconds("step", 4, 1) == pytest.approx(0.001, rel=0.01)
    assert [(graph, rows) for graph, rows, _ in costs.table()] == [("step", 7)]


def test_no_reply_overtakes(tmp_path: Path) -> None:
    """A turn that comes while the one before is being told of runs after that was told: however soon a worker is free for it,
    its reply is no earlier."""
    models.reader(tmp_path / "reader" / "1")
    workers = Workers(0)
    catalog = Catalog(workers, Limits(), Metrics(), 256)
    catalog.scan(tmp_path)
    kept = Shelf(catalog, MemoryStore(), shelf.Limits(10, 10, 60.0))
    turns = Turns(kept, workers)
    kept.open("reader", "", "s")
    told: list[int] = []

    def take(number: int) -> None:
        tokens = np.array([number], np.int64).tobytes()

        def brought(model: Model, rest: str) -> Plan:
            return Plan(lambda outputs, ran: b"read", inputs=((tokens,), Sizes(1, 1)))

        def hear(reply: bytes | ServeError) -> None:
            if number == 1:
                take(2)
                while workers.step():  # as another worker might, at once
                    pass
            told.append(number)

        turns.turn("s", number, bytes([number]), Asked(brought, hear), None)

    take(1)
    while workers.step():
        pass
    assert told == [1, 2]


def test_a_run_that_waited_for_others_is_no_longer_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What decides whose rounds are brief is the time that they take of a core: by the time of day, threads in each other's way would
    make every model look long, and be given more threads for it."""
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 60.0  # whoever looks at the clock has waited for a minute
        return now

    monkeypatch.setattr(Workers, "__init__", lambda self, threads, brief: _WORKERS_INIT(self, threads, clock, brief))
    bench = Attended(tmp_path, brief=10.0)
    bench.workers.attend()
    for _ in range(3):
        bench.ask(1)
        assert bench.workers.brief()
    assert bench.engine.each < 1.0
    bench.ask(1)
    assert bench.engine.brief(10.0)


_WORKERS_INIT = Workers.__init__


def test_what_rounds_cost_may_be_learnt_while_it_is_asked_for() -> None:
    """A worker learns a size that is new while another thread is amid what is known: a dict that grew under it would end that thread."""
    costs = Costs()
    costs.learn("main", 1, 1, 0.001)
    known, graphs = costs._seconds["main"], costs._seconds
    for looking in (iter(known), iter(graphs)):
        costs.learn("main", 64, 1, 0.002)
        costs.learn("other", 1, 1, 0.003)
        assert next(looking) in (1, "main")
        assert next(looking, None) is None
    assert costs.a_row("main", 1 << 12) == 0.002 / 64
    assert [(graph, most) for graph, most, _ in costs.table()] == [("main", 1), ("main", 127), ("other", 1)]
