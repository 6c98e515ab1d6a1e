"""Collecting the crops of a cycle's run: new and valid ones, balanced over cameras, plus replayed and held-out ones.

A run gets its own store from the growing store of the site: split "train" for adaptation, and split "gallery" with
held-out tracks for judging. A share of older crops is replayed, so that appearances and cameras missing this time are
not forgotten (experience replay: Rolnick et al., NeurIPS 2019). Crops of the frozen reference are never trained on.

Crops are selected in units: scenes (tracks of one camera that follow each other without a gap, so that people seen
together stay together) and tracks that are connected by links, over all cameras.

Letters: N crops, T tracks, U units, C cameras.
"""

from __future__ import annotations

import heapq
import json
import logging
import shutil
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from resight.arrays import Ints
from resight.errors import SiteError
from resight.files import replace_folder, temporary_folder, write_atomic
from resight.training.curation.hygiene import RECHECKED_CROPS, filter_nights
from resight.training.store.copying import copy_crops, open_all_splits
from resight.training.store.crops import UNKNOWN, CropStore, is_store, open_store, write_store
from resight.training.store.growing import capture_times
from resight.training.store.links import Links, links_of, read_links, write_links
from resight.training.store.track_pairs import number_tracks

OVERDRAW = 2.0  # limit of a busy camera, relative to the median camera
SCENES = 10  # approximate number of scenes per camera, so that a fifth of the crops can be held out


def track_numbers(store: CropStore) -> Ints:
    """Number of each crop's track, 0..T-1; a crop without a track is a separate track: int64 (N,)."""
    numbers = number_tracks(store.cameras, store.tracks)
    trackless = numbers == UNKNOWN
    numbers[trackless] = numbers.max(initial=UNKNOWN) + 1 + np.arange(trackless.sum())
    return numbers


def unit_numbers(store: CropStore, links: Links) -> Ints:
    """Number of each crop's unit, 0..U-1: int64 (N,).

    A camera's tracks, in order of their start, are added to a scene until none of them continues, or until it has two
    tracks and a tenth of the camera's crops. Tracks connected by links form a unit; if that would be more than a tenth
    of all crops, only must-links are used, and if that is still too large, no links.

    Args:
        store: N crops.
        links: between its rows.
    """
    track = track_numbers(store)
    unit = _scene_numbers(store, track)
    unassigned = np.ones(len(store), bool)
    for ends in (links.rows, links.rows[links.same]):
        if not len(ends):
            continue
        linked = _linked_tracks(track, track[ends])
        size = np.bincount(linked[linked != UNKNOWN], minlength=1)
        fits = unassigned & (linked != UNKNOWN)
        fits[fits] = size[linked[fits]] <= len(store) / SCENES
        unit[fits] = unit.max() + 1 + linked[fits]
        unassigned &= ~fits
    return np.unique(unit, return_inverse=True)[1].astype(np.int64)


def _linked_tracks(track: Ints, ends: Ints) -> Ints:
    """Group of linked tracks of each crop, -1 for tracks without links: int64 (N,)."""
    count = int(track.max(initial=UNKNOWN)) + 1
    graph = sparse.coo_matrix((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), (count, count))
    group = connected_components(graph, directed=False)[1]
    return np.where(np.isin(track, ends), group[track], UNKNOWN)


def _scene_numbers(store: CropStore, track: Ints) -> Ints:
    """Number of each crop's scene: int64 (N,)."""
    count = int(track.max(initial=UNKNOWN)) + 1
    begin, end, camera = np.full(count, np.inf), np.full(count, -np.inf), np.zeros(count, np.int64)
    np.minimum.at(begin, track, np.nan_to_num(store.times_s, nan=np.inf))
    np.maximum.at(end, track, np.nan_to_num(store.times_s, nan=-np.inf))
    camera[track] = store.cameras
    size = np.bincount(track, minlength=count)
    scene_size = np.ceil(np.bincount(store.cameras) / SCENES)
    scene = np.zeros(count, np.int64)
    number, tracks, crops, current, until_s = -1, 0, 0, -1, -np.inf
    for one in np.lexsort((end, begin, camera)):
        if camera[one] != current or begin[one] > until_s or (crops >= scene_size[current] and tracks > 1):
            number, tracks, crops, current, until_s = number + 1, 0, 0, int(camera[one]), -np.inf
        scene[one] = number
        tracks, crops, until_s = tracks + 1, crops + int(size[one]), max(until_s, float(end[one]))
    return scene[track]


