"""What a searcher needs of an index: it names candidates, and the store has the last word on each.

An index may hold rounded features, walk a graph or live on another machine; the similarity that is
answered is always computed here, from the float32 feature in the store, so all kinds agree to the bit.

Does an index leave out what a filter excludes? Two vectors tell, at every start, for every kind.

Some of faiss's indexes take a selector and do not look at it: the classic ones on the GPU (issues #3924, #3114) and
HNSW without a bounded queue (#5504). A deleted or foreign entry would then push the wanted ones out of the answer.

What indexes read of the database: one collection's features in one space, in pieces.

A long read would keep deleted pages in the log, so each piece is a read of its own. Pieces of different
instants still make a whole: what changed since the first one stands in the change log, and is replayed.

Which index a collection gets, by its size, and when it is built anew.
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
"""Keys int64 and cosine similarities float32 of one query, best first, equal ones by key."""

FeatureLookup = Callable[[Keys], tuple[Keys, Feature]]
"""The stored features, float32 (N, D), of those of the asked keys that the store still holds; ascending."""

SPARE_CANDIDATES = 8  # rows fetched beyond k, to settle ties in the first try
MAX_FETCH = 4096  # so many rows as near as the last one are copies of one crop; any of them will do


class VectorIndex(Protocol):
    """Features of one collection in one space, found by nearness. One thread uses it at a time.

    Attributes:
        kind: ``flat``, ``flat-fp16``, ``hnsw`` or ``milvus``.
        approximate: a search that is not told to be exact may miss some.
        revision: the last write of the store it has taken in; -1 = none yet.
        tail: entries searched one by one beside a graph.
    """

    kind: str
    approximate: bool
    revision: int

    def __len__(self) -> int:
        """Entries that can be found."""
        ...

    @property
    def tail(self) -> int: ...  # noqa: D102  # told above

    @property
    def tombstones(self) -> int:
        """Removed entries that still take room, never found."""
        ...

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        ...

    def add(self, keys: Keys, features: Feature) -> bool:
        """Take in features, float32 (N, D) unit rows, in ascending order of keys; those held are left alone.

        Returns:
            False when a key came that is lower than one held, and nothing was added: build it anew.
        """
        ...

    def remove(self, keys: Keys) -> None:
        """Take entries out; keys not held are no error."""
        ...

    def search(self, queries: Feature, k: int, *, among: Keys | None = None, exact: bool = False) -> list[Candidates]:
        """The k nearest of each query.

        Args:
            queries: float32 (Q, D), unit rows.
            k: at least 1.
            among: only these keys, ascending, and then exactly; None = all.
            exact: miss none, whatever it takes.
        """
        ...

    def vectors(self, keys: Keys) -> tuple[Keys, Feature]:
        """Features, float32 (N, D), of those of ``keys`` still held; ascending."""
        ...


def no_candidates(queries: Feature) -> list[Candidates]:
    """The answer of an empty index."""
    return [(np.empty(0, np.int64), np.empty(0, np.float32)) for _ in queries]


def best_candidates(query: Feature, keys: Keys, features: Feature, k: int) -> Candidates:
    """The k best of some candidates by a similarity summed row by row, which does not depend on its neighbours.

    Args:
        query: float32 (D,), unit length.
        keys: of the candidates, ascending.
        features: of the candidates, float32 (N, D), unit rows.
        k: at most so many are returned.
    """
    similarities = np.clip((features * query).sum(axis=1), -1.0, 1.0)
    order = np.argsort(-similarities, kind="stable")[:k]
    return keys[order], similarities[order]


def rescore_candidates(queries: Feature, candidates: Sequence[Keys], truth: FeatureLookup, k: int) -> list[Candidates]:
    """The k best of each query's own candidates, by the features in the store; those it lost are left out."""
    wanted = np.unique(np.concatenate(candidates))
    keys, features = truth(wanted)
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
    """The k best of answers to the same queries over disjoint sets of entries."""
    out = []
    for answers in zip(*parts, strict=True):
        keys = np.concatenate([keys for keys, _ in answers])
        similarities = np.concatenate([similarities for _, similarities in answers])
        order = np.lexsort((keys, -similarities))[:k]
        out.append((keys[order], similarities[order]))
    return out


Parameters = Callable[..., faiss.SearchParameters]


def applies_filter(index: faiss.Index, parameters: Parameters = faiss.SearchParameters) -> bool:
    """Put two vectors into an empty index, search for the first and exclude it: is the second found?

    Args:
        index: empty, trained, of at least 2 dimensions.
        parameters: makes search parameters of ``sel=``.
    """
    rows = np.zeros((2, index.d), np.float32)
    rows[0, 0], rows[1, :2] = 1.0, (0.6, 0.8)
    index.add(rows)
    second = faiss.IDSelectorBitmap(np.array([0b10], np.uint8))  # type: ignore[call-arg,arg-type]  # bit i is row i
    try:
        _, found = index.search(rows[:1], 1, params=parameters(sel=second))
    except RuntimeError:  # it says that it cannot, which is as good as not obeying
        return False
    return bool(found.tolist() == [[1]])


