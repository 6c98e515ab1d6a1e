"""When a cycle may work: its maintenance window and its budget, as seconds from now."""

from __future__ import annotations

import time
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from resight.cycle.site_sections import Schedule

MINUTE_S = 60.0


def left_s(schedule: Schedule, now: datetime) -> float | None:
    """Seconds until the window closes; 0 = it is closed, None = there is none.

    Args:
        schedule: of the site.
        now: an aware time.
    """
    if not schedule.window:
        return None
    here = now.astimezone(ZoneInfo(schedule.timezone))
    begins, ends = (_minute(text) for text in schedule.window.split("-"))
    minute = here.hour * 60 + here.minute
    is_open = begins <= minute < ends if begins < ends else minute >= begins or minute < ends
    if not is_open:
        return 0.0
    day = here.date() + timedelta(days=int(begins > ends and minute >= begins))
    end = datetime(day.year, day.month, day.day, ends // 60, ends % 60, tzinfo=here.tzinfo)
    return max(0.0, end.timestamp() - now.timestamp())  # by the clock of the world: a day may have 23 or 25 hours


def _minute(text: str) -> int:
    hours, _, minutes = text.partition(":")
    return 60 * int(hours) + int(minutes)


def deadline(schedule: Schedule, now: datetime, *, ignore_window: bool = False) -> float | None:
    """`time.monotonic` at which a call that begins now has to end; None = never."""
    limits = [] if schedule.budget_minutes == 0 else [schedule.budget_minutes * MINUTE_S]
    left = None if ignore_window else left_s(schedule, now)
    if left is not None:
        limits.append(left)
    return time.monotonic() + min(limits) if limits else None
