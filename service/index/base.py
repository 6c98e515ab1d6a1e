"""What all kinds of index share: the interface, exact re-scoring, reading features, filters, and the index policy.

An index only proposes candidates; each is checked against the store before it is returned. An index may use rounded
features, a graph or another machine, but `best_candidates` and `rescore_candidates` compute the returned similarity
from the float32 features, so that all kinds return bit-identical similarities.

`FeatureReader` reads one collection's features in one space, in chunks. A long read transaction would keep deleted
pages in the write-ahead log, so each chunk is a read of its own. Chunks read at different times are still consistent:
changes since the first one are in the change log and are applied afterwards.

`check_filters` tests at every start whether faiss's indexes apply selectors. Some accept a selector and ignore it: the
classic GPU indexes (issues #3924, #3114) and HNSW without a bounded queue (#5504). Deleted or excluded entries would
then displace valid ones from the result.

`IndexPolicy` decides by size which kind of index a collection gets and when it is rebuilt.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Literal, Protocol, cast

import faiss
import numpy as np
from numpy.typing import NDArray

from resight.arrays import Feature
from resight.errors import CollectionNotFoundError, StartupError, UnavailableError
from resight.service.records import Collection, Filter, Space
from resight.service.settings import Settings
from resight.service.storage import reads
from resight.service.storage.reads import ChangeSet, Keys
from resight.service.storage.store import Store

Candidates = tuple[Keys, NDArray[np.float32]]
"""Keys int64 and cosine similarities float32 for one query, best first, ties in order of key."""

FeatureLookup = Callable[[Keys], tuple[Keys, Feature]]
"""Returns the requested keys that the store still has, ascending, and their stored features, float32 (N, D)."""

SPARE_CANDIDATES = 8  # rows fetched beyond k, so that ties are usually resolved in the first attempt
MAX_FETCH = 4096  # this many rows tied with the last one are copies of one crop; any of them is as good


class VectorIndex(Protocol):
    """A nearest-neighbour index over the features of one collection in one space. Used by one thread at a time.

    Attributes:
        kind: ``flat``, ``flat-fp16``, ``hnsw`` or ``milvus``.
        approximate: a search without ``exact`` may miss neighbours.
        revision: the store's last write that is applied; -1 = none yet.
        tail: number of entries outside the graph, which are scanned.
    """

    kind: str
    approximate: bool
    revision: int

    def __len__(self) -> int:
        """Number of entries that can be found."""
        ...

    @property
    def tail(self) -> int: ...  # noqa: D102  # documented above

    @property
    def tombstones(self) -> int:
        """Number of removed entries that still use memory; they are never found."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        ...

    def add(self, keys: Keys, features: Feature) -> bool:
        """Add features, float32 (N, D) unit rows, in ascending order of keys; keys already present are skipped.

        Returns:
            False when a new key is below the highest present one; nothing was added and the index must be rebuilt.
        """
        ...

    def remove(self, keys: Keys) -> None:
        """Remove entries; unknown keys are no error."""
        ...

    def search(self, queries: Feature, k: int, *, among: Keys | None = None, exact: bool = False) -> list[Candidates]:
        """The k nearest entries of each query.

        Args:
            queries: float32 (Q, D), unit rows.
            k: at least 1.
            among: search only these keys, ascending, and exactly; None = all.
            exact: search exactly, however slow.
        """
        ...

    def vectors(self, keys: Keys) -> tuple[Keys, Feature]:
        """Those of ``keys`` that are present, ascending, and their features, float32 (N, D)."""
        ...


def no_candidates(queries: Feature) -> list[Candidates]:
    """The result of an empty index."""
    return [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in queries]


def best_candidates(query: Feature, keys: Keys, features: Feature, k: int) -> Candidates:
    """The k best candidates, with similarities summed row by row, so that each is independent of the other rows.

    Args:
        query: float32 (D,), unit length.
        keys: of the candidates, ascending.
        features: of the candidates, float32 (N, D), unit rows.
        k: maximum number of results.
    """
    similarities = np.clip((features * query).sum(axis=1), -1.0, 1.0)
    order = np.argsort(-similarities, kind="stable")[:k]
    return keys[order], similarities[order]


def rescore_candidates(queries: Feature, candidates: Sequence[Keys], lookup: FeatureLookup, k: int) -> list[Candidates]:
    """The k best of each query's own candidates, by the features in the store; deleted ones are left out."""
    keys, features = lookup(np.unique(np.concatenate(candidates)))
    if not len(keys):
        return no_candidates(queries)
    found = []
    for query, own in zip(queries, candidates, strict=True):
        own = np.sort(own)
        rows = np.searchsorted(keys, own)
        rows = rows[rows < len(keys)]
        rows = rows[np.isin(keys[rows], own)]
        found.append(best_candidates(query, keys[rows], features[rows], k))
    return found


