"""When a failed call is sent again. Pure: the clock and the dice are arguments.

Every unary call of this API is stateless, so sending it twice is safe; that is why the only question here is whether
a second try can help, and when.
"""

from __future__ import annotations

from seqserve.errors import Error, Overloaded, Unavailable

FIRST = 0.1  # seconds before the second try, doubled each time; a server that restarts is back within a few of them
LONGEST = 5.0  # seconds


def delay(failure: Error, tries: int, limit: int, left: float, chance: float) -> float | None:
    """Seconds to wait before the next try, or None where the failure stands.

    `tries` were made so far, `limit` more than the first are allowed, `left` is what remains of the deadline in
    seconds, `chance` a random number in [0, 1). The wait is never shorter than the server asked for, and the part
    that is ours is drawn evenly from nothing to its bound, so that callers turned away together do not return
    together. A wait that would outlast the deadline is not begun.
    """
    if tries > limit or not isinstance(failure, (Overloaded, Unavailable)):
        return None
    wait = (failure.retry_after or 0.0) + chance * min(LONGEST, FIRST * 2 ** (tries - 1))
    return wait if wait < left else None
