"""Sessions: state that outlives a request, advanced in numbered turns.

Law of this file: everything that decides what a turn, a fork or a deadline may do to a session is decided here, and
nothing else happens here. It knows no clock (time is an argument, in seconds), no thread, no gRPC, no onnxruntime, and
neither what a state is nor what a reply says: both are values it keeps. Callers hold one lock around it.

The life of a turn: `begin` says whether it is to run, is running already, or was answered before; `commit` applies it
once it has run, or `abort` drops it and what waits behind it. Turns count from 1. State, turn and reply change together,
in `commit`, and nowhere else; so whatever fails, the session is as it was after the last turn applied.

Replies are kept until the caller says that it has them (`acknowledged`), so that a retried turn, or all of a broken
connection's turns, are answered with the same bytes and advance nothing. At most WINDOW turns may be unacknowledged.
A repeated turn must bring the same input, by digest: two writers on one session can't be mistaken for one that retries.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from server.errors import Conflict, Gone, NotFound, Overloaded, ServeError

WINDOW = 1024  # unacknowledged turns a session may have: what a client may lose the connection over
REMEMBERED = 10_000  # sessions that ended, of which it is still known why


# The next two are never changed once made. They are not frozen, which would make them three times as dear, and they are made for
# each turn.


@dataclass(slots=True)
class Answered:
    """A turn that was applied: what it brought, by digest, and what it was told."""

    turn: int
    digest: bytes
    reply: bytes


@dataclass(slots=True)
class Kept:
    """All that there is to a session between turns: what is stored, forked, exported."""

    id: str
    model: str
    version: str
    fingerprint: str
    ttl: float  # seconds that it lives after its last turn
    turn: int = 0  # the last applied
    acknowledged: int = 0  # the last whose reply the caller has
    state: Any = None  # None: has read nothing
    replies: tuple[Answered, ...] = ()  # of the turns after `acknowledged`, in order


class Pending:
    """A turn that was begun. `work` is the caller's own; `again` are the callers who sent the same turn meanwhile. One without
    a digest can't be sent again, and its reply is not kept."""

    __slots__ = ("again", "digest", "turn", "work")

    def __init__(self, turn: int, digest: bytes, work: Any) -> None:
        self.turn = turn
        self.digest = digest
        self.work = work
        self.again: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Begun:
    """What becomes of a turn: `reply` where it was answered before; else it is in line, and `run` where nothing runs yet."""

    reply: bytes | None = None
    run: bool = False


_RUN = Begun(run=True)
_IN_LINE = Begun()

T = TypeVar("T", Answered, Pending)


class Session:
    """A session in memory: what is kept of it, and the turns under way. Id, model and ttl never change."""

    __slots__ = (
        "__weakref__", "acknowledged", "expires", "fingerprint", "id", "line", "model", "repeated", "replies", "state", "telling", "ttl",
        "turn", "version",
    )  # fmt: skip

    def __init__(self, kept: Kept, expires: float) -> None:
        self.id = kept.id
        self.model = kept.model
        self.version = kept.version
        self.fingerprint = kept.fingerprint
        self.ttl = kept.ttl
        self.turn = kept.turn
        self.acknowledged = kept.acknowledged
        self.state = kept.state
        self.replies = list(kept.replies)
        self.expires = expires
        self.line: deque[Pending] = deque()  # begun, not yet applied; the first is running
        self.telling = False  # applied turns are being told of: who comes now waits, or its reply could overtake theirs
        self.repeated: tuple[tuple[Any, bytes], ...] = ()  # who sent one of these turns again meanwhile, and its reply

    @property
    def next(self) -> int:
        """The turn that comes next, after those under way."""
        return self.turn + len(self.line) + 1

    @property
    def kept(self) -> Kept:
        """What is kept of it now."""
        return Kept(
            self.id, self.model, self.version, self.fingerprint, self.ttl, self.turn, self.acknowledged, self.state, tuple(self.replies)
        )


