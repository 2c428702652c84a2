"""Started by torchrun in tests/test_distributed.py: trains as the command does, more than once in the same processes where
the words say --then, and tells after which steps of the first epoch the weights of all processes were equal."""

import sys
from typing import Any

import torch
from torch import distributed

from training import __main__ as command
from training.loop import Training

ended = Training.on_train_batch_end
equal: list[str] = []


def watched(self: Training, outputs: Any, batch: Any, index: int) -> None:
    ended(self, outputs, batch, index)
    if self.current_epoch:
        return
    mine = torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])
    all_of_them = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(all_of_them, mine)
    if all(torch.equal(mine, other) for other in all_of_them):
        equal.append(str(index + 1))


Training.on_train_batch_end = watched  # type: ignore[method-assign]

if __name__ == "__main__":
    words: list[str] = []
    for word in [*sys.argv[1:], "--then"]:
        if word != "--then":
            words.append(word)
            continue
        if status := command.main(words):
            sys.exit(status)
        if distributed.get_rank() == 0:
            print("equal after step " + " ".join(equal), flush=True)
        words, equal = [], []
