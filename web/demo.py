"""`python -m web.demo`: a server with the bundles at hand, and the page, together; the page may kill the server, which is started again.

What `make web` runs. The server is a process of its own with its sessions in LMDB, beside those of `make serve`. It is on this
machine only, and so is the page unless --host says otherwise; then there is nothing to kill.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from web.app import app
from web.config import Config
from web.wire import Server, listening

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
START = 60.0  # seconds that a server may take until it serves
PAUSE = 1.5  # seconds before one that died is started again: long enough to see
STOP = 15.0  # seconds that it may take to drain
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")


class Failed(Exception):
    """The server could not be started; the message says why."""


class Supervised:
    """The server's process, started again on the same port whenever it ends unasked."""

    def __init__(self, models: Path, store: Path, port: int, pause: float = PAUSE) -> None:
        self.port = port
        self.starts = 0
        self._models = models
        self._store = store
        self._pause = pause
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns once it serves. Raises Failed."""
        await self._begin()
        self._watch = asyncio.create_task(self._go_on())

    async def kill(self) -> None:
        """SIGKILL: nothing is told, nothing is flushed."""
        if self._process is not None and self._process.returncode is None:
            log.info("killing the server, process %d", self._process.pid)
            self._process.kill()

    async def stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP)
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _begin(self) -> None:
        with tempfile.TemporaryDirectory(prefix="seqserve-web-") as directory:
            file = Path(directory, "port")
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
            process = self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "server", "--models", str(self._models), "--store", f"lmdb:{self._store}",
                "--port", str(self.port), "--metrics-port", "-1", "--port-file", str(file),
                env={**os.environ, "PYTHONPATH": path}, stdin=asyncio.subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            # A session of its own: Ctrl-C is for us, who tell it to drain.
            self.starts += 1
            deadline = asyncio.get_running_loop().time() + START
            while not file.exists():
                if process.returncode is not None:
                    raise Failed(f"the server stopped with exit code {process.returncode}; its log is above")
                if asyncio.get_running_loop().time() > deadline:
                    process.kill()
                    raise Failed(f"the server was not ready within {START:g} s")
                await asyncio.sleep(0.02)
            self.port = int(file.read_text())

    async def _go_on(self) -> None:
        while True:
            assert self._process is not None
            code = await self._process.wait()
            log.info("the server ended with %d; starting it again", code)
            await asyncio.sleep(self._pause)
            try:
                await self._begin()
            except Failed as e:
                log.error("%s", e)


async def run(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m web.demo", description="A server and its page, together.")
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="directory of bundles (default: the shipped ones)")
    parser.add_argument("--store", type=Path, default=Path(".sessions-web"), help="what keeps sessions (default: .sessions-web)")
    parser.add_argument("--server-port", type=int, default=0, help="the server's gRPC port; 0 takes a free one (default: 0)")
    parser.add_argument("--pause", type=float, default=PAUSE, help=f"seconds before a server that died is started again (default: {PAUSE})")
    own, rest = parser.parse_known_args(argv)
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    supervised = Supervised(own.models, own.store, own.server_port, own.pause)
    try:
        await supervised.start()
        config = Config.parse([*rest, "--target", f"127.0.0.1:{supervised.port}"])
        made = app(config)
        if config.host in THIS_MACHINE:
            made.state.kill = supervised.kill
        server = Server(made, config)
        heard = listening(config)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, setattr, server, "should_exit", True)
        log.info("the page: http://%s:%d/", config.host, heard.getsockname()[1])
        with heard:
            await server.serve([heard])
        return 0 if server.started else 1
    except (Failed, OSError, ValueError) as e:
        print(f"web.demo: {e}", file=sys.stderr)
        return 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            await supervised.stop()


if __name__ == "__main__":
    sys.exit(asyncio.run(run()))
