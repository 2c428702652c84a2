"""A session as bytes: what is written comes back, and no other bytes are taken for a session."""

from __future__ import annotations

import contextlib
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from contract.bundle import DTYPES, Graph, State, Tensor
from server.errors import InvalidInput
from server.records import (
    DAMAGED,
    FOREIGN,
    INLINE,
    INLINE_BYTES,
    OTHER_FORMAT,
    SHORT,
    Packed,
    Page,
    Record,
    Stored,
    Unreadable,
    decode,
    encode,
    fits,
)
from server.rpc import gate
from server.sessions import WINDOW, Answered, Kept
from server.states import Rows

TEXT = st.text(max_size=20)
SECONDS = st.floats(0, 1e10, allow_nan=False)
GRAPH = Graph(
    "g.onnx", (Tensor("x", "float32", ("batch", "time", 3)),), (Tensor("y", "float32", ("batch", "time", 2)),),
    (State("h", "hn", "float32", (2, "batch", 4)), State("n", "nn", "int64", ("batch",))),
)  # fmt: skip


def arrays() -> st.SearchStrategy[np.ndarray[Any, Any]]:
    """Any array that a contract allows, of no axes and of no rows too, in C order or not."""
    shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    return st.sampled_from(list(DTYPES.values())).flatmap(lambda d: hnp.arrays(d, shapes)).flatmap(lambda a: st.sampled_from([a, a.T]))


@st.composite
def records(draw: st.DrawFn) -> Record:
    """Any session."""
    replies = draw(st.lists(st.tuples(st.binary(max_size=32), st.binary(max_size=40) | st.just(b"r" * INLINE_BYTES)), max_size=6))
    acknowledged = draw(st.integers(0, 2**40))
    kept = Kept(
        draw(TEXT), draw(TEXT), draw(TEXT), draw(TEXT), draw(SECONDS), acknowledged + len(replies), acknowledged,
        replies=tuple(Answered(acknowledged + 1 + i, digest, reply) for i, (digest, reply) in enumerate(replies)),
    )  # fmt: skip
    return Record(kept, draw(SECONDS), draw(st.none() | st.lists(arrays(), max_size=4).map(tuple)), draw(TEXT))


def a_record(turn: int = 2, acknowledged: int = 0, reply: bytes = b"the reply") -> Record:
    """A session of GRAPH after some turns, small enough to be cut at every byte."""
    state = (np.arange(8, dtype="f4").reshape(2, 1, 4), np.array([turn]))
    replies = tuple(Answered(t, b"d%d" % t, reply) for t in range(acknowledged + 1, turn + 1))
    return Record(Kept("a session", "model", "1", "sha256:0", 60.0, turn, acknowledged, replies=replies), 1e9, state, "hal")


def same(one: Record, other: Record) -> bool:
    """Whether two records are of the same session, bit for bit."""
    plain = [(r.kept, r.expires, r.rest, r.arrays is None) for r in (one, other)]
    mine, theirs = one.arrays or (), other.arrays or ()
    bits = [[(a.dtype, a.shape, a.tobytes()) for a in arrays] for arrays in (mine, theirs)]
    return plain[0] == plain[1] and bits[0] == bits[1]


class Shelf:
    """What a store does with a session: the value of its record, and its pages."""

    def __init__(self) -> None:
        self.value = b""
        self.pages: tuple[Page, ...] = ()
        self.values: dict[int, bytes] = {}
        self.wrote = 0  # bytes, at the last commit

    def put(self, record: Record) -> None:
        self.value, self.pages, added, dropped = encode(record, self.pages)
        for first in dropped:
            del self.values[first]
        self.values.update(added)
        self.wrote = len(self.value) + sum(len(page) for _, page in added)

    def get(self) -> Stored:
        return decode(self.value, self.values.get)


@settings(deadline=None)
@given(records())
def test_what_is_written_is_read_back(record: Record) -> None:
    """A session of any names, arrays and replies comes back bit for bit, and the arrays can be written to."""
    shelf = Shelf()
    shelf.put(record)
    found = shelf.get()
    assert same(found.record, record)
    assert found.pages == shelf.pages
    assert all(a.flags.writeable and a.flags.aligned and a.flags.owndata for a in found.record.arrays or ())


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60), st.sampled_from([0, 30, 700, 5000])), max_size=30))
def test_turns_and_acknowledgements_in_any_order(steps: list[tuple[int, int, int]]) -> None:
    """Over any course of commits and acknowledgements the replies kept are those after the last acknowledged, no page is left
    over or missing, and a record that is read goes on with the pages it names."""
    shelf = Shelf()
    replies: list[Answered] = []
    turn = acknowledged = 0
    for new, told, size in steps:
        acknowledged = min(turn, acknowledged + told)
        replies = [a for a in replies if a.turn > acknowledged]
        replies += [Answered(turn + 1 + i, b"d", b"%d" % (turn + 1 + i) + b"." * size) for i in range(new)]
        turn += new
        record = replace(a_record(0), kept=Kept("s", "m", "1", "f", 9.0, turn, acknowledged, replies=tuple(replies)))
        shelf.put(record)
        found = shelf.get()
        assert same(found.record, record)
        assert found.pages == shelf.pages
        assert set(shelf.values) == {page.first for page in shelf.pages}


