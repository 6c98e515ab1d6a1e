"""Enrol, list, change and delete over the store: what callers ask of a gallery, checked and carried out.

Searching stands in `resight.service.searcher`, which follows the store's changes by itself. Writes of entries leave
their row in the audit in their own transaction.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import replace

from resight.errors import InputError, ReIDError, RevisionNotSearchableError
from resight.service import audited, changes, reads, writes
from resight.service.audit import Event
from resight.service.auth import Role, current
from resight.service.enrol import EnrolRequest, enrolled, enrolled_together
from resight.service.entries import Collection, Enrolled, Entry, Filter, Space
from resight.service.erasure import Erasure, erase_subject
from resight.service.features import Crops, FeatureMaker, Given, Made
from resight.service.ladder import ladder_of
from resight.service.lanes import Priority
from resight.service.models import ModelHost
from resight.service.ranked import RankedAnswer, Wanted, ranked
from resight.service.runtime import Feature
from resight.service.search_figures import SearchFigures
from resight.service.searcher import Searcher
from resight.service.settings import Settings
from resight.service.store import Store

NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
LOOK_AGAIN_S = 0.01  # for a write that is to come
ANSWER_S = 0.1  # kept of a deadline, at most a tenth, so that a refusal still arrives


class Gallery:
    """All collections of one tenant. `start` and `stop` it in the event loop.

    Args:
        store: the truth.
        models: make its features.
        settings: limits.
    """

    def __init__(self, store: Store, models: ModelHost, settings: Settings) -> None:
        self.searcher = Searcher(store, ladder_of(settings, store.folder), max_queue=settings.max_search_queue)
        self.figures = SearchFigures(store)
        self._store, self._models = store, models
        self._maker = FeatureMaker(models, settings)
        self._collections: dict[str, Collection] = {}  # as they stood after commit `_read_at`
        self._read_at = -1

    async def start(self) -> None:
        """Remember what the served model's similarities mean, and build the indexes from the store."""
        await self._store.book(writes.note_space, self.space)
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
        if not NAME.fullmatch(new.name):
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
        return await self._store.erase(changes.update_collection, new, fields, etag=etag)

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
        last = deadline - min(ANSWER_S, 0.1 * (deadline - time.monotonic()))
        while found.revision < revision:
            if time.monotonic() >= last:
                raise RevisionNotSearchableError(
                    f"collection {name} is at revision {found.revision}, the search was to wait for {revision}: allow "
                    "more time, or pass the revision that this collection's own write answered",
                    field="min_revision",
                    revision=found.revision,
                    min_revision=revision,
                )
            await asyncio.sleep(LOOK_AGAIN_S)
            found = await self.collection(name)
        return found

    async def collections(self, *, after: str, limit: int) -> list[Collection]:
        """Collections by name, from the one after ``after``."""
        return await self._store.read(reads.collections, after=after, limit=limit)

    async def counted(self, found: Sequence[Collection]) -> list[tuple[Collection, int]]:
        """Collections with the number of their living entries."""
        return await self._store.read(reads.counted, found)

    async def delete_collection(self, name: str, *, force: bool, etag: str) -> None:
        """Remove a collection and all it holds.

        Raises:
            CollectionNotFoundError: no such one.
            CollectionNotEmptyError: it has entries, and ``force`` is not set.
            ConflictError: it was changed since ``etag`` was read.
        """
        event = _event("DeleteCollection")
        gone = await self._store.erase(audited.delete_collection, name, event, force=force, etag=etag)
        self.searcher.drop(gone)

    async def enrol(
        self, name: str, requests: Sequence[EnrolRequest], deadline: float, *, method: str
    ) -> list[Enrolled | ReIDError]:
        """Enrol entries, each with its own outcome; see `resight.service.enrol`. Raises CollectionNotFoundError."""
        into = await self.collection(name)
        outcomes = await enrolled(self._store, self._maker, into, requests, deadline, _event(method))
        self.searcher.follow(into)
        return outcomes

    async def enrol_together(self, name: str, requests: Sequence[EnrolRequest], deadline: float) -> list[Enrolled]:
        """Enrol all entries or none. Raises CollectionNotFoundError, and what the first refused one was refused for."""
        into = await self.collection(name)
        event = _event("BatchEnrollEntries")
        done = await enrolled_together(self._store, self._maker, into, requests, deadline, event)
        self.searcher.follow(into)
        return done

    async def feature(
        self,
        of: Collection,
        source: Crops | Given,
        deadline: float,
        *,
        space: Space | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> Made:
        """The feature of a source, in a collection's space or another one; what cannot be decoded is left out."""
        return await self._maker.made(of, source, deadline, every=False, space=space, priority=priority)

    async def search(self, of: Collection, wanted: Sequence[Wanted], deadline: float) -> list[RankedAnswer]:
        """Answer searches of one collection, and count them; see `resight.service.ranked`."""
        answers = await ranked(self.searcher, of, wanted, deadline)
        self.figures.note(of, answers)
        return answers

    async def entry(self, name: str, entry_id: str, *, with_feature: bool) -> tuple[Collection, Entry, Feature | None]:
        """One entry; raises CollectionNotFoundError, EntryNotFoundError, StoreError."""
        found_in = await self.collection(name)
        key, found = await self._store.read(reads.entry, found_in, entry_id)
        feature = await self._store.read(reads.feature, key, found_in.space) if with_feature else None
        return found_in, found, feature

    async def entries(self, name: str, filters: Filter, *, after: int, limit: int) -> list[tuple[int, Entry]]:
        """Entries with their keys in order of enrolment, from the one after key ``after``."""
        found_in = await self.collection(name)
        return await self._store.read(reads.entries, found_in.key, filters, after=after, limit=limit)

    async def update_entry(self, name: str, new: Entry, fields: Sequence[str], *, etag: str) -> Enrolled:
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
            audited.update_entry, found_in, new, fields, event, etag=etag, may_outlive=operator
        )
        self.searcher.follow(found_in)
        return changed

    async def delete_entry(self, name: str, entry_id: str, *, allow_missing: bool, etag: str) -> int:
        """Remove an entry, its feature and crops; returns the revision. Raises EntryNotFoundError, ConflictError."""
        found_in = await self.collection(name)
        event = _event("DeleteEntry")
        revision = await self._store.erase(
            audited.delete_entry, found_in, entry_id, event, allow_missing=allow_missing, etag=etag
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
        deleted, revision = await self._store.erase(audited.delete_entries, found_in, filters, event, cap=cap)
        self.searcher.follow(found_in)
        return deleted, deleted, revision

    async def erase(self, collection: str, subject_id: str, *, reason: str, deadline: float) -> Erasure:
        """Erase a person for good; see `resight.service.erasure.erase_subject`."""
        done = await erase_subject(
            self._store,
            subject_id,
            principal=current().name,
            deadline=deadline - ANSWER_S,  # graphs on the disk hold numbers of entries, and no features
            collection=collection,
            reason=reason,
        )
        for touched in await self.collections(after="", limit=-1):
            self.searcher.follow(touched)
        return done


def may_outlive() -> bool:
    """Whether the caller may keep an entry beyond its collection's time to live."""
    return current().role >= Role.OPERATOR


def _event(method: str) -> Event:
    """A row of the audit for a call of this service that now runs."""
    return Event(current().name, f"GalleryService.{method}")


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
