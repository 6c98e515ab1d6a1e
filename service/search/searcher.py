"""Nearest entries of a collection: indexes that follow the store, and hits checked against it before they are returned.

One thread owns all indexes, so nothing is locked. A search first takes in what was committed before it, so a caller
always finds what it has enrolled and never what it has deleted. A search whose filter leaves few entries is exact; the
others look at more candidates than requested, and search exactly when too few of them pass the filter.

Searches that wait while one runs are run together, with a bound and deadlines but no fixed delay: those of one turn of
the event loop are one batch, an idle thread starts at once, and a busy one finds the next batch gathered.
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
from resight.errors import (
    CollectionNotFoundError,
    DeadlineError,
    DrainingError,
    ExpiredInQueueError,
    OverloadedError,
)
from resight.service import call_events
from resight.service.index.base import Candidates, IndexPolicy
from resight.service.index.flat import tune_faiss
from resight.service.index.manager import IndexManager, IndexState
from resight.service.records import Collection, EntryRecord, Filter, Hit, Space
from resight.service.storage import reads
from resight.service.storage.schema import translate_error
from resight.service.storage.store import Store

__all__ = ["IndexStats", "NearestQuery", "SearchOutcome", "Searcher"]


OVERFETCH, SPARE = 3, 8
SAMPLE_EVERY = 10  # the recall that is watched is at ten


@dataclass(frozen=True)
class NearestQuery:
    """What is searched for: float32 (D,) of unit length; ``min_similarity`` -1..1."""

    feature: Feature
    top_k: int
    filters: Filter
    min_similarity: float = -1.0


@dataclass(frozen=True)
class NearestAnswer:
    """Hits of one query, best first, and whether none can be missing."""

    hits: tuple[Hit, ...]
    exact: bool


class NearestSearch:
    """One collection's index for the time of one search, in the thread that owns it.

    Args:
        connection: of that thread.
        held: the index, with everything committed.
        ladder: says how few candidates are searched exactly.
        exact: every search is, whatever the index.
    """

    def __init__(self, connection: sqlite3.Connection, held: IndexState, ladder: IndexPolicy, *, exact: bool) -> None:
        self._connection, self._held, self._ladder = connection, held, ladder
        self._exact = exact or not held.index.approximate

    def answers(self, queries: Sequence[NearestQuery], *, with_features: bool) -> list[NearestAnswer]:
        """Hits of each query; those that look at the same entries are searched together."""
        out: list[NearestAnswer | None] = [None] * len(queries)
        open_ones: dict[int, list[int]] = {}  # queries of any filter share one scan, if they want about as many
        chosen: dict[Filter, list[int]] = {}
        for number, query in enumerate(queries):
            if query.filters.selective:
                chosen.setdefault(query.filters, []).append(number)
            else:
                open_ones.setdefault(query.top_k.bit_length(), []).append(number)
        for filters, numbers in chosen.items():
            few = self._ladder.exact_limit(len(self._held.index))
            among = self._held.reader.matching_keys(filters, few)
            if among is None:
                open_ones.setdefault(max(queries[number].top_k for number in numbers).bit_length(), []).extend(numbers)
                continue
            for number, answer in self._among(queries, numbers, filters, among, with_features).items():
                out[number] = answer
        for numbers in open_ones.values():
            for number, answer in self._open(queries, numbers, with_features).items():
                out[number] = answer
        return [answer for answer in out if answer is not None]

    def _among(
        self,
        queries: Sequence[NearestQuery],
        numbers: Sequence[int],
        filters: Filter,
        among: reads.Keys,
        with_features: bool,
    ) -> dict[int, NearestAnswer]:
        """Exactly, among the keys that passed a moment ago."""
        k = max(queries[number].top_k for number in numbers) + SPARE
        near = self._held.index.search(np.stack([queries[n].feature for n in numbers]), k, among=among)
        living = self._confirmed(near, filters)
        return {
            number: NearestAnswer(self._hits(one, living, queries[number], with_features), True)
            for number, one in zip(numbers, near, strict=True)
        }

    def _open(
        self, queries: Sequence[NearestQuery], numbers: Sequence[int], with_features: bool
    ) -> dict[int, NearestAnswer]:
        """Among all, and then filtered."""
        plain = all(queries[number].filters == Filter() for number in numbers)
        k = max(queries[number].top_k for number in numbers)
        fetch = k + SPARE if plain else OVERFETCH * k + SPARE
        features = np.stack([queries[number].feature for number in numbers])
        near = self._held.index.search(features, fetch, exact=self._exact)
        if not self._exact:
            self._sample(features[:1])
        groups: dict[Filter, list[int]] = {}
        for place, number in enumerate(numbers):
            groups.setdefault(queries[number].filters, []).append(place)
        out: dict[int, NearestAnswer] = {}
        for filters, places in groups.items():
            living = self._confirmed([near[place] for place in places], filters)
            short = []
            for place in places:
                number, (keys, _) = numbers[place], near[place]
                passed = sum(int(key) in living for key in keys)
                if passed < queries[number].top_k and (len(keys) >= fetch or not self._exact):
                    short.append(number)
                else:
                    hits = self._hits(near[place], living, queries[number], with_features)
                    out[number] = NearestAnswer(hits, self._exact)
            if short:
                among = reads.candidates(self._connection, self._held.reader.collection.key, filters)
                out.update(self._among(queries, short, filters, among, with_features))
        return out

    def _confirmed(self, near: Sequence[Candidates], filters: Filter) -> dict[int, EntryRecord]:
        keys = np.unique(np.concatenate([keys for keys, _ in near]))
        return reads.confirm_candidates(self._connection, self._held.reader.collection.key, keys, filters)

    def _hits(
        self, near: Candidates, living: dict[int, EntryRecord], query: NearestQuery, with_features: bool
    ) -> tuple[Hit, ...]:
        kept = [
            (int(key), float(similarity))
            for key, similarity in zip(*near, strict=True)
            if int(key) in living and similarity >= query.min_similarity
        ][: query.top_k]
        if not with_features:
            return tuple(Hit(living[key], similarity) for key, similarity in kept)
        keys, vectors = self._held.index.vectors(np.sort(np.array([key for key, _ in kept], np.int64)))
        told = dict(zip(keys.tolist(), vectors, strict=True))
        return tuple(Hit(living[key], similarity, told[key]) for key, similarity in kept if key in told)

    def _sample(self, query: Feature) -> None:
        """Repeat one in so many approximate searches exactly, to know what they miss."""
        recall, index = self._held.recall, self._held.index
        recall.searches += 1
        if self._ladder.sample and (recall.searches - 1) % self._ladder.sample == 0:
            ((true, _),), ((found, _),) = (
                index.search(query, SAMPLE_EVERY, exact=True),
                index.search(query, SAMPLE_EVERY),
            )
            recall.add(len(np.intersect1d(true, found)), len(true))


KindT = TypeVar("KindT")
JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")

MAX_BATCH = 64  # queries of one run: of a matrix product's gain little is left above (b 256: 1.07, b 64: 1.3 ms)
MIN_RETRY_S = 0.05  # below this a retry arrives before the queue has moved
SMOOTHING = 0.2  # weight of the newest run in the running mean of seconds a query


@dataclass
class _Item(Generic[KindT, JobT, ResultT]):
    kind: KindT
    jobs: Sequence[JobT]
    deadline: float
    result: asyncio.Future[list[ResultT]]
    loop: asyncio.AbstractEventLoop
    queued: float = field(default_factory=time.monotonic)


class SearchQueue(Generic[KindT, JobT, ResultT]):
    """Gathers jobs of equal kind. Of one event loop at a time.

    Args:
        thread: one thread, which runs them.
        run: answers jobs of one kind, in their order; what it raises is every one's answer.
        most: queries that may wait or run.

    Attributes:
        taken: queries that wait or run.
    """

    def __init__(self, thread: Executor, run: Callable[[KindT, Sequence[JobT]], list[ResultT]], *, most: int) -> None:
        self._thread, self._run, self._most = thread, run, most
        self._items: deque[_Item[KindT, JobT, ResultT]] = deque()
        self.taken = 0
        self._each_s = 0.0
        self._asking: asyncio.AbstractEventLoop | None = None  # which will ask the thread when it comes round

    async def submit(self, kind: KindT, jobs: Sequence[JobT], *, deadline: float) -> list[ResultT]:
        """Answers of some jobs.

        Args:
            kind: jobs of equal kinds may be run together.
            jobs: at least one.
            deadline: in `time.monotonic` seconds.

        Raises:
            DeadlineError: it passed before the run began.
            OverloadedError: too many wait, or the wait would outlast the deadline.
        """
        self._admit(len(jobs), deadline)
        loop = asyncio.get_running_loop()
        item: _Item[KindT, JobT, ResultT] = _Item(kind, jobs, deadline, loop.create_future(), loop)
        self.taken += len(jobs)
        try:
            self._items.append(item)
            if self._asking is not loop:
                self._asking = loop
                loop.call_soon(self._ask)
            return await item.result
        finally:
            self.taken -= len(jobs)

    def close(self) -> None:
        """Refuse who still waits; call it when the thread has ended."""
        while self._items:
            closing = DrainingError("the gallery is closing: try again when the server is back")
            _deliver([(self._items.popleft(), closing)])

    def _admit(self, count: int, deadline: float) -> None:
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise _deadline_error()
        wait_s = self.taken * self._each_s
        retry_s = max(MIN_RETRY_S, wait_s)
        if self.taken + count > self._most or (self.taken and wait_s > left_s):
            raise OverloadedError(
                f"{self.taken} queries are being searched, {count} more came; at most {self._most} may, and the "
                f"deadline leaves {left_s:.2f} s: try again in {retry_s:.2f} s",
                retry_after_s=retry_s,
                max_search_queue=self._most,
            )

    def _ask(self) -> None:
        """Let the thread take what waits."""
        self._asking = None
        try:
            self._thread.submit(self._drain)
        except RuntimeError:  # it has ended
            self.close()

    def _drain(self) -> None:
        """Take what waits, up to `MAX_BATCH`, and run it kind by kind."""
        together: dict[KindT, list[_Item[KindT, JobT, ResultT]]] = {}
        count = 0
        while self._items and (not count or count + len(self._items[0].jobs) <= MAX_BATCH):
            item = self._items.popleft()
            if item.result.done():  # its caller left
                continue
            if time.monotonic() >= item.deadline:
                _deliver([(item, _deadline_error())])
                continue
            together.setdefault(item.kind, []).append(item)
            count += len(item.jobs)
        if self._items:
            with contextlib.suppress(RuntimeError):  # it is ending, and `close` tells them
                self._thread.submit(self._drain)
        started = time.monotonic()
        for kind, items in together.items():
            try:
                answers = self._run(kind, [job for item in items for job in item.jobs])
            except Exception as error:
                _deliver([(item, error) for item in items])
                continue
            ends = itertools.accumulate(len(item.jobs) for item in items)
            _deliver([(item, answers[end - len(item.jobs) : end]) for item, end in zip(items, ends, strict=True)])
        if count:
            self._each_s += SMOOTHING * ((time.monotonic() - started) / count - self._each_s)


def _deadline_error() -> DeadlineError:
    return ExpiredInQueueError("the deadline passed before the search began: allow more time or send less at once")


def _deliver(outcomes: Sequence[tuple[_Item[KindT, JobT, ResultT], list[ResultT] | Exception]]) -> None:
    """Hand outcomes to the callers' loop, all at once, unless that has ended; callers who left are passed over."""

    def told() -> None:
        for item, outcome in outcomes:
            if item.result.done():
                continue
            if isinstance(outcome, Exception):
                item.result.set_exception(outcome)
            else:
                item.result.set_result(outcome)

    if outcomes:
        with contextlib.suppress(RuntimeError):
            outcomes[0][0].loop.call_soon_threadsafe(told)


