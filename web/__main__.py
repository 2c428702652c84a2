"""`seqserve web`: the HTTP face and the page of a running server, until SIGTERM or SIGINT."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import uvicorn

from web.app import app
from web.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    config = Config.parse(argv)
    try:
        made = app(config)
    except (OSError, ValueError) as e:
        print(f"seqserve web: {e}", file=sys.stderr)
        return 1
    uvicorn.run(made, host=config.host, port=config.port, log_level=config.log_level, access_log=config.access_log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
