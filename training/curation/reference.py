"""The judge's reference: a fixed store of crops of earlier nights on which every candidate is also evaluated.

After a promotion the tracks held out by the run are added. The store keeps its size as a sample of all crops ever added
within their retention time: every unit (see `collect`) has a rank given by the hash of its first path, and the lowest
ranks are kept (bottom-k sampling: Cohen and Kaplan, PODC 2007), balanced over cameras. So one night changes little, and
adding it again changes nothing.

Letters: N crops, U units.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from resight.arrays import Ints
from resight.errors import SiteError
from resight.files import replace_folder, temporary_folder
from resight.training.curation.collect import balance_cameras, unit_numbers, unit_sizes
from resight.training.store.copying import copy_crops, join_stores, open_all_splits
from resight.training.store.crops import CropStore, is_store, open_store, write_store
from resight.training.store.growing import capture_times
from resight.training.store.links import LinkPair, Links, read_links, write_links

log = logging.getLogger(__name__)


def add_to_reference(site: Path, reference: Path, *, most: int, before_s: float = -np.inf) -> dict[str, int]:
    """Add a run's held-out crops to the reference.

    Args:
        site: folder of the run's store; its split "gallery" is added.
        reference: folder of the reference, created if missing. Its rows have the split "train", as in any store
            without queries, but are not used for training.
        most: maximum number of crops.
        before_s: Unix seconds; earlier crops are removed.

    Returns:
        "joined", "left" and "crops", the current number.

    Raises:
        SiteError: the run has no held-out crops.
        StoreError: a store is damaged.
        OSError: reading or writing failed.
    """
    old = reference.with_name(f".{reference.name}.old")
    if old.exists() and not reference.exists():  # an earlier call was killed between two renames
        old.rename(reference)
    fresh = open_store(site).get("gallery")
    if fresh is None:
        raise SiteError(f"{site} has no held-out crops (split gallery): collect it with --hold-out above 0")
    stores = [fresh]
    if is_store(reference) and open_store(reference):
        stores.insert(0, open_all_splits(reference))
    before = {path for store in stores[:-1] for path in store.paths}
    selected, pairs = _select(stores, most, before_s)
    after = {path for store in selected for path in store.paths}
    if after != before:
        _write(selected, pairs, reference)
    found = {"joined": len(after - before), "left": len(before - after), "crops": len(after)}
    log.info("reference %s: %d crops added, %d removed, %d in total", reference, *found.values())
    return found


def _select(stores: Sequence[CropStore], most: int, before_s: float) -> tuple[list[CropStore], list[LinkPair]]:
    """The crops of each store to keep, and the links between them."""
    young = [store.subset(np.flatnonzero(capture_times(store) >= before_s)) for store in stores]
    joined = join_stores(stores[0].root, young)
    number = {path: row for row, path in enumerate(joined.paths)}
    latest: dict[tuple[str, str], LinkPair] = {}
    for store in stores:  # later decisions override earlier ones
        for pair in read_links(store.root):
            latest[min(pair[:2]), max(pair[:2])] = pair
    pairs = [pair for pair in latest.values() if pair.path_a in number and pair.path_b in number]
    linked = np.array([(number[pair.path_a], number[pair.path_b]) for pair in pairs], np.int64).reshape(-1, 2)
    unit = unit_numbers(joined, Links(linked, np.array([pair.same for pair in pairs], bool)))
    sizes = unit_sizes(joined, unit)
    chosen = balance_cameras(sizes, _units_by_hash(joined, unit), most)[unit]
    paths = {joined.paths[row] for row in np.flatnonzero(chosen)}
    seen: set[str] = set()
    parts = []
    for store in young:
        parts.append(store.subset([row for row, path in enumerate(store.paths) if path in paths - seen]))
        seen |= set(parts[-1].paths)
    return parts, [pair for pair in pairs if pair.path_a in paths and pair.path_b in paths]


def _units_by_hash(store: CropStore, unit: Ints) -> Ints:
    """Units ordered by the hash of their first path: int64 (U,)."""
    first = np.unique(unit, return_index=True)[1]
    digests = [hashlib.sha256(store.paths[row].encode()).digest() for row in first]
    return np.array(sorted(range(len(digests)), key=digests.__getitem__), np.int64)


def _write(stores: Sequence[CropStore], pairs: Sequence[LinkPair], reference: Path) -> None:
    """Write the reference under a temporary name and replace the earlier one."""
    with temporary_folder(reference) as folder:
        written = join_stores(folder, [copy_crops(store, folder) for store in stores])
        write_store(folder, written, ["train"] * len(written))
        paths = set(written.paths)
        write_links(folder, [pair for pair in pairs if pair.path_a in paths and pair.path_b in paths])
        replace_folder(folder, reference)
