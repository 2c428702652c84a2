"""Layers and initialisations that several models share. It must not know tasks or data."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def remember(lstm: nn.LSTM, bias: float = 1.0) -> nn.LSTM:
    """Set the forget gates' bias of an LSTM and orthogonal recurrent weights, in place; returns it."""
    initialise(lstm, forget_bias=bias)
    return lstm


def initialise(layers: nn.RNNBase, recurrent: str = "orthogonal", gain: float = 1.0, forget_bias: float = 1.0) -> None:
    """What recurrent layers start from, in place: input matrices Xavier (Glorot & Bengio, 2010), recurrent ones, gate by
    gate, "orthogonal" or "xavier" times `gain`, biases zero, but an LSTM's forget gates `forget_bias`.

    torch adds two biases, `bias_ih` and `bias_hh`: the whole goes into the first and zero into the second, or the gate
    would start at twice what was asked for. Bias: Jozefowicz et al., ICML 2015; gates in torch's order i, f, g, o.
    """
    hidden = layers.hidden_size
    with torch.no_grad():
        for name, weight in layers.named_parameters():
            if name.startswith("weight_hh"):
                for gate in torch.split(weight, hidden):  # [hidden, hidden]
                    (nn.init.orthogonal_ if recurrent == "orthogonal" else nn.init.xavier_uniform_)(gate)
                weight.mul_(gain)
            elif name.startswith("weight_ih"):
                nn.init.xavier_uniform_(weight)
            elif name.startswith("bias"):
                weight.zero_()
                if name.startswith("bias_ih") and isinstance(layers, nn.LSTM):
                    weight[hidden : 2 * hidden] = forget_bias


class SequenceDropout(nn.Module):
    """Dropout with one mask per sequence, the same at each step (Gal & Ghahramani, 2016); [batch, time, features]."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, values: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return values
        mask = values.new_empty(values.shape[0], 1, values.shape[2]).bernoulli_(1 - self.rate)
        return values * mask / (1 - self.rate)