log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class SearchOutcome:
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
    query: NearestQuery


class Searcher:
    """Searches all collections of a store.

    Args:
        store: the truth.
        ladder: which index a collection gets.
        max_queue: queries that may wait or run at once.
    """

    def __init__(self, store: Store, ladder: IndexPolicy | None = None, *, max_queue: int = 1024) -> None:
        self._store, self._ladder = store, ladder or IndexPolicy()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="search")
        self._indexes = IndexManager(store, self._ladder, self._thread.submit)
        self._following: set[int] = set()
        self._dropped: deque[tuple[Collection, Space | None]] = deque()
        self._queue: SearchQueue[_Kind, _Job, SearchOutcome] = SearchQueue(self._thread, self._search, most=max_queue)

    async def load(self, dim: int = 0) -> None:
        """Tune the scan to this machine and build the index of every collection from the store.

        Args:
            dim: of the features to come; 0 = not known yet, and then the first search tunes.

        Raises:
            StartupError: this faiss does not look at filters, or the GPU or Milvus that is asked for is not there.
        """
        await self._run(self._indexes.prepare)
        if dim:
            await self._run(tune_faiss, dim)
        held = await self._store.read(reads.collections, limit=-1)
        for collection in held:
            started = time.monotonic()
            await self._run(tune_faiss, collection.space.dim)  # before someone waits for it
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
            self._indexes.apply_changes(collection)
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
        held = self._indexes.state(collection)
        return 0 if held is None else max(0, held.index.revision)

    def stats(self, collection: Collection) -> IndexStats:
        """How a collection's index stands; of an empty one before its first search."""
        held = self._indexes.state(collection)
        if held is None:
            return IndexStats(self._ladder.kind_for(0), 0, 0, None, 0)
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
            held = self._indexes.up_to_date(collection)
            tune_faiss(collection.space.dim).apply(collection.space.dim)
            nearest = NearestSearch(self._store.reader(), held, self._ladder, exact=kind.exact)
            answers: list[NearestAnswer] = nearest.answers(
                [job.query for job in jobs], with_features=kind.with_features
            )
        except sqlite3.Error as error:
            raise translate_error(error) from error
        search_ns = (time.perf_counter_ns() - started_ns) // len(jobs)
        return [SearchOutcome(answer.hits, held.index.revision, search_ns, answer.exact) for answer in answers]
