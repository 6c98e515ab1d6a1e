"""Search statistics: decisions and best hits per collection, space and minute, and drift of the similarities.

Counts are gathered in memory and written every `FLUSH_S` and at shutdown, so a restart loses nothing and a crash at
most the last minute. Queries, entries and persons are not stored. `write_counts` and `purge_counts` run in a write
transaction; `window_stats` only reads.

Drift compares the cosines of best hits in a window with the first ones of the space, both as histograms of `BINS` equal
bins over -1..1. It is the population stability index over the reference's deciles, ``sum((p - q) ln(p / q))``. By the
usual rule of thumb, below 0.1 means no drift and above 0.25 a change to investigate: another camera, other light, or a
larger gallery.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from resight.arrays import Ints
from resight.errors import ReIDError
from resight.service.records import Collection, now_us
from resight.service.search.ranking import RankedResult
from resight.service.storage.store import Store

BINS = 64
QUANTILES = 10
MIN_COUNT = 0.5  # searches assumed in an empty decile, as the index would be infinite with 0


def bin_of(cosine: float) -> int:
    """The bin of a cosine, -1..1."""
    return min(BINS - 1, max(0, int((cosine + 1.0) * (BINS / 2))))


def stability_index(reference: Ints, now: Ints) -> float:
    """The population stability index, >= 0, of two non-empty histograms."""
    upto = np.cumsum(reference) / reference.sum()
    middle = upto - reference / (2.0 * reference.sum())  # of each bin, as a share of the reference
    parts = np.minimum(QUANTILES - 1, (QUANTILES * middle).astype(np.int64))
    shares = []
    for counts in (reference, now):
        of_part = np.bincount(parts, counts, QUANTILES)[np.unique(parts)]
        counted = np.maximum(of_part, MIN_COUNT)
        shares.append(counted / counted.sum())
    before, after = shares
    return float(((after - before) * np.log(after / before)).sum())


MINUTE_US = 60_000_000
KEPT_S = 30 * 86_400  # promoted models are monitored for days
REFERENCE_HITS = 1000  # best hits, 100 per decile: sampling noise alone gives an index of about 0.02
RECENT_HITS = 1000  # newest best hits, which metrics compare with the reference
MIN_HITS = 100  # best hits on both sides, a tenth of the reference; with fewer the index is mostly noise

SpaceKey = tuple[int, str]
"""A collection's key and a space id."""
TimeWindow = tuple[int | None, int | None]
"""Begin and end in microseconds, widened to whole minutes; None = unbounded."""
_SUMS = ("searches", "matches", "uncertain", "unknown", "hits", "probable", "cosine_sum", "probability_sum")
_COLUMNS = ", ".join((*_SUMS, "first_us", "last_us", "bins"))


@dataclass
class SearchCounts:
    """Counts and sums over searches in one space.

    Attributes:
        matches: searches decided as match, like ``uncertain`` and ``unknown``; all 0 without a calibration.
        hits: searches with at least one hit, whose best is in ``cosine_sum`` and ``bins``.
        probable: those of ``hits`` with a probability, which is in ``probability_sum``.
        first_us: time of the first search, like ``last_us`` of the last.
    """

    searches: int = 0
    matches: int = 0
    uncertain: int = 0
    unknown: int = 0
    hits: int = 0
    probable: int = 0
    cosine_sum: float = 0.0
    probability_sum: float = 0.0
    first_us: int = 0
    last_us: int = 0
    bins: Ints = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def add(self, result: RankedResult, at_us: int) -> None:
        """Count one search."""
        self.searches += 1
        self.matches += result.decision == "match"
        self.uncertain += result.decision == "uncertain"
        self.unknown += result.decision == "unknown"
        self.first_us, self.last_us = self.first_us or at_us, at_us
        if result.hits:
            best = result.hits[0]
            self.hits += 1
            self.cosine_sum += best.hit.similarity
            self.bins[bin_of(best.hit.similarity)] += 1
            if best.probability is not None:
                self.probable += 1
                self.probability_sum += best.probability

    def __add__(self, later: SearchCounts) -> SearchCounts:
        """The sum of two counts, neither of which is empty."""
        sums = {name: getattr(self, name) + getattr(later, name) for name in (*_SUMS, "bins")}
        return SearchCounts(
            **sums, first_us=min(self.first_us, later.first_us), last_us=max(self.last_us, later.last_us)
        )

    @property
    def row(self) -> tuple[object, ...]:
        """The values of `_COLUMNS`."""
        return *(getattr(self, name) for name in (*_SUMS, "first_us", "last_us")), self.bins.astype("<u4").tobytes()

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> SearchCounts:
        """From values of `_COLUMNS`; ``bins`` may be several concatenated histograms."""
        *sums, first_us, last_us, bins = row
        return cls(**dict(zip(_SUMS, sums, strict=True)), first_us=first_us, last_us=last_us, bins=_sum_bins(bins))


