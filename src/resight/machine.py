"""The number of cores this process may use, and OpenMP's settings.

`os.cpu_count` and OpenMP ignore a container's CPU quota: they would start a thread for every core of the host.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

SPIN_COUNT = 10_000
"""Rounds that a thread of libgomp spins at a barrier before it sleeps; libgomp's default of 300,000 takes milliseconds.

ResNet-18, forward and backward, 2 threads on 2 cores with three other busy processes: 1,280 ms per step with libgomp's
default, 660 ms with this value, 590 ms without spinning (``OMP_WAIT_POLICY=PASSIVE``). On idle cores: 180-195, 181-198
and 205 ms.
"""


def cores(root: Path = Path("/")) -> int:
    """Cores this process may use: the smaller of its CPU affinity and its cgroups' quotas, at least 1.

    Args:
        root: of the file system whose ``proc`` and ``sys`` are read.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *(math.ceil(quota) for quota in _quotas(root))]))


def threads() -> int:
    """Threads for one computation: ``OMP_NUM_THREADS`` where it is a positive number, otherwise `cores`."""
    setting = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(setting) if setting.isdecimal() and int(setting) > 0 else cores()


def limit_threads() -> None:
    """Set OpenMP's environment for this process and its children, before any library that reads it is loaded.

    Variables that are already set are kept: ``OMP_NUM_THREADS``, ``OMP_WAIT_POLICY`` and ``GOMP_SPINCOUNT``.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(cores()))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


def _quotas(root: Path) -> Iterator[float]:
    """Cores granted by the quota of each cgroup around this process; nothing where there is no quota."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            base = root / "sys/fs/cgroup"
            found = [_read(folder / "cpu.max").split() for folder in _folders(base, path)]
        elif "cpu" in controllers.split(","):
            base = root / "sys/fs/cgroup" / controllers
            base = base if base.is_dir() else root / "sys/fs/cgroup/cpu"
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            found = [[_read(folder / name).strip() for name in names] for folder in _folders(base, path)]
        else:
            continue
        for pair in found:
            if len(pair) == 2 and all(part.isdecimal() and int(part) > 0 for part in pair):  # "max" and -1: no quota
                yield int(pair[0]) / int(pair[1])


def _folders(base: Path, path: str) -> Iterator[Path]:
    """The hierarchy's root, which inside a container is its own cgroup, and each folder down to the process's own."""
    yield base
    for part in Path(path.lstrip("/")).parts:
        base /= part
        yield base


def _read(path: Path) -> str:
    """A file's text; empty where it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
