"""Statistics of searches: decisions and best hits of each collection and space by the minute, and their drift.

Gathered in memory and written every `FLUSH_S` and when the server ends, so that a restart loses nothing and a kill at
most the last minute. Nothing of a query, an entry or a person is kept. `write_counts` and `purge_counts` run in the
writer's transaction; `window_stats` reads.

Drift compares the best hits' cosines of one time with the space's first ones, both as histograms of `BINS` equal parts
of -1..1: the population stability index over the reference's deciles, ``sum((p - q) ln(p / q))``. By the index's common
rule, below 0.1 is no drift and above 0.25 deserves a look: another camera, other light, or a gallery that has grown.
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
from resight.service.search.ranking import RankedAnswer
from resight.service.storage.store import Store

BINS = 64
QUANTILES = 10
MIN_COUNT = 0.5  # searches; an empty part counts half a one, or the index would have no end


def bin_of(cosine: float) -> int:
    """The bin of a cosine, -1..1."""
    return min(BINS - 1, max(0, int((cosine + 1.0) * (BINS / 2))))


def stability_index(reference: Ints, now: Ints) -> float:
    """The population stability index, 0 or more, of two histograms that hold something."""
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
KEPT_S = 30 * 86_400  # a promotion is watched for days
REFERENCE_HITS = 1000  # best hits; 100 in each decile, so that chance alone gives an index of some 0.02
RECENT = 1000  # best hits that metrics compare with them
MIN_HITS = 100  # best hits on either side, a tenth of the reference; below it the index is mostly chance

SpaceKey = tuple[int, str]
"""A collection's key and a space id."""
TimeWindow = tuple[int | None, int | None]
"""Begin and end in microseconds, widened to whole minutes; None = without."""
_SUMS = ("searches", "matches", "uncertain", "unknown", "hits", "probable", "cosine_sum", "probability_sum")
_COLUMNS = ", ".join((*_SUMS, "first_us", "last_us", "bins"))


@dataclass
class SearchCounts:
    """What some searches in one space came to.

    Attributes:
        matches: decisions, as ``uncertain`` and ``unknown``; none without a calibration.
        hits: searches with any hit, whose best is counted in ``cosine_sum`` and ``bins``.
        probable: of them those with a probability, in ``probability_sum``.
        first_us: of the searches, as ``last_us``.
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

    def add(self, answer: RankedAnswer, at_us: int) -> None:
        """Count one search."""
        self.searches += 1
        self.matches += answer.decision == "match"
        self.uncertain += answer.decision == "uncertain"
        self.unknown += answer.decision == "unknown"
        self.first_us, self.last_us = self.first_us or at_us, at_us
        if answer.hits:
            best = answer.hits[0]
            self.hits += 1
            self.cosine_sum += best.hit.similarity
            self.bins[bin_of(best.hit.similarity)] += 1
            if best.probability is not None:
                self.probable += 1
                self.probability_sum += best.probability

    def __add__(self, later: SearchCounts) -> SearchCounts:
        """Both, where neither is empty."""
        sums = {name: getattr(self, name) + getattr(later, name) for name in (*_SUMS, "bins")}
        return SearchCounts(
            **sums, first_us=min(self.first_us, later.first_us), last_us=max(self.last_us, later.last_us)
        )

    @property
    def row(self) -> tuple[object, ...]:
        """As `_COLUMNS`."""
        return *(getattr(self, name) for name in (*_SUMS, "first_us", "last_us")), self.bins.astype("<u4").tobytes()

    @classmethod
    def of_row(cls, row: Sequence[Any]) -> SearchCounts:
        """From `_COLUMNS`; ``bins`` may hold many histograms, one after the other."""
        *sums, first_us, last_us, bins = row
        return cls(**dict(zip(_SUMS, sums, strict=True)), first_us=first_us, last_us=last_us, bins=_sum_bins(bins))


@dataclass(frozen=True)
class ReferenceCounts:
    """Best hits that others are compared with: number, sum of cosines, the last one's minute, and the bins."""

    hits: int = 0
    cosine_sum: float = 0.0
    minute: int = 0
    bins: Ints = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def against(self, now: SearchCounts) -> tuple[float, float] | None:
        """The stability index and the shift of the mean cosine; None before there is `MIN_HITS` on both sides."""
        if min(self.hits, now.hits) < MIN_HITS:
            return None
        shift = now.cosine_sum / now.hits - self.cosine_sum / self.hits
        return stability_index(self.bins, now.bins), shift