class Sessions:
    """All sessions of a server."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._live: OrderedDict[str, Session] = OrderedDict()  # in memory, used longest ago first
        self._away: dict[str, tuple[float, int]] = {}  # stored only: id → deadline, last turn
        self._ended: OrderedDict[str, tuple[str, int]] = OrderedDict()  # id → why, last turn
        self._deadlines: list[tuple[float, int, str]] = []
        self._tie = itertools.count()
        self.begun: Counter[str] = Counter()  # opened, forked, resumed; these four are counted for whoever watches (metrics.py)
        self.ended_as: Counter[str] = Counter()  # why → sessions
        self.turns_applied = self.turns_replayed = 0

    def __len__(self) -> int:
        return len(self._live) + len(self._away)

    @property
    def resident(self) -> int:
        """How many are in memory."""
        return len(self._live)

    def __contains__(self, id: str) -> bool:
        return id in self._live or id in self._away

    def open(self, kept: Kept, now: float, left: float | None = None, how: str = "") -> Session:
        """A new session, or one that was kept elsewhere, with `left` seconds to live (None: its ttl). Raises Conflict where its
        id lives, Overloaded past the quota."""
        if kept.id in self._live:
            turn = self._live[kept.id].turn
            message = f"session {kept.id!r} is open; use another id, or go on with turn {turn + 1}"
            raise Conflict("SESSION_EXISTS", message, session=kept.id, turn=turn)
        if kept.id not in self._away and len(self) >= self._most:
            soonest = max(0.05, self._next_deadline() - now)
            raise Overloaded(
                "SESSION_QUOTA", f"{self._most} sessions are open, the most this server keeps; close some, or try again in {soonest:.1f} s",
                retry_after=soonest, limit=self._most,
            )  # fmt: skip
        self._ended.pop(kept.id, None)
        self._away.pop(kept.id, None)
        self.begun[how or ("opened" if left is None else "resumed")] += 1
        session = self._live[kept.id] = Session(kept, now + (kept.ttl if left is None else left))
        heapq.heappush(self._deadlines, (session.expires, next(self._tie), kept.id))
        if len(self._deadlines) > 2 * len(self) + 1024:
            self._tidy()
        return session

    def find(self, id: str) -> Session:
        """The session of that id. Raises Gone where it ended, saying why and its last turn; NotFound where it never was."""
        session = self._live.get(id)
        if session is not None:
            return session
        if id in self._ended:
            raise self.ended(id)
        raise NotFound("UNKNOWN_SESSION", f"there is no session {id!r}; open one", session=id)

    def ended(self, id: str) -> Gone:
        """What to tell of a session that has ended."""
        why, turn = self._ended[id]
        return Gone(f"SESSION_{why.upper()}", f"session {id!r} {_HOW[why]} after turn {turn}; open a new one", session=id, turn=turn)

    def live(self, id: str) -> Session | None:
        """A session in memory."""
        return self._live.get(id)

    def begin(self, session: Session, turn: int, digest: bytes, work: Any, acknowledged: int, now: float) -> Begun:
        """Take turn `turn` of a session, with the digest of what it brings (empty: it can't be sent again). Raises Conflict,
        Overloaded."""
        self._touch(session, now)
        last = session.turn
        if acknowledged > session.acknowledged:
            if acknowledged > last:
                message = f"turn {acknowledged} is not answered yet; acknowledge at most"
                raise self._refuse(Conflict, "ACKNOWLEDGED_AHEAD", message, session)
            del session.replies[: acknowledged - session.acknowledged]
            session.acknowledged = acknowledged
        place = turn - last - 1
        if place < 0:
            if turn < 1 or turn <= session.acknowledged:
                message = f"turn {turn} was answered and acknowledged; its reply is no longer kept; go on after"
                raise self._refuse(Conflict, "ACKNOWLEDGED", message, session)
            reply = _same(session.replies[turn - session.acknowledged - 1], digest, session).reply
            self.turns_replayed += 1
            if session.telling:
                session.repeated += ((work, reply),)
                return _IN_LINE
            return Begun(reply=reply)
        line = session.line
        if place < len(line):
            pending = _same(line[place], digest, session)
            pending.again += (work,)
            return _IN_LINE
        if place > len(line):
            begun = last + len(line)
            message = f"turn {turn} leaves a gap after turn {begun}; send turn {begun + 1}; applied are turns up to"
            raise self._refuse(Conflict, "GAP", message, session)
        if turn - session.acknowledged > WINDOW:
            message = f"{WINDOW} turns are unacknowledged; read their replies and acknowledge them; applied are turns up to"
            raise self._refuse(Overloaded, "UNACKNOWLEDGED", message, session)
        line.append(Pending(turn, digest, work))
        return _IN_LINE if place or session.telling else _RUN

    def applied(self, session: Session, replies: Sequence[bytes], state: Any) -> Kept:
        """What the session is to be once the first turns in line, one per reply, are applied: to be stored first."""
        first = session.line[0]
        if len(replies) == 1 and first.digest:  # nearly always
            answer = Answered(first.turn, first.digest, replies[0])
            return self._about(session, first.turn, session.acknowledged, state, (*session.replies, answer))
        answered = [Answered(p.turn, p.digest, reply) for p, reply in zip(session.line, replies, strict=False)]
        last = session.turn + len(answered)
        for place in range(len(answered) - 1, -1, -1):
            if not answered[place].digest:
                return self._about(session, last, answered[place].turn, state, tuple(answered[place + 1 :]))
        return self._about(session, last, session.acknowledged, state, (*session.replies, *answered))

    def commit(self, session: Session, replies: Sequence[bytes], state: Any, now: float) -> list[Pending]:
        """Make it so. Gives back the turns that are applied now, to be answered; call `told` when they are."""
        session.telling = True
        self.turns_applied += len(replies)
        done = []
        for reply in replies:
            pending = session.line.popleft()
            session.turn = pending.turn
            if pending.digest:
                session.replies.append(Answered(pending.turn, pending.digest, reply))
            else:  # its caller has no number to send it again by
                session.acknowledged = pending.turn
                session.replies.clear()
            done.append(pending)
        session.state = state
        self._touch(session, now)
        return done

    def move(self, session: Session, version: str, fingerprint: str) -> None:
        """From its next turn on another version of its model runs it; turn, state and replies stay."""
        session.version = version
        session.fingerprint = fingerprint

    def told(self, session: Session) -> tuple[tuple[Any, bytes], ...]:
        """What was applied was told of. Who sent a turn again meanwhile, with its reply: tell them, and call this once more.
        Where nobody did, the first turn in line is to run, if there is one."""
        repeated, session.repeated = session.repeated, ()
        session.telling = bool(repeated)
        return repeated

    def _about(self, s: Session, turn: int, acknowledged: int, state: Any, replies: tuple[Answered, ...]) -> Kept:
        return Kept(s.id, s.model, s.version, s.fingerprint, s.ttl, turn, acknowledged, state, replies)

    def abort(self, session: Session) -> list[Pending]:
        """The first turn in line failed or was given up: it and those behind it are dropped, and given back to be told."""
        dropped = list(session.line)
        session.line.clear()
        return dropped

    def close(self, id: str, why: str = "closed") -> Session:
        """End a session; its turns under way are the caller's to abort. `why`: closed, expired, evicted, moved (exported), taken (up
        by another server that has the same store) or unloaded."""
        session = self.find(id)
        del self._live[id]
        self._end(id, why, session.turn)
        return session

    def _end(self, id: str, why: str, turn: int) -> None:
        self._ended[id] = (why, turn)
        self.ended_as[why] += 1
        while len(self._ended) > REMEMBERED:
            self._ended.popitem(last=False)

    def fork(self, id: str, new: str, now: float) -> Session:
        """Another session that goes on from the same turn; unanswered turns are not taken along."""
        kept = self.find(id).kept
        return self.open(replace(kept, id=new, acknowledged=kept.turn, replies=()), now, how="forked")

    def expired(self, now: float) -> list[str]:
        """Sessions whose time is over; they have ended. One that has a turn under way lives on until it is done."""
        late = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, id = heapq.heappop(self._deadlines)
            session = self._live.get(id)
            if session is None:
                if id in self._away and self._away[id][0] <= now:
                    self._end(id, "expired", self._away.pop(id)[1])
                    late.append(id)
                continue
            if session.expires > now or session.line:  # it was used since: look again when it would now end
                at = max(session.expires, now + session.ttl) if session.line else session.expires
                heapq.heappush(self._deadlines, (at, next(self._tie), id))
                session.expires = at
            else:
                self.close(id, "expired")
                late.append(id)
        return late

    def idle(self, beyond: int) -> list[Session]:
        """The sessions in memory that were used longest ago and have no turn under way, as many as there are beyond `beyond`."""
        count = len(self._live) - beyond
        if count <= 0:
            return []
        return list(itertools.islice((s for s in self._live.values() if not s.line), count))

    def put_away(self, session: Session, kept: Kept) -> None:
        """A session that is stored as `kept` leaves memory, unless it was used meanwhile. Its deadline stays."""
        id = kept.id
        unused = session.turn == kept.turn and session.acknowledged == kept.acknowledged and not session.line
        if self._live.get(id) is session and unused:
            del self._live[id]
            self._away[id] = (session.expires, kept.turn)
            heapq.heappush(self._deadlines, (session.expires, next(self._tie), id))

    def lose(self, id: str) -> None:
        """A session that was put away, or went on elsewhere, is not in the store any more."""
        if id in self._away:
            self._end(id, "evicted", self._away.pop(id)[1])
        elif id in self._ended and self._ended[id][0] == "taken":
            self._ended[id] = ("closed", self._ended[id][1])

    def away(self, id: str) -> bool:
        """Whether a session is stored only: it is to be opened again, as it was kept, before it is used."""
        return id in self._away

    def _tidy(self) -> None:
        """Forget the deadlines of sessions that have ended: most end long before theirs."""
        live = [(s.expires, next(self._tie), id) for id, s in self._live.items()]
        self._deadlines = live + [(at, next(self._tie), id) for id, (at, _) in self._away.items()]
        heapq.heapify(self._deadlines)

    def wake_at(self) -> float | None:
        """When to call `expired` next."""
        return self._deadlines[0][0] if self._deadlines else None

    def all(self) -> list[Session]:
        """Those in memory."""
        return list(self._live.values())

    def ids(self) -> list[str]:
        """Of all, in order."""
        return sorted([*self._live, *self._away])

    def _touch(self, session: Session, now: float) -> None:
        self._live.move_to_end(session.id)
        session.expires = now + session.ttl  # the heap learns of it when the old deadline comes up

    def _next_deadline(self) -> float:
        return self._deadlines[0][0] if self._deadlines else 0.0

    def _refuse(self, kind: type[ServeError], reason: str, message: str, session: Session) -> ServeError:
        turn = session.turn
        retry = 0.05 if kind is Overloaded else None
        return kind(reason, f"session {session.id!r}: {message} turn {turn}", retry_after=retry, session=session.id, turn=turn)


_HOW = {
    "closed": "was closed", "expired": "expired", "evicted": "was evicted", "moved": "moved to another server",
    "taken": "went on at another server",
    "unloaded": "ended with its model",
}  # fmt: skip


def _same(known: T, digest: bytes, session: Session) -> T:
    if known.digest != digest:
        id, turn = session.id, session.turn
        raise Conflict(
            "OTHER_INPUT", f"session {id!r}: turn {known.turn} came before with another input: does someone else write to this session? "
            f"Last applied is turn {turn}", session=id, turn=turn,
        )  # fmt: skip
    return known
