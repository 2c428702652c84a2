"""Sessions in Redis or Valkey, which several servers reach: one hash a session.

Fields of the hash: "record", a page of replies under the turn of its first ("57"), and "owner", the server that took the session
up last. Key and all go at once, when the session ends; and a day after it expires, should no server be left to end it.

A round is one call of a script: it runs alone, all of it, and in it a session that another server has taken up since is left
untouched and given back. So of two servers that both believe they have a session, one can go on.

- `process`: Redis is another process, and has what was written whenever the server is killed. What it keeps of it when it is
  killed itself is its own affair ("appendonly yes" loses at most a second, "no" all since its last snapshot).
- `disk`: Redis must run with "appendonly yes" and "appendfsync always"; it then flushes before it answers. Anything else is
  refused at the start.

Tried with Redis 7.0. Not for Redis Cluster: a round's sessions would lie on several nodes.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from server.records import DAMAGED, FOREIGN, SHORT, Page, Record, Unreadable, decode, encode
from server.store import Durability, Refusal, StoreFailed, StoreUnusable, package

log = logging.getLogger(__name__)

PREFIX = b"seqserve:session:"
TIMEOUT = 5.0  # seconds until an answer that does not come counts as a lost connection: a round waits for it
GRACE = 86_400.0  # seconds that an expired session stays, for a server to say that it expired
BATCH = 256  # sessions read in one exchange

_WRITE = """
local owners, moved, at = {}, {}, 2
for i, key in ipairs(KEYS) do  -- before anything is written: fails where a key is no hash
  owners[i] = redis.call('HGET', key, 'owner')
