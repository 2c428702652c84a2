"""Which slots of two equal banks are taken. Pure: it knows numbers, not what lies in a slot.

A round reads its rows where they are and leaves their next states elsewhere, so that whatever fails, what was there is there still.
Where it can, that is the same interval of the other bank: rows that advance together go to and fro between two addresses, as
onnxruntime-genai's recurrent states do, and nothing is ever copied. Else it is the first gap that is large enough.
"""

from __future__ import annotations

from bisect import bisect_left, insort


class Slots:
    """Twice `each` slots, those of bank 0 before those of bank 1."""

    def __init__(self, each: int) -> None:
        self.each = each
        self.taken = 0
        self._gaps: list[tuple[int, int]] = [(0, each), (each, 2 * each)]  # from, to; in order, none across the banks' border

    @property
    def count(self) -> int:
        return 2 * self.each

    def take(self, count: int, after: int | None = None) -> int | None:
        """An interval of that many slots: by choice the one that mirrors slot `after`'s in the other bank, else the first gap that
        holds it. None where there is none."""
        if after is not None:
            start = (after + self.each) % self.count
            at = self._at(start)
            if at is not None and self._gaps[at][1] >= start + count:
                return self._cut(at, start, count)
        for at, (start, end) in enumerate(self._gaps):
            if end - start >= count:
                return self._cut(at, start, count)
        return None

    def take_last(self, count: int) -> list[tuple[int, int]]:
        """Up to `count` slots in as few intervals as there may be, from the end of each bank on: for what is to stay long, out of
        the way of rounds. Intervals as (start, count)."""
        found: list[tuple[int, int]] = []
        while count and self._gaps:
            at = max(range(len(self._gaps)), key=lambda i: self._worth(i, count))
            start, end = self._gaps[at]
            some = min(count, end - start)
            found.append((self._cut(at, end - some, some), some))
            count -= some
        return found

    def free(self, start: int, count: int) -> None:
        """An interval is of no more use."""
        end = start + count
        self.taken -= count
        at = bisect_left(self._gaps, (start, end))
        if at < len(self._gaps) and self._gaps[at][0] == end and end != self.each:
            end = self._gaps.pop(at)[1]
        if at and self._gaps[at - 1][1] == start and start != self.each:
            start = self._gaps.pop(at - 1)[0]
        insort(self._gaps, (start, end))

    def _worth(self, at: int, count: int) -> tuple[bool, bool, int]:
        start, end = self._gaps[at]
        return end - start >= count, end % self.each == 0, at

    def _at(self, start: int) -> int | None:
        """The gap that has a slot in it."""
        at = bisect_left(self._gaps, (start + 1, 0)) - 1
        return at if at >= 0 and self._gaps[at][1] > start else None

    def _cut(self, at: int, start: int, count: int) -> int:
        first, last = self._gaps.pop(at)
        if first < start:
            self._gaps.insert(at, (first, start))
            at += 1
        if start + count < last:
            self._gaps.insert(at, (start + count, last))
        self.taken += count
        return start
