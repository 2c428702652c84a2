"""One model: its queue, its graphs, and a round of it: stack → run → split → answer. Who runs rounds, and when, is workers.py.

Nothing here locks: the queue is touched with the workers' lock held, and a round's sequences belong to the thread that runs it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Listed
from typing import Any, Protocol

import numpy as np

from contract.bundle import Bundle
from server.errors import DeviceLost, ModelFailed, Overloaded, ServeError
from server.graph import OnnxGraph
from server.rounds import Limits, Round, Rounds
from server.sequence import Sequence, carried, order, split, stack
from server.shares import ANYONE, Claim
from server.shares import Clock as Virtual
from server.states import Block
from server.trial import Point

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
Clock = Callable[[], float]

LATELY = 0.98  # what a round counts for after each one that follows


class Watch(Protocol):
    """What an engine reports, once a round or once a sequence; metrics.py counts it."""

    def round(self, engine: Engine, graph: str, tickets: int, rows: int, steps: int, row_steps: int, spent: Spent) -> None:
        """A round ran, in which so many row-steps were to be done; nobody was answered yet."""

    def told(self, engine: Engine, rows: int, sequences: int, seconds: float) -> None:
        """The round of so many rows that was the last of so many sequences: to answer them took so long."""

    def left(self, engine: Engine, sequences: Listed[Sequence], reason: str) -> None: ...


class Spent:
    """Where a round's time went, in seconds: its inputs put together, its run, its results parted; and all of it. `own` is what the
    run took of a core or a device, without what it waited for others."""

    __slots__ = ("infer", "own", "seconds", "split", "stack")

    def __init__(self) -> None:
        self.stack = self.infer = self.split = self.seconds = self.own = 0.0


class Runners(Protocol):
    """Who runs engines' rounds: workers.Workers."""

    @property
    def virtual(self) -> Virtual: ...

    @property
    def worth(self) -> float: ...

    def waited(self, engine: Engine) -> tuple[float, float]: ...

    def add(self, engine: Engine) -> None: ...

    def submit(self, engine: Engine, sequence: Sequence, claim: Claim) -> None: ...

    def cancel(self, engine: Engine, sequence: Sequence) -> None: ...

    def retire(self, engine: Engine) -> None: ...

    def lost(self, why: DeviceLost) -> None: ...


