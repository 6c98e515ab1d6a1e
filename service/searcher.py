"""Nearest entries: the indexes follow the store, and every hit is checked against it before it leaves.

One thread owns all indexes, so nothing is locked. A search first takes in what was committed before
it, so a caller always finds what it has enrolled and never what it has deleted.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from resight.errors import CollectionNotFoundError
from resight.service import reads, watch
from resight.service.entries import Collection, Hit, Space
from resight.service.indexes import Indexes
from resight.service.ladder import Ladder
from resight.service.nearest import Answer, Nearest, Query
from resight.service.schema import translated
from resight.service.search_queue import SearchQueue
from resight.service.store import Store
from resight.service.tune import tune

__all__ = ["Found", "IndexStats", "Query", "Searcher"]

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """Hits, best first, equal ones in order of enrolment; and what had been committed when they were found.

    Attributes:
        revision: the last write that was searched.
        search_ns: this query's share of the run it was part of.
        exact: no hit can be missing.
    """

    hits: tuple[Hit, ...]
    revision: int
    search_ns: int
    exact: bool = True


@dataclass(frozen=True)
class IndexStats:
    """How a collection's index stands.

    Attributes:
        index_type: ``flat``, ``flat-fp16``, ``hnsw`` or ``milvus``, with ``-gpu`` where it is scanned there.
        index_bytes: in memory.
        entries: in it; expired ones until the purge.
        tombstones: deleted entries that still take room in it, never answered.
        sampled_recall_at_10: of approximate searches against exact ones; None = none was sampled.
        revision: the last write it has taken in.
        note: why it is not of another kind; empty = it is what it should be.
        building: another one is being built.
    """

    index_type: str
    index_bytes: int
    tombstones: int
    sampled_recall_at_10: float | None
    revision: int
    note: str = ""
    building: bool = False
    entries: int = 0


class _Kind(NamedTuple):
    """What searches must agree on to be run together."""

    key: int
    space_id: str
    with_features: bool
    exact: bool


class _Job(NamedTuple):
    collection: Collection
    query: Query


class Searcher:
    """Searches all collections of a store.

    Args:
        store: the truth.
        ladder: which index a collection gets.
        max_queue: queries that may wait or run at once.
    """

    def __init__(self, store: Store, ladder: Ladder | None = None, *, max_queue: int = 1024) -> None:
        self._store, self._ladder = store, ladder or Ladder()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")
        self._indexes = Indexes(store, self._ladder, self._thread.submit)
        self._following: set[int] = set()
        self._dropped: deque[tuple[Collection, Space | None]] = deque()
        self._queue: SearchQueue[_Kind, _Job, Found] = SearchQueue(self._thread, self._search, most=max_queue)

    async def load(self, dim: int = 0) -> None:
        """Tune the scan to this machine and build the index of every collection from the store.

        Args:
            dim: of the features to come; 0 = not known yet, and then the first search tunes.

        Raises:
            StartupError: this faiss does not look at filters, or the GPU or Milvus that is asked for is not there.
        """
        await self._run(self._indexes.prepare)
        if dim:
            await self._run(tune, dim)
        held = await self._store.read(reads.collections, limit=-1)
        for collection in held:
            started = time.monotonic()
            await self._run(tune, collection.space.dim)  # before someone waits for it
            index = (await self._run(self._indexes.current, collection)).index
            log.info(
                "index loaded collection=%s kind=%s entries=%d seconds=%.2f",
                collection.name,
                index.kind,
                len(index),
                time.monotonic() - started,
            )
        await self._run(self._indexes.sweep)

    @property
    def waiting(self) -> int:
        """Queries that wait or are being searched."""
        return self._queue.taken

    @property
    def erases(self) -> bool:
        """Whether what is deleted leaves no byte in files; Milvus keeps it until it compacts."""
        return not self._ladder.milvus

    def close(self) -> None:
        """End after the running search; an index that is being built is given up."""
        self._indexes.close()
        self._thread.shutdown(cancel_futures=True)
        self._drop_all()  # what was deleted a moment ago must not leave its graph on the disk
        self._queue.close()
        self._indexes.disconnect()

    def follow(self, collection: Collection) -> None:
        """Let the index take in what was committed, before the next search has to wait for it."""
        if collection.key not in self._following:
            self._following.add(collection.key)
            self._thread.submit(self._follow, collection)

    def _follow(self, collection: Collection) -> None:
        self._following.discard(collection.key)
        try:
            self._indexes.follow(collection)
        except CollectionNotFoundError:
            pass  # deleted meanwhile, and its index with it
        except Exception:
            log.exception("the index of %s could not follow the store; the next search tries again", collection.name)

    def drop(self, collection: Collection, space: Space | None = None) -> None:
        """Forget a deleted collection, or one of its spaces that is searched no more."""
        self._dropped.append((collection, space))
        self._thread.submit(self._drop_all)

    def _drop_all(self) -> None:
        while self._dropped:
            self._indexes.drop(*self._dropped.popleft())

    def revisions(self) -> list[tuple[int, int]]:
        """(collection key, revision): older changes of the collection are needed no more."""
        return self._indexes.revisions()

    def revision(self, collection: Collection) -> int:
        """What a collection's index has taken in; 0 before its first write."""
        held = self._indexes.held(collection)
        return 0 if held is None else max(0, held.index.revision)

    def stats(self, collection: Collection) -> IndexStats:
        """How a collection's index stands; of an empty one before its first search."""
        held = self._indexes.held(collection)
        if held is None:
            return IndexStats(self._ladder.wanted(0), 0, 0, None, 0)
        index = held.index
        revision = max(0, index.revision)
        built = (held.recall.value, revision, held.note, held.pinned is not None, len(index))
        kind = f"{index.kind}-gpu" if getattr(index, "gpu", None) is not None else index.kind
        return IndexStats(kind, index.nbytes, index.tombstones, *built)

    async def rebuild(self, collection: Collection, index_type: str = "") -> IndexStats:
        """Build a collection's index anew while the old one serves; returns when it is in place.

        Args:
            collection: in whose space.
            index_type: ``flat``, ``flat-fp16`` or ``hnsw`` until the server stops; empty or ``auto`` = by its size.

        Returns:
            What stands then: ``note`` tells why a graph was refused.

        Raises:
            InputError: no such type.
            CollectionNotFoundError: it was deleted meanwhile.
        """
        done = await self._run(self._indexes.begin, collection, index_type)
        await asyncio.wrap_future(done)
        return self.stats(collection)

    async def search(
        self,
        collection: Collection,
        queries: Sequence[Query],
        *,
        with_features: bool,
        exact: bool = False,
        deadline: float = float("inf"),
    ) -> list[Found]:
        """The nearest entries of each query; whoever else waits is searched together with them.

        Args:
            collection: and its space.
            queries: at least one.
            with_features: hits carry theirs.
            exact: miss none, whatever the index.
            deadline: in `time.monotonic` seconds, before which the search must begin.

        Raises:
            CollectionNotFoundError: it was deleted meanwhile.
            DeadlineError: the deadline passed while it waited.
            OverloadedError: too many queries wait.
            StoreError: the database is damaged.
        """
        kind = _Kind(collection.key, collection.space.space_id, with_features, exact)
        with watch.timed("search"):
            return await self._queue.submit(kind, [_Job(collection, query) for query in queries], deadline=deadline)

    async def _run(self, function: Callable[..., T], *args: object) -> T:
        def run() -> T:
            try:
                return function(*args)
            except sqlite3.Error as error:
                raise translated(error) from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def _search(self, kind: _Kind, jobs: Sequence[_Job]) -> list[Found]:
        started_ns = time.perf_counter_ns()
        collection = jobs[0].collection
        try:
            held = self._indexes.current(collection)
            tune(collection.space.dim).apply(collection.space.dim)
            nearest = Nearest(self._store.reader(), held, self._ladder, exact=kind.exact)
            answers: list[Answer] = nearest.answers([job.query for job in jobs], with_features=kind.with_features)
        except sqlite3.Error as error:
            raise translated(error) from error
        search_ns = (time.perf_counter_ns() - started_ns) // len(jobs)
        return [Found(answer.hits, held.index.revision, search_ns, answer.exact) for answer in answers]
