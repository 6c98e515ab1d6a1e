"""Nearest-neighbour search in collections: the search queue, and candidates checked against the store.

One thread owns all indexes, so they need no locks. A search first applies all committed changes to the index, so it
finds every enrolled entry and no deleted one. A filter that few entries match is searched exactly; otherwise more
candidates than requested are fetched, and an exact search follows if too few of them match the filter.

Queries that wait while a search runs are batched, with a bounded queue and deadlines but without a fixed delay: those
submitted in one event loop iteration form a batch, and an idle thread starts at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from resight.arrays import Feature
from resight.errors import CollectionNotFoundError, DrainingError
from resight.service import call_events
from resight.service.index.base import Candidates, IndexPolicy
from resight.service.index.flat import tune_faiss
from resight.service.index.manager import IndexManager, IndexState
from resight.service.inference.admission import Admission, deadline_error
from resight.service.records import Collection, EntryRecord, Filter, Hit, Space
from resight.service.storage import reads
from resight.service.storage.schema import translate_error
from resight.service.storage.store import Store

__all__ = ["IndexStats", "NearestQuery", "SearchOutcome", "Searcher"]


OVERFETCH, EXTRA_CANDIDATES = 3, 8  # fetch for filtered queries: OVERFETCH * k + EXTRA_CANDIDATES
RECALL_K = 10  # the monitored recall is recall at 10


@dataclass(frozen=True)
class NearestQuery:
    """One query: ``feature`` float32 (D,) of unit length; ``min_similarity`` -1..1."""

    feature: Feature
    top_k: int
    filters: Filter
    min_similarity: float = -1.0


@dataclass(frozen=True)
class NearestResult:
    """Hits of one query, best first; ``exact``: whether the search was exhaustive."""

    hits: tuple[Hit, ...]
    exact: bool


class NearestSearch:
    """Searches the index of one collection, in the search thread.

    Args:
        connection: of that thread.
        state: the index, up to date with the store.
        policy: has the number of candidates up to which a search is exact.
        exact: search exactly, whatever the index.
    """

    def __init__(self, connection: sqlite3.Connection, state: IndexState, policy: IndexPolicy, *, exact: bool) -> None:
        self._connection, self._state, self._policy = connection, state, policy
        self._exact = exact or not state.index.approximate

    def search(self, queries: Sequence[NearestQuery], *, with_features: bool) -> list[NearestResult]:
        """Hits of each query; queries over the same entries share one scan."""
        results: list[NearestResult | None] = [None] * len(queries)
        unselective: dict[int, list[int]] = {}  # by the bit length of top_k: queries of similar top_k share a scan
        selective: dict[Filter, list[int]] = {}
        for number, query in enumerate(queries):
            if query.filters.selective:
                selective.setdefault(query.filters, []).append(number)
            else:
                unselective.setdefault(query.top_k.bit_length(), []).append(number)
        for filters, numbers in selective.items():
            limit = self._policy.exact_limit(len(self._state.index))
            among = self._state.reader.matching_keys(filters, limit)
            if among is None:
                unselective.setdefault(max(queries[number].top_k for number in numbers).bit_length(), []).extend(
                    numbers
                )
                continue
            for number, result in self._search_among(queries, numbers, filters, among, with_features).items():
                results[number] = result
        for numbers in unselective.values():
            for number, result in self._search_all(queries, numbers, with_features).items():
                results[number] = result
        return [result for result in results if result is not None]

    def _search_among(
        self,
        queries: Sequence[NearestQuery],
        numbers: Sequence[int],
        filters: Filter,
        among: reads.Keys,
        with_features: bool,
    ) -> dict[int, NearestResult]:
        """Search exactly among the keys that match the filter."""
        k = max(queries[number].top_k for number in numbers) + EXTRA_CANDIDATES
        near = self._state.index.search(np.stack([queries[n].feature for n in numbers]), k, among=among)
        entries = self._confirm(near, filters)
        return {
            number: NearestResult(self._hits(one, entries, queries[number], with_features), True)
            for number, one in zip(numbers, near, strict=True)
        }

    def _search_all(
        self, queries: Sequence[NearestQuery], numbers: Sequence[int], with_features: bool
    ) -> dict[int, NearestResult]:
        """Search all entries, then apply the filters."""
        unfiltered = all(queries[number].filters == Filter() for number in numbers)
        k = max(queries[number].top_k for number in numbers)
        fetch = k + EXTRA_CANDIDATES if unfiltered else OVERFETCH * k + EXTRA_CANDIDATES
        features = np.stack([queries[number].feature for number in numbers])
        near = self._state.index.search(features, fetch, exact=self._exact)
        if not self._exact:
            self._sample_recall(features[:1])
        groups: dict[Filter, list[int]] = {}
        for place, number in enumerate(numbers):
            groups.setdefault(queries[number].filters, []).append(place)
        results: dict[int, NearestResult] = {}
        for filters, places in groups.items():
            entries = self._confirm([near[place] for place in places], filters)
            short = []
            for place in places:
                number, (keys, _) = numbers[place], near[place]
                passed = sum(int(key) in entries for key in keys)
                if passed < queries[number].top_k and (len(keys) >= fetch or not self._exact):
                    short.append(number)
                else:
                    hits = self._hits(near[place], entries, queries[number], with_features)
                    results[number] = NearestResult(hits, self._exact)
            if short:
                among = reads.candidates(self._connection, self._state.reader.collection.key, filters)
                results.update(self._search_among(queries, short, filters, among, with_features))
        return results

    def _confirm(self, near: Sequence[Candidates], filters: Filter) -> dict[int, EntryRecord]:
        keys = np.unique(np.concatenate([keys for keys, _ in near]))
        return reads.confirm_candidates(self._connection, self._state.reader.collection.key, keys, filters)

    def _hits(
        self, near: Candidates, entries: dict[int, EntryRecord], query: NearestQuery, with_features: bool
    ) -> tuple[Hit, ...]:
        kept = [
            (int(key), float(similarity))
            for key, similarity in zip(*near, strict=True)
            if int(key) in entries and similarity >= query.min_similarity
        ][: query.top_k]
        if not with_features:
            return tuple(Hit(entries[key], similarity) for key, similarity in kept)
        keys, vectors = self._state.index.vectors(np.sort(np.array([key for key, _ in kept], np.int64)))
        features = dict(zip(keys.tolist(), vectors, strict=True))
        return tuple(Hit(entries[key], similarity, features[key]) for key, similarity in kept if key in features)

    def _sample_recall(self, query: Feature) -> None:
        """Repeat one in ``policy.sample`` approximate searches exactly, to measure their recall."""
        recall, index = self._state.recall, self._state.index
        recall.searches += 1
        if self._policy.sample and (recall.searches - 1) % self._policy.sample == 0:
            ((true, _),), ((found, _),) = (
                index.search(query, RECALL_K, exact=True),
                index.search(query, RECALL_K),
            )
            recall.add(len(np.intersect1d(true, found)), len(true))


KindT = TypeVar("KindT")
JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")

MAX_BATCH = 64  # queries of one run; larger matrix products gain little (batch of 256: 1.07, of 64: 1.3 ms)


@dataclass
class _Item(Generic[KindT, JobT, ResultT]):
    kind: KindT
    jobs: Sequence[JobT]
    deadline: float
    result: asyncio.Future[list[ResultT]]
    loop: asyncio.AbstractEventLoop
    queued: float = field(default_factory=time.monotonic)


class SearchQueue(Generic[KindT, JobT, ResultT]):
    """Batches jobs of equal kind for one thread. Use it from one event loop at a time.

    Args:
        thread: an executor with one thread.
        run: runs jobs of one kind and returns their results in order; an exception is raised for each of them.
        max_queries: waiting or running.
    """

    def __init__(
        self, thread: Executor, run: Callable[[KindT, Sequence[JobT]], list[ResultT]], *, max_queries: int
    ) -> None:
        self._thread, self._run = thread, run
        self._admission = Admission("queries", "max_search_queue", max_queries)
        self._items: deque[_Item[KindT, JobT, ResultT]] = deque()
        self._scheduled_in: asyncio.AbstractEventLoop | None = None  # the loop in which `_start_drain` is scheduled

    async def submit(self, kind: KindT, jobs: Sequence[JobT], *, deadline: float) -> list[ResultT]:
        """Run jobs and return their results in order.

        Args:
            kind: jobs of equal kind may be batched.
            jobs: at least one.
            deadline: in `time.monotonic` seconds.

        Raises:
            DeadlineError: it passed before the run started.
            OverloadedError: the queue is full, or the expected wait is longer than the deadline.
        """
        with self._admission.admit(len(jobs), deadline):
            loop = asyncio.get_running_loop()
            item: _Item[KindT, JobT, ResultT] = _Item(kind, jobs, deadline, loop.create_future(), loop)
            self._items.append(item)
            if self._scheduled_in is not loop:
                self._scheduled_in = loop
                loop.call_soon(self._start_drain)
            return await item.result

    @property
    def waiting(self) -> int:
        """Number of queries waiting or running."""
        return self._admission.waiting()

    def close(self) -> None:
        """Fail the jobs that still wait; call it after the thread has ended."""
        while self._items:
            closing = DrainingError("the gallery is closing: try again when the server is back")
            _deliver([(self._items.popleft(), closing)])

    def _start_drain(self) -> None:
        """Let the thread run the waiting jobs."""
        self._scheduled_in = None
        try:
            self._thread.submit(self._drain)
        except RuntimeError:  # it has ended
            self.close()

    def _drain(self) -> None:
        """Take up to `MAX_BATCH` waiting queries and run them kind by kind."""
        batches: dict[KindT, list[_Item[KindT, JobT, ResultT]]] = {}
        count = 0
        while self._items and (not count or count + len(self._items[0].jobs) <= MAX_BATCH):
            item = self._items.popleft()
            if item.result.done():  # its caller was cancelled
                continue
            if error := deadline_error(item.deadline):
                _deliver([(item, error)])
                continue
            batches.setdefault(item.kind, []).append(item)
            count += len(item.jobs)
        if self._items:
            with contextlib.suppress(RuntimeError):  # shutting down: `close` fails them
                self._thread.submit(self._drain)
        started = time.monotonic()
        for kind, items in batches.items():
            try:
                results = self._run(kind, [job for item in items for job in item.jobs])
            except Exception as error:
                _deliver([(item, error) for item in items])
                continue
            ends = itertools.accumulate(len(item.jobs) for item in items)
            _deliver([(item, results[end - len(item.jobs) : end]) for item, end in zip(items, ends, strict=True)])
        if count:
            self._admission.record_batch(time.monotonic() - started, count)


def _deliver(outcomes: Sequence[tuple[_Item[KindT, JobT, ResultT], list[ResultT] | Exception]]) -> None:
    """Set the results in the callers' event loop, unless it has ended; cancelled callers are skipped."""

    def set_results() -> None:
        for item, outcome in outcomes:
            if item.result.done():
                continue
            if isinstance(outcome, Exception):
                item.result.set_exception(outcome)
            else:
                item.result.set_result(outcome)

    if outcomes:
        with contextlib.suppress(RuntimeError):
            outcomes[0][0].loop.call_soon_threadsafe(set_results)


