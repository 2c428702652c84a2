"""A session as bytes, and back.

Law of this file: what was written is read back, or refused with a reason; nothing else can come of bytes. It is pure: it
knows neither where records are kept nor what a model is. Integers are little-endian, lengths in bytes.

A record, or a page of replies:

    0   magic      4  "sqsv"
    4   crc32      4  over everything that follows
    8   format     2  FORMAT
    10  kind       2  1 a session, 2 a page of replies
    12  length     4  of what follows
    16  session:  ttl f64 · expires f64 · turn u64 · acknowledged u64 · lengths of id, model, version, fingerprint u16 each,
                  of rest u32 · number of states u16 (65535: has read nothing) · of pages u16 · of replies u16
                  id · model · version · fingerprint · rest           (UTF-8)
                  states:   dtype u8 · axes u8 · length of each axis u64 · values, in C order
                  pages:    first turn u64 · last turn u64 · crc32 of the page u32
                  replies:  digest u8 length · reply u32 length · digest · reply      the last of them is of turn `turn`
        page:     id u16 length · replies u16 count · first turn u64 · id · replies as above

Why pages. A caller may leave 1,024 replies unacknowledged, and a commit must not write them all again. So a record carries
its newest replies itself, as long as they are few and small (INLINE, INLINE_BYTES): one value to write where a caller
acknowledges as it goes, as nearly all do. Once they are more, they move to a page, written once, under a key of its own, and
the record only names it. A page goes when its last reply is acknowledged. What a commit writes is thus bounded by the new
replies and INLINE_BYTES, however many are kept. Record and pages change in one transaction of the store; that a page is the
one which the record means (not one left by another session of that id) is held by its crc32.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from contract.bundle import BATCH, DTYPES, Graph
from server.sessions import Answered, Kept

FORMAT = 1
MAGIC = b"sqsv"
INLINE = 64  # replies that a record carries itself
INLINE_BYTES = 4096  # and their bytes: written again at every turn until they are acknowledged or moved to a page

LONGEST = 1e9  # seconds that a session may live after its last turn
TURNS = 2**63  # more than anyone takes; there is room for one more turn after that

Array = np.ndarray[Any, Any]

_SESSION, _PAGE = 1, 2
_FRESH = 0xFFFF
_HEAD = struct.Struct("<HHI")
_ALL = struct.Struct("<4sIHHI")
_FIELDS = struct.Struct("<ddQQHHHHIHHH")
_NAMED = struct.Struct("<QQI")
_REPLY = struct.Struct("<BI")
_PAGE_FIELDS = struct.Struct("<HHQ")
_DTYPES = tuple(dtype.newbyteorder("<") for dtype in DTYPES.values())
_CODES = {name: code for code, name in enumerate(DTYPES)}
_FAULTS = (struct.error, ValueError, TypeError, IndexError, OverflowError, MemoryError)  # what reading nonsense may raise

FOREIGN = "FOREIGN"  # not written by this program
OTHER_FORMAT = "OTHER_FORMAT"  # by another release of it
SHORT = "SHORT"  # cut short
DAMAGED = "DAMAGED"  # not what was written


class Unreadable(ValueError):
    """Bytes that are no session: `reason` is FOREIGN, OTHER_FORMAT, SHORT or DAMAGED; the message says what was found."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Packed:
    """The states of all rows of a bank as their records have them, made at once: a round's sessions share one."""

    __slots__ = ("_size", "_values", "count")

    def __init__(self, axes: Sequence[int], bank: Sequence[Array]) -> None:
        """`axes` says where rows lie in each array. Raises ValueError for a dtype that no contract has."""
        rows = bank[0].shape[axes[0]] if bank else 0
        abouts = [_about(a.dtype, (*a.shape[:axis], 1, *a.shape[axis + 1 :])) for axis, a in zip(axes, bank, strict=True)]
        self.count = len(bank)
        self._size = sum(map(len, abouts)) + sum(a.nbytes for a in bank) // max(1, rows)
        whole = np.empty((rows, self._size), np.uint8)
        at = 0
        for axis, array, about in zip(axes, bank, abouts, strict=True):
            whole[:, at : at + len(about)] = np.frombuffer(about, np.uint8)
            at += len(about)
            values = np.ascontiguousarray(np.moveaxis(array, axis, 0)).reshape(rows, -1).view(np.uint8)  # [rows, bytes]
            whole[:, at : at + values.shape[1]] = values
            at += values.shape[1]
        self._values = whole.reshape(-1).data

    def row(self, place: int) -> memoryview:
        """One row's states, each with its dtype and shape before its values."""
        return self._values[place * self._size : (place + 1) * self._size]


