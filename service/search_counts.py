"""Counts of searches by the minute, and what they are compared with: values, and functions of a connection.

`written` belongs into the writer's transaction, as `purge`; `told` reads.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from resight.service.drift import BINS, Counts, bin_of, stability
from resight.service.entries import now_us
from resight.service.ranked import RankedAnswer

MINUTE_US = 60_000_000
KEPT_S = 30 * 86_400  # a promotion is watched for days
REFERENCE = 1000  # best hits; 100 in each decile, so that chance alone gives an index of some 0.02
LATE = 1000  # best hits that metrics compare with them
ENOUGH = 100  # best hits on either side, a tenth of the reference; below it the index is mostly chance

Place = tuple[int, str]
"""A collection's key and a space id."""
Window = tuple[int | None, int | None]
"""Begin and end in microseconds, widened to whole minutes; None = without."""
_SUMS = ("searches", "matches", "uncertain", "unknown", "hits", "probable", "cosine_sum", "probability_sum")
_COLUMNS = ", ".join((*_SUMS, "first_us", "last_us", "bins"))


@dataclass
class Counted:
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
    bins: Counts = field(default_factory=lambda: np.zeros(BINS, np.int64))

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

    def __add__(self, later: Counted) -> Counted:
        """Both, where neither is empty."""
        sums = {name: getattr(self, name) + getattr(later, name) for name in (*_SUMS, "bins")}
        return Counted(**sums, first_us=min(self.first_us, later.first_us), last_us=max(self.last_us, later.last_us))

    @property
    def row(self) -> tuple[object, ...]:
        """As `_COLUMNS`."""
        return *(getattr(self, name) for name in (*_SUMS, "first_us", "last_us")), self.bins.astype("<u4").tobytes()

    @classmethod
    def of_row(cls, row: Sequence[Any]) -> Counted:
        """From `_COLUMNS`; ``bins`` may hold many histograms, one after the other."""
        *sums, first_us, last_us, bins = row
        return cls(**dict(zip(_SUMS, sums, strict=True)), first_us=first_us, last_us=last_us, bins=_summed(bins))


@dataclass(frozen=True)
class Reference:
    """Best hits that others are compared with: number, sum of cosines, the last one's minute, and the bins."""

    hits: int = 0
    cosine_sum: float = 0.0
    minute: int = 0
    bins: Counts = field(default_factory=lambda: np.zeros(BINS, np.int64))

    def against(self, now: Counted) -> tuple[float, float] | None:
        """The stability index and the shift of the mean cosine; None before there is `ENOUGH` on both sides."""
        if min(self.hits, now.hits) < ENOUGH:
            return None
        shift = now.cosine_sum / now.hits - self.cosine_sum / self.hits
        return stability(self.bins, now.bins), shift


@dataclass(frozen=True)
class Told:
    """What a window's searches in one space came to, and what they are compared with."""

    space_id: str
    model_id: str
    counted: Counted
    reference: Reference


def purge(connection: sqlite3.Connection) -> int:
    """Remove minutes older than `KEPT_S`; returns how many."""
    before = (now_us() - KEPT_S * 1_000_000) // MINUTE_US
    return connection.execute("DELETE FROM search_minute WHERE minute < ?", (before,)).rowcount


def _minutes(start_us: int | None, end_us: int | None) -> tuple[int, int]:
    """The first minute of a window and the one after its last."""
    return (start_us or 0) // MINUTE_US, (1 << 62) if end_us is None else -(-end_us // MINUTE_US)


def written(
    connection: sqlite3.Connection, taken: dict[tuple[Place, int], Counted]
) -> dict[Place, tuple[float, float]]:
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
        whole = counted if held is None else Counted.of_row(held) + counted
        marks = ", ".join("?" * (len(where) + len(whole.row)))
        connection.execute(f"INSERT OR REPLACE INTO search_minute VALUES ({marks})", (*where, *whole.row))
        _refer(connection, where, counted)
    drifts = {place: _drift(connection, place) for place in places}
    return {place: drift for place, drift in drifts.items() if drift is not None}


def _refer(connection: sqlite3.Connection, where: tuple[int, str, int], counted: Counted) -> None:
    """Add best hits to the reference until it is full; the minute that fills it counts whole."""
    key, space_id, minute = where
    held = _reference(connection, (key, space_id))
    if held.hits < REFERENCE and counted.hits:
        bins = (held.bins + counted.bins).astype("<u4").tobytes()
        sums = (held.hits + counted.hits, held.cosine_sum + counted.cosine_sum)
        connection.execute(
            "INSERT OR REPLACE INTO search_reference VALUES (?, ?, ?, ?, ?, ?)", (key, space_id, *sums, minute, bins)
        )


def _reference(connection: sqlite3.Connection, place: Place) -> Reference:
    row = connection.execute(
        "SELECT hits, cosine_sum, minute, bins FROM search_reference WHERE collection = ? AND space_id = ?", place
    ).fetchone()
    return Reference() if row is None else Reference(row[0], row[1], row[2], _summed(row[3]))


def _drift(connection: sqlite3.Connection, place: Place) -> tuple[float, float] | None:
    """Of the newest `LATE` best hits that came after the reference was full, to the minute."""
    reference = _reference(connection, place)
    if reference.hits < REFERENCE:
        return None
    late = Counted()
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM search_minute WHERE collection = ? AND space_id = ? AND minute > ? "
        "ORDER BY minute DESC LIMIT ?",
        (*place, reference.minute, LATE),
    )
    for row in rows.fetchall():
        if late.hits < LATE:
            late = late + Counted.of_row(row)
    return reference.against(late)


def told(
    connection: sqlite3.Connection,
    key: int,
    window: Window,
    space_id: str,
    reference: Window | None,
) -> list[Told]:
    """What a window's searches came to in each space, by the first one."""
    others = {} if reference is None else dict(_window(connection, key, _minutes(*reference), space_id))
    out = []
    for of_space, counted in _window(connection, key, _minutes(*window), space_id):
        if reference is None:
            compared = _reference(connection, (key, of_space))
        else:
            other = others.get(of_space, Counted())
            compared = Reference(other.hits, other.cosine_sum, bins=other.bins)
        (model_id,) = connection.execute("SELECT model_id FROM space WHERE space_id = ?", (of_space,)).fetchone()
        out.append(Told(of_space, model_id, counted, compared))
    return out


def _window(
    connection: sqlite3.Connection, key: int, minutes: tuple[int, int], space_id: str
) -> list[tuple[str, Counted]]:
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
    return [(row[0], Counted.of_row((*row[1:-1], b"".join(histograms[row[0]])))) for row in rows]


def _summed(bins: bytes) -> Counts:
    total: Counts = np.frombuffer(bins, "<u4").reshape(-1, BINS).sum(axis=0, dtype=np.int64)
    return total
