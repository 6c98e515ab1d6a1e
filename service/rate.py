"""A limit on the rate of each principal's calls: a token bucket, so that one camera's loop cannot starve the rest."""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable

from resight.errors import RateLimitedError
from resight.service.auth import Principal, current, least_role
from resight.service.guard import Call

MAX_PRINCIPALS = 10_000  # names come from our own credentials; the fence is for an operator who makes one a day


class RateLimit:
    """The stage that lets each principal make ``rate`` calls a second, and ``burst`` at once after a rest.

    Args:
        rate: calls a second, > 0.
        burst: calls, >= 1.
        clock: seconds, never backwards.
    """

    def __init__(self, rate: float, burst: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._burst, self._clock = rate, float(burst), clock
        self._buckets: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()  # calls left, at what time

    @contextlib.asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        """Take one call from the caller's bucket; health checks are free."""
        if least_role(call.method) is not None:
            self.take(current())
        yield

    def take(self, principal: Principal) -> None:
        """Take one call.

        Raises:
            RateLimitedError: the bucket is empty; it says when the next call fits.
        """
        key, now = (principal.tenant, principal.name), self._clock()
        left, then = self._buckets.pop(key, (self._burst, now))
        left = min(self._burst, left + (now - then) * self._rate)
        allowed = left >= 1.0
        self._buckets[key] = (left - 1.0 if allowed else left, now)
        while len(self._buckets) > MAX_PRINCIPALS:
            self._buckets.popitem(last=False)  # the one that rested longest, whose bucket is full again soonest
        if not allowed:
            raise RateLimitedError(
                f"{principal.name} may make {self._rate:g} calls a second, and {self._burst:g} at once: "
                "wait, send crops in batches, or ask the operator for more",
                retry_after_s=(1.0 - left) / self._rate,
                principal=principal.name,
                rate_limit=self._rate,
            )
