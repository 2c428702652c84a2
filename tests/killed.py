"""Started by torchrun in tests/test_distributed.py: trains as the command does, but the second process is killed in the
middle of its second epoch, unless it has been started again."""

import os
import signal
import sys
from typing import Any

from training import __main__ as command
from training.loop import Training

step = Training.training_step


def deadly(self: Training, batch: Any, index: int) -> Any:
    if self.global_rank == 1 and self.current_epoch == 1 and index == 2 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, index)


Training.training_step = deadly  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(command.main())
