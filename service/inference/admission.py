"""The rule that admits work to a queue: within its capacity, and only what can be done before its deadline.

Crops waiting for a model and queries waiting for an index follow the same rule, so that overload is refused at once
and cheaply, with a time after which a retry is worth it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from resight.errors import DeadlineError, ExpiredInQueueError, OverloadedError

MIN_RETRY_S = 0.05  # an earlier retry would find the queue unchanged
SMOOTHING = 0.2  # weight of the newest batch in the moving averages


def deadline_error(deadline: float) -> DeadlineError | None:
    """The error of a deadline in `time.monotonic` seconds if it has passed, else None."""
    if time.monotonic() < deadline:
        return None
    return ExpiredInQueueError("the deadline passed before the work started: allow more time or send less at once")


class Admission:
    """Counts what was admitted and is not finished, by priority; admits from the event loop's thread only.

    Args:
        unit: what is admitted, in the plural, for messages.
        setting: name of the setting that limits it.
        limit: maximum of each priority.

    Attributes:
        batch_s: moving average of the seconds that a batch takes.
        each_s: moving average of the seconds per item.
    """

    def __init__(self, unit: str, setting: str, limit: int) -> None:
        self._unit, self._limit = unit, limit
        self._limit_fact: dict[str, Any] = {setting: limit}  # a detail of the error
        self._taken: dict[int, int] = {}
        self.batch_s = self.each_s = 0.0

    @contextlib.contextmanager
    def admit(self, count: int, deadline: float, priority: int = 0) -> Iterator[None]:
        """Reserve capacity for ``count`` items within the block.

        Args:
            count: items.
            deadline: in `time.monotonic` seconds.
            priority: lower numbers go first.

        Raises:
            DeadlineError: it has already passed.
            OverloadedError: the capacity is exhausted, or the expected wait is longer than the deadline.
        """
        if error := deadline_error(deadline):
            raise error
        ahead = sum(taken for other, taken in self._taken.items() if other <= priority)
        # An item is finished only when its whole batch is. Without this term, at ten times peak load five sixths of
        # the embedded crops were past their deadline (ResNet-50, deadline 2 s).
        wait_s = ahead * self.each_s + (self.batch_s if ahead else 0.0)
        retry_s = max(MIN_RETRY_S, wait_s)
        taken = self._taken.get(priority, 0)
        if taken + count > self._limit:
            raise OverloadedError(
                f"{taken} {self._unit} are waiting or running, {count} more requested, limit {self._limit}: try again "
                f"in {retry_s:.2f} s",
                retry_after_s=retry_s,
                **self._limit_fact,
            )
        if ahead and wait_s > deadline - time.monotonic():
            raise OverloadedError(
                f"the expected wait of {wait_s:.2f} s is longer than the deadline: try again in {retry_s:.2f} s or "
                "allow more time",
                retry_after_s=retry_s,
            )
        self._taken[priority] = taken + count
        try:
            yield
        finally:
            self._taken[priority] -= count

    def waiting(self, priority: int = 0) -> int:
        """Items of a priority admitted and not yet finished."""
        return self._taken.get(priority, 0)

    def record_batch(self, seconds: float, count: int, *, parallel: int = 1) -> None:
        """Update the averages with a batch of ``count`` items that ran beside ``parallel`` - 1 others."""
        self.batch_s += SMOOTHING * (seconds - self.batch_s)
        self.each_s += SMOOTHING * (seconds / count / parallel - self.each_s)
