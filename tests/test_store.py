"""Stores: all of them behave alike, what was written survives what it should, and damage is refused, never run on."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.lmdbstore import LmdbStore
from server.records import DAMAGED, FOREIGN, INLINE_BYTES, OTHER_FORMAT, Record, Unreadable
from server.redisstore import RedisStore
from server.sessions import Answered, Kept
from server.store import Durability, MemoryStore, Refusal, Store, StoreFailed, StoreUnusable, open_store
from tests.test_records import records, same

REDIS = shutil.which("redis-server")
KINDS = ["memory", "lmdb process", "lmdb disk", *(["redis"] if REDIS else [])]
KEEP = [kind for kind in KINDS if kind != "memory"]  # those that outlive the object
LATE = 4e9  # seconds of the wall clock that no test sees
if REDIS is None:
    print("test_store.py: no redis-server on this machine, its store is not tested (apt-get install redis-server)", file=sys.__stderr__)


@dataclass
class Redis:
    """A redis-server of our own, at a socket in a short path."""

    folder: Path
    process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.folder}/s"

    def start(self, *options: str) -> None:
        assert REDIS is not None
        command = [REDIS, "--port", "0", "--unixsocket", f"{self.folder}/s", "--dir", str(self.folder), "--save", "", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert any("eady to accept" in line for line in self.process.stdout), "redis-server did not start"

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture(scope="module")
def redis() -> Iterator[Redis]:
    with tempfile.TemporaryDirectory(prefix="sq") as folder:
        server = Redis(Path(folder))
        if REDIS:
            server.start()
        yield server
        server.kill()


class Place:
    """Where a store of some kind can be opened again and again."""

    def __init__(self, kind: str, folder: Path, redis: Redis) -> None:
        self.kind = kind
        self.folder = folder
        self.redis = redis
        self.runs = 0

    def fresh(self) -> None:
        """Another place, with nothing in it."""
        self.runs += 1

    def open(self) -> Store:
        if self.kind == "memory":
            return MemoryStore()
        if self.kind == "redis":
            return RedisStore(self.redis.url, Durability.PROCESS, f"{self.folder}[{self.runs}]:".encode())
        return LmdbStore(self.folder / str(self.runs), Durability(self.kind.partition(" ")[2]), map_size=1 << 18)


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path, redis: Redis) -> Place:
    return Place(request.param, tmp_path, redis)


@pytest.fixture(params=KEEP)
def lasting(request: pytest.FixtureRequest, tmp_path: Path, redis: Redis) -> Place:
    return Place(request.param, tmp_path, redis)


def session(id: str, turn: int = 0, acknowledged: int = 0, reply: int = 20, state: int = 256) -> Record:
    """A session whose state and replies follow from its id and turn, so that a look at it tells whether it is whole."""
    rng = np.random.default_rng([turn, *id.encode()])
    replies = tuple(Answered(t, b"d%d" % t, b"%d" % t * reply) for t in range(acknowledged + 1, turn + 1))
    arrays = None if turn == 0 else (rng.random((2, 1, state), "f4"), rng.integers(0, 9, (1, 3)))
    return Record(Kept(id, "model", "1", "sha256:0", 60.0, turn, acknowledged, replies=replies), LATE, arrays, f"after {turn}")


def found(store: Store) -> dict[str, Record]:
    """All sessions, where nothing is refused."""
    there = list(store.scan())
    refused = [r for r in there if isinstance(r, Refusal)]
    assert not refused
    return {r.kept.id: r for r in there if isinstance(r, Record)}


def agree(store: Store, expected: dict[str, Record]) -> None:
    """The store has these sessions, bit for bit, and no others."""
    there = found(store)
    assert there.keys() == expected.keys()
    for id, record in expected.items():
        assert same(there[id], record)


IDS = ["a", "aa", "ä" * 90, "𝄞" * 128]
COURSES = st.lists(  # rounds: of sessions, new turns, how many are acknowledged, bytes of a reply; or None: it ends
    st.dictionaries(st.sampled_from(IDS), st.none() | st.tuples(st.integers(0, 30), st.integers(0, 99), st.integers(0, 300))),
    max_size=8,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(COURSES, st.data())
def test_a_store_has_what_was_written(place: Place, course: list[dict[str, tuple[int, int, int] | None]], data: st.DataObject) -> None:
    """After any rounds of turns, acknowledgements, ends and new beginnings, across any reopenings, a store has exactly the
    sessions as they were last written."""
    place.fresh()
    store = place.open()
    expected: dict[str, Record] = {}
    for changes in course:
        puts, removed = [], []
        for id, change in changes.items():
            if change is None:
                removed.append(id)
                expected.pop(id, None)
                continue
            new, told, size = change
            kept = expected[id].kept if id in expected else session(id).kept
            acknowledged = min(kept.turn, kept.acknowledged + told)
            replies = [a for a in kept.replies if a.turn > acknowledged]
            replies += [Answered(t, b"d", b"%d" % t * size) for t in range(kept.turn + 1, kept.turn + new + 1)]
            kept = replace(kept, turn=kept.turn + new, acknowledged=acknowledged, replies=tuple(replies))
            expected[id] = replace(session(id, 1), kept=kept)
            puts.append(expected[id])
        assert store.write(puts, removed) == frozenset()
        if place.kind != "memory" and data.draw(st.booleans()):
            store.close()
            store = place.open()
            for id in data.draw(st.sets(st.sampled_from(IDS))) | set(expected):
                record = store.read(id)
                assert (record is not None) == (id in expected)
        agree(store, expected)
        for id, record in expected.items():
            one = store.read(id)
            assert one is not None
            assert same(one, record)
    store.close()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(records().filter(lambda r: r.kept.id), max_size=4, unique_by=lambda r: r.kept.id))
def test_any_session_survives(lasting: Place, any_records: list[Record]) -> None:
    """Sessions of any names, arrays and replies are there, bit for bit, when the store is opened again."""
    lasting.fresh()
    expected = {r.kept.id: replace(r, expires=LATE) for r in any_records}
    store = lasting.open()
    store.write(expected.values())
    store.close()
    store = lasting.open()
    agree(store, expected)
    store.close()


def test_a_session_that_begins_again_has_nothing_of_the_old_one(place: Place) -> None:
    """A session ended and opened anew under its id in one commit has neither replies nor pages of the first."""
    store = place.open()
    store.write([session("s", 40, 0, INLINE_BYTES)])
    store.write([session("s", 1)], ["s"])
    agree(store, {"s": session("s", 1)})
    store.write([], ["s"])
    assert store.read("s") is None
    assert found(store) == {}
    store.close()
    if isinstance(store, LmdbStore):
        again = LmdbStore(place.folder / "0", Durability.PROCESS)
        assert again._env.stat()["entries"] == 1, "only the mark of the format is left"
        again.close()


def test_workers_write_at_once(place: Place) -> None:
    """Threads that write their own sessions at once, while others read, lose and mix nothing."""
    store = place.open()
    faults: list[BaseException] = []

    def work(me: int) -> None:
        try:
            for turn in range(1, 26):
                store.write([session(f"{me}.{n}", turn, max(0, turn - 2)) for n in range(4)], [f"{me}.gone"])
                one = store.read(f"{me}.{turn % 4}")
                assert one is not None
                assert one.kept.turn == turn
                store.write([session(f"{me}.gone", turn)])
                for record in store.scan() if turn % 9 == 0 else ():
                    assert isinstance(record, Record)
        except BaseException as e:
            faults.append(e)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    expected = {f"{me}.{n}": session(f"{me}.{n}", 25, 23) for me in range(4) for n in range(4)}
    agree(store, expected | {f"{me}.gone": session(f"{me}.gone", 25) for me in range(4)})
    store.close()


def test_what_is_not_a_session_is_refused_and_the_others_live_on(lasting: Place) -> None:
    """Records cut, flipped, of another format, of another session or of another program are each refused with their reason."""
    store = lasting.open()
    store.write([session(id, 30, 0, 300) for id in ("good", "cut", "flipped", "newer", "moved", "foreign", "pageless")])
    values = {id: raw(store, id) for id in ("cut", "flipped", "newer", "good")}
    spoil(store, "cut", values["cut"][:100])
    spoil(store, "flipped", values["flipped"][:-9] + b"?" + values["flipped"][-8:])
    spoil(store, "newer", values["newer"][:8] + b"\x02" + values["newer"][9:])
    spoil(store, "moved", values["good"])
    spoil(store, "foreign", b"something else")
    spoil(store, "pageless", None)
    expected = {"cut": "SHORT", "flipped": DAMAGED, "newer": OTHER_FORMAT, "moved": DAMAGED, "foreign": FOREIGN, "pageless": DAMAGED}
    for again in (False, True):
        if again:
            store.close()
            store = lasting.open()
        there = list(store.scan())
        assert {r.id: r.reason for r in there if isinstance(r, Refusal)} == expected
        assert [r.kept.id for r in there if isinstance(r, Record)] == ["good"]
        for id, reason in expected.items():
            with pytest.raises(Unreadable) as refused:
                store.read(id)
            assert refused.value.reason == reason
    store.write([session("cut", 1)], ["flipped"])
    assert store.read("flipped") is None
    assert same(store.read("cut") or session("cut"), session("cut", 1))
    store.close()


def raw(store: Store, id: str) -> bytes:
    """The bytes of a session's record."""
    if isinstance(store, LmdbStore):
        with store._env.begin() as txn:
            return bytes(txn.get(b"s" + id.encode()))
    assert isinstance(store, RedisStore)
    return bytes(store._client.hget(store._key(id), "record"))


