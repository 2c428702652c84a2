"""Who calls, and how much a tenant may take: sessions, calls and streams at once, requests a second.

This file knows counts and clocks; it must not know where keys come from (keys.py), what a session is, or gRPC.
Limits are of one server: several replicas behind one address allow as many times as much.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from server.errors import Overloaded, Unauthenticated

SEPARATOR = "|"  # between a tenant's name, which can't have it, and what the tenant calls its session
BUSY_S = 0.1  # seconds after which a caller with all its calls under way may ask again: a round or two
FULL_S = 1.0  # the same where all its sessions are open; they are counted anew at most so often


@dataclass(frozen=True, slots=True)
class Quota:
    """What a tenant may have; 0 is no limit of its own."""

    sessions: int = 0
    calls: int = 0  # at once, streams not counted
    streams: int = 0  # at once
    rate: float = 0.0  # requests a second: calls, messages of ModelStreamInfer, turns of a stream
    burst: float = 0.0  # requests at once after a pause; 0 is one second's
    priority: int = 0  # the highest class that its requests run in (shares.py); those that ask for a higher one run in this


class Tenant:
    """Whose keys, sessions and quota these are. Any thread may use it."""

    def __init__(self, name: str, quota: Quota, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = name
        self.prefix = name + SEPARATOR
        self.quota = quota
        self._clock = clock
        self._lock = threading.Lock()
        self._calls = self._streams = 0
        self._tokens = _burst(quota)
        self._since = clock()
        # At least as many as live: those that expired leave the count when it is next taken.
        self._sessions: int | None = None
        self._counted = -FULL_S

    @property
    def calls(self) -> int:
        """Calls and streams under way, of those that are limited."""
        return self._calls + self._streams

    def spend(self) -> None:
        """One request of the tenant's rate. Raises Overloaded with the time until there is one."""
        rate = self.quota.rate
        if not rate:  # as below: a tenant without a limit takes no lock
            return
        with self._lock:
            now = self._clock()
            self._tokens = min(_burst(self.quota), self._tokens + (now - self._since) * rate)
            self._since = now
            if self._tokens > 1 - 1e-6:  # who waited as long as told must not be refused for a rounding
                self._tokens -= 1
                return
            wait = (1 - self._tokens) / rate
        raise self._refusal("RATE", f"{rate:g} requests a second", wait, rate)

    def level(self, asked: int) -> int:
        """The class that a request which asked for this one runs in."""
        return max(asked, self.quota.priority)

    def enter(self, stream: bool) -> Callable[[], None] | None:
        """A call or stream begins; gives what to call once at its end, or None where they aren't counted. Raises Overloaded."""
        most = self.quota.streams if stream else self.quota.calls
        if not most:
            return None
        with self._lock:
            if stream and self._streams < most:
                self._streams += 1
                return self._stream_left
            if not stream and self._calls < most:
                self._calls += 1
                return self._call_left
        raise self._refusal("STREAMS" if stream else "CALLS", f"{most} {'streams' if stream else 'calls'} at once", BUSY_S, most)

    def _call_left(self) -> None:
        with self._lock:
            self._calls -= 1

    def _stream_left(self) -> None:
        with self._lock:
            self._streams -= 1

    def open(self, living: Callable[[], int]) -> None:
        """One session more; `living` counts those there are, which takes its time. Raises Overloaded."""
        most = self.quota.sessions
        if not most:
            return
        with self._lock:
            now = self._clock()
            if self._sessions is None or (self._sessions >= most and now - self._counted >= FULL_S):
                self._sessions = living()
                self._counted = now
            if self._sessions < most:
                self._sessions += 1
                return
        raise self._refusal("SESSIONS", f"{most} open sessions", FULL_S, most)

    def closed(self) -> None:
        """One session less."""
        with self._lock:
            if self._sessions:
                self._sessions -= 1

    def change(self, quota: Quota) -> None:
        """Another quota from now on."""
        with self._lock:
            if quota != self.quota:
                self.quota = quota
                self._tokens = min(self._tokens, _burst(quota)) if self.quota.rate else _burst(quota)
                self._sessions = None

    def _refusal(self, what: str, limit: str, wait: float, most: float) -> Overloaded:
        message = f"tenant {self.name!r} may have {limit}, and has; try again in {wait:.2f} s"
        return Overloaded(f"TENANT_{what}", message, retry_after=wait, tenant=self.name, limit=f"{most:g}")


def _burst(quota: Quota) -> float:
    return max(1.0, quota.burst or quota.rate)


class Caller:
    """Whoever has one key. `revoked` once the key is no longer in the file: streams that it opened are served no more."""

    __slots__ = ("name", "operator", "revoked", "tenant")

    def __init__(self, name: str, tenant: Tenant, operator: bool) -> None:
        self.name = name
        self.tenant = tenant
        self.operator = operator
        self.revoked = False

    def spend(self) -> None:
        """One request. Raises Overloaded, or Unauthenticated where the key was revoked."""
        if self.revoked:
            raise Unauthenticated("KEY_REVOKED", "the key of this stream was revoked or changed since; connect with another")
        self.tenant.spend()
