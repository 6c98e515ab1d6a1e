"""Migrates a collection to another model's space while it is searched in the old one.

From the start of a migration, new entries are written to both spaces. Old entries are embedded again from their stored
crops, in order of enrolment and only while the model is otherwise idle; every batch is committed, so the migration
continues after a crash. Progress is not counted but read from the database: an entry is missing while it has no feature
in the new space. Then the index of the new space is built, the gate is checked, and one write switches the active
space; switching back is the same write. The gate passes if every entry has a feature in the new space (or was dropped
by policy) and the retrieval of the collection's own tracks is as good as before, within `MARGIN`.
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

CHECK_QUERIES, CHECK_ENTRIES = 500, 4000  # queries of the retrieval check, and entries searched: 4 ms at 512-d
MARGIN = 0.05  # two standard errors of a share of about one half among 500


def begin_backfill(
    connection: sqlite3.Connection, name: str, space: Space, *, drop_missing: bool
) -> tuple[Collection, int]:
    """Write new entries to a space from now on; returns the collection and its number of entries.

    Raises:
        CollectionNotFoundError: no such collection.
        CropsMissingError: entries have no stored crop to embed, and ``drop_missing`` is not set.
        InputError: it is the active space.
    """
    found = reads.collection(connection, name)
    lacking = count_without_crops(connection, found.key, space.space_id)
    if lacking and not drop_missing:
        raise CropsMissingError(
            f"{lacking} entries of collection {name} have no stored crop, so they cannot be embedded again: enrol them "
            "in a new collection, or leave them out of the new space with MISSING_CROP_POLICY_DROP",
            field="missing_crops",
            entries=lacking,
        )
    return spaces.begin_space(connection, name, space), backfill_counts(connection, found.key, space.space_id)[0]


def count_without_crops(connection: sqlite3.Connection, key: int, space_id: str) -> int:
    """Number of entries with neither a feature in a space nor a stored crop to compute it from."""
    row = connection.execute(
        "SELECT count(*) FROM entry e WHERE e.collection = ?1 AND NOT EXISTS (SELECT 1 FROM feature f WHERE "
        "f.entry = e.key AND f.space_id = ?2) AND NOT EXISTS (SELECT 1 FROM crop c WHERE c.entry = e.key)",
        (key, space_id),
    )
    return int(row.fetchone()[0])


def backfill_counts(connection: sqlite3.Connection, key: int, space_id: str) -> tuple[int, int]:
    """Number of entries of a collection, and of those with a feature in a space."""
    row = connection.execute(
        "SELECT count(*), count(f.entry) FROM entry e LEFT JOIN feature f ON f.entry = e.key AND f.space_id = ?2 "
        "WHERE e.collection = ?1",
        (key, space_id),
    ).fetchone()
    return int(row[0]), int(row[1])


def store_features(
    connection: sqlite3.Connection, key: int, space_id: str, made: Sequence[tuple[int, Feature]]
) -> bool:
    """Store features of entries that still exist and have none; returns False if the space was dropped since."""
    space = connection.execute(
        "SELECT 1 FROM collection_space WHERE collection = ? AND space_id = ?", (key, space_id)
    ).fetchone()
    for entry, feature in made if space else ():
        missing = connection.execute(
            "SELECT NOT EXISTS (SELECT 1 FROM feature WHERE entry = ?1 AND space_id = ?3) FROM entry WHERE key = ?1 "
            "AND collection = ?2",
            (entry, key, space_id),
        ).fetchone()
        if missing is not None and missing[0]:
            add_feature(connection, entry, space_id, feature)
    return space is not None


@dataclass(frozen=True)
class RetrievalCheck:
    """Share of entries whose nearest other entry is of the same track, in the old space and in the new one; 0..1.

    Attributes:
        by: ``track`` or ``subject``; empty = no two entries share one, so there is nothing to compare.
        searched: number of queries.
        before: share in the old space.
        after: share in the new space.
    """

    by: str
    searched: int
    before: float
    after: float

    @property
    def passed(self) -> bool:
        """Whether the new space is not worse by more than `MARGIN`."""
        return self.after >= self.before - MARGIN


def check_retrieval(connection: sqlite3.Connection, key: int, old: Space, new: Space) -> RetrievalCheck:
    """Compare the retrieval of a collection's own tracks, or without tracks of its subjects, in both spaces."""
    for by in ("track", "subject"):
        rows = connection.execute(
            f"SELECT e.key, e.{by}_id FROM entry e JOIN feature f ON f.entry = e.key AND f.space_id = ?2 "
            f"WHERE e.collection = ?1 AND e.{by}_id IN (SELECT {by}_id FROM entry WHERE collection = ?1 AND "
            f"{by}_id <> '' GROUP BY {by}_id HAVING count(*) > 1) ORDER BY e.{by}_id, e.key LIMIT ?3",
            (key, new.space_id, CHECK_ENTRIES),
        ).fetchall()
        if rows:
            keys = np.array([row[0] for row in rows])
            _, names = np.unique([row[1] for row in rows], return_inverse=True)
            queries = np.sort(np.random.default_rng(0).permutation(len(keys))[:CHECK_QUERIES])
            before, after = (_nearest_share(connection, space, keys, names, queries) for space in (old, new))
            return RetrievalCheck(by, len(queries), before, after)
    return RetrievalCheck("", 0, 0.0, 0.0)


