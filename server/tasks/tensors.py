"""Plain tensors: whole sequences through a model's main graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from contract.bundle import is_ragged
from server.engine import Engine
from server.errors import InvalidInput, ServeError
from server.inputs import Array, Sizes, check
from server.sequence import Inputs, Outputs, Packed, Sequence
from server.shares import ANYONE, Claim


class Tensors:
    """Runs callers' own tensors, from the model's initial state."""

    def __init__(self, engine: Engine, most_rows: int) -> None:
        self._engine = engine
        self.most_rows = most_rows  # of one request; a repository's caller may set another while the model serves
        self.graph = engine.bundle.graph

    def start(
        self, inputs: Mapping[str, Array], then: Callable[[Sequence, Outputs], None], failed: Callable[[ServeError], None],
        claim: Claim = ANYONE,
    ) -> Sequence:  # fmt: skip
        """Check the inputs against the contract and queue them. Raises InvalidInput naming tensor, expected and got."""
        if any(is_ragged(a) for t in self.graph.inputs for a in t.axes):
            raise InvalidInput(
                "TASK_ONLY", f"model {self._engine.name!r} lays rows of different lengths end to end; call it by its task, "
                f"{self._engine.bundle.kind!r}", model=self._engine.name,
            )  # fmt: skip
        return self._queue(inputs, check(self.graph, inputs, self.most_rows), then, failed, claim)

    def start_packed(
        self, inputs: Packed, steps: int, then: Callable[[Sequence, Outputs], None], failed: Callable[[ServeError], None],
        claim: Claim = ANYONE,
    ) -> Sequence:  # fmt: skip
        """The same for one row whose inputs are as they came; `failed` is told of values that the contract forbids."""
        return self._queue(inputs, Sizes(1, steps), then, failed, claim)

    def _queue(
        self, inputs: Inputs | Packed, sizes: Sizes, then: Callable[[Sequence, Outputs], None], failed: Callable[[ServeError], None],
        claim: Claim,
    ) -> Sequence:  # fmt: skip
        sequence = Sequence(self._engine.bundle.main, inputs, sizes, then, failed)
        self._engine.submit(sequence, claim)
        return sequence
