"""Room on the disk: writes are refused before it is full, so that deletions, audits and reads always have some.

A database that has no room left cannot even delete, because a deletion is written to the log first.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import NamedTuple

from resight.errors import DiskWatermarkError

log = logging.getLogger(__name__)

RELEASE_POINTS = 5.0  # of the disk above the mark before writes go on, so that they do not flap (Qdrant's margin)
RELEASE_FACTOR = 2.0  # likewise for the mark in bytes, which may be a thousandth of a large disk
LOOK_EVERY_S = 0.2  # a look costs microseconds, a thousand writes a second need not each take one


class Room(NamedTuple):
    """Bytes of a disk: free for us, and all."""

    free: int
    total: int


def room(folder: Path) -> Room:
    """How much room the disk under a folder has."""
    found = os.statvfs(folder)
    return Room(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)


class Watermark:
    """Refuses when the disk under a folder has less room than either mark, until it has clearly more than both.

    Any thread may ask. Pages that the database has freed count as room: it fills them before it grows.

    Args:
        folder: on the disk.
        low_bytes: free bytes; 0 = no such mark.
        low_percent: free share of the disk, 0..100; 0 = no such mark.
    """

    def __init__(self, folder: Path, *, low_bytes: int, low_percent: float) -> None:
        self._folder, self._low_bytes, self._low_percent = folder, low_bytes, low_percent
        self._lock = threading.Lock()
        self._looked = float("-inf")
        self._low = False
        self.spare = 0  # bytes of freed pages, as the writer last told

    @property
    def low(self) -> bool:
        """Whether writes are refused now."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked >= LOOK_EVERY_S:
                self._looked = now
                self._look()
            return self._low

    def _room(self) -> Room:
        free, total = room(self._folder)
        return Room(free + self.spare, total)

    def _look(self) -> None:
        free, total = self._room()
        percent = 100.0 * free / max(1, total)
        bytes_mark, percent_mark = float(self._low_bytes), self._low_percent
        if self._low:
            bytes_mark *= RELEASE_FACTOR
            percent_mark += RELEASE_POINTS if percent_mark else 0.0
        low = free < bytes_mark or percent < percent_mark
        if low != self._low:
            said = "is low: writes are refused" if low else "is there again: writes go on"
            log.warning("room on the disk %s free_bytes=%d free_percent=%.1f", said, free, percent)
        self._low = low

    def check(self) -> None:
        """Refuse a write.

        Raises:
            DiskWatermarkError: there is too little room.
        """
        if self.low:
            free, total = self._room()
            raise DiskWatermarkError(
                f"the data folder's disk has {free} of {total} bytes free, writes need {self._low_bytes} and "
                f"{self._low_percent:g} %: make room or delete entries; reads go on",
                free_bytes=free,
                total_bytes=total,
            )
