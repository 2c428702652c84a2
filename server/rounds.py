"""Which sequences advance next, together, and by how much.

Law of this file: every decision about order, admission and deadlines is made here, with shares.py (whose work goes first) and
pieces.py (who goes along, by how much), and nothing else happens here. It knows no clock (time is an argument, in seconds), no
thread, no gRPC, no onnxruntime. Callers hold the workers' lock.

Tickets share a round only with those of the same `key`: same graph, same lengths on every axis but batch and time. A round
advances each of its tickets by the same number of steps, one that all of them have to do, so that nothing is ever padded; a ticket
that cannot be cut joins only its equals, or where its graph says so others of other lengths: then each is done after its own. In
the order of shares.py, whoever is first always runs; every other round begins with whoever would otherwise miss a deadline.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from server.costs import Costs
from server.errors import DeadlineExceeded, Overloaded
from server.pieces import choose
from server.shares import ANYONE, Account, Accounts, Claim, Clock
from server.tickets import Ticket

T = TypeVar("T", bound=Ticket)

UNKNOWN_S = 1e-5  # seconds that a step of a row is taken to cost before any ran
LOOK = 4  # rounds' worth of who waits that is looked through for company: enough, and a long queue costs no more
STANDS_S = 1.0  # seconds after which a long queue is no burst any more
OUTLIER = 5.0  # times the mean that one round counts at most: a machine that stood still for a while is no slower after
QUICKER = 0.5  # of the fastest rounds of late: what a ticket needs at the very least


@dataclass(frozen=True, slots=True)
class Round(Generic[T]):
    """Tickets that run together, each by `steps`, or by what it has to do where that is less."""

    key: Hashable
    tickets: tuple[T, ...]
    steps: int

    @property
    def rows(self) -> int:
        return sum(t.rows for t in self.tickets)

    @property
    def even(self) -> bool:
        """Whether all of them have as many steps to do as it runs: not so only where their graph is padded."""
        return not self.tickets[0].padded or all(t.remaining >= self.steps for t in self.tickets)


@dataclass(frozen=True, slots=True)
class Limits:
    """How large rounds and queues get."""

    rows: int = 64  # of one round: past 32 or so the LSTM's cost a row is flat, and the round only grows longer
    chunk: int = 32  # steps of one round: the longest that a newcomer waits for is rows × chunk
    share: int = 8  # fewest rows worth giving a worker of its own
    queue: int = 1024  # tickets waiting or running
    wait: float = 10.0  # seconds that what is here may take before newcomers are refused
    standing: float = 1.0  # the same where it has taken longer than that for a while: a burst is let in, what stays too much is not
    workers: int = 1
    lanes: int = 0  # rounds under way at once; 0 is no limit. On a device one runs while the next is prepared


class Rounds(Generic[T]):
    """The queue of one engine."""

    def __init__(self, limits: Limits, clock: Clock | None = None) -> None:
        self.limits = limits
        self._room = min(limits.rows, limits.queue)  # tickets that are always let in
        self.costs = Costs()
        self.accounts = Accounts(clock or Clock())  # the clock is shared by engines, so that they compare
        self._waiting: dict[Hashable, list[T]] = {}  # by key, in order
        self._deadlines: list[T] = []  # the nearest first
        self._hurried = False  # the last round began with who would have missed a deadline
        self._step_seconds = 0.0  # running mean cost of one row advancing one step
        self._above: float | None = None  # since when what is here takes longer than it may stand
        self._stands = False  # it has for a while
        self._pace = 0.0  # seconds that a ticket takes a step, in the fastest rounds of late
        self.tickets = 0  # waiting or running, each by what it is all of
        self.waiting_rows = 0
        self.running_rows = 0
        self.under_way = 0  # rounds
        self.waiting_steps = 0  # rows × remaining steps, waiting or running

    def admit(self, ticket: T, now: float, claim: Claim = ANYONE) -> None:
        """Take a newcomer. Raises Overloaded with when to come back, or DeadlineExceeded where its deadline can't be met."""
        if self.tickets >= self._room:
            self.check(claim)
        accounts = self.accounts
        account = accounts.of(claim)
        steps = ticket.rows * ticket.remaining
        deadline = claim.deadline
        if deadline is not None:
            if self.tickets >= self.limits.rows:
                self._reach(account, steps, deadline - now, deadline)
            ticket.deadline = deadline
            self._note(ticket, deadline)
        ticket.account = account
        self.tickets += ticket.count
        self.waiting_steps += steps
        if not account.tickets:
            accounts.active += 1
        account.tickets += ticket.count
        account.steps += steps
        self._wait(ticket)

    def check(self, claim: Claim = ANYONE) -> None:
        """Raise Overloaded where a newcomer would find the queue full, or wait longer than it is allowed to. A full round's
        tickets are always let in: one long sequence must not shut out everyone else; nor must one caller: who has less here than
        a fair part of the queue is let in, up to twice its length in all."""
        limits = self.limits
        if self.tickets >= limits.queue:
            account = self.accounts.find(claim)
            mine = account.tickets if account is not None else 0
            others = self.accounts.active - (1 if mine else 0)
            if not others or mine * (others + 1) >= limits.queue or self.tickets >= 2 * limits.queue:
                wait = self._expected(account)
                raise Overloaded(
                    "QUEUE_FULL", f"{self.tickets} requests are waiting, the most this model queues; send again in {wait:.2f} s",
                    retry_after=wait, waiting=self.tickets, limit=limits.queue,
                )  # fmt: skip
        most = min(limits.standing, limits.wait) if self._stands else limits.wait
        here = self.waiting_rows + self.running_rows  # not those that are being answered, whose callers may be back already
        if self.tickets >= limits.rows <= here and self.waiting_steps * self._step_seconds > most * limits.workers:
            wait = self._expected(self.accounts.find(claim))
            if wait > most:
                raise Overloaded(
                    "QUEUE_LONG", f"what is ahead takes {wait:.2f} s, more than the {most:g} s a request may wait; send again then",
                    retry_after=wait, waiting=self.tickets, limit=f"{most:g} s",
                )  # fmt: skip

    def expected_wait(self) -> float:
        """Seconds until what is here now is done, by the measured cost of a step; at least 10 ms."""
        return max(0.01, self.waiting_steps * self._step_seconds / self.limits.workers)

    def _expected(self, account: Account | None, more: int = 0) -> float:
        """The same until what one caller has here is done, and `more` row-steps: it has a share of its own."""
        accounts = self.accounts
        steps, active = (account.steps, accounts.active) if account is not None and account.tickets else (0, accounts.active + 1)
        return max(0.01, min(self.waiting_steps + more, (steps + more) * active) * self._step_seconds / self.limits.workers)

    def peek(self) -> tuple[T, int, int] | None:
        """The first ticket of the next round, and about how many rows and steps it will have; None where nothing waits."""
        if not self._waiting or self.full:
            return None
        first = self._first()[0]
        return first, min(self.waiting_rows, self.limits.rows) if first.shared else first.rows, self._stride(first)

    @property
    def full(self) -> bool:
        """Whether as many rounds are under way as may be."""
        return 0 < self.limits.lanes <= self.under_way

    def first(self) -> float | None:
        """The place in the order of who is to be served first, to compare engines by; None where nobody is, or all lanes are taken."""
        if self.full:
            return None
        return min((line[0].order for line in self._waiting.values()), default=None)

    def next(self, now: float, workers: int | None = None) -> Round[T] | None:
        """The round to run now, its tickets marked running; None where nothing waits. What is here is shared out among
        `workers`, by default the limits'."""
        if not self._waiting or self.full:
            return None
        if workers is None:
            workers = self.limits.workers
        most = part = self.limits.rows
        if workers > 1:
            part = min(most, -(-(self.waiting_rows + self.running_rows) // workers))
            most = min(most, max(self.limits.share, part))
        self._look(now)
        line = self._first()
        first = line[0]
        self.accounts.served(first.account, first.order)
        late = self._late(now) if self._deadlines and not self._hurried else None
        self._hurried = late is not None
        if late is not None:
            first = late
            line = self._waiting[late.key]
        company = line if len(line) <= LOOK * most else line[: LOOK * most]
        graph = first.graph
        chosen, steps = choose(first, company, most, self.limits.chunk, lambda rows: self.costs.a_row(graph, rows), part)
        rows = 0
        for ticket in chosen:
            ticket.running, ticket.waiting = True, False
            rows += ticket.rows
        if len(chosen) == len(line):
            del self._waiting[first.key]
        else:
            line[:] = [t for t in line if not t.running]
        self.waiting_rows -= rows
        self.running_rows += rows
        self.under_way += 1
        return Round(first.key, tuple(chosen), steps)

    def done(self, round: Round[T], seconds: float) -> int:
        """A round ran: its tickets have `steps` less to do. Call `again` or `leave` for each of them next. Gives the row-steps that
        they had to do in it."""
        steps = round.steps
        even = round.even
        rows = row_steps = 0
        for ticket in round.tickets:
            rows += ticket.rows
            own = ticket.rows * (steps if even else min(steps, ticket.remaining))
            row_steps += own
            ticket.remaining = max(0, ticket.remaining - steps)
            ticket.running = False
            if ticket.gone:  # it left while it ran: what remained of it will not be done
                self.waiting_steps -= ticket.rows * ticket.remaining
            else:
                ticket.account.steps -= own
        self.running_rows -= rows
        self.under_way -= 1
        self.waiting_steps -= row_steps
        cost = seconds / (rows * steps)
        known = self._step_seconds
        self._step_seconds = known + (min(cost, OUTLIER * known) - known) * 0.1 if known else cost
        pace = seconds / steps
        self._pace = pace if pace < self._pace or not self._pace else self._pace + (pace - self._pace) * 0.02
        return row_steps

    def again(self, ticket: T) -> None:
        """A ticket that ran waits for its next round, behind who has waited longer."""
        self._wait(ticket)

    def turn(self, ticket: T, key: Hashable, rows: int, remaining: int, *, cut: bool, shared: bool, padded: bool = False) -> None:
        """A ticket that finished its steps goes on with others: another graph, the next token. It was admitted already."""
        ticket.key, ticket.rows, ticket.remaining, ticket.cut, ticket.shared = key, rows, remaining, cut, shared
        ticket.padded = padded
        self.waiting_steps += rows * remaining
        ticket.account.steps += rows * remaining
        self._wait(ticket)

    def leave(self, ticket: T) -> bool:
        """A ticket is finished, cancelled or expired. True where it was still here; running ones leave at the round's end."""
        if ticket.gone:
            return False
        ticket.gone = True
        self.tickets -= ticket.count
        account = ticket.account
        if ticket.remaining:
            account.steps -= ticket.rows * ticket.remaining
        account.tickets -= ticket.count
        if not account.tickets:
            self.accounts.emptied()
        if not ticket.running:
            if ticket.waiting:
                self._step_out(ticket)
            self.waiting_steps -= ticket.rows * ticket.remaining
        return True

    def everyone(self) -> list[T]:
        """Tickets that wait now."""
        return [ticket for line in self._waiting.values() for ticket in line]

    def expired(self, now: float) -> list[T]:
        """Tickets whose deadline has passed, or can't be met any more; they have left."""
        late = []
        while self._deadlines and ((first := self._deadlines[0]).gone or self._left(first, now) <= 0):
            del self._deadlines[0]
            if self.leave(first):
                late.append(first)
        return late

    def wake_at(self) -> float | None:
        """The next deadline, to sleep until."""
        while self._deadlines and self._deadlines[0].gone:
            del self._deadlines[0]
        return self._deadlines[0].deadline if self._deadlines else None

    def _look(self, now: float) -> None:
        """Whether more is here than may stand, and for how long it has been: before it is less than half of that, it is not over."""
        takes = self.waiting_steps * self._step_seconds / self.limits.workers
        if self._above is None:
            if takes > self.limits.standing:
                self._above = now
        elif takes < self.limits.standing / 2:
            self._above = None
            self._stands = False
        elif not self._stands and now - self._above >= STANDS_S:
            self._stands = True

    def _note(self, ticket: T, deadline: float) -> None:
        """Keep a ticket's deadline in mind."""
        all = self._deadlines
        if len(all) > 2 * self.tickets + 64:  # who has left long before its deadline is not to be kept
            all[:] = [t for t in all if not t.gone]
        if not all or _deadline(all[-1]) <= deadline:
            all.append(ticket)
        else:
            insort(all, ticket, key=_deadline)

    def _left(self, ticket: T, now: float) -> float:
        """Seconds that a ticket could still wait; 0 or less where its deadline passed or can't be met, however it is run."""
        left = _deadline(ticket) - now
        return left if ticket.running or left <= 0 else left - ticket.remaining * self._pace * QUICKER

    def _late(self, now: float) -> T | None:
        """Who would miss its deadline, if it waited for all that is here, and can still meet it: the nearest deadline of these."""
        most = now + self.waiting_steps * self._step_seconds / self.limits.workers
        for ticket in self._deadlines:
            if _deadline(ticket) > most:
                break
            if not ticket.gone and not ticket.running and self._left(ticket, now) > 0:
                return ticket
        return None

    def _reach(self, account: Account, steps: int, left: float, deadline: float) -> None:
        """Raise DeadlineExceeded where a newcomer is not expected to be done in the time left: not by its turn, nor ahead of
        it, since as much as half of all rounds begin with those of nearer deadlines."""
        wait = self._expected(account, steps)
        if wait <= left or account.ahead > 0:
            return
        nearer = self._deadlines[: bisect_right(self._deadlines, deadline, key=_deadline)]
        before = sum(t.rows * t.remaining for t in nearer if not t.gone)
        if 2 * (before + steps) * self._step_seconds / self.limits.workers <= left:
            return
        raise DeadlineExceeded(
            "DEADLINE_TOO_NEAR", f"what is ahead takes {wait:.2f} s, more than the {left:.2f} s that the request has left; "
            "allow more time, or send it again then", retry_after=wait, waiting=self.tickets,
        )  # fmt: skip

    def _wait(self, ticket: T) -> None:
        rows = ticket.rows
        steps = ticket.remaining
        chunk = self.limits.chunk
        if not self._step_seconds:  # none ran yet: what was measured when the model was loaded
            self._step_seconds = self.costs.a_row(ticket.graph, rows)
        each = self._step_seconds or UNKNOWN_S
        cost = rows * (chunk if steps > chunk and ticket.cut else steps) * each
        ticket.order = order = self.accounts.enter(ticket.account, cost)
        line = self._waiting.get(ticket.key)
        if line is None:
            self._waiting[ticket.key] = [ticket]
        elif line[-1].order <= order:
            line.append(ticket)
        else:
            insort(line, ticket, key=_order)
        ticket.waiting = True
        self.waiting_rows += rows

    def _step_out(self, ticket: T) -> None:
        """A ticket leaves its line: found by its place in the order, since lines can be thousands long."""
        line = self._waiting[ticket.key]
        at = bisect_left(line, ticket.order, key=_order)
        while line[at] is not ticket:
            at += 1
        del line[at]
        ticket.waiting = False
        self.waiting_rows -= ticket.rows
        if not line:
            del self._waiting[ticket.key]

    def _first(self) -> list[T]:
        """The line of who is to be served first."""
        if len(self._waiting) == 1:
            return next(iter(self._waiting.values()))
        return min(self._waiting.values(), key=lambda line: line[0].order)

    def _stride(self, ticket: T) -> int:
        return min(self.limits.chunk, ticket.remaining) if ticket.cut else ticket.remaining


def _order(ticket: Ticket) -> float:
    return ticket.order


def _deadline(ticket: Ticket) -> float:
    assert ticket.deadline is not None, "only tickets with deadlines are asked"
    return ticket.deadline
