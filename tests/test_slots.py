"""Which slots of two banks are taken: never one twice, all found again, and rows that advance together go to and fro."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from server.slots import Slots


@settings(max_examples=100, deadline=None)
@given(each=st.integers(1, 24), acts=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 12), st.integers(0, 99)), max_size=60))
def test_no_slot_is_taken_twice(each: int, acts: list[tuple[int, int, int]]) -> None:
    """Whatever is taken and freed, and in which order: intervals overlap nowhere and cross no border; a refusal is true; in the end
    there is one gap a bank."""
    slots = Slots(each)
    held: list[tuple[int, int]] = []
    used: set[int] = set()
    for act, count, which in acts:
        if act == 3 and held:
            start, count = held.pop(which % len(held))
            slots.free(start, count)
            used -= set(range(start, start + count))
            continue
        if act == 2:
            found = slots.take_last(count)
            assert sum(some for _, some in found) == min(count, 2 * each - len(used))
        else:
            after = held[which % len(held)][0] if act == 1 and held else None
            start = slots.take(count, after)
            free = [range(s, s + count) for bank in (0, each) for s in range(bank, bank + each - count + 1)]
            assert (start is None) == all(used & set(r) for r in free)
            if after is not None and not used & set(range(mirror := (after + each) % (2 * each), mirror + count)):
                assert start == mirror or mirror % each + count > each
            found = [] if start is None else [(start, count)]
        for start, some in found:
            assert not used & set(range(start, start + some))
            assert start // each == (start + some - 1) // each < 2
            used |= set(range(start, start + some))
        held += found
        assert slots.taken == len(used)
    for start, count in held:
        slots.free(start, count)
    assert slots.taken == 0
    assert slots.take(each) == 0
    assert slots.take(each) == each


def test_to_and_fro() -> None:
    """An interval's next is the same one of the other bank, and the one after that where it was."""
    slots = Slots(100)
    slots.take(10)
    first = slots.take(7)
    assert first == 10
    other = slots.take(7, first)
    assert other == 110
    slots.free(first, 7)
    assert slots.take(7, other) == first
