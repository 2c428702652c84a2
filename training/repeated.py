"""What makes training on few cores fast: two operations that torch has, arranged to touch less memory.

The matrix that a loop over time applies at each step, and cross entropy over a vocabulary. It must not know any model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Repeated:
    """One matrix applied again and again in a loop over time, [batch, in] → [batch, out] each time.

    The same as `functional.linear` for each call; but the matrix's gradient is one product at the end, over all calls
    laid end to end, instead of one small product and one addition of the whole matrix per call. Each call must depend
    on the one before it, as a recurrence does: the first call's gradient is then the last to be computed.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.past: list[tuple[Tensor, Tensor]] = []
        self.begun = False

    def __call__(self, given: Tensor) -> Tensor:
        first, self.begun = not self.begun, True
        result: Tensor = _Repeat.apply(given, self.weight, self.past, first)  # type: ignore[no-untyped-call]  # torch's
        return result


class _Repeat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, past: list[tuple[Tensor, Tensor]], first: bool) -> Tensor:
        ctx.save_for_backward(given, weight)
        ctx.past, ctx.first = past, first
        return given @ weight.t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        given, weight = ctx.saved_tensors
        ctx.past.append((given, gradients[0]))
        of_weight = None
        if ctx.first:
            of_weight = torch.cat([g for _, g in ctx.past]).t() @ torch.cat([x for x, _ in ctx.past])
            ctx.past.clear()
        return gradients[0] @ weight, of_weight, None, None


def smoothed_cross_entropy(given: Tensor, weight: Tensor, bias: Tensor, wanted: Tensor, smoothing: float) -> Tensor:
    """`cross_entropy(given @ weight.T + bias, wanted, label_smoothing=smoothing)`, some rows at a time.

    given [tokens, in], weight [vocabulary, in], wanted [tokens]. The logits of a whole batch are tens of megabytes, and
    reading and writing them over and over was a third of a training step; here a part stays in the cache until its
    gradient is known.
    """
    result: Tensor = _CrossEntropy.apply(given, weight, bias, wanted, smoothing)  # type: ignore[no-untyped-call]  # torch's
    return result


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, bias: Tensor, wanted: Tensor, smoothing: float) -> Tensor:
        tokens, size = len(given), len(weight)
        gradient = given.new_empty(tokens, size)  # of the loss, by logits
        gradient_bias = torch.zeros_like(bias)
        loss = bias.new_zeros(())
        for at in range(0, tokens, 128):
            part = slice(at, at + 128)
            logits = (given[part] @ weight.t()).float() + bias
            target = wanted[part].unsqueeze(1)
            total = logits.logsumexp(1)
            loss += (total - (1 - smoothing) * logits.gather(1, target)[:, 0] - smoothing * logits.mean(1)).sum()
            logits.sub_(total.unsqueeze(1)).exp_().sub_(smoothing / size)
            logits.scatter_add_(1, target, logits.new_full(target.shape, smoothing - 1))
            gradient_bias += logits.sum(0)
            gradient[part] = logits
        ctx.save_for_backward(given, weight, gradient, gradient_bias)
        return loss / tokens

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        given, weight, gradient, gradient_bias = ctx.saved_tensors
        scale = gradients[0] / len(given)
        return (gradient @ weight) * scale, (gradient.t() @ given) * scale, gradient_bias * scale, None, None
