"""Recurrent layers as the configuration names them: Elman, GRU or LSTM; stacked, in both directions, with tanh or softsign.

It knows how a cell is computed, how gradients are cut in time, and which node of ONNX says the same. It must not know
models, data or the server.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn import functional

from contract.bundle import BATCH, State
from training.config import Cells, ConfigError
from training.layers import initialise

States = tuple[Tensor, ...]
"""What is carried: h, and c of an LSTM, each [layers, rows, hidden]; twice the layers where both directions are read."""

GATES = {"elman": 1, "gru": 3, "lstm": 4}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "softsign": functional.softsign}
FORMS: dict[str, type[nn.RNN | nn.GRU | nn.LSTM]] = {"elman": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


class Recurrent(nn.Module):
    """Layers of cells: given [rows, time, width] and states → read [rows, time, self.width], states.

    Weights have torch's names whatever the activation. With tanh torch's own kernels compute them; another activation is
    computed step by step, which is several times slower.
    """

    def __init__(self, width: int, cells: Cells) -> None:
        """Raises ConfigError where the configuration names what there is not."""
        super().__init__()
        check(cells)
        self.cells = cells
        self.width = cells.hidden * (2 if cells.bidirectional else 1)
        between = cells.dropout if cells.layers > 1 else 0.0
        self.layers = FORMS[cells.kind](
            width, cells.hidden, cells.layers, batch_first=True, dropout=between, bidirectional=cells.bidirectional
        )
        initialise(self.layers, cells.recurrent, cells.gain, cells.forget_bias)
        self.dropout = nn.Dropout(cells.dropout)

    def forward(self, given: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """States of None are those of a sequence that has read nothing."""
        if states is None:
            states = self.fresh(given)
        if torch.onnx.is_in_onnx_export():
            return self._as_nodes(given, states)
        if not self.training or not self.cells.truncate:
            read, states = self._compute(given, states)
            return self.dropout(read), states
        pieces = []
        for piece in torch.split(given, self.cells.truncate, 1):
            read, states = self._compute(piece, tuple(s.detach() for s in states))
            pieces.append(read)
        return self.dropout(torch.cat(pieces, 1)), states

    def fresh(self, given: Tensor) -> States:
        """Zeros for each row of `given`, whose number stays open in a trace (`len` would fix it)."""
        places = self.cells.layers * (2 if self.cells.bidirectional else 1)
        return tuple(given.new_zeros(places, given.shape[0], self.cells.hidden) for _ in names(self.cells))

    def _compute(self, given: Tensor, states: States) -> tuple[Tensor, States]:
        if self.cells.activation == "tanh":
            read, after = self.layers(given, states if len(states) > 1 else states[0])
            return read, after if isinstance(after, tuple) else (after,)
        ends: list[States] = []
        directions = ("", "_reverse") if self.cells.bidirectional else ("",)
        for layer in range(self.cells.layers):
            if layer:
                given = functional.dropout(given, self.cells.dropout, self.training)
            reads = []
            for suffix in directions:
                state = tuple(s[len(ends)] for s in states)
                turned = given.flip(1) if suffix else given
                read, end = self._steps(turned, state, f"_l{layer}{suffix}")
                reads.append(read.flip(1) if suffix else read)
                ends.append(end)
            given = torch.cat(reads, -1)
        return given, tuple(torch.stack(part) for part in zip(*ends, strict=True))

    def _steps(self, given: Tensor, state: States, place: str) -> tuple[Tensor, States]:
        """One layer in one direction: given [rows, time, width], state each [rows, hidden]."""
        weights = [getattr(self.layers, name + place) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        from_input = functional.linear(given, weights[0], weights[2])  # [rows, time, gates * hidden]
        act = ACTIVATIONS[self.cells.activation]
        read = []
        for now in from_input.unbind(1):
            past = functional.linear(state[0], weights[1], weights[3])
            if self.cells.kind == "elman":
                state = (act(now + past),)
            elif self.cells.kind == "gru":
                (r, z, n), (past_r, past_z, past_n) = now.chunk(3, -1), past.chunk(3, -1)
                keep = torch.sigmoid(z + past_z)
                state = ((1 - keep) * act(n + torch.sigmoid(r + past_r) * past_n) + keep * state[0],)
            else:
                i, f, g, o = (now + past).chunk(4, -1)
                c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * act(g)
                state = (torch.sigmoid(o) * act(c), c)
            read.append(state[0])
        return torch.stack(read, 1), state

    def _as_nodes(self, given: Tensor, states: States) -> tuple[Tensor, States]:
        """The same as nodes of ONNX, for while the model is traced: torch's exporter would unroll an RNN over the example's
        steps, and has no softsign cells at all."""
        cells = self.cells
        operator = {"elman": "RNN", "gru": "GRU", "lstm": "LSTM"}[cells.kind]
        order = {"elman": [0], "gru": [1, 0, 2], "lstm": [0, 3, 1, 2]}[cells.kind]  # torch's gates, in ONNX's order
        act = cells.activation.capitalize()
        ways = ("", "_reverse") if cells.bidirectional else ("",)
        attributes: dict[str, object] = {
            "hidden_size": cells.hidden, "direction": "bidirectional" if cells.bidirectional else "forward",
            "activations": {"elman": [act], "gru": ["Sigmoid", act], "lstm": ["Sigmoid", act, act]}[cells.kind] * len(ways),
        }  # fmt: skip
        if cells.kind == "gru":
            attributes["linear_before_reset"] = 1
        rows, time = given.shape[:2]
        read, ends = given.transpose(0, 1), []  # ONNX wants [time, rows, width]

        def ordered(weight: Tensor) -> Tensor:
            return torch.cat([weight[place * cells.hidden : (place + 1) * cells.hidden] for place in order])

        for layer in range(cells.layers):
            w, r, bi, bh = (
                torch.stack([ordered(getattr(self.layers, f"{name}_l{layer}{way}")) for way in ways])
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            begin = [s[layer * len(ways) : (layer + 1) * len(ways)] for s in states]
            whole, *end = torch.onnx.ops.symbolic_multi_out(
                operator, [read, w, r, torch.cat([bi, bh], 1), None, *begin], attributes,  # type: ignore[arg-type]  # takes lists
                dtypes=[given.dtype] * (1 + len(states)),
                shapes=[(time, len(ways), rows, cells.hidden), *[(len(ways), rows, cells.hidden)] * len(states)], version=20,
            )  # fmt: skip
            read = whole.transpose(1, 2).flatten(2)  # [time, ways, rows, hidden] → [time, rows, ways * hidden]
            ends.append(end)
        return read.transpose(0, 1), tuple(torch.cat(part) for part in zip(*ends, strict=True))


def check(cells: Cells) -> None:
    """Raise ConfigError naming what is allowed."""
    choices: dict[str, Collection[str]] = {"kind": GATES, "activation": ACTIVATIONS, "recurrent": ("orthogonal", "xavier")}
    for name, allowed in choices.items():
        if getattr(cells, name) not in allowed:
            raise ConfigError(f"cells.{name} {getattr(cells, name)!r}: one of {', '.join(allowed)}")
    if cells.hidden < 1 or cells.layers < 1:
        raise ConfigError(f"cells: hidden {cells.hidden} and layers {cells.layers} must be at least 1")
    if cells.truncate < 0 or (cells.truncate and cells.bidirectional):
        raise ConfigError(f"cells.truncate {cells.truncate}: 0, or a number of steps where only one direction is read")


def names(cells: Cells) -> tuple[str, ...]:
    """The states of a cell."""
    return ("h", "c") if cells.kind == "lstm" else ("h",)


def carried(cells: Cells) -> tuple[State, ...]:
    """The contract of the states, none where both directions are read: such layers are never cut."""
    if cells.bidirectional:
        return ()
    return tuple(State(n, f"next_{n}", "float32", (cells.layers, BATCH, cells.hidden)) for n in names(cells))
