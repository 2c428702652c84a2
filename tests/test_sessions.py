"""Stories of sessions, and a machine that plays anything at all against the simplest model of a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from server.errors import Conflict, Gone, NotFound, ServeError
from server.sessions import Begun, Kept, Session, Sessions
from tests.stories import check, stories

FOLDER = Path(__file__).parent / "stories" / "sessions"


class Told:
    """Sessions whose state is the text of all inputs, told by a story."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sessions = Sessions(most=3)
        self.stored: dict[str, Kept] = {}

    def tell(self, line: str) -> str:
        command, *words = line.split()
        plain = [w for w in words if "=" not in w]
        named = dict(w.split("=") for w in words if "=" in w)
        try:
            result: str = getattr(self, command)(*plain, **named)
        except ServeError as e:
            return f"{e.reason}: {e.message}"
        return result

    def open(self, id: str, ttl: str = "60") -> str:
        self.sessions.open(Kept(id, "model", "1", "sha256:0", float(ttl), state=""), self.now)
        return f"{id} is open"

    def turn(self, id: str, turn: str, text: str, acknowledged: str = "0") -> str:
        session = self.sessions.find(id)
        begun = self.sessions.begin(session, int(turn), text.encode(), text, int(acknowledged), self.now)
        if begun.reply is not None:
            return f"{id}@{turn} replayed: {begun.reply.decode()}"
        twice = any(p.again for p in session.line if p.turn == int(turn))
        return f"{id}@{turn} " + ("runs" if begun.run else "is under way, and will be told twice" if twice else "waits")

    def ran(self, id: str, count: str = "1") -> str:
        session = self.sessions.find(id)
        state, replies = session.state, []
        for pending in list(session.line)[: int(count)]:
            state += pending.work
            replies.append(f"read {state}".encode())
        kept = self.sessions.applied(session, replies, state)
        done = self.sessions.commit(session, replies, state, self.now)
        assert session.kept == kept, "what was stored is what was applied"
        assert not self.sessions.told(session)
        return "\n".join(f"{id}@{p.turn} => {r.decode()}" + ", twice" * bool(p.again) for p, r in zip(done, replies, strict=True))

    def failed(self, id: str) -> str:
        return f"{id} drops turns " + ", ".join(str(p.turn) for p in self.sessions.abort(self.sessions.find(id)))

    def show(self, id: str) -> str:
        k = self.sessions.find(id).kept
        return f"{id}: turn {k.turn}, read {k.state!r}, replies kept {[a.turn for a in k.replies]}"

    def fork(self, id: str, new: str) -> str:
        return f"{new} goes on from turn {self.sessions.fork(id, new, self.now).kept.turn}"

    def close(self, id: str) -> str:
        return f"{id} closed after turn {self.sessions.close(id).kept.turn}"

    def cap(self, most: str) -> str:
        """At most so many in memory: the rest go where a store would keep them."""
        left = []
        for session in self.sessions.idle(int(most)):
            self.stored[session.kept.id] = session.kept
            self.sessions.put_away(session, session.kept)
            left.append(session.kept.id)
        return "leave memory: " + (" ".join(left) or "none")

    def back(self, id: str) -> str:
        assert self.sessions.away(id)
        self.sessions.open(self.stored[id], self.now, 5.0)
        return f"{id} is back at turn {self.stored[id].turn}"

    def lose(self, id: str) -> str:
        self.sessions.lose(id)
        return ""

    def tick(self, seconds: str) -> str:
        self.now += float(seconds)
        return ""

    def expire(self) -> str:
        return "expired: " + (" ".join(self.sessions.expired(self.now)) or "none")

    def wake(self) -> str:
        at = self.sessions.wake_at()
        return "sleeps until called" if at is None else f"wakes at {at:g}"


@pytest.mark.parametrize("story", stories(FOLDER), ids=str)
def test_story(story: object, request: pytest.FixtureRequest) -> None:
    """Sessions do what the story tells."""
    check(story, Told().tell, update=request.config.getoption("--update"))