def _nearest_share(
    connection: sqlite3.Connection, space: Space, keys: reads.Keys, names: reads.Keys, queries: reads.Keys
) -> float:
    """The share of ``queries`` whose nearest other row has the same name.

    Args:
        connection: to read with.
        space: of the features.
        keys: int64 (N,), of the entries.
        names: int64 (N,), number of each entry's track or subject.
        queries: int64 (Q,), positions in ``keys``.
    """
    rows = []
    for key in keys.tolist():
        rows += connection.execute(
            "SELECT entry, vector, crc32 FROM feature WHERE entry = ? AND space_id = ?", (key, space.space_id)
        ).fetchall()
    stored, features = reads.unpack_features(rows, space)
    row_of = {int(key): row for row, key in enumerate(stored)}
    own = np.array([row_of.get(int(key), -1) for key in keys])
    name_of_row = np.full(len(stored), -1)
    name_of_row[own[own >= 0]] = names[own >= 0]
    usable = queries[own[queries] >= 0]
    if len(stored) < 2 or not len(usable):
        return 0.0
    similarity = features[own[usable]] @ features.T
    similarity[np.arange(len(usable)), own[usable]] = -2.0
    return float((name_of_row[similarity.argmax(axis=1)] == names[usable]).mean())


log = logging.getLogger(__name__)

MIGRATION_KIND = "migrate"
BATCH_ENTRIES = 32  # entries per batch and commit
MAX_WAIT_S = 600.0  # how long one entry may wait behind callers' crops


@dataclass(frozen=True)
class MigrationRequest:
    """The parameters of a migration; stored in the operation's details."""

    collection: str
    model_id: str
    auto_activate: bool = False
    drop_missing: bool = False


