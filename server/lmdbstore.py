"""Sessions in one LMDB file: a directory with `data.mdb`, which one server at a time owns.

Keys are "s" and the session's id for its record; "p", the length of the id, the id and a turn for a page of replies. Ids too
long for a key are there by their hash; the record has the id itself.

What the flags mean. LMDB never overwrites what the last commit points to: it writes changed pages elsewhere, then one small
page that makes them current. So a process that is killed at any moment leaves the last commit or the one before, whole.

- `process`: commits are handed to the kernel (pwrite) and not flushed (MDB_NOSYNC). Kill -9 loses nothing that returned, for
  the page cache is the kernel's. After a power cut the disk may have some pages of a commit and not others: sessions may be
  missing, some turns old, or refused; the check at the start keeps such a file from being run on.
- `disk`: a commit is flushed (fdatasync) before it returns. Writers that wait meanwhile share the next flush.
- Never MDB_WRITEMAP, though commits would be faster (31 µs against 92 for 64 sessions of 2.5 KB): a full disk would be a SIGBUS
  instead of an error, and a stray write of this process could reach the file.

What is checked. LMDB trusts its file: of a damaged one it reads past the map, which ends the process (SIGBUS, SIGSEGV). So
before LMDB sees a file, `lmdb.verify` reads all its pages from outside (20 µs a session of 2.5 KB). Where it finds a fault, what
can still be reached is moved to a new file, the damaged one is kept beside it as `data.mdb.damaged-N`, and `scan` says what
was lost. Values that changed inside a sound structure are found by the records' own checksums. A file cut or overwritten
under a running server can't be guarded against.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from server.records import DAMAGED, Page, Record, Unreadable, decode, encode
from server.store import Durability, Refusal, StoreFailed, StoreUnusable, package
from server.survivors import survivors

FILE = "data.mdb"
MAP = 1 << 30  # bytes of address space to start with; doubled when full
BATCH = 256  # records read under one lock

_FORMAT_KEY, _FORMAT = b"format", b"seqserve sessions 1"
_LONGEST = 400  # bytes of an id in a key; LMDB allows 511 for all of it


class _Write:
    """One thread's changes, on their way into a commit."""

    __slots__ = ("dropped", "error", "made", "pages", "puts", "removed")

    def __init__(self) -> None:
        self.removed: list[str] = []
        self.dropped: list[bytes] = []
        self.puts: list[tuple[bytes, bytes]] = []
        self.pages: dict[str, tuple[Page, ...]] = {}
        self.made = False
        self.error: StoreFailed | None = None


