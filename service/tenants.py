"""The tenants of a data folder, each with its own database, opened on first use; and data retention.

An erasure, a snapshot or a full disk of one tenant does not affect another. The tenant comes from the credential
(`resight.service.access.auth`), never from a request. The default tenant's database is in the data folder itself, the
others' in ``tenants/NAME/``; the lock of the data folder covers all of them.

Retention deletes expired entries, old request ids, audit rows and statistics, retired spaces, and erased subjects from
snapshots. It uses only the database, so it also runs for tenants that are not open. Search results exclude entries from
the moment they expire.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from resight.errors import InputError, OverloadedError, ReIDError, StorageFullError
from resight.service.gallery import Gallery
from resight.service.records import DEFAULT_TENANT, now_us
from resight.service.search import statistics
from resight.service.settings import Settings
from resight.service.storage import audit, reads, spaces, writes
from resight.service.storage.audit import AuditLog
from resight.service.storage.data_folder import (
    DATABASE_FILE,
    TENANT_NAME,
    TENANTS_FOLDER,
    DiskWatermark,
    tenant_folder,
)
from resight.service.storage.operations import Operations, OperationState
from resight.service.storage.schema import connect
from resight.service.storage.snapshots import erase_from_snapshots
from resight.service.storage.store import Store

log = logging.getLogger(__name__)

IDLE_S = 120.0  # since the last use; longer than any call that does not hold a lease may take


@dataclass
class Tenant:
    """An open tenant.

    Attributes:
        last_used_s: in `time.monotonic` seconds.
        users: leases held, by calls that may take longer than `IDLE_S`.
    """

    name: str
    store: Store
    gallery: Gallery
    audit: AuditLog
    operations: Operations
    last_used_s: float = field(default_factory=time.monotonic)
    users: int = 0


class Tenants:
    """The tenants of a data folder; the caller holds its lock. `start` and `stop` it in the event loop.

    Args:
        folder: the data folder.
        settings: of the server.
        dim: feature dimension of new databases; see `resight.service.storage.store.Store`.
        make: creates the gallery of a tenant's store, not yet started.

    Attributes:
        purged_s: end of the last successful purge, in `time.monotonic` seconds; initially the start.
    """

    def __init__(self, folder: Path, settings: Settings, *, dim: int, make: Callable[[Store], Gallery]) -> None:
        self._folder, self._settings, self._dim, self._make = folder, settings, dim, make
        self._retention = RetentionPeriods(audit_s=settings.audit_retention_s, space_s=settings.keep_retired_space_s)
        self._open: dict[str, Tenant] = {}
        self._lock = asyncio.Lock()
        self._purge_task: asyncio.Task[None] | None = None
        self.purged_s = time.monotonic()

    async def start(self) -> None:
        """Open the default tenant, so that an unusable database shows at once, and start to purge.

        Raises:
            StoreError: its database is damaged or newer than this program.
            StorageFullError: its folder cannot be created.
        """
        await self.tenant(DEFAULT_TENANT)
        self._purge_task = asyncio.create_task(self._purge_forever(), name="purge")

    async def stop(self) -> None:
        """Close all tenants. Acknowledged writes are already on disk."""
        if self._purge_task is not None:
            self._purge_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._purge_task
        for tenant in list(self._open.values()):
            await self._close(tenant)

    async def gallery(self, name: str) -> Gallery:
        """A tenant's gallery; see `tenant`. It is valid for the current call only: get it again in every call."""
        return (await self.tenant(name)).gallery

    async def tenant(self, name: str) -> Tenant:
        """A tenant, opened if necessary; a new tenant gets an empty gallery.

        Raises:
            InputError: the name is not valid.
            OverloadedError: ``max_tenants_open`` tenants are in use.
            StoreError: the database is damaged or newer than this program.
            StorageFullError: its folder cannot be created.
        """
        found = self._open.get(name)
        if found is None:
            async with self._lock:  # concurrent calls open it only once
                found = self._open.get(name) or await self._open_tenant(name)
        found.last_used_s = time.monotonic()
        return found

    @contextlib.asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[Tenant]:
        """A tenant that stays open within the block, for calls of unbounded duration; see `tenant`."""
        found = await self.tenant(name)
        found.users += 1
        try:
            yield found
        finally:
            found.users -= 1
            found.last_used_s = time.monotonic()

    def open_tenants(self) -> list[Tenant]:
        """The tenants that are open, sorted by name."""
        return [self._open[name] for name in sorted(self._open)]

    def names(self) -> Iterator[str]:
        """Names of all tenants with a database, open or not."""
        yield DEFAULT_TENANT
        for path in sorted((self._folder / TENANTS_FOLDER).glob("*")):
            if TENANT_NAME.fullmatch(path.name) and not path.is_symlink() and (path / DATABASE_FILE).is_file():
                yield path.name

    async def unfinished(self, kind: str) -> list[str]:
        """Names of tenants, open or not, with an unfinished operation of a kind, from before a restart."""
        return [name for name in self.names() if await asyncio.to_thread(self._unfinished, name, kind)]

    def _unfinished(self, name: str, kind: str) -> bool:
        """Read the database directly: opening the tenant would build its indexes."""
        with contextlib.closing(connect(tenant_folder(self._folder, name) / DATABASE_FILE, read_only=True)) as database:
            # Opening a tenant turns PENDING and RUNNING into INTERRUPTED.
            states = [OperationState.PENDING, OperationState.RUNNING, OperationState.INTERRUPTED]
            marks = ", ".join("?" * len(states))
            sql = f"SELECT 1 FROM operation WHERE kind = ? AND state IN ({marks}) LIMIT 1"
            try:
                return database.execute(sql, (kind, *states)).fetchone() is not None
            except sqlite3.Error as error:  # older schema or damaged: opening it reports the error
                log.warning("the operations of tenant %s cannot be read: %s", name, error)
                return False

    async def purge(self) -> None:
        """Run retention for every tenant, open or not; a failure of one does not stop the others."""
        succeeded = True
        for name in list(self.names()):
            try:
                async with self._lock:
                    await self._purge(name)
            except ReIDError:
                succeeded = False
                log.exception("purge of tenant %s failed, it will be retried", name)
        if succeeded:
            self.purged_s = time.monotonic()

    async def _purge(self, name: str) -> None:
        tenant = self._open.get(name)
        if tenant is not None:
            for collection in await tenant.store.read(reads.collections, limit=-1):
                tenant.gallery.searcher.schedule_update(collection)
            await purge_expired(tenant.store, self._retention, indexed=tenant.gallery.searcher.revisions())
            return
        store = await asyncio.to_thread(self._store, name)
        try:
            await purge_expired(store, self._retention)
        finally:
            await asyncio.to_thread(store.close)

    async def _purge_forever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.purge_interval_s)
            await self.purge()

    async def _open_tenant(self, name: str) -> Tenant:
        path = tenant_folder(self._folder, name)
        if len(self._open) >= self._settings.max_tenants_open:
            await self._close_idle()
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StorageFullError(f"cannot create the folder of tenant {name}: {error.strerror}") from error
        if path.is_symlink():
            raise InputError(f"the folder of tenant {name} is a symbolic link: replace it by a real folder")
        store = await asyncio.to_thread(self._store, name)
        try:
            gallery = self._make(store)
            operations = Operations(store)
            await operations.interrupt_unfinished()
            await gallery.start()
        except BaseException:
            await asyncio.to_thread(store.close)
            raise
        audit = AuditLog(store)
        await audit.start()
        self._open[name] = tenant = Tenant(name, store, gallery, audit, operations)
        log.info("tenant opened name=%s", name)
        return tenant

    def _store(self, name: str) -> Store:
        path, settings = tenant_folder(self._folder, name) / DATABASE_FILE, self._settings
        watermark = DiskWatermark(path.parent, low_bytes=settings.disk_low_bytes, low_percent=settings.disk_low_percent)
        return Store(path, dim=self._dim, quick_check_s=settings.quick_check_s, watermark=watermark)

    async def _close_idle(self) -> None:
        """Close the least recently used tenant that is idle, or raise OverloadedError."""
        for tenant in sorted(self._open.values(), key=lambda one: one.last_used_s):
            idle = time.monotonic() - tenant.last_used_s >= IDLE_S and not tenant.users
            if tenant.name != DEFAULT_TENANT and idle and not await tenant.operations.any_running():
                await self._close(tenant)
                return
        raise OverloadedError(
            f"{len(self._open)} tenants are in use, at most {self._settings.max_tenants_open} may be open: try again, "
            "or raise max_tenants_open",
            retry_after_s=IDLE_S,
        )

    async def _close(self, tenant: Tenant) -> None:
        del self._open[tenant.name]
        await tenant.gallery.stop()
        await tenant.audit.stop()
        await asyncio.to_thread(tenant.store.close)
        log.info("tenant closed name=%s", tenant.name)