def unit_sizes(store: CropStore, unit: Ints) -> Ints:
    """Number of crops of each unit per camera: int64 (U, C)."""
    sizes = np.zeros((int(unit.max(initial=-1)) + 1, len(store.camera_names)), np.int64)
    np.add.at(sizes, (unit, store.cameras), 1)
    return sizes


def balance_cameras(sizes: Ints, order: Sequence[int] | Ints, budget: int) -> NDArray[np.bool_]:
    """Select units one by one, always from the camera with the fewest crops so far.

    No camera gets more than `OVERDRAW` times the crops of the median camera, and the total is limited by the budget; a
    unit that does not fit is skipped completely.

    Args:
        sizes: int64 (U, C).
        order: units in order of preference; a unit of several cameras is assigned to the one with most of its crops.
        budget: maximum number of selected crops.

    Returns:
        bool (U,).
    """
    chosen = np.zeros(len(sizes), bool)
    available = sizes.sum(0)
    if not available.any():
        return chosen
    cap = OVERDRAW * np.median(available[available > 0])
    queues: defaultdict[int, deque[int]] = defaultdict(deque)
    for unit in order:
        queues[int(sizes[unit].argmax())].append(int(unit))
    taken = np.zeros(sizes.shape[1], np.int64)
    heap = [(0, camera) for camera in sorted(queues)]
    while heap:
        _, camera = heapq.heappop(heap)
        while queues[camera]:
            unit = queues[camera].popleft()
            after = taken + sizes[unit]
            if after.sum() <= budget and (after <= cap)[sizes[unit] > 0].all():
                taken, chosen[unit] = after, True
                heapq.heappush(heap, (int(after[camera]), camera))
                break
    return chosen


