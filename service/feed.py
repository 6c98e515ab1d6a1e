"""What indexes read of the database: one collection's features in one space, in pieces.

A long read would keep deleted pages in the log, so each piece is a read of its own. Pieces of different
instants still make a whole: what changed since the first one stands in the change log, and is replayed.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Event

import numpy as np

from resight.errors import CollectionNotFoundError, UnavailableError
from resight.service import reads
from resight.service.entries import Collection, Filter, Space
from resight.service.reads import Change, Keys
from resight.service.runtime import Feature
from resight.service.store import Store

log = logging.getLogger(__name__)

PIECE = 8192  # rows of one read: 16 MB at 512-d, 30 ms


@dataclass(frozen=True)
class Feed:
    """One collection's features in one space, read by whatever thread asks."""

    store: Store
    collection: Collection
    space: Space

    @property
    def _connection(self) -> sqlite3.Connection:
        return self.store.reader()

    def revision(self) -> int:
        """The last committed write.

        Raises:
            CollectionNotFoundError: the collection is gone.
        """
        reached = reads.revision(self._connection, self.collection.key)
        if reached < 0:
            name = self.collection.name
            raise CollectionNotFoundError(
                f"collection {name} was deleted meanwhile", field="collection_id", collection=name
            )
        return reached

    def count(self) -> int:
        """Entries stored, living or expired."""
        row = self._connection.execute("SELECT count(*) FROM entry WHERE collection = ?", (self.collection.key,))
        return int(row.fetchone()[0])

    def changes(self, since: int) -> Change:
        """What came and went after a revision that the change log still reaches back to."""
        return reads.changes(self._connection, self.collection.key, self.space, since)

    def pieces(self, stop: Event) -> Iterator[tuple[Keys, Feature]]:
        """Everything, in ascending order of keys: keys int64 (N,), features float32 (N, D) of at most `PIECE` rows.

        Raises:
            UnavailableError: ``stop`` was set.
        """
        after = 0
        while True:
            if stop.is_set():
                raise UnavailableError("the gallery is closing: try again when the server is back")
            rows = self._connection.execute(  # LEFT: an entry without a feature here moves the window on as well
                "SELECT e.key, f.vector, f.crc32 FROM (SELECT key FROM entry WHERE collection = ? AND key > ? "
                "ORDER BY key LIMIT ?) e LEFT JOIN feature f ON f.entry = e.key AND f.space_id = ? ORDER BY e.key",
                (self.collection.key, after, PIECE, self.space.space_id),
            ).fetchall()
            if not rows:
                return
            after = rows[-1][0]
            yield reads.unpacked([row for row in rows if row[1] is not None], self.space)

    def vectors(self, keys: Keys) -> tuple[Keys, Feature]:
        """`resight.service.candidates.Truth`: the stored features of those of ``keys`` that are still there."""
        rows = self._connection.execute(
            "SELECT f.entry, f.vector, f.crc32 FROM json_each(?) j CROSS JOIN feature f ON f.entry = j.value "
            "AND f.space_id = ? ORDER BY f.entry",
            (json.dumps(keys.tolist()), self.space.space_id),
        ).fetchall()
        return reads.unpacked(rows, self.space)

    def passing(self, filters: Filter, limit: int) -> Keys | None:
        """The keys of living entries that pass a filter, ascending; None when more than ``limit`` do."""
        passing = reads.where(self.collection.key, filters)
        rows = self._connection.execute(
            f"SELECT e.key FROM entry e WHERE {passing.sql} LIMIT ?", (*passing.values, limit + 1)
        ).fetchall()
        return None if len(rows) > limit else np.sort(np.fromiter((row[0] for row in rows), np.int64, len(rows)))
