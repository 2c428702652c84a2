"""Stories of the queue: commands, `---`, what happened. `pytest --update` writes the second half anew; review its diff."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import DeadlineExceeded, Overloaded
from server.pieces import choose, pieces
from server.rounds import Limits, Round, Rounds
from server.shares import AGE, DEFAULT, Claim
from server.tickets import Ticket
from tests.stories import check, stories

FOLDER = Path(__file__).parent / "stories" / "rounds"


class Named(Ticket):
    """A ticket that a story can speak of."""

    name = ""


class Queue:
    """Rounds, told by a story."""

    def __init__(self) -> None:
        self.rounds: Rounds[Named] = Rounds(Limits())
        self.tickets: dict[str, Named] = {}
        self.ran: list[Round[Named]] = []
        self.now = 0.0

    def tell(self, line: str) -> str:
        command, *words = line.split()
        plain = [w for w in words if "=" not in w]
        named = dict(w.split("=") for w in words if "=" in w)
        result: str = getattr(self, command)(*plain, **named)
        return result

    def limits(self, **named: str) -> str:
        self.rounds = Rounds(Limits(**{k: int(v) for k, v in named.items()}))
        return ""

    def time(self, now: str) -> str:
        self.now = float(now)
        return ""

    def arrive(
        self, name: str, key: str = "step", rows: str = "1", steps: str = "1", cut: str = "yes", shared: str = "yes", deadline: str = "",
        of: str = "", level: str = "3", padded: str = "no",
    ) -> str:  # fmt: skip
        ticket = Named(key, int(rows), int(steps), cut=cut == "yes", shared=shared == "yes", padded=padded == "yes", graph=key)
        ticket.name = name
        try:
            self.rounds.admit(ticket, self.now, Claim(float(deadline) if deadline else None, int(level), of))
        except (Overloaded, DeadlineExceeded) as e:
            return f"{name} refused: {e.message}"
        self.tickets[name] = ticket
        return f"{name} waits"

    def cost(self, key: str, rows: str, each: str) -> str:
        self.rounds.costs.learn(key, int(rows), 1, int(rows) * float(each))
        return f"a step of {key} in {rows} rows: {float(each) * 1e6:g} us a row"

    def next(self) -> str:
        round = self.rounds.next(self.now)
        if round is None:
            return "nothing to run"
        self.ran.append(round)
        return f"round {len(self.ran)}: {round.key} [{' '.join(t.name for t in round.tickets)}] by {round.steps}"

    def done(self, number: str, seconds: str = "0.001") -> str:
        round = self.ran[int(number) - 1]
        self.rounds.done(round, float(seconds))
        told = []
        for t in round.tickets:
            if t.gone:
                told.append(f"{t.name} had left")
            elif t.remaining:
                self.rounds.again(t)
                told.append(f"{t.name} has {t.remaining} to do")
            else:
                self.rounds.leave(t)
                told.append(f"{t.name} is done")
        return ", ".join(told)

    def finish(self, number: str, name: str, key: str, rows: str) -> str:
        self.rounds.done(self.ran[int(number) - 1], 0.001)
        self.rounds.turn(self.tickets[name], key, int(rows), 1, cut=True, shared=True)
        return f"{name} goes on: {key} with {rows} rows"

    def leave(self, name: str) -> str:
        return f"{name} leaves" if self.rounds.leave(self.tickets[name]) else f"{name} had left"

    def expire(self, now: str) -> str:
        return "late: " + (" ".join(t.name for t in self.rounds.expired(float(now))) or "none")

    def wake(self) -> str:
        at = self.rounds.wake_at()
        return "sleeps until called" if at is None else f"wakes at {at:g}"

    def queue(self) -> str:
        r = self.rounds
        return f"{r.tickets} here, rows waiting {r.waiting_rows} running {r.running_rows}, steps to do {r.waiting_steps}"


@pytest.mark.parametrize("story", stories(FOLDER), ids=str)
def test_story(story: object, request: pytest.FixtureRequest) -> None:
    """The queue does what the story tells."""
    check(story, Queue().tell, update=request.config.getoption("--update"))


@given(
    lengths=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 40), st.booleans(), st.sampled_from("xy")), min_size=1, max_size=30),
    chunk=st.integers(1, 9),
    rows=st.integers(3, 16),
    share=st.integers(1, 8),
    workers=st.integers(1, 3),
    order=st.randoms(use_true_random=False),
)
def test_everyone_is_served(
    lengths: list[tuple[int, int, bool, str]], chunk: int, rows: int, share: int, workers: int, order: object
) -> None:
    """Whatever arrives, every ticket advances by exactly its steps, no round exceeds its limits or mixes keys, and the
    counts return to zero."""
    rounds = Rounds(Limits(rows=rows, chunk=chunk, share=share, workers=workers))
    rounds.costs.learn("", 1, 1, 2e-5)
    rounds.costs.learn("", 4, 1, 4e-5)
    # a graph is cut or it is not
    tickets = [Ticket((key, cut), n, steps, cut=cut, padded=not cut and key == "y") for n, steps, cut, key in lengths]
    for t in tickets:
        rounds.admit(t, 0.0)
    advanced = dict.fromkeys(tickets, 0)
    running: list[Round[Named]] = []
    while True:
        while len(running) < workers and (round := rounds.next(0.0)):
            assert round.rows <= max(rows, max(t.rows for t in round.tickets))
            assert {t.key for t in round.tickets} == {round.key}
            if round.tickets[0].padded:
                assert round.steps == max(t.remaining for t in round.tickets)
            else:
                assert all(round.steps <= t.remaining for t in round.tickets)
                assert all(round.steps <= chunk if t.cut else round.steps == t.remaining for t in round.tickets)
            running.append(round)
        if not running:
            break
        round = running.pop(order.randrange(len(running)))  # type: ignore[attr-defined]
        had = {t: t.remaining for t in round.tickets}
        assert rounds.done(round, 0.001) == sum(t.rows * (had[t] - t.remaining) for t in round.tickets)
        for t in round.tickets:
            advanced[t] += had[t] - t.remaining
            if t.remaining:
                rounds.again(t)
            else:
                rounds.leave(t)
    assert [advanced[t] for t in tickets] == [steps for _, steps, _, _ in lengths]
    assert (rounds.tickets, rounds.waiting_rows, rounds.running_rows, rounds.waiting_steps) == (0, 0, 0, 0)


class Flooded:
    """A queue that is served round by round while callers keep it full; a step of a row takes a millisecond."""

    def __init__(self, limits: Limits) -> None:
        self.rounds: Rounds[Named] = Rounds(limits)
        self.rounds.costs.learn("", 1, 1, 0.001)  # as at load
        self.served: Counter[str] = Counter()  # row-steps by caller

    def arrive(self, of: str, steps: int, level: int = DEFAULT) -> Named:
        ticket = Named("step", 1, steps)
        ticket.name = of
        self.rounds.admit(ticket, 0.0, Claim(None, level, of))
        return ticket

    def round(self) -> tuple[Named, ...]:
        round = self.rounds.next(0.0)
        assert round is not None
        self.rounds.done(round, round.rows * round.steps * 0.001)
        for t in round.tickets:
            self.served[t.name] += round.steps
            if t.remaining:
                self.rounds.again(t)
            else:
                self.rounds.leave(t)
        return round.tickets


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40)), min_size=1, max_size=60), st.integers(1, 16))
def test_shares_are_equal(lengths: list[tuple[str, int]], chunk: int) -> None:
    """While several callers have work waiting, none gets more than another by over two chunks, whatever they send. (One row a
    round: who goes along in a wider one is charged for it, and waits the longer.)"""
    queue = Flooded(Limits(rows=1, chunk=chunk, share=1, queue=1000, wait=1e9))
    for of in "abc":
        for _ in range(60):  # always something
            queue.arrive(of, chunk)
    for of, steps in lengths:
        queue.arrive(of, steps)
        queue.round()
        assert max(queue.served.values()) - min(queue.served[of] for of in "abc") <= 2 * chunk


@settings(deadline=None)
@given(
    flood=st.lists(st.integers(1, 64), min_size=1, max_size=8), before=st.integers(1, 200), steps=st.integers(1, 32),
    rows=st.integers(1, 16), callers=st.integers(1, 3),
)  # fmt: skip
def test_a_flood_starves_nobody(flood: list[int], before: int, steps: int, rows: int, callers: int) -> None:
    """However much a few callers have waiting and keep sending, another's first call begins before each of them has had what it
    takes itself, and two rounds."""
    chunk = 8
    queue = Flooded(Limits(rows=rows, chunk=chunk, share=1, queue=10_000, wait=1e9))
    sizes = itertools.cycle(flood)
    for i in range(before + rows * 4):
        queue.arrive(f"flood {i % callers}", next(sizes))
    for _ in range(3):
        queue.round()
    victim = queue.arrive("one", steps)
    had = queue.served.total()
    while victim not in queue.round():
        for i in range(rows):
            queue.arrive(f"flood {i % callers}", next(sizes))
        assert queue.served.total() - had <= callers * min(steps, chunk) + 2 * rows * chunk


@settings(deadline=None)
@given(level=st.integers(2, 5), above=st.integers(1, 4), callers=st.integers(1, 3), steps=st.integers(1, 32))
def test_no_class_starves(level: int, above: int, callers: int, steps: int) -> None:
    """Callers of a higher class that never stop pass a lower one's request by what tells the classes apart, each of them, and by no
    more."""
    above = min(above, level - 1)
    queue = Flooded(Limits(rows=1, chunk=32, share=1, queue=10_000, wait=1e9))
    for i in range(callers * 2):
        queue.arrive(f"high {i % callers}", 32, above)
    queue.round()
    low = queue.arrive("low", steps, level)
    had = queue.served.total()
    most = callers * ((level - above) * AGE / 0.001 + 2 * 32)
    while low not in queue.round():
        for i in range(callers):
            queue.arrive(f"high {i}", 32, above)
        assert queue.served.total() - had <= most


@given(st.lists(st.integers(1, 99), min_size=1, max_size=20), st.integers(1, 40), st.integers(1, 20))
def test_pieces(lengths: list[int], chunk: int, most: int) -> None:
    """Whoever goes along has the steps to do, and the first always goes, by one of its pieces; a lot of equals goes together."""
    line = [Ticket("step", 1, steps) for steps in lengths]
    chosen, steps = choose(line[0], line, most, chunk, lambda rows: 1e-5)
    assert chosen[0] is line[0]
    assert len(chosen) == len(set(chosen)) <= most
    assert steps in pieces(lengths[0], chunk)
    assert all(steps <= t.remaining and steps <= chunk for t in chosen)
    equals = [Ticket("step", 1, lengths[0]) for _ in lengths]
    chosen, steps = choose(equals[0], equals, most, chunk, lambda rows: 1e-5)
    assert (len(chosen), steps) == (min(most, len(equals)), min(chunk, lengths[0]))


def test_a_pause_is_no_overload() -> None:
    """A round that took a minute, since the machine stood still, doesn't have newcomers refused for what the next ones take."""
    queue = Flooded(Limits(rows=2, chunk=32, share=1))
    for _ in range(4):
        queue.arrive("a", 32)
    queue.round()
    round = queue.rounds.next(0.0)
    assert round is not None
    queue.rounds.done(round, 60.0)
    for t in round.tickets:
        queue.rounds.leave(t)
    for _ in range(8):
        queue.arrive("a", 32)
    assert queue.rounds.expected_wait() < 8 * 32 * 0.001 * 1.5
