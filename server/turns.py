"""How the turns of live sessions are run: `sessions.py` decides, the engine runs, `shelf.py` keeps, this file joins them.

A turn runs as a sequence from the session's state; turns sent ahead follow at once, one after another. All turns that a
round completed are stored and applied together after it, and only then answered; what fails changes nothing. A caller that
leaves does not stop a turn that was begun: it may come back for the reply. A session has at most one sequence under way.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from server.catalog import Model
from server.engine import Clock, Workers
from server.errors import Conflict, ModelFailed, ServeError
from server.inputs import Array, Sizes
from server.sequence import Outputs, Sequence
from server.sessions import Kept, Pending, Session
from server.shelf import Memory, Shelf
from server.states import Rows

log = logging.getLogger(__name__)

Told = Callable[[bytes | ServeError], None]


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
    cancel: Callable[[], None] = lambda: None


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
    """Runs the turns of all live sessions."""

    def __init__(self, shelf: Shelf, workers: Workers, clock: Clock = time.monotonic) -> None:
        self._shelf = shelf
        self._sessions = shelf.sessions
        self._changed = shelf.changed
        self._clock = clock
        self._round = _Round()
        workers.after_round = self._after_round

    def turn(self, id: str, turn: int | None, digest: bytes, brought: Brought, acknowledged: int | None, told: Told) -> None:
        """Take a turn; `told` is called once with its reply or why there is none, from this thread or a worker's.

        A caller that does not number its turns (None) means the next, and can't send one again; one that acknowledges
        nothing (None) has the reply of every turn before this one.
        """
        with self._shelf.held(id) as session:
            if turn is None:
                turn = session.next
            if acknowledged is None:
                acknowledged = max(0, min(turn - 1, session.kept.turn))
            begun = self._sessions.begin(id, turn, digest, _Turn(brought, told), acknowledged, self._clock())
        if begun.reply is not None:
            told(begun.reply)
        elif begun.run:
            self._run(session)

    def close(self, id: str) -> Kept:
        """End a session; turns under way are told that it is closed."""
        with self._shelf.held(id):
            pass  # it is in memory now
        kept = self._end(id, "closed")
        self._shelf.write((), [id])
        return kept

    def _end(self, id: str, why: str) -> Kept:
        with self._changed:
            session = self._sessions.close(id, why)
            dropped = self._sessions.abort(session)
            told = self._sessions.ended(id)
        if dropped:
            dropped[0].work.cancel()
            self._tell(dropped, told)
        return session.kept

    def _run(self, session: Session) -> None:
        """Start the first turn in line, from the session's state."""
        first = session.line[0]
        try:
            model = self._shelf.model(session.kept)
            inputs, sizes = self._plan(model, session, first)
            sequence = Sequence(
                model.bundle.main, inputs, sizes, lambda s, o: self._ran(model, session, s, o), lambda e: self._failed(session, e),
                session.kept.state.rows,
            )  # fmt: skip
            first.work.cancel = partial(model.engine.cancel, sequence)
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
        """The turn's steps ran: glance ahead if it needs to, else it is ready to be applied when the round is over."""
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
        with self._changed:
            applied = [(t, self._sessions.applied(t.session, [t.reply], t.memory)) for t in ran if t.session.line]
        try:
            moved = self._shelf.write([kept for _, kept in applied])
        except Exception as e:  # whatever the store's trouble, each caller must be told, and no session be left waiting
            if not isinstance(e, ServeError):
                log.exception("turns could not be stored")
                e = ModelFailed("STORE_FAILED", f"the turn could not be stored: {e}")
            for turn, _ in applied:
                self._failed(turn.session, e)
            return
        closed = []
        for turn, kept in applied:
            if kept.id in moved:
                self._end(kept.id, "moved")
                continue
            with self._changed:
                over = not turn.session.line  # closed meanwhile: it must not come back from the store
                done = [] if over else self._sessions.commit(turn.session, kept, self._clock())
                following = bool(turn.session.line)
            if over:
                closed.append(kept.id)
            self._tell(done, turn.reply)
            if following:
                self._run(turn.session)
        if closed:
            self._shelf.write((), closed)
        self._shelf.put_away()

    def _failed(self, session: Session, error: ServeError) -> None:
        """The first turn in line could not be run: it is told why, those behind it that they come too early now."""
        with self._changed:
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