class LmdbStore:
    """Sessions in the directory `path`, which is made if need be. Raises StoreUnusable."""

    shared = False

    def __init__(self, path: str | Path, durability: Durability, map_size: int = MAP) -> None:
        self.durability = durability
        self.quick = durability is not Durability.DISK  # opened, closed and read in 20 to 40 µs; a flush takes milliseconds
        self._lmdb = package("lmdb", "lmdb>=3")
        self._pages: dict[str, tuple[Page, ...]] = {}  # of the few sessions that have any
        self._lock = threading.Lock()  # one transaction at a time; the map grows only between them
        self._line: deque[_Write] = deque()
        self._lost: list[str] = []
        self._closed = False
        path = Path(path).absolute()
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._owner = _own(path)
        except OSError as e:
            raise StoreUnusable(f"store lmdb:{path}: {e}") from None
        try:
            self._open(path, map_size)
        except BaseException:
            os.close(self._owner)
            raise

    def write(self, records: Iterable[Record], removed: Iterable[str] = ()) -> frozenset[str]:
        """As Store.write. Threads that come while another commits are committed together, by the first of them."""
        mine = self._encoded(records, removed)
        self._line.append(mine)
        with self._lock:
            if not mine.made:
                self._commit([self._line.popleft() for _ in range(len(self._line))])
        if mine.error is not None:
            raise mine.error
        if not mine.made:  # whoever committed for us was interrupted
            raise StoreFailed("STORE_FAILED", "sessions can't be stored; nothing was changed", retry_after=1.0)
        return frozenset()

    def read(self, id: str) -> Record | None:
        with self._reading() as txn:
            value = txn.get(_key(id))
            if value is None:
                return None
            return self._decoded(txn, _key(id), value)

    def mine(self, id: str) -> bool:
        return True

    def scan(self) -> Iterator[Record | Refusal]:
        yield from (Refusal(None, DAMAGED, message) for message in self._lost)
        after = b"s"
        while True:
            batch: list[Record | Refusal] = []
            with self._reading() as txn:
                cursor = txn.cursor()
                there = cursor.set_range(after)
                while there and len(batch) < BATCH and (key := cursor.key())[:1] == b"s":
                    try:
                        batch.append(self._decoded(txn, key, cursor.value()))
                    except Unreadable as e:
                        batch.append(Refusal(_id(key), e.reason, str(e)))
                    after = key + b"\0"
                    there = cursor.next()
            yield from batch
            if len(batch) < BATCH:
                return

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._env.sync(True)
            self._env.close()
            os.close(self._owner)

    def _encoded(self, records: Iterable[Record], removed: Iterable[str]) -> _Write:
        new = _Write()
        new.removed += removed
        for record in records:
            id = record.kept.id
            had = () if new.removed and id in new.removed else self._pages.get(id, ())
            value, pages, added, dropped = encode(record, had)
            new.puts.append((_key(id), value))
            if added or dropped:
                new.puts += ((_page_key(_name(id), first), page) for first, page in added)
                new.dropped += (_page_key(_name(id), first) for first in dropped)
                new.pages[id] = pages
        return new

    def _commit(self, writes: list[_Write]) -> None:
        """All of these in one transaction; all of them fail where it fails."""
        error: StoreFailed | None = None
        while True:
            try:
                if self._closed:
                    error = StoreFailed("STORE_CLOSED", "the server is going down; send the turn again", retry_after=1.0)
                else:
                    with self._env.begin(write=True) as txn:
                        for write in writes:
                            _apply(txn, write)
            except self._lmdb.MapFullError:
                try:
                    self._env.set_mapsize(2 * self._env.info()["map_size"])
                    continue
                except self._lmdb.Error as e:
                    error = _failed(e)
            except self._lmdb.Error as e:
                error = _failed(e)
            break
        for write in writes:
            if error is None:
                for id in write.removed:
                    self._pages.pop(id, None)
                self._know(write.pages)
            write.error = error
            write.made = True

    def _know(self, pages: dict[str, tuple[Page, ...]]) -> None:
        for id, there in pages.items():
            if there:
                self._pages[id] = there
            else:
                self._pages.pop(id, None)

    def _decoded(self, txn: Any, key: bytes, value: bytes) -> Record:
        record, pages = decode(value, lambda first: txn.get(_page_key(key[1:], first)))
        id = record.kept.id
        if _key(id) != key:
            raise Unreadable(DAMAGED, f"the record is session {id!r}'s, and lies where another's should")
        self._know({id: pages})
        return record

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Any]:
        with self._lock:
            if self._closed:
                raise StoreFailed("STORE_CLOSED", "the server is going down; try again", retry_after=1.0)
            try:
                with self._env.begin() as txn:
                    yield txn
            except self._lmdb.Error as e:
                raise _failed(e) from None

    def _open(self, path: Path, map_size: int) -> None:
        shutil.rmtree(path / "rebuilt", ignore_errors=True)  # left by a process that was killed on the way
        data = path / FILE
        if data.exists() and data.stat().st_size:
            verify = package("lmdb.verify", "lmdb>=3")
            try:
                faults = verify.verify(str(path))
            except (verify.VerifyError, OSError) as e:
                raise StoreUnusable(f"{data} is not a store, or its first pages are damaged ({e}); move it away, or restore it") from None
            if faults:
                self._lost = self._rebuild(path, faults, map_size)
        elif data.exists():
            data.unlink()
            self._lost = [f"{data} was empty: its making was cut short, or all that was in it is lost"]
        flush = self.durability is Durability.DISK
        with contextlib.ExitStack() as undo:
            try:
                self._env = self._lmdb.open(str(path), map_size=map_size, mode=0o600, sync=flush, metasync=flush, lib_version=0)
                undo.callback(self._env.close)
                with self._env.begin(write=True) as txn:
                    known = txn.get(_FORMAT_KEY)
                    if known is None and txn.stat()["entries"] == 0:
                        txn.put(_FORMAT_KEY, _FORMAT)
                    elif known != _FORMAT:
                        whose = "another program's data" if known is None else repr(known.decode(errors="replace"))
                        raise StoreUnusable(f"{data} holds {whose}, this release keeps {_FORMAT.decode()!r}; give another path")
            except self._lmdb.Error as e:
                raise StoreUnusable(f"store lmdb:{path}: {e}") from None
            if flush:
                _flush_directory(path)
            undo.pop_all()

    def _rebuild(self, path: Path, faults: list[str], map_size: int) -> list[str]:
        """Move what can still be reached of a damaged file to a new one. Gives what was lost."""
        data, new = path / FILE, path / "rebuilt"
        lost = list(dict.fromkeys(faults))[:20]
        new.mkdir(mode=0o700)
        size = max(map_size, 2 * data.stat().st_size)
        with self._lmdb.open(str(new), map_size=size, mode=0o600, lock=False, lib_version=0) as env, env.begin(write=True) as txn:
            for key, value in survivors(data):
                if key[:1] in (b"s", b"p") and len(key) <= env.max_key_size():
                    txn.put(key, value)
            txn.put(_FORMAT_KEY, _FORMAT)
        number = 1
        while (aside := path / f"{FILE}.damaged-{number}").exists():
            number += 1
        os.link(data, aside)
        (new / FILE).replace(data)
        (path / "lock.mdb").unlink(missing_ok=True)
        new.rmdir()
        _flush_directory(path)
        return [f"{data} was damaged; what can be read lives on, the rest is lost, the file is kept as {aside.name}: {'; '.join(lost)}"]


