"""What the store is being told of a session is done before the next thing that concerns its id: who closes it, or opens another of that
name, waits. And what nobody can store, or nobody wrote, harms no neighbour."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from server.app import App
from server.errors import Gone, InvalidInput, ServeError
from server.records import LONGEST, TURNS, Record, decode, encode
from tests.played import WIDTH, Wire, request, run, server

WAIT_S = 60
X = np.ones((1, 2, WIDTH), np.float32)


class Held:
    """A store's commits, each held until it is let through; what was written and removed, in order."""

    def __init__(self, app: App) -> None:
        self._write = app.store.write
        self.reached, self.through = threading.Event(), threading.Event()
        self.holds: Callable[[list[str], list[str]], bool] = lambda written, removed: False
        self.did: list[tuple[str, str]] = []
        app.store.write = self  # type: ignore[method-assign,assignment]

    def __call__(self, records: Iterable[Record], removed: Iterable[str] = ()) -> frozenset[str]:
        records, removed = list(records), list(removed)
        if self.holds([r.kept.id for r in records], removed):
            self.reached.set()
            assert self.through.wait(WAIT_S)
        self.did += [("end", id) for id in removed] + [("put", r.kept.id) for r in records]
        return self._write(records, removed)


def started(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def seen_waiting(app: App, thread: threading.Thread) -> None:
    while not app.shelf._awaited:
        assert thread.is_alive(), "it did not wait"


def test_a_close_waits_for_the_turn_that_is_being_stored() -> None:
    """Closed while its turn is on its way into the store, a session stays closed there; one opened anew under its id stays open."""
    with server("lmdb:PLACE") as app:
        wire, store = Wire(app), Held(app)
        app.shelf.open("two_layers", "", "s")
        wire.send(request("s", 1, X))
        store.holds = lambda written, removed: written == ["s"] and not store.reached.is_set()
        rounds = started(lambda: run(app))
        assert store.reached.wait(WAIT_S)
        ended = started(lambda: app.turns.close("s"))
        seen_waiting(app, ended)
        store.through.set()
        for thread in (rounds, ended):
            thread.join(WAIT_S)
        assert wire.replies[0].refusal.reason == "SESSION_CLOSED"
        assert store.did[-1] == ("end", "s")
        assert app.store.read("s") is None
        assert not app.shelf.unsettled
        app.shelf.open("two_layers", "", "s")
        found = app.store.read("s")
        assert found is not None
        assert found.kept.turn == 0


def test_an_open_waits_for_its_namesake_to_be_gone() -> None:
    """A session that is opened under an id that has just expired is not taken for the old one when that is removed."""
    with server("lmdb:PLACE") as app:
        store = Held(app)
        store.holds = lambda written, removed: removed == ["s"]
        app.shelf.open("two_layers", "", "s", ttl=1e-9)
        app.shelf._expiry.start()
        assert store.reached.wait(WAIT_S)
        opened = started(lambda: app.shelf.open("two_layers", "", "s"))
        seen_waiting(app, opened)
        store.through.set()
        opened.join(WAIT_S)
        assert store.did == [("put", "s"), ("end", "s"), ("put", "s")]
        assert app.store.read("s") is not None
        with app.shelf.changed:
            app.shelf._stopping = True
            app.shelf.changed.notify_all()
        app.shelf._expiry.join()


def test_only_what_can_not_be_stored_fails() -> None:
    """Of turns that are stored together one that nobody can encode fails; its neighbours' are stored and answered."""
    with server("lmdb:PLACE") as app:
        wire = Wire(app)
        names = [f"s{n}" for n in range(9)]
        for name in names:
            app.shelf.open("two_layers", "", name)
        write = app.store.write

        def refuses(records: Iterable[Record], removed: Iterable[str] = ()) -> frozenset[str]:
            records = list(records)
            if any(r.kept.id == "s4" for r in records):
                raise ValueError("too large for a record")
            return write(records, removed)

        app.store.write = refuses  # type: ignore[method-assign,assignment]
        wire.send(*(request(name, 1, X) for name in names))
        run(app)
        said = {reply.session: reply.refusal.reason for reply in wire.replies}
        assert said == {name: "STORE_FAILED" if name == "s4" else "" for name in names}
        assert [app.shelf.get(name).turn for name in names] == [0 if name == "s4" else 1 for name in names]
        assert not app.shelf.unsettled
        app.store.write = write  # type: ignore[method-assign]
        wire.send(request("s4", 1, X))
        run(app)
        assert wire.replies[-1].refusal.reason == ""


MADE_UP: dict[str, dict[str, Any]] = {
    "a ttl that is none": {"ttl": math.nan}, "no end": {"ttl": math.inf}, "too long": {"ttl": LONGEST * 2}, "none": {"ttl": 0.0},
    "before its beginning": {"ttl": -1.0}, "too many turns": {"turn": TURNS + 1, "acknowledged": TURNS + 1},
}  # fmt: skip


@pytest.mark.parametrize("made_up", MADE_UP.values(), ids=MADE_UP)
def test_what_no_server_wrote_is_not_brought(made_up: dict[str, Any]) -> None:
    """An exported session is the caller's to alter: one that would never end, or whose next turn could not be counted, is refused."""
    with server("lmdb:PLACE") as app:
        app.shelf.open("two_layers", "", "s")
        value, pages = app.shelf.export("s", move=True)
        record = decode(value, pages.get).record
        altered = encode(replace(record, kept=replace(record.kept, **made_up)))[0]
        with pytest.raises(Gone, match="no server wrote") as refused:
            app.shelf.bring(altered, {}, "s")
        assert refused.value.reason == "RECORD_DAMAGED"
        with pytest.raises(ServeError):
            app.shelf.get("s")
        assert app.shelf.bring(value, pages, "s").turn == 0


def test_an_id_in_a_record_is_held_to_what_ids_are() -> None:
    with server("memory") as app:
        app.shelf.open("two_layers", "", "s")
        value, _ = app.shelf.export("s", move=True)
        record = decode(value, lambda first: None).record
        for id in ("x" * 129, "two\nlines"):
            with pytest.raises(InvalidInput, match="printable characters"):
                app.shelf.bring(encode(replace(record, kept=replace(record.kept, id=id)))[0], {})


def test_a_session_that_is_far_from_its_end() -> None:
    """The thread that ends sessions waits no longer than a thread can."""
    with server("memory") as app:
        kept = app.shelf.open("two_layers", "", "s", ttl=LONGEST)
        with app.shelf.changed:
            app.shelf.sessions.close("s")
            app.shelf.sessions._tidy()  # or its end would be looked for first
            app.shelf.sessions.open(replace(kept, id="t", ttl=1e12), 0.0)
        app.shelf._expiry.start()
        while app.shelf._look_at == math.inf:
            assert app.shelf._expiry.is_alive()
        with app.shelf.changed:  # it lets go of this when it waits, or fails to
            app.shelf.changed.notify_all()
        app.shelf._look_at = math.inf
        while app.shelf._look_at == math.inf:
            assert app.shelf._expiry.is_alive(), "it could not wait"
        with app.shelf.changed:
            app.shelf._stopping = True
            app.shelf.changed.notify_all()
        app.shelf._expiry.join()
