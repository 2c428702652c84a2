"""Batches of sequences of like length. It knows lengths only, neither texts nor series nor models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class Batches(Sampler[list[int]]):
    """Yields lists of places, each list one batch of rows with like lengths, in an order that changes every epoch.

    Give it to `DataLoader(rows, sampler=Batches(...), batch_size=None)`: the loader then asks `rows[list]` for a whole
    batch. As a plain sampler and not a batch sampler, Lightning can deal it out over several devices.
    """

    def __init__(self, lengths: Sequence[int], rows: int, *, cells: int = 0, seed: int = 0, shuffle: bool = True) -> None:
        """At most `rows` sequences a batch and, where `cells` is given, at most so many padded steps."""
        self.lengths = np.asarray(lengths)
        self.rows, self.cells, self.seed, self.shuffle = rows, cells, seed, shuffle
        self.epoch = 0
        self._planned: tuple[int, list[list[int]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this, so that a resumed run sees the order that the whole one would have seen."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._plan())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._plan())

    def _plan(self) -> list[list[int]]:
        if self._planned is not None and self._planned[0] == self.epoch:
            return self._planned[1]
        random = np.random.default_rng((self.seed, self.epoch))
        # Lengths are jittered by a tenth, so that the same rows do not meet in every epoch.
        jitter = random.uniform(0.9, 1.1, len(self.lengths)) if self.shuffle else 1.0
        batches: list[list[int]] = [[]]
        longest = 0
        for place in np.argsort(self.lengths * jitter, kind="stable").tolist():
            longest = max(longest, int(self.lengths[place]))
            size = len(batches[-1]) + 1
            if size > self.rows or (self.cells and size > 1 and size * longest > self.cells):
                batches.append([])
                longest = int(self.lengths[place])
            batches[-1].append(place)
        batches = [batch for batch in batches if batch]
        if self.shuffle:
            random.shuffle(batches)
        self._planned = (self.epoch, batches)
        return batches
