"""Who of a process's own threads goes first where two want one core."""

from __future__ import annotations

import contextlib
import os
import threading

NICER = 5  # a third of the weight of the other threads, see sched(7)


def give_way() -> None:
    """Let the calling thread wait where another one wants its core.

    For threads that embed: a caller who is refused, or whose crop is decoded, then waits for microseconds and not for
    the end of a time slice. Where threads have no niceness of their own nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError):
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICER)
