"""Which crops a night's work takes: whole tracks, cameras in balance, some held out to be judged on.

Crops are chosen in units that stay whole: scenes, which are tracks of one camera that follow each other without a
break, so that those who were in the picture together stay together; and whatever links tie, over all cameras.

Letters: N crops, T tracks, U units, C cameras.

The crops of one cycle: what is new and sound, cameras in balance, with some older ones and some held out.

From the growing store of a site a run gets a store of its own: split "train" to adapt to and split "gallery", whole
tracks held out of it, to be judged on. A share of older crops is replayed, so that looks and cameras that were not
there tonight are not forgotten (experience replay: Rolnick et al., NeurIPS 2019). What the frozen reference holds is
never trained on.

Letters: N crops, U units (`selection`), C cameras.
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

OVERDRAW = 2.0  # times the median camera: what one busy camera may have of a model's attention
SCENES = 10  # a camera's crops make about as many, so that a fifth of them can be held out


def track_numbers(store: CropStore) -> Ints:
    """Number of each crop's track, 0..T-1; a crop without a track is one of its own: int64 (N,)."""
    numbers = number_tracks(store.cameras, store.tracks)
    alone = numbers == UNKNOWN
    numbers[alone] = numbers.max(initial=UNKNOWN) + 1 + np.arange(alone.sum())
    return numbers


def unit_numbers(store: CropStore, links: Links) -> Ints:
    """Number of each crop's unit, 0..U-1: int64 (N,).

    A camera's tracks, by their begin, fill a scene until nobody of it is in the picture any more, or until there are
    two and a tenth of the camera's crops. Tracks with a link between them are a unit with all these are linked to;
    where that would be more than a tenth of all crops must-links alone tie, and where they do as well, nothing.

    Args:
        store: N crops.
        links: between its rows.
    """
    track = track_numbers(store)
    unit = _scene_numbers(store, track)
    left = np.ones(len(store), bool)
    for ends in (links.rows, links.rows[links.same]):
        if not len(ends):
            continue
        tied = _linked_tracks(track, track[ends])
        size = np.bincount(tied[tied != UNKNOWN], minlength=1)
        fits = left & (tied != UNKNOWN)
        fits[fits] = size[tied[fits]] <= len(store) / SCENES
        unit[fits] = unit.max() + 1 + tied[fits]
        left &= ~fits
    return np.unique(unit, return_inverse=True)[1].astype(np.int64)


def _linked_tracks(track: Ints, ends: Ints) -> Ints:
    """Which tracks hang together by links: a number for each crop of one that has any, else -1: int64 (N,)."""
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
    full = np.ceil(np.bincount(store.cameras) / SCENES)
    scene = np.zeros(count, np.int64)
    number, tracks, held, at, reach = -1, 0, 0, -1, -np.inf
    for one in np.lexsort((end, begin, camera)):
        if camera[one] != at or begin[one] > reach or (held >= full[at] and tracks > 1):
            number, tracks, held, at, reach = number + 1, 0, 0, int(camera[one]), -np.inf
        scene[one] = number
        tracks, held, reach = tracks + 1, held + int(size[one]), max(reach, float(end[one]))
    return scene[track]


def unit_sizes(store: CropStore, unit: Ints) -> Ints:
    """How many crops each unit has at each camera: int64 (U, C)."""
    sizes = np.zeros((int(unit.max(initial=-1)) + 1, len(store.camera_names)), np.int64)
    np.add.at(sizes, (unit, store.cameras), 1)
    return sizes


def balance_cameras(sizes: Ints, order: Sequence[int] | Ints, budget: int) -> NDArray[np.bool_]:
    """Choose units in turns: always the next one of the camera that has fewest crops so far.

    No camera gets more than `OVERDRAW` times what the median camera has to offer, none more than fits into the budget;
    a unit that does not fit is passed over whole.

    Args:
        sizes: int64 (U, C).
        order: units, first come first; of a unit at several cameras the one that sees most of it has the turn.
        budget: most crops chosen.

    Returns:
        bool (U,).
    """
    chosen = np.zeros(len(sizes), bool)
    offered = sizes.sum(0)
    if not offered.any():
        return chosen
    cap = OVERDRAW * np.median(offered[offered > 0])
    queues: defaultdict[int, deque[int]] = defaultdict(deque)
    for unit in order:
        queues[int(sizes[unit].argmax())].append(int(unit))
    taken = np.zeros(sizes.shape[1], np.int64)
    turns = [(0, camera) for camera in sorted(queues)]
    while turns:
        _, camera = heapq.heappop(turns)
        while queues[camera]:
            unit = queues[camera].popleft()
            after = taken + sizes[unit]
            if after.sum() <= budget and (after <= cap)[sizes[unit] > 0].all():
                taken, chosen[unit] = after, True
                heapq.heappush(turns, (int(after[camera]), camera))
                break
    return chosen


