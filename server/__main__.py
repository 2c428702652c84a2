"""`seqserve serve`: run a server until SIGTERM or SIGINT."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence

from server import logs
from server.app import App
from server.config import Config
from server.store import StoreUnusable

STOP = (signal.SIGTERM, signal.SIGINT)
FAILED = 70  # the exit status where it had to end itself (EX_SOFTWARE of sysexits.h): whoever watches it is to start it again


def main(argv: Sequence[str] | None = None) -> int:
    config = Config.parse(argv)
    logs.configure(config.log_level, config.log_format)
    # Waited for, not handled: a Python handler only runs once the main thread runs Python again, and a signal that comes
    # just before it starts to wait would be lost. Blocked before any thread is started, so that none of them takes it.
    # SIGHUP means to read the keys anew, where there are keys; else what it means to any process.
    heard = STOP if config.keys is None else (*STOP, signal.SIGHUP)
    signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    try:
        app = App(config)
        app.when_failed = lambda: os.kill(os.getpid(), signal.SIGTERM)
        threading.excepthook = _ends(app)
        app.start()
    except (OSError, ValueError, StoreUnusable) as e:
        print(f"seqserve serve: {e}", file=sys.stderr)
        return 1
    while signal.sigwait(heard) == signal.SIGHUP:
        app.reload()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)  # a second one ends us at once
    logging.getLogger(__name__).info("draining")
    app.stop()
    return 0 if app.failure is None else FAILED


def _ends(app: App) -> Callable[[threading.ExceptHookArgs], None]:
    """A thread that failed in a way which nobody foresaw ends the server: without it callers would wait for good, and nobody know. What was
    answered is in the store; whoever starts the server again has it serve."""

    def ended(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
            name = args.thread.name if args.thread is not None else "?"
            logging.getLogger(__name__).critical("thread %s failed", name, exc_info=args.exc_value)
            app.fail(f"thread {name} failed, and the server ends for that: {args.exc_value!r}"[:500])

    return ended


if __name__ == "__main__":
    sys.exit(main())
