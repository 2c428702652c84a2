"""How a call ends, whoever carries it: once, by its handler or by the front, and whoever asked to be told is told.

The part of `front.Call` that is the same for calls on a connection of ours (h2_calls.py) and for those that a carrier has (relay.py).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Protocol

import grpc

from server.rpc.front import BAD_TRAILING, HANDLER_FAILED, Metadata, metadata_fault

logger = logging.getLogger(__name__)


class Way(Protocol):
    """What a call's answers leave by."""

    lock: threading.Lock

    def touch(self) -> None:
        """Without the lock: have what was written sent."""


class Ending:
    """`_over`: the handler has ended the call, or can't any more; `_gone`: it was over before that. Both change under the way's lock."""

    __slots__ = ("_callbacks", "_gone", "_over", "_way", "method")

    def __init__(self, way: Way, method: str) -> None:
        self._way = way
        self.method = method
        self._over = self._gone = False
        self._callbacks: tuple[Callable[[], None], ...] = ()

    def _finish(self, status: int, text: str, trailing: Metadata, message: bytes | None) -> None:
        """Write how the call ends, after everything replied so far, and after its one message where there is one. With the lock."""
        raise NotImplementedError

    def _drop(self) -> None:
        """Forget replies that have not left. With the lock."""

    def on_gone(self, callback: Callable[[], None]) -> None:
        with self._way.lock:
            if not self._over:
                self._callbacks += (callback,)
                return
        if self._gone:
            callback()

    def fail(self, status: grpc.StatusCode, message: str, trailing: Metadata = ()) -> None:
        if status is grpc.StatusCode.OK:
            raise ValueError("a call that fails needs a status other than OK")
        self._end(status, message, trailing)

    def _end(self, status: grpc.StatusCode, text: str, trailing: Metadata, message: bytes | None = None) -> None:
        """End, unless the call is over."""
        if trailing and (fault := metadata_fault(trailing)):
            logger.error("%s: %s", self.method, fault)
            status, text, trailing, message = grpc.StatusCode.INTERNAL, BAD_TRAILING, (), None
        with self._way.lock:
            if self._over:
                return
            self._over = True
            self._callbacks = ()
            self._finish(status.value[0], text, trailing, message)
        self._way.touch()

    def abort(self, status: grpc.StatusCode, message: str) -> None:
        """The front ends the call: the caller gets the status, the handler hears that it has gone. On the front's thread."""
        with self._way.lock:
            if self._over:
                return
            self._over = self._gone = True
            self._drop()
            self._finish(status.value[0], message, (), None)
        self._way.touch()
        self._tell_gone()

    def gone(self) -> None:
        """The caller has left, or what it came by. On the front's thread; the way has let go of the call already."""
        with self._way.lock:
            self._gone = not self._over
            self._over = True
            self._drop()
        self._tell_gone()

    def _tell_gone(self) -> None:
        callbacks, self._callbacks = self._callbacks, ()
        if self._gone:
            for callback in callbacks:
                self._run(callback)

    def _run(self, handler: Callable[..., Any], *arguments: object) -> Any:
        """Run a piece of the handler, and answer for it if it raises."""
        try:
            return handler(*arguments)
        except BaseException:  # even SystemExit must not end the front's thread
            logger.exception("the handler of %s failed", self.method)
            self.fail(grpc.StatusCode.INTERNAL, HANDLER_FAILED)