def spoil(store: Store, id: str, value: bytes | None) -> None:
    """Put other bytes in a record's place; None: take its pages away."""
    if isinstance(store, LmdbStore):
        with store._env.begin(write=True) as txn:
            if value is not None:
                txn.put(b"s" + id.encode(), value)
            else:
                cursor = txn.cursor()
                assert cursor.set_range(b"p\0" + bytes([len(id)]) + id.encode())
                assert cursor.delete()
        return
    assert isinstance(store, RedisStore)
    key = store._key(id)
    if value is None:
        pages = [field for field in store._client.hkeys(key) if field.isdigit()]
        assert store._client.hdel(key, *pages)
    else:
        store._client.hset(key, "record", value)


def test_urls() -> None:
    """A url or durability that is none is refused with the ones there are; passwords are not shown."""
    assert isinstance(open_store("memory"), MemoryStore)
    for url, durability, words in (
        ("memory", "disk", "ends with the process"), ("memory", "forever", "none, process, disk"), ("lmdb:", "process", "lmdb:PATH"),
        ("postgres://x", "process", "there are memory"), ("redis://me:secret@localhost:1", "process", "is the server up"),
    ):  # fmt: skip
        with pytest.raises(StoreUnusable, match=words) as refused:
            open_store(url, durability)
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize(("module", "url"), [("lmdb", "lmdb:x"), ("redis", "redis://localhost")])
def test_a_missing_package_is_named(module: str, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store whose package is not installed says what to install."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(StoreUnusable, match=f"pip install '.*{module}.*'"):
        open_store(url)


# LMDB


def test_a_second_server_is_told_who_has_the_store(tmp_path: Path) -> None:
    """A path in use is refused, naming the process, and free again once that one has closed it."""
    first = open_store(f"lmdb:{tmp_path}/deep/store")
    with pytest.raises(StoreUnusable, match=r"in use by process \d+"):
        open_store(f"lmdb:{tmp_path}/deep/store")
    first.write([session("s", 1)])
    first.close()
    first.close()
    with pytest.raises(StoreFailed):
        first.write([session("s", 2)])
    with pytest.raises(StoreFailed):
        first.read("s")
    second = open_store(f"lmdb:{tmp_path}/deep/store")
    agree(second, {"s": session("s", 1)})
    second.close()


def test_the_file_grows(tmp_path: Path) -> None:
    """A store of more than its map's first size takes everything; a round larger than the map too."""
    store = LmdbStore(tmp_path, Durability.PROCESS, map_size=1 << 16)
    expected = {f"s{n}": session(f"s{n}", 1, state=4096) for n in range(40)}
    store.write(expected.values())
    agree(store, expected)
    assert (tmp_path / "data.mdb").stat().st_size > 1 << 20
    store.close()


def test_what_others_put_there_is_left_alone(tmp_path: Path) -> None:
    """A file that is no LMDB file, or another program's, is refused and not changed."""
    import lmdb

    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "data.mdb").write_bytes(b"a diary" * 5000)
    with lmdb.open(str(tmp_path / "other"), lib_version=0) as other, other.begin(write=True) as txn:
        txn.put(b"k", b"v")
    for name, word in (("text", "not a store"), ("other", "another program's data")):
        before = (tmp_path / name / "data.mdb").read_bytes()
        for _ in range(2):
            with pytest.raises(StoreUnusable, match=word):
                open_store(f"lmdb:{tmp_path}/{name}")
        assert (tmp_path / name / "data.mdb").read_bytes() == before