def hold_out_units(sizes: Ints, share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Select units to hold out for judging: about a share of each camera's crops, never all.

    Args:
        sizes: int64 (U, C).
        share: share of each camera's crops, in [0, 1).
        rng: the only source of randomness.

    Returns:
        bool (U,).
    """
    chosen = np.zeros(len(sizes), bool)
    available, held = sizes.sum(0), np.zeros(sizes.shape[1])
    for unit in rng.permutation(len(sizes)):
        present = sizes[unit] > 0
        after = held + sizes[unit]
        # a unit is selected if that brings its cameras closer to their share
        if (held + sizes[unit] / 2 <= share * available)[present].all() and (after < available)[present].all():
            held, chosen[unit] = after, True
    return chosen


log = logging.getLogger(__name__)

RECORD_FILE = "collected.json"
CollectStatus = Literal["ready", "skipped", "refused"]


@dataclass(frozen=True)
class CollectSettings:
    """Settings of `collect`.

    Attributes:
        since_s: Unix seconds; later crops are new.
        min_crops: minimum number of new crops for a run.
        max_crops: maximum number of crops in total.
        replay: share of older crops among all, in [0, 1).
        hold_out: share of each camera's new crops that is held out, in [0, 1).
        retention_days: maximum age of crops; None for no limit.
        seed: seed of every random choice.
    """

    since_s: float = 0.0
    min_crops: int = 500
    max_crops: int = 20_000
    replay: float = 0.3
    hold_out: float = 0.2
    retention_days: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class CollectResult:
    """Result of `collect`.

    Attributes:
        outcome: "ready"; or "skipped" for too few new crops, or "refused" for invalid ones, with nothing written.
        reasons: messages, also about excluded crops.
        until_s: value of ``since_s`` for the next call, so that these crops are not considered again.
        crops: new, expired, in_reference, unsound, passed_over (for balance), train, replayed, held_out, links.
        cameras: name -> train, replayed, held_out.
    """

    outcome: CollectStatus
    reasons: tuple[str, ...]
    until_s: float
    crops: Mapping[str, int]
    cameras: Mapping[str, Mapping[str, int]]

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self) | {"reasons": list(self.reasons)}


def collect(
    source: Path, into: Path, settings: CollectSettings, *, reference: Path | None, now_s: float
) -> CollectResult:
    """Create the store of a run atomically; a repeated call returns the result of the first one.

    Args:
        source: folder of the site's growing store.
        into: folder to create.
        settings: see `CollectSettings`.
        reference: folder of the judge's frozen crops; tracks in it are not collected.
        now_s: Unix seconds.

    Raises:
        SiteError: ``into`` is something else, or was created with other settings.
        StoreError: a store is damaged.
        OSError: reading or writing failed.
    """
    requested = asdict(settings)
    if into.exists():
        return _existing_result(into, requested)
    if not is_store(source) or not open_store(source):
        return _finished("skipped", f"no crops in {source}: ingest some first", settings.since_s, {"new": 0})
    store = open_all_splits(source)
    times = capture_times(store)
    usable, counts = _usable(store, times, settings, reference, now_s)
    new = np.flatnonzero(usable & (times > settings.since_s))
    counts["new"] = len(new)
    until_s = float(min(times[new].max(initial=settings.since_s), now_s))
    if len(new) < settings.min_crops:
        return _finished("skipped", _too_few(len(new), settings), until_s, counts)
    checked = filter_nights(store.subset(new), times[new], group=settings.min_crops)
    counts["unsound"] = len(new) - int(checked.kept.sum())
    if checked.refused:
        return _finished("refused", checked.reasons, until_s, counts)
    new = new[checked.kept]
    if len(new) < settings.min_crops:
        return _finished("skipped", (*checked.reasons, _too_few(len(new), settings)), until_s, counts)
    choice = _choose(store, times, new, np.flatnonzero(usable & (times <= settings.since_s)), settings)
    counts["passed_over"] = len(new) - int((~choice.replayed).sum())
    return _write(store, choice, into, CollectResult("ready", checked.reasons, until_s, counts, {}), requested)


def _existing_result(into: Path, requested: Mapping[str, Any]) -> CollectResult:
    """The result of an earlier call with the same settings."""
    try:
        record = json.loads((into / RECORD_FILE).read_text())
        collected = record["collected"]
        found = CollectResult(**{**collected, "reasons": tuple(collected["reasons"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SiteError(f"{into} exists and was not created by collect: choose another folder, or remove it") from error
    earlier = record["asked"]
    changed = [
        f"{name} {earlier.get(name)!r}, now {value!r}"
        for name, value in requested.items()
        if earlier.get(name) != value
    ]
    if changed:
        raise SiteError(f"{into} was collected with other settings ({'; '.join(changed)}): remove it, or use those")
    return found


def _finished(
    outcome: CollectStatus, reasons: str | tuple[str, ...], until_s: float, counts: Mapping[str, int]
) -> CollectResult:
    return CollectResult(outcome, (reasons,) if isinstance(reasons, str) else reasons, until_s, counts, {})


def _too_few(found: int, settings: CollectSettings) -> str:
    return f"{found} usable new crops: expected at least {settings.min_crops}"


def _usable(
    store: CropStore, times: NDArray[np.float64], settings: CollectSettings, reference: Path | None, now_s: float
) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """Crops that may be collected: not too old or missing, and of no track in the reference."""
    days = settings.retention_days
    young = np.isfinite(times) & (times >= (-np.inf if days is None else now_s - days * 86_400))
    reserved = np.zeros(len(store), bool)
    if reference is not None and is_store(reference):
        paths = {path for part in open_store(reference).values() for path in part.paths}
        track = track_numbers(store)
        reserved = np.isin(track, track[[path in paths for path in store.paths]])
    counts = {"expired": int((~young).sum()), "in_reference": int((young & reserved).sum())}
    return young & ~reserved, counts


@dataclass(frozen=True)
class _Choice:
    """Rows of a run's store in the order of the source, with the purpose of each."""

    rows: Ints
    held_out: NDArray[np.bool_]
    replayed: NDArray[np.bool_]


def _choose(store: CropStore, times: NDArray[np.float64], new: Ints, old: Ints, settings: CollectSettings) -> _Choice:
    """Select balanced new crops, hold some out, and add older ones up to their share."""
    rng = np.random.default_rng(settings.seed)
    links = links_of(store)
    if settings.replay and len(old):
        old = old[
            filter_nights(store.subset(old), times[old], group=settings.min_crops, sample_limit=RECHECKED_CROPS).kept
        ]
    new_budget = round(settings.max_crops * (1 - settings.replay)) if len(old) else settings.max_crops
    selected, unit, sizes = _balanced(store, new, links, new_budget, rng)
    held = hold_out_units(sizes, settings.hold_out, rng)[unit]
    budget = min(round(len(selected) * settings.replay / (1 - settings.replay)), settings.max_crops - len(selected))
    replayed, *_ = _balanced(store, old, links, budget, rng)
    rows = np.concatenate([selected, replayed])
    order = np.argsort(rows)
    is_old = np.arange(len(rows)) >= len(selected)
    return _Choice(rows[order], np.concatenate([held, np.zeros(len(replayed), bool)])[order], is_old[order])


def _balanced(
    store: CropStore, rows: Ints, links: Links, budget: int, rng: np.random.Generator
) -> tuple[Ints, Ints, Ints]:
    """Balanced rows, the unit of each and the sizes of the units; units with links are preferred."""
    part = store.subset(rows)
    position = np.full(len(store), -1, np.int64)
    position[rows] = np.arange(len(rows))
    linked, inside = position[links.rows], (position[links.rows] >= 0).all(1)
    unit = unit_numbers(part, Links(linked[inside], links.same[inside]))
    sizes = unit_sizes(part, unit)
    order = rng.permutation(len(sizes))
    has_links = np.isin(order, unit[linked[inside]])
    chosen = balance_cameras(sizes, [*order[has_links], *order[~has_links]], budget)
    numbers = np.cumsum(chosen) - 1
    selected = chosen[unit]
    return rows[selected], numbers[unit[selected]], sizes[chosen]


def _write(
    store: CropStore, choice: _Choice, into: Path, result: CollectResult, requested: Mapping[str, Any]
) -> CollectResult:
    """Write the run's folder under a temporary name and rename it."""
    purpose = dict(
        zip((store.paths[row] for row in choice.rows), zip(choice.held_out, choice.replayed, strict=True), strict=True)
    )
    for leftover in into.parent.glob(f".{into.name}.*"):  # of a killed call; it contains images of people
        shutil.rmtree(leftover, ignore_errors=True)
    with temporary_folder(into) as folder:
        copied = copy_crops(store.subset(choice.rows), folder)
        held, replayed = (np.array([purpose[path][side] for path in copied.paths], bool) for side in (0, 1))
        write_store(folder, copied, ["gallery" if is_held else "train" for is_held in held])
        pairs = [pair for pair in read_links(store.root) if pair.path_a in purpose and pair.path_b in purpose]
        if pairs:
            write_links(folder, pairs)
        kinds = {"train": ~held, "replayed": replayed, "held_out": held}
        counts = {name: int(mask.sum()) for name, mask in kinds.items()}
        cameras = {
            name: {kind: int((mask & (copied.cameras == number)).sum()) for kind, mask in kinds.items()}
            for number, name in enumerate(copied.camera_names)
        }
        found = replace(result, crops={**result.crops, **counts, "links": len(pairs)}, cameras=cameras)
        record = {"asked": requested, "collected": found.to_json()}
        write_atomic(folder / RECORD_FILE, (json.dumps(record, indent=2) + "\n").encode())
        replace_folder(folder, into)
    return found
