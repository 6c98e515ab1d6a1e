"""Move a collection to another model's space while it is searched in the old one.

From the moment it begins, new entries are written to both spaces. The old ones are embedded anew from their stored
crops, in order of enrolment and only while the model has nothing better to do; every batch is committed, so after a
crash it goes on where it was. Then the index of the new space is built, the gate is asked, and one write switches;
the way back is the same write. What passes the gate: every entry has a feature in the new space (or was let go), and
the tracks of the collection find themselves there as before, within `resight.service.backfill.MARGIN`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

from resight.errors import ConflictError, InputError, MigrationError, OverloadedError, ReIDError
from resight.service import backfill, reads, spaces
from resight.service.entries import Collection, Space
from resight.service.features import Crops
from resight.service.lanes import Priority
from resight.service.model import Model
from resight.service.models import ModelHost
from resight.service.operations import KEPT, Operation, State, finish
from resight.service.runtime import Feature
from resight.service.tenants import Tenant, Tenants

log = logging.getLogger(__name__)

KIND = "migrate"
AT_ONCE = 32  # entries of one batch and one commit
PATIENCE_S = 600.0  # of one batch behind callers' crops


@dataclass(frozen=True)
class Wanted:
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

    async def begin(self, tenant: Tenant, wanted: Wanted, *, request_id: str = "") -> Operation:
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

    async def _begin(self, tenant: Tenant, wanted: Wanted, request_id: str = "", *, continues: str = "") -> Operation:
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
                backfill.begin, wanted.collection, model.space, drop_missing=wanted.drop_missing
            )
        tenant.gallery.searcher.drop(collection, model.space)  # of an earlier try: older entries will come into it
        about = {"total": total, **asdict(wanted)}
        operation = await tenant.operations.start(KIND, request_id=request_id, continues=continues, **about)
        if operation.state is State.INTERRUPTED:  # asked for again: it goes on under another number
            operation = await tenant.operations.start(KIND, continues=operation.operation_id, **about)
        if operation.state is State.RUNNING:
            self._spawn(tenant, wanted, operation.operation_id)
        return operation

    async def resume_all(self, tenants: Tenants) -> None:
        """At start: `resume` those of every tenant; one that cannot be opened stops no other."""
        for name in await tenants.unfinished(KIND):
            try:
                await self.resume(await tenants.tenant(name))
            except ReIDError as error:
                log.error("the migrations of tenant %s cannot go on: %s", name, error)

    async def resume(self, tenant: Tenant) -> None:
        """At start: go on with what the end of the process interrupted, the newest of each collection."""
        seen: set[str] = set()
        for old in await tenant.operations.listed(kind=KIND, limit=KEPT):
            name = str(old.details.get("collection", ""))
            if name in seen:
                continue
            seen.add(name)
            if old.state is not State.INTERRUPTED:
                continue
            try:
                async with self._turn:
                    new = await self._begin(tenant, Wanted(**old.details), continues=old.operation_id)
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

    def _spawn(self, tenant: Tenant, wanted: Wanted, operation_id: str) -> None:
        place = (tenant.name, wanted.collection)
        task = asyncio.create_task(self._run(tenant, wanted, operation_id), name=f"migrate-{wanted.collection}")
        self._running[place] = (operation_id, task)
        task.add_done_callback(lambda _: self._running.pop(place, None))

    async def _run(self, tenant: Tenant, wanted: Wanted, operation_id: str) -> None:
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

    def __init__(self, tenant: Tenant, wanted: Wanted, model: Model, operation_id: str) -> None:
        self._tenant, self._wanted, self._model, self._id = tenant, wanted, model, operation_id
        self._space: Space = model.space
        self._failed = 0

    async def fill(self) -> bool:
        """Embed what is missing, until nothing is that can be; False when it was cancelled, and dropped."""
        collection, given_up = await self._collection(), set[int]()
        after = 0
        while True:
            keys = await self._tenant.store.read(
                spaces.missing, collection.key, self._space.space_id, after=after, limit=AT_ONCE
            )
            if not keys and not after:
                return True
            fresh = [key for key in keys if key not in given_up]
            after = keys[-1] if keys else 0  # once more from the beginning, for what came meanwhile
            if not keys and not await self._more(collection, given_up):
                return True
            made = await self._made(collection, fresh)
            given_up |= set(fresh) - {key for key, _ in made}
            there = await self._tenant.store.write(backfill.fill, collection.key, self._space.space_id, made)
            if not there or (await self._tell(collection)).cancel_asked:
                await self._drop(collection)
                return False

    async def _more(self, collection: Collection, given_up: set[int]) -> bool:
        keys = await self._tenant.store.read(
            spaces.missing, collection.key, self._space.space_id, after=0, limit=len(given_up) + 1
        )
        return bool(set(keys) - given_up)

    async def _collection(self) -> Collection:
        return await self._tenant.store.read(reads.collection, self._wanted.collection)

    async def _made(self, collection: Collection, keys: list[int]) -> list[tuple[int, Feature]]:
        """Features of those entries that have crops the model takes; an entry's crops are embedded together."""
        crops = await self._tenant.store.read(spaces.crops, keys)
        made = await asyncio.gather(*(self._feature(collection, images) for images in crops.values()))
        return [(key, feature) for key, feature in zip(crops, made, strict=True) if feature is not None]

    async def _feature(self, collection: Collection, images: tuple[bytes, ...]) -> Feature | None:
        source = Crops(images, tuple(f"shots.images[{number}].data" for number in range(len(images))))
        while True:
            deadline = time.monotonic() + PATIENCE_S
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
        total, done = await self._tenant.store.read(backfill.counts, collection.key, self._space.space_id)
        skipped = await self._tenant.store.read(backfill.without_crops, collection.key, self._space.space_id)
        return await self._tenant.operations.progress(
            self._id, total=total, succeeded=done, failed=self._failed, skipped=skipped
        )

    async def _drop(self, collection: Collection) -> None:
        """Take the half-built space away, and end the writing of new entries to it; a finished one stays."""
        held = await self._tenant.store.read(spaces.held, collection.key)
        if any(one.space.space_id == self._space.space_id and one.state == "building" for one in held):
            await self._tenant.store.erase(spaces.drop, collection.name, self._space.space_id)

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
        found = await store.read(backfill.retrieval, collection.key, collection.space, self._space)
        if not found.passed:
            raise MigrationError(
                f"of {found.searched} entries {found.after:.3f} find their own {found.by} first in the new space, "
                f"{found.before:.3f} in the old one: at most {backfill.MARGIN} less is accepted; look at the model, or "
                "activate the space by hand"
            )
        await store.write(spaces.mark_ready, collection, self._space.space_id)
        result = {"space_id": self._space.space_id, "index_type": index.index_type, "activated": "false"}
        if found.by:
            shares = {"before": f"{found.before:.4f}", "after": f"{found.after:.4f}"}
            result |= {f"{found.by}_retrieval_{when}": share for when, share in shares.items()}
        if self._wanted.auto_activate:
            current = collection.space.space_id
            incomplete = self._wanted.drop_missing
            result["activated"] = "true"
            switch = partial(spaces.activate, expected=current, allow_incomplete=incomplete)
            await store.write(_switched, switch, collection.name, self._space.space_id, self._id, result)
        return result


def _switched(
    connection: sqlite3.Connection,
    switch: Callable[[sqlite3.Connection, str, str], Collection],
    name: str,
    space_id: str,
    operation_id: str,
    result: dict[str, str],
) -> None:
    """Switch and end the operation in one transaction: at no moment is one done and the other not."""
    switch(connection, name, space_id)
    finish(connection, operation_id, State.SUCCEEDED, None, result)