@dataclass(frozen=True)
class ReferenceCounts:
    """The reference of the drift: number of best hits, sum of their cosines, minute of the last, and histogram."""

    hits: int = 0
    cosine_sum: float = 0.0
    minute: int = 0
    bins: Ints = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def drift_of(self, now: SearchCounts) -> tuple[float, float] | None:
        """Stability index and shift of the mean cosine; None with fewer than `MIN_HITS` on either side."""
        if min(self.hits, now.hits) < MIN_HITS:
            return None
        shift = now.cosine_sum / now.hits - self.cosine_sum / self.hits
        return stability_index(self.bins, now.bins), shift


@dataclass(frozen=True)
class WindowStats:
    """The searches of a window in one space, and the reference they are compared with."""

    space_id: str
    model_id: str
    counts: SearchCounts
    reference: ReferenceCounts


def purge_counts(connection: sqlite3.Connection) -> int:
    """Delete minutes older than `KEPT_S`; returns how many."""
    before = (now_us() - KEPT_S * 1_000_000) // MINUTE_US
    return connection.execute("DELETE FROM search_minute WHERE minute < ?", (before,)).rowcount


def _minutes(start_us: int | None, end_us: int | None) -> tuple[int, int]:
    """The first minute of a window and the one after its last."""
    return (start_us or 0) // MINUTE_US, (1 << 62) if end_us is None else -(-end_us // MINUTE_US)


def write_counts(
    connection: sqlite3.Connection, minutes: dict[tuple[SpaceKey, int], SearchCounts]
) -> dict[SpaceKey, tuple[float, float]]:
    """Add minutes to the stored ones; returns the drift of their spaces."""
    space_keys = sorted({space_key for space_key, _ in minutes})
    collections = {key for (key,) in connection.execute("SELECT key FROM collection").fetchall()}
    for ((key, space_id), minute), counts in sorted(minutes.items(), key=lambda one: one[0]):
        if key not in collections:  # deleted meanwhile
            continue
        where = (key, space_id, minute)
        stored = connection.execute(
            f"SELECT {_COLUMNS} FROM search_minute WHERE collection = ? AND space_id = ? AND minute = ?", where
        ).fetchone()
        total = counts if stored is None else SearchCounts.from_row(stored) + counts
        placeholders = ", ".join("?" * (len(where) + len(total.row)))
        connection.execute(f"INSERT OR REPLACE INTO search_minute VALUES ({placeholders})", (*where, *total.row))
        _extend_reference(connection, where, counts)
    drifts = {space_key: _drift(connection, space_key) for space_key in space_keys}
    return {space_key: drift for space_key, drift in drifts.items() if drift is not None}


def _extend_reference(connection: sqlite3.Connection, where: tuple[int, str, int], counts: SearchCounts) -> None:
    """Add best hits to the reference until it has `REFERENCE_HITS`; the minute that fills it is added completely."""
    key, space_id, minute = where
    stored = _read_reference(connection, (key, space_id))
    if stored.hits < REFERENCE_HITS and counts.hits:
        bins = (stored.bins + counts.bins).astype("<u4").tobytes()
        sums = (stored.hits + counts.hits, stored.cosine_sum + counts.cosine_sum)
        connection.execute(
            "INSERT OR REPLACE INTO search_reference VALUES (?, ?, ?, ?, ?, ?)", (key, space_id, *sums, minute, bins)
        )


def _read_reference(connection: sqlite3.Connection, space_key: SpaceKey) -> ReferenceCounts:
    row = connection.execute(
        "SELECT hits, cosine_sum, minute, bins FROM search_reference WHERE collection = ? AND space_id = ?", space_key
    ).fetchone()
    return ReferenceCounts() if row is None else ReferenceCounts(row[0], row[1], row[2], _sum_bins(row[3]))


def _drift(connection: sqlite3.Connection, space_key: SpaceKey) -> tuple[float, float] | None:
    """Drift of the newest `RECENT_HITS` best hits, in whole minutes, after the reference was complete."""
    reference = _read_reference(connection, space_key)
    if reference.hits < REFERENCE_HITS:
        return None
    recent = SearchCounts()
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM search_minute WHERE collection = ? AND space_id = ? AND minute > ? "
        "ORDER BY minute DESC LIMIT ?",
        (*space_key, reference.minute, RECENT_HITS),
    )
    for row in rows.fetchall():
        if recent.hits < RECENT_HITS:
            recent = recent + SearchCounts.from_row(row)
    return reference.drift_of(recent)


