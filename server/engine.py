"""The one loop: choose → stack → run → split → answer. All concurrency of the server lives here.

One lock guards every engine's queue; it is held for decisions (microseconds), never during a run. Workers are threads:
each takes the round of whoever has waited longest, over all engines, so no core idles while any model has work. A
round's tickets belong to the worker that runs it until it is done, so sequences need no lock of their own. Replies leave
from the worker's thread, with no wake-up in between.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Listed
from typing import Any, Protocol

import numpy as np

from contract.bundle import Bundle
from server.errors import DeadlineExceeded, Draining, ModelFailed, NotFound, ServeError
from server.graph import OnnxGraph
from server.rounds import Limits, Round, Rounds, Ticket
from server.sequence import Sequence, split, stack

log = logging.getLogger(__name__)

Array = np.ndarray[Any, Any]
Clock = Callable[[], float]


class Watch(Protocol):
    """What an engine reports, once a round or once a sequence; metrics.py counts it."""

    def round(self, engine: Engine, graph: str, rows: int, steps: int, seconds: float) -> None: ...

    def left(self, engine: Engine, sequences: Listed[Sequence], reason: str) -> None: ...


class Engine:
    """One model's queue and graphs. Made by the catalog, run by Workers."""

    def __init__(
        self, bundle: Bundle, version: str, graphs: Mapping[str, OnnxGraph], workers: Workers, limits: Limits, watch: Watch
    ) -> None:
        self.bundle = bundle
        self.version = version
        self.name = bundle.name
        self.graphs = graphs
        self.rounds = Rounds(limits, workers.order)
        self.retired = False
        self._workers = workers
        self.watch = watch
        workers.add(self)

    def submit(self, sequence: Sequence, deadline: float | None = None) -> None:
        """Queue a sequence; its `then` or `failed` is called later, from a worker. Raises Overloaded, Draining or
        DeadlineExceeded where it can't be taken."""
        self._workers.submit(self, sequence, deadline)

    def cancel(self, sequence: Sequence) -> None:
        """The caller has gone: free the rows, say nothing to anyone."""
        self._workers.cancel(self, sequence)

    def retire(self) -> None:
        """Take no more; what is here is finished, then the engine is forgotten."""
        self._workers.retire(self)

    def ticket(self, sequence: Sequence, deadline: float | None) -> Ticket:
        graph = self.graphs[sequence.graph].graph
        return Ticket(
            _key(self, sequence), sequence.rows, sequence.steps, cut=graph.cut, shared=graph.shared, deadline=deadline, work=sequence
        )

    def run(self, round: Round) -> list[tuple[Ticket, ServeError | None]]:
        """Run one round and give every sequence its part; who could not be run comes with why."""
        sequences = [t.work for t in round.tickets]
        graph = self.graphs[sequences[0].graph]
        try:
            results = graph.run(stack(graph.graph, sequences, round.steps))
            split(graph.graph, sequences, results, round.steps)
        except Exception as e:  # onnxruntime raises its own types, all of them straight from Exception
            if len(sequences) == 1:
                log.warning("model %s: a sequence failed alone: %s", self.name, e)
                message = f"model {self.name!r} could not run this input: {str(e)[:300]}"
                return [(round.tickets[0], ModelFailed("MODEL_FAILED", message, model=self.name, graph=sequences[0].graph))]
            # One bad row fails a whole run: alone, only the culprit does.
            alone = [self.run(Round(round.key, (ticket,), round.steps)) for ticket in round.tickets]
            return [pair for pairs in alone for pair in pairs]
        return [(ticket, None) for ticket in round.tickets]

    def answer(self, sequence: Sequence) -> None:
        """All pending steps ran: the sequence says what comes next."""
        sequence.going = False
        sequence.then(sequence, sequence.outputs(self.graphs[sequence.graph].graph))


