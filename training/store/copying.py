"""Crops of one store as a part of another: the same files under the same paths, as hard links or copies."""

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
    """All crops of a store, of whatever split.

    Raises:
        StoreError: there is none, or it is damaged or empty.
    """
    parts = list(open_store(root).values())
    if not parts:
        raise StoreError(f"{root} holds no crops: ingest some first")
    return join_stores(root, parts)


def join_stores(root: Path, stores: Sequence[CropStore]) -> CropStore:
    """The rows of several stores under one root, cameras numbered anew by name; a path counts once, the first time."""
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
    """Put a store's crops into another folder, under the paths they have.

    Hard links take no room and outlive the file they were made of, as copies do. A crop that is gone by now, or
    cannot be read, is left out and told in the log.

    Args:
        store: the crops.
        into: a folder of ours.

    Returns:
        The rows that are there, with ``into`` as their root.

    Raises:
        OSError: the disk refused.
    """
    kept = []
    for row, path in enumerate(store.paths):
        target = into / path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            _link_or_copy(store.file(row), target)
        except (StoreError, FileNotFoundError) as error:
            log.warning("left out %s: %s", path, error)
            continue
        kept.append(row)
    return replace(store.subset(kept), root=into)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in LINK_UNSUPPORTED:
            raise
        shutil.copy2(source, target)  # with its time: retention asks for it
