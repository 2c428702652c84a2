"""Whose work goes first: a fair share for every caller, and classes that pass each other by no more than is told here.

Weighted fair queueing by virtual finishing times (Golestani 1994, self-clocked): a ticket's place in the order is when it would be
done if its caller had a share of its own, so who floods waits behind its own flood, and a newcomer at most for what others have in
front of that. With one caller it is the order of arrival. Virtual time is in seconds of service and advances with whoever is served.

Whose share it is: the tenant's, where keys are asked for, else the connection's; in each model anew. A class of another level has
an account of its own, and what it takes is charged to the caller's lower classes too: spreading work over classes wins nothing.

This file knows no clock (virtual time is no time of day), no thread, no gRPC. Callers hold the workers' lock.
"""

from __future__ import annotations

from collections.abc import Hashable

LEVELS = 5
"""Classes of requests; 1 is the highest."""
DEFAULT = 3
"""The class of a request that says none, or one that there isn't."""
AGE = 1.0
"""Virtual seconds that a class goes ahead of the one below. A request is passed by what comes later in a class `n` above at most so
long as that takes `n × AGE` of its caller's share: no class starves."""


class Claim:
    """What a request may claim: until when (seconds, of the clock that the engine is told), in which class, and whose share."""

    __slots__ = ("deadline", "flow", "level")

    def __init__(self, deadline: float | None = None, level: int = DEFAULT, flow: Hashable = None) -> None:
        self.deadline = deadline
        self.level = level
        self.flow = flow


ANYONE = Claim()


class Clock:
    """Virtual time, one for all engines, so that what waits in one compares with what waits in another."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = (LEVELS + 1) * AGE  # whatever its class, no ticket's place is 0 or less


class Account:
    """What one caller has here, in one class."""

    __slots__ = ("ahead", "finish", "flow", "level", "steps", "tickets")

    def __init__(self, flow: Hashable, level: int) -> None:
        self.flow = flow
        self.level = level
        self.ahead = (DEFAULT - level) * AGE
        self.finish = 0.0  # virtual time at which all that it brought is done
        self.steps = 0  # rows × steps, waiting or running
        self.tickets = 0  # waiting or running


class Accounts:
    """Those of one engine."""

    __slots__ = ("_all", "active", "clock", "levelled")

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._all: dict[Hashable, Account] = {}
        self.levelled = False  # whether any is of another class than the default
        self.active = 0  # that have tickets

    def of(self, claim: Claim) -> Account:
        """The account that a claim's work is charged to, made where there is none."""
        flow, level = claim.flow, claim.level
        key = flow if level == DEFAULT else (flow, level)
        account = self._all.get(key)
        if account is None:
            if len(self._all) > 2 * self.active + 64:
                self._forget()
            account = self._all[key] = Account(flow, level)
            if level != DEFAULT:
                self.levelled = True
        return account

    def find(self, claim: Claim) -> Account | None:
        return self._all.get(claim.flow if claim.level == DEFAULT else (claim.flow, claim.level))

    def enter(self, account: Account, cost: float) -> float:
        """A ticket waits for so much service (seconds): its place in the order, smaller goes first."""
        now = self.clock.now
        finish = account.finish
        account.finish = finish = (finish if finish > now else now) + cost
        if self.levelled:
            for level in range(account.level + 1, LEVELS + 1):
                below = self._all.get(account.flow if level == DEFAULT else (account.flow, level))
                if below is not None:
                    below.finish = max(below.finish, now) + cost
            return finish - account.ahead
        return finish

    def served(self, account: Account, order: float) -> None:
        """Who was first in the order is served: virtual time has come so far."""
        reached = order + account.ahead
        if reached > self.clock.now:
            self.clock.now = reached

    def emptied(self) -> None:
        """An account's last ticket has left."""
        self.active -= 1
        if not self.active:  # nobody is here: nobody owes anybody
            self._all.clear()
            self.levelled = False

    def _forget(self) -> None:
        """Accounts that have nothing here and owe nothing."""
        now = self.clock.now
        self._all = {key: a for key, a in self._all.items() if a.tickets or a.finish > now}