class AgainstTheModel(RuleBasedStateMachine):
    """A session is a list of inputs, nothing else. Whatever comes in whatever order, replies are those of that list."""

    ids = st.sampled_from("ab")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.sessions = Sessions(most=10)
        self.applied: dict[str, list[str]] = {}  # the model
        self.stored: dict[str, Kept] = {}

    def _reply(self, id: str, turn: int) -> bytes:
        return "".join(self.applied[id][:turn]).encode()

    @rule(id=ids)
    def open(self, id: str) -> None:
        self._back(id)
        try:
            self.sessions.open(Kept(id, "m", "1", "f", 10.0, state=""), self.now)
        except Conflict:
            assert id in self.applied
        else:
            assert id not in self.applied
            self.applied[id] = []

    @rule(id=ids, turn=st.integers(-1, 12), text=st.sampled_from("xy"), acknowledged=st.integers(0, 6))
    def turn(self, id: str, turn: int, text: str, acknowledged: int) -> None:
        self._back(id)
        refused: Conflict | None = None
        begun = Begun()
        try:
            begun = self.sessions.begin(self.sessions.find(id), turn, text.encode(), text, acknowledged, self.now)
        except (NotFound, Gone):
            assert id not in self.applied
            return
        except Conflict as e:
            refused = e
        if refused is not None:
            session = self.sessions.find(id)
            known = self.applied[id] + [p.work for p in session.line]
            fits = turn == len(known) + 1 or (session.kept.acknowledged < turn <= len(known) and known[turn - 1] == text)
            assert not fits or acknowledged > len(self.applied[id]), refused.message
            assert refused.facts["turn"] == str(len(self.applied[id]))
        if begun.reply is not None:
            assert begun.reply == self._reply(id, turn)

    @rule(id=ids, count=st.integers(1, 4))
    def ran(self, id: str, count: int) -> None:
        session = self._live(id)
        if session is None or not session.line:
            return
        works = [p.work for p in list(session.line)[:count]]
        self.applied[id] += works
        first = session.kept.turn + 1
        replies = [self._reply(id, first + i) for i in range(len(works))]
        state = "".join(self.applied[id])
        kept = self.sessions.applied(session, replies, state)
        self.sessions.commit(session, replies, state, self.now)
        assert session.kept == kept, "what was stored is what was applied"
        last, again = session.turn, f"again {session.turn}"
        assert self.sessions.begin(session, last, works[-1].encode(), again, 0, self.now) == Begun(), "told when the first is"
        assert self.sessions.told(session) == ((again, self._reply(id, last)),)
        assert session.telling, "it is to be told first"
        assert not self.sessions.told(session)
        assert not session.telling

    @rule(id=ids)
    def failed(self, id: str) -> None:
        if session := self._live(id):
            self.sessions.abort(session)

    @rule(id=ids)
    def close(self, id: str) -> None:
        if session := self._live(id):
            self.sessions.abort(session)
            self.sessions.close(id)
            del self.applied[id]

    @rule(seconds=st.integers(1, 8))
    def wait(self, seconds: int) -> None:
        self.now += seconds
        for id in self.sessions.expired(self.now):
            del self.applied[id]

    @rule(most=st.integers(0, 2))
    def put_away(self, most: int) -> None:
        for session in self.sessions.idle(most):
            self.stored[session.kept.id] = session.kept
            self.sessions.put_away(session, session.kept)

    def _back(self, id: str) -> None:
        if self.sessions.away(id):
            self.sessions.open(self.stored[id], self.now, 10.0)

    def _live(self, id: str) -> Session | None:
        self._back(id)
        return self.sessions.find(id) if id in self.applied else None

    @invariant()
    def is_the_list(self) -> None:
        assert len(self.sessions) == len(self.applied)
        for id, applied in self.applied.items():
            kept = self.stored[id] if self.sessions.away(id) else self.sessions.find(id).kept
            assert kept.turn == len(applied)
            assert kept.state == "".join(applied)
            assert [a.turn for a in kept.replies] == list(range(kept.acknowledged + 1, kept.turn + 1))


TestAgainstTheModel = AgainstTheModel.TestCase
TestAgainstTheModel.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