def merge_candidates(parts: Sequence[list[Candidates]], k: int) -> list[Candidates]:
    """The k best of several results for the same queries over disjoint sets of entries."""
    out = []
    for answers in zip(*parts, strict=True):
        keys = np.concatenate([keys for keys, _ in answers])
        similarities = np.concatenate([similarities for _, similarities in answers])
        order = np.lexsort((keys, -similarities))[:k]
        out.append((keys[order], similarities[order]))
    return out


Parameters = Callable[..., faiss.SearchParameters]


def applies_filter(index: faiss.Index, parameters: Parameters = faiss.SearchParameters) -> bool:
    """Whether an index applies selectors: search for the first of two vectors with a selector that excludes it.

    Args:
        index: empty, trained, of at least 2 dimensions.
        parameters: creates search parameters from ``sel=``.
    """
    rows = np.zeros((2, index.d), np.float32)
    rows[0, 0], rows[1, :2] = 1.0, (0.6, 0.8)
    index.add(rows)
    second = faiss.IDSelectorBitmap(np.array([0b10], np.uint8))  # type: ignore[call-arg,arg-type]  # bit i is row i
    try:
        _, found = index.search(rows[:1], 1, params=parameters(sel=second))
    except RuntimeError:  # the index reports that it does not support selectors
        return False
    return bool(found.tolist() == [[1]])


def check_filters(kinds: Mapping[str, tuple[faiss.Index, Parameters]]) -> None:
    """Check that this build of faiss applies selectors.

    Args:
        kinds: name to an empty index and the factory of its search parameters.

    Raises:
        StartupError: a kind ignores selectors, so deleted entries could displace valid ones from a result.
    """
    failed = [kind for kind, (index, parameters) in kinds.items() if not applies_filter(index, parameters)]
    if failed:
        raise StartupError(
            f"faiss {faiss.__version__} ignores filters in {', '.join(failed)}: install the locked version"
        )


log = logging.getLogger(__name__)

CHUNK_ROWS = 8192  # rows per read: 16 MB at 512-d, 30 ms


@dataclass(frozen=True)
class FeatureReader:
    """Reads one collection's features in one space. Thread-safe: each thread has its own connection."""

    store: Store
    collection: Collection
    space: Space

    @property
    def _connection(self) -> sqlite3.Connection:
        return self.store.reader()

    def revision(self) -> int:
        """The revision of the last committed write.

        Raises:
            CollectionNotFoundError: the collection was deleted.
        """
        reached = reads.revision(self._connection, self.collection.key)
        if reached < 0:
            name = self.collection.name
            raise CollectionNotFoundError(
                f"collection {name} was deleted in the meantime", field="collection_id", collection=name
            )
        return reached

    def count(self) -> int:
        """Number of stored entries, including expired ones."""
        row = self._connection.execute("SELECT count(*) FROM entry WHERE collection = ?", (self.collection.key,))
        return int(row.fetchone()[0])

    def changes(self, since: int) -> ChangeSet:
        """Changes after revision ``since``, which the change log must still cover."""
        return reads.changes_since(self._connection, self.collection.key, self.space, since)

    def chunks(self, stop: Event) -> Iterator[tuple[Keys, Feature]]:
        """All entries in ascending order of keys: keys int64 (N,), features float32 (N, D), N <= `CHUNK_ROWS`.

        Raises:
            UnavailableError: ``stop`` was set.
        """
        after = 0
        while True:
            if stop.is_set():
                raise UnavailableError("the gallery is closing: try again when the server is back")
            rows = self._connection.execute(  # LEFT: entries without a feature must advance the window too
                "SELECT e.key, f.vector, f.crc32 FROM (SELECT key FROM entry WHERE collection = ? AND key > ? "
                "ORDER BY key LIMIT ?) e LEFT JOIN feature f ON f.entry = e.key AND f.space_id = ? ORDER BY e.key",
                (self.collection.key, after, CHUNK_ROWS, self.space.space_id),
            ).fetchall()
            if not rows:
                return
            after = rows[-1][0]
            yield reads.unpack_features([row for row in rows if row[1] is not None], self.space)

    def vectors(self, keys: Keys) -> tuple[Keys, Feature]:
        """A `FeatureLookup`: those of ``keys`` that are still stored, and their features."""
        rows = self._connection.execute(
            "SELECT f.entry, f.vector, f.crc32 FROM json_each(?) j CROSS JOIN feature f ON f.entry = j.value "
            "AND f.space_id = ? ORDER BY f.entry",
            (json.dumps(keys.tolist()), self.space.space_id),
        ).fetchall()
        return reads.unpack_features(rows, self.space)

    def matching_keys(self, filters: Filter, limit: int) -> Keys | None:
        """The keys of unexpired entries that pass a filter, ascending; None when there are more than ``limit``."""
        passing = reads.entry_condition(self.collection.key, filters)
        rows = self._connection.execute(
            f"SELECT e.key FROM entry e WHERE {passing.sql} LIMIT ?", (*passing.values, limit + 1)
        ).fetchall()
        return None if len(rows) > limit else np.sort(np.fromiter((row[0] for row in rows), np.int64, len(rows)))