@dataclass(slots=True)
class Record:
    """A session as it survives; never changed once made, and not frozen, as Kept. Of `kept` everything but its `state`, which is
    here as arrays: one for each state of the graph, in the contract's order, or None where it has read nothing. `expires` is in
    seconds of the wall clock (epoch), for a record outlives the process whose monotonic clock set it; `rest` is input not yet
    read (half a word)."""

    kept: Kept
    expires: float
    arrays: tuple[Array, ...] | None = None
    rest: str = ""
    packed: tuple[int, memoryview] | None = None  # in place of arrays, only to be encoded: how many states, and Packed.row


class Page(NamedTuple):
    """A page of replies as its record names it."""

    first: int  # the turn of its first reply, and its key
    last: int
    crc: int


Written = tuple[bytes, tuple[Page, ...], tuple[tuple[int, bytes], ...], tuple[int, ...]]
"""What one commit of a session comes to, all at once: put this record; pages that are there beside it then, to be given to the
next `encode`; pages to add, by key; keys of pages to drop. A plain tuple: one is made for each session of each round."""


class Stored(NamedTuple):
    """What `decode` found: the session, and the pages that it lies in beside its record."""

    record: Record
    pages: tuple[Page, ...]


def encode(record: Record, pages: tuple[Page, ...] = ()) -> Written:
    """What to write of a session whose replies lie in `pages` so far.

    Raises ValueError for what the format cannot hold: a dtype that no contract has, names over 64 KiB, replies that do not
    run from the first unacknowledged turn to the last applied.
    """
    kept = record.kept
    replies: Sequence[Answered] = kept.replies
    acknowledged = kept.acknowledged
    if len(replies) != kept.turn - acknowledged:
        raise ValueError(f"session {kept.id!r}: {len(replies)} replies for turns {acknowledged + 1} to {kept.turn}")
    added: tuple[tuple[int, bytes], ...] = ()
    dropped: tuple[int, ...] = ()
    if pages:
        if pages[0].last <= acknowledged:
            dropped = tuple(page.first for page in pages if page.last <= acknowledged)
            pages = pages[len(dropped) :]
        if pages:
            replies = replies[pages[-1].last - acknowledged :]
    if len(replies) > INLINE or (replies and _bytes(replies) > INLINE_BYTES):
        page, value = _page(kept.id, replies)
        pages = (*pages, page)
        added = ((page.first, value),)
        replies = ()
    id = kept.id.encode()
    names, model, version, fingerprint = _names(kept.model, kept.version, kept.fingerprint)
    rest = record.rest.encode()
    arrays, packed = record.arrays, record.packed
    count = packed[0] if packed is not None else _FRESH if arrays is None else len(arrays)
    try:
        parts: list[bytes | memoryview] = [
            _FIELDS.pack(
                kept.ttl, record.expires, kept.turn, acknowledged, len(id), model, version, fingerprint, len(rest), count, len(pages),
                len(replies),
            ),
            id, names, rest,
        ]  # fmt: skip
        if packed is not None:
            parts.append(packed[1])
        elif arrays:
            for array in arrays:
                parts += (_about(array.dtype, array.shape), array.tobytes())
        for page in pages:
            parts.append(_NAMED.pack(*page))
        if replies:
            _append(parts, replies)
        return _sealed(_SESSION, parts)[0], pages, added, dropped
    except struct.error as e:
        raise ValueError(f"session {kept.id!r} is too large for a record: {e}") from None