def hold_out_units(sizes: Ints, share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Choose units to be judged on: of each camera about a share of its crops, never all.

    Args:
        sizes: int64 (U, C).
        share: of each camera's crops, in [0, 1).
        rng: source of chance.

    Returns:
        bool (U,).
    """
    chosen = np.zeros(len(sizes), bool)
    offered, held = sizes.sum(0), np.zeros(sizes.shape[1])
    for unit in rng.permutation(len(sizes)):
        here = sizes[unit] > 0
        after = held + sizes[unit]
        # a unit is taken where that brings the camera nearer to its share than leaving it would
        if (held + sizes[unit] / 2 <= share * offered)[here].all() and (after < offered)[here].all():
            held, chosen[unit] = after, True
    return chosen


log = logging.getLogger(__name__)

RECORD_FILE = "collected.json"
CollectStatus = Literal["ready", "skipped", "refused"]


@dataclass(frozen=True)
class CollectSettings:
    """Which crops are wanted.

    Attributes:
        since_s: Unix seconds; what was taken later is new.
        min_crops: new ones, fewer are not worth a run.
        max_crops: most in all.
        replay: share of older crops among all, in [0, 1).
        hold_out: share of each camera's new crops that is held out, in [0, 1).
        retention_days: older crops are never taken; None = none is too old.
        seed: of every choice.
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
    """What became of it.

    Attributes:
        outcome: "ready", or "skipped" for too few new crops, or "refused" for unsound ones; then nothing was written.
        reasons: in words, with what was left out.
        until_s: what to ask for since when these crops need not be looked at again.
        crops: new, expired, in_reference, unsound, passed_over (for balance), train, replayed, held_out, links.
        cameras: name -> train, replayed, held_out.
    """

    outcome: CollectStatus
    reasons: tuple[str, ...]
    until_s: float
    crops: Mapping[str, int]
    cameras: Mapping[str, Mapping[str, int]]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"reasons": list(self.reasons)}


def collect(
    source: Path, into: Path, settings: CollectSettings, *, reference: Path | None, now_s: float
) -> CollectResult:
    """Make the store of a run, all or nothing; asked again, the answer is what stands.

    Args:
        source: folder of the site's growing store.
        into: folder to make.
        settings: see `CollectSettings`.
        reference: folder of the judge's frozen crops; tracks that are in it are left to it.
        now_s: Unix seconds.

    Raises:
        SiteError: ``into`` is something else, or was made with other settings.
        StoreError: a store is damaged.
        OSError: the disk refused.
    """
    asked = asdict(settings)
    if into.exists():
        return _existing_result(into, asked)
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
    sound = filter_nights(store.subset(new), times[new], group=settings.min_crops)
    counts["unsound"] = len(new) - int(sound.kept.sum())
    if sound.refused:
        return _finished("refused", sound.reasons, until_s, counts)
    new = new[sound.kept]
    if len(new) < settings.min_crops:
        return _finished("skipped", (*sound.reasons, _too_few(len(new), settings)), until_s, counts)
    chosen = _choose(store, times, new, np.flatnonzero(usable & (times <= settings.since_s)), settings)
    counts["passed_over"] = len(new) - int((~chosen.replayed).sum())
    return _write(store, chosen, into, CollectResult("ready", sound.reasons, until_s, counts, {}), asked)


