"""Which sequences advance next, together, and by how much.

Law of this file: every decision about order, admission and deadlines is made here, and nothing else happens here. It
knows no clock (time is an argument, in seconds), no thread, no gRPC, no onnxruntime. Callers hold the engine's lock.

A *ticket* is a sequence's place in the queue. Tickets share a round only with those of the same `key`: same graph, same
lengths on every axis but batch and time. A round advances each of its tickets by the same number of steps,
`min(chunk, shortest remaining)`, so that nothing is ever padded; a ticket that cannot be cut joins only its equals.
Who was served longest ago goes first, so a long sequence delays a short one by one round at most.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from server.errors import Overloaded


class Ticket:
    """One sequence waiting or running. `remaining` counts the time steps still to do."""

    __slots__ = ("cut", "deadline", "gone", "key", "order", "remaining", "rows", "running", "shared")

    def __init__(
        self, key: Hashable, rows: int, remaining: int, *, cut: bool = True, shared: bool = True, deadline: float | None = None
    ) -> None:
        self.key = key
        self.rows = rows
        self.remaining = remaining
        self.cut = cut
        self.shared = shared
        self.deadline = deadline
        self.order = 0  # 0: was never queued
        self.running = False
        self.gone = False  # cancelled, expired or finished: never to be chosen again


T = TypeVar("T", bound=Ticket)


@dataclass(frozen=True, slots=True)
class Round(Generic[T]):
    """Tickets that run together, each by `steps`."""

    key: Hashable
    tickets: tuple[T, ...]
    steps: int

    @property
    def rows(self) -> int:
        return sum(t.rows for t in self.tickets)


@dataclass(frozen=True, slots=True)
class Limits:
    """How large rounds and queues get."""

    rows: int = 64  # of one round: past 32 or so the LSTM's cost a row is flat, and the round only grows longer
    chunk: int = 32  # steps of one round: the longest that a newcomer waits for is rows × chunk
    share: int = 8  # fewest rows worth giving a worker of its own
    queue: int = 1024  # tickets waiting or running
    wait: float = 10.0  # seconds that what is here may take before newcomers are refused
    workers: int = 1
    lanes: int = 0  # rounds under way at once; 0 is no limit. On a device one runs while the next is prepared


class Rounds(Generic[T]):
    """The queue of one engine."""

    def __init__(self, limits: Limits, order: Iterator[int] | None = None) -> None:
        self.limits = limits
        self._order = order if order is not None else itertools.count(1)  # shared by engines, so that they compare
        self._waiting: dict[Hashable, dict[T, None]] = {}  # by key, served longest ago first
        self._deadlines: list[tuple[float, int, T]] = []
        self._tie = itertools.count()
        self._step_seconds = 0.0  # running mean cost of one row advancing one step
        self.tickets = 0  # waiting or running
        self.waiting_rows = 0
        self.running_rows = 0
        self.under_way = 0  # rounds
        self.waiting_steps = 0  # rows × remaining steps, waiting or running

    def admit(self, ticket: T, now: float) -> None:
        """Take a newcomer, or raise Overloaded with when to come back."""
        self.check()
        self.tickets += 1
        self.waiting_steps += ticket.rows * ticket.remaining
        if ticket.deadline is not None:
            if len(self._deadlines) > 2 * self.tickets + 64:  # who has left long before its deadline is not to be kept
                self._deadlines = [entry for entry in self._deadlines if not entry[2].gone]
                heapq.heapify(self._deadlines)
            heapq.heappush(self._deadlines, (ticket.deadline, next(self._tie), ticket))
        self._wait(ticket)

    def check(self) -> None:
        """Raise Overloaded where a newcomer would find the queue full, or wait longer than it is allowed to. A full round's
        tickets are always let in: one long sequence must not shut out everyone else."""
        limits = self.limits
        if self.tickets >= limits.queue:
            wait = self.expected_wait()
            raise Overloaded(
                "QUEUE_FULL", f"{self.tickets} requests are waiting, the most this model queues; send again in {wait:.2f} s",
                retry_after=wait, waiting=self.tickets, limit=limits.queue,
            )  # fmt: skip
        if self.tickets >= limits.rows and (wait := self.expected_wait()) > limits.wait:
            raise Overloaded(
                "QUEUE_LONG", f"what waits here takes {wait:.2f} s, more than the {limits.wait:g} s a request may wait; send again then",
                retry_after=wait, waiting=self.tickets, limit=f"{limits.wait:g} s",
            )  # fmt: skip

    def expected_wait(self) -> float:
        """Seconds until what is here now is done, by the measured cost of a step; at least 10 ms."""
        return max(0.01, self.waiting_steps * self._step_seconds / self.limits.workers)

    def peek(self) -> tuple[T, int, int] | None:
        """The first ticket of the next round, and about how many rows and steps it will have; None where nothing waits."""
        if not self._waiting or self.full:
            return None
        first = next(iter(self._first()[1]))
        return first, min(self.waiting_rows, self.limits.rows) if first.shared else first.rows, self._stride(first)

    @property
    def full(self) -> bool:
        """Whether as many rounds are under way as may be."""
        return 0 < self.limits.lanes <= self.under_way

    def oldest(self) -> int | None:
        """The place in the order of service of who waits longest, to compare engines by; None where nobody does, or all lanes are
        taken."""
        if self.full:
            return None
        return min((next(iter(line)).order for line in self._waiting.values()), default=None)

    def next(self, workers: int | None = None) -> Round[T] | None:
        """The round to run now, its tickets marked running; None where nothing waits. What is here is shared out among
        `workers`, by default the limits'."""
        if workers is None:
            workers = self.limits.workers
        if not self._waiting or self.full:
            return None
        key, line = self._first()
        most = self.limits.rows
        if workers > 1:
            everyone = self.waiting_rows + self.running_rows
            most = min(most, max(self.limits.share, -(-everyone // workers)))
        chosen: list[T] = []
        rows = steps = 0
        for ticket in line:
            if not chosen:
                steps = self._stride(ticket)
            elif rows + ticket.rows > most or not ticket.shared or (not ticket.cut and ticket.remaining != steps):
                continue
            chosen.append(ticket)
            rows += ticket.rows
            steps = min(steps, self._stride(ticket))
            if rows >= most or not ticket.shared:
                break
        for ticket in chosen:
            del line[ticket]
            ticket.running = True
        if not line:
            del self._waiting[key]
        self.waiting_rows -= rows
        self.running_rows += rows
        self.under_way += 1
        return Round(key, tuple(chosen), steps)

    def done(self, round: Round[T], seconds: float) -> None:
        """A round ran: its tickets have `steps` less to do. Call `again` or `leave` for each of them next."""
        rows = round.rows
        self.running_rows -= rows
        self.under_way -= 1
        self.waiting_steps -= rows * round.steps
        cost = seconds / (rows * round.steps)
        self._step_seconds += (cost - self._step_seconds) * (0.1 if self._step_seconds else 1.0)
        for ticket in round.tickets:
            ticket.remaining -= round.steps
            ticket.running = False
            if ticket.gone:  # it left while it ran: what remained of it will not be done
                self.waiting_steps -= ticket.rows * ticket.remaining

    def again(self, ticket: T) -> None:
        """A ticket that ran waits for its next round, behind who has waited longer."""
        self._wait(ticket)

    def turn(self, ticket: T, key: Hashable, rows: int, remaining: int, *, cut: bool, shared: bool) -> None:
        """A ticket that finished its steps goes on with others: another graph, the next token. It was admitted already."""
        ticket.key, ticket.rows, ticket.remaining, ticket.cut, ticket.shared = key, rows, remaining, cut, shared
        self.waiting_steps += rows * remaining
        self._wait(ticket)

    def leave(self, ticket: T) -> bool:
        """A ticket is finished, cancelled or expired. True where it was still here; running ones leave at the round's end."""
        if ticket.gone:
            return False
        ticket.gone = True
        self.tickets -= 1
        if not ticket.running:
            line = self._waiting.get(ticket.key)
            if line is not None and ticket in line:
                del line[ticket]
                self.waiting_rows -= ticket.rows
                if not line:
                    del self._waiting[ticket.key]
            self.waiting_steps -= ticket.rows * ticket.remaining
        return True

    def everyone(self) -> list[T]:
        """Tickets that wait now."""
        return [ticket for line in self._waiting.values() for ticket in line]

    def expired(self, now: float) -> list[T]:
        """Tickets whose deadline has passed; they have left."""
        late = []
        while self._deadlines and (self._deadlines[0][2].gone or self._deadlines[0][0] <= now):
            ticket = heapq.heappop(self._deadlines)[2]
            if self.leave(ticket):
                late.append(ticket)
        return late

    def wake_at(self) -> float | None:
        """The next deadline, to sleep until."""
        while self._deadlines and self._deadlines[0][2].gone:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def _wait(self, ticket: T) -> None:
        ticket.order = next(self._order)
        self._waiting.setdefault(ticket.key, {})[ticket] = None
        self.waiting_rows += ticket.rows

    def _first(self) -> tuple[Hashable, dict[T, None]]:
        """The line that has waited longest."""
        if len(self._waiting) == 1:
            return next(iter(self._waiting.items()))
        return min(self._waiting.items(), key=lambda item: next(iter(item[1])).order)

    def _stride(self, ticket: T) -> int:
        return min(self.limits.chunk, ticket.remaining) if ticket.cut else ticket.remaining
