"""The indexes of a gallery: kept up to date with the store, and rebuilt in the background when the policy requires it.

One thread, the owner, searches and changes them, so there are no locks. Another thread builds new ones; a new index is
passed to the owner, which applies the changes committed in the meantime and then replaces the old index by it.
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
"""A collection's key and a space id; identifies an index."""
RETRY_GROWTH = 1.2  # a rejected graph is tried again when the collection has grown by this factor
RETRY_S = 60.0  # after a failed build: a full disk, for example, is not resolved at once


@dataclass
class SampledRecall:
    """Recall of approximate searches against exact ones: an exponential average over about the last 100 samples."""

    found: float = 0.0
    expected: float = 0.0
    searches: int = 0

    def add(self, found: int, expected: int) -> None:
        """Add one sample."""
        self.found, self.expected = 0.99 * self.found + found, 0.99 * self.expected + expected

    @property
    def value(self) -> float | None:
        """0..1; None before the first sample."""
        return self.found / self.expected if self.expected else None


@dataclass
class IndexState:
    """One index and its state.

    Attributes:
        index: that serves searches now.
        reader: of its features.
        requested_kind: by an operator; empty = by size.
        note: why it is not of the kind it should be.
        pinned: the revision at which a running build started, from which on the change log is needed; None = no build.
        refused_at: the number of entries at which a graph was rejected.
        retry_at_s: when a failed build may be tried again, in `time.monotonic` seconds.
        recall: sampled, of the current index.
    """

    index: VectorIndex
    reader: FeatureReader
    requested_kind: str = ""
    note: str = ""
    pinned: int | None = None
    refused_at: int = 0
    retry_at_s: float = 0.0
    recall: SampledRecall = field(default_factory=SampledRecall)


