"""Live sessions: `sessions.py` decides, the engine runs, this file joins them.

A turn runs as a sequence from the session's state; turns sent ahead follow at once, one after another. All turns that a
round completed are applied together after it, and only then answered; what fails changes nothing. A caller that leaves
does not stop a turn that was begun: it may come back for the reply.

One lock guards all sessions; it is held for decisions, never during a run. A session has at most one sequence under way.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from server.catalog import Catalog, Model
from server.engine import Clock, Workers
from server.errors import Conflict, Gone, InvalidInput, ModelFailed, NotFound, ServeError, listed
from server.inputs import Array, Sizes
from server.records import Record, Unreadable, decode, encode, fits
from server.sequence import Outputs, Sequence
from server.sessions import Kept, Pending, Session, Sessions
from server.states import Rows
from server.store import Durability, MemoryStore, Refusal, Store

log = logging.getLogger(__name__)

ID_LENGTH = 128
Told = Callable[[bytes | ServeError], None]


@dataclass(frozen=True, slots=True)
class Memory:
    """What a session remembers: its row of state, and what of the input is not yet read (half a word)."""

    rows: Rows | None = None
    rest: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """How one turn is run: `inputs` are read for good, `glance` only for this turn's answer."""

    answer: Callable[[Outputs], bytes]
    rest: str = ""
    inputs: tuple[dict[str, Array], Sizes] | None = None
    glance: tuple[dict[str, Array], Sizes] | None = None


class Brought(Protocol):
    """What a turn brings: it plans itself, given the model and what the session has not yet read. Raises InvalidInput."""

    def __call__(self, model: Model, rest: str) -> Plan: ...


@dataclass(slots=True, eq=False)
class _Turn:
    """The work of a pending turn."""

    brought: Brought
    told: Told
    plan: Plan | None = None
    after: Rows | None = None  # the state to keep, while the glance runs
    sequence: Sequence | None = field(default=None)


@dataclass(frozen=True, slots=True)
class _Ran:
    """A turn that ran and is not yet applied."""

    session: Session
    reply: bytes
    memory: Memory


class _Round(threading.local):
    """What the round of this thread completed."""

    def __init__(self) -> None:
        self.ran: list[_Ran] = []