log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class SearchOutcome:
    """The result of one query: hits, best first, equal ones in order of enrolment.

    Attributes:
        revision: the last write that the search includes.
        search_ns: the query's share of the time of its batch.
        exact: whether the search was exhaustive.
    """

    hits: tuple[Hit, ...]
    revision: int
    search_ns: int
    exact: bool = True


@dataclass(frozen=True)
class IndexStats:
    """State of a collection's index.

    Attributes:
        index_type: ``flat``, ``flat-fp16``, ``hnsw`` or ``milvus``, with suffix ``-gpu`` if it is scanned on a GPU.
        index_bytes: memory.
        entries: indexed entries, including expired ones until the purge.
        tombstones: deleted entries that still use memory; never returned.
        sampled_recall_at_10: of approximate searches compared with exact ones; None = not sampled yet.
        revision: the last write that is indexed.
        note: why it is not of the kind the policy selects; empty = it is.
        building: whether a replacement is being built.
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
    """What queries must have in common to be batched."""

    key: int
    space_id: str
    with_features: bool
    exact: bool


class _Job(NamedTuple):
    collection: Collection
    query: NearestQuery


class Searcher:
    """Searches all collections of a store.

    Args:
        store: of the tenant.
        policy: selects the kind of index of a collection.
        max_queue: queries waiting or running.
    """

    def __init__(self, store: Store, policy: IndexPolicy | None = None, *, max_queue: int = 1024) -> None:
        self._store, self._policy = store, policy or IndexPolicy()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")
        self._indexes = IndexManager(store, self._policy, self._thread.submit)
        self._update_scheduled: set[int] = set()
        self._dropped: deque[tuple[Collection, Space | None]] = deque()
        self._queue: SearchQueue[_Kind, _Job, SearchOutcome] = SearchQueue(
            self._thread, self._search, max_queries=max_queue
        )

    async def load(self, dim: int = 0) -> None:
        """Tune scanning to this machine and build the index of every collection from the store.

        Args:
            dim: feature dimension; 0 = unknown, then the first search does the tuning.

        Raises:
            StartupError: this faiss ignores filters, or the configured GPU or Milvus is not available.
        """
        await self._run(self._indexes.prepare)
        if dim:
            await self._run(tune_faiss, dim)
        for collection in await self._store.read(reads.collections, limit=-1):
            started = time.monotonic()
            await self._run(tune_faiss, collection.space.dim)  # before the first search
            index = (await self._run(self._indexes.up_to_date, collection)).index
            log.info(
                "index loaded collection=%s kind=%s entries=%d seconds=%.2f",
                collection.name,
                index.kind,
                len(index),
                time.monotonic() - started,
            )
        await self._run(self._indexes.drop_unused)

    @property
    def waiting(self) -> int:
        """Number of queries waiting or running."""
        return self._queue.waiting

    @property
    def erases(self) -> bool:
        """Whether deleted features leave no bytes in files; Milvus keeps them until it compacts."""
        return not self._policy.milvus

    def close(self) -> None:
        """Stop after the running search; an index build in progress is abandoned."""
        self._indexes.close()
        self._thread.shutdown(cancel_futures=True)
        self._drop_all()  # files of just deleted collections must not remain on disk
        self._queue.close()
        self._indexes.disconnect()

    def schedule_update(self, collection: Collection) -> None:
        """Update the index in the background, so that the next search does not have to."""
        if collection.key not in self._update_scheduled:
            self._update_scheduled.add(collection.key)
            self._thread.submit(self._update_index, collection)

    def _update_index(self, collection: Collection) -> None:
        self._update_scheduled.discard(collection.key)
        try:
            self._indexes.apply_changes(collection)
        except CollectionNotFoundError:
            pass  # deleted meanwhile, and its index with it
        except Exception:
            log.exception("updating the index of %s failed; the next search will retry", collection.name)

    def drop(self, collection: Collection, space: Space | None = None) -> None:
        """Drop the index of a deleted collection, or of one of its spaces that is no longer searched."""
        self._dropped.append((collection, space))
        self._thread.submit(self._drop_all)

    def _drop_all(self) -> None:
        while self._dropped:
            self._indexes.drop(*self._dropped.popleft())

    def revisions(self) -> list[tuple[int, int]]:
        """(collection key, revision) of each index; older rows of the change log are not needed any more."""
        return self._indexes.revisions()

    def revision(self, collection: Collection) -> int:
        """The last indexed revision of a collection; 0 before its first write."""
        state = self._indexes.state(collection)
        return 0 if state is None else max(0, state.index.revision)

    def stats(self, collection: Collection) -> IndexStats:
        """State of a collection's index; that of an empty index before the first search."""
        state = self._indexes.state(collection)
        if state is None:
            return IndexStats(self._policy.kind_for(0), 0, 0, None, 0)
        index = state.index
        revision = max(0, index.revision)
        rest = (state.recall.value, revision, state.note, state.pinned is not None, len(index))
        kind = f"{index.kind}-gpu" if getattr(index, "gpu", None) is not None else index.kind
        return IndexStats(kind, index.nbytes, index.tombstones, *rest)

    async def rebuild(self, collection: Collection, index_type: str = "") -> IndexStats:
        """Rebuild a collection's index while the old one serves; returns when the new one is in use.

        Args:
            collection: the collection, with its space.
            index_type: ``flat``, ``flat-fp16`` or ``hnsw`` until the server restarts; empty or ``auto`` = by size.

        Returns:
            The new state; ``note`` says why a graph was rejected.

        Raises:
            InputError: unknown type.
            CollectionNotFoundError: it was deleted meanwhile.
        """
        done = await self._run(self._indexes.start_rebuild, collection, index_type)
        await asyncio.wrap_future(done)
        return self.stats(collection)

    async def search(
        self,
        collection: Collection,
        queries: Sequence[NearestQuery],
        *,
        with_features: bool,
        exact: bool = False,
        deadline: float = float("inf"),
    ) -> list[SearchOutcome]:
        """The nearest entries of each query; batched with other waiting queries of the same kind.

        Args:
            collection: the collection, with its space.
            queries: at least one.
            with_features: return the features of hits.
            exact: search exactly, whatever the index.
            deadline: in `time.monotonic` seconds, by which the search must have started.

        Raises:
            CollectionNotFoundError: it was deleted meanwhile.
            DeadlineError: the deadline passed while it waited.
            OverloadedError: the queue is full.
            StoreError: the database is damaged.
        """
        kind = _Kind(collection.key, collection.space.space_id, with_features, exact)
        with call_events.timed_stage("search"):
            return await self._queue.submit(kind, [_Job(collection, query) for query in queries], deadline=deadline)

    async def _run(self, function: Callable[..., T], *args: object) -> T:
        def run() -> T:
            try:
                return function(*args)
            except sqlite3.Error as error:
                raise translate_error(error) from error

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def _search(self, kind: _Kind, jobs: Sequence[_Job]) -> list[SearchOutcome]:
        started_ns = time.perf_counter_ns()
        collection = jobs[0].collection
        try:
            state = self._indexes.up_to_date(collection)
            tune_faiss(collection.space.dim).apply(collection.space.dim)
            nearest = NearestSearch(self._store.reader(), state, self._policy, exact=kind.exact)
            results: list[NearestResult] = nearest.search([job.query for job in jobs], with_features=kind.with_features)
        except sqlite3.Error as error:
            raise translate_error(error) from error
        search_ns = (time.perf_counter_ns() - started_ns) // len(jobs)
        return [SearchOutcome(result.hits, state.index.revision, search_ns, result.exact) for result in results]