def window_stats(
    connection: sqlite3.Connection,
    key: int,
    window: TimeWindow,
    space_id: str,
    reference: TimeWindow | None,
) -> list[WindowStats]:
    """Statistics of a window for each space; see `StatisticsRecorder.window_stats`."""
    others = {} if reference is None else dict(_window(connection, key, _minutes(*reference), space_id))
    result = []
    for of_space, counts in _window(connection, key, _minutes(*window), space_id):
        if reference is None:
            compared = _read_reference(connection, (key, of_space))
        else:
            other = others.get(of_space, SearchCounts())
            compared = ReferenceCounts(other.hits, other.cosine_sum, bins=other.bins)
        (model_id,) = connection.execute("SELECT model_id FROM space WHERE space_id = ?", (of_space,)).fetchone()
        result.append(WindowStats(of_space, model_id, counts, compared))
    return result


def _window(
    connection: sqlite3.Connection, key: int, minutes: tuple[int, int], space_id: str
) -> list[tuple[str, SearchCounts]]:
    """The minutes of a window, summed for each space."""
    sums = ", ".join(f"sum({name})" for name in _SUMS)
    where = "collection = ? AND minute >= ? AND minute < ? AND (?4 = '' OR space_id = ?4)"
    rows = connection.execute(
        f"SELECT space_id, {sums}, min(first_us), max(last_us), x'' FROM search_minute WHERE {where} "
        "GROUP BY space_id ORDER BY min(first_us)",
        (key, *minutes, space_id),
    ).fetchall()
    histograms: dict[str, list[bytes]] = {}
    for of_space, bins in connection.execute(
        f"SELECT space_id, bins FROM search_minute WHERE {where}", (key, *minutes, space_id)
    ).fetchall():
        histograms.setdefault(of_space, []).append(bins)
    return [(row[0], SearchCounts.from_row((*row[1:-1], b"".join(histograms[row[0]])))) for row in rows]


def _sum_bins(bins: bytes) -> Ints:
    total: Ints = np.frombuffer(bins, "<u4").reshape(-1, BINS).sum(axis=0, dtype=np.int64)
    return total


log = logging.getLogger(__name__)

FLUSH_S = 60.0
MAX_WAITING = 10_000  # minutes kept in memory while writes fail: a week of one collection, 10 MB


class StatisticsRecorder:
    """Search statistics of one gallery. Use, `start` and `stop` it in the event loop's thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: dict[tuple[SpaceKey, int], SearchCounts] = {}
        self._drifts: dict[SpaceKey, tuple[float, float]] = {}
        self._lock = asyncio.Lock()
        self._flushing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start to write the counts periodically."""
        self._flushing = asyncio.create_task(self._flush_forever(), name="search-statistics")

    async def stop(self) -> None:
        """Write the counts; the store must still be open."""
        if self._flushing is not None:
            self._flushing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._flushing
        await self.flush()

    def record(self, collection: Collection, results: Sequence[RankedResult]) -> None:
        """Count searches of a collection that have just finished."""
        at_us = now_us()
        key = (collection.key, collection.space.space_id), at_us // MINUTE_US
        counts = self._waiting.setdefault(key, SearchCounts())
        for result in results:
            counts.add(result, at_us)

    def drift(self, collection: Collection) -> tuple[float, float] | None:
        """Stability index and shift of recent best hits in the collection's space at the last flush; see `_drift`."""
        return self._drifts.get((collection.key, collection.space.space_id))

    async def flush(self) -> None:
        """Write the counts; if that fails, they are kept for the next flush. Cancelling the caller does not stop it."""
        await asyncio.shield(self._flush())

    async def _flush(self) -> None:
        async with self._lock:
            minutes, self._waiting = self._waiting, {}
            if minutes:
                await self._write(minutes)

    async def _write(self, minutes: dict[tuple[SpaceKey, int], SearchCounts]) -> None:
        try:
            self._drifts |= await self._store.write_unchecked(write_counts, minutes)
        except ReIDError as error:
            log.error("search statistics of %d minutes not written, will retry: %s", len(minutes), error)
            for key, later in self._waiting.items():
                minutes[key] = minutes[key] + later if key in minutes else later
            self._waiting = dict(list(minutes.items())[-MAX_WAITING:])

    async def window_stats(
        self,
        collection: Collection,
        *,
        window: TimeWindow = (None, None),
        space_id: str = "",
        reference: TimeWindow | None = None,
    ) -> list[WindowStats]:
        """Statistics of a collection's searches for each space, in the order of their first search.

        Args:
            collection: the collection.
            window: begin and end in microseconds, widened to whole minutes.
            space_id: only this space; empty = all.
            reference: window to compare with; None = the first best hits of the space.
        """
        await self.flush()
        return await self._store.read(window_stats, collection.key, window, space_id, reference)

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            await self.flush()
