"""`seqserve web`: the HTTP face and the page of a running server, until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Sequence

from web.app import app
from web.config import Config
from web.wire import Server, listening

STOP = (signal.SIGTERM, signal.SIGINT)


def main(argv: Sequence[str] | None = None) -> int:
    config = Config.parse(argv)
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        server = Server(app(config), config)
        server.load()
        heard = listening(config)
    except (OSError, ValueError) as e:
        print(f"seqserve web: {e}", file=sys.stderr)
        return 1
    asyncio.run(_serve(server, heard))
    return 0 if server.started else 1


async def _serve(server: Server, heard: socket.socket) -> None:
    loop = asyncio.get_running_loop()

    def stop(number: int) -> None:
        loop.remove_signal_handler(number)  # a second one ends us at once
        server.should_exit = True

    for number in STOP:
        loop.add_signal_handler(number, stop, number)
    with heard:
        await server.serve([heard])


if __name__ == "__main__":
    sys.exit(main())