def check_filters(kinds: Mapping[str, tuple[faiss.Index, Parameters]]) -> None:
    """Hold this faiss to its filters.

    Args:
        kinds: empty indexes, and what makes their search parameters, by name.

    Raises:
        StartupError: a deleted entry could push a living one out of an answer.
    """
    failed = [kind for kind, (index, parameters) in kinds.items() if not applies_filter(index, parameters)]
    if failed:
        raise StartupError(
            f"faiss {faiss.__version__} does not look at filters in {', '.join(failed)}: install the locked version"
        )


log = logging.getLogger(__name__)

CHUNK_ROWS = 8192  # rows of one read: 16 MB at 512-d, 30 ms


@dataclass(frozen=True)
class FeatureReader:
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

    def changes(self, since: int) -> ChangeSet:
        """What came and went after a revision that the change log still reaches back to."""
        return reads.changes_since(self._connection, self.collection.key, self.space, since)

    def pieces(self, stop: Event) -> Iterator[tuple[Keys, Feature]]:
        """All entries in ascending order of keys: keys int64 (N,), features float32 (N, D), N <= `CHUNK_ROWS`.

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
                (self.collection.key, after, CHUNK_ROWS, self.space.space_id),
            ).fetchall()
            if not rows:
                return
            after = rows[-1][0]
            yield reads.unpack_features([row for row in rows if row[1] is not None], self.space)

    def vectors(self, keys: Keys) -> tuple[Keys, Feature]:
        """`resight.service.index.base.FeatureLookup`: the stored features of those of ``keys`` that are still there."""
        rows = self._connection.execute(
            "SELECT f.entry, f.vector, f.crc32 FROM json_each(?) j CROSS JOIN feature f ON f.entry = j.value "
            "AND f.space_id = ? ORDER BY f.entry",
            (json.dumps(keys.tolist()), self.space.space_id),
        ).fetchall()
        return reads.unpack_features(rows, self.space)

    def passing(self, filters: Filter, limit: int) -> Keys | None:
        """The keys of living entries that pass a filter, ascending; None when more than ``limit`` do."""
        passing = reads.entry_condition(self.collection.key, filters)
        rows = self._connection.execute(
            f"SELECT e.key FROM entry e WHERE {passing.sql} LIMIT ?", (*passing.values, limit + 1)
        ).fetchall()
        return None if len(rows) > limit else np.sort(np.fromiter((row[0] for row in rows), np.int64, len(rows)))


IndexDevice = Literal["auto", "cpu", "cuda"]


IndexKind = Literal["flat", "flat-fp16", "hnsw"]

MAX_TOMBSTONE_SHARE = 0.2  # of all rows; a graph full of holes loses recall, and memory is wasted
MIN_TOMBSTONES = 1000  # fewer are not worth a rebuild
SHRUNK_SHARE = 0.5  # a collection goes down the ladder at half the size at which it came up, so it does not swing
EXACT_CANDIDATES, EXACT_SHARE = 40_000, 0.15  # so few are searched exactly (Weaviate's flatSearchCutoff)


@dataclass(frozen=True)
class IndexPolicy:
    """The rules. Sizes are entries.

    Attributes:
        kind: what every collection gets, or ``auto`` by size.
        flat_max: up to here float32 rows are scanned.
        half_max: up to here float16 rows are scanned; above, a graph is walked.
        tail_max: a graph with so many entries beside it is built anew.
        min_recall: at 10, below which a graph does not go live.
        sample: one in so many approximate searches is repeated exactly.
        folder: where graphs are kept; None = nowhere.
        device: where float16 rows are scanned; ``auto`` = on a GPU when faiss sees one.
        milvus: its address, and then every collection is there; empty = indexes are our own.
        token: Milvus asks for.
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

    def wanted(self, count: int, *, held: str = "", asked: str = "") -> IndexKind:
        """The kind for ``count`` entries.

        Args:
            count: of the collection.
            held: what it has, which it keeps while it is not much too large.
            asked: by an operator for this collection; empty or ``auto`` = by the rules.
        """
        chosen = asked if asked not in ("", "auto") else self.kind
        if chosen != "auto":
            return cast(IndexKind, chosen)
        if count > self.half_max or (held == "hnsw" and count > SHRUNK_SHARE * self.half_max):
            return "hnsw"
        if count > self.flat_max or (held in ("hnsw", "flat-fp16") and count > SHRUNK_SHARE * self.flat_max):
            return "flat-fp16"
        return "flat"

    def worn(self, index: VectorIndex) -> str:
        """Why an index should be built anew in its own kind; empty = it is fine."""
        if index.tombstones > max(MIN_TOMBSTONES, MAX_TOMBSTONE_SHARE * (len(index) + index.tombstones)):
            return f"{index.tombstones} tombstones"
        if index.tail > self.tail_max:
            return f"{index.tail} entries beside the graph"
        return ""

    def few(self, count: int) -> int:
        """Of ``count`` entries, so many or fewer candidates are searched exactly."""
        return max(EXACT_CANDIDATES, int(EXACT_SHARE * count))


def index_policy(settings: Settings, folder: Path) -> IndexPolicy:
    """The rules a server was told; graphs are kept beside the database in ``folder``."""
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
