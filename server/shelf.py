"""Where live sessions lie: in memory, and in the store.

Each is stored before its caller is told of it, and taken up again after a crash, or when it is used after it left memory.
This file knows sessions and records, and which model may go on with a state; it must not know how a turn is run (turns.py).

One lock guards all sessions, `changed`; it is held for decisions, never while the store is at work. Where the store takes its
time, `errands` are there for whoever must not wait for it: the front's thread.
"""

from __future__ import annotations

import itertools
import logging
import math
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

from server.catalog import Catalog, Model
from server.engine import Clock
from server.errands import Errands
from server.errors import Conflict, DeviceLost, Draining, Gone, InvalidInput, NotFound, ServeError, listed
from server.records import LONGEST, Packed, Record, Unreadable, decode, encode, fits, lives
from server.sessions import Kept, Session, Sessions
from server.states import Block, Home, Rows, here
from server.store import Durability, MemoryStore, Refusal, Store, StoreFailed

log = logging.getLogger(__name__)

ID_LENGTH = 128


class Memory:
    """What a session remembers: its row of state, and what of the input is not yet read (half a word). Never changed once made;
    no dataclass, since one is made for each turn."""

    __slots__ = ("rest", "rows")

    def __init__(self, rows: Rows | None = None, rest: str = "") -> None:
        self.rows = rows
        self.rest = rest


@dataclass(frozen=True, slots=True)
class Limits:
    """How many sessions there may be, how many of them in memory, and how long one lives where its caller names no ttl."""

    most: int
    resident: int
    ttl: float  # seconds


