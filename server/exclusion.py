"""Many may use a device at once, or one by itself.

To record a CUDA graph, onnxruntime has the driver forbid, for all threads, whatever could wait for the device (capture mode "global"):
a copy by another thread fails then, and takes the recording along. So who records does it alone on its device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Exclusion:
    """A lock that is held together or alone. Not reentrant. Who wants it alone comes before those who come later."""

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._together = 0
        self._alone = 0  # who has it alone, or waits for that

    @contextmanager
    def together(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                if not self._together:
                    self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._alone)
            self._alone = 1
            self._changed.wait_for(lambda: not self._together)
        try:
            yield
        finally:
            with self._changed:
                self._alone = 0
                self._changed.notify_all()
