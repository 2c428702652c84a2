"""Header blocks of HTTP/2 (RFC 7541, 9113 §8) as gRPC uses them: what callers' say, and what ours are made of.

Callers of one kind send the same few bytes with every call once their table is filled. A block that changed no table is remembered with
what it said, so that reading it again is a look into a dict; all else is read by the package hpack.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

import grpc
from hpack import Decoder
from hpack.exceptions import HPACKError
from hpack.table import HeaderTable

from server.rpc.front import Metadata, status_text

MOST_BYTES = 16 << 10  # of one call's headers, names and values and 32 a line, as RFC 9113 §6.5.2 counts; told to callers
MOST_READ = 64 << 10  # the same, beyond which the connection ends
REMEMBERED = 256  # blocks a connection; callers with a header of its own in each call would fill any number
_TIMEOUT = re.compile(rb"(\d{1,8})([HMSmun])")
_UNIT_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_OURS = {b"te", b"content-type", b"grpc-timeout", b"grpc-encoding", b"grpc-accept-encoding"}  # between gRPC's two ends


class Unreadable(Exception):
    """The connection cannot go on: both ends' tables would differ from now on."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Headers that are no gRPC call, or not one that can be served; `http` is the status where the caller speaks no gRPC at all."""

    status: grpc.StatusCode
    message: str
    http: int = 200


@dataclass(frozen=True, slots=True)
class Asked:
    """What a call's headers say."""

    path: str = ""
    metadata: Metadata = ()
    timeout: float | None = None
    """Seconds."""

    encoding: str = "identity"
    refusal: Refusal | None = None


class _Table(HeaderTable):  # type: ignore[misc,unused-ignore]  # hpack's own types differ by version
    """Counts changes."""

    changes = 0

    def add(self, name: bytes, value: bytes) -> None:
        self.changes += 1
        super().add(name, value)

    def _shrink(self) -> None:
        self.changes += 1
        super()._shrink()


class Reader:
    """Reads the header blocks of one connection, in order."""

    def __init__(self) -> None:
        self._decoder = Decoder(MOST_READ)
        self._table = _Table()
        self._decoder.header_table = self._table
        self._known: dict[bytes, Asked] = {}

    def read(self, block: bytes) -> Asked:
        """Raises Unreadable."""
        known = self._known.get(block)
        if known is not None:
            return known
        before = self._table.changes
        try:
            headers = [(bytes(name), bytes(value)) for name, value in self._decoder.decode(block, raw=True)]
        except HPACKError as e:
            raise Unreadable(f"headers that cannot be read: {e}") from None
        asked = _asked(headers)
        if self._table.changes != before:
            self._known.clear()
        elif len(self._known) < REMEMBERED:
            self._known[block] = asked
        return asked


def _asked(headers: list[tuple[bytes, bytes]]) -> Asked:
    given: dict[bytes, bytes] = {}
    metadata: list[tuple[str, str | bytes]] = []
    size = 0
    for name, value in headers:
        size += len(name) + len(value) + 32
        if name.startswith(b":") or name in _OURS:
            given[name] = value
        elif name.endswith(b"-bin"):
            for part in value.split(b","):  # as one or as several lines: they mean the same
                part = part.strip()
                try:
                    metadata.append((name.decode("latin-1"), base64.b64decode(part + b"=" * (-len(part) % 4), validate=True)))
                except (ValueError, binascii.Error):
                    return Asked(refusal=Refusal(grpc.StatusCode.INVALID_ARGUMENT, f"header {name!r} is not base64"))
        else:
            metadata.append((name.decode("latin-1"), value.decode("utf-8", "replace")))
    if size > MOST_BYTES:
        return Asked(refusal=Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, f"headers of {size} bytes; at most {MOST_BYTES} are read"))
    if given.get(b":method") != b"POST":
        return Asked(refusal=Refusal(grpc.StatusCode.UNIMPLEMENTED, "gRPC calls are POST requests", 405))
    content = given.get(b"content-type", b"")
    if not content.startswith(b"application/grpc") or content[16:17] not in (b"", b"+", b";"):
        return Asked(refusal=Refusal(grpc.StatusCode.UNKNOWN, "this port speaks gRPC: content-type must be application/grpc", 415))
    timeout = None
    if (wish := given.get(b"grpc-timeout")) is not None:
        match = _TIMEOUT.fullmatch(wish)
        if match is None:
            return Asked(refusal=Refusal(grpc.StatusCode.INVALID_ARGUMENT, "grpc-timeout must be 1 to 8 digits and one of H M S m u n"))
        timeout = int(match[1]) * _UNIT_S[match[2]]
    path = given.get(b":path", b"").decode("utf-8", "replace")
    return Asked(path, tuple(metadata), timeout, given.get(b"grpc-encoding", b"identity").decode("latin-1"))


