"""A stage ends when its cycle ends, however that happens.

The cycle keeps the writing end of a pipe and writes nothing to it; the stage's process inherits the reading end.
When the cycle is gone, killed with SIGKILL even, the kernel closes its end: the stage reads the end of the file and
kills its whole process group. Nothing has to be remembered, no process id has to be looked up.
"""

from __future__ import annotations

import os
import signal
import threading

VARIABLE = "RESIGHT_CYCLE_LEASH"  # number of the reading end, for the stage's process


def hold() -> None:
    """In a stage's process: die with the cycle that started it; nothing where no cycle did.

    The process must lead a process group of its own, for all of it is killed.
    """
    number = os.environ.pop(VARIABLE, "")  # not for children: those are in the group
    if not number:
        return
    descriptor = int(number)
    os.set_inheritable(descriptor, False)
    threading.Thread(target=_wait, args=(descriptor,), name="leash", daemon=True).start()


def _wait(descriptor: int) -> None:
    while True:
        try:
            if not os.read(descriptor, 1):
                os.killpg(os.getpgrp(), signal.SIGKILL)
        except InterruptedError:
            continue