RUN = "import sys; sys.path.insert(0, '.'); from tests.test_store import {0}; {0}(*sys.argv[1:])"
ROOT = Path(__file__).parent.parent


def child(function: str, *args: object) -> subprocess.Popen[str]:
    """A function of this file in a process of its own, whose lines are read."""
    command = [sys.executable, "-c", RUN.format(function), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def writes_on(url: str, durability: str) -> None:
    """In a child: turns of four sessions in rounds, for ever; the number of each is told once it is written."""
    store = open_store(url, durability)
    taken_up = [store.read(f"s{n}") for n in range(4)]
    turn = max(0 if record is None else record.kept.turn for record in taken_up)
    while True:
        turn += 1
        assert not store.write([session(f"s{n}", turn, max(0, turn - 5 * n - 1), 200) for n in range(4)])
        print(turn, flush=True)


@pytest.mark.parametrize(("kind", "kills"), [("lmdb process", 20), ("lmdb disk", 3), *([("redis", 3)] if REDIS else [])])
def test_kill_9_loses_nothing_that_was_told(kind: str, kills: int, tmp_path: Path, redis: Redis) -> None:
    """A process killed with kill -9 at any moment leaves everything that it told of, each round whole or not there at all."""
    url, durability = (redis.url, "process") if kind == "redis" else (f"lmdb:{tmp_path}", kind.partition(" ")[2])
    rng = random.Random(7)
    last = 0
    for _ in range(kills):
        with child("writes_on", url, durability) as process:
            assert process.stdout is not None
            told = [int(process.stdout.readline()) for _ in range(rng.randint(1, 60))]
            process.kill()
            told += [int(line) for line in process.stdout if line.endswith("\n")]
        assert told == list(range(last + 1, last + 1 + len(told))), "each went on where the one before was killed"
        store = open_store(url, durability)
        there = found(store)
        last = there["s0"].kept.turn
        assert told[-1] <= last <= told[-1] + 1
        agree(store, {f"s{n}": session(f"s{n}", last, max(0, last - 5 * n - 1), 200) for n in range(4)})
        store.close()


def fills_up(path: str) -> None:
    """In a child: write until no file may grow, then on again; says what failed and what is there."""
    import resource

    store = open_store(f"lmdb:{path}")
    store.write([session("s0", 1)])
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, resource.RLIM_INFINITY))
    done, reason = 1, ""
    while not reason:
        try:
            store.write([session(f"s{done}", 1)])
            done += 1
        except StoreFailed as e:
            reason = e.reason
    before = len(found(store))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    store.write([session(f"s{done}", 1)])
    print(json.dumps([done, reason, before, len(found(store))]))
    store.close()


