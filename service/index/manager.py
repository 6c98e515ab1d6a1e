"""The indexes of a gallery: each follows the store, climbs the ladder in the background, and is swapped at once.

One thread, the owner, searches and changes them, so nothing is locked. Another builds new ones; a new one is
handed to the owner, takes in what was committed meanwhile, and only then takes the old one's place.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from threading import Event
from typing import TYPE_CHECKING, cast, get_args

from resight.errors import CollectionNotFoundError, InputError, ReIDError, UnavailableError
from resight.service.index.base import FeatureReader, IndexKind, IndexPolicy, VectorIndex
from resight.service.index.builder import BuiltIndex, build_index, build_scan, check_index_filters
from resight.service.index.graph import GraphFiles
from resight.service.index.half import Gpu, HalfIndex, open_gpu
from resight.service.index.milvus import MilvusIndex, connect_milvus, drop_stale_collections
from resight.service.records import Collection, Space
from resight.service.storage.store import Store

if TYPE_CHECKING:
    from pymilvus import MilvusClient

log = logging.getLogger(__name__)

IndexKey = tuple[int, str]
"""A collection's key and a space id: what one index is of."""
RETRY_GROWTH = 1.2  # a graph that was refused is tried again when the collection has grown by so much
RETRY_S = 60.0  # after a build that failed: a full disk or a lost reader does not heal at once


@dataclass
class SampledRecall:
    """What approximate searches found of what exact ones did, over the last hundred or so."""

    found: float = 0.0
    wanted: float = 0.0
    searches: int = 0

    def add(self, found: int, wanted: int) -> None:
        """Count one more search; older ones fade."""
        self.found, self.wanted = 0.99 * self.found + found, 0.99 * self.wanted + wanted

    @property
    def value(self) -> float | None:
        """0..1; None before the first."""
        return self.found / self.wanted if self.wanted else None


@dataclass
class IndexState:
    """One index and what is known of it.

    Attributes:
        asked: the kind an operator asked for; empty = by size.
        note: why it is not of the kind it should be.
        pinned: the revision a build began at, from which on the change log is needed; None = none runs.
        refused_at: the size at which a graph was refused.
        not_before: when a build that failed may be tried again, in `time.monotonic` seconds.
    """

    index: VectorIndex
    feed: FeatureReader
    asked: str = ""
    note: str = ""
    pinned: int | None = None
    refused_at: int = 0
    not_before: float = 0.0
    recall: SampledRecall = field(default_factory=SampledRecall)


