"""The gallery of one tenant: its collections, and enrolment, update, deletion and search of their entries.

Enrolment computes features and stores them, either entry by entry or all in one transaction. Every write of entries
adds its audit row in the same transaction. `resight.service.search.searcher` keeps the indexes up to date with the
store.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from uuid import uuid4

from resight.arrays import Feature
from resight.errors import InputError, QualityTooLowError, ReIDError, RevisionNotSearchableError
from resight.service.access.auth import Role, current
from resight.service.index.base import index_policy
from resight.service.inference.features import (
    CropSource,
    FeatureExtractor,
    FeatureResult,
    FeatureSource,
    check_features,
)
from resight.service.inference.models import ModelHost
from resight.service.inference.priority_queue import Priority
from resight.service.records import Collection, Enrolled, Enrolment, EntryRecord, Filter, Space, now_us
from resight.service.search.ranking import RankedResult, SearchParams, run_search
from resight.service.search.searcher import Searcher
from resight.service.search.statistics import StatisticsRecorder
from resight.service.settings import Settings
from resight.service.storage import audit, reads, writes
from resight.service.storage.audit import AuditEvent
from resight.service.storage.erasure import ErasureResult, erase_subject
from resight.service.storage.store import Store
from resight.service.storage.writes import expiry_error


@dataclass(frozen=True)
class EnrolmentRequest:
    """One entry to enrol, and the source of its feature.

    Attributes:
        may_outlive: whether it may expire later than the collection's time to live allows.
    """

    entry: EntryRecord
    source: CropSource | FeatureSource
    replace: bool = False
    request_id: str = ""
    digest: bytes = b""
    may_outlive: bool = True


async def enrol_each(
    store: Store,
    extractor: FeatureExtractor,
    collection: Collection,
    requests: Sequence[EnrolmentRequest],
    deadline: float,
    event: AuditEvent,
) -> list[Enrolled | ReIDError]:
    """Enrol entries in the order of the requests; each has its own outcome, and a returned `Enrolled` is committed.

    Args:
        store: of the collection.
        extractor: computes the features.
        collection: as it was just read.
        requests: at most ``max_batch_items``.
        deadline: in `time.monotonic` seconds.
        event: audit event of the call.
    """
    made = await _make_enrolments(extractor, collection, requests, deadline)
    ready = [new for new in made if isinstance(new, Enrolment)]
    try:
        stored = iter(await store.write(audit.audited_enrol_each, collection, ready, event))
    except ReIDError as error:  # disk full or database damaged: nothing was stored
        return [error if isinstance(new, Enrolment) else new for new in made]
    return [next(stored) if isinstance(new, Enrolment) else new for new in made]


async def enrol_all(
    store: Store,
    extractor: FeatureExtractor,
    collection: Collection,
    requests: Sequence[EnrolmentRequest],
    deadline: float,
    event: AuditEvent,
) -> list[Enrolled]:
    """Enrol all entries or none, in one transaction; see `enrol_each`.

    Raises:
        ReIDError: of the first entry that cannot be enrolled; its ``item`` fact is the index of that entry.
    """
    made = await _make_enrolments(extractor, collection, requests, deadline)
    good: list[Enrolment] = []
    for number, new in enumerate(made):
        if isinstance(new, ReIDError):
            new.facts["item"] = str(number)
            raise new
        good.append(new)
    return await store.write(audit.audited_enrol_all, collection, good, event)


async def _make_enrolments(
    extractor: FeatureExtractor, collection: Collection, requests: Sequence[EnrolmentRequest], deadline: float
) -> list[Enrolment | ReIDError]:
    """Features or errors of all requests: sent features are checked together, crops are embedded concurrently."""
    given = iter(check_features([one.source for one in requests if isinstance(one.source, FeatureSource)], collection))
    crops = [
        _embed_enrolment(extractor, collection, one, one.source, deadline)
        for one in requests
        if isinstance(one.source, CropSource)
    ]
    embedded = iter(await asyncio.gather(*crops))
    made: list[Enrolment | ReIDError] = []
    for one in requests:
        if isinstance(one.source, CropSource):
            made.append(next(embedded))
            continue
        feature = next(given)
        made.append(feature if isinstance(feature, ReIDError) else _enrolment(one, feature, 0))
    now = now_us()
    expiry_errors = [
        None if one.may_outlive else expiry_error(collection, one.entry.expire_us, now) for one in requests
    ]
    return [error or new for error, new in zip(expiry_errors, made, strict=True)]


async def _embed_enrolment(
    extractor: FeatureExtractor,
    collection: Collection,
    request: EnrolmentRequest,
    source: CropSource,
    deadline: float,
) -> Enrolment | ReIDError:
    try:
        made = await extractor.extract(collection, source, deadline, every=True, priority=Priority.ENROL)
        others = await extractor.extract_other_spaces(collection, source, deadline)
    except ReIDError as error:
        return error
    if made.quality < collection.min_quality:
        return QualityTooLowError(
            f"quality {made.quality:.3f} is below min_quality {collection.min_quality:.3f} of collection "
            f"{collection.name}: enrol a larger, sharper or better lit crop",
            field=source.within,
            quality=f"{made.quality:.4f}",
            min_quality=f"{collection.min_quality:.4f}",
        )
    new = _enrolment(request, made.feature, made.used)
    return replace(new, entry=replace(new.entry, quality=made.quality), crops=source.images, others=others)


def _enrolment(request: EnrolmentRequest, feature: Feature, shots: int) -> Enrolment:
    entry = replace(request.entry, entry_id=request.entry.entry_id or uuid4().hex, shot_count=shots)
    return Enrolment(entry, feature, (), request.replace, request.request_id, request.digest)


COLLECTION_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
POLL_S = 0.01  # while waiting for a revision
REPLY_RESERVE_S = 0.1  # reserved at the end of a deadline (at most a tenth of it), so that the error response arrives


class Gallery:
    """All collections of one tenant. `start` and `stop` it in the event loop.

    Args:
        store: of the tenant.
        models: compute its features.
        settings: of the server.
    """

    def __init__(self, store: Store, models: ModelHost, settings: Settings) -> None:
        self.searcher = Searcher(store, index_policy(settings, store.folder), max_queue=settings.max_search_queue)
        self.statistics = StatisticsRecorder(store)
        self._store, self._models = store, models
        self._extractor = FeatureExtractor(models, settings)
        self._collections: dict[str, Collection] = {}  # as of commit `_read_at`
        self._read_at = -1

    async def start(self) -> None:
        """Store the active model's space and calibration, and build the indexes from the store."""
        await self._store.write_unchecked(writes.save_space, self.space)
        await self.searcher.load(self.space.dim)
        await self.statistics.start()

    async def stop(self) -> None:
        """Close the searcher and flush its statistics; the store stays open."""
        self.searcher.close()
        await self.statistics.stop()

    @property
    def space(self) -> Space:
        """The active model's space, which is the default of new collections."""
        return self._models.active.space

    def space_of(self, model_id: str) -> Space:
        """The space of a loaded model; empty = the active one. Raises ModelNotFoundError, ModelNotReadyError."""
        with self._models.lease(model_id) as model:
            return model.space

    async def create_collection(self, new: Collection, *, allow_unlimited: bool) -> Collection:
        """Create an empty collection in ``new.space``, the space of a loaded model.

        Raises:
            InputError: an invalid name or setting, or neither a time to live nor ``allow_unlimited``.
            CollectionExistsError: the name is taken.
        """
        if not COLLECTION_NAME.fullmatch(new.name):
            raise InputError(
                f"a collection name has 1-63 characters a-z, 0-9 and -, and starts with a letter; found {new.name!r}",
                field="collection.collection_id",
            )
        if new.ttl_us is None and not allow_unlimited:
            raise InputError(
                "entries are personal data and must expire: set default_ttl, or allow_unlimited_retention to keep them",
                field="collection.default_ttl",
            )
        _check_thresholds(new)
        return await self._store.write(writes.create_collection, new)

    async def update_collection(self, new: Collection, fields: Sequence[str], *, etag: str) -> Collection:
        """Change a collection's settings.

        Raises:
            InputError: no field, one that cannot be changed, or the time to live is removed.
            CollectionNotFoundError: there is no such collection.
            ConflictError: it was changed since ``etag`` was read.
        """
        found = await self.collection(new.name)
        if "ttl_us" in fields and new.ttl_us is None and found.ttl_us is not None:
            raise InputError(
                "entries are personal data and must expire: default_ttl can be changed but not removed",
                field="collection.default_ttl",
            )
        _check_thresholds(replace(found, **{name: getattr(new, name) for name in set(fields) & set(vars(new))}))
        return await self._store.erase(writes.update_collection, new, fields, etag=etag)

    async def collection(self, name: str) -> Collection:
        """One collection; raises CollectionNotFoundError. Cached until the next commit, as every search needs it."""
        commits = self._store.commits
        if commits != self._read_at:
            self._read_at, self._collections = commits, {}
        cached = self._collections
        if name not in cached:
            cached[name] = await self._store.read(reads.collection, name)
        return cached[name]

    async def collection_at(self, name: str, revision: int, deadline: float) -> Collection:
        """Wait until a revision of a collection is committed, so that a search that begins then includes it.

        Raises:
            CollectionNotFoundError: there is no such collection.
            RevisionNotSearchableError: it was not committed before the deadline, in `time.monotonic` seconds.
        """
        found = await self.collection(name)
        last = deadline - min(REPLY_RESERVE_S, 0.1 * (deadline - time.monotonic()))
        while found.revision < revision:
            if time.monotonic() >= last:
                raise RevisionNotSearchableError(
                    f"collection {name} is at revision {found.revision}, the search requires {revision}: allow more "
                    "time, or pass the revision that a write to this collection returned",
                    field="min_revision",
                    revision=found.revision,
                    min_revision=revision,
                )
            await asyncio.sleep(POLL_S)
            found = await self.collection(name)
        return found

    async def collections(self, *, after: str, limit: int) -> list[Collection]:
        """Collections sorted by name, starting after ``after``."""
        return await self._store.read(reads.collections, after=after, limit=limit)

    async def with_entry_counts(self, collections: Sequence[Collection]) -> list[tuple[Collection, int]]:
        """Collections, each with the number of its live entries."""
        return await self._store.read(reads.count_entries, collections)

    async def delete_collection(self, name: str, *, force: bool, etag: str) -> None:
        """Delete a collection with all its entries.

        Raises:
            CollectionNotFoundError: there is no such collection.
            CollectionNotEmptyError: it has entries, and ``force`` is not set.
            ConflictError: it was changed since ``etag`` was read.
        """
        event = _event("DeleteCollection")
        deleted = await self._store.erase(audit.audited_delete_collection, name, event, force=force, etag=etag)
        self.searcher.drop(deleted)

    async def enrol(
        self, name: str, requests: Sequence[EnrolmentRequest], deadline: float, *, method: str
    ) -> list[Enrolled | ReIDError]:
        """Enrol entries, each with its own outcome; see `enrol_each`. Raises CollectionNotFoundError."""
        collection = await self.collection(name)
        outcomes = await enrol_each(self._store, self._extractor, collection, requests, deadline, _event(method))
        self.searcher.schedule_update(collection)
        return outcomes

    async def enrol_atomic(self, name: str, requests: Sequence[EnrolmentRequest], deadline: float) -> list[Enrolled]:
        """Enrol all entries or none; see `enrol_all`. Raises CollectionNotFoundError and the first entry's error."""
        collection = await self.collection(name)
        event = _event("BatchEnrollEntries")
        done = await enrol_all(self._store, self._extractor, collection, requests, deadline, event)
        self.searcher.schedule_update(collection)
        return done

    async def extract_feature(
        self,
        collection: Collection,
        source: CropSource | FeatureSource,
        deadline: float,
        *,
        space: Space | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> FeatureResult:
        """The feature of a source, in ``space`` (None = the collection's); undecodable crops are left out."""
        return await self._extractor.extract(collection, source, deadline, every=False, space=space, priority=priority)

    async def search(
        self, collection: Collection, searches: Sequence[SearchParams], deadline: float
    ) -> list[RankedResult]:
        """Run searches of one collection and count them; see `resight.service.search.ranking`."""
        results = await run_search(self.searcher, collection, searches, deadline)
        self.statistics.record(collection, results)
        return results

    async def entry(
        self, name: str, entry_id: str, *, with_feature: bool
    ) -> tuple[Collection, EntryRecord, Feature | None]:
        """One entry; raises CollectionNotFoundError, EntryNotFoundError, StoreError."""
        collection = await self.collection(name)
        key, found = await self._store.read(reads.entry, collection, entry_id)
        feature = await self._store.read(reads.feature, key, collection.space) if with_feature else None
        return collection, found, feature

    async def entries(self, name: str, filters: Filter, *, after: int, limit: int) -> list[tuple[int, EntryRecord]]:
        """Entries with their keys in order of enrolment, starting after key ``after``."""
        collection = await self.collection(name)
        return await self._store.read(reads.entries, collection.key, filters, after=after, limit=limit)

    async def update_entry(self, name: str, new: EntryRecord, fields: Sequence[str], *, etag: str) -> Enrolled:
        """Change the metadata of an entry.

        Raises:
            EntryNotFoundError: there is no such entry.
            ConflictError: it was changed since ``etag`` was read.
            InputError: no field, one that cannot be changed, or an expiry beyond the collection's time to live,
                which only an operator may set.
        """
        collection = await self.collection(name)
        event = _event("UpdateEntry")
        changed = await self._store.erase(
            audit.audited_update_entry, collection, new, fields, event, etag=etag, may_outlive=may_outlive()
        )
        self.searcher.schedule_update(collection)
        return changed

    async def delete_entry(self, name: str, entry_id: str, *, allow_missing: bool, etag: str) -> int:
        """Delete an entry, its features and crops; returns the revision. Raises EntryNotFoundError, ConflictError."""
        collection = await self.collection(name)
        event = _event("DeleteEntry")
        revision = await self._store.erase(
            audit.audited_delete_entry, collection, entry_id, event, allow_missing=allow_missing, etag=etag
        )
        self.searcher.schedule_update(collection)
        return revision

    async def delete_entries(
        self, name: str, filters: Filter, *, validate_only: bool, cap: int | None
    ) -> tuple[int, int, int]:
        """Delete the entries that match a filter; returns matched, deleted and revision.

        Raises:
            InputError: the filter is empty.
            DeleteCapError: more than ``cap`` entries match.
        """
        if filters == Filter():
            raise InputError(
                "an empty filter would delete every entry: set the filter, or delete the collection", field="filter"
            )
        collection = await self.collection(name)
        if validate_only:
            matched = await self._store.read(reads.count, collection.key, filters)
            return matched, 0, collection.revision
        event = _event("DeleteEntries")
        deleted, revision = await self._store.erase(audit.audited_delete_entries, collection, filters, event, cap=cap)
        self.searcher.schedule_update(collection)
        return deleted, deleted, revision

    async def erase(self, collection: str, subject_id: str, *, reason: str, deadline: float) -> ErasureResult:
        """Erase a person; see `resight.service.storage.erasure.erase_subject`."""
        result = await erase_subject(
            self._store,
            subject_id,
            principal=current().name,
            deadline=deadline - REPLY_RESERVE_S,  # HNSW files contain entry keys but no features
            collection=collection,
            reason=reason,
        )
        for one in await self.collections(after="", limit=-1):
            self.searcher.schedule_update(one)
        return result


def may_outlive() -> bool:
    """Whether the caller may set an expiry beyond the collection's time to live."""
    return current().role >= Role.OPERATOR


def _event(method: str) -> AuditEvent:
    """The audit event of the current call."""
    return AuditEvent(current().name, f"GalleryService.{method}")


def _check_thresholds(new: Collection) -> None:
    """Check that the reject threshold is not above the accept threshold.

    Raises:
        InputError: it is.
    """
    calibration = new.space.calibration
    accept = new.accept_probability or (calibration.accept if calibration else 1.0)
    reject = new.reject_probability or (calibration.reject if calibration else 0.0)
    if reject > accept:
        raise InputError(
            f"reject_probability {reject:g} is above accept_probability {accept:g} (0 = the calibration's threshold): "
            "lower the first or raise the second",
            field="collection.reject_probability",
        )
