"""Moves a collection to another model's space while it is searched in the old one.

From its start, new entries are written to both spaces. Old entries are embedded again from their stored crops, in order
of enrolment and only while the model is otherwise idle; every batch is committed, so it continues after a crash.
Progress is never counted, only read back: an entry is missing while it has no feature in the new space. Then the index
of the new space is built, the gate is checked, and one write switches; the way back is the same write. The gate passes
if every entry has a feature in the new space (or was dropped by policy) and the collection's tracks find themselves
there as before, within `MARGIN`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np

from resight.arrays import Feature
from resight.errors import (
    ConflictError,
    CropsMissingError,
    InputError,
    MigrationError,
    OverloadedError,
    ReIDError,
)
from resight.service.inference.features import CropSource
from resight.service.inference.models import LoadedModel, ModelHost
from resight.service.inference.priority_queue import Priority
from resight.service.records import Collection, Space
from resight.service.storage import reads, spaces
from resight.service.storage.operations import MAX_KEPT, Operation, OperationState, finish
from resight.service.storage.writes import add_feature
from resight.service.tenants import Tenant, Tenants

SEEKERS, SOUGHT_AMONG = 500, 4000  # entries whose track is looked for, and among how many: 4 ms of one core at 512-d
MARGIN = 0.05  # two standard errors of a share of about one half among 500


def begin_backfill(
    connection: sqlite3.Connection, name: str, space: Space, *, drop_missing: bool
) -> tuple[Collection, int]:
    """Write new entries to a space from now on; returns the collection and how many entries wait for a feature there.

    Raises:
        CollectionNotFoundError: no such collection.
        CropsMissingError: entries have no stored crop to embed, and ``drop_missing`` is not set.
        InputError: it is the space searched now.
    """
    found = reads.collection(connection, name)
    lacking = count_without_crops(connection, found.key, space.space_id)
    if lacking and not drop_missing:
        raise CropsMissingError(
            f"{lacking} entries of collection {name} have no stored crop, so they cannot be embedded anew: enrol them "
            "in a new collection, or let them be absent from the new space with MISSING_CROP_POLICY_DROP",
            field="missing_crops",
            entries=lacking,
        )
    return spaces.begin_space(connection, name, space), backfill_counts(connection, found.key, space.space_id)[0]


def count_without_crops(connection: sqlite3.Connection, key: int, space_id: str) -> int:
    """How many entries have neither a feature in a space nor a crop to make it from."""
    row = connection.execute(
        "SELECT count(*) FROM entry e WHERE e.collection = ?1 AND NOT EXISTS (SELECT 1 FROM feature f WHERE "
        "f.entry = e.key AND f.space_id = ?2) AND NOT EXISTS (SELECT 1 FROM crop c WHERE c.entry = e.key)",
        (key, space_id),
    )
    return int(row.fetchone()[0])


def backfill_counts(connection: sqlite3.Connection, key: int, space_id: str) -> tuple[int, int]:
    """Entries of a collection, and those that have a feature in a space: read, not remembered."""
    row = connection.execute(
        "SELECT count(*), count(f.entry) FROM entry e LEFT JOIN feature f ON f.entry = e.key AND f.space_id = ?2 "
        "WHERE e.collection = ?1",
        (key, space_id),
    ).fetchone()
    return int(row[0]), int(row[1])


def store_features(
    connection: sqlite3.Connection, key: int, space_id: str, made: Sequence[tuple[int, Feature]]
) -> bool:
    """Store features of entries that are still there and have none yet; False when the space was dropped meanwhile."""
    there = connection.execute(
        "SELECT 1 FROM collection_space WHERE collection = ? AND space_id = ?", (key, space_id)
    ).fetchone()
    for entry, feature in made if there else ():
        wanted = connection.execute(
            "SELECT NOT EXISTS (SELECT 1 FROM feature WHERE entry = ?1 AND space_id = ?3) FROM entry WHERE key = ?1 "
            "AND collection = ?2",
            (entry, key, space_id),
        ).fetchone()
        if wanted is not None and wanted[0]:
            add_feature(connection, entry, space_id, feature)
    return there is not None


@dataclass(frozen=True)
class RetrievalCheck:
    """How often the nearest other entry is of the same track, in the old space and in the new one; 0..1.

    Attributes:
        by: ``track`` or ``subject``; empty = no two entries share one, and nothing can be judged.
        searched: entries looked from.
    """

    by: str
    searched: int
    before: float
    after: float

    @property
    def passed(self) -> bool:
        """The new space is not worse by more than chance."""
        return self.after >= self.before - MARGIN


def check_retrieval(connection: sqlite3.Connection, key: int, old: Space, new: Space) -> RetrievalCheck:
    """Look for tracks, or where there are none for subjects, among a collection's own entries in both spaces."""
    for by in ("track", "subject"):
        rows = connection.execute(
            f"SELECT e.key, e.{by}_id FROM entry e JOIN feature f ON f.entry = e.key AND f.space_id = ?2 "
            f"WHERE e.collection = ?1 AND e.{by}_id IN (SELECT {by}_id FROM entry WHERE collection = ?1 AND "
            f"{by}_id <> '' GROUP BY {by}_id HAVING count(*) > 1) ORDER BY e.{by}_id, e.key LIMIT ?3",
            (key, new.space_id, SOUGHT_AMONG),
        ).fetchall()
        if rows:
            keys = np.array([row[0] for row in rows])
            _, names = np.unique([row[1] for row in rows], return_inverse=True)
            seekers = np.sort(np.random.default_rng(0).permutation(len(keys))[:SEEKERS])
            before, after = (_nearest_share(connection, space, keys, names, seekers) for space in (old, new))
            return RetrievalCheck(by, len(seekers), before, after)
    return RetrievalCheck("", 0, 0.0, 0.0)


