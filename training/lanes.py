"""Long texts cut for truncated backpropagation: many lanes read side by side, chunk after chunk, none of it padded.

It knows documents of numbers, their beginnings and where a chunk may end; it must not know models or text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from training.config import ConfigError
from training.data.batches import Batches

Array = np.ndarray[Any, Any]


class Chunk(NamedTuple):
    """given and wanted int64 [rows, time]: each symbol and the one after it; fresh bool [rows]: rows in which a document
    begins, whose state is zero; the others go on from the chunk before."""

    given: Tensor
    wanted: Tensor
    fresh: Tensor


class Lanes(Batches):
    """Yields [time, place, place, ...]: how long the next chunk is and where each lane stands in it.

    All documents lie on one ring, which is cut in `rows` equal lanes; where it is cut is drawn anew each epoch. As in
    the server's rounds, a chunk ends where the first of its lanes comes to the end of a document, so nothing is padded.
    """

    def __init__(self, begins: Sequence[int], total: int, rows: int, steps: int, *, seed: int = 0, shuffle: bool = True) -> None:
        super().__init__([], rows, seed=seed, shuffle=shuffle)
        self.begins, self.total, self.steps = np.asarray([*begins, total]), total, steps

    def _plan(self) -> list[list[int]]:
        if self._planned is not None and self._planned[0] == self.epoch:
            return self._planned[1]
        lane = self.total // self.rows
        shift = int(np.random.default_rng((self.seed, self.epoch)).integers(self.total)) if self.shuffle else 0
        places = (shift + lane * np.arange(self.rows)) % self.total
        plan, left = [], lane
        while left:
            ends = self.begins[np.searchsorted(self.begins, places, side="right")]
            time = min(self.steps, left, int((ends - places).min()))
            plan.append([time, *places.tolist()])
            places = (places + time) % self.total
            left -= time
        self._planned = (self.epoch, plan)
        return plan

    def share(self, item: list[int], world: int, rank: int) -> list[int]:
        """The lanes of one process out of `world`, always the same ones: see distributed.py. Raises ConfigError."""
        if self.rows % world:
            raise ConfigError(f"{self.rows} lanes can't be shared equally among {world} processes: change data.rows")
        time, *places = item
        return [time, *places[rank::world]]


class Documents(Dataset[Chunk]):
    """Documents laid end to end; asked for what `Lanes` yields it gives a chunk."""

    def __init__(self, documents: Sequence[Array]) -> None:
        """Each document is one array of at least two symbols, its marks of begin and end among them."""
        self.given = np.concatenate([d[:-1] for d in documents])
        self.wanted = np.concatenate([d[1:] for d in documents])
        self.begins = np.cumsum([0, *(len(d) - 1 for d in documents[:-1])])

    def __len__(self) -> int:
        return len(self.given)

    def __getitem__(self, asked: list[int]) -> Chunk:
        time, *places = asked
        at = np.asarray(places)[:, None] + np.arange(time)  # [rows, time]
        fresh = torch.from_numpy(np.isin(at[:, 0], self.begins))
        return Chunk(torch.from_numpy(self.given[at]), torch.from_numpy(self.wanted[at]), fresh)

    def lanes(self, rows: int, steps: int, *, seed: int = 0, shuffle: bool = True) -> Lanes:
        return Lanes(self.begins.tolist(), len(self), min(rows, len(self)), steps, seed=seed, shuffle=shuffle)


def chunks(documents: Documents, lanes: Lanes) -> Iterator[Chunk]:
    """One epoch, for whoever needs no loader."""
    return (documents[asked] for asked in lanes)