IndexDevice = Literal["auto", "cpu", "cuda"]


IndexKind = Literal["flat", "flat-fp16", "hnsw"]

MAX_TOMBSTONE_SHARE = 0.2  # of all rows; more deleted nodes cost a graph recall, and waste memory
MIN_TOMBSTONES = 1000  # fewer are not worth a rebuild
SHRUNK_SHARE = 0.5  # hysteresis: a smaller kind only at half the size at which the larger one was chosen
EXACT_CANDIDATES, EXACT_SHARE = 40_000, 0.15  # up to so many are searched exactly (Weaviate's flatSearchCutoff)


@dataclass(frozen=True)
class IndexPolicy:
    """Which index a collection gets. Sizes are numbers of entries.

    Attributes:
        kind: of every collection, or ``auto`` = by size.
        flat_max: largest collection with a float32 scan.
        half_max: largest collection with a float16 scan; larger ones get a graph.
        tail_max: a graph with more entries outside it is rebuilt.
        min_recall: recall at 10 below which a graph is not used.
        sample: one in so many approximate searches is repeated exactly to measure recall; 0 = none.
        folder: where graphs are saved; None = nowhere.
        device: where float16 rows are scanned; ``auto`` = on a GPU if faiss finds one.
        milvus: address of Milvus, which then indexes every collection; empty = faiss.
        token: for Milvus.
    """

    kind: Literal["auto", "flat", "flat-fp16", "hnsw"] = "auto"
    flat_max: int = 100_000
    half_max: int = 1_000_000
    tail_max: int = 50_000
    min_recall: float = 0.95
    sample: int = 1000
    folder: Path | None = None
    device: IndexDevice = "auto"
    milvus: str = ""
    token: str = field(default="", repr=False)

    def kind_for(self, count: int, *, current: str = "", requested: str = "") -> IndexKind:
        """The kind of index for ``count`` entries.

        Args:
            count: entries of the collection.
            current: the present kind, which is kept until the collection has shrunk to `SHRUNK_SHARE` of its limit.
            requested: by an operator for this collection; empty or ``auto`` = by size.
        """
        chosen = requested if requested not in ("", "auto") else self.kind
        if chosen != "auto":
            return cast(IndexKind, chosen)
        if count > self.half_max or (current == "hnsw" and count > SHRUNK_SHARE * self.half_max):
            return "hnsw"
        if count > self.flat_max or (current in ("hnsw", "flat-fp16") and count > SHRUNK_SHARE * self.flat_max):
            return "flat-fp16"
        return "flat"

    def rebuild_reason(self, index: VectorIndex) -> str:
        """Why an index should be rebuilt without a change of kind; empty = it need not."""
        if index.tombstones > max(MIN_TOMBSTONES, MAX_TOMBSTONE_SHARE * (len(index) + index.tombstones)):
            return f"{index.tombstones} tombstones"
        if index.tail > self.tail_max:
            return f"{index.tail} entries beside the graph"
        return ""

    def exact_limit(self, count: int) -> int:
        """Up to how many candidates out of ``count`` entries are searched exactly."""
        return max(EXACT_CANDIDATES, int(EXACT_SHARE * count))


def index_policy(settings: Settings, folder: Path) -> IndexPolicy:
    """The policy from the server's settings; graphs are saved beside the database in ``folder``."""
    return IndexPolicy(
        kind=settings.index_type,
        flat_max=settings.index_flat_max,
        half_max=settings.index_half_max,
        tail_max=settings.index_tail_max,
        sample=settings.index_sample,
        folder=folder,
        device=settings.index_device,
        milvus="" if settings.gallery == "embedded" else settings.gallery,
        token=settings.milvus_token.get_secret_value(),
    )
