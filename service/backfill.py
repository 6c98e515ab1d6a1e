"""What a migration reads and writes in the database, and the gate it has to pass. Functions of a connection.

Progress is never counted, only read back: what is missing is what has no feature in the new space.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resight.errors import CropsMissingError
from resight.service import reads, spaces
from resight.service.entries import Collection, Space
from resight.service.rows import add_feature
from resight.service.runtime import Feature

SEEKERS, SOUGHT_AMONG = 500, 4000  # entries whose track is looked for, and among how many: 4 ms of one core at 512-d
MARGIN = 0.05  # two standard errors of a share of about one half among 500


def begin(connection: sqlite3.Connection, name: str, space: Space, *, drop_missing: bool) -> tuple[Collection, int]:
    """Write new entries to a space from now on; returns the collection and how many entries wait for a feature there.

    Raises:
        CollectionNotFoundError: no such collection.
        CropsMissingError: entries have no stored crop to embed, and ``drop_missing`` is not set.
        InputError: it is the space searched now.
    """
    found = reads.collection(connection, name)
    lacking = without_crops(connection, found.key, space.space_id)
    if lacking and not drop_missing:
        raise CropsMissingError(
            f"{lacking} entries of collection {name} have no stored crop, so they cannot be embedded anew: enrol them "
            "in a new collection, or let them be absent from the new space with MISSING_CROP_POLICY_DROP",
            field="missing_crops",
            entries=lacking,
        )
    return spaces.begin(connection, name, space), counts(connection, found.key, space.space_id)[0]


def without_crops(connection: sqlite3.Connection, key: int, space_id: str) -> int:
    """How many entries have neither a feature in a space nor a crop to make it from."""
    row = connection.execute(
        "SELECT count(*) FROM entry e WHERE e.collection = ?1 AND NOT EXISTS (SELECT 1 FROM feature f WHERE "
        "f.entry = e.key AND f.space_id = ?2) AND NOT EXISTS (SELECT 1 FROM crop c WHERE c.entry = e.key)",
        (key, space_id),
    )
    return int(row.fetchone()[0])


def counts(connection: sqlite3.Connection, key: int, space_id: str) -> tuple[int, int]:
    """Entries of a collection, and those that have a feature in a space: read, not remembered."""
    row = connection.execute(
        "SELECT count(*), count(f.entry) FROM entry e LEFT JOIN feature f ON f.entry = e.key AND f.space_id = ?2 "
        "WHERE e.collection = ?1",
        (key, space_id),
    ).fetchone()
    return int(row[0]), int(row[1])


def fill(connection: sqlite3.Connection, key: int, space_id: str, made: Sequence[tuple[int, Feature]]) -> bool:
    """Store features of entries that are still there and have none yet; False when the space was dropped meanwhile."""
    there = connection.execute(
        "SELECT 1 FROM collection_space WHERE collection = ? AND space_id = ?", (key, space_id)
    ).fetchone()
    for entry, feature in made if there else ():
        wanted = connection.execute(
            "SELECT NOT EXISTS (SELECT 1 FROM feature WHERE entry = ?1 AND space_id = ?3) FROM entry WHERE key = ?1 "
            "AND collection = ?2",
            (entry, key, space_id),
        ).fetchone()
        if wanted is not None and wanted[0]:
            add_feature(connection, entry, space_id, feature)
    return there is not None


@dataclass(frozen=True)
class Retrieval:
    """How often the nearest other entry is of the same track, in the old space and in the new one; 0..1.

    Attributes:
        by: ``track`` or ``subject``; empty = no two entries share one, and nothing can be judged.
        searched: entries looked from.
    """

    by: str
    searched: int
    before: float
    after: float

    @property
    def passed(self) -> bool:
        """The new space is not worse by more than chance."""
        return self.after >= self.before - MARGIN


def retrieval(connection: sqlite3.Connection, key: int, old: Space, new: Space) -> Retrieval:
    """Look for tracks, or where there are none for subjects, among a collection's own entries in both spaces."""
    for by in ("track", "subject"):
        rows = connection.execute(
            f"SELECT e.key, e.{by}_id FROM entry e JOIN feature f ON f.entry = e.key AND f.space_id = ?2 "
            f"WHERE e.collection = ?1 AND e.{by}_id IN (SELECT {by}_id FROM entry WHERE collection = ?1 AND "
            f"{by}_id <> '' GROUP BY {by}_id HAVING count(*) > 1) ORDER BY e.{by}_id, e.key LIMIT ?3",
            (key, new.space_id, SOUGHT_AMONG),
        ).fetchall()
        if rows:
            keys = np.array([row[0] for row in rows])
            _, names = np.unique([row[1] for row in rows], return_inverse=True)
            seekers = np.sort(np.random.default_rng(0).permutation(len(keys))[:SEEKERS])
            before, after = (_found(connection, space, keys, names, seekers) for space in (old, new))
            return Retrieval(by, len(seekers), before, after)
    return Retrieval("", 0, 0.0, 0.0)


def _found(
    connection: sqlite3.Connection, space: Space, keys: reads.Keys, names: reads.Keys, seekers: reads.Keys
) -> float:
    """The share of ``seekers``, rows of ``keys``, whose nearest other row has the same name."""
    rows = []
    for key in keys.tolist():
        rows += connection.execute(
            "SELECT entry, vector, crc32 FROM feature WHERE entry = ? AND space_id = ?", (key, space.space_id)
        ).fetchall()
    held, features = reads.unpacked(rows, space)
    place = {int(key): row for row, key in enumerate(held)}
    own = np.array([place.get(int(key), -1) for key in keys])
    of = np.full(len(held), -1)
    of[own[own >= 0]] = names[own >= 0]
    looking = seekers[own[seekers] >= 0]
    if len(held) < 2 or not len(looking):
        return 0.0
    similarity = features[own[looking]] @ features.T
    similarity[np.arange(len(looking)), own[looking]] = -2.0
    return float((of[similarity.argmax(axis=1)] == names[looking]).mean())
