"""Stories of the queue: commands, `---`, what happened. `pytest --update` writes the second half anew; review its diff."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import DeadlineExceeded, Overloaded
from server.rounds import Limits, Round, Rounds
from server.shares import Claim
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
        of: str = "", level: str = "3",
    ) -> str:  # fmt: skip
        ticket = Named(key, int(rows), int(steps), cut=cut == "yes", shared=shared == "yes")
        ticket.name = name
        try:
            self.rounds.admit(ticket, self.now, Claim(float(deadline) if deadline else None, int(level), of))
        except (Overloaded, DeadlineExceeded) as e:
            return f"{name} refused: {e.message}"
        self.tickets[name] = ticket
        return f"{name} waits"

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
    tickets = [Ticket((key, cut), n, steps, cut=cut) for n, steps, cut, key in lengths]  # a graph is cut or it is not
    for t in tickets:
        rounds.admit(t, 0.0)
    advanced = dict.fromkeys(tickets, 0)
    running: list[Round[Named]] = []
    while True:
        while len(running) < workers and (round := rounds.next(0.0)):
            assert round.rows <= max(rows, max(t.rows for t in round.tickets))
            assert {t.key for t in round.tickets} == {round.key}
            assert all(round.steps <= t.remaining for t in round.tickets)
            assert all(round.steps <= chunk if t.cut else round.steps == t.remaining for t in round.tickets)
            running.append(round)
        if not running:
            break
        round = running.pop(order.randrange(len(running)))  # type: ignore[attr-defined]
        rounds.done(round, 0.001)
        for t in round.tickets:
            advanced[t] += round.steps
            if t.remaining:
                rounds.again(t)
            else:
                rounds.leave(t)
    assert [advanced[t] for t in tickets] == [steps for _, steps, _, _ in lengths]
    assert (rounds.tickets, rounds.waiting_rows, rounds.running_rows, rounds.waiting_steps) == (0, 0, 0, 0)
