"""`seqserve serve`: run a server until SIGTERM or SIGINT."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Sequence

from server.app import App
from server.config import Config
from server.store import StoreUnusable


def main(argv: Sequence[str] | None = None) -> int:
    config = Config.parse(argv)
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    stop = threading.Event()
    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, lambda *_: stop.set())
    try:
        app = App(config)
        app.start()
    except (OSError, ValueError, StoreUnusable) as e:
        print(f"seqserve: {e}", file=sys.stderr)
        return 1
    stop.wait()
    logging.getLogger(__name__).info("draining")
    app.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
