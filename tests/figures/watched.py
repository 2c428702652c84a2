"""A server watched while others use it: memory and file descriptors as they go, and how steeply they rise."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.figures.bench_tools import cpu, resident

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Sample:
    at: float  # seconds
    memory: float  # MiB resident
    descriptors: int
    cpu: float  # seconds used so far


class Watched:
    """Samples of a process, one a second, from `start` to `stop`."""

    def __init__(self, pid: int, every: float = 1.0) -> None:
        self.samples: list[Sample] = []
        self._pid = pid
        self._every = every
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.is_set():
            self.samples.append(sample(self._pid))
            self._over.wait(self._every)

    def between(self, began: float, ended: float) -> list[Sample]:
        return [s for s in self.samples if began <= s.at < ended]


def sample(pid: int) -> Sample:
    return Sample(time.perf_counter(), resident(pid) / MIB, len(list(Path(f"/proc/{pid}/fd").iterdir())), cpu(pid))


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares, a second; 0 of fewer than two points."""
    if len(points) < 2:
        return 0.0
    mean_x, mean_y = (sum(v) / len(points) for v in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def memory_slope(samples: list[Sample]) -> float:
    """MiB a minute."""
    return 60 * slope([(s.at, s.memory) for s in samples])


def descriptors_slope(samples: list[Sample]) -> float:
    """File descriptors a minute."""
    return 60 * slope([(s.at, float(s.descriptors)) for s in samples])
