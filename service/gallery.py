"""Enrol, list and delete over the store: what callers ask of a gallery, checked and carried out.

Searching stands in `resight.service.searcher`, which follows the store's changes by itself.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from uuid import uuid4

import numpy as np

from resight.errors import InputError, LimitError, ReIDError, SpaceMismatchError
from resight.service import reads, writes
from resight.service.embedder import Embedded, Timings, all_embedded, combined
from resight.service.entries import Collection, Enrolled, Enrolment, Entry, Filter, Space
from resight.service.ladder import ladder_of
from resight.service.lanes import Priority
from resight.service.models import ModelHost
from resight.service.runtime import Feature
from resight.service.searcher import Searcher
from resight.service.settings import Settings
from resight.service.store import Store

NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
MAX_PAGE, DEFAULT_PAGE = 1000, 100


@dataclass(frozen=True)
class Crops:
    """A source of a feature: one or more crops of one person, and what the request calls each."""

    images: tuple[bytes, ...]
    fields: tuple[str, ...]


@dataclass(frozen=True)
class Given:
    """A source of a feature: the caller's own, as little-endian float32 bytes."""

    float32_le: bytes
    space_id: str


@dataclass(frozen=True)
class EnrolRequest:
    """One entry to enrol, with what its feature is made from."""

    entry: Entry
    source: Crops | Given
    replace: bool = False
    request_id: str = ""
    digest: bytes = b""


