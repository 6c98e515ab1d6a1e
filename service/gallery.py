"""Enrol, list, update and delete entries of a collection.

Enrolment turns requests into features and writes them, each with its own outcome, or all or none. Writes of entries
add their audit row in the same transaction. Searching is in `resight.service.search.searcher`, which follows the store.
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
from resight.service.search.ranking import RankedAnswer, SearchParams, run_search
from resight.service.search.searcher import Searcher
from resight.service.search.statistics import SearchStatistics
from resight.service.settings import Settings
from resight.service.storage import audit, reads, writes
from resight.service.storage.audit import AuditEvent
from resight.service.storage.erasure import ErasureResult, erase_subject
from resight.service.storage.store import Store
from resight.service.storage.writes import expiry_error


@dataclass(frozen=True)
class EnrolmentRequest:
    """One entry to enrol, with what its feature is made from.

    Attributes:
        may_outlive: it may expire later than the collection's time to live.
    """

    entry: EntryRecord
    source: CropSource | FeatureSource
    replace: bool = False
    request_id: str = ""
    digest: bytes = b""
    may_outlive: bool = True


async def enrol_each(
    store: Store,
    maker: FeatureExtractor,
    into: Collection,
    requests: Sequence[EnrolmentRequest],
    deadline: float,
    event: AuditEvent,
) -> list[Enrolled | ReIDError]:
    """Enrol entries in the order of the request; each has its own outcome, and one that is answered is on disk.

    Args:
        store: of the collection.
        maker: makes their features.
        into: the collection, as it was read a moment ago.
        requests: at most ``max_batch_items``.
        deadline: in `time.monotonic` seconds.
        event: of the call, for the audit.
    """
    made = await _make_enrolments(maker, into, requests, deadline)
    ready = [new for new in made if isinstance(new, Enrolment)]
    try:
        stored = iter(await store.write(audit.audited_enrol_each, into, ready, event))
    except ReIDError as error:  # no room, or a damaged database: nothing of this was stored
        return [error if isinstance(new, Enrolment) else new for new in made]
    return [next(stored) if isinstance(new, Enrolment) else new for new in made]


async def enrol_all(
    store: Store,
    maker: FeatureExtractor,
    into: Collection,
    requests: Sequence[EnrolmentRequest],
    deadline: float,
    event: AuditEvent,
) -> list[Enrolled]:
    """Enrol all entries or none, in one transaction; see `enrol_each`.

    Raises:
        ReIDError: of the first that cannot be enrolled; its ``item`` fact tells which.
    """
    made = await _make_enrolments(maker, into, requests, deadline)
    good: list[Enrolment] = []
    for number, new in enumerate(made):
        if isinstance(new, ReIDError):
            new.facts["item"] = str(number)
            raise new
        good.append(new)
    return await store.write(audit.audited_enrol_all, into, good, event)


async def _make_enrolments(
    maker: FeatureExtractor, into: Collection, requests: Sequence[EnrolmentRequest], deadline: float
) -> list[Enrolment | ReIDError]:
    """What is to be stored, or why it cannot be; given features are checked together, crops embedded at once."""
    given = iter(check_features([one.source for one in requests if isinstance(one.source, FeatureSource)], into))
    crops = [
        _embed_enrolment(maker, into, one, one.source, deadline)
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
    refused = [None if one.may_outlive else expiry_error(into, one.entry.expire_us, now) for one in requests]
    return [error or new for error, new in zip(refused, made, strict=True)]


async def _embed_enrolment(
    maker: FeatureExtractor, into: Collection, request: EnrolmentRequest, source: CropSource, deadline: float
) -> Enrolment | ReIDError:
    try:
        made = await maker.made(into, source, deadline, every=True, priority=Priority.ENROL)
        others = await maker.others(into, source, deadline)
    except ReIDError as error:
        return error
    if made.quality < into.min_quality:
        return QualityTooLowError(
            f"quality {made.quality:.3f} is below the {into.min_quality:.3f} that collection {into.name} asks for: "
            "enrol a larger, sharper or better lit crop",
            field=source.within,
            quality=f"{made.quality:.4f}",
            min_quality=f"{into.min_quality:.4f}",
        )
    new = _enrolment(request, made.feature, made.used)
    return replace(new, entry=replace(new.entry, quality=made.quality), crops=source.images, others=others)


def _enrolment(request: EnrolmentRequest, feature: Feature, shots: int) -> Enrolment:
    entry = replace(request.entry, entry_id=request.entry.entry_id or uuid4().hex, shot_count=shots)
    return Enrolment(entry, feature, (), request.replace, request.request_id, request.digest)


COLLECTION_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
POLL_S = 0.01  # for a write that is to come
REPLY_RESERVE_S = 0.1  # kept of a deadline, at most a tenth, so that a refusal still arrives


class Gallery:
    """All collections of one tenant. `start` and `stop` it in the event loop.

    Args:
        store: the truth.
        models: make its features.
        settings: limits.
    """

    def __init__(self, store: Store, models: ModelHost, settings: Settings) -> None:
        self.searcher = Searcher(store, index_policy(settings, store.folder), max_queue=settings.max_search_queue)
        self.figures = SearchStatistics(store)
        self._store, self._models = store, models
        self._maker = FeatureExtractor(models, settings)
        self._collections: dict[str, Collection] = {}  # as they stood after commit `_read_at`
        self._read_at = -1

    async def start(self) -> None:
        """Remember what the served model's similarities mean, and build the indexes from the store."""
        await self._store.write_unchecked(writes.save_space, self.space)
        await self.searcher.load(self.space.dim)
        await self.figures.start()

    async def stop(self) -> None:
        """End searching, and write what was counted of it; the store stays open."""
        self.searcher.close()
        await self.figures.stop()

    @property
    def space(self) -> Space:
        """Of the model that embeds now, and so of new collections that name none."""
        return self._models.active.space

    def space_of(self, model_id: str) -> Space:
        """Of a loaded model, empty = the one that embeds now. Raises ModelNotFoundError, ModelNotReadyError."""
        with self._models.lease(model_id) as model:
            return model.space

    async def create_collection(self, new: Collection, *, allow_unlimited: bool) -> Collection:
        """Make an empty collection of its space, that of a loaded model.

        Raises:
            InputError: a bad name or setting, or no time to live although unlimited retention was not asked for.
            CollectionExistsError: the name is taken.
        """
        if not COLLECTION_NAME.fullmatch(new.name):
            raise InputError(
                f"a collection's name is 1-63 of a-z, 0-9 and -, a letter first; found {new.name!r}",
                field="collection.collection_id",
            )
        if new.ttl_us is None and not allow_unlimited:
            raise InputError(
                "entries are people and must expire: set default_ttl, or allow_unlimited_retention to keep them",
                field="collection.default_ttl",
            )
        _check_thresholds(new)
        return await self._store.write(writes.create_collection, new)

    async def update_collection(self, new: Collection, fields: Sequence[str], *, etag: str) -> Collection:
        """Change a collection's settings.

        Raises:
            InputError: no field, one that cannot be changed, or a time to live taken away.
            CollectionNotFoundError: no such one.
            ConflictError: it was changed since ``etag`` was read.
        """
        found = await self.collection(new.name)
        if "ttl_us" in fields and new.ttl_us is None and found.ttl_us is not None:
            raise InputError(
                "entries are people and must expire: a collection with a default_ttl keeps one; give another",
                field="collection.default_ttl",
            )
        _check_thresholds(replace(found, **{name: getattr(new, name) for name in set(fields) & set(vars(new))}))
        return await self._store.erase(writes.update_collection, new, fields, etag=etag)

    async def collection(self, name: str) -> Collection:
        """One collection; raises CollectionNotFoundError. Read once between two commits, for every search asks."""
        commits = self._store.commits
        if commits != self._read_at:
            self._read_at, self._collections = commits, {}
        known = self._collections
        if name not in known:
            known[name] = await self._store.read(reads.collection, name)
        return known[name]

    async def collection_at(self, name: str, revision: int, deadline: float) -> Collection:
        """One collection, once a write of it is committed; a search that begins then finds it.

        Raises:
            CollectionNotFoundError: no such one.
            RevisionNotSearchableError: it was not before the deadline, in `time.monotonic` seconds.
        """
        found = await self.collection(name)
        last = deadline - min(REPLY_RESERVE_S, 0.1 * (deadline - time.monotonic()))
        while found.revision < revision:
            if time.monotonic() >= last:
                raise RevisionNotSearchableError(
                    f"collection {name} is at revision {found.revision}, the search was to wait for {revision}: allow "
                    "more time, or pass the revision that this collection's own write answered",
                    field="min_revision",
                    revision=found.revision,
                    min_revision=revision,
                )
            await asyncio.sleep(POLL_S)
            found = await self.collection(name)
        return found

    async def collections(self, *, after: str, limit: int) -> list[Collection]:
        """Collections by name, from the one after ``after``."""
        return await self._store.read(reads.collections, after=after, limit=limit)

    async def counted(self, found: Sequence[Collection]) -> list[tuple[Collection, int]]:
        """Collections with the number of their living entries."""
        return await self._store.read(reads.count_entries, found)

    async def delete_collection(self, name: str, *, force: bool, etag: str) -> None:
        """Remove a collection and all it holds.

        Raises:
            CollectionNotFoundError: no such one.
            CollectionNotEmptyError: it has entries, and ``force`` is not set.
            ConflictError: it was changed since ``etag`` was read.
        """
        event = _event("DeleteCollection")
        gone = await self._store.erase(audit.audited_delete_collection, name, event, force=force, etag=etag)
        self.searcher.drop(gone)

    async def enrol(
        self, name: str, requests: Sequence[EnrolmentRequest], deadline: float, *, method: str
    ) -> list[Enrolled | ReIDError]:
        """Enrol entries, each with its own outcome; see `resight.service.gallery`. Raises CollectionNotFoundError."""
        into = await self.collection(name)
        outcomes = await enrol_each(self._store, self._maker, into, requests, deadline, _event(method))
        self.searcher.follow(into)
        return outcomes

    async def enrol_together(self, name: str, requests: Sequence[EnrolmentRequest], deadline: float) -> list[Enrolled]:
        """Enrol all entries or none. Raises CollectionNotFoundError, and what the first refused one was refused for."""
        into = await self.collection(name)
        event = _event("BatchEnrollEntries")
        done = await enrol_all(self._store, self._maker, into, requests, deadline, event)
        self.searcher.follow(into)
        return done

    async def feature(
        self,
        of: Collection,
        source: CropSource | FeatureSource,
        deadline: float,
        *,
        space: Space | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> FeatureResult:
        """The feature of a source, in a collection's space or another one; what cannot be decoded is left out."""
        return await self._maker.made(of, source, deadline, every=False, space=space, priority=priority)

    async def search(self, of: Collection, wanted: Sequence[SearchParams], deadline: float) -> list[RankedAnswer]:
        """Answer searches of one collection, and count them; see `resight.service.search.ranking`."""
        answers = await run_search(self.searcher, of, wanted, deadline)
        self.figures.note(of, answers)
        return answers

    async def entry(
        self, name: str, entry_id: str, *, with_feature: bool
    ) -> tuple[Collection, EntryRecord, Feature | None]:
        """One entry; raises CollectionNotFoundError, EntryNotFoundError, StoreError."""
        found_in = await self.collection(name)
        key, found = await self._store.read(reads.entry, found_in, entry_id)
        feature = await self._store.read(reads.feature, key, found_in.space) if with_feature else None
        return found_in, found, feature

    async def entries(self, name: str, filters: Filter, *, after: int, limit: int) -> list[tuple[int, EntryRecord]]:
        """Entries with their keys in order of enrolment, from the one after key ``after``."""
        found_in = await self.collection(name)
        return await self._store.read(reads.entries, found_in.key, filters, after=after, limit=limit)

    async def update_entry(self, name: str, new: EntryRecord, fields: Sequence[str], *, etag: str) -> Enrolled:
        """Change what is told of an entry.

        Raises:
            EntryNotFoundError: no such one.
            ConflictError: it was changed since ``etag`` was read.
            InputError: no field, one that cannot be changed, or a time beyond the collection's that only an operator
                may set.
        """
        found_in = await self.collection(name)
        event, operator = _event("UpdateEntry"), may_outlive()
        changed = await self._store.erase(
            audit.audited_update_entry, found_in, new, fields, event, etag=etag, may_outlive=operator
        )
        self.searcher.follow(found_in)
        return changed

    async def delete_entry(self, name: str, entry_id: str, *, allow_missing: bool, etag: str) -> int:
        """Remove an entry, its feature and crops; returns the revision. Raises EntryNotFoundError, ConflictError."""
        found_in = await self.collection(name)
        event = _event("DeleteEntry")
        revision = await self._store.erase(
            audit.audited_delete_entry, found_in, entry_id, event, allow_missing=allow_missing, etag=etag
        )
        self.searcher.follow(found_in)
        return revision

    async def delete_entries(
        self, name: str, filters: Filter, *, validate_only: bool, cap: int | None
    ) -> tuple[int, int, int]:
        """Remove what passes a filter; returns matched, deleted and revision.

        Raises:
            InputError: the filter is empty; DeleteCollection is for that.
            DeleteCapError: more than ``cap`` would go.
        """
        if filters == Filter():
            raise InputError(
                "an empty filter would delete every entry: set the filter, or delete the collection", field="filter"
            )
        found_in = await self.collection(name)
        if validate_only:
            matched = await self._store.read(reads.count, found_in.key, filters)
            return matched, 0, found_in.revision
        event = _event("DeleteEntries")
        deleted, revision = await self._store.erase(audit.audited_delete_entries, found_in, filters, event, cap=cap)
        self.searcher.follow(found_in)
        return deleted, deleted, revision

    async def erase(self, collection: str, subject_id: str, *, reason: str, deadline: float) -> ErasureResult:
        """Erase a person for good; see `resight.service.storage.erasure.erase_subject`."""
        done = await erase_subject(
            self._store,
            subject_id,
            principal=current().name,
            deadline=deadline - REPLY_RESERVE_S,  # graphs on the disk hold numbers of entries, and no features
            collection=collection,
            reason=reason,
        )
        for touched in await self.collections(after="", limit=-1):
            self.searcher.follow(touched)
        return done


def may_outlive() -> bool:
    """Whether the caller may keep an entry beyond its collection's time to live."""
    return current().role >= Role.OPERATOR


def _event(method: str) -> AuditEvent:
    """A row of the audit for a call of this service that now runs."""
    return AuditEvent(current().name, f"GalleryService.{method}")


def _check_thresholds(new: Collection) -> None:
    """Refuse a collection that would call unknown what it calls a match.

    Raises:
        InputError: the threshold to reject lies above the one to accept.
    """
    calibration = new.space.calibration
    accept = new.accept_probability or (calibration.accept if calibration else 1.0)
    reject = new.reject_probability or (calibration.reject if calibration else 0.0)
    if reject > accept:
        raise InputError(
            f"reject_probability {reject:g} is above accept_probability {accept:g} (0 = the calibration's own): lower "
            "the first or raise the second",
            field="collection.reject_probability",
        )
