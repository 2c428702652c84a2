"""seqserve.v1.Inside: pictures of the server while it works. Wire in, a picture after every interval out.

One thread draws for all watchers, at most WATCHERS of them; it lives while there is one. Rounds never wait for it.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping

from protos import inside_pb2 as pb
from server.catalog import Catalog
from server.engine import Clock
from server.errors import Draining, InvalidInput, Overloaded, ServeError, Unauthenticated
from server.inside import NOTHING, Feed, Ran, Spread
from server.rpc.answer import Answer, Desk
from server.rpc.front import Method
from server.rpc.statistics import Statistics
from server.shelf import Shelf

log = logging.getLogger(__name__)

SERVICE = "seqserve.v1.Inside"
WATCHERS = 16  # a picture takes a millisecond to draw; who has more to show it to passes it on, as the page does
INTERVAL, SHORTEST, LONGEST = 0.25, 0.05, 60.0
ROUNDS, MOST_ROUNDS = 200, 1000
BEHIND = 2  # pictures that a watcher has not read: it gets no more until it has


class _Watcher:
    __slots__ = ("answer", "due", "interval", "most", "seen")

    def __init__(self, answer: Answer, interval: float, most: int, seen: int, due: float) -> None:
        self.answer = answer
        self.interval = interval
        self.most = most
        self.seen = seen  # the newest round that it was told of
        self.due = due


class Inside:
    def __init__(
        self, feed: Feed, catalog: Catalog, shelf: Shelf, statistics: Statistics, workers: int, calls: Callable[[], int],
        clock: Clock = time.monotonic,
    ) -> None:  # fmt: skip
        """`clock` is the workers'."""
        self._feed = feed
        self._catalog = catalog
        self._shelf = shelf
        self._statistics = statistics
        self._workers = workers
        self._calls = calls
        self._clock = clock
        self._server = secrets.token_hex(8)
        self._began = clock()
        self._changed = threading.Condition(threading.Lock())
        self._watchers: list[_Watcher] = []
        self._thread: threading.Thread | None = None
        self._ended = False

    def methods(self, desk: Desk) -> Mapping[str, Method]:
        return {f"/{SERVICE}/Watch": desk.server_stream(pb.WatchRequest, self.watch, operator=True)}

    def watch(self, request: pb.WatchRequest, answer: Answer) -> None:
        """Pictures until the caller leaves. Raises InvalidInput, Overloaded, Draining."""
        interval, most = request.interval or INTERVAL, request.rounds or ROUNDS
        if not SHORTEST <= interval <= LONGEST:
            raise InvalidInput(
                "BAD_INTERVAL", f"interval {interval:g} s; allowed are {SHORTEST:g} to {LONGEST:g}, or 0 for {INTERVAL:g}",
                expected=f"{SHORTEST:g}..{LONGEST:g}", got=interval,
            )  # fmt: skip
        if most > MOST_ROUNDS:
            raise InvalidInput("BAD_COUNT", f"{most} rounds a picture; at most {MOST_ROUNDS}", expected=f"1..{MOST_ROUNDS}", got=most)
        with self._changed:
            if self._ended:
                raise Draining("DRAINING", "the server is shutting down; watch again")
            if len(self._watchers) >= WATCHERS:
                message = f"{WATCHERS} watch already, the most there may be; try again, or share a picture"
                raise Overloaded("WATCHERS", message, retry_after=5.0, limit=WATCHERS)
            self._feed.open()
            watcher = _Watcher(answer, interval, most, self._feed.newest, self._clock())
            self._watchers.append(watcher)
            if self._thread is None:
                self._thread = threading.Thread(target=self._draw, name="inside", daemon=True)
                self._thread.start()
            self._changed.notify_all()

        def gone() -> None:
            self._forget(watcher)

        answer.cancel_by(gone)

    def end(self) -> None:
        """End the watchers' streams, so that they don't hold a stopping server."""
        with self._changed:
            self._ended = True
            watchers, thread = list(self._watchers), self._thread
        for watcher in watchers:
            if self._forget(watcher):
                watcher.answer.done()
        if thread is not None:
            thread.join()

    def _forget(self, watcher: _Watcher) -> bool:
        with self._changed:
            if watcher not in self._watchers:
                return False
            self._watchers.remove(watcher)
            self._feed.close()
            self._changed.notify_all()
            return True

    def _draw(self) -> None:
        while True:
            with self._changed:
                if not self._watchers:
                    self._thread = None
                    return
                now = self._clock()
                due = [w for w in self._watchers if w.due <= now]
                if not due:
                    self._changed.wait(min(w.due for w in self._watchers) - now)
                    continue
            try:
                now = self._clock()
                picture = self._picture(now)
                for watcher in due:
                    self._send(watcher, picture, now)
            except Exception:  # a fault here must not end what others watch, nor come back at once
                log.exception("a picture could not be drawn")
                for watcher in due:
                    watcher.due = self._clock() + watcher.interval

    def _send(self, watcher: _Watcher, picture: pb.Picture, now: float) -> None:
        watcher.due = max(watcher.due + watcher.interval, now + SHORTEST)
        answer = watcher.answer
        caller = answer.caller
        if caller is not None and caller.revoked:
            if self._forget(watcher):
                answer.fail(_revoked())
            return
        if answer.call.waiting >= BEHIND:
            return
        rounds, picture.missed = self._feed.since(watcher.seen, watcher.most)
        watcher.seen += len(rounds) + picture.missed
        prefix = "" if caller is None else caller.tenant.prefix
        del picture.rounds[:]
        picture.rounds.extend(_round(ran, self._began, prefix, caller is None) for ran in rounds)
        answer.send(picture)

    def _picture(self, now: float) -> pb.Picture:
        """All but the rounds, which differ by watcher."""
        spreads = self._feed.spreads(now)
        picture = pb.Picture(server=self._server, at=now - self._began, workers=self._workers, calls=self._calls())
        for model in self._catalog.models():
            engine = model.engine
            waiting = engine.rounds.tickets
            load = picture.models.add(model=model.name, version=model.version, kind=model.bundle.kind, waiting=waiting)
            if waiting:
                load.queue_age, load.expected_wait = engine.waited()
            counts = self._statistics.of(engine)
            with counts.lock:
                load.rounds, load.answered, load.failed = counts.rounds, counts.answered, counts.failed
                load.busy = sum(sum(batch[1:]) for batch in counts.batches.values())
            spread: Spread = spreads.get((model.name, model.version), NOTHING)
            load.recent, load.p50, load.p99 = spread
        sessions = self._shelf.sessions
        with self._shelf.changed:
            memory = sessions.resident
            begun = sessions.begun
            picture.sessions.CopyFrom(
                pb.SessionCounts(
                    memory=memory, stored=len(sessions) - memory, opened=begun["opened"], forked=begun["forked"],
                    resumed=begun["resumed"], ended=sum(sessions.ended_as.values()), turns=sessions.turns_applied,
                    replayed=sessions.turns_replayed,
                )
            )  # fmt: skip
        return picture


def _round(ran: Ran, began: float, prefix: str, all: bool) -> pb.RoundRun:
    run = pb.RoundRun(
        number=ran.number, model=ran.model, version=ran.version, graph=ran.graph, rows=ran.rows, steps=ran.steps,
        began=ran.started - began, seconds=ran.ended - ran.started,
    )  # fmt: skip
    for part in ran.parts:
        mine = all or part.session.startswith(prefix)
        session = part.session.removeprefix(prefix) if mine else ""
        run.parts.add(sequence=part.sequence, session=session, turn=part.turn if mine else 0, turns=part.turns, rows=part.rows)
    return run


def _revoked() -> ServeError:
    return Unauthenticated("KEY_REVOKED", "the key of this stream was revoked or changed since; connect with another")
