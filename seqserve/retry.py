"""When a failed call is sent again. The clock and the dice are arguments.

Every call of this API may be sent twice: it is stateless, or it is a turn of a session, which has a number and is applied
once. So the only question here is whether a second try can help, and when.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable

from seqserve.errors import Cancelled, Error, Overloaded, Unavailable

FIRST = 0.1  # seconds before the second try, doubled each time; a server that restarts is back within a few of them
LONGEST = 5.0  # seconds
UNLIMITED = sys.maxsize


def delay(failure: Error, tries: int, limit: int, left: float, chance: float) -> float | None:
    """Seconds to wait before the next try, or None where the failure stands.

    `tries` were made so far, `limit` more than the first are allowed, `left` is what remains of the deadline in
    seconds, `chance` a random number in [0, 1). The wait is never shorter than the server asked for, and the part
    that is ours is drawn evenly from nothing to its bound, so that callers turned away together do not return
    together. A wait that would outlast the deadline is not begun. A call that was cancelled was so by a server that stopped,
    or by a proxy before it: this side cancels by closing its client, which makes no more tries.
    """
    if tries > limit or not isinstance(failure, (Overloaded, Unavailable, Cancelled)):
        return None
    wait = (failure.retry_after or 0.0) + chance * min(LONGEST, FIRST * 2 ** min(tries - 1, 16))
    return wait if wait < left else None


class Tries:
    """The tries of one call, which share its timeout (seconds); `limit` are allowed after the first, none once `closed` says so."""

    def __init__(
        self,
        limit: int,
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
        closed: Callable[[], bool] = lambda: False,
    ) -> None:
        self._limit, self._clock, self._chance, self._closed = limit, clock, chance, closed
        self._end = clock() + timeout
        self._made = 0

    def left(self) -> float:
        """Seconds until the deadline, 0 when it is over."""
        return max(0.0, self._end - self._clock())

    def after(self, failure: Error) -> float | None:
        """Counts a try that failed: seconds to wait before the next, None where the failure stands."""
        self._made += 1
        return None if self._closed() else delay(failure, self._made, self._limit, self.left(), self._chance())