def test_a_full_disk_fails_the_round_and_no_more(tmp_path: Path) -> None:
    """Where the file can't grow the write fails and changes nothing; with room again the same store goes on."""
    with child("fills_up", tmp_path) as process:
        output, _ = process.communicate()
    done, reason, before, after = json.loads(output)
    assert process.returncode == 0
    assert reason == "STORE_FAILED"
    assert done > 10
    assert (before, after) == (done, done + 1)
    store = open_store(f"lmdb:{tmp_path}")
    assert len(found(store)) == after
    store.close()


def opens_all(folder: str) -> None:
    """In a child: open each store below, say what it has, write to it, open it again."""
    for path in sorted(Path(folder).iterdir()):
        print(json.dumps([path.name, "opening"]), flush=True)
        try:
            store = LmdbStore(path, Durability.PROCESS, map_size=1 << 22)
        except StoreUnusable as e:
            print(json.dumps([path.name, "refused", str(e)]), flush=True)
            continue
        whole, refused = [], []
        for record in store.scan():
            if isinstance(record, Refusal):
                refused.append(record.reason)
            else:
                n = int(record.kept.id[1:])
                assert same(record, session(record.kept.id, *COURSE[n])), "a survivor is what was last written, bit for bit"
                whole.append(record.kept.id)
        store.write([session(f"new{n}", 1) for n in range(40)], whole[:1])
        store.close()
        store = LmdbStore(path, Durability.PROCESS, map_size=1 << 22)
        again = {r.kept.id for r in store.scan() if isinstance(r, Record)}
        assert again == {*whole[1:], *(f"new{n}" for n in range(40))}, "what was written to it since is there"
        store.close()
        print(json.dumps([path.name, "open", len(whole), refused]), flush=True)


