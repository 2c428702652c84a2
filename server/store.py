"""Where sessions survive: what a store promises, the one in memory, and the way to the others.

    memory              no longer than the process
    lmdb:PATH           a directory of this machine's; one server at a time             lmdbstore.py
    redis://HOST:PORT   Redis or Valkey, reached by several servers (rediss://, unix://) redisstore.py

    durability   what a `write` that returned survives
    none         nothing is asked: write sessions that leave memory, or all of them on the way out
    process      kill -9 of the server at any moment
    disk         a power cut

A store keeps records (`records.py`) and knows neither models nor turns under way. It doesn't expire sessions; it gives back
what was written, and whoever asks looks at the clock.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, ClassVar, Protocol

from server.errors import ServeError
from server.records import Record


class Durability(StrEnum):
    NONE = "none"
    PROCESS = "process"
    DISK = "disk"


class StoreUnusable(Exception):
    """A store that can't be opened; the message says why and what to do."""


class StoreFailed(ServeError):
    """A read or write that the store did not make: for a write, count its turns as not applied, and try again later."""

    status: ClassVar[str] = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class Refusal:
    """A record that can't be taken up. It stays where it is: another release, or a person, may read it."""

    id: str | None  # None: not even that can be read
    reason: str  # as records.Unreadable
    message: str


class Store(Protocol):
    """Any number of threads may call; a session is written by one at a time."""

    durability: Durability
    shared: bool  # whether other servers write to it too
    quick: bool  # whether a read or a write takes some 10 µs; else it is not for a thread that others wait for

    def write(self, records: Iterable[Record], removed: Iterable[str] = ()) -> frozenset[str]:
        """One commit: end `removed`, then put `records`; all of it or nothing, as durable as promised when it returns. Gives
        the ids that another server has taken up since (only where `shared`): of these nothing was written. Raises StoreFailed,
        or ValueError for a record that can't be encoded; then nothing was written, except that a connection lost meanwhile
        leaves it open: the same turns written again, or others in their place, are right in both cases."""
        ...

    def read(self, id: str) -> Record | None:
        """Take up a session: where `shared`, from now on no other server's writes of it count. Raises Unreadable, StoreFailed."""
        ...

    def mine(self, id: str) -> bool:
        """Whether no other server has taken a session up, or ended it, since this one did. Raises StoreFailed."""
        ...

    def scan(self) -> Iterator[Record | Refusal]:
        """Everything there is, in no order, and without taking it up. Raises StoreFailed."""
        ...

    def close(self) -> None:
        """Make everything written durable, and let go of it. May be called again."""
        ...


def open_store(url: str, durability: str = Durability.PROCESS) -> Store:
    """The store at `url`. Raises StoreUnusable: for a url or durability that is none, a missing package, a store in use by
    another server or unreachable, or files that are not a store's."""
    try:
        wanted = Durability(durability)
    except ValueError:
        raise StoreUnusable(f"durability {durability!r}; there are {', '.join(Durability)}") from None
    kind, _, path = url.partition(":")
    if url == "memory":
        if wanted is Durability.DISK:
            raise StoreUnusable("store 'memory' ends with the process; for durability 'disk' use lmdb:PATH or redis://HOST")
        return MemoryStore()
    if kind == "lmdb" and path:
        from server.lmdbstore import LmdbStore

        return LmdbStore(path, wanted)
    if kind in ("redis", "rediss", "unix", "valkey", "valkeys"):
        from server.redisstore import RedisStore

        return RedisStore(url, wanted)
    raise StoreUnusable(f"store {url!r}; there are memory, lmdb:PATH, redis://HOST:PORT/DB, rediss://…, unix:///PATH/TO/SOCKET")


def package(name: str, extra: str) -> Any:
    """A package that only one kind of store needs. Raises StoreUnusable, with what to install."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise StoreUnusable(f"this store needs the package {name!r}: pip install '{extra}' ({e})") from None


class MemoryStore:
    """Sessions that end with the process; a record is kept as it is, without copying."""

    durability = Durability.NONE
    shared = False
    quick = True

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}
        self._lock = threading.Lock()

    def write(self, records: Iterable[Record], removed: Iterable[str] = ()) -> frozenset[str]:
        with self._lock:
            for id in removed:
                self._records.pop(id, None)
            for record in records:
                self._records[record.kept.id] = record
        return frozenset()

    def read(self, id: str) -> Record | None:
        with self._lock:
            record = self._records.get(id)
        return None if record is None else _stateless(record)

    def mine(self, id: str) -> bool:
        return True

    def scan(self) -> Iterator[Record | Refusal]:
        with self._lock:
            records = list(self._records.values())
        yield from map(_stateless, records)

    def close(self) -> None:
        pass


def _stateless(record: Record) -> Record:
    """As the other stores give it back: the state is in `arrays` alone."""
    return record if record.kept.state is None else replace(record, kept=replace(record.kept, state=None))


__all__ = ["Durability", "MemoryStore", "Refusal", "Store", "StoreFailed", "StoreUnusable", "open_store", "package"]