def test_a_commit_does_not_write_all_replies_again() -> None:
    """However many replies are unacknowledged, a turn writes its own and a bounded number of bytes of the others."""
    shelf = Shelf()
    for turn in range(1, WINDOW + 1):
        shelf.put(a_record(turn, 0, b"r" * 200))
        assert shelf.wrote < 2 * (INLINE_BYTES + INLINE * 10) + 20 * len(shelf.pages) + 1000
    assert len(shelf.get().record.kept.replies) == WINDOW
    shelf.put(a_record(WINDOW, WINDOW))
    assert not shelf.values
    shelf.put(a_record(WINDOW + 1, WINDOW))
    assert len(shelf.values) == 0, "who acknowledges as they go has one value to a session"


def test_every_cut_is_refused() -> None:
    """A record or a page that ends at any byte before its last is refused as cut short."""
    shelf = Shelf()
    shelf.put(a_record())
    for end in range(len(shelf.value)):
        with pytest.raises(Unreadable) as refused:
            decode(shelf.value[:end], shelf.values.get)
        assert refused.value.reason == SHORT
    shelf.put(a_record(3, 0, b"r" * INLINE_BYTES))
    (page,) = shelf.values.values()
    for end in range(len(page)):
        with pytest.raises(Unreadable) as refused:
            decode(shelf.value, {shelf.pages[0].first: page[:end]}.get)
        assert refused.value.reason == SHORT


def test_every_flipped_byte_is_refused() -> None:
    """A record or a page with any one byte changed is refused, with a reason that fits where it is."""
    shelf = Shelf()
    shelf.put(a_record(30, 0, b"r" * 200))
    (page,) = shelf.values.values()
    (first,) = shelf.values
    for whole in (shelf.value, page):
        for at in range(len(whole)):
            for bits in (0x01, 0x80, 0xFF):
                changed = bytearray(whole)
                changed[at] ^= bits
                value, there = (bytes(changed), page) if whole is shelf.value else (shelf.value, bytes(changed))
                with pytest.raises(Unreadable) as refused:
                    decode(value, {first: there}.get)
                expected = {FOREIGN} if at < 4 else {OTHER_FORMAT} if 8 <= at < 10 else {DAMAGED, SHORT} if 12 <= at < 16 else {DAMAGED}
                assert refused.value.reason in expected


@settings(deadline=None)
@given(st.binary(max_size=200), st.booleans(), st.sampled_from([1, 2, 3]))
def test_no_bytes_bring_the_reader_down(body: bytes, sealed: bool, kind: int) -> None:
    """Any bytes, even such that carry a right checksum, are a session or refused, for a record and for a page."""
    if sealed:
        head = b"\x01\0" + bytes([kind, 0]) + len(body).to_bytes(4, "little")
        body = b"sqsv" + zlib.crc32(head + body).to_bytes(4, "little") + head + body
    shelf = Shelf()
    shelf.put(a_record(3, 0, b"r" * INLINE_BYTES))
    for value in (body, shelf.value):
        with pytest.raises(Unreadable):
            decode(value, {shelf.pages[0].first: body}.get)


@settings(deadline=None)
@given(st.integers(16, 10_000), st.binary(min_size=1, max_size=8))
def test_contents_that_make_no_sense_are_refused(at: int, other: bytes) -> None:
    """A record with a right checksum over changed contents is a session or refused, never another error."""
    shelf = Shelf()
    shelf.put(a_record())
    body = bytearray(shelf.value)
    at = 16 + at % (len(body) - 16)
    body[at : at + len(other)] = other[: len(body) - at]
    body[4:8] = zlib.crc32(bytes(body[8:])).to_bytes(4, "little")
    with contextlib.suppress(Unreadable):
        decode(bytes(body), shelf.values.get)


