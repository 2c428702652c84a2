"""What a round costs: seconds by graph, rows and steps, as measured at load and ever since.

Pure: it is told what rounds took, and knows no clock. Rows count by powers of two, since an LSTM's cost a row falls by
several times from one row to sixteen and hardly after; steps count linearly, which holds for what is cut in time.
"""

from __future__ import annotations

NEW = 0.1  # weight of a new measurement against those before


class Costs:
    """One model's rounds. Told and asked by any thread: what is there is only ever exchanged for what has more, since who looks through it
    may be interrupted at any point."""

    __slots__ = ("_seconds",)

    def __init__(self) -> None:
        # graph → power of two that holds the rows → seconds a step, and a step of a row
        self._seconds: dict[str, dict[int, tuple[float, float]]] = {}

    def learn(self, graph: str, rows: int, steps: int, seconds: float) -> None:
        """A round of that many rows and steps took so long."""
        known = self._seconds.get(graph, {})
        size = rows.bit_length()
        each = seconds / steps
        before = known.get(size)
        if before is None:
            self._seconds = {**self._seconds, graph: {**known, size: (each, each / rows)}}
        else:
            known[size] = before[0] + NEW * (each - before[0]), before[1] + NEW * (each / rows - before[1])

    def seconds(self, graph: str, rows: int, steps: int) -> float | None:
        """What such a round is expected to take; None where nothing is known of the graph. From fewer rows it is counted as if
        each row more cost as much, which is more than it will."""
        known = self._seconds.get(graph)
        if not known:
            return None
        size = rows.bit_length()
        found = known.get(size)
        if found is not None:
            return found[0] * steps
        smaller = [s for s in known if s < size]
        if not smaller:
            return known[min(known)][0] * steps
        return known[max(smaller)][0] * (1 << (size - max(smaller))) * steps

    def a_row(self, graph: str, rows: int) -> float:
        """What a step of one row is expected to take in a round of so many, or of the next fewer that are known; 0 where nothing
        is known of the graph."""
        known = self._seconds.get(graph)
        if not known:
            return 0.0
        size = rows.bit_length()
        found = known.get(size)
        if found is None:
            found = known[max((s for s in known if s < size), default=min(known))]
        return found[1]

    def table(self) -> list[tuple[str, int, float]]:
        """What is known: graph, most rows, seconds a step."""
        return [(graph, (1 << size) - 1, each) for graph, known in self._seconds.items() for size, (each, _) in sorted(known.items())]