class Turns:
    """All live sessions of a server."""

    def __init__(
        self,
        catalog: Catalog,
        workers: Workers,
        store: Store,
        most: int,
        resident: int,
        ttl: float,
        clock: Clock = time.monotonic,
        wall: Clock = time.time,
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._wall = wall  # records outlive the process whose monotonic clock counts
        self._unfit: dict[str, ServeError] = {}  # stored sessions that can't be taken up
        workers.after_round = self._after_round
        self._resident = resident  # sessions in memory; more are open in the store
        self._ttl = ttl
        self._clock = clock
        self._sessions = Sessions(most)
        self._wake = threading.Condition(threading.Lock())
        self._stopping = False
        self._round = _Round()
        self._expiry = threading.Thread(target=self._expire, name="session-expiry", daemon=True)

    def start(self) -> None:
        """Take up what survived, and begin to expire."""
        for found in () if self._store.shared else self._store.scan():
            if isinstance(found, Refusal):
                log.error("a stored session%s is refused: %s: %s", f" {found.id!r}" if found.id else "", found.reason, found.message)
                if found.id:
                    message = f"session {found.id!r} can't be read from the store: {found.message}; open a new one"
                    self._unfit[found.id] = Gone("RECORD_" + found.reason, message, session=found.id)
                continue
            try:
                self._take_up(found)
            except ServeError as e:
                log.error("stored session %r is refused: %s", found.kept.id, e.message)
                self._unfit[found.kept.id] = e
            self._put_away()
        with self._wake:
            if len(self._sessions):
                log.info("took up %d sessions", len(self._sessions))
        self._expiry.start()

    def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        self._expiry.join()
        if self._store.durability is Durability.NONE:
            self._write([session.kept for session in self._sessions.all()], always=True)
        self._store.close()

    def open(self, model: str, version: str, id: str = "", ttl: float = 0.0) -> Kept:
        """A new session of a model. Raises NotFound, InvalidInput, Conflict or Overloaded."""
        found = self._catalog.find(model, version)
        if not found.bundle.graph.states:
            raise InvalidInput("NO_STATE", f"model {found.name!r} keeps no state: call it without a session", model=found.name)
        if found.bundle.kind == "translate":
            raise InvalidInput("NO_TURNS", f"model {found.name!r} answers whole texts: call Translate or TranslateStream", model=found.name)
        _check_id(id)
        if not 0 <= ttl <= 1e9:
            raise InvalidInput("BAD_TTL", f"ttl {ttl}; allowed are 0 (the default, {self._ttl:g} s) to 1e9 seconds", got=ttl)
        kept = Kept(id or _new_id(), found.name, found.version, found.bundle.fingerprint, ttl or self._ttl, state=Memory())
        self._find(kept.id)
        with self._wake:
            self._sessions.open(kept, self._clock())
            self._wake.notify_all()
        self._keep(kept)
        return kept

    def _keep(self, kept: Kept) -> None:
        """Store a session just made; where that fails it was not made."""
        try:
            self._write([kept])
        except ServeError:
            with self._wake:
                self._sessions.close(kept.id)
            raise
        self._put_away()

    def turn(self, id: str, turn: int | None, digest: bytes, brought: Brought, acknowledged: int | None, told: Told) -> None:
        """Take a turn; `told` is called once with its reply or why there is none, from this thread or a worker's.

        A caller that does not number its turns (None) means the next, and can't send one again; one that acknowledges
        nothing (None) has the reply of every turn before this one.
        """
        with self._held(id) as session:
            if turn is None:
                turn = session.next
            if acknowledged is None:
                acknowledged = max(0, min(turn - 1, session.kept.turn))
            begun = self._sessions.begin(id, turn, digest, _Turn(brought, told), acknowledged, self._clock())
        if begun.reply is not None:
            told(begun.reply)
        elif begun.run:
            self._run(session)

    def lives(self, id: str) -> bool:
        self._find(id)
        with self._wake:
            return id in self._sessions

    def get(self, id: str) -> Kept:
        with self._held(id) as session:
            return session.kept

    def page(self, after: str, limit: int) -> tuple[list[Kept], int]:
        """Sessions by id, at most `limit` from the first id after `after`; and how many there are in all."""
        with self._wake:
            ids = self._sessions.ids()
        found = []
        for id in itertools.islice((i for i in ids if i > after), limit):
            with suppress(Gone, NotFound):  # it ended meanwhile
                found.append(self.get(id))
        return found, len(ids)

    def fork(self, id: str, new: str = "") -> Kept:
        """Another session that goes on from the last applied turn of this one."""
        _check_id(new)
        with self._held(id):
            kept = self._sessions.fork(id, new or _new_id(), self._clock()).kept
            self._wake.notify_all()
        self._keep(kept)
        return kept

    def export(self, id: str, move: bool) -> tuple[bytes, dict[int, bytes]]:
        """A session as its record, and pages of replies; `move` ends it here. Raises Conflict where turns are under way."""
        with self._held(id) as session:
            kept = session.kept
            if move and session.line:
                message = f"session {id!r} has turns under way; read their replies first; last applied is turn {kept.turn}"
                raise Conflict("BUSY", message, session=id, turn=kept.turn)
            if move:
                self._sessions.close(id, "moved")
        if move:
            self._write((), [id])
        value, _, added, _ = encode(_record(kept, self._wall() + kept.ttl))
        return value, dict(added)

    def bring(self, record: bytes, pages: Mapping[int, bytes], id: str = "") -> Kept:
        """Take up a session that was exported, under its own id or another. Raises InvalidInput for bytes that are none,
        Gone where another model made its state, Conflict where its id lives."""
        _check_id(id)
        try:
            found = decode(record, pages.get).record
        except Unreadable as e:
            raise InvalidInput("RECORD_" + e.reason, f"what was sent is no exported session: {e}") from None
        kept = replace(found.kept, id=id or found.kept.id)
        self._find(kept.id)
        self._take_up(replace(found, kept=kept, expires=self._wall() + kept.ttl))
        with self._wake:
            self._unfit.pop(kept.id, None)
            kept = self._sessions.find(kept.id).kept
        self._keep(kept)
        return kept

    def close(self, id: str) -> Kept:
        """End a session; turns under way are told that it is closed."""
        with self._held(id):
            pass  # it is in memory now
        kept = self._end(id, "closed")
        self._write((), [id])
        return kept

    def _end(self, id: str, why: str) -> Kept:
        with self._wake:
            session = self._sessions.close(id, why)
            dropped = self._sessions.abort(session)
            told = self._sessions.ended(id)
        if dropped:
            sequence = dropped[0].work.sequence
            if sequence is not None:
                self._catalog.find(session.kept.model, session.kept.version).engine.cancel(sequence)
            self._tell(dropped, told)
        return session.kept

    def _run(self, session: Session) -> None:
        """Start the first turn in line, from the session's state."""
        first = session.line[0]
        try:
            model = self._model(session.kept)
            inputs, sizes = self._plan(model, session, first)
            sequence = Sequence(
                model.bundle.main, inputs, sizes, lambda s, o: self._ran(model, session, s, o), lambda e: self._failed(session, e),
                session.kept.state.rows,
            )  # fmt: skip
            first.work.sequence = sequence
            model.engine.submit(sequence)
        except ServeError as e:
            self._failed(session, e)
        except Exception as e:  # a task's bug must end this turn, not leave the session waiting for it
            log.exception("session %s: a turn could not be run", session.kept.id)
            self._failed(session, ModelFailed("TURN_FAILED", f"the turn could not be run: {e}"))

    def _plan(self, model: Model, session: Session, pending: Pending) -> tuple[dict[str, Array], Sizes]:
        work: _Turn = pending.work
        plan = work.plan = work.brought(model, session.kept.state.rest)
        part = plan.inputs or plan.glance
        assert part is not None, "a plan runs something"
        return part

    def _ran(self, model: Model, session: Session, sequence: Sequence, outputs: Outputs) -> None:
        """The turn's steps ran: glance ahead if it needs to, else apply it, answer, and go on with the next in line."""
        first = session.line[0] if session.line else None
        if first is None:
            return  # closed meanwhile
        work: _Turn = first.work
        plan = work.plan
        assert plan is not None
        if plan.inputs is not None and plan.glance is not None and work.after is None:
            work.after = sequence.state
            sequence.go_on(model.bundle.main, *plan.glance, sequence.state)
            return
        rows = session.kept.state.rows
        if plan.inputs is not None:
            rows = work.after or sequence.state
            assert rows is not None
            rows = rows.own(model.bundle.graph)  # a view would keep the whole round's bank for one idle session
        self._round.ran.append(_Ran(session, plan.answer(outputs), Memory(rows, plan.rest)))

    def _after_round(self) -> None:
        """All turns that a round of this thread completed: store them in one commit, apply them, answer, and go on with what
        waits in line. Stored before they are applied: nobody is told of a turn that a crash could undo."""
        ran, self._round.ran = self._round.ran, []
        if not ran:
            return
        with self._wake:
            applied = [(t, self._sessions.applied(t.session, [t.reply], t.memory)) for t in ran if t.session.line]
        try:
            moved = self._write([kept for _, kept in applied])
        except ServeError as e:
            for turn, _ in applied:
                self._failed(turn.session, e)
            return
        for turn, kept in applied:
            if kept.id in moved:
                self._end(kept.id, "moved")
                continue
            with self._wake:
                over = not turn.session.line  # closed meanwhile: it must not come back from the store
                done = [] if over else self._sessions.commit(turn.session, kept, self._clock())
                following = bool(turn.session.line)
            if over:
                self._store.write((), [kept.id])
            self._tell(done, turn.reply)
            if following:
                self._run(turn.session)

    def _write(self, every: Iterable[Kept], removed: Iterable[str] = (), *, always: bool = False) -> frozenset[str]:
        if self._store.durability is Durability.NONE and not always:
            return frozenset()
        wall = self._wall()
        return self._store.write([_record(kept, wall + kept.ttl) for kept in every], removed)

    def _take_up(self, record: Record) -> None:
        """A session that survived goes on, if the model that made its state is here. Raises Gone, Conflict or Overloaded."""
        kept = record.kept
        model = self._model(kept)
        if fault := fits(record, model.bundle.graph):
            raise _unfit(kept, "STATE_MISMATCH", fault)
        rows = Rows(record.arrays, 0, 1) if record.arrays is not None else None
        left = record.expires - self._wall()
        with self._wake:
            self._sessions.open(replace(kept, state=Memory(rows, record.rest)), self._clock(), left)
            self._wake.notify_all()

    @contextmanager
    def _held(self, id: str) -> Iterator[Session]:
        """A session in memory, with the lock held. Raises as Sessions.find, or Gone where what is stored can't be taken up."""
        while True:
            self._find(id)
            with self._wake:
                if not self._sessions.away(id):
                    yield self._sessions.find(id)
                    return

    def _put_away(self) -> None:
        """Sessions beyond those that memory is to hold leave it for the store; they come back when they are used."""
        if isinstance(self._store, MemoryStore):
            return
        with self._wake:
            idle = [(session, session.kept) for session in self._sessions.idle(self._resident)]
        if not idle:
            return
        if self._store.durability is Durability.NONE:
            self._write([kept for _, kept in idle], always=True)
        with self._wake:
            for session, kept in idle:
                self._sessions.put_away(session, kept)

    def _model(self, kept: Kept) -> Model:
        """The model that made a session's state. Raises Gone where it is not here, or another is under its name."""
        try:
            model = self._catalog.find(kept.model, kept.version)
        except NotFound as e:
            raise _unfit(kept, "MODEL_GONE", f"its model is not here: {e.message}") from None
        if model.bundle.fingerprint != kept.fingerprint:
            raise _unfit(kept, "FINGERPRINT_MISMATCH", f"another {kept.model!r} version {kept.version} made its state")
        return model

    def _find(self, id: str) -> None:
        """See that a session is in memory, if it is anywhere. Raises Gone, where what is stored can't be taken up."""
        with self._wake:
            away = self._sessions.away(id)
            if id in self._sessions and not away:
                return
            unfit = self._unfit.get(id)
        if unfit is not None:
            raise unfit
        if not away and not self._store.shared:
            return  # all of this store's were taken up at the start
        try:
            record = self._store.read(id)
        except Unreadable as e:
            raise Gone("RECORD_" + e.reason, f"session {id!r} can't be read from the store: {e}; open a new one", session=id) from None
        if record is None or record.expires <= self._wall():
            return
        try:
            self._take_up(record)
        except Conflict:
            return  # another thread was first
        if self._store.durability is Durability.NONE:
            self._store.write((), [id])  # or a crash would bring back what it was before

    def _failed(self, session: Session, error: ServeError) -> None:
        """The first turn in line could not be run: it is told why, those behind it that they come too early now."""
        with self._wake:
            dropped = self._sessions.abort(session)
        if not dropped:
            return
        id, turn = session.kept.id, session.kept.turn
        error.facts.update(session=id, turn=str(turn))
        self._tell(dropped[:1], error)
        message = f"session {id!r}: turn {turn + 1} before this one failed; send it again first; last applied is turn {turn}"
        self._tell(dropped[1:], Conflict("GAP", message, session=id, turn=turn))

    def _tell(self, turns: list[Pending], reply: bytes | ServeError) -> None:
        for pending in turns:
            for work in (pending.work, *pending.again):
                try:
                    work.told(reply)
                except Exception:  # one caller's broken stream must not keep others from their replies
                    log.exception("a reply could not be delivered")

    def _expire(self) -> None:
        with self._wake:
            while not self._stopping:
                now = self._clock()
                late = self._sessions.expired(now)
                if late:
                    self._wake.release()  # the store may take its time
                    try:
                        self._forget(late)
                    finally:
                        self._wake.acquire()
                    continue
                at = self._sessions.wake_at()
                self._wake.wait(None if at is None else max(0.0, at - now))

    def _forget(self, late: list[str]) -> None:
        log.info("expired: %s", listed(late))
        try:
            self._write((), late)
        except ServeError as e:
            log.warning("expired sessions stay in the store: %s", e.message)  # they are refused by their deadline all the same


def _record(kept: Kept, expires: float) -> Record:
    memory: Memory = kept.state
    return Record(kept, expires, memory.rows.bank if memory.rows is not None else None, memory.rest)


def _unfit(kept: Kept, reason: str, why: str) -> Gone:
    message = f"session {kept.id!r} can't go on after turn {kept.turn}: {why}; open a new one"
    return Gone(reason, message, session=kept.id, turn=kept.turn)


def _new_id() -> str:
    return secrets.token_urlsafe(12)


def _check_id(id: str) -> None:
    if len(id) > ID_LENGTH or not id.isprintable():
        raise InvalidInput("BAD_ID", f"a session's id has at most {ID_LENGTH} printable characters", expected=ID_LENGTH, got=len(id))


__all__ = ["Brought", "Memory", "Plan", "Turns"]