class Migrations:
    """The running migrations of one server. Used in the event loop's thread only."""

    def __init__(self, models: ModelHost) -> None:
        self._models = models
        self._running: dict[tuple[str, str], tuple[str, asyncio.Task[None]]] = {}
        self._turn = asyncio.Lock()

    async def start(self, tenant: Tenant, request: MigrationRequest, *, request_id: str = "") -> Operation:
        """Start a migration in the background, or resume an interrupted one; returns a running one of the same model.

        Raises:
            CollectionNotFoundError: no such collection.
            ModelNotFoundError: the model is not loaded.
            ConflictError: the collection is being migrated to another space.
            CropsMissingError: some entries cannot be embedded again.
            InputError: it is searched in that space already.
        """
        async with self._turn:  # two concurrent calls must not both start one
            return await self._start(tenant, request, request_id)

    async def _start(
        self, tenant: Tenant, request: MigrationRequest, request_id: str = "", *, continues: str = ""
    ) -> Operation:
        running = self._running.get((tenant.name, request.collection))
        if running is not None:
            operation_id, task = running
            operation = await tenant.operations.get(operation_id)
            if operation.state.ended:  # its task only has to write its last log line
                await asyncio.wait((task,))
            elif operation.details.get("model_id") == request.model_id:
                return operation
            else:
                raise ConflictError(
                    f"collection {request.collection} is being migrated by operation {operation_id}: wait for it, or "
                    "cancel it",
                    field="collection_id",
                )
        with self._models.lease(request.model_id) as model:
            collection, total = await tenant.store.write(
                begin_backfill, request.collection, model.space, drop_missing=request.drop_missing
            )
        tenant.gallery.searcher.drop(collection, model.space)  # of an earlier attempt: older entries will be added
        details = {"total": total, **asdict(request)}
        operation = await tenant.operations.start(MIGRATION_KIND, request_id=request_id, continues=continues, **details)
        if operation.state is OperationState.INTERRUPTED:  # a repeated request: resume as a new operation
            operation = await tenant.operations.start(MIGRATION_KIND, continues=operation.operation_id, **details)
        if operation.state is OperationState.RUNNING:
            self._spawn(tenant, request, operation.operation_id)
        return operation

    async def resume_all(self, tenants: Tenants) -> None:
        """At start: `resume` the migrations of every tenant; one tenant's failure does not stop the others."""
        for name in await tenants.unfinished(MIGRATION_KIND):
            try:
                await self.resume(await tenants.tenant(name))
            except ReIDError as error:
                log.error("the migrations of tenant %s cannot be resumed: %s", name, error)

    async def resume(self, tenant: Tenant) -> None:
        """At start: resume the newest migration of each collection if the end of the process interrupted it."""
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
                    new = await self._start(tenant, MigrationRequest(**old.details), continues=old.operation_id)
            except InputError:
                log.info("the migration of %s was interrupted, and its space is active since", name)
                continue
            except ReIDError as error:
                log.error("the migration of %s was interrupted and cannot be resumed: %s", name, error)
                continue
            # Again, because a caller may have started the new operation first, without ``continues``.
            await tenant.operations.progress(old.operation_id, result={"continued_by": new.operation_id})
            log.info("the migration of %s is resumed operation=%s", name, new.operation_id)

    async def stop(self) -> None:
        """Cancel the running migrations; they are resumed at the next start."""
        tasks = [task for _, task in self._running.values()]
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _spawn(self, tenant: Tenant, request: MigrationRequest, operation_id: str) -> None:
        place = (tenant.name, request.collection)
        task = asyncio.create_task(self._run(tenant, request, operation_id), name=f"migrate-{request.collection}")
        self._running[place] = (operation_id, task)
        task.add_done_callback(lambda _: self._running.pop(place, None))

    async def _run(self, tenant: Tenant, request: MigrationRequest, operation_id: str) -> None:
        operations, error = tenant.operations, None
        try:
            with self._models.lease(request.model_id, pin=True) as model:
                migration = _Migration(tenant, request, model, operation_id)
                if not await migration.fill():
                    await operations.finish(operation_id, cancelled=True)
                    return
                result = await migration.complete()
            await operations.finish(operation_id, result=result)
            log.info("migration done collection=%s %s", request.collection, result)
            return
        except asyncio.CancelledError:
            raise
        except ReIDError as refused:
            error = refused
        except Exception:
            log.exception("the migration of %s failed", request.collection)
            error = MigrationError("the migration failed with an internal error: see the server's log and report it")
        with contextlib.suppress(ReIDError):  # a full disk: it is INTERRUPTED at the next start
            await operations.finish(operation_id, error=error)