@dataclass(frozen=True)
class WindowStats:
    """What a window's searches in one space came to, and what they are compared with."""

    space_id: str
    model_id: str
    counted: SearchCounts
    reference: ReferenceCounts


def purge_counts(connection: sqlite3.Connection) -> int:
    """Remove minutes older than `KEPT_S`; returns how many."""
    before = (now_us() - KEPT_S * 1_000_000) // MINUTE_US
    return connection.execute("DELETE FROM search_minute WHERE minute < ?", (before,)).rowcount


def _minutes(start_us: int | None, end_us: int | None) -> tuple[int, int]:
    """The first minute of a window and the one after its last."""
    return (start_us or 0) // MINUTE_US, (1 << 62) if end_us is None else -(-end_us // MINUTE_US)


def write_counts(
    connection: sqlite3.Connection, taken: dict[tuple[SpaceKey, int], SearchCounts]
) -> dict[SpaceKey, tuple[float, float]]:
    """Add minutes to those on the disk; returns the drift of the spaces they are of."""
    places = sorted({place for place, _ in taken})
    living = {key for (key,) in connection.execute("SELECT key FROM collection").fetchall()}
    for ((key, space_id), minute), counted in sorted(taken.items(), key=lambda one: one[0]):
        if key not in living:
            continue
        where = (key, space_id, minute)
        held = connection.execute(
            f"SELECT {_COLUMNS} FROM search_minute WHERE collection = ? AND space_id = ? AND minute = ?", where
        ).fetchone()
        whole = counted if held is None else SearchCounts.of_row(held) + counted
        marks = ", ".join("?" * (len(where) + len(whole.row)))
        connection.execute(f"INSERT OR REPLACE INTO search_minute VALUES ({marks})", (*where, *whole.row))
        _extend_reference(connection, where, counted)
    drifts = {place: _drift(connection, place) for place in places}
    return {place: drift for place, drift in drifts.items() if drift is not None}


def _extend_reference(connection: sqlite3.Connection, where: tuple[int, str, int], counted: SearchCounts) -> None:
    """Add best hits to the reference until it is full; the minute that fills it counts whole."""
    key, space_id, minute = where
    held = _read_reference(connection, (key, space_id))
    if held.hits < REFERENCE_HITS and counted.hits:
        bins = (held.bins + counted.bins).astype("<u4").tobytes()
        sums = (held.hits + counted.hits, held.cosine_sum + counted.cosine_sum)
        connection.execute(
            "INSERT OR REPLACE INTO search_reference VALUES (?, ?, ?, ?, ?, ?)", (key, space_id, *sums, minute, bins)
        )


def _read_reference(connection: sqlite3.Connection, place: SpaceKey) -> ReferenceCounts:
    row = connection.execute(
        "SELECT hits, cosine_sum, minute, bins FROM search_reference WHERE collection = ? AND space_id = ?", place
    ).fetchone()
    return ReferenceCounts() if row is None else ReferenceCounts(row[0], row[1], row[2], _sum_bins(row[3]))


def _drift(connection: sqlite3.Connection, place: SpaceKey) -> tuple[float, float] | None:
    """Of the newest `RECENT` best hits that came after the reference was full, to the minute."""
    reference = _read_reference(connection, place)
    if reference.hits < REFERENCE_HITS:
        return None
    late = SearchCounts()
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM search_minute WHERE collection = ? AND space_id = ? AND minute > ? "
        "ORDER BY minute DESC LIMIT ?",
        (*place, reference.minute, RECENT),
    )
    for row in rows.fetchall():
        if late.hits < RECENT:
            late = late + SearchCounts.of_row(row)
    return reference.against(late)


