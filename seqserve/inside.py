"""What a server is doing, round by round: pictures of it, as the clients' `watch` gives them."""

from __future__ import annotations

from dataclasses import dataclass

from protos import inside_pb2 as pb
from seqserve import errors
from seqserve.wire import Call, count, parse

WATCH = "/seqserve.v1.Inside/Watch"


@dataclass(frozen=True, slots=True)
class Part:
    """A sequence in a round."""

    sequence: int  # the same from round to round, for as long as the sequence lives
    session: str  # of a session's turn; "" where it is none, or another tenant's
    turn: int
    turns: int  # that ran as one sequence; 0 where this is no session's turn
    rows: int


@dataclass(frozen=True, slots=True)
class Round:
    """One run of one graph."""

    number: int
    model: str
    version: str
    graph: str
    rows: int
    steps: int
    began: float  # on the picture's clock
    seconds: float
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Load:
    """One version of a model."""

    model: str
    version: str
    kind: str
    waiting: int  # sequences, those that run among them
    queue_age: float  # seconds that whoever waits longest for a round has waited
    expected_wait: float  # seconds that all that is here is expected to take
    rounds: int  # since the server began, as the next three
    answered: int
    failed: int
    busy: float  # seconds spent in rounds
    recent: int  # answers of the last ten seconds, which the next two are of
    p50: float  # seconds from arrival to answer
    p99: float


@dataclass(frozen=True, slots=True)
class SessionCounts:
    """Live sessions by where they are; the rest since the server began."""

    memory: int
    stored: int
    opened: int
    forked: int
    resumed: int
    ended: int
    turns: int
    replayed: int


@dataclass(frozen=True, slots=True, repr=False)
class Picture:
    """The server at one moment, and the rounds that ended since the picture before."""

    server: str  # another one: another process
    at: float  # seconds since that began
    rounds: tuple[Round, ...]
    missed: int  # rounds that ended since and are not told of
    models: tuple[Load, ...]
    sessions: SessionCounts
    workers: int
    calls: int

    def __repr__(self) -> str:
        waiting = sum(model.waiting for model in self.models)
        return f"<Picture at {self.at:.1f} s: {len(self.rounds)} rounds, {waiting} waiting, {self.sessions.memory} sessions in memory>"


def watch(interval: float, rounds: int) -> Call[Picture]:
    try:
        request = pb.WatchRequest(interval=interval, rounds=count("rounds", rounds))
    except TypeError:
        raise errors.invalid(f"interval must be seconds, not {interval!r}") from None
    return Call(WATCH, request.SerializeToString(), lambda raw: _picture(parse(pb.Picture, raw)))


def _picture(p: pb.Picture) -> Picture:
    s = p.sessions
    return Picture(
        p.server, p.at, tuple(map(_round, p.rounds)), p.missed, tuple(map(_load, p.models)),
        SessionCounts(s.memory, s.stored, s.opened, s.forked, s.resumed, s.ended, s.turns, s.replayed), p.workers, p.calls,
    )  # fmt: skip


def _round(r: pb.RoundRun) -> Round:
    parts = tuple(Part(p.sequence, p.session, p.turn, p.turns, p.rows) for p in r.parts)
    return Round(r.number, r.model, r.version, r.graph, r.rows, r.steps, r.began, r.seconds, parts)


def _load(m: pb.ModelLoad) -> Load:
    return Load(
        m.model, m.version, m.kind, m.waiting, m.queue_age, m.expected_wait, m.rounds, m.answered, m.failed, m.busy, m.recent, m.p50, m.p99
    )
