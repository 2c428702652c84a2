"""What a round costs: seconds by graph, rows and steps, as measured at load and ever since.

Pure: it is told what rounds took, and knows no clock. Rows count by powers of two, since an LSTM's cost a row falls by
several times from one row to sixteen and hardly after; steps count linearly, which holds for what is cut in time.
"""

from __future__ import annotations

NEW = 0.1  # weight of a new measurement against those before


class Costs:
    """One model's rounds."""

    __slots__ = ("_seconds",)

    def __init__(self) -> None:
        self._seconds: dict[str, dict[int, float]] = {}  # graph → power of two that holds the rows → seconds a step

    def learn(self, graph: str, rows: int, steps: int, seconds: float) -> None:
        """A round of that many rows and steps took so long."""
        known = self._seconds.setdefault(graph, {})
        size = rows.bit_length()
        each = seconds / steps
        before = known.get(size)
        known[size] = each if before is None else before + NEW * (each - before)

    def seconds(self, graph: str, rows: int, steps: int) -> float | None:
        """What such a round is expected to take; None where nothing is known of the graph. From fewer rows it is counted as if
        each row more cost as much, which is more than it will."""
        known = self._seconds.get(graph)
        if not known:
            return None
        size = rows.bit_length()
        each = known.get(size)
        if each is None:
            smaller = [s for s in known if s < size]
            each = known[max(smaller)] * (1 << (size - max(smaller))) if smaller else known[min(known)]
        return each * steps

    def table(self) -> list[tuple[str, int, float]]:
        """What is known: graph, most rows, seconds a step."""
        return [(graph, (1 << size) - 1, each) for graph, known in self._seconds.items() for size, each in sorted(known.items())]
