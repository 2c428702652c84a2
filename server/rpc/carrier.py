"""A carrier: a process that carries calls between callers and the server (`--rpc-processes`). Started by relay_front.py, not by hand.

`python -m server.rpc.carrier LANE OPTIONS`: the lane's file descriptor, and JSON of the listening sockets' descriptors, methods,
limits and TLS files. It takes one connection at a time of the sockets that all carriers share, so that they share the callers too.
"""

from __future__ import annotations

import json
import logging
import marshal
import selectors
import signal
import socket as sockets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from server import logs
from server.rpc import relay
from server.rpc.direct_front import DirectFront
from server.rpc.front import Method, Options, Receiver, Tls, server_stream, stream, unary
from server.rpc.h2_calls import Call, OpenCall
from server.rpc.h2_socket import Socket

logger = logging.getLogger(__name__)


class Carrier(DirectFront):
    """The direct front with handlers that pass everything on."""

    accepts = 1  # so that carriers share them
    _lane_full = False

    def __init__(self, methods: list[tuple[str, str]], options: Options, lane: sockets.socket) -> None:
        lane.setblocking(False)
        self._lane = Socket(lane)
        self._out: list[bytes] = []
        self._calls: dict[int, Call] = {}
        self._number = 0
        self._callers: dict[tuple[Any, ...], int] = {}
        self._reader = relay.Reader()
        self._told: dict[int, int] = {}  # replies of streams not yet said to be passed on
        super().__init__({name: self._method(place, kind) for place, (name, kind) in enumerate(methods)}, options)
        self._selector.register(lane, selectors.EVENT_READ, self._hear)

    # ---- From callers ----

    def _method(self, place: int, kind: str) -> Method:
        def begin(call: Any, message: bytes = b"") -> Receiver | None:
            number = self._number = self._number + 1
            self._calls[number] = call
            self._tell(relay.BEGIN, number, relay.BEGINS.pack(place, self._caller(call), call.deadline or 0.0) + message)
            call.on_gone(lambda: self._gone(number))
            return _Passing(self, number) if kind == "stream" else None

        make: dict[str, Callable[[Any], Method]] = {"unary": unary, "server_stream": server_stream, "stream": stream}
        return make[kind](begin)

    def _caller(self, call: Call) -> int:
        """The number by which the server knows who calls; it is told once of each."""
        key = (call.peer, call.metadata)
        number = self._callers.get(key)
        if number is None:
            if len(self._callers) >= 4096:  # metadata of its own in each call: forget all, tell anew
                for old in self._callers.values():
                    self._tell(relay.CALLER, old)
                self._callers = {}
            number = self._number = self._number + 1
            self._callers[key] = number
            self._tell(relay.CALLER, number, marshal.dumps((call.metadata, call.peer, call.peer_certificate)))
        return number

    def _gone(self, number: int) -> None:
        if self._calls.pop(number, None) is not None:
            self._tell(relay.GONE, number)

    def _tell(self, kind: int, number: int, payload: bytes = b"") -> None:
        self._out.append(relay.frame(kind, number, payload))

    # ---- To and from the server ----

    def adopt(self, listeners: list[sockets.socket], tls: Tls | None) -> None:
        """Listen on sockets that the server has opened."""
        context = None if tls is None else tls.context()
        self._listeners = [(listener, context) for listener in listeners]

    def run(self) -> None:
        """Carry calls until the server says that it is enough, or ends."""
        self._started = True
        self._open()
        self._out.append(relay.READY)
        self._work()

    def _settle(self) -> None:
        super()._settle()
        if self._told:
            self._report()
        if self._out or self._lane.pending:
            self._flush_lane()

    def _report(self) -> None:
        """Which streams' replies have been passed on since."""
        for number, sent in list(self._told.items()):
            call = self._calls.get(number)
            left = 0 if call is None else call.waiting
            if left < sent:
                self._tell(relay.TAKEN, number, relay.COUNT.pack(sent - left))
            if left and call is not None:
                self._told[number] = left
            else:
                del self._told[number]

    def _flush_lane(self) -> None:
        out, self._out = self._out, []
        if self._stopping:
            return
        if out:
            try:
                self._lane.send(b"".join(out))
            except OSError:
                self._ended()
                return
        while self._lane.pending > relay.MUCH:  # callers' own windows fill meanwhile
            with selectors.DefaultSelector() as room:
                room.register(self._lane.socket, selectors.EVENT_READ | selectors.EVENT_WRITE)
                for _, mask in room.select():
                    self._hear(mask)  # what is said to us too: the server may itself wait for us to read it
            self._send()
            if self._stopping:
                return
        pending = self._lane.pending > 0
        if pending != self._lane_full:
            self._lane_full = pending
            self._selector.modify(self._lane.socket, selectors.EVENT_READ | (selectors.EVENT_WRITE if pending else 0), self._hear)

    def _hear(self, mask: int) -> None:
        try:
            if mask & selectors.EVENT_WRITE:
                self._lane.push()
            data = self._lane.receive(relay.PIECE) if mask & selectors.EVENT_READ else None
        except OSError:
            data = b""
        if data == b"":
            self._ended()
            return
        for kind, number, payload in self._reader.frames(data) if data else ():
            if kind == relay.DRAIN:
                self.draining = True
                continue
            call: Any = self._calls.get(number)
            if call is None:
                continue
            if kind == relay.ANSWER:
                del self._calls[number]
                call.reply(payload)
            elif kind == relay.REPLY:
                call.reply(payload)
                self._told[number] = self._told.get(number, 0) + 1
            elif kind == relay.FINISH:
                del self._calls[number]
                self._finish(call, *marshal.loads(payload))
            elif kind == relay.HOLD and isinstance(call, OpenCall):
                call.hold(True)
            elif kind == relay.RESUME and isinstance(call, OpenCall):
                call.hold(False)

    def _ended(self) -> None:
        """The server has ended: what runs is told so."""
        self._selector.unregister(self._lane.socket)
        self.draining = self._stopping = True
        self._out = []

    def _finish(self, call: Any, status: int, text: str, trailing: tuple[Any, ...], message: bytes | None) -> None:
        if message is not None:
            call.reply(message, trailing)
        elif status:
            call.fail(_STATUS[status], text, trailing)
        else:
            call.finish(trailing)


_STATUS = {status.value[0]: status for status in grpc.StatusCode}


class _Passing:
    """What takes a stream's messages."""

    def __init__(self, carrier: Carrier, number: int) -> None:
        self._carrier = carrier
        self._number = number

    def on_message(self, message: bytes) -> None:
        self._carrier._tell(relay.MESSAGE, self._number, message)

    def on_end(self) -> None:
        self._carrier._tell(relay.END, self._number)


def main(argv: list[str]) -> int:
    lane, given = int(argv[0]), json.loads(argv[1])
    logging.basicConfig(level=given["log_level"], format="%(asctime)s carrier %(process)d %(levelname)s %(message)s")
    logs.hush()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server tells when to end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    options = Options(**given["options"])
    carrier = Carrier([tuple(m) for m in given["methods"]], options, sockets.socket(fileno=lane))
    tls = Tls(*(Path(p) if p else None for p in given["tls"])) if given["tls"] else None  # type: ignore[arg-type]  # of three
    carrier.adopt([sockets.socket(fileno=fd) for fd in given["listeners"]], tls)
    carrier.run()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
