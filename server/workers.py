"""The one loop: choose → run → answer → choose. All concurrency of the server lives here.

One lock guards every engine's queue; it is held for decisions (microseconds), never during a run. Workers are threads:
each takes the round of whoever has waited longest, over all engines, so no core idles while any model has work. A
round's sequences belong to the thread that runs it until it is done, so they need no lock of their own. Replies leave
from that thread, with no wake-up in between.

The front's thread *attends*: rounds of sequences that cost little in all it runs itself, when it has taken what had arrived.
To hand a round of a millisecond to another thread, and get the interpreter's lock back and forth, costs more than it wins.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Listed
from typing import Protocol

from server.engine import Clock, Engine, Spent, key
from server.errors import DeadlineExceeded, DeviceLost, Draining, ModelFailed, NotFound, ServeError
from server.rounds import Round
from server.sequence import Sequence
from server.shares import Claim
from server.shares import Clock as Virtual

log = logging.getLogger(__name__)


class Onlooker(Protocol):
    """Whoever looks on while rounds run (inside.py). Called by the thread that ran them, so it must be quick and never raise."""

    def round(self, engine: Engine, graph: str, round: Round[Sequence], started: float, ended: float) -> None: ...

    def left(self, engine: Engine, sequences: Listed[Sequence], how: str) -> None: ...


BRIEF = 0.0025  # seconds: the longest round that the thread which brings work runs itself; for a longer one a worker is worth waking
WORTH = 0.001  # seconds of running, over all workers, that a sequence must need in all to be worth handing over


class Workers:
    """The threads that run rounds, for all engines.

    A thread that brings work (the front's) may *attend*: it runs brief rounds itself when nothing more has arrived, and wakes
    a worker only for longer ones. For a round of a millisecond, waking a thread and passing it the interpreter's lock costs
    more than the round; and while it is run, the next ones' rows arrive.
    """

    def __init__(self, threads: int, clock: Clock = time.monotonic, brief: float = BRIEF) -> None:
        self.virtual = Virtual()
        self.after_round: Callable[[], None] = lambda: None  # called by whoever ran a round when all of it was answered
        self.gather: Callable[[], None] = lambda: None  # called by the attendant before it looks for rounds
        self.when_lost: Callable[[DeviceLost], None] = lambda why: None  # called once, when a device can't be used any more
        self.onlooker: Onlooker | None = None  # None while nobody watches: then it costs one look at this
        self._clock = clock
        self._brief = brief
        self.worth = WORTH / max(1, threads)
        self._engines: list[Engine] = []
        self._lock = threading.Lock()  # of `_wake`: to take it by itself costs half as much
        self._wake = threading.Condition(self._lock)
        self._attendant = 0  # the thread that attends
        self._attending = False  # it is about: it will look for brief rounds before it sleeps
        self._brought = 0  # rows, since it last looked
        self._full = 1  # rows that one round takes
        self._asleep = 0
        self._stopping = False
        self._draining = False
        self._lost: DeviceLost | None = None
        self._running = 0
        self._threads = [threading.Thread(target=self._work, name=f"worker-{i}", daemon=True) for i in range(threads)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def add(self, engine: Engine) -> None:
        with self._lock:
            self._engines = [*self._engines, engine]
            self._full = max(e.rounds.limits.rows for e in self._engines)

    def remove(self, engine: Engine) -> None:
        with self._lock:
            self._engines = [e for e in self._engines if e is not engine]

    def retire(self, engine: Engine) -> None:
        with self._lock:
            engine.retired = True
            if not engine.rounds.tickets:
                self._forget(engine)

    def submit(self, engine: Engine, sequence: Sequence, claim: Claim) -> None:
        now = self._clock()
        if claim.deadline is not None and claim.deadline <= now:
            raise DeadlineExceeded("DEADLINE_EXCEEDED", "the deadline had passed when the request arrived")
        with self._lock:
            if engine.retired:
                raise NotFound("UNLOADED", f"model {engine.name!r} version {engine.version} was unloaded", model=engine.name)
            if (e := self._lost) is not None:
                raise DeviceLost(e.reason, e.message, device=e.facts["device"])
            if self._draining:
                raise Draining("DRAINING", "the server is shutting down; send the request again")
            engine.enqueue(sequence, claim, now)
            if self.attended:
                self._brought += sequence.rows
            else:
                self._wake.notify()

    def cancel(self, engine: Engine, sequence: Sequence) -> None:
        with self._lock:
            left = sequence.order > 0 and engine.rounds.leave(sequence)
        if left:
            engine.watch.left(engine, [sequence], "cancelled")

    def waited(self, engine: Engine) -> tuple[float, float]:
        now = self._clock()
        with self._lock:
            since = min((s.since for s in engine.rounds.everyone()), default=now)
            return max(0.0, now - since), engine.rounds.expected_wait() if engine.rounds.tickets else 0.0

    def lost(self, why: DeviceLost) -> None:
        """A device can't be used any more: take nothing new, and tell whoever ends the server."""
        with self._lock:
            first = self._lost is None
            self._lost = self._lost or why
        if first:
            self.when_lost(why)

    def drain(self, seconds: float) -> bool:
        """Take nothing new; wait until what is here is done. False where `seconds` did not suffice."""
        with self._lock:
            self._draining = True
            return self._wake.wait_for(self._idle, seconds)

    def stop(self) -> None:
        """End the threads after the rounds they run; whoever still waits is told."""
        with self._lock:
            self._draining = self._stopping = True
            left = [s for e in self._engines for s in e.rounds.everyone() if e.rounds.leave(s)]
            self._wake.notify_all()
        for s in left:
            _tell(s.failed, Draining("DRAINING", "the server shut down before this was done; send the request again"))
        for thread in self._threads:
            thread.join()

    def _idle(self) -> bool:
        return not self._running and not any(e.rounds.tickets for e in self._engines)

    def step(self) -> bool:
        """Do in this thread what is due now: tell the late, run one round. False where nothing was due."""
        with self._lock:
            due = self._take()
        if due is not None:
            self._do(*due)
        return due is not None

    def attend(self) -> None:
        """From now until `brief` says otherwise, what this thread submits is left to it where it is brief."""
        self._attendant = threading.get_ident()
        self._attending = True

    @property
    def attended(self) -> bool:
        """Whether this thread attends."""
        return self._attending and threading.get_ident() == self._attendant

    @property
    def gathers(self) -> bool:
        """Whether what this thread is about to submit may wait until it is to `gather`: others may come by then."""
        return self.attended

    def bring(self) -> None:
        """The attendant has a row more to submit when it is to gather."""
        self._brought += 1

    @property
    def enough(self) -> bool:
        """Whether the attendant brought a full round's rows since it last looked."""
        return self._brought >= self._full

    def brief(self) -> bool:
        """Run one brief round in this thread. False where there is none: then workers were woken for what else there is, and
        take what comes, until this thread attends again."""
        self.gather()
        with self._lock:
            chosen = None
            now = self._clock()
            late = self._late(now)
            engines = [e for e in self._engines if e.rounds.waiting_rows]
            if engines and not self._stopping:
                brief = [e for e in engines if e.brief(self._brief)]
                if brief:
                    engine = brief[0] if len(brief) == 1 else min(brief, key=lambda e: e.rounds.first() or 0.0)
                    round = engine.rounds.next(now, 1)
                    if round is not None:
                        chosen = (engine, round)
                if self._asleep and len(engines) > len(brief):
                    self._wake.notify()
            self._brought = sum(e.rounds.waiting_rows for e in engines)
            if chosen is None and not late:
                self._attending = False
                if engines and self._asleep:
                    self._wake.notify()
                return False
            self._running += 1
        self._do(late, chosen)
        return True

    def _work(self) -> None:
        while True:
            with self._lock:
                while (due := self._take(worker=True)) is None:
                    if self._stopping:
                        return
                    self._asleep += 1
                    self._wake.wait(self._pause())
                    self._asleep -= 1
                if self._asleep and any(e.rounds.waiting_rows for e in self._engines):
                    self._wake.notify()
            self._do(*due)

    def _take(self, worker: bool = False) -> tuple[list[tuple[Engine, Sequence]], tuple[Engine, Round[Sequence]] | None] | None:
        """What is due: who is late, and the round to run. The lock is held."""
        now = self._clock()
        late = self._late(now)
        chosen = self._choose(worker, now)
        if not late and chosen is None:
            return None
        self._running += 1
        return late, chosen

    def _do(self, late: Listed[tuple[Engine, Sequence]], chosen: tuple[Engine, Round[Sequence]] | None) -> None:
        try:
            for engine, s in late:
                engine.watch.left(engine, [s], "expired")
                message = "the deadline passed while the request waited, or can't be met any more"
                _tell(s.failed, DeadlineExceeded("DEADLINE_EXCEEDED", message))
            if chosen is not None:
                self._run(*chosen)
        finally:
            with self._lock:
                self._running -= 1
                if self._draining and self._idle():
                    self._wake.notify_all()

    def _choose(self, worker: bool, now: float) -> tuple[Engine, Round[Sequence]] | None:
        """The round of whoever is first in the order of shares, over all engines; brief ones are left to a thread that attends."""
        best: Engine | None = None
        first = 0.0
        for engine in self._engines:
            if engine.rounds.waiting_rows and not (worker and self._attending and engine.brief(self._brief)):
                order = engine.rounds.first()
                if order is not None and (best is None or order < first):
                    best, first = engine, order
        round = best.rounds.next(now) if best is not None else None
        return (best, round) if best is not None and round is not None else None

    def _late(self, now: float) -> list[tuple[Engine, Sequence]]:
        return [(engine, s) for engine in self._engines for s in engine.rounds.expired(now)]

    def _pause(self) -> float | None:
        deadlines = [d for e in self._engines if (d := e.rounds.wake_at()) is not None]
        return max(0.0, min(deadlines) - self._clock()) if deadlines else None

    def _run(self, engine: Engine, round: Round[Sequence]) -> None:
        sequences = round.tickets
        count = sum([s.count for s in sequences])
        started = self._clock()
        graph = sequences[0].graph
        spent = Spent()
        failed = engine.run(round, spent)
        ended = self._clock()
        seconds = spent.seconds = ended - started
        for s in sequences:
            s.queued += started - s.since
            s.run += seconds
            s.rounds += 1
            s.since = ended
        with self._lock:
            row_steps = engine.rounds.done(round, seconds)
        rows = round.rows
        engine.watch.round(engine, graph, count, rows, round.steps, row_steps, spent)
        if (onlooker := self.onlooker) is not None:
            onlooker.round(engine, graph, round, started, ended)
        again: list[Sequence] = []
        answered: list[Sequence] = []
        for s in sequences:
            if s.gone:
                continue
            if failed and s in failed:
                self._leave(engine, [s], "failed" if s.count == 1 else "apart")
                _tell(s.failed, failed[s])
            elif s.remaining:
                again.append(s)
            else:
                try:
                    engine.answer(s)
                except Exception as e:
                    if not isinstance(e, ServeError):  # which is the caller's to mend: shared memory too small for an output
                        log.exception("model %s: an answer could not be made", engine.name)
                        e = ModelFailed("ANSWER_FAILED", f"the answer of model {engine.name!r} could not be made: {e}")
                    self._leave(engine, [s], "failed")
                    _tell(s.failed, e)
                    continue
                (again if s.going else answered).append(s)
        told = sum([s.count for s in answered])
        if answered:
            engine.watch.told(engine, rows, told, self._clock() - ended)
            self._leave(engine, answered, "answered")
        with self._lock:
            engine.ran(spent.own, told)
        try:
            self.after_round()
        except Exception:  # what is done for some sequences of a round must not keep the others from going on
            log.exception("model %s: after a round", engine.name)
        if again:
            self._again(engine, again)

    def _again(self, engine: Engine, sequences: Listed[Sequence]) -> None:
        with self._lock:
            for s in sequences:
                if s.gone:
                    continue
                if s.remaining:
                    engine.rounds.again(s)
                else:
                    graph = engine.graphs[s.graph].graph
                    engine.rounds.turn(s, key(engine, s), s.rows, s.steps, cut=graph.cut, shared=graph.shared, padded=graph.padded)
            if self._asleep and not self.attended:
                self._wake.notify()

    def _leave(self, engine: Engine, sequences: list[Sequence], how: str) -> None:
        if sequences:
            with self._lock:
                for s in sequences:
                    engine.rounds.leave(s)
                if engine.retired and not engine.rounds.tickets:
                    self._forget(engine)
            engine.watch.left(engine, sequences, how)
            if (onlooker := self.onlooker) is not None:
                onlooker.left(engine, sequences, how)

    def _forget(self, engine: Engine) -> None:
        """A retired engine has nothing left to do: whoever still knows it must not keep its graphs, and what they have on a device."""
        self._engines = [e for e in self._engines if e is not engine]
        engine.graphs = {}


def _tell(failed: Callable[[ServeError], None], error: ServeError) -> None:
    try:
        failed(error)
    except Exception:  # a caller's own callback must not end a worker
        log.exception("an error could not be delivered")