class Shelf:
    """All live sessions of a server."""

    def __init__(
        self, catalog: Catalog, store: Store, limits: Limits, clock: Clock = time.monotonic, wall: Clock = time.time, *, moves: bool = False
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._limits = limits
        self._clock = clock
        self._wall = wall  # records outlive the process whose monotonic clock counts
        self._moves = moves  # whether sessions go on with a newer version of their model where their state fits it
        self._carried: dict[str, tuple[object, ...]] = {}  # by fingerprint of models met: their task and states
        self.errands = None if store.quick else Errands()
        self._unfit: dict[str, ServeError] = {}  # stored sessions that can't be taken up
        self.sessions = Sessions(limits.most)
        self.lock = threading.Lock()  # of `changed`: to take it by itself costs half as much
        self.changed = threading.Condition(self.lock)
        # Ids that the store is being told of, by a commit of their turns or since they expired: who ends one, or opens one of that name,
        # waits until it was, or what it has the store do would be undone. With the lock held.
        self.unsettled: set[str] = set()
        self._awaited = 0  # who waits for one of them
        self._stopping = False
        self._look_at = float("inf")  # when the thread below looks next; to wake it for each new session cost a tenth of all calls
        self._expiry = threading.Thread(target=self._expire, name="session-expiry", daemon=True)

    @property
    def most_resident(self) -> int:
        """How many sessions memory is to hold."""
        return self._limits.resident

    @property
    def keeps(self) -> bool:
        """Whether the store keeps sessions as they go."""
        return self._store.durability is not Durability.NONE

    @property
    def shared(self) -> bool:
        """Whether other servers may take a session up that is in memory here: not where none is stored before it leaves."""
        return self._store.shared and self.keeps

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
            self.put_away()
        with self.changed:
            if len(self.sessions):
                log.info("took up %d sessions", len(self.sessions))
        self._expiry.start()

    def stop(self) -> None:
        with self.changed:
            self._stopping = True
            self.changed.notify_all()
        self._expiry.join()
        if self.errands is not None:
            self.errands.stop()
        try:
            if self._store.durability is Durability.NONE:
                self._write_all([session.kept for session in self.sessions.all()])
        finally:
            self._store.close()

    def _write_all(self, every: list[Kept]) -> None:
        """What no turn has written. States on a device that is lost are lost with it; others' are not."""
        at: dict[Home | None, list[Kept]] = {None: []}
        for kept in every:
            rows: Rows | None = kept.state.rows
            at.setdefault(rows.bank.home if rows is not None and isinstance(rows.bank, Block) else None, []).append(kept)
        for some in at.values():
            try:
                self.write(some, always=True)
            except DeviceLost as e:
                log.error("%d sessions are gone, or as the store last had them: their states were on the device (%s)", len(some), e.message)

    def open(self, model: str, version: str, id: str = "", ttl: float = 0.0) -> Kept:
        """A new session of a model. Raises NotFound, InvalidInput, Conflict or Overloaded."""
        found = self._catalog.find(model, version)
        if not found.bundle.graph.states:
            raise InvalidInput("NO_STATE", f"model {found.name!r} keeps no state: call it without a session", model=found.name)
        if found.bundle.kind == "translate":
            raise InvalidInput("NO_TURNS", f"model {found.name!r} answers whole texts: call Translate or TranslateStream", model=found.name)
        self._known(found)
        _check_id(id)
        if not 0 <= ttl <= LONGEST:
            raise InvalidInput("BAD_TTL", f"ttl {ttl}; allowed are 0 (the default, {self._limits.ttl:g} s) to {LONGEST:g} seconds", got=ttl)
        kept = Kept(id or _new_id(), found.name, found.version, found.bundle.fingerprint, ttl or self._limits.ttl, state=Memory())
        self._find(kept.id)
        with self.changed:
            self._await(kept.id)
            self._expect(self.sessions.open(kept, self._clock()))
        self._keep(kept)
        return kept

    def settled(self, ids: Iterable[str]) -> None:
        """The store was told of them. With the lock held."""
        self.unsettled.difference_update(ids)
        if self._awaited:
            self.changed.notify_all()

    def end(self, id: str) -> None:
        """A session has ended: so be it in the store. Raises StoreFailed."""
        with self.changed:
            self._await(id)
        self.write((), [id])

    def _await(self, id: str) -> None:
        """With the lock held, which is let go of meanwhile."""
        if id in self.unsettled:
            self._awaited += 1
            self.changed.wait_for(lambda: id not in self.unsettled)
            self._awaited -= 1

    def _keep(self, kept: Kept) -> None:
        """Store a session just made; where that fails it was not made."""
        try:
            self.write([kept])
        except ServeError:
            with self.changed:
                self.sessions.close(kept.id)
            raise
        self.put_away()

    def waits(self, id: str) -> bool:
        """Whether what names that session may wait for the store: it is not in memory, or errands of it are under way."""
        return (self.errands is not None and self.errands.waits(id)) or self.sessions.live(id) is None

    def lives(self, id: str) -> bool:
        if self.shared:
            self._let_go(id)
        self._find(id)
        with self.changed:
            return id in self.sessions

    def get(self, id: str) -> Kept:
        with self.held(id) as session:
            return session.kept

    def page(self, after: str, limit: int) -> tuple[list[Kept], int]:
        """Sessions by id, at most `limit` from the first id after `after`; and how many there are in all."""
        with self.changed:
            ids = self.sessions.ids()
        found = []
        for id in itertools.islice((i for i in ids if i > after), limit):
            with suppress(Gone, NotFound):  # it ended meanwhile
                found.append(self.get(id))
        return found, len(ids)

    def fork(self, id: str, new: str = "") -> Kept:
        """Another session that goes on from the last applied turn of this one."""
        _check_id(new)
        with self.held(id):
            self._await(new)
            forked = self.sessions.fork(id, new or _new_id(), self._clock())
            kept = forked.kept
            self._expect(forked)
        self._keep(kept)
        return kept

    def export(self, id: str, move: bool) -> tuple[bytes, dict[int, bytes]]:
        """A session as its record, and pages of replies; `move` ends it here. Raises Conflict where turns are under way."""
        with self.held(id) as session:
            kept = session.kept
            if move and session.line:
                message = f"session {id!r} has turns under way; read their replies first; last applied is turn {kept.turn}"
                raise Conflict("BUSY", message, session=id, turn=kept.turn)
            if move:
                self.sessions.close(id, "moved")
        if move:
            self.end(id)
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
        _check_id(kept.id)
        self._find(kept.id)
        self._take_up(replace(found, kept=kept, expires=self._wall() + kept.ttl))
        with self.changed:
            self._unfit.pop(kept.id, None)
            kept = self.sessions.find(kept.id).kept
        self._keep(kept)
        return kept

    def write(self, every: Iterable[Kept], removed: Iterable[str] = (), *, always: bool = False) -> frozenset[str]:
        """One commit, where this store keeps sessions as they go. Gives the ids that another server has taken up since; of these
        nothing was written. Raises StoreFailed."""
        if self._store.durability is Durability.NONE and not always:
            return frozenset()
        wall = self._wall()
        banks: dict[int, Packed] = {}  # by bank: a round's sessions have their states in one
        records = []
        every = list(every)
        few = len(every) < 3 or not self.keeps  # than the other rows of a bank would cost
        near = iter(here([rows for kept in every if (rows := kept.state.rows) is not None]))  # what lies on a device, all at once
        for kept in every:
            memory: Memory = kept.state
            rows = next(near) if memory.rows is not None else None
            if few or rows is None or rows.whole:
                records.append(Record(kept, wall + kept.ttl, rows.arrays() if rows is not None else None, memory.rest))
                continue
            packed = banks.get(id(rows.bank))
            if packed is None:
                assert isinstance(rows.bank, tuple), "what lay on a device was copied"
                packed = banks[id(rows.bank)] = Packed(rows.axes, rows.bank)
            records.append(Record(kept, wall + kept.ttl, None, memory.rest, (packed.count, packed.row(rows.start))))
        return self._store.write(records, removed)

    def _take_up(self, record: Record) -> None:
        """A session that survived goes on, if the model that made its state is here. Raises Gone, Conflict or Overloaded."""
        kept = record.kept
        if fault := lives(record):
            raise _unfit(kept, "RECORD_DAMAGED", f"{fault}, which no server wrote")
        model = self.model(kept)
        if fault := fits(record, model.bundle.graph):
            raise _unfit(kept, "STATE_MISMATCH", fault)
        rows = Rows(model.bundle.graph.state_axes, record.arrays, 0, 1) if record.arrays is not None else None
        if model.bundle.kind == "generate" and not _reads(record.rest, model):
            raise _unfit(
                kept, "STATE_MISMATCH", f"the symbol that it has not read yet is {record.rest[:20]!r}, which is none of the model's"
            )
        left = record.expires - self._wall()
        with self.changed:
            self._await(kept.id)
            self._expect(self.sessions.open(replace(kept, state=Memory(rows, record.rest)), self._clock(), left))

    @contextmanager
    def held(self, id: str) -> Iterator[Session]:
        """A session in memory, with the lock held; as it is now, where other servers write to it too. Raises as Sessions.find, or
        Gone where what is stored can't be taken up."""
        if self.shared:
            self._let_go(id)
        while True:
            self._find(id)
            with self.changed:
                if not self.sessions.away(id):
                    yield self.sessions.find(id)
                    return

    def put_away(self) -> None:
        """Sessions beyond those that memory is to hold leave it for the store; they come back when they are used."""
        if isinstance(self._store, MemoryStore) or len(self.sessions) <= self._limits.resident:
            return
        if self.errands is not None and not self.keeps:
            with suppress(Draining):  # on the way out all are written
                self.errands.run((), self._put_away)
        else:
            self._put_away()

    def _put_away(self) -> None:
        with self.changed:
            idle = [(session, session.kept) for session in self.sessions.idle(self._limits.resident)]
        if not idle:
            return
        if self._store.durability is Durability.NONE:
            self.write([kept for _, kept in idle], always=True)
        with self.changed:
            for session, kept in idle:
                self.sessions.put_away(session, kept)

    def model(self, kept: Kept | Session) -> Model:
        """The model that goes on with a session's state: the one that made it, or where sessions move, the newest version that
        fits. Raises Gone where there is none."""
        if self._moves and (newest := self._newer(kept)) is not None:
            return newest
        model = self._catalog.exact(kept.model, kept.version)
        if model is None:
            try:
                model = self._catalog.find(kept.model, kept.version)
            except NotFound as e:
                raise _unfit(kept, "MODEL_GONE", f"its model is not here: {e.message}") from None
        if model.bundle.fingerprint != kept.fingerprint:
            raise _unfit(kept, "FINGERPRINT_MISMATCH", f"another {kept.model!r} version {kept.version} made its state")
        return model

    def runs(self, session: Session) -> Model:
        """The same for a session whose next turn is about to run: it moves now. What is stored of it says so with that turn, and
        until then what was true before: the state is the same."""
        model = self.model(session)
        if model.version != session.version or model.bundle.fingerprint != session.fingerprint:
            with self.changed:
                self.sessions.move(session, model.version, model.bundle.fingerprint)
        return model

    def _newer(self, kept: Kept | Session) -> Model | None:
        """The newest version of a session's model, where that is another than its own and carries states of the same names,
        dtypes and axes; None where it is not."""
        newest = self._catalog.exact(kept.model, "")
        own = self._catalog.exact(kept.model, kept.version)
        if newest is None or newest is own:
            return None
        if newest.bundle.fingerprint == kept.fingerprint:
            return newest if own is None else None  # the same under another number
        if own is not None and own.bundle.fingerprint == kept.fingerprint:
            self._known(own)
        if self._carried.get(kept.fingerprint) != self._known(newest):
            return None
        memory = kept.state
        if isinstance(memory, Memory) and memory.rest and newest.bundle.kind == "generate":
            return None  # the symbol that waits to be read is a number of its own vocabulary
        return newest

    def _known(self, model: Model) -> tuple[object, ...]:
        """What a model carries between turns, remembered after it was unloaded."""
        about = self._carried.get(model.bundle.fingerprint)
        if about is None:
            states = [(s.input, s.dtype, s.axes) for s in model.bundle.graph.states]
            about = self._carried[model.bundle.fingerprint] = (model.bundle.kind, *states)
        return about

    def _let_go(self, id: str) -> None:
        """What another server has taken up since is not this one's any more. Raises StoreFailed while a turn of it runs here: it
        will not be stored, but must be over before the session may come back, or the store would take it for this server's own."""
        if self.sessions.live(id) is None or self._store.mine(id):
            return
        with self.changed:
            session = self.sessions.live(id)
            if session is None:
                return
            if session.line:
                raise taken(session)
            self.sessions.close(id, "taken")

    def _find(self, id: str) -> None:
        """See that a session is in memory, if it is anywhere. Raises Gone, where what is stored can't be taken up."""
        with self.changed:
            away = self.sessions.away(id)
            if id in self.sessions and not away:
                return
            unfit = self._unfit.get(id)
        if unfit is not None:
            raise unfit.with_traceback(None)  # kept and raised often: it must not gather frames
        if not away and not self._store.shared:
            return  # all of this store's were taken up at the start
        try:
            record = self._store.read(id)
        except Unreadable as e:
            raise Gone("RECORD_" + e.reason, f"session {id!r} can't be read from the store: {e}; open a new one", session=id) from None
        if record is None or record.expires <= self._wall():
            with self.changed:
                self.sessions.lose(id)
            return
        try:
            self._take_up(record)
        except Conflict:
            return  # another thread was first
        if self._store.durability is Durability.NONE:
            self._store.write((), [id])  # or a crash would bring back what it was before

    def _expire(self) -> None:
        with self.changed:
            while not self._stopping:
                now = self._clock()
                late = self.sessions.expired(now)
                if late:
                    self.unsettled.update(late)
                    self.changed.release()  # the store may take its time
                    try:
                        self._forget(late)
                    finally:
                        self.changed.acquire()
                        self.settled(late)
                    continue
                at = self.sessions.wake_at()
                self._look_at = float("inf") if at is None else at
                self.changed.wait(None if at is None else min(max(0.0, at - now), threading.TIMEOUT_MAX))

    def _expect(self, session: Session) -> None:
        """A session has come: wake the thread above where it expires sooner than that looks. With the lock held."""
        if session.expires < self._look_at:
            self.changed.notify_all()

    def _forget(self, late: list[str]) -> None:
        log.info("expired: %s", listed(late))
        try:
            self.write((), late)
        except ServeError as e:
            log.warning("expired sessions stay in the store: %s", e.message)  # they are refused by their deadline all the same


def taken(session: Session) -> StoreFailed:
    """What to tell of turns that were under way when another server took their session up: nothing came of them here."""
    message = f"session {session.id!r} goes on at another server; send the turn again"
    return StoreFailed("SESSION_TAKEN", message, retry_after=0.05, session=session.id, turn=session.turn)


def _record(kept: Kept, expires: float) -> Record:
    memory: Memory = kept.state
    return Record(kept, expires, memory.rows.arrays() if memory.rows is not None else None, memory.rest)


def _unfit(kept: Kept | Session, reason: str, why: str) -> Gone:
    message = f"session {kept.id!r} can't go on after turn {kept.turn}: {why}; open a new one"
    return Gone(reason, message, session=kept.id, turn=kept.turn)


def _reads(rest: str, model: Model) -> bool:
    """Whether it is nothing, or the number of a symbol that the model reads."""
    tokens = model.bundle.graph.input("tokens")
    if not rest or tokens is None:
        return not rest
    if not (rest.isascii() and rest.isdecimal() and len(rest) < 19):  # an int64 at most
        return False
    return tokens.allowed <= int(rest) <= (math.inf if tokens.high is None else tokens.high)


def _new_id() -> str:
    return secrets.token_urlsafe(12)


def _check_id(id: str) -> None:
    if len(id) > ID_LENGTH or not id.isprintable():
        raise InvalidInput("BAD_ID", f"a session's id has at most {ID_LENGTH} printable characters", expected=ID_LENGTH, got=len(id))
