"""The front whose callers are carried by other processes (`--rpc-processes`): the server's end of their lanes. See relay.py.

One interpreter carries some ten thousand calls a second; of each, sockets, HTTP/2 and TLS are a fifth to a half. With carriers that part
has cores of its own, and the process that has models and sessions does nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import selectors
import socket as sockets
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from server.rpc.direct_front import LINGER_S, DirectFront
from server.rpc.front import DEFAULTS, Besides, Method, Options, Tls
from server.rpc.h2_connection import Connection
from server.rpc.relay import Lane

logger = logging.getLogger(__name__)

START_S = 60.0  # that a carrier may take to start
_ROOT = Path(__file__).resolve().parent.parent.parent  # where this package lies, for the carriers to find it too


class RelayFront(DirectFront):
    """A front of one thread and `options.processes` carriers. One that dies takes its callers' connections along, and is started anew."""

    def __init__(self, methods: Mapping[str, Method], options: Options = DEFAULTS, besides: Besides | None = None) -> None:
        super().__init__(methods, options, besides)
        self._table = list(methods.items())
        self._tls: Tls | None = None
        self._carriers: dict[Lane, subprocess.Popen[bytes]] = {}

    def listen(self, address: str, tls: Tls | None = None) -> int:
        self._tls = tls
        return super().listen(address, tls)

    def _open(self) -> None:
        for _ in range(max(1, self.options.processes)):
            self._launch()
        for lane in self._carriers:
            lane.wait(START_S)

    def _launch(self) -> None:
        """Start a carrier. The listening sockets are shared by all: whichever is free takes the next connection."""
        ours, its = sockets.socketpair()
        ours.setblocking(False)
        listeners = [listener.fileno() for listener, _ in self._listeners]
        tls = self._tls
        given = {
            "options": asdict(self.options), "methods": [(name, method.kind) for name, method in self._table], "listeners": listeners,
            "tls": None if tls is None else [str(tls.cert), str(tls.key), str(tls.client_ca or "")],
            "log_level": logging.getLogger().getEffectiveLevel(),
        }  # fmt: skip
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
        process = subprocess.Popen(
            [sys.executable, "-m", "server.rpc.carrier", str(its.fileno()), json.dumps(given)],
            pass_fds=(its.fileno(), *listeners), env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        its.close()
        lane = Lane(ours, self._table, self)
        self._carriers[lane] = process
        self._connections.add(cast(Any, lane))
        self._selector.register(ours, selectors.EVENT_READ, self._carrier(cast(Any, lane)))

    def _lost(self, connection: Connection) -> None:
        super()._lost(connection)
        process = self._carriers.pop(cast(Any, connection), None)
        if process is None:
            return
        if not (self.draining or self._closed):
            process.kill()  # its lane has ended, so it has, or can do nothing any more
            logger.error("a carrier has ended with status %s; another takes its place", process.wait())
            self._launch()
            return
        try:
            process.wait(4 * LINGER_S)  # it tells its callers what we told it last
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _shut(self) -> None:
        """Take no more connections: the carriers close theirs when they are told of the drain."""
        for listener, _ in self._listeners:
            listener.close()
        self._listeners = []