def _apply(txn: Any, write: _Write) -> None:
    for id in write.removed:
        txn.delete(_key(id))
        pages = _page_key(_name(id), 0)
        cursor = txn.cursor()
        there = cursor.set_range(pages)
        while there and cursor.key()[:-8] == pages[:-8]:  # whatever is there, not what is known: it may never have been read
            there = cursor.delete()
    for key in write.dropped:
        txn.delete(key)
    if write.puts:
        txn.cursor().putmulti(write.puts)


def _failed(e: Exception) -> StoreFailed:
    return StoreFailed("STORE_FAILED", f"sessions can't be stored: {e}; nothing was changed", retry_after=1.0)


def _own(path: Path) -> int:
    """Be the one server of that directory, as long as the file stays open: the kernel lets go of it however a process ends."""
    owner = os.open(path / "owner", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(owner, 32).decode(errors="replace").strip() or "?"
        os.close(owner)
        raise StoreUnusable(f"store lmdb:{path} is in use by process {pid}: stop that server, or give another path") from None
    os.ftruncate(owner, 0)
    os.pwrite(owner, f"{os.getpid()}\n".encode(), 0)
    return owner


def _flush_directory(path: Path) -> None:
    for directory in (path, path.parent):  # a file is durable only once its name is
        entry = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)


def _name(id: str) -> bytes:
    name = id.encode()
    return name if len(name) <= _LONGEST else b"\0" + hashlib.blake2b(name, digest_size=32).digest()


def _key(id: str) -> bytes:
    return b"s" + _name(id)


def _page_key(name: bytes, first: int) -> bytes:
    return b"p" + len(name).to_bytes(2, "big") + name + first.to_bytes(8, "big")


def _id(key: bytes) -> str | None:
    name = key[1:]
    try:
        return None if name[:1] == b"\0" and len(name) == 33 else name.decode()
    except UnicodeDecodeError:
        return None