def decode(value: bytes, page: Callable[[int], bytes | None]) -> Stored:
    """The session that `encode` wrote; `page` gives the value under a page's key, or None. Raises Unreadable, and nothing else
    of its own."""
    body, _ = _opened(value, _SESSION, "the record")
    try:
        record, pages, inline = _session(body)
    except _FAULTS as e:
        raise Unreadable(DAMAGED, f"the record's checksum is right, its contents are not: {e}") from None
    kept = record.kept
    replies: list[Answered] = []
    for named in pages:
        found = page(named.first)
        if found is None:
            raise Unreadable(DAMAGED, f"replies of turns {named.first} to {named.last} are missing")
        replies += _replies_of(found, kept.id, named)
    replies = [a for a in replies if a.turn > kept.acknowledged] + inline
    if len(replies) != kept.turn - kept.acknowledged or any(a.turn != turn for turn, a in enumerate(replies, kept.acknowledged + 1)):
        raise Unreadable(DAMAGED, f"replies of turns {kept.acknowledged + 1} to {kept.turn} are not all there")
    kept = Kept(kept.id, kept.model, kept.version, kept.fingerprint, kept.ttl, kept.turn, kept.acknowledged, None, tuple(replies))
    return Stored(Record(kept, record.expires, record.arrays, record.rest), pages)


def lives(record: Record) -> str | None:
    """Why no server wrote that, or None where one may have: what a caller made up may have a deadline that never comes, or a turn after
    which none can be counted."""
    kept = record.kept
    if 0 < kept.ttl <= LONGEST and 0 <= record.expires < math.inf and kept.turn <= TURNS:
        return None
    return f"it is at turn {kept.turn}, lives for {kept.ttl:g} s and until {record.expires:g}"


def fits(record: Record, graph: Graph) -> str | None:
    """Why the record's state can't be this graph's, or None where it can: number of states, dtypes and shapes, with the same
    number of rows in each. That the fingerprint is the model's is the caller's to compare."""
    if record.arrays is None:
        return None
    if len(record.arrays) != len(graph.states):
        return f"it has {len(record.arrays)} states, the model {len(graph.states)}"
    rows: int | None = None
    for state, array in zip(graph.states, record.arrays, strict=True):
        if array.dtype != state.numpy_dtype:
            return f"state {state.input!r} is {array.dtype}, the model's {state.dtype}"
        if array.ndim == len(state.axes) and rows is None:
            rows = array.shape[state.batch_axis]
        expected = tuple(rows if axis == BATCH else axis for axis in state.axes)
        if array.shape != expected or not rows:
            return f"state {state.input!r} has the shape {list(array.shape)}, the model's {list(state.axes)}"
    return None


def _sealed(kind: int, parts: Sequence[bytes | memoryview]) -> tuple[bytes, int]:
    """A header before the parts; and its crc32."""
    body = b"".join(parts)
    size = len(body)
    crc = zlib.crc32(body, zlib.crc32(_HEAD.pack(FORMAT, kind, size)))
    return _ALL.pack(MAGIC, crc, FORMAT, kind, size) + body, crc


def _opened(value: bytes, kind: int, what: str) -> tuple[memoryview, int]:
    """The body behind a header that holds what it promises, and its crc32."""
    if value[:4] != MAGIC[: len(value)] or not value:
        raise Unreadable(FOREIGN if value else SHORT, f"{what} is not of this program: it starts with {value[:4]!r}")
    if len(value) < _ALL.size:
        raise Unreadable(SHORT, f"{what} is cut short: {len(value)} bytes of a header of {_ALL.size}")
    _, crc, format, got, length = _ALL.unpack_from(value)
    if format != FORMAT:
        raise Unreadable(OTHER_FORMAT, f"{what} has format {format}, this release reads {FORMAT}")
    if len(value) < _ALL.size + length:
        raise Unreadable(SHORT, f"{what} is cut short: {len(value)} bytes of {_ALL.size + length}")
    view = memoryview(value)
    if zlib.crc32(view[8:]) != crc:
        raise Unreadable(DAMAGED, f"{what} is damaged: its checksum is wrong")
    if got != kind or len(value) != _ALL.size + length:
        raise Unreadable(DAMAGED, f"{what} is of kind {got} and {len(value)} bytes, not of kind {kind} and {_ALL.size + length}")
    return view[_ALL.size :], crc


