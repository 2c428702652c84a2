"""Started by tests/test_lost.py: serves as the command does, on a CPU that is treated as a GPU is, and is lost, with all that is asked of
it from then on, as soon as there is a file of the name in LOST_WHEN."""

import os
import sys
from pathlib import Path
from typing import Any

from server import __main__ as command
from server import app, graph, probes
from server.config import Config
from server.devices import Device, Placement


class Far(Device):
    """A CPU that is treated as a GPU is: apart from the threads that serve."""

    @property
    def near(self) -> bool:
        return False


def main() -> int:
    when, run = Path(os.environ["LOST_WHEN"]), graph.Loaded.run

    def deadly(self: graph.Loaded, binding: graph.Binding) -> None:
        with graph.together(self.device):
            if not self.device.near and when.exists():
                raise RuntimeError("CUDA failure 700: an illegal memory access was encountered")
        run(self, binding)

    def apart(config: Config) -> Placement:
        far = Far("cpu", 1)
        probes.keep(far, graph._probe(far, False))
        return Placement((far,), banks=True)

    patched: list[tuple[Any, str, Any]] = [(graph.Loaded, "run", deadly), (app, "_placement", apart)]
    for target, name, value in patched:
        setattr(target, name, value)
    return command.main()


if __name__ == "__main__":
    sys.exit(main())