class Gallery:
    """All collections of one data folder. `start` and `stop` it in the event loop."""

    def __init__(self, store: Store, models: ModelHost, settings: Settings) -> None:
        self.searcher = Searcher(store, ladder_of(settings, store.folder), max_queue=settings.max_search_queue)
        self._store, self._models, self._settings = store, models, settings

    @property
    def space(self) -> Space:
        """Of the model that embeds now, and so of new collections."""
        return self._models.active.space

    async def start(self) -> None:
        """Remember what the served model's similarities mean, and build the indexes from the store."""
        await self._store.book(writes.note_space, self.space)
        await self.searcher.load(self.space.dim)

    async def stop(self) -> None:
        """End searching; the store stays open."""
        self.searcher.close()

    async def create_collection(self, new: Collection, *, allow_unlimited: bool) -> Collection:
        """Make an empty collection of the served model's space.

        Raises:
            InputError: a bad name, or no time to live although unlimited retention was not asked for.
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
        if new.ttl_us is not None and new.ttl_us <= 0:
            raise InputError(
                f"default_ttl must be positive, found {new.ttl_us / 1e6} s", field="collection.default_ttl"
            )
        return await self._store.write(writes.create_collection, replace(new, space=self.space))

    async def collection(self, name: str) -> Collection:
        """One collection; raises CollectionNotFoundError."""
        return await self._store.read(reads.collection, name)

    async def collections(self, *, after: str, limit: int) -> list[Collection]:
        """Collections by name, from the one after ``after``."""
        return await self._store.read(reads.collections, after=after, limit=limit)

    async def counted(self, found: Sequence[Collection]) -> list[tuple[Collection, int]]:
        """Collections with the number of their living entries."""
        return await self._store.read(reads.counted, found)

    async def delete_collection(self, name: str, *, force: bool) -> None:
        """Remove a collection and all it holds; raises CollectionNotFoundError, CollectionNotEmptyError."""
        gone = await self._store.erase(writes.delete_collection, name, force=force)
        self.searcher.drop(gone)

    async def enrol(self, name: str, requests: Sequence[EnrolRequest], deadline: float) -> list[Enrolled | ReIDError]:
        """Enrol entries; each has its own outcome, and one that is answered is on disk.

        Args:
            name: of the collection.
            requests: at most ``max_batch_items``.
            deadline: in `time.monotonic` seconds.

        Raises:
            CollectionNotFoundError: no such collection.
        """
        into = await self.collection(name)
        made = await asyncio.gather(*(self._made(into, request, deadline) for request in requests))
        outcomes = await self._stored(into, made)
        self.searcher.follow(into)
        return outcomes

    async def _made(self, into: Collection, request: EnrolRequest, deadline: float) -> Enrolment | ReIDError:
        try:
            made = await self.feature(into, request.source, deadline, priority=Priority.ENROL)
            others = await self._others(into, request.source, deadline)
        except ReIDError as error:
            return error
        crops = request.source.images if isinstance(request.source, Crops) else ()
        entry = replace(request.entry, entry_id=request.entry.entry_id or uuid4().hex, shot_count=len(crops))
        if crops:
            entry = replace(entry, quality=made.quality)
        return Enrolment(entry, made.feature, crops, request.replace, request.request_id, request.digest, others)

    async def _others(
        self, into: Collection, source: Crops | Given, deadline: float
    ) -> tuple[tuple[str, Feature], ...]:
        """Features in the collection's other spaces, as far as their models are loaded.

        What is left out a migration fills in, or the switch back refuses.
        """
        if isinstance(source, Given):
            return ()
        made = []
        for space_id in into.other_space_ids:
            if model := self._models.in_space(space_id):
                one = await self.feature(into, source, deadline, space=model.space, priority=Priority.ENROL)
                made.append((space_id, one.feature))
        return tuple(made)

    async def _stored(self, into: Collection, made: Sequence[Enrolment | ReIDError]) -> list[Enrolled | ReIDError]:
        """Store what has a feature, in the order of the request, which so is the order of enrolment."""
        ready = [new for new in made if isinstance(new, Enrolment)]
        try:
            stored = iter(await self._store.write(writes.enrol_each, into, ready))
        except ReIDError as error:  # no room, or a damaged database: nothing of this was stored
            return [error if isinstance(new, Enrolment) else new for new in made]
        return [next(stored) if isinstance(new, Enrolment) else new for new in made]

    async def feature(
        self,
        of: Collection,
        source: Crops | Given,
        deadline: float,
        *,
        space: Space | None = None,
        priority: Priority = Priority.INTERACTIVE,
    ) -> Embedded:
        """The feature of a source, in a collection's space or another one.

        Raises:
            SpaceMismatchError: the model, or the given feature, is of another space.
            InputError: a bad feature or image.
            LimitError: too many shots.
        """
        if isinstance(source, Given):
            return Embedded(given_feature(source, of), 0.0, Timings())
        if not 1 <= len(source.images) <= self._settings.max_shots:
            raise LimitError(
                f"1 to {self._settings.max_shots} shots make a feature, found {len(source.images)}: send the best ones",
                field="shots.images",
                max_shots=self._settings.max_shots,
            )
        with self._models.lease_space(space or of.space, collection=of.name) as model:
            outcomes = await model.embed(source.images, deadline, priority=priority)
        return combined(all_embedded(outcomes, source.fields))

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

    async def delete_entry(self, name: str, entry_id: str, *, allow_missing: bool) -> int:
        """Remove an entry, its feature and crops; returns the revision. Raises EntryNotFoundError."""
        found_in = await self.collection(name)
        revision = await self._store.erase(writes.delete_entry, found_in, entry_id, allow_missing=allow_missing)
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
        deleted, revision = await self._store.erase(writes.delete_entries, found_in, filters, cap=cap)
        self.searcher.follow(found_in)
        return deleted, deleted, revision


def given_feature(source: Given, of: Collection) -> Feature:
    """Check a caller's feature and bring it to unit length: float32 (D,).

    Raises:
        SpaceMismatchError: of another space than the collection.
        InputError: wrong length, not finite, or zero.
    """
    if source.space_id != of.space.space_id:
        raise SpaceMismatchError(
            f"collection {of.name} holds features of space {of.space.space_id}, the given one says "
            f"{source.space_id or 'nothing'}: embed the crop with that model",
            field="embedding.space_id",
            expected_space_id=of.space.space_id,
            found_space_id=source.space_id,
        )
    if len(source.float32_le) != 4 * of.space.dim:
        raise InputError(
            f"a feature of this space is {of.space.dim} float32 in {4 * of.space.dim} bytes, found "
            f"{len(source.float32_le)} bytes: send all of it, little-endian",
            field="embedding.float32_le",
            expected_bytes=4 * of.space.dim,
            found_bytes=len(source.float32_le),
        )
    feature = np.frombuffer(source.float32_le, "<f4").astype(np.float32)
    length = float(np.linalg.norm(feature.astype(np.float64)))
    if not np.isfinite(length) or length < 1e-12:
        raise InputError(
            f"a feature needs finite numbers and a length above 0, found length {length}", field="embedding.float32_le"
        )
    unit: Feature = (feature / length).astype(np.float32)
    return unit
