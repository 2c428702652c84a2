"""How the turns of live sessions are run: `sessions.py` decides, the engine runs, `shelf.py` keeps, this file joins them.

A turn runs as a sequence from the session's state, or as a row of one, with other sessions' turns that arrived with it
(abreast.py). Turns sent ahead follow at once, as one longer sequence where they may be joined (joined.py), else one after another.
All turns that a round completed are stored and applied together after it, and only then answered; what fails changes nothing. A
caller that leaves does not stop a turn that was begun: it may come back for the reply. A session has at most one sequence under way.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Listed
from contextlib import suppress
from weakref import ref

from server import abreast
from server.catalog import Model
from server.engine import Clock
from server.errors import Conflict, ModelFailed, ServeError
from server.inputs import Sizes
from server.joined import join, joinable, part
from server.sequence import Inputs, Packed, Sequence, Views
from server.sessions import Begun, Kept, Pending, Session
from server.shares import ANYONE, Claim
from server.shelf import Memory, Shelf, taken
from server.states import Rows, settle
from server.workers import Workers

log = logging.getLogger(__name__)

Told = Callable[[bytes | ServeError], None]
# One session that nobody uses must not keep a whole round's bank of states; but to give it state of its own costs a copy, which is lost
# where its next turn was about to come. So that is after as many turns as sessions are in memory, and OWNED_AFTER rounds; but after twice
# as many turns at the latest, or OWNED_TURNS where sessions are few: a device has slots for three times the sessions.
OWNED_AFTER = 64
OWNED_TURNS = 4096


class Plan:
    """How one turn is run: `inputs` are read for good, `glance` only for this turn's answer. `answer` makes the reply of the outputs
    and of what ran, which knows how long it took. `more`, where there is one, is
    asked after each run what is read next; when there is nothing more it may have set `rest`, and `fresh`, which leaves the
    session a state that has read nothing. No dataclass, since one is made for each turn."""

    __slots__ = ("answer", "fresh", "glance", "inputs", "more", "rest")

    def __init__(
        self, answer: Callable[[Views, Sequence], bytes], rest: str = "", inputs: tuple[Inputs | Packed, Sizes] | None = None,
        glance: tuple[Inputs | Packed, Sizes] | None = None,
    ) -> None:  # fmt: skip
        self.answer = answer
        self.rest = rest
        self.inputs = inputs
        self.glance = glance
        self.more: Callable[[Views], tuple[Inputs, Sizes] | None] | None = None
        self.fresh = False


class Turn(ABC):
    """What a caller brings, and the caller. The fields are of the file that runs it."""

    __slots__ = ("after", "alone", "claim", "joined", "model", "plan", "sequence", "session", "turns")

    def __init__(self, claim: Claim = ANYONE) -> None:
        self.claim = claim  # without a deadline: a turn that was begun is run
        self.plan: Plan | None = None
        self.joined: tuple[Turn, ...] = ()  # the turns behind it that run along
        self.alone = False  # it failed together with others: whose fault that was is seen when each runs alone
        self.after: Rows | None = None  # the state to keep, while the glance runs
        self.sequence: Sequence | None = None  # while it is under way

    @abstractmethod
    def brought(self, model: Model, rest: str) -> Plan:
        """How it is run, given the model and what the session has not yet read. Raises InvalidInput."""

    @abstractmethod
    def told(self, reply: bytes | ServeError) -> None:
        """Its reply, or why there is none. Called once."""

    def flush(self) -> None:
        """All that this round had to tell was told."""
        return

    def _ran(self, sequence: Sequence, outputs: Views) -> None:
        self.turns.ran(self, sequence, outputs)

    def _failed(self, error: ServeError) -> None:
        if self.joined:
            self.turns.apart(self)
        else:
            self.turns.failed(self.session, error)

    turns: Turns
    session: Session
    model: Model

    def ready(self, turns: Turns, session: Session, model: Model) -> None:
        """See how it is run from the session's state. Raises InvalidInput."""
        self.turns, self.session, self.model = turns, session, model
        memory: Memory = session.state
        self.plan = self.brought(model, memory.rest)

    def start(self, behind: Listed[Turn] = ()) -> None:
        """Run, with those behind it that may be joined. It is ready. Raises Overloaded, Draining."""
        model, plan = self.model, self.plan
        memory: Memory = self.session.state
        assert plan is not None, "it is ready"
        part = plan.inputs or plan.glance
        assert part is not None, "a plan runs something"
        self.joined = self._join(behind, min(model.engine.rounds.limits.chunk, model.bundle.graph.max_time)) if behind else ()
        if self.joined:
            part = join([p for turn in (self, *self.joined) if (p := turn.packed) is not None])
        self.sequence = Sequence(model.bundle.main, *part, self._ran, self._failed, memory.rows)
        model.engine.submit(self.sequence, self.claim)

    @property
    def packed(self) -> tuple[Packed, Sizes] | None:
        """What it brought, where that is all there is to it and may be joined with what others brought."""
        plan = self.plan
        if plan is None or plan.inputs is None or plan.glance is not None or plan.more is not None or plan.rest:
            return None
        inputs, sizes = plan.inputs
        return (inputs, sizes) if isinstance(inputs, tuple) else None

    def _join(self, behind: Listed[Turn], most: int) -> tuple[Turn, ...]:
        """Those that run along, so that all are of `most` steps: more would keep the first waiting for rounds that are not its
        own."""
        mine = self.packed
        if mine is None or self.alone:
            return ()
        joined: list[Turn] = []
        steps = mine[1].steps
        for turn in behind:
            if turn.alone or steps >= most:
                break
            try:
                turn.plan = turn.brought(self.model, "")
            except Exception:  # it is told so when it is its time to run
                break
            brought = turn.packed
            if brought is None or steps + brought[1].steps > most:
                break
            steps += brought[1].steps
            joined.append(turn)
        return tuple(joined)

    def cancel(self) -> None:
        """Stop what runs for it."""
        if self.sequence is not None:
            self.model.engine.cancel(self.sequence)