class IndexManager:
    """All of one store.

    Args:
        store: whose features are indexed.
        ladder: which kind each gets.
        owner: runs a function in the thread that searches.
    """

    def __init__(self, store: Store, ladder: IndexPolicy, owner: Callable[[Callable[[], None]], object]) -> None:
        self._store, self._ladder, self._owner = store, ladder, owner
        self._held: dict[IndexKey, IndexState] = {}
        self._reading: dict[IndexKey, int] = {}  # from which revision on a first reading needs the change log
        self._stop = Event()
        self._milvus: MilvusClient | None = None
        self._gpu: Gpu | None = None
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="index")

    def close(self) -> None:
        """End a running build at its next piece, and wait for it."""
        self._stop.set()
        self._builder.shutdown(cancel_futures=True)

    def sweep(self) -> None:
        """Remove from Milvus what belongs to no index, when every collection has its own."""
        if self._milvus is not None:
            indexes = [held.index for held in self._held.values()]
            drop_stale_collections(
                self._milvus, self._store, {index.name for index in indexes if isinstance(index, MilvusIndex)}
            )

    def disconnect(self) -> None:
        """Leave Milvus, when nothing searches any more."""
        if self._milvus is not None:
            self._milvus.close()

    def prepare(self) -> None:
        """Take hold of the GPU or Milvus, and try whether filters are looked at; the owner does it before all else.

        Raises:
            StartupError: filters are not, or the GPU or Milvus that is asked for is not there.
        """
        check_index_filters(8)
        if self._ladder.milvus:
            self._milvus = connect_milvus(self._ladder.milvus, self._ladder.token)
        else:
            self._gpu = open_gpu(self._ladder.device)

    def held(self, collection: Collection) -> IndexState | None:
        """The index of a collection in its space, as it stands; from any thread, to look at."""
        return self._held.get((collection.key, collection.space.space_id))

    def revisions(self) -> list[tuple[int, int]]:
        """For each collection the revision below which no index needs the change log any more."""
        needed = list(self._reading.items())
        for place, held in list(self._held.items()):
            needed.append(
                (place, held.index.revision if held.pinned is None else min(held.pinned, held.index.revision))
            )
        least: dict[int, int] = {}
        for (key, _), revision in needed:
            least[key] = min(least.get(key, revision), revision)
        return list(least.items())

    def current(self, collection: Collection) -> IndexState:
        """A collection's index with everything committed so far. Only the owner calls it, as all that follow.

        Raises:
            CollectionNotFoundError: it was deleted.
        """
        place = (collection.key, collection.space.space_id)
        held = self._held.get(place)
        feed = FeatureReader(self._store, collection, collection.space) if held is None else held.feed
        try:
            if held is None:
                self._reading[place] = feed.revision()
                held = self._held[place] = IndexState(self._first(feed), feed)
            self._follow(held)
        except CollectionNotFoundError:
            self.drop(collection)
            raise
        finally:
            self._reading.pop(place, None)
        self._climb(held)
        return held

    def follow(self, collection: Collection) -> None:
        """Take in what was committed, in every space of the collection that has an index."""
        self.current(collection)
        for (key, _), held in list(self._held.items()):
            if key == collection.key:
                self._follow(held)

    def drop(self, collection: Collection, space: Space | None = None) -> None:
        """Forget a collection, or one of its spaces."""
        for place in [place for place in self._held if place[0] == collection.key]:
            if space is None or place[1] == space.space_id:
                index = self._held.pop(place).index
                if isinstance(index, MilvusIndex):
                    index.drop()
        if self._ladder.folder is not None:
            GraphFiles(self._ladder.folder).delete(collection, space)

    def _first(self, feed: FeatureReader) -> VectorIndex:
        """What serves until the ladder has something better: a scan, or Milvus."""
        if not self._ladder.milvus:
            return self._placed(build_scan(feed, self._ladder.wanted(feed.count()), self._stop))
        assert self._milvus is not None  # `prepare` has connected
        index = MilvusIndex(self._milvus, feed)
        index.reconcile(self._stop)
        return index

    def _placed(self, index: VectorIndex) -> VectorIndex:
        """Let the GPU scan what it can."""
        if self._gpu is not None and isinstance(index, HalfIndex):
            index.gpu = self._gpu.scan(index.codes)
        return index

    def _follow(self, held: IndexState) -> None:
        reached = held.feed.revision()
        if held.index.revision == reached:
            return
        change = held.feed.changes(held.index.revision)
        held.index.remove(change.removed)
        if not held.index.add(change.added, change.features):  # entries came among older ones: a migration's
            log.info("index of %s is built anew: entries came among older ones", held.feed.collection.name)
            held.index = self._first(held.feed)
            return self._follow(held)
        held.index.revision = change.revision

    def _climb(self, held: IndexState) -> None:
        """Begin to build the index it should have, if it has another or that one is worn."""
        index = held.index
        if self._ladder.milvus or held.pinned is not None or time.monotonic() < held.not_before:
            return
        kind = self._ladder.wanted(len(index), held=index.kind, asked=held.asked)
        if kind != index.kind and len(index) < RETRY_GROWTH * held.refused_at:
            kind = cast(IndexKind, index.kind)
        if kind != index.kind or self._ladder.worn(index):
            self.rebuild(held, kind)

    def begin(self, collection: Collection, asked: str) -> Future[None]:
        """Begin to build a collection's index anew, of the kind that an operator asks for.

        Raises:
            InputError: no such kind, or one is being built.
        """
        if asked not in ("", "auto", *get_args(IndexKind)):
            raise InputError(
                f"an index is {', '.join(get_args(IndexKind))} or auto, found {asked!r}: leave it out for auto",
                field="index_type",
            )
        if self._ladder.milvus:
            raise InputError(
                f"{collection.name} is searched by Milvus, which builds its own index: change it there",
                field="index_type",
            )
        held = self.current(collection)
        if held.pinned is not None:
            raise InputError(
                f"an index of {collection.name} is being built already: wait until it stands", field="collection_id"
            )
        held.asked, held.refused_at = asked, 0
        return self.rebuild(held, self._ladder.wanted(len(held.index), held=held.index.kind, asked=asked))

    def rebuild(self, held: IndexState, kind: IndexKind) -> Future[None]:
        """Build an index in the background and put it in the old one's place.

        Returns:
            Done when it stands there, or when it failed and the old one stays.
        """
        held.pinned = held.index.revision
        done: Future[None] = Future()

        def work() -> None:
            try:
                built = build_index(held.feed, kind, self._ladder, self._stop)
            except Exception as error:
                self._owner(partial(self._failed, held, error, done))
            else:
                self._owner(partial(self._swap, held, built, done))

        self._builder.submit(work)
        return done

    def _swap(self, held: IndexState, built: BuiltIndex, done: Future[None]) -> None:
        old, held.index = held.index, self._placed(built.index)
        try:
            self._follow(held)
        except Exception as error:
            held.index = old
            return self._failed(held, error, done)
        held.pinned, held.note, held.recall = None, built.note, SampledRecall()
        held.refused_at = len(built.index) if built.note else 0
        if built.note:
            log.warning("index of %s stays %s: %s", held.feed.collection.name, built.index.kind, built.note)
        done.set_result(None)

    def _failed(self, held: IndexState, error: Exception, done: Future[None]) -> None:
        held.pinned = None
        if not isinstance(error, ReIDError):
            log.error(
                "an index of %s could not be built; the old one serves", held.feed.collection.name, exc_info=error
            )
        held.not_before = time.monotonic() + RETRY_S
        held.note = f"it could not be built anew: {error}"
        if isinstance(error, CollectionNotFoundError):
            self.drop(held.feed.collection)  # with the file that the build may have left
        if isinstance(error, UnavailableError) and self._stop.is_set():
            done.cancel()
        else:
            done.set_exception(error)
