"""The linear-chain CRF as it is trained (Lafferty et al., ICML 2001): the log probability of a whole row of labels.

Decoding is contract/chain.py's. It knows labels as numbers; it must not know words or data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from contract.chain import NEVER, Chain, forbidden


class Crf(nn.Module):
    """Scores of labels following one another; what IOB2 rules out is ruled out in training too."""

    def __init__(self, labels: Sequence[str]) -> None:
        super().__init__()
        self.labels = tuple(labels)
        count = len(self.labels)
        self.after = nn.Parameter(torch.zeros(count, count))  # [from, to]
        self.first = nn.Parameter(torch.zeros(count))
        self.last = nn.Parameter(torch.zeros(count))
        after, first = forbidden(self.labels)
        self.never_after: Tensor
        self.never_first: Tensor
        self.register_buffer("never_after", torch.from_numpy(after), persistent=False)
        self.register_buffer("never_first", torch.from_numpy(first), persistent=False)

    def scores(self) -> tuple[Tensor, Tensor, Tensor]:
        """after [from, to], first [label], last [label]."""
        return self.after.masked_fill(self.never_after, NEVER), self.first.masked_fill(self.never_first, NEVER), self.last

    def loss(self, emissions: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        """emissions [rows, time, labels], labels [rows, time], lengths [rows] → minus the log probability of each row [rows]."""
        after, first, last = self.scores()
        rows = torch.arange(len(labels), device=labels.device)
        right = first[labels[:, 0]] + emissions[rows, 0, labels[:, 0]] + last[labels[rows, lengths - 1]]
        total = first + emissions[:, 0]  # [rows, label]: log weight of all that leads to a label
        for t in range(1, labels.shape[1]):
            here = t < lengths
            step = after[labels[:, t - 1], labels[:, t]] + emissions[rows, t, labels[:, t]]
            right = right + torch.where(here, step, 0.0)
            onward = torch.logsumexp(total.unsqueeze(2) + after, 1) + emissions[:, t]
            total = torch.where(here.unsqueeze(1), onward, total)
        return torch.logsumexp(total + last, 1) - right

    def chain(self) -> Chain:
        """The same scores, to decode with."""
        after, first, last = (scores.detach().cpu().double().numpy() for scores in self.scores())
        return Chain(self.labels, after, first, last)