def _session(body: memoryview) -> tuple[Record, tuple[Page, ...], list[Answered]]:
    ttl, expires, turn, acknowledged, *lengths, states, pages, replies = _FIELDS.unpack_from(body)
    at = _FIELDS.size
    texts = []
    for length in lengths:
        texts.append(str(body[at : at + length], "utf-8"))
        at += length
    id, model, version, fingerprint, rest = texts
    arrays: list[Array] = []
    for _ in range(0 if states == _FRESH else states):
        code, axes = body[at], body[at + 1]
        found = np.ndarray(_shape(axes).unpack_from(body, at + 2), _DTYPES[code], body, at + 2 + 8 * axes)
        at += 2 + 8 * axes + found.nbytes
        arrays.append(found.copy())  # aligned, writable, and it keeps no record from being freed
    named = []
    for _ in range(pages):
        named.append(Page(*_NAMED.unpack_from(body, at)))
        at += _NAMED.size
    inline, at = _read(body, at, replies, turn - replies + 1)
    if at != len(body):
        raise ValueError(f"{len(body) - at} bytes too many")
    kept = Kept(id, model, version, fingerprint, ttl, turn, acknowledged)
    return Record(kept, expires, None if states == _FRESH else tuple(arrays), rest), tuple(named), inline


def _page(id: str, replies: Sequence[Answered]) -> tuple[Page, bytes]:
    name = id.encode()
    first = replies[0].turn
    parts: list[bytes | memoryview] = [_PAGE_FIELDS.pack(len(name), len(replies), first), name]
    _append(parts, replies)
    value, crc = _sealed(_PAGE, parts)
    return Page(first, replies[-1].turn, crc), value


def _replies_of(value: bytes, id: str, named: Page) -> list[Answered]:
    """The replies of the page that a record names."""
    what = f"the page of replies from turn {named.first}"
    body, crc = _opened(value, _PAGE, what)
    try:
        length, count, first = _PAGE_FIELDS.unpack_from(body)
        at = _PAGE_FIELDS.size + length
        whose = str(body[_PAGE_FIELDS.size : at], "utf-8")
        replies, at = _read(body, at, count, first)
    except _FAULTS as e:
        raise Unreadable(DAMAGED, f"{what}: its checksum is right, its contents are not: {e}") from None
    if whose != id or crc != named.crc or at != len(body) or first != named.first or first + count - 1 != named.last:
        raise Unreadable(DAMAGED, f"{what} is not the one that the record names, but of session {whose!r} with {count} replies")
    return replies


def _bytes(replies: Sequence[Answered]) -> int:
    return len(replies[0].reply) if len(replies) == 1 else sum([len(a.reply) for a in replies])


def _append(parts: list[bytes | memoryview], replies: Sequence[Answered]) -> None:
    for answered in replies:
        parts += (_REPLY.pack(len(answered.digest), len(answered.reply)), answered.digest, answered.reply)


def _read(body: memoryview, at: int, count: int, turn: int) -> tuple[list[Answered], int]:
    replies = []
    for place in range(count):
        digest, reply = _REPLY.unpack_from(body, at)
        at += _REPLY.size
        if at + digest + reply > len(body):
            raise ValueError("a reply runs past the end")
        replies.append(Answered(turn + place, bytes(body[at : at + digest]), bytes(body[at + digest : at + digest + reply])))
        at += digest + reply
    return replies, at


@lru_cache(maxsize=1024)
def _names(model: str, version: str, fingerprint: str) -> tuple[bytes, int, int, int]:
    """The three, end to end, and their lengths."""
    names = model.encode(), version.encode(), fingerprint.encode()
    return b"".join(names), len(names[0]), len(names[1]), len(names[2])


@lru_cache(maxsize=1024)
def _about(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    """What stands before an array's values. Raises ValueError for a dtype that no contract has."""
    code = _CODES.get(dtype.name)
    if code is None or dtype != _DTYPES[code]:
        raise ValueError(f"a state of dtype {dtype} can't be kept; a contract's are {', '.join(DTYPES)}")
    return struct.pack("<BB", code, len(shape)) + _shape(len(shape)).pack(*shape)


@cache
def _shape(axes: int) -> struct.Struct:
    return struct.Struct(f"<{axes}Q")