class IndexManager:
    """All indexes of one store. Only the owner thread calls its methods, unless they say otherwise.

    Args:
        store: whose features are indexed.
        policy: decides the kind of each index.
        owner: runs a function in the owner thread.
    """

    def __init__(self, store: Store, policy: IndexPolicy, owner: Callable[[Callable[[], None]], object]) -> None:
        self._store, self._policy, self._owner = store, policy, owner
        self._states: dict[IndexKey, IndexState] = {}
        self._loading: dict[IndexKey, int] = {}  # from which revision on an initial load needs the change log
        self._stop = Event()
        self._milvus: MilvusClient | None = None
        self._gpu: Gpu | None = None
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="index")

    def close(self) -> None:
        """Stop a running build at its next chunk, and wait for it."""
        self._stop.set()
        self._builder.shutdown(cancel_futures=True)

    def drop_unused(self) -> None:
        """Remove Milvus collections that belong to no index; call it once every collection has its index."""
        if self._milvus is not None:
            indexes = [state.index for state in self._states.values()]
            drop_stale_collections(
                self._milvus, self._store, {index.name for index in indexes if isinstance(index, MilvusIndex)}
            )

    def disconnect(self) -> None:
        """Close the connection to Milvus, after the last search."""
        if self._milvus is not None:
            self._milvus.close()

    def prepare(self) -> None:
        """Connect to the GPU or Milvus, and check that faiss applies filters. Must be called before everything else.

        Raises:
            StartupError: faiss ignores filters, or the configured GPU or Milvus is not available.
        """
        check_index_filters(8)
        if self._policy.milvus:
            self._milvus = connect_milvus(self._policy.milvus, self._policy.token)
        else:
            self._gpu = open_gpu(self._policy.device)

    def state(self, collection: Collection) -> IndexState | None:
        """The state of a collection's index, without updating it. Any thread may call this, but must not change it."""
        return self._states.get((collection.key, collection.space.space_id))

    def revisions(self) -> list[tuple[int, int]]:
        """For each collection, the revision up to which no index needs the change log any more. For any thread."""
        needed = list(self._loading.items())
        for place, state in list(self._states.items()):
            needed.append(
                (place, state.index.revision if state.pinned is None else min(state.pinned, state.index.revision))
            )
        least: dict[int, int] = {}
        for (key, _), revision in needed:
            least[key] = min(least.get(key, revision), revision)
        return list(least.items())

    def up_to_date(self, collection: Collection) -> IndexState:
        """A collection's index with all changes committed so far; builds it first if there is none.

        Raises:
            CollectionNotFoundError: it was deleted.
        """
        place = (collection.key, collection.space.space_id)
        state = self._states.get(place)
        reader = FeatureReader(self._store, collection, collection.space) if state is None else state.reader
        try:
            if state is None:
                self._loading[place] = reader.revision()
                state = self._states[place] = IndexState(self._initial_index(reader), reader)
            self._apply_changes(state)
        except CollectionNotFoundError:
            self.drop(collection)
            raise
        finally:
            self._loading.pop(place, None)
        self._rebuild_if_needed(state)
        return state

    def apply_changes(self, collection: Collection) -> None:
        """Apply committed changes to the collection's indexes in all spaces."""
        self.up_to_date(collection)
        for (key, _), state in list(self._states.items()):
            if key == collection.key:
                self._apply_changes(state)

    def drop(self, collection: Collection, space: Space | None = None) -> None:
        """Drop the indexes and files of a collection, in one space or in all."""
        for place in [place for place in self._states if place[0] == collection.key]:
            if space is None or place[1] == space.space_id:
                index = self._states.pop(place).index
                if isinstance(index, MilvusIndex):
                    index.drop()
        if self._policy.folder is not None:
            GraphFiles(self._policy.folder).delete(collection, space)

    def _initial_index(self, reader: FeatureReader) -> VectorIndex:
        """The index to start with: a scan, or Milvus."""
        if not self._policy.milvus:
            return self._attach_gpu(build_scan(reader, self._policy.kind_for(reader.count()), self._stop))
        assert self._milvus is not None  # `prepare` has connected
        index = MilvusIndex(self._milvus, reader)
        index.reconcile(self._stop)
        return index

    def _attach_gpu(self, index: VectorIndex) -> VectorIndex:
        """Scan a float16 index on the GPU, if there is one."""
        if self._gpu is not None and isinstance(index, HalfIndex):
            index.gpu = self._gpu.scan(index.codes)
        return index

    def _apply_changes(self, state: IndexState) -> None:
        reached = state.reader.revision()
        if state.index.revision == reached:
            return
        change = state.reader.changes(state.index.revision)
        state.index.remove(change.removed)
        if not state.index.add(change.added, change.features):  # keys between existing ones, from a migration
            log.info("index of %s is rebuilt: entries were added between older ones", state.reader.collection.name)
            state.index = self._initial_index(state.reader)
            return self._apply_changes(state)
        state.index.revision = change.revision

    def _rebuild_if_needed(self, state: IndexState) -> None:
        """Start a background build if the policy requires another kind or a rebuild."""
        index = state.index
        if self._policy.milvus or state.pinned is not None or time.monotonic() < state.retry_at_s:
            return
        kind = self._policy.kind_for(len(index), current=index.kind, requested=state.requested_kind)
        if kind != index.kind and len(index) < RETRY_GROWTH * state.refused_at:
            kind = cast(IndexKind, index.kind)
        if kind != index.kind or self._policy.rebuild_reason(index):
            self.rebuild(state, kind)

    def start_rebuild(self, collection: Collection, kind: str) -> Future[None]:
        """Start to rebuild a collection's index, on an operator's request.

        Args:
            collection: in its space.
            kind: of `IndexKind`; empty or ``auto`` = by size.

        Raises:
            InputError: no such kind, or an index is being built already.
        """
        if kind not in ("", "auto", *get_args(IndexKind)):
            raise InputError(
                f"an index is {', '.join(get_args(IndexKind))} or auto, found {kind!r}: leave it out for auto",
                field="index_type",
            )
        if self._policy.milvus:
            raise InputError(
                f"{collection.name} is searched by Milvus, which builds its own index: change it there",
                field="index_type",
            )
        state = self.up_to_date(collection)
        if state.pinned is not None:
            raise InputError(
                f"an index of {collection.name} is being built already: wait until it is done", field="collection_id"
            )
        state.requested_kind, state.refused_at = kind, 0
        return self.rebuild(state, self._policy.kind_for(len(state.index), current=state.index.kind, requested=kind))

    def rebuild(self, state: IndexState, kind: IndexKind) -> Future[None]:
        """Build an index in the background and replace the old one by it.

        Returns:
            Completes when the index was replaced; fails or is cancelled when the old one stays.
        """
        state.pinned = state.index.revision
        done: Future[None] = Future()

        def work() -> None:
            try:
                built = build_index(state.reader, kind, self._policy, self._stop)
            except Exception as error:
                self._owner(partial(self._failed, state, error, done))
            else:
                self._owner(partial(self._swap, state, built, done))

        self._builder.submit(work)
        return done

    def _swap(self, state: IndexState, built: BuiltIndex, done: Future[None]) -> None:
        old, state.index = state.index, self._attach_gpu(built.index)
        try:
            self._apply_changes(state)
        except Exception as error:
            state.index = old
            return self._failed(state, error, done)
        state.pinned, state.note, state.recall = None, built.note, SampledRecall()
        state.refused_at = len(built.index) if built.note else 0
        if built.note:
            log.warning("index of %s stays %s: %s", state.reader.collection.name, built.index.kind, built.note)
        done.set_result(None)

    def _failed(self, state: IndexState, error: Exception, done: Future[None]) -> None:
        state.pinned = None
        if not isinstance(error, ReIDError):
            log.error(
                "an index of %s could not be built; the old one serves", state.reader.collection.name, exc_info=error
            )
        state.retry_at_s = time.monotonic() + RETRY_S
        state.note = f"the rebuild failed: {error}"
        if isinstance(error, CollectionNotFoundError):
            self.drop(state.reader.collection)  # with the file that the build may have left
        if isinstance(error, UnavailableError) and self._stop.is_set():
            done.cancel()
        else:
            done.set_exception(error)