class Engine:
    """One model's queue and graphs, on one device. Made by the catalog, run by Workers. Where a model runs on several devices, callers
    know the first of its engines, which shares out among the `others`: a sequence runs where its state lies."""

    def __init__(
        self, bundle: Bundle, version: str, graphs: Mapping[str, OnnxGraph], workers: Runners, limits: Limits, watch: Watch
    ) -> None:
        self.bundle = bundle
        self.version = version
        self.name = bundle.name
        self.graphs = graphs  # none where it has retired and all is done
        self.rounds: Rounds[Sequence] = Rounds(limits, workers.virtual)
        self.costs = self.rounds.costs
        self.measured: Listed[Point] = ()  # what the sizes of rounds were chosen by, where they were
        self._ran = [0.0, 0.0]  # seconds, sequences, the past counting less and less
        self.each = 0.0  # seconds of running that a sequence needed in all, of late
        self.retired = False
        self.others: tuple[Engine, ...] = ()
        self._next = 0  # of these and this one, who is asked first
        self._near = all(graph.device.near for graph in graphs.values())
        self._workers = workers
        self.watch = watch
        workers.add(self)

    def submit(self, sequence: Sequence, claim: Claim = ANYONE) -> None:
        """Queue a sequence; its `then` or `failed` is called later, from a worker. Raises Overloaded, Draining or
        DeadlineExceeded where it can't be taken."""
        if self.others:
            sequence.engine = self._nearest(sequence)
            self._workers.submit(sequence.engine, sequence, claim)
        else:
            self._workers.submit(self, sequence, claim)

    def check(self, claim: Claim = ANYONE) -> None:
        """Raise Overloaded where a newcomer would be refused now: to be asked before its request is read at any cost."""
        for engine in self.others:
            try:
                engine.rounds.check(claim)
                return
            except Overloaded:
                continue
        self.rounds.check(claim)

    def cancel(self, sequence: Sequence) -> None:
        """The caller has gone: free the rows, say nothing to anyone."""
        self._workers.cancel(sequence.engine or self, sequence)

    @property
    def engines(self) -> tuple[Engine, ...]:
        """This one and the others of its model."""
        return (self, *self.others)

    def waited(self) -> tuple[float, float]:
        """Seconds that whoever waits longest for its next round has waited, and that all that is here is expected to take."""
        every = [self._workers.waited(engine) for engine in self.engines]
        return max(age for age, _ in every), max(wait for _, wait in every)

    def retire(self) -> None:
        """Take no more; what is here is finished, then the engine is forgotten."""
        for engine in self.engines:
            self._workers.retire(engine)

    def _nearest(self, s: Sequence) -> Engine:
        """Where its state lies; else where least is to be done."""
        engines = self.engines
        if s.state is not None and isinstance(s.state.bank, Block):
            for engine in engines:
                if (graph := engine.graphs.get(s.graph)) is not None and graph.keeps(s.state):
                    return engine
        self._next = (self._next + 1) % len(engines)
        return min((*engines[self._next :], *engines[: self._next]), key=lambda e: e.rounds.waiting_rows + e.rounds.running_rows)

    def enqueue(self, s: Sequence, claim: Claim, now: float) -> None:
        """Queue a newcomer, with the lock held. Raises Overloaded, DeadlineExceeded."""
        graph = self.graphs[s.graph].graph
        s.key = key(self, s)
        s.remaining = s.steps
        s.cut, s.shared, s.padded = graph.cut, graph.shared, graph.padded
        self.rounds.admit(s, now, claim)
        s.since = now

    def brief(self, seconds: float) -> bool:
        """Whether the next round is expected to take at most so long; not where nothing waits or nothing is known."""
        peeked = self.rounds.peek()
        if peeked is None or not self._near:  # a device works while the thread that brings work brings more
            return False
        if self.each > self._workers.worth:
            return False
        first, rows, steps = peeked
        expected = self.costs.seconds(first.graph, rows, steps)
        return expected is not None and expected <= seconds

    def run(self, round: Round[Sequence], spent: Spent) -> Mapping[Sequence, ServeError]:
        """Run one round and give every sequence its part; who could not be run comes with why. Adds to `spent`."""
        started = time.perf_counter()
        sequences = round.tickets
        graph = self.graphs[sequences[0].graph]
        try:
            ordered = order(graph.graph, sequences)
            feeds = stack(graph.graph, ordered, round.steps)
            states = carried(graph.graph, ordered, graph.fresh)
            stacked = time.perf_counter()
            outputs, bank, seconds = graph.advance(feeds, states)
            self.costs.learn(sequences[0].graph, round.rows, round.steps, seconds)
            ran = time.perf_counter()
            split(graph.graph, ordered, outputs, bank, round.steps)
            spent.stack += stacked - started
            spent.infer += ran - stacked
            spent.own += seconds
            spent.split += time.perf_counter() - ran
        except DeviceLost as e:  # no row's fault, and no row is better off alone
            log.error("model %s: %s", self.name, e)
            self._workers.lost(e)
            return {s: DeviceLost(e.reason, e.message, device=e.facts["device"]) for s in sequences}
        except Exception as e:  # onnxruntime raises its own types, all of them straight from Exception
            if len(sequences) == 1:
                if not isinstance(e, ServeError):
                    log.warning("model %s: a sequence failed alone: %s", self.name, e)
                    message = f"model {self.name!r} could not run this input: {str(e)[:300]}"
                    e = ModelFailed("MODEL_FAILED", message, model=self.name, graph=sequences[0].graph)
                return {sequences[0]: e}
            # One bad row fails a whole run, and too many may: halves find the culprits, and harm no one else.
            half = len(sequences) // 2
            failed: dict[Sequence, ServeError] = {}
            for some in (sequences[:half], sequences[half:]):
                failed.update(self.run(Round(round.key, some, min(round.steps, max(s.remaining for s in some))), spent))
            return failed
        return _NOBODY

    def ran(self, seconds: float, answered: int) -> None:
        """A round took so long of a core, and was the last of so many sequences. By the time of day, in which threads wait for each
        other, what is brief would seem long as soon as many threads are at it, and be given to many threads for that."""
        self._ran[0] = LATELY * self._ran[0] + seconds
        self._ran[1] = LATELY * self._ran[1] + answered
        self.each = self._ran[0] / max(1.0, self._ran[1])

    def answer(self, s: Sequence) -> None:
        """All pending steps ran: the sequence says what comes next."""
        s.going = False
        s.then(s, s.outputs(self.graphs[s.graph].graph))
        if not s.going:
            s.over()


_NOBODY: Mapping[Sequence, ServeError] = {}


def key(engine: Engine, s: Sequence) -> tuple[object, ...]:
    """What must be equal for sequences to share a round: the graph, other named lengths, the round's constants."""
    graph = engine.graphs[s.graph].graph
    if not graph.constants:
        return (s.graph, s.named)
    assert not isinstance(s.inputs, tuple), "constants are no rows"
    return (s.graph, s.named, *(s.inputs[name].tobytes() for name in graph.constants))