# ---- Ours ----


def _text(data: bytes) -> bytes:
    """A string as RFC 7541 §5.2 writes it, without Huffman's code."""
    return _number(len(data), 7, 0) + data


def _number(value: int, bits: int, first: int) -> bytes:
    """An integer with a prefix of so many bits (RFC 7541 §5.1)."""
    most = (1 << bits) - 1
    if value < most:
        return bytes((first | value,))
    out = bytearray((first | most,))
    value -= most
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def plain(name: bytes, value: bytes) -> bytes:
    """A header that goes into nobody's table."""
    return b"\x00" + _text(name) + _text(value)


def _kept(name: bytes, value: bytes) -> bytes:
    """A header that the reader's table keeps."""
    return b"\x40" + _text(name) + _text(value)


def failed(status: int, message: str, trailing: Metadata, begun: bool) -> bytes:
    """The block that ends a call with a status: alone, or after its headers."""
    lines = [] if begun else [_STATUS_200, plain(*_CONTENT)]
    lines.append(plain(b"grpc-status", b"%d" % status))
    if message:
        lines.append(plain(b"grpc-message", _UNSAFE.sub(lambda m: b"%%%02X" % m[0][0], status_text(message).encode())))
    for key, value in trailing:
        sent = base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode()
        lines.append(plain(key.encode(), sent))
    return b"".join(lines)


def no_grpc(status: int, message: str) -> bytes:
    """The block for a caller that speaks HTTP/2 but not gRPC."""
    return plain(b":status", b"%d" % status) + plain(b"grpc-message", message.encode())


_UNSAFE = re.compile(rb"[^ -$&-~]")  # gRPC's percent-encoding of a status message
_STATUS_200 = b"\x88"  # the static table's
_CONTENT = (b"content-type", b"application/grpc")
_ACCEPTS = (b"grpc-accept-encoding", b"identity, deflate, gzip")
_GOOD = (b"grpc-status", b"0")
ROOM = 256  # bytes of the caller's table that our three lines need at most, at 179


class Writer:
    """The two blocks of a good answer, in the bytes that the caller's table makes of them: `begun`, its headers, and `ended`, its
    trailers. The first of each fill the table, in that order since no answer ends before it has begun; afterwards a line is a byte.

    While `settled` is false, whoever writes a block of any kind puts `prefix()` before it and tells `began` or `finished`."""

    __slots__ = ("_filled", "_tableless", "_told", "begun", "ended", "settled")

    def __init__(self) -> None:
        self.begun = _STATUS_200 + _kept(*_CONTENT) + _kept(*_ACCEPTS)
        self.ended = _kept(*_GOOD)
        self.settled = False
        self._filled = 0  # blocks that have filled the table
        self._tableless = self._told = False

    def prefix(self) -> bytes:
        """What the next block must begin with."""
        if not self._tableless or self._told:
            return b""
        self._told = self.settled = True
        return b"\x20"  # we keep no table (RFC 7541 §6.3)

    def began(self) -> None:
        """`begun` was written."""
        if self._filled == 0 and not self._tableless:
            self._filled = 1
            self.begun = _STATUS_200 + b"\xbf\xbe"

    def finished(self) -> None:
        """`ended` was written."""
        if self._filled == 1 and not self._tableless:
            self._filled = 2
            self.settled = True
            self.begun = _STATUS_200 + b"\xc0\xbf"
            self.ended = b"\xbe"

    def table(self, size: int) -> None:
        """The caller's table may have so many bytes from now on. Once it was too small for us it is not used again."""
        if size < ROOM and not self._tableless:
            self._tableless = True
            self.settled = False
            self.begun = _STATUS_200 + plain(*_CONTENT) + plain(*_ACCEPTS)
            self.ended = plain(*_GOOD)