def _nearest_share(
    connection: sqlite3.Connection, space: Space, keys: reads.Keys, names: reads.Keys, seekers: reads.Keys
) -> float:
    """The share of ``seekers``, rows of ``keys``, whose nearest other row has the same name."""
    rows = []
    for key in keys.tolist():
        rows += connection.execute(
            "SELECT entry, vector, crc32 FROM feature WHERE entry = ? AND space_id = ?", (key, space.space_id)
        ).fetchall()
    held, features = reads.unpack_features(rows, space)
    place = {int(key): row for row, key in enumerate(held)}
    own = np.array([place.get(int(key), -1) for key in keys])
    of = np.full(len(held), -1)
    of[own[own >= 0]] = names[own >= 0]
    looking = seekers[own[seekers] >= 0]
    if len(held) < 2 or not len(looking):
        return 0.0
    similarity = features[own[looking]] @ features.T
    similarity[np.arange(len(looking)), own[looking]] = -2.0
    return float((of[similarity.argmax(axis=1)] == names[looking]).mean())


log = logging.getLogger(__name__)

MIGRATION_KIND = "migrate"
BATCH_ENTRIES = 32  # entries of one batch and one commit
MAX_WAIT_S = 600.0  # of one batch behind callers' crops


@dataclass(frozen=True)
class MigrationRequest:
    """What was asked for, as it stands in the operation's details."""

    collection: str
    model_id: str
    auto_activate: bool = False
    drop_missing: bool = False