end
for i, key in ipairs(KEYS) do
  local sets, dels, expires, remove = tonumber(ARGV[at]), tonumber(ARGV[at + 1]), ARGV[at + 2], ARGV[at + 3] == '1'
  at = at + 4
  if owners[i] and owners[i] ~= ARGV[1] then
    moved[#moved + 1] = i
  else
    if remove then redis.call('DEL', key) end
    if sets > 0 then
      redis.call('HSET', key, 'owner', ARGV[1], unpack(ARGV, at, at + sets - 1))
      redis.call('PEXPIREAT', key, expires)
    end
    if dels > 0 then redis.call('HDEL', key, unpack(ARGV, at + sets, at + sets + dels - 1)) end
  end
  at = at + sets + dels
end
return moved
"""

_TAKE = """
if redis.call('HGET', KEYS[1], 'record') ~= ARGV[2] then return 0 end
redis.call('HSET', KEYS[1], 'owner', ARGV[1])
return 1
"""


class RedisStore:
    """Sessions at `url`: redis://, rediss:// or unix://. Raises StoreUnusable."""

    shared = True
    quick = False

    def __init__(self, url: str, durability: Durability, prefix: bytes = PREFIX) -> None:
        self.durability = durability
        self._prefix = prefix
        self._me = secrets.token_hex(8).encode()
        self._pages: dict[str, tuple[Page, ...]] = {}  # of the few sessions that have any
        self._redis = package("redis", "seqserve[redis]")
        backoff = package("redis.backoff", "seqserve[redis]")
        retry = package("redis.retry", "seqserve[redis]")
        try:
            self._client = self._redis.Redis.from_url(
                url.replace("valkey", "redis", 1) if url.startswith("valkey") else url,
                socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT,
                retry=retry.Retry(backoff.NoBackoff(), 1),  # at once, and once: to write the same again changes nothing
            )  # fmt: skip
            self._client.ping()
        except (self._redis.RedisError, ValueError, OSError) as e:
            raise StoreUnusable(f"store {_shown(url)}: {e}; is the server up, and the address right?") from None
        try:
            self._check(url)
        except BaseException:
            self._client.close()
            raise

    def write(self, records: Iterable[Record], removed: Iterable[str] = ()) -> frozenset[str]:
        ended = dict.fromkeys(removed)
        ids: list[str] = []
        args: list[bytes | int] = [self._me]
        pages: dict[str, tuple[Page, ...]] = {}
        for record in records:
            id = record.kept.id
            again = id in ended
            value, there, added, dropped = encode(record, () if again else self._pages.get(id, ()))
            ids.append(id)
            args += (2 + 2 * len(added), len(dropped), int((record.expires + GRACE) * 1000), int(again), b"record", value)
            for first, page in added:
                args += (first, page)
            args += dropped
            if added or dropped:
                pages[id] = there
            if again:
                del ended[id]
                pages[id] = there
        for id in ended:
            ids.append(id)
            args += (0, 0, 0, 1)
            pages[id] = ()
        if not ids:
            return frozenset()
        places = self._run(_WRITE, [self._key(id) for id in ids], args)
        moved = frozenset(ids[place - 1] for place in places)
        for id, there in pages.items():
            self._know(id, () if id in moved else there)
        return moved

    def read(self, id: str) -> Record | None:
        key = self._key(id)
        while True:
            try:
                fields = self._client.hgetall(key)
            except self._redis.RedisError as e:
                raise self._failed(e) from None
            if not fields:
                return None
            try:
                record = self._decoded(key, fields)
            except Unreadable as e:
                if e.reason in (DAMAGED, SHORT):  # nobody can go on with it; another release's is left to that release
                    self._run(_TAKE, [key], [self._me, fields[b"record"]])
                raise
            if self._run(_TAKE, [key], [self._me, fields[b"record"]]):  # else it was written meanwhile: look again
                return record

    def mine(self, id: str) -> bool:
        try:
            return bool(self._client.hget(self._key(id), b"owner") == self._me)
        except self._redis.RedisError as e:
            raise self._failed(e) from None

    def scan(self) -> Iterator[Record | Refusal]:
        seen: set[bytes] = set()
        cursor = 0
        while True:
            try:
                cursor, keys = self._client.scan(cursor, match=_literal(self._prefix) + b"*", count=BATCH)
                new = [key for key in dict.fromkeys(keys) if key not in seen]
                seen.update(new)
                pipeline = self._client.pipeline(transaction=False)
                for key in new:
                    pipeline.hgetall(key)
                found = pipeline.execute(raise_on_error=False)
            except self._redis.RedisError as e:
                raise self._failed(e) from None
            for key, fields in zip(new, found, strict=True):
                if isinstance(fields, self._redis.ResponseError):
                    yield Refusal(self._id(key), FOREIGN, f"the key holds something else: {fields}")
                elif fields:  # else it ended meanwhile
                    try:
                        yield self._decoded(key, fields)
                    except Unreadable as e:
                        yield Refusal(self._id(key), e.reason, str(e))
            if cursor == 0:
                return

    def close(self) -> None:
        self._client.close()

    def _decoded(self, key: bytes, fields: dict[bytes, bytes]) -> Record:
        if b"record" not in fields:
            raise Unreadable(FOREIGN, "the key holds a hash without a record")
        record, pages = decode(fields[b"record"], lambda first: fields.get(b"%d" % first))
        if self._key(record.kept.id) != key:
            raise Unreadable(DAMAGED, f"the record is session {record.kept.id!r}'s, and lies where another's should")
        self._know(record.kept.id, pages)
        return record

    def _know(self, id: str, pages: tuple[Page, ...]) -> None:
        if pages:
            self._pages[id] = pages
        else:
            self._pages.pop(id, None)

    def _run(self, script: str, keys: list[bytes], args: list[Any]) -> Any:
        try:
            try:
                return self._client.evalsha(_sha(script), len(keys), *keys, *args)
            except self._redis.exceptions.NoScriptError:  # the first time, and after Redis was restarted
                return self._client.eval(script, len(keys), *keys, *args)
        except self._redis.RedisError as e:
            raise self._failed(e) from None

    def _failed(self, e: Exception) -> StoreFailed:
        if isinstance(e, self._redis.ConnectionError | self._redis.TimeoutError):
            return StoreFailed("STORE_UNREACHABLE", f"sessions can't be stored: Redis does not answer ({e}); send again", retry_after=1.0)
        return StoreFailed("STORE_FAILED", f"sessions can't be stored: Redis refuses ({e}); send again", retry_after=1.0)

    def _check(self, url: str) -> None:
        """What this Redis would do with sessions that it was not asked to. Raises StoreUnusable."""
        try:
            config = {**self._client.config_get("append*"), **self._client.config_get("maxmemory-policy")}
        except self._redis.ResponseError as e:
            if self.durability is Durability.DISK:
                raise StoreUnusable(f"store {_shown(url)}: can't see whether it flushes before it answers ({e}); use 'process'") from None
            return
        except self._redis.RedisError as e:
            raise StoreUnusable(f"store {_shown(url)}: {e}") from None
        if self.durability is Durability.DISK and (config.get("appendonly"), config.get("appendfsync")) != ("yes", "always"):
            raise StoreUnusable(
                f"store {_shown(url)}: durability 'disk' needs a Redis with 'appendonly yes' and 'appendfsync always'; it has "
                f"{config.get('appendonly')!r} and {config.get('appendfsync')!r}"
            )
        if (policy := config.get("maxmemory-policy", "noeviction")) != "noeviction":
            log.warning("store %s drops sessions when its memory is full: maxmemory-policy is %s, set noeviction", _shown(url), policy)

    def _key(self, id: str) -> bytes:
        return self._prefix + id.encode()

    def _id(self, key: bytes) -> str | None:
        try:
            return key[len(self._prefix) :].decode()
        except UnicodeDecodeError:
            return None


@cache
def _sha(script: str) -> str:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()


def _literal(prefix: bytes) -> bytes:
    """A prefix as a pattern that matches only itself."""
    return b"".join(b"\\" + bytes([c]) if c in b"*?[]\\^-" else bytes([c]) for c in prefix)


def _shown(url: str) -> str:
    """A url for messages and logs: without its password."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
