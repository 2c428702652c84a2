"""Started by tests/test_lost.py: serves as the command does, until there is a file of the name in DIES_WHEN. From then on the server's own
code fails as it never should, in threads whose name begins with what is in DIES_WHO."""

import os
import sys
import threading
from pathlib import Path
from typing import Any

from server import __main__ as command
from server.engine import Engine
from server.rounds import Rounds


def main() -> int:
    when, who, choose = Path(os.environ["DIES_WHEN"]), os.environ["DIES_WHO"], Rounds.next

    def failing(self: Any, *args: Any) -> Any:
        if when.exists() and threading.current_thread().name.startswith(who):
            raise RuntimeError("dictionary changed size during iteration")
        return choose(self, *args)

    patched: list[tuple[Any, str, Any]] = [(Rounds, "next", failing), (Engine, "brief", lambda *_: who != "worker")]
    for target, name, value in patched:
        setattr(target, name, value)
    return command.main()


if __name__ == "__main__":
    sys.exit(main())
