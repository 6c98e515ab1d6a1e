"""The judge's reference: crops of earlier nights, kept frozen, so that a candidate is asked about them as well.

After a promotion the tracks that the run held out join it. It keeps its size as a sample of all that ever joined and
may still be kept: every unit (`selection`) has a rank that its own first path decides, and the lowest ranks stay
(bottom-k sampling: Cohen and Kaplan, PODC 2007), cameras in balance. So a night changes little, and twice nothing.

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
    """Let a run's held-out crops join the reference.

    Args:
        site: folder of the run's store; its split "gallery" joins.
        reference: folder of the reference, made where there is none. Its rows are of split "train", as a store
            without queries has them; nobody trains on it.
        most: crops it may hold.
        before_s: Unix seconds; crops that were taken earlier leave it.

    Returns:
        "joined", "left" and "crops" held now.

    Raises:
        SiteError: the run held nothing out.
        StoreError: a store is damaged.
        OSError: the disk refused.
    """
    old = reference.with_name(f".{reference.name}.old")
    if old.exists() and not reference.exists():  # a kill between the two renames of an earlier call
        old.rename(reference)
    fresh = open_store(site).get("gallery")
    if fresh is None:
        raise SiteError(f"{site} holds nothing out (split gallery): collect it with --hold-out above 0")
    stores = [fresh]
    if is_store(reference) and open_store(reference):
        stores.insert(0, open_all_splits(reference))
    before = {path for store in stores[:-1] for path in store.paths}
    kept, pairs = _kept(stores, most, before_s)
    after = {path for store in kept for path in store.paths}
    if after != before:
        _write(kept, pairs, reference)
    found = {"joined": len(after - before), "left": len(before - after), "crops": len(after)}
    log.info("reference %s: %d crops joined, %d left, %d held", reference, *found.values())
    return found


def _kept(stores: Sequence[CropStore], most: int, before_s: float) -> tuple[list[CropStore], list[LinkPair]]:
    """The crops of each store that are kept, and the links between them."""
    young = [store.subset(np.flatnonzero(capture_times(store) >= before_s)) for store in stores]
    joined = join_stores(stores[0].root, young)
    number = {path: row for row, path in enumerate(joined.paths)}
    told: dict[tuple[str, str], LinkPair] = {}
    for store in stores:  # what was said last counts
        for pair in read_links(store.root):
            told[min(pair[:2]), max(pair[:2])] = pair
    pairs = [pair for pair in told.values() if pair.path_a in number and pair.path_b in number]
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
    """Units by the hash of their first path: int64 (U,)."""
    first = np.unique(unit, return_index=True)[1]
    digests = [hashlib.sha256(store.paths[row].encode()).digest() for row in first]
    return np.array(sorted(range(len(digests)), key=digests.__getitem__), np.int64)


def _write(stores: Sequence[CropStore], pairs: Sequence[LinkPair], reference: Path) -> None:
    """The reference's folder, complete before it takes the place of the one before."""
    with temporary_folder(reference) as folder:
        made = join_stores(folder, [copy_crops(store, folder) for store in stores])
        write_store(folder, made, ["train"] * len(made))
        there = set(made.paths)
        write_links(folder, [pair for pair in pairs if pair.path_a in there and pair.path_b in there])
        replace_folder(folder, reference)