@dataclass(frozen=True)
class RetentionPeriods:
    """How long data is kept, in seconds.

    Attributes:
        audit_s: audit rows; at least a day.
        space_s: features of a previous space, for switching back.
    """

    audit_s: float
    space_s: float


async def purge_expired(store: Store, retention: RetentionPeriods, *, indexed: Sequence[tuple[int, int]] = ()) -> None:
    """Delete data whose retention period has ended, in small transactions so that enrolments are not blocked.

    Args:
        store: of the tenant.
        retention: the periods.
        indexed: (collection key, revision) reached by the indexes; the change log up to there is deleted.

    Raises:
        StorageFullError: the disk is full even for a deletion.
        StoreError: the database is damaged.
    """
    while await store.read(reads.any_expired):
        await store.erase(writes.purge)
    retired_us = now_us() - int(retention.space_s * 1e6)
    for name, space_id in await store.read(spaces.spaces_retired_before, retired_us):
        dropped = await store.erase(spaces.drop_retired_space, name, space_id, retired_us)
        log.info("space dropped collection=%s space=%s features=%d", name, space_id, dropped)
    await audit.purge_older_events(store, retention.audit_s)
    await store.write_unchecked(statistics.purge_counts)
    await store.write_unchecked(writes.purge_requests, indexed)
    await erase_from_snapshots(store)