class Workers:
    """The threads that run rounds, for all engines."""

    def __init__(self, threads: int, clock: Clock = time.monotonic) -> None:
        self.order = itertools.count(1)
        self.after_round: Callable[[], None] = lambda: None  # called by a worker when all of its round was answered
        self._clock = clock
        self._engines: list[Engine] = []
        self._wake = threading.Condition(threading.Lock())
        self._stopping = False
        self._draining = False
        self._running = 0
        self._threads = [threading.Thread(target=self._work, name=f"worker-{i}", daemon=True) for i in range(threads)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def add(self, engine: Engine) -> None:
        with self._wake:
            self._engines = [*self._engines, engine]

    def remove(self, engine: Engine) -> None:
        with self._wake:
            self._engines = [e for e in self._engines if e is not engine]

    def retire(self, engine: Engine) -> None:
        with self._wake:
            engine.retired = True
            if not engine.rounds.tickets:
                self._engines = [e for e in self._engines if e is not engine]

    def submit(self, engine: Engine, sequence: Sequence, deadline: float | None) -> None:
        now = self._clock()
        if deadline is not None and deadline <= now:
            raise DeadlineExceeded("DEADLINE_EXCEEDED", "the deadline had passed when the request arrived")
        ticket = engine.ticket(sequence, deadline)
        with self._wake:
            if engine.retired:
                raise NotFound("UNLOADED", f"model {engine.name!r} version {engine.version} was unloaded", model=engine.name)
            if self._draining:
                raise Draining("DRAINING", "the server is shutting down; send the request again")
            engine.rounds.admit(ticket, now)
            sequence.ticket = ticket
            sequence.since = now
            self._wake.notify()

    def cancel(self, engine: Engine, sequence: Sequence) -> None:
        with self._wake:
            left = sequence.ticket is not None and engine.rounds.leave(sequence.ticket)
        if left:
            engine.watch.left(engine, [sequence], "cancelled")

    def drain(self, seconds: float) -> bool:
        """Take nothing new; wait until what is here is done. False where `seconds` did not suffice."""
        with self._wake:
            self._draining = True
            return self._wake.wait_for(self._idle, seconds)

    def stop(self) -> None:
        """End the threads after the rounds they run; whoever still waits is told."""
        with self._wake:
            self._draining = self._stopping = True
            left = [t for e in self._engines for t in e.rounds.everyone() if e.rounds.leave(t)]
            self._wake.notify_all()
        for ticket in left:
            _tell(ticket.work.failed, Draining("DRAINING", "the server shut down before this was done; send the request again"))
        for thread in self._threads:
            thread.join()

    def _idle(self) -> bool:
        return not self._running and not any(e.rounds.tickets for e in self._engines)

    def step(self) -> bool:
        """Do in this thread what is due now: tell the late, run one round. False where nothing was due."""
        with self._wake:
            due = self._take()
        if due is not None:
            self._do(*due)
        return due is not None

    def _work(self) -> None:
        while True:
            with self._wake:
                while (due := self._take()) is None:
                    if self._stopping:
                        return
                    self._wake.wait(self._pause())
            self._do(*due)

    def _take(self) -> tuple[list[tuple[Engine, Ticket]], tuple[Engine, Round] | None] | None:
        """What is due: who is late, and the round to run. The lock is held."""
        late = self._late()
        chosen = self._choose()
        if not late and chosen is None:
            return None
        self._running += 1
        return late, chosen

    def _do(self, late: list[tuple[Engine, Ticket]], chosen: tuple[Engine, Round] | None) -> None:
        try:
            for engine, ticket in late:
                engine.watch.left(engine, [ticket.work], "expired")
                _tell(ticket.work.failed, DeadlineExceeded("DEADLINE_EXCEEDED", "the deadline passed while the request waited"))
            if chosen is not None:
                self._run(*chosen)
        finally:
            with self._wake:
                self._running -= 1
                if self._draining and self._idle():
                    self._wake.notify_all()

    def _choose(self) -> tuple[Engine, Round] | None:
        waiting = [(order, i) for i, e in enumerate(self._engines) if (order := e.rounds.oldest()) is not None]
        if not waiting:
            return None
        engine = self._engines[min(waiting)[1]]
        round = engine.rounds.next()
        return (engine, round) if round is not None else None

    def _late(self) -> list[tuple[Engine, Ticket]]:
        now = self._clock()
        return [(engine, ticket) for engine in self._engines for ticket in engine.rounds.expired(now)]

    def _pause(self) -> float | None:
        deadlines = [d for e in self._engines if (d := e.rounds.wake_at()) is not None]
        return max(0.0, min(deadlines) - self._clock()) if deadlines else None

    def _run(self, engine: Engine, round: Round) -> None:
        started = self._clock()
        for ticket in round.tickets:
            ticket.work.queued += started - ticket.work.since
        graph = round.tickets[0].work.graph
        ran = engine.run(round)
        ended = self._clock()
        seconds = ended - started
        for ticket in round.tickets:
            s = ticket.work
            s.run += seconds
            s.rounds += 1
            s.since = ended
        with self._wake:
            engine.rounds.done(round, seconds)
        engine.watch.round(engine, graph, round.rows, round.steps, seconds)
        again: list[Ticket] = []
        answered: list[Ticket] = []
        for ticket, error in ran:
            if ticket.gone:
                continue
            s = ticket.work
            if error is not None:
                self._leave(engine, [ticket], "failed")
                _tell(s.failed, error)
            elif ticket.remaining:
                again.append(ticket)
            else:
                try:
                    engine.answer(s)
                except Exception as e:
                    log.exception("model %s: an answer could not be made", engine.name)
                    self._leave(engine, [ticket], "failed")
                    _tell(s.failed, ModelFailed("ANSWER_FAILED", f"the answer of model {engine.name!r} could not be made: {e}"))
                    continue
                (again if s.going else answered).append(ticket)
        self._leave(engine, answered, "answered")
        try:
            self.after_round()
        except Exception:  # what is done for some sequences of a round must not keep the others from going on
            log.exception("model %s: after a round", engine.name)
        if again:
            self._again(engine, again)

    def _again(self, engine: Engine, tickets: list[Ticket]) -> None:
        with self._wake:
            for ticket in tickets:
                if ticket.gone:
                    continue
                s = ticket.work
                if ticket.remaining:
                    engine.rounds.again(ticket)
                else:
                    graph = engine.graphs[s.graph].graph
                    engine.rounds.turn(ticket, _key(engine, s), s.rows, s.steps, cut=graph.cut, shared=graph.shared)
            self._wake.notify(1)

    def _leave(self, engine: Engine, tickets: list[Ticket], how: str) -> None:
        if tickets:
            with self._wake:
                for ticket in tickets:
                    engine.rounds.leave(ticket)
                if engine.retired and not engine.rounds.tickets:
                    self._engines = [e for e in self._engines if e is not engine]
            engine.watch.left(engine, [ticket.work for ticket in tickets], how)


def _key(engine: Engine, s: Sequence) -> tuple[object, ...]:
    """What must be equal for sequences to share a round: the graph, other named lengths, the round's constants."""
    graph = engine.graphs[s.graph].graph
    if not graph.constants:
        return (s.graph, s.named)
    return (s.graph, s.named, *(s.inputs[name].tobytes() for name in graph.constants))


def _tell(failed: Callable[[ServeError], None], error: ServeError) -> None:
    try:
        failed(error)
    except Exception:  # a caller's own callback must not end a worker
        log.exception("an error could not be delivered")