COURSE = {n: (1 + n % 40, n % 7 if n % 40 > 7 else 0, 20 + 9 * (n % 30), 16 if n % 3 else 400) for n in range(80)}
"""Turn, acknowledged, bytes of a reply and of a state of 80 sessions: some in the tree's leaves, some in pages of their own."""


def test_a_damaged_file_is_refused_or_its_survivors_live_on(tmp_path: Path) -> None:
    """A file cut short, overwritten or with bytes flipped at any place brings no process down: it is refused with a reason, or
    the sessions that can still be read are there bit for bit, the lost ones are spoken of, and the store can be written to."""
    sound = LmdbStore(tmp_path / "sound", Durability.PROCESS, map_size=1 << 22)
    sound.write([session(f"s{n}", 1, 0, 50, state) for n, (*_, state) in COURSE.items()])  # so that there are free pages, with old sessions
    sound.write([session(f"s{n}", 2, 0, 50, state) for n, (*_, state) in COURSE.items()])
    sound.write([session(f"s{n}", *course) for n, course in COURSE.items()])
    agree(sound, {f"s{n}": session(f"s{n}", *course) for n, course in COURSE.items()})
    sound.close()
    data = (tmp_path / "sound" / "data.mdb").read_bytes()
    rng = random.Random(5)
    pages = len(data) // 4096

    def changed(at: int, other: bytes) -> bytes:
        return data[:at] + other + data[at + len(other) :]

    variants = [data, *(data[: len(data) * n // 20] for n in range(20))]
    for page in rng.sample(range(pages), 50):
        at, other = page * 4096, rng.randrange(pages) * 4096
        variants.append(changed(at, bytes(4096)))  # a page that never reached the disk
        variants.append(changed(at, data[other : other + 4096]))  # another's, or an older one
        variants.append(changed(at + (place := rng.randrange(40)), bytes([data[at + place] ^ 1 << rng.randrange(8)])))  # its head
    for _ in range(50):
        at = rng.randrange(len(data))
        variants.append(changed(at, rng.randbytes(rng.choice([1, 8, 100, 5000]))[: len(data) - at]))
    stores = tmp_path / "variants"
    for number, variant in enumerate(variants):
        (stores / f"{number:04}").mkdir(parents=True)
        (stores / f"{number:04}" / "data.mdb").write_bytes(variant)
    with child("opens_all", stores) as process:
        assert process.stdout is not None
        lines = [json.loads(line) for line in process.stdout]
    assert process.returncode == 0, f"brought down by variant {lines[-1][0]}"
    results = [line for line in lines if line[1] != "opening"]
    assert len(results) == len(variants)
    assert results[0][2:] == [len(COURSE), []]
    lived = [line for line in results if line[1] == "open"]
    silent = [line for line in lived if line[2] < len(COURSE) and not line[3]]
    assert not silent, "what is lost is spoken of"
    assert len(lived) > len(variants) // 2
    assert sum(line[2] for line in lived) > len(lived) * len(COURSE) // 2, "most sessions survive most damage"


# Redis, where there is one (said above where not)

if REDIS:

    def test_of_two_servers_the_one_that_took_a_session_up_goes_on(redis: Redis) -> None:
        """Once another server has read a session, the first one's writes of it are given back and change nothing; its other
        sessions are written all the same."""
        first, second = (RedisStore(redis.url, Durability.PROCESS, b"two:") for _ in range(2))
        first.write([session("mine", 1), session("wanders", 1)])
        agree(second, {"mine": session("mine", 1), "wanders": session("wanders", 1)})
        assert first.write([session("wanders", 2)]) == frozenset(), "to look at it is not to take it up"
        assert second.read("wanders") is not None
        assert first.write([session("mine", 2), session("wanders", 3), session("new", 1)]) == {"wanders"}
        assert first.write([], ["wanders"]) == {"wanders"}
        assert second.write([session("wanders", 3, 2)]) == frozenset()
        agree(first, {"mine": session("mine", 2), "wanders": session("wanders", 3, 2), "new": session("new", 1)})
        assert first.read("wanders") is not None
        assert second.write([session("wanders", 4)]) == {"wanders"}
        first.close()
        second.close()

    def test_a_round_that_redis_refuses_is_not_written_at_all(redis: Redis) -> None:
        """A key of another program's among a round's fails the round, with nothing of it written."""
        store = RedisStore(redis.url, Durability.PROCESS, b"whole:")
        store._client.set("whole:b", "a string")
        with pytest.raises(StoreFailed):
            store.write([session("a", 1), session("b", 1)], ["c"])
        assert store.read("a") is None
        assert [(r.id, r.reason) for r in store.scan() if isinstance(r, Refusal)] == [("b", FOREIGN)]
        store.close()

    def test_a_lost_connection_fails_the_round_until_redis_is_back() -> None:
        """While Redis is away reads and writes say so; when it is back, killed and started again, everything goes on. With `disk`
        it must flush before it answers, and then has all of it."""
        with tempfile.TemporaryDirectory(prefix="sq") as folder, contextlib.ExitStack() as after:
            server = Redis(Path(folder))
            after.callback(server.kill)
            server.start()
            with pytest.raises(StoreUnusable, match="appendfsync always"):
                open_store(server.url, "disk")
            server.kill()
            server.start("--appendonly", "yes", "--appendfsync", "always")
            store = open_store(server.url, "disk")
            store.write([session("s", 1)])
            server.kill()
            for attempt in (lambda: store.write([session("s", 2)]), lambda: store.read("s"), lambda: list(store.scan())):
                with pytest.raises(StoreFailed) as failed:
                    attempt()
                assert failed.value.reason == "STORE_UNREACHABLE"
            server.start("--appendonly", "yes", "--appendfsync", "always")
            agree(store, {"s": session("s", 1)})
            store.write([session("s", 2)])
            assert same(store.read("s") or session("s"), session("s", 2))
            store.close()