def test_a_page_of_another_session_is_refused() -> None:
    """A page that is sound, but not the one that the record names, is refused; so is one that is missing."""
    mine, other = Shelf(), Shelf()
    mine.put(a_record(3, 0, b"r" * INLINE_BYTES))
    other.put(a_record(3, 0, b"s" * INLINE_BYTES))
    for values, word in ((other.values, "not the one"), ({}, "missing")):
        with pytest.raises(Unreadable, match=word) as refused:
            decode(mine.value, values.get)
        assert refused.value.reason == DAMAGED


def test_records_of_this_format_stay_readable() -> None:
    """Bytes written when the format was fixed are still read, and still written: change FORMAT if this fails."""
    shelf = Shelf()
    shelf.put(a_record())
    assert shelf.value.hex() == GOLDEN
    assert same(decode(bytes.fromhex(GOLDEN), shelf.values.get).record, a_record())


@pytest.mark.parametrize(("id", "said"), [("s", "s"), ("acme|s", "s"), ("a|b", "a|b"), ("", "")])
def test_the_id_beside_a_record_is_the_records(id: str, said: str) -> None:
    """What an export says beside its record, with or without its tenant as any release wrote it; another id is damage."""
    whole = a_record(1, 0)
    value = encode(replace(whole, kept=replace(whole.kept, id=id)))[0]
    assert gate.brought(None, value, {}.get, said, "named") == "named"
    for other in (said + "x", said[:-1] + "?"):
        with pytest.raises(InvalidInput, match="is damaged") as refused:
            gate.brought(None, value, {}.get, other, "named")
        assert refused.value.reason == "RECORD_DAMAGED"


@pytest.mark.parametrize("array", [np.zeros(2, ">f4"), np.zeros(2, "c8"), np.array(["a"])])
def test_what_no_contract_has_is_not_written(array: np.ndarray[Any, Any]) -> None:
    """A state of a dtype that the format cannot give back is refused when it is written."""
    with pytest.raises(ValueError, match="can't be kept"):
        encode(replace(a_record(), arrays=(array,)))


def test_a_state_of_another_model_does_not_fit() -> None:
    """A record's state fits a graph only with its number of states, dtypes and shapes, and one number of rows."""
    record = a_record()
    h, n = record.arrays or ()
    assert fits(record, GRAPH) is None
    assert fits(replace(record, arrays=None), GRAPH) is None
    assert fits(replace(record, arrays=(np.zeros((2, 3, 4), "f4"), np.zeros(3, "i8"))), GRAPH) is None
    for wrong, word in (
        ((h,), "1 states"), ((h.astype("f8"), n), "float64"), ((h[:1], n), "shape"), ((h, np.zeros(2, "i8")), "shape"),
        ((h[:, :0], n[:0]), "shape"), ((h, n.reshape(1, 1)), "shape"), ((h[0], n), "shape"),
    ):  # fmt: skip
        why = fits(replace(record, arrays=wrong), GRAPH)
        assert why is not None
        assert word in why


GOLDEN = (
    "737173762d20aa0501000100b80000000000000000004e400000000065cdcd410200000000000000000000000000000009000500010008000300000002000000"
    "0200612073657373696f6e6d6f64656c317368613235363a3068616c0a03020000000000000001000000000000000400000000000000000000000000803f0000"
    "004000004040000080400000a0400000c0400000e04004010100000000000000020000000000000002090000006431746865207265706c790209000000643274"
    "6865207265706c79"
)


@settings(deadline=None)
@given(st.integers(1, 5), st.lists(st.tuples(st.sampled_from(sorted(DTYPES)), st.integers(0, 2), st.integers(1, 4)), min_size=1))
def test_rows_of_a_bank_at_once(rows: int, states: list[tuple[str, int, int]]) -> None:
    """A bank's rows put into bytes together make the records that each row's own arrays make, wherever the rows lie."""
    rng = np.random.default_rng(rows)
    axes = tuple(axis for _, axis, _ in states)
    shapes = [tuple(rows if at == axis else size + at for at in range(3)) for axis, (_, _, size) in zip(axes, states, strict=True)]
    bank = tuple(rng.integers(0, 2, shape).astype(DTYPES[name]) for shape, (name, _, _) in zip(shapes, states, strict=True))
    packed = Packed(axes, bank)
    kept = Kept("s", "model", "1", "sha256:0", 60.0)
    for row in range(rows):
        arrays = Rows(axes, bank, row, 1).arrays()
        assert encode(Record(kept, 1.0, None, "", (packed.count, packed.row(row)))) == encode(Record(kept, 1.0, arrays))
