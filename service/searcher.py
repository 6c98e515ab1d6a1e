"""Nearest entries: the indexes follow the store, and every hit is checked against it before it leaves.

One thread owns all indexes, so nothing is locked. A search first takes in what was committed before
it, so a caller always finds what it has enrolled and never what it has deleted.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from resight.errors import CollectionNotFoundError
from resight.service import reads
from resight.service.entries import Collection, Filter, Hit
from resight.service.index import ExactIndex, tune_thread
from resight.service.runtime import Feature
from resight.service.schema import translated
from resight.service.store import Store

log = logging.getLogger(__name__)

T = TypeVar("T")
# A filter that only leaves some out (a camera) passes most of what is near: fetch a few more than asked
# for and check them, and list what passes only if too few did.
OVERFETCH, SPARE = 3, 8


@dataclass(frozen=True)
class Query:
    """What is searched for: float32 (D,) of unit length; ``min_similarity`` -1..1."""

    feature: Feature
    top_k: int
    filters: Filter
    min_similarity: float = -1.0


@dataclass(frozen=True)
class Found:
    """Hits, best first, equal ones in order of enrolment; and what had been committed when they were found."""

    hits: tuple[Hit, ...]
    revision: int
    search_ns: int


class Searcher:
    """Searches all collections of a store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._indexes: dict[int, ExactIndex] = {}
        self._following: set[int] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")

    async def load(self) -> None:
        """Build the index of every collection from the store."""
        held = await self._store.read(reads.collections, limit=-1)
        for collection in held:
            started = time.monotonic()
            index = await self._run(self._current, collection)
            log.info(
                "index built collection=%s entries=%d seconds=%.2f",
                collection.name,
                len(index),
                time.monotonic() - started,
            )

    def close(self) -> None:
        """End after the running search."""
        self._thread.shutdown(cancel_futures=True)

    def follow(self, collection: Collection) -> None:
        """Let the index take in what was committed, before the next search has to wait for it."""
        if collection.key not in self._following:
            self._following.add(collection.key)
            self._thread.submit(self._follow, collection)

    def _follow(self, collection: Collection) -> None:
        self._following.discard(collection.key)
        try:
            self._current(collection)
        except CollectionNotFoundError:
            pass  # deleted meanwhile, and its index with it
        except Exception:
            log.exception("the index of %s could not follow the store; the next search tries again", collection.name)

    def drop(self, collection: Collection) -> None:
        """Forget a deleted collection."""
        self._thread.submit(self._indexes.pop, collection.key, None)

    def revisions(self) -> list[tuple[int, int]]:
        """What each index has taken in: (collection key, revision)."""
        return [(key, index.revision) for key, index in list(self._indexes.items())]

    def revision(self, collection: Collection) -> int:
        """What a collection's index has taken in; 0 before its first write."""
        index = self._indexes.get(collection.key)
        return 0 if index is None else max(0, index.revision)

    async def search(self, collection: Collection, queries: Sequence[Query], *, with_features: bool) -> list[Found]:
        """The nearest entries of each query, exactly.

        Queries with the same filter are searched together.

        Raises:
            CollectionNotFoundError: it was deleted meanwhile.
        """
        return await self._run(self._search, collection, queries, with_features)

    async def _run(self, function: Callable[..., T], *args: object) -> T:
        def run() -> T:
            try:
                return function(*args)
            except sqlite3.Error as error:
                raise translated(error) from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def _current(self, collection: Collection) -> ExactIndex:
        """The collection's index, with everything committed so far."""
        connection = self._store.reader()
        index = self._indexes.get(collection.key)
        reached = reads.revision(connection, collection.key)
        if reached < 0:
            self._indexes.pop(collection.key, None)
            raise CollectionNotFoundError(
                f"collection {collection.name} was deleted meanwhile", field="collection_id", collection=collection.name
            )
        if index is None:
            index = ExactIndex(collection.space.dim)
        if index.revision != reached:
            change = reads.changes(connection, collection.key, collection.space, index.revision)
            index.remove(change.removed)
            index.add(change.added, change.features)
            index.revision = change.revision
        self._indexes[collection.key] = index
        return index

    def _search(self, collection: Collection, queries: Sequence[Query], with_features: bool) -> list[Found]:
        started_ns = time.perf_counter_ns()
        tune_thread(collection.space.dim)
        index = self._current(collection)
        together: dict[Filter, list[int]] = {}
        for number, query in enumerate(queries):
            together.setdefault(query.filters, []).append(number)
        hits: dict[int, tuple[Hit, ...]] = {}
        for filters, numbers in together.items():
            found = self._nearest(collection, index, [queries[number] for number in numbers], filters, with_features)
            hits.update(zip(numbers, found, strict=True))
        search_ns = (time.perf_counter_ns() - started_ns) // max(1, len(queries))
        return [Found(hits[number], index.revision, search_ns) for number in range(len(queries))]

    def _nearest(
        self, collection: Collection, index: ExactIndex, queries: Sequence[Query], filters: Filter, with_features: bool
    ) -> list[tuple[Hit, ...]]:
        """Hits of queries that share a filter."""
        connection = self._store.reader()
        features = np.stack([query.feature for query in queries])  # (Q, D)
        k = max(query.top_k for query in queries)
        fetch = k + SPARE if filters == Filter() else OVERFETCH * k + SPARE
        among = reads.candidates(connection, collection.key, filters) if filters.selective else None
        while True:
            found = index.search(features, fetch, among=among)
            keys = np.unique(np.concatenate([keys for keys, _ in found]))
            living = reads.confirmed(connection, collection.key, keys, filters)
            answers = [[(key, s) for key, s in zip(*pair, strict=True) if int(key) in living] for pair in found]
            short = any(
                len(answer) < query.top_k and len(keys) == fetch
                for answer, (keys, _), query in zip(answers, found, queries, strict=True)
            )
            if among is not None or not short:
                break
            among = reads.candidates(connection, collection.key, filters)
        out: list[tuple[Hit, ...]] = []
        for answer, query in zip(answers, queries, strict=True):
            kept = [(int(key), float(s)) for key, s in answer if s >= query.min_similarity][: query.top_k]
            vectors = index.features(np.array([key for key, _ in kept], np.int64)) if with_features else None
            out.append(
                tuple(
                    Hit(living[key], s, None if vectors is None else vectors[row]) for row, (key, s) in enumerate(kept)
                )
            )
        return out