def window_stats(
    connection: sqlite3.Connection,
    key: int,
    window: TimeWindow,
    space_id: str,
    reference: TimeWindow | None,
) -> list[WindowStats]:
    """What a window's searches came to in each space, by the first one."""
    others = {} if reference is None else dict(_window(connection, key, _minutes(*reference), space_id))
    out = []
    for of_space, counted in _window(connection, key, _minutes(*window), space_id):
        if reference is None:
            compared = _read_reference(connection, (key, of_space))
        else:
            other = others.get(of_space, SearchCounts())
            compared = ReferenceCounts(other.hits, other.cosine_sum, bins=other.bins)
        (model_id,) = connection.execute("SELECT model_id FROM space WHERE space_id = ?", (of_space,)).fetchone()
        out.append(WindowStats(of_space, model_id, counted, compared))
    return out


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
    return [(row[0], SearchCounts.of_row((*row[1:-1], b"".join(histograms[row[0]])))) for row in rows]


def _sum_bins(bins: bytes) -> Ints:
    total: Ints = np.frombuffer(bins, "<u4").reshape(-1, BINS).sum(axis=0, dtype=np.int64)
    return total


log = logging.getLogger(__name__)

FLUSH_S = 60.0
MAX_WAITING = 10_000  # minutes that wait for a disk that takes nothing: a week of one collection, 10 MB


class SearchStatistics:
    """The figures of one gallery. Used in the event loop's thread; `start` and `stop` it there."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._waiting: dict[tuple[SpaceKey, int], SearchCounts] = {}
        self._drifts: dict[SpaceKey, tuple[float, float]] = {}
        self._turn = asyncio.Lock()
        self._flushing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to write what `record` gathers."""
        self._flushing = asyncio.create_task(self._flush_forever(), name="search-figures")

    async def stop(self) -> None:
        """Write what waits; the store must still be open."""
        if self._flushing is not None:
            self._flushing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._flushing
        await self.flush()

    def record(self, collection: Collection, answers: Sequence[RankedAnswer]) -> None:
        """Count searches of a collection that were answered a moment ago."""
        at_us = now_us()
        place = (collection.key, collection.space.space_id), at_us // MINUTE_US
        counted = self._waiting.setdefault(place, SearchCounts())
        for answer in answers:
            counted.add(answer, at_us)

    def drift(self, collection: Collection) -> tuple[float, float] | None:
        """Index and shift of late best hits in the collection's space, as of the last flush; None before `ENOUGH`."""
        return self._drifts.get((collection.key, collection.space.space_id))

    async def flush(self) -> None:
        """Write what waits; if the disk refuses, it goes on waiting. A caller who leaves does not stop it."""
        await asyncio.shield(self._flush())

    async def _flush(self) -> None:
        async with self._turn:
            taken, self._waiting = self._waiting, {}
            if taken:
                await self._write(taken)

    async def _write(self, taken: dict[tuple[SpaceKey, int], SearchCounts]) -> None:
        try:
            self._drifts |= await self._store.write_unchecked(write_counts, taken)
        except ReIDError as error:
            log.error("the figures of %d minutes of searches wait: %s", len(taken), error)
            for place, later in self._waiting.items():
                taken[place] = taken[place] + later if place in taken else later
            self._waiting = dict(list(taken.items())[-MAX_WAITING:])

    async def window_stats(
        self,
        collection: Collection,
        *,
        window: TimeWindow = (None, None),
        space_id: str = "",
        reference: TimeWindow | None = None,
    ) -> list[WindowStats]:
        """What searches of a collection came to in each space, by the first one.

        Args:
            collection: whose.
            window: begin and end, microseconds; widened to whole minutes.
            space_id: of one space; empty = of all.
            reference: another window; None = the space's first best hits.
        """
        await self.flush()
        return await self._store.read(window_stats, collection.key, window, space_id, reference)

    async def _flush_forever(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            await self.flush()
