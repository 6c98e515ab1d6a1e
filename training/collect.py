"""The crops of one cycle: what is new and sound, cameras in balance, with some older ones and some held out.

From the growing store of a site a run gets a store of its own: split "train" to adapt to and split "gallery", whole
tracks held out of it, to be judged on. A share of older crops is replayed, so that looks and cameras that were not
there tonight are not forgotten (experience replay: Rolnick et al., NeurIPS 2019). What the frozen reference holds is
never trained on.

Letters: N crops, U units (`selection`), C cameras.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from resight.atomic import replace_folder, temporary_folder, write_atomic
from resight.errors import SiteError
from resight.training.crops import CropStore, is_store, open_store, write_store
from resight.training.links import Links, links_of, read_links, write_links
from resight.training.neighbours import Ints
from resight.training.purge import taken_s
from resight.training.selection import balance, hold_out, sizes_of, tracks_of, units_of
from resight.training.soundness import LOOKED_AT_AGAIN, sound_crops
from resight.training.transplant import transplant, whole_store

log = logging.getLogger(__name__)

RECORD_FILE = "collected.json"
Result = Literal["ready", "skipped", "refused"]


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
class Collected:
    """What became of it.

    Attributes:
        outcome: "ready", or "skipped" for too few new crops, or "refused" for unsound ones; then nothing was written.
        reasons: in words, with what was left out.
        until_s: what to ask for since when these crops need not be looked at again.
        crops: new, expired, in_reference, unsound, passed_over (for balance), train, replayed, held_out, links.
        cameras: name -> train, replayed, held_out.
    """

    outcome: Result
    reasons: tuple[str, ...]
    until_s: float
    crops: Mapping[str, int]
    cameras: Mapping[str, Mapping[str, int]]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"reasons": list(self.reasons)}


def collect(source: Path, into: Path, settings: CollectSettings, *, reference: Path | None, now_s: float) -> Collected:
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
        return _standing(into, asked)
    if not is_store(source) or not open_store(source):
        return _ended("skipped", f"no crops in {source}: ingest some first", settings.since_s, {"new": 0})
    store = whole_store(source)
    times = taken_s(store)
    usable, counts = _usable(store, times, settings, reference, now_s)
    new = np.flatnonzero(usable & (times > settings.since_s))
    counts["new"] = len(new)
    until_s = float(min(times[new].max(initial=settings.since_s), now_s))
    if len(new) < settings.min_crops:
        return _ended("skipped", _too_few(len(new), settings), until_s, counts)
    sound = sound_crops(store.subset(new), times[new], group=settings.min_crops)
    counts["unsound"] = len(new) - int(sound.kept.sum())
    if sound.refused:
        return _ended("refused", sound.reasons, until_s, counts)
    new = new[sound.kept]
    if len(new) < settings.min_crops:
        return _ended("skipped", (*sound.reasons, _too_few(len(new), settings)), until_s, counts)
    chosen = _choose(store, times, new, np.flatnonzero(usable & (times <= settings.since_s)), settings)
    counts["passed_over"] = len(new) - int((~chosen.replayed).sum())
    return _write(store, chosen, into, Collected("ready", sound.reasons, until_s, counts, {}), asked)


def _standing(into: Path, asked: Mapping[str, Any]) -> Collected:
    """What an earlier call has made."""
    try:
        record = json.loads((into / RECORD_FILE).read_text())
        told = record["collected"]
        found = Collected(**{**told, "reasons": tuple(told["reasons"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SiteError(f"{into} exists and was not collected: name another folder, or remove it") from error
    changed = [f"{name} {record['asked'].get(name)!r}, now {value!r}" for name, value in asked.items()]
    changed = [
        words for words, (name, value) in zip(changed, asked.items(), strict=True) if record["asked"].get(name) != value
    ]
    if changed:
        raise SiteError(f"{into} was collected with other settings ({'; '.join(changed)}): remove it, or take those")
    return found


def _ended(outcome: Result, reasons: str | tuple[str, ...], until_s: float, counts: Mapping[str, int]) -> Collected:
    return Collected(outcome, (reasons,) if isinstance(reasons, str) else reasons, until_s, counts, {})


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
        track = tracks_of(store)
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
        old = old[sound_crops(store.subset(old), times[old], group=settings.min_crops, looked_at=LOOKED_AT_AGAIN).kept]
    room = round(settings.max_crops * (1 - settings.replay)) if len(old) else settings.max_crops
    taken, unit, sizes = _balanced(store, new, links, room, rng)
    held = hold_out(sizes, settings.hold_out, rng)[unit]
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
    unit = units_of(part, Links(linked[inside], links.same[inside]))
    sizes = sizes_of(part, unit)
    order = rng.permutation(len(sizes))
    tied = np.isin(order, unit[linked[inside]])
    chosen = balance(sizes, [*order[tied], *order[~tied]], budget)
    numbers = np.cumsum(chosen) - 1
    kept = chosen[unit]
    return rows[kept], numbers[unit[kept]], sizes[chosen]


def _write(store: CropStore, choice: _Choice, into: Path, told: Collected, asked: Mapping[str, Any]) -> Collected:
    """The run's folder, complete before it has its name."""
    purpose = dict(
        zip((store.paths[row] for row in choice.rows), zip(choice.held_out, choice.replayed, strict=True), strict=True)
    )
    for left in into.parent.glob(f".{into.name}.*"):  # of a call that was killed: it shows people
        shutil.rmtree(left, ignore_errors=True)
    with temporary_folder(into) as folder:
        made = transplant(store.subset(choice.rows), folder)
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