class _Migration:
    """One run of a migration of one collection."""

    def __init__(self, tenant: Tenant, request: MigrationRequest, model: LoadedModel, operation_id: str) -> None:
        self._tenant, self._request, self._model, self._id = tenant, request, model, operation_id
        self._space: Space = model.space
        self._failed = 0

    async def fill(self) -> bool:
        """Embed missing entries until only those that cannot be embedded are left.

        Returns:
            False when the migration was cancelled and its space dropped.
        """
        collection, failed_keys = await self._collection(), set[int]()
        after = 0
        while True:
            keys = await self._tenant.store.read(
                spaces.entries_without_feature, collection.key, self._space.space_id, after=after, limit=BATCH_ENTRIES
            )
            if not keys and not after:
                return True
            fresh = [key for key in keys if key not in failed_keys]
            after = keys[-1] if keys else 0  # start again, for entries added in the meantime
            if not keys and not await self._any_pending(collection, failed_keys):
                return True
            made = await self._embed_entries(collection, fresh)
            failed_keys |= set(fresh) - {key for key, _ in made}
            exists = await self._tenant.store.write(store_features, collection.key, self._space.space_id, made)
            if not exists or (await self._update_progress(collection)).cancel_requested:
                await self._drop(collection)
                return False

    async def _any_pending(self, collection: Collection, failed_keys: set[int]) -> bool:
        keys = await self._tenant.store.read(
            spaces.entries_without_feature, collection.key, self._space.space_id, after=0, limit=len(failed_keys) + 1
        )
        return bool(set(keys) - failed_keys)

    async def _collection(self) -> Collection:
        return await self._tenant.store.read(reads.collection, self._request.collection)

    async def _embed_entries(self, collection: Collection, keys: list[int]) -> list[tuple[int, Feature]]:
        """Features of the entries whose crops can be embedded; an entry's crops are embedded together."""
        crops = await self._tenant.store.read(spaces.crops_of_entries, keys)
        made = await asyncio.gather(*(self._feature(collection, images) for images in crops.values()))
        return [(key, feature) for key, feature in zip(crops, made, strict=True) if feature is not None]

    async def _feature(self, collection: Collection, images: tuple[bytes, ...]) -> Feature | None:
        source = CropSource(images, tuple(f"shots.images[{number}].data" for number in range(len(images))))
        while True:
            deadline = time.monotonic() + MAX_WAIT_S
            try:
                made = await self._tenant.gallery.extract_feature(
                    collection, source, deadline, space=self._space, priority=Priority.REEMBED
                )
                return made.feature
            except OverloadedError as error:
                await asyncio.sleep(error.retry_after_s)
            except ReIDError as error:
                self._failed += 1
                log.warning("an entry of %s cannot be embedded again: %s", collection.name, error)
                return None

    async def _update_progress(self, collection: Collection) -> Operation:
        total, done = await self._tenant.store.read(backfill_counts, collection.key, self._space.space_id)
        skipped = await self._tenant.store.read(count_without_crops, collection.key, self._space.space_id)
        return await self._tenant.operations.progress(
            self._id, total=total, succeeded=done, failed=self._failed, skipped=skipped
        )

    async def _drop(self, collection: Collection) -> None:
        """Drop the space, which also stops writing new entries to it, unless it is complete."""
        found = await self._tenant.store.read(spaces.collection_spaces, collection.key)
        if any(one.space.space_id == self._space.space_id and one.state == "building" for one in found):
            await self._tenant.store.erase(spaces.drop_space, collection.name, self._space.space_id)

    async def complete(self) -> dict[str, str]:
        """Build the new index, check the gate, and activate the space if requested; returns the operation's result.

        Raises:
            MigrationError: the new space is incomplete or worse; new entries are still written to both.
            ConflictError: the collection was switched in the meantime.
        """
        collection, store = await self._collection(), self._tenant.store
        progress = await self._update_progress(collection)
        lacking = progress.total - progress.succeeded
        if lacking > (progress.skipped if self._request.drop_missing else 0):
            raise MigrationError(
                f"{lacking} of {progress.total} entries have no feature in the new space ({progress.skipped} without a "
                f"crop, {self._failed} that the model refused): delete them, or migrate again with "
                "MISSING_CROP_POLICY_DROP",
                missing_entries=lacking,
            )
        searcher = self._tenant.gallery.searcher
        index = await searcher.rebuild(replace(collection, space=self._space))
        found = await store.read(check_retrieval, collection.key, collection.space, self._space)
        if not found.passed:
            raise MigrationError(
                f"of {found.searched} entries {found.after:.3f} find their own {found.by} first in the new space, "
                f"{found.before:.3f} in the old one: at most {MARGIN} less is accepted; check the model, or activate "
                "the space by hand"
            )
        await store.write(spaces.mark_space_ready, collection, self._space.space_id)
        result = {"space_id": self._space.space_id, "index_type": index.index_type, "activated": "false"}
        if found.by:
            shares = {"before": f"{found.before:.4f}", "after": f"{found.after:.4f}"}
            result |= {f"{found.by}_retrieval_{when}": share for when, share in shares.items()}
        if self._request.auto_activate:
            current = collection.space.space_id
            incomplete = self._request.drop_missing
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
    """Activate the space and finish the operation in one transaction, so that neither happens alone."""
    switch(connection, name, space_id)
    finish(connection, operation_id, OperationState.SUCCEEDED, None, result)
