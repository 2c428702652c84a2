"""Frames of HTTP/2 (RFC 9113 §4, §6): their numbers, and the few that we write."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
WITH_PRIORITY: Final = 0x20

NO_ERROR: Final = 0
PROTOCOL_ERROR: Final = 1
FLOW_CONTROL_ERROR: Final = 3
FRAME_SIZE_ERROR: Final = 6
REFUSED_STREAM: Final = 7
CANCEL: Final = 8
COMPRESSION_ERROR: Final = 9
ENHANCE_YOUR_CALM: Final = 11

HEADER_TABLE_SIZE: Final = 1
MAX_CONCURRENT_STREAMS: Final = 3
INITIAL_WINDOW_SIZE: Final = 4
MAX_FRAME_SIZE: Final = 5
MAX_HEADER_LIST_SIZE: Final = 6

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LONGEST: Final = 16_384  # bytes of a frame's payload, unless the other end allows more
WINDOW: Final = 65_535  # bytes that may be sent before the other end has said more
MOST_WINDOW: Final = (1 << 31) - 1
LAST_STREAM: Final = (1 << 31) - 1

HEAD: Final = struct.Struct(">HBBBL")  # length (high, low), type, flags, stream
_SETTING: Final = struct.Struct(">HL")


class Fault(Exception):
    """What ends a connection: RFC 9113 §5.4.1."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return HEAD.pack(len(payload) >> 8, len(payload) & 255, kind, flags, stream) + payload


def settings(values: dict[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(k, v) for k, v in values.items()))


def read_settings(payload: bytes) -> Iterator[tuple[int, int]]:
    """Raises Fault."""
    if len(payload) % 6:
        raise Fault(FRAME_SIZE_ERROR, "SETTINGS of a length that is no multiple of 6")
    yield from _SETTING.iter_unpack(payload)


def goaway(last: int, code: int, why: str = "") -> bytes:
    return frame(GOAWAY, 0, 0, struct.pack(">LL", last, code) + why.encode("utf-8", "replace")[:256])


def reset(stream: int, code: int) -> bytes:
    return frame(RST_STREAM, 0, stream, struct.pack(">L", code))


def window_update(stream: int, more: int) -> bytes:
    return frame(WINDOW_UPDATE, 0, stream, struct.pack(">L", more))


def headers(stream: int, block: bytes, end: bool, longest: int = LONGEST) -> bytes:
    """A header block, in as many frames as it takes."""
    flags = END_STREAM if end else 0
    if len(block) <= longest:
        return frame(HEADERS, flags | END_HEADERS, stream, block)
    parts = [block[i : i + longest] for i in range(0, len(block), longest)]
    return b"".join(
        frame(CONTINUATION if i else HEADERS, (0 if i else flags) | (END_HEADERS if i == len(parts) - 1 else 0), stream, part)
        for i, part in enumerate(parts)
    )


def unpadded(flags: int, payload: bytes) -> bytes:
    """The payload of DATA or HEADERS without padding and, where `flags` say so, a priority. Raises Fault."""
    if flags & PADDED:
        if not payload or payload[0] >= len(payload):
            raise Fault(PROTOCOL_ERROR, "more padding than payload")
        payload = payload[1 : len(payload) - payload[0]]
    if flags & WITH_PRIORITY:
        if len(payload) < 5:
            raise Fault(FRAME_SIZE_ERROR, "HEADERS too short for their priority")
        payload = payload[5:]
    return payload
