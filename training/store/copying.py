"""Joining stores, and copying crops into another store under the same paths, as hard links if possible."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from resight.errors import StoreError
from resight.training.store.crops import COLUMNS, CropStore, camera_order, open_store

log = logging.getLogger(__name__)

LINK_UNSUPPORTED = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EACCES}


def open_all_splits(root: Path) -> CropStore:
    """All crops of a store, of all splits.

    Raises:
        StoreError: the store is missing, damaged or empty.
    """
    parts = list(open_store(root).values())
    if not parts:
        raise StoreError(f"{root} has no crops: ingest some first")
    return join_stores(root, parts)


def join_stores(root: Path, stores: Sequence[CropStore]) -> CropStore:
    """The rows of several stores under one root, cameras renumbered by name; of equal paths the first row is used."""
    names = sorted({name for store in stores for name in store.camera_names}, key=camera_order)
    number = {name: index for index, name in enumerate(names)}
    numbered = [
        replace(
            store,
            root=root,
            cameras=np.array([number[name] for name in store.camera_names], np.int64)[store.cameras],
            camera_names=tuple(names),
        )
        for store in stores
    ]
    columns: dict[str, Any] = {name: np.concatenate([getattr(one, name) for one in numbered]) for name in COLUMNS}
    joined = replace(numbered[0], paths=tuple(path for one in numbered for path in one.paths), **columns)
    _, first = np.unique(np.array(joined.paths, dtype=object), return_index=True)
    return joined.subset(np.sort(first))


def copy_crops(store: CropStore, into: Path) -> CropStore:
    """Copy a store's crops into another folder, under the same paths.

    Hard links need no space and remain valid if the original is removed, as copies do. A crop that is missing or cannot
    be read is skipped and logged.

    Args:
        store: the crops.
        into: the target folder.

    Returns:
        The rows that were copied, with ``into`` as their root.

    Raises:
        OSError: linking or copying failed.
    """
    copied = []
    for row, path in enumerate(store.paths):
        target = into / path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _link_or_copy(store.file(row), target)
        except (StoreError, FileNotFoundError) as error:
            log.warning("skipped %s: %s", path, error)
            continue
        copied.append(row)
    return replace(store.subset(copied), root=into)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in LINK_UNSUPPORTED:
            raise
        shutil.copy2(source, target)  # with its modification time, which retention uses
