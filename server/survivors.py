"""What can still be read of a damaged LMDB file: without LMDB, which would go down with it.

Pure reading of one file. It knows how LMDB lays out pages, and not what keys and values mean: whoever takes them up checks that
they are what was written.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

_META = struct.Struct("<40xI84xQQQ")  # page size; the main database's root; last page; transaction


def survivors(data: Path) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of an LMDB file that can still be reached, damaged as it may be: a walk from the last commit's root
    through all pages that are what their parents say. For LMDB 0.9's format on a 64-bit machine of this byte order, with one
    database and no duplicate keys."""
    with data.open("rb") as file:
        first_meta = file.read(_META.size)
        psize = _META.unpack(first_meta)[0]
        file.seek(psize)
        second_meta = file.read(_META.size)
        newest = max(_META.unpack(first_meta), _META.unpack(second_meta), key=lambda meta: meta[-1])
        _, root, last, _ = newest

        def at(page: int, size: int) -> bytes:
            file.seek(page * psize)
            return file.read(size)

        seen = set()
        waiting = [root]
        while waiting:
            number = waiting.pop()
            if not 2 <= number <= last or number in seen:
                continue
            seen.add(number)
            page = at(number, psize)
            if len(page) < psize:
                continue
            own, _, flags, lower, upper = struct.unpack_from("<QHHHH", page)
            if own != number or flags not in (1, 2) or not 16 <= lower <= upper <= psize:
                continue
            for place in struct.unpack_from(f"<{(lower - 16) // 2}H", page, 16):
                if not upper <= place <= psize - 8:
                    continue
                low, high, kind, length = struct.unpack_from("<HHHH", page, place)
                key, rest = page[place + 8 : place + 8 + length], page[place + 8 + length :]
                if flags == 1:
                    waiting.append(low | high << 16 | kind << 32)
                elif kind == 0:
                    yield key, rest[: low | high << 16]
                elif kind == 1 and len(rest) >= 8:
                    first = int.from_bytes(rest[:8], "little")
                    size = low | high << 16
                    if 2 <= first <= last and struct.unpack("<Q", at(first, 8).ljust(8))[0] == first:
                        yield key, at(first, 16 + size)[16:]