def _existing_result(into: Path, asked: Mapping[str, Any]) -> CollectResult:
    """What an earlier call has made."""
    try:
        record = json.loads((into / RECORD_FILE).read_text())
        told = record["collected"]
        found = CollectResult(**{**told, "reasons": tuple(told["reasons"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SiteError(f"{into} exists and was not collected: name another folder, or remove it") from error
    changed = [f"{name} {record['asked'].get(name)!r}, now {value!r}" for name, value in asked.items()]
    changed = [
        words for words, (name, value) in zip(changed, asked.items(), strict=True) if record["asked"].get(name) != value
    ]
    if changed:
        raise SiteError(f"{into} was collected with other settings ({'; '.join(changed)}): remove it, or take those")
    return found


def _finished(
    outcome: CollectStatus, reasons: str | tuple[str, ...], until_s: float, counts: Mapping[str, int]
) -> CollectResult:
    return CollectResult(outcome, (reasons,) if isinstance(reasons, str) else reasons, until_s, counts, {})


def _too_few(found: int, settings: CollectSettings) -> str:
    return f"{found} new crops are fit to use: expected {settings.min_crops} or more"


def _usable(
    store: CropStore, times: NDArray[np.float64], settings: CollectSettings, reference: Path | None, now_s: float
) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """Crops that may be taken at all: none too old, gone, or of a track the reference has."""
    days = settings.retention_days
    young = np.isfinite(times) & (times >= (-np.inf if days is None else now_s - days * 86_400))
    kept = np.zeros(len(store), bool)
    if reference is not None and is_store(reference):
        paths = {path for part in open_store(reference).values() for path in part.paths}
        track = track_numbers(store)
        kept = np.isin(track, track[[path in paths for path in store.paths]])
    counts = {"expired": int((~young).sum()), "in_reference": int((young & kept).sum())}
    return young & ~kept, counts


@dataclass(frozen=True)
class _Choice:
    """Rows of a run's store, in the order of the source, and what each is there for."""

    rows: Ints
    held_out: NDArray[np.bool_]
    replayed: NDArray[np.bool_]


def _choose(store: CropStore, times: NDArray[np.float64], new: Ints, old: Ints, settings: CollectSettings) -> _Choice:
    """New crops in balance, some held out; then as many older ones as their share allows."""
    rng = np.random.default_rng(settings.seed)
    links = links_of(store)
    if settings.replay and len(old):
        old = old[
            filter_nights(store.subset(old), times[old], group=settings.min_crops, looked_at=RECHECKED_CROPS).kept
        ]
    room = round(settings.max_crops * (1 - settings.replay)) if len(old) else settings.max_crops
    taken, unit, sizes = _balanced(store, new, links, room, rng)
    held = hold_out_units(sizes, settings.hold_out, rng)[unit]
    budget = min(round(len(taken) * settings.replay / (1 - settings.replay)), settings.max_crops - len(taken))
    again, *_ = _balanced(store, old, links, budget, rng)
    rows = np.concatenate([taken, again])
    order = np.argsort(rows)
    is_old = np.arange(len(rows)) >= len(taken)
    return _Choice(rows[order], np.concatenate([held, np.zeros(len(again), bool)])[order], is_old[order])


def _balanced(
    store: CropStore, rows: Ints, links: Links, budget: int, rng: np.random.Generator
) -> tuple[Ints, Ints, Ints]:
    """The rows taken of some, the unit of each, and the sizes of those units: what links name comes first."""
    part = store.subset(rows)
    place = np.full(len(store), -1, np.int64)
    place[rows] = np.arange(len(rows))
    linked, inside = place[links.rows], (place[links.rows] >= 0).all(1)
    unit = unit_numbers(part, Links(linked[inside], links.same[inside]))
    sizes = unit_sizes(part, unit)
    order = rng.permutation(len(sizes))
    tied = np.isin(order, unit[linked[inside]])
    chosen = balance_cameras(sizes, [*order[tied], *order[~tied]], budget)
    numbers = np.cumsum(chosen) - 1
    kept = chosen[unit]
    return rows[kept], numbers[unit[kept]], sizes[chosen]


def _write(
    store: CropStore, choice: _Choice, into: Path, told: CollectResult, asked: Mapping[str, Any]
) -> CollectResult:
    """The run's folder, complete before it has its name."""
    purpose = dict(
        zip((store.paths[row] for row in choice.rows), zip(choice.held_out, choice.replayed, strict=True), strict=True)
    )
    for left in into.parent.glob(f".{into.name}.*"):  # of a call that was killed: it shows people
        shutil.rmtree(left, ignore_errors=True)
    with temporary_folder(into) as folder:
        made = copy_crops(store.subset(choice.rows), folder)
        held, replayed = (np.array([purpose[path][side] for path in made.paths], bool) for side in (0, 1))
        write_store(folder, made, ["gallery" if out else "train" for out in held])
        pairs = [pair for pair in read_links(store.root) if pair.path_a in purpose and pair.path_b in purpose]
        if pairs:
            write_links(folder, pairs)
        kinds = {"train": ~held, "replayed": replayed, "held_out": held}
        counts = {name: int(of.sum()) for name, of in kinds.items()}
        cameras = {
            name: {kind: int((of & (made.cameras == number)).sum()) for kind, of in kinds.items()}
            for number, name in enumerate(made.camera_names)
        }
        found = replace(told, crops={**told.crops, **counts, "links": len(pairs)}, cameras=cameras)
        record = {"asked": asked, "collected": found.to_json()}
        write_atomic(folder / RECORD_FILE, (json.dumps(record, indent=2) + "\n").encode())
        replace_folder(folder, into)
    return found