class Asked(Turn):
    """A turn made of functions."""

    __slots__ = ("_brought", "_told")

    def __init__(self, brought: Callable[[Model, str], Plan], told: Told) -> None:
        super().__init__()
        self._brought = brought
        self._told = told

    def brought(self, model: Model, rest: str) -> Plan:
        return self._brought(model, rest)

    def told(self, reply: bytes | ServeError) -> None:
        self._told(reply)


class _Ran:
    """Turns of a session that ran and are not yet applied: their replies, and the state after the last."""

    __slots__ = ("memory", "replies", "session")

    def __init__(self, session: Session, replies: Listed[bytes], memory: Memory) -> None:
        self.session = session
        self.replies = replies
        self.memory = memory


_Shared = list[tuple["ref[Session]", int]]
"""Sessions, and the turn after which each shared a round's bank. It keeps none of them, nor what it remembers: what is closed, put away or
has gone on leaves its bank at once."""


class _Round(threading.local):
    """What the round of this thread completed."""

    def __init__(self) -> None:
        self.ran: list[_Ran] = []


class Turns:
    """Runs the turns of all live sessions."""

    def __init__(self, shelf: Shelf, workers: Workers, clock: Clock = time.monotonic) -> None:
        self.shelf = shelf
        self._sessions = shelf.sessions
        self._lock = shelf.lock
        self._clock = clock
        self._few = min(OWNED_TURNS, shelf.most_resident)
        self._round = _Round()
        self._shared: deque[_Shared] = deque()  # by round, those whose states may still lie in its bank
        self._sharing = 0  # turns of these rounds
        self._errands = shelf.errands if shelf.keeps else None
        self._waiting: deque[list[_Ran]] = deque()  # by round, for a store that takes its time
        self._workers = workers
        self._ready: list[Session] = []  # whose first turn in line is to run, of this round of the front's thread
        workers.after_round = self._after_round
        workers.gather = self._gather

    def turn(self, id: str, turn: int | None, digest: bytes, work: Turn, acknowledged: int | None, *, sure: bool = False) -> None:
        """Take a turn; it is told once of its reply or why there is none, from this thread or a worker's. Be `sure`, and ask the
        store, before a refusal is passed on, where other servers may have gone on with the session.

        A caller that does not number its turns (None) means the next, and can't send one again; one that acknowledges
        nothing (None) has the reply of every turn before this one.
        """
        sessions = self._sessions
        with self._lock:
            session = None if sure else sessions.live(id)
            if session is not None:
                begun = self._begin(session, turn, digest, work, acknowledged)
        if session is None:
            with self.shelf.held(id) as session:
                begun = self._begin(session, turn, digest, work, acknowledged)
        if begun.reply is not None:
            work.told(begun.reply)
        elif begun.run:
            if self._workers.gathers:  # others may come with it: see what can run together when all that arrived was taken
                self._ready.append(session)
                self._workers.bring()
            else:
                self._run(session)

    def _begin(self, session: Session, turn: int | None, digest: bytes, work: Turn, acknowledged: int | None) -> Begun:
        if turn is None:
            turn = session.next
            digest = b""
        if acknowledged is None:
            acknowledged = max(0, min(turn - 1, session.turn))
        return self._sessions.begin(session, turn, digest, work, acknowledged, self._clock())

    def close(self, id: str) -> Kept:
        """End a session; turns under way are told that it is closed."""
        with self.shelf.held(id):
            pass  # it is in memory now
        kept = self._end(id, "closed")
        self.shelf.end(id)
        return kept

    def _end(self, id: str, why: str) -> Kept:
        with self._lock:
            session = self._sessions.close(id, why)
            dropped = self._sessions.abort(session)
            told: ServeError = taken(session) if why == "taken" else self._sessions.ended(id)
        if dropped:
            dropped[0].work.cancel()
            self._tell(dropped, told)
            self._flush(dropped)
        return session.kept

    def _gather(self) -> None:
        """The front's thread has taken what had arrived."""
        if self._ready:
            ready, self._ready = self._ready, []
            self._run_all(ready)

    def _run_all(self, sessions: Listed[Session]) -> None:
        """Start the first turn in line of each session; those that may, as rows of one sequence."""
        if len(sessions) == 1:
            self._run(sessions[0])
            return
        lots: dict[tuple[object, ...], list[Turn]] = {}
        fits: dict[int, bool] = {}  # by model
        for session in sessions:
            work = self._first(session)
            if work is None:
                continue
            part, model, claim = work.packed, work.model, work.claim
            fit = fits.get(id(model))
            if fit is None:
                fit = fits[id(model)] = abreast.sharable(model.bundle.graph)
            if part is None or not fit or work.alone or len(session.line) > 1:
                self._start(work)
                continue
            where = abreast.home(session.state.rows) if model.engine.others else None
            lots.setdefault((id(model), part[1].steps, claim.flow, claim.level, claim.deadline, where), []).append(work)
        for lot in lots.values():
            limits = lot[0].model.engine.rounds.limits
            for works in abreast.lots(lot, limits.share, limits.workers):
                if len(works) == 1:
                    self._start(works[0])
                else:
                    self._start_abreast(works)

    def _run(self, session: Session) -> None:
        """Start the first turn in line, from the session's state."""
        work = self._first(session)
        if work is not None:
            self._start(work)

    def _first(self, session: Session) -> Turn | None:
        """The first turn in line, which knows how it is run; None where it can't be, which it was told."""
        try:
            work: Turn = session.line[0].work
        except IndexError:  # closed meanwhile
            return None
        try:
            work.ready(self, session, self.shelf.runs(session))
        except Exception as e:  # a task's bug must end this turn, not leave the session waiting for it
            self._not_run(session, e)
            return None
        return work

    def _start(self, work: Turn) -> None:
        session = work.session
        try:
            behind: list[Turn] = []
            if len(session.line) > 1 and joinable(work.model.bundle.graph):
                with self._lock:
                    behind = [pending.work for pending in itertools.islice(session.line, 1, None)]
            work.start(behind)
        except Exception as e:  # likewise
            self._not_run(session, e)

    def _start_abreast(self, works: Listed[Turn]) -> None:
        first = works[0]
        try:
            parts = [part for work in works if (part := work.packed) is not None]
            states = [work.session.state.rows for work in works]
            sequence = abreast.Abreast(works, self._ran_abreast, self.apart).sequence(first.model.bundle.main, parts, states)
            first.model.engine.submit(sequence, first.claim)
        except Exception as e:  # likewise
            for work in works:
                self._not_run(work.session, e)

    def _not_run(self, session: Session, e: Exception) -> None:
        if not isinstance(e, ServeError):
            log.error("session %s: a turn could not be run", session.id, exc_info=e)
            e = ModelFailed("TURN_FAILED", f"the turn could not be run: {e}")
        self.failed(session, e)

    def apart(self, work: Turn) -> None:
        """Turns that ran together failed: each runs alone, so that only the culprit is told."""
        session = work.session
        for turn in (work, *work.joined):
            turn.alone = True
        work.joined = ()
        with self._lock:
            there = bool(session.line) and session.line[0].work is work
        if there:
            self._run(session)

    def ran(self, work: Turn, sequence: Sequence, outputs: Views) -> None:
        """The turn's steps ran: glance ahead if it needs to, else it is ready to be applied when the round is over."""
        session = work.session
        if not session.line or session.line[0].work is not work:
            return  # closed meanwhile
        if sequence is work.sequence:
            work.sequence = None  # they know each other: leave no ring for the garbage collector
        plan = work.plan
        assert plan is not None
        if plan.more is not None and (following := plan.more(outputs)) is not None:
            work.sequence = sequence
            inputs, sizes = following
            sequence.go_on(work.model.bundle.main, inputs, sizes, sequence.state)
            return
        rows: Rows | None
        if plan.fresh:
            rows = None
        elif plan.inputs is None:
            rows = session.state.rows
        elif plan.glance is None:
            rows = sequence.state
        elif work.after is None:
            work.after = sequence.state
            work.sequence = sequence
            glance, sizes = plan.glance
            sequence.go_on(work.model.bundle.main, glance, sizes, sequence.state)
            return
        else:
            rows = work.after
        replies: Listed[bytes]
        if work.joined:
            every = (work, *work.joined)
            parts = part(work.model.bundle.graph, outputs, [brought[1].steps for turn in every if (brought := turn.packed) is not None])
            replies = [turn.plan.answer(views, sequence) for turn, views in zip(every, parts, strict=True) if turn.plan is not None]
            for turn in work.joined:
                turn.plan = None
        else:
            replies = (plan.answer(outputs, sequence),)
        work.plan = plan.more = None  # they may know each other: leave no ring for the garbage collector
        self._round.ran.append(_Ran(session, replies, Memory(rows, plan.rest)))

    def _ran_abreast(self, works: Listed[Turn], sequence: Sequence, outputs: Views) -> None:
        """The same of turns that ran as the rows of one sequence."""
        ran, state = self._round.ran, sequence.state
        assert state is not None, "sessions have states"
        axes, bank, start = state.axes, state.bank, state.start
        for row, work in enumerate(works):
            session, plan = work.session, work.plan
            if not session.line or session.line[0].work is not work:
                continue  # closed meanwhile
            assert plan is not None
            try:
                reply = plan.answer(outputs.row(row), sequence)
                work.plan = None
            except Exception as e:  # what is wrong with one answer is no other's
                self._not_run(session, e)
                continue
            ran.append(_Ran(session, (reply,), Memory(Rows(axes, bank, start + row, 1), "")))

    def _after_round(self) -> None:
        """All turns that a round of this thread completed: store them in one commit, apply them, answer, and go on with what
        waits in line. Stored before they are applied: nobody is told of a turn that a crash could undo."""
        ran = self._round.ran
        if not ran:
            return
        self._round.ran = []
        if self._errands is None:
            self._apply(ran)
            return
        # A flushed commit or a trip to Redis would keep this thread from the next round, and the front's from everyone's calls.
        self._waiting.append(ran)
        self._errands.commit(self._apply_waiting)

    def _apply_waiting(self) -> None:
        """All rounds that wait for the store, in one commit."""
        ran: list[_Ran] = []
        while self._waiting:
            ran += self._waiting.popleft()
        if ran:
            self._apply(ran)

    def _apply(self, ran: list[_Ran]) -> None:
        moved: frozenset[str] = frozenset()
        if self.shelf.keeps:
            ran, moved = self._store(ran)
            if not ran:
                return
        told: list[tuple[Session, list[Pending], Listed[bytes]]] = []
        shared: _Shared = []
        now = self._clock()
        with self._lock:
            for r in ran:
                session = r.session
                if session.id in moved:
                    continue
                if not session.line:  # closed meanwhile: whoever closed it waits, to end it in the store after this
                    continue
                told.append((session, self._sessions.commit(session, r.replies, r.memory, now), r.replies))
                shared.append((ref(session), session.turn))
            old = self._grown_old(shared)
            if self.shelf.keeps:  # before anyone is told, who may end one of these
                self.shelf.settled([r.session.id for r in ran])
        for _, done, replies in told:
            for pending, reply in zip(done, replies, strict=True):
                self._deliver(pending.work, reply)
                for work in pending.again:
                    self._deliver(work, reply)
        following = self._told([session for session, _, _ in told])
        self._flush(pending for _, done, _ in told for pending in done)
        if following:
            self._run_all(following)
        if old:
            self._own(old)
        for id in moved:
            with suppress(ServeError):  # closed meanwhile
                self._end(id, "taken")
        self.shelf.put_away()

    def _told(self, sessions: Listed[Session]) -> list[Session]:
        """All that was applied was told of: tell those as well who sent it again meanwhile. Gives the sessions that go on."""
        following: list[Session] = []
        while sessions:
            with self._lock:
                repeated = [(session, again) for session in sessions if (again := self._sessions.told(session))]
                following += [session for session in sessions if session.line and not session.telling]
            for work, reply in (each for _, again in repeated for each in again):
                self._deliver(work, reply)
                work.flush()
            sessions = [session for session, _ in repeated]
        return following

    def _store(self, ran: list[_Ran]) -> tuple[list[_Ran], frozenset[str]]:
        """Store what was run; gives what was stored, and the ids of it that another server has taken up since. The rest was told of
        its failure: of several that can't be stored at once, the one that can't be stored at all. Those given back are unsettled."""
        with self._lock:
            kept = [self._sessions.applied(r.session, r.replies, r.memory) for r in ran if r.session.line]
            self.shelf.unsettled.update([r.session.id for r in ran])
        try:
            return ran, self.shelf.write(kept)
        except Exception as e:  # whatever the store's trouble, each caller must be told, and no session be left waiting
            if len(ran) > 1 and not isinstance(e, ServeError):
                half = len(ran) // 2
                (first, gone), (second, away) = self._store(ran[:half]), self._store(ran[half:])
                return first + second, gone | away
            if not isinstance(e, ServeError):
                log.exception("turns could not be stored")
                e = ModelFailed("STORE_FAILED", f"the turn could not be stored: {e}")
            with self._lock:
                self.shelf.settled([r.session.id for r in ran])
            for r in ran:
                self.failed(r.session, e)
            return [], frozenset()

    def _grown_old(self, shared: _Shared) -> _Shared:
        """Turns of rounds so long ago that whoever is used at all was used since. With the lock held."""
        self._shared.append(shared)
        self._sharing += len(shared)
        resident = self._sessions.resident
        most = max(2 * resident, self._few)
        old: _Shared = []
        while (since := self._sharing - len(self._shared[0])) >= resident and (len(self._shared) > OWNED_AFTER or since > most):
            self._sharing = since
            old += self._shared.popleft()
        return old

    def _own(self, shared: _Shared) -> None:
        """States that still lie in an old round's bank get a place of their own."""
        idle: list[tuple[Session, Memory, Rows]] = []
        for at, turn in shared:
            session = at()
            if session is not None and session.turn == turn and (memory := session.state).rows is not None:
                idle.append((session, memory, memory.rows))
        if not idle:
            return
        try:
            settled = settle([rows for _, _, rows in idle])
        except Exception:  # a device's memory is full, say: they stay where they are
            log.exception("idle sessions' states could not be moved")
            return
        with self._lock:
            for (session, memory, rows), own in zip(idle, settled, strict=True):
                if session.state is memory and own is not rows:
                    session.state = Memory(own, memory.rest)

    def failed(self, session: Session, error: ServeError) -> None:
        """The first turn in line could not be run: it is told why, those behind it that they come too early now."""
        with self._lock:
            dropped = self._sessions.abort(session)
        if not dropped:
            return
        id, turn = session.id, session.turn
        error.facts.update(session=id, turn=str(turn))
        self._tell(dropped[:1], error)
        message = f"session {id!r}: turn {turn + 1} before this one failed; send it again first; last applied is turn {turn}"
        self._tell(dropped[1:], Conflict("GAP", message, session=id, turn=turn))
        self._flush(dropped)

    def _tell(self, turns: Iterable[Pending], reply: bytes | ServeError) -> None:
        for pending in turns:
            for work in (pending.work, *pending.again):
                self._deliver(work, reply)

    def _deliver(self, work: Turn, reply: bytes | ServeError) -> None:
        try:
            work.told(reply)
        except Exception:  # one caller's broken stream must not keep others from their replies
            log.exception("a reply could not be delivered")

    def _flush(self, turns: Iterable[Pending]) -> None:
        for pending in turns:
            for work in (pending.work, *pending.again):
                try:
                    work.flush()
                except Exception:
                    log.exception("a reply could not be delivered")
