"""A ticket: a sequence's place in the queue. Fields only; what they mean for the order is rounds.py's, shares.py's and pieces.py's."""

from __future__ import annotations

from collections.abc import Hashable

from server.shares import Account


class Ticket:
    """One sequence waiting or running. `remaining` counts the time steps still to do. One that is `padded` may be run by more."""

    __slots__ = (
        "account", "count", "cut", "deadline", "gone", "graph", "key", "order", "padded", "remaining", "rows", "running", "shared",
        "waiting",
    )  # fmt: skip

    account: Account  # whose share it takes; set when it is admitted
    deadline: float | None

    def __init__(
        self, key: Hashable, rows: int, remaining: int, *, cut: bool = True, shared: bool = True, padded: bool = False, graph: str = ""
    ) -> None:
        self.key = key
        self.graph = graph
        self.rows = rows
        self.remaining = remaining
        self.count = 1  # calls or turns that it is all of
        self.cut = cut
        self.shared = shared
        self.padded = padded
        self.deadline = None
        self.order = 0.0  # virtual time (shares.py); 0: was never queued
        self.running = self.waiting = False  # waiting: it stands in a line
        self.gone = False  # cancelled, expired or finished: never to be chosen again