class Migrations:
    """The migrations under way in one server. Only the event loop's thread uses it."""

    def __init__(self, models: ModelHost) -> None:
        self._models = models
        self._running: dict[tuple[str, str], tuple[str, asyncio.Task[None]]] = {}
        self._turn = asyncio.Lock()

    async def begin(self, tenant: Tenant, wanted: MigrationRequest, *, request_id: str = "") -> Operation:
        """Begin one, or go on with one that was interrupted; it runs on when this returns.

        Raises:
            CollectionNotFoundError: no such collection.
            ModelNotFoundError: the model is not loaded.
            ConflictError: the collection is being migrated to another space.
            CropsMissingError: some entries cannot be embedded anew.
            InputError: it is searched in that space already.
        """
        async with self._turn:  # two that come at once must not both find nothing under way
            return await self._begin(tenant, wanted, request_id)

    async def _begin(
        self, tenant: Tenant, wanted: MigrationRequest, request_id: str = "", *, continues: str = ""
    ) -> Operation:
        under_way = self._running.get((tenant.name, wanted.collection))
        if under_way is not None:
            operation_id, task = under_way
            operation = await tenant.operations.get(operation_id)
            if operation.state.ended:  # and told so; its task has but a line of the log to write
                await asyncio.wait((task,))
            elif operation.details.get("model_id") == wanted.model_id:
                return operation
            else:
                raise ConflictError(
                    f"collection {wanted.collection} is being migrated by operation {operation_id}: wait for it, or "
                    "cancel it",
                    field="collection_id",
                )
        with self._models.lease(wanted.model_id) as model:
            collection, total = await tenant.store.write(
                begin_backfill, wanted.collection, model.space, drop_missing=wanted.drop_missing
            )
        tenant.gallery.searcher.drop(collection, model.space)  # of an earlier try: older entries will come into it
        about = {"total": total, **asdict(wanted)}
        operation = await tenant.operations.start(MIGRATION_KIND, request_id=request_id, continues=continues, **about)
        if operation.state is OperationState.INTERRUPTED:  # asked for again: it goes on under another number
            operation = await tenant.operations.start(MIGRATION_KIND, continues=operation.operation_id, **about)
        if operation.state is OperationState.RUNNING:
            self._spawn(tenant, wanted, operation.operation_id)
        return operation

    async def resume_all(self, tenants: Tenants) -> None:
        """At start: `resume` those of every tenant; one that cannot be opened stops no other."""
        for name in await tenants.unfinished(MIGRATION_KIND):
            try:
                await self.resume(await tenants.tenant(name))
            except ReIDError as error:
                log.error("the migrations of tenant %s cannot go on: %s", name, error)

    async def resume(self, tenant: Tenant) -> None:
        """At start: go on with what the end of the process interrupted, the newest of each collection."""
        seen: set[str] = set()
        for old in await tenant.operations.list_operations(kind=MIGRATION_KIND, limit=MAX_KEPT):
            name = str(old.details.get("collection", ""))
            if name in seen:
                continue
            seen.add(name)
            if old.state is not OperationState.INTERRUPTED:
                continue
            try:
                async with self._turn:
                    new = await self._begin(tenant, MigrationRequest(**old.details), continues=old.operation_id)
            except InputError:
                log.info("the migration of %s was interrupted, and somebody has switched to its space since", name)
                continue
            except ReIDError as error:
                log.error("the migration of %s was interrupted and cannot go on: %s", name, error)
                continue
            # Once more, for where a caller was quicker and the one that goes on is theirs.
            await tenant.operations.progress(old.operation_id, result={"continued_by": new.operation_id})
            log.info("the migration of %s goes on operation=%s", name, new.operation_id)

    async def stop(self) -> None:
        """Give up what runs; at the next start it goes on."""
        tasks = [task for _, task in self._running.values()]
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _spawn(self, tenant: Tenant, wanted: MigrationRequest, operation_id: str) -> None:
        place = (tenant.name, wanted.collection)
        task = asyncio.create_task(self._run(tenant, wanted, operation_id), name=f"migrate-{wanted.collection}")
        self._running[place] = (operation_id, task)
        task.add_done_callback(lambda _: self._running.pop(place, None))

    async def _run(self, tenant: Tenant, wanted: MigrationRequest, operation_id: str) -> None:
        operations, error = tenant.operations, None
        try:
            with self._models.lease(wanted.model_id, pin=True) as model:
                migration = _Migration(tenant, wanted, model, operation_id)
                if not await migration.fill():
                    await operations.finish(operation_id, cancelled=True)
                    return
                result = await migration.settle()
            await operations.finish(operation_id, result=result)
            log.info("migration done collection=%s %s", wanted.collection, result)
            return
        except asyncio.CancelledError:
            raise
        except ReIDError as refused:
            error = refused
        except Exception:
            log.exception("the migration of %s failed", wanted.collection)
            error = MigrationError("the migration failed for a reason that the server's log tells: report it")
        with contextlib.suppress(ReIDError):  # a full disk: it is INTERRUPTED at the next start
            await operations.finish(operation_id, error=error)


