"""Retention: crops leave a store, rows and files, when they may not be kept any more.

What is to go is written down first; whatever kills the program in between, the next purge finishes it. Links of such
crops go as well.
"""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resight.atomic import sync, write_atomic
from resight.errors import StoreError
from resight.training.crops import CropStore, check_path, is_store, open_store
from resight.training.growing import GrowingStore
from resight.training.links import LINKS_FILE, read_links, write_links
from resight.training.transplant import whole_store

log = logging.getLogger(__name__)

PURGE_FILE = ".purge.json"


def taken_s(store: CropStore) -> NDArray[np.float64]:
    """When each crop was taken: float64 (N,), Unix seconds.

    Where nobody knows it is when its file was written; NaN if that is gone.
    """
    times = store.times_s.copy()
    for row in np.flatnonzero(np.isnan(times)):
        try:
            times[row] = (store.root / store.paths[row]).stat().st_mtime
        except OSError:
            continue
    return times


def purge(root: Path, before_s: float, *, source: Path | None = None) -> int:
    """Remove the crops that were taken before a time; how many.

    Args:
        root: folder of a store; one that is not there holds nothing to remove.
        before_s: Unix seconds.
        source: folder of the store whose crops these are: what it has not any more, since somebody was erased say,
            goes as well. One that is not there says nothing.

    Raises:
        StoreError: the index or the list of an interrupted purge is damaged.
        StorageFullError: no room for the new index; nothing was removed.
    """
    if not is_store(root):
        return 0
    removed = _finish(root)
    if open_store(root):
        store = whole_store(root)
        gone = taken_s(store) < before_s
        if source is not None and is_store(source):
            left = {path for part in open_store(source).values() for path in part.paths}
            gone |= np.array([path not in left for path in store.paths])
        old = [store.paths[row] for row in np.flatnonzero(gone)]
        if old:
            write_atomic(root / PURGE_FILE, json.dumps(old).encode())
            removed += _finish(root)
    if removed:
        log.info("removed %d crops of %s that may not be kept any more", removed, root)
    return removed


def _finish(root: Path) -> int:
    """Do what is written down; how many rows that took."""
    told = root / PURGE_FILE
    if not told.exists():
        return 0
    try:
        old = [str(path) for path in json.loads(told.read_bytes())]
    except (ValueError, TypeError) as error:
        raise StoreError(f"{told} is damaged ({error}): remove it, and purge again") from error
    gone = set(old)
    removed = GrowingStore(root).remove(gone.__contains__)
    for path in old:
        check_path(path)
        (root / path).unlink(missing_ok=True)
    for folder in {(root / path).parent for path in old} - {root}:
        with suppress(OSError):  # not empty, or gone already
            folder.rmdir()
    kept = [pair for pair in read_links(root) if pair.path_a not in gone and pair.path_b not in gone]
    if (root / LINKS_FILE).exists():
        write_links(root, kept)
    told.unlink()
    sync(root)
    return removed
