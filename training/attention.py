"""Attention over the rows' own memories, in two layouts that agree: padded for training, ragged for serving.

This file knows queries, memories and weights; it must not know words, beams or files.
The score is Luong's "general" form, q·(W m) with W applied to the query (Luong et al. 2015, arXiv 1508.04025, eq. 8).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Weights a memory by how well each of its positions fits a query.

    `padded` is fast in training; `ragged` needs no padding and is made only of operations whose result for one row
    does not depend on the other rows (products with constant weights, element by element work, sums over features,
    scatters in order), so that an answer is the same bit for bit whatever else is in the round.
    """

    def __init__(self, query: int, memory: int) -> None:
        super().__init__()
        self.project = nn.Linear(query, memory, bias=False)
        self.scale = 1.0 / math.sqrt(memory)

    def padded(self, query: Tensor, memory: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
        """query [batch, memory], already projected; memory [batch, source, memory], absent [batch, source] True where
        padded → context [batch, memory], weights [batch, source]."""
        score = torch.bmm(memory, (query * self.scale).unsqueeze(2)).squeeze(2)  # [batch, source]
        weights = torch.softmax(score.float().masked_fill(absent, -math.inf), dim=1)
        return torch.bmm(weights.to(memory.dtype).unsqueeze(1), memory).squeeze(1), weights

    def ragged(self, query: Tensor, memory: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """query [batch, query], memory [batch*source, memory], row [batch*source]: the row each cell belongs to
        → context [batch, memory], weights [batch*source]."""
        rows = query.shape[0]
        projected = self.project(query) * self.scale
        score = (projected[row] * memory).sum(-1)  # [batch*source]
        top = score.new_full((rows,), -1e30).scatter_reduce(0, row, score, "amax")
        weight = torch.exp(score - top[row])
        total = score.new_zeros(rows).index_put((row,), weight, accumulate=True)
        weights = weight / total[row]
        empty = memory.new_zeros(rows, memory.shape[1])
        return empty.index_put((row,), weights.unsqueeze(1) * memory, accumulate=True), weights