class _Migration:
    """One run over one collection."""

    def __init__(self, tenant: Tenant, wanted: MigrationRequest, model: LoadedModel, operation_id: str) -> None:
        self._tenant, self._wanted, self._model, self._id = tenant, wanted, model, operation_id
        self._space: Space = model.space
        self._failed = 0

    async def fill(self) -> bool:
        """Embed what is missing, until nothing is that can be; False when it was cancelled, and dropped."""
        collection, given_up = await self._collection(), set[int]()
        after = 0
        while True:
            keys = await self._tenant.store.read(
                spaces.entries_without_feature, collection.key, self._space.space_id, after=after, limit=BATCH_ENTRIES
            )
            if not keys and not after:
                return True
            fresh = [key for key in keys if key not in given_up]
            after = keys[-1] if keys else 0  # once more from the beginning, for what came meanwhile
            if not keys and not await self._more(collection, given_up):
                return True
            made = await self._made(collection, fresh)
            given_up |= set(fresh) - {key for key, _ in made}
            there = await self._tenant.store.write(store_features, collection.key, self._space.space_id, made)
            if not there or (await self._tell(collection)).cancel_requested:
                await self._drop(collection)
                return False

    async def _more(self, collection: Collection, given_up: set[int]) -> bool:
        keys = await self._tenant.store.read(
            spaces.entries_without_feature, collection.key, self._space.space_id, after=0, limit=len(given_up) + 1
        )
        return bool(set(keys) - given_up)

    async def _collection(self) -> Collection:
        return await self._tenant.store.read(reads.collection, self._wanted.collection)

    async def _made(self, collection: Collection, keys: list[int]) -> list[tuple[int, Feature]]:
        """Features of those entries that have crops the model takes; an entry's crops are embedded together."""
        crops = await self._tenant.store.read(spaces.crops_of_entries, keys)
        made = await asyncio.gather(*(self._feature(collection, images) for images in crops.values()))
        return [(key, feature) for key, feature in zip(crops, made, strict=True) if feature is not None]

    async def _feature(self, collection: Collection, images: tuple[bytes, ...]) -> Feature | None:
        source = CropSource(images, tuple(f"shots.images[{number}].data" for number in range(len(images))))
        while True:
            deadline = time.monotonic() + MAX_WAIT_S
            try:
                made = await self._tenant.gallery.feature(
                    collection, source, deadline, space=self._space, priority=Priority.REEMBED
                )
                return made.feature
            except OverloadedError as error:
                await asyncio.sleep(error.retry_after_s)
            except ReIDError as error:
                self._failed += 1
                log.warning("an entry of %s cannot be embedded anew: %s", collection.name, error)
                return None

    async def _tell(self, collection: Collection) -> Operation:
        total, done = await self._tenant.store.read(backfill_counts, collection.key, self._space.space_id)
        skipped = await self._tenant.store.read(count_without_crops, collection.key, self._space.space_id)
        return await self._tenant.operations.progress(
            self._id, total=total, succeeded=done, failed=self._failed, skipped=skipped
        )

    async def _drop(self, collection: Collection) -> None:
        """Take the half-built space away, and end the writing of new entries to it; a finished one stays."""
        held = await self._tenant.store.read(spaces.collection_spaces, collection.key)
        if any(one.space.space_id == self._space.space_id and one.state == "building" for one in held):
            await self._tenant.store.erase(spaces.drop_space, collection.name, self._space.space_id)

    async def settle(self) -> dict[str, str]:
        """Build the new index, ask the gate, and switch where that was asked for; returns what to tell.

        Raises:
            MigrationError: the new space is incomplete or worse; new entries are still written to both.
            ConflictError: the collection was switched by somebody else.
        """
        collection, store = await self._collection(), self._tenant.store
        told = await self._tell(collection)
        lacking = told.total - told.succeeded
        if lacking > (told.skipped if self._wanted.drop_missing else 0):
            raise MigrationError(
                f"{lacking} of {told.total} entries have no feature in the new space ({told.skipped} without a crop, "
                f"{self._failed} that the model refused): delete them, or migrate again with "
                "MISSING_CROP_POLICY_DROP",
                missing_entries=lacking,
            )
        searcher = self._tenant.gallery.searcher
        index = await searcher.rebuild(replace(collection, space=self._space))
        found = await store.read(check_retrieval, collection.key, collection.space, self._space)
        if not found.passed:
            raise MigrationError(
                f"of {found.searched} entries {found.after:.3f} find their own {found.by} first in the new space, "
                f"{found.before:.3f} in the old one: at most {MARGIN} less is accepted; look at the model, or "
                "activate the space by hand"
            )
        await store.write(spaces.mark_space_ready, collection, self._space.space_id)
        result = {"space_id": self._space.space_id, "index_type": index.index_type, "activated": "false"}
        if found.by:
            shares = {"before": f"{found.before:.4f}", "after": f"{found.after:.4f}"}
            result |= {f"{found.by}_retrieval_{when}": share for when, share in shares.items()}
        if self._wanted.auto_activate:
            current = collection.space.space_id
            incomplete = self._wanted.drop_missing
            result["activated"] = "true"
            switch = partial(spaces.activate_space, expected=current, allow_incomplete=incomplete)
            await store.write(_activate_and_finish, switch, collection.name, self._space.space_id, self._id, result)
        return result


def _activate_and_finish(
    connection: sqlite3.Connection,
    switch: Callable[[sqlite3.Connection, str, str], Collection],
    name: str,
    space_id: str,
    operation_id: str,
    result: dict[str, str],
) -> None:
    """Switch and end the operation in one transaction: at no moment is one done and the other not."""
    switch(connection, name, space_id)
    finish(connection, operation_id, OperationState.SUCCEEDED, None, result)
