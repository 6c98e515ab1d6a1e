"""The galleries of a data folder, one database for each tenant, opened on first use, and their retention.

An erasure, a snapshot or a full disk of one tenant does not affect another. The tenant comes from the credential
(`resight.service.access.auth`), never from a request. The default tenant's database is in the data folder itself, the
others' in ``tenants/NAME/``; the folder's one lock covers all.

Retention removes expired entries, old requests, audit rows and statistics, retired spaces and erased subjects from the
disk. It works on the database alone, so it runs for every tenant whether its gallery is in use or not. Answers leave
expired entries out from the instant they expire.
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

IDLE_S = 120.0  # since it was last asked for; longer than any call may take that does not hold it


@dataclass
class Tenant:
    """One tenant's open gallery and what is kept about it."""

    name: str
    store: Store
    gallery: Gallery
    audit: AuditLog
    operations: Operations
    asked_s: float = field(default_factory=time.monotonic)
    users: int = 0  # calls that may take longer than `IDLE_S`


class Tenants:
    """The tenants of a data folder, whose lock the caller holds. `start` and `stop` it in the event loop.

    Args:
        folder: the data folder.
        settings: of the server.
        dim: of the features to come; see `resight.service.storage.store.Store`.
        make: a gallery over a tenant's store, not yet started.

    Attributes:
        purged_s: when a purge last ended well, in `time.monotonic` seconds; before the first, the start.
    """

    def __init__(self, folder: Path, settings: Settings, *, dim: int, make: Callable[[Store], Gallery]) -> None:
        self._folder, self._settings, self._dim, self._make = folder, settings, dim, make
        self._kept = RetentionPeriods(audit_s=settings.audit_retention_s, space_s=settings.keep_retired_space_s)
        self._open: dict[str, Tenant] = {}
        self._turn = asyncio.Lock()
        self._purging: asyncio.Task[None] | None = None
        self.purged_s = time.monotonic()

    async def start(self) -> None:
        """Open the default tenant, so that a mistake shows at once, and begin to purge.

        Raises:
            StoreError: its database is damaged or newer than this program.
            StorageFullError: it cannot be made.
        """
        await self.tenant(DEFAULT_TENANT)
        self._purging = asyncio.create_task(self._purge_forever(), name="purge")

    async def stop(self) -> None:
        """Close all; what was answered is on the disk."""
        if self._purging is not None:
            self._purging.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._purging
        for tenant in list(self._open.values()):
            await self._close(tenant)

    async def gallery(self, name: str) -> Gallery:
        """A tenant's gallery; see `tenant`. Ask for it in every call anew, and keep it no longer than the call."""
        return (await self.tenant(name)).gallery

    async def tenant(self, name: str) -> Tenant:
        """A tenant, opened if need be; one that is new gets an empty gallery.

        Raises:
            InputError: no name of a tenant.
            OverloadedError: as many are in use as may be open.
            StoreError: the database is damaged or newer than this program.
            StorageFullError: it cannot be made.
        """
        found = self._open.get(name)
        if found is None:
            async with self._turn:  # opening takes a while; asked for twice, it is opened once
                found = self._open.get(name) or await self._opened(name)
        found.asked_s = time.monotonic()
        return found

    @contextlib.asynccontextmanager
    async def held(self, name: str) -> AsyncIterator[Tenant]:
        """A tenant that stays open for the time of the block, for calls without an end of their own; see `tenant`."""
        found = await self.tenant(name)
        found.users += 1
        try:
            yield found
        finally:
            found.users -= 1
            found.asked_s = time.monotonic()

    def opened(self) -> list[Tenant]:
        """Those whose gallery is in memory, by name."""
        return [self._open[name] for name in sorted(self._open)]

    def names(self) -> Iterator[str]:
        """All tenants with a database, open or not."""
        yield DEFAULT_TENANT
        for path in sorted((self._folder / TENANTS_FOLDER).glob("*")):
            if TENANT_NAME.fullmatch(path.name) and not path.is_symlink() and (path / DATABASE_FILE).is_file():
                yield path.name

    async def unfinished(self, kind: str) -> list[str]:
        """Tenants, open or not, with a long operation that the end of a process interrupted."""
        return [name for name in self.names() if await asyncio.to_thread(self._unfinished, name, kind)]

    def _unfinished(self, name: str, kind: str) -> bool:
        """Read beside the store: opening a tenant builds its indexes, which most need not."""
        with contextlib.closing(connect(tenant_folder(self._folder, name) / DATABASE_FILE, read_only=True)) as database:
            states = [
                OperationState.PENDING,
                OperationState.RUNNING,
                OperationState.INTERRUPTED,
            ]  # the first two until its gallery is opened
            marks = ", ".join("?" * len(states))
            sql = f"SELECT 1 FROM operation WHERE kind = ? AND state IN ({marks}) LIMIT 1"
            try:
                return database.execute(sql, (kind, *states)).fetchone() is not None
            except sqlite3.Error as error:  # of an older schema, or damaged: told when somebody opens it
                log.warning("the operations of tenant %s cannot be read: %s", name, error)
                return False

    async def purge(self) -> None:
        """Remove what has had its time, also of tenants whose gallery nobody uses; one that fails stops no other."""
        good = True
        for name in list(self.names()):
            try:
                async with self._turn:
                    await self._purge(name)
            except ReIDError:
                good = False
                log.exception("the purge of tenant %s failed and is tried again", name)
        if good:
            self.purged_s = time.monotonic()

    async def _purge(self, name: str) -> None:
        tenant = self._open.get(name)
        if tenant is not None:
            for collection in await tenant.store.read(reads.collections, limit=-1):
                tenant.gallery.searcher.follow(collection)
            await purge_expired(tenant.store, self._kept, taken_in=tenant.gallery.searcher.revisions())
            return
        store = await asyncio.to_thread(self._store, name)
        try:
            await purge_expired(store, self._kept)
        finally:
            await asyncio.to_thread(store.close)

    async def _purge_forever(self) -> None:
        while True:
            await asyncio.sleep(self._settings.purge_interval_s)
            await self.purge()

    async def _opened(self, name: str) -> Tenant:
        place = tenant_folder(self._folder, name)
        if len(self._open) >= self._settings.max_tenants_open:
            await self._close_idle()
        try:
            place.parent.mkdir(mode=0o700, exist_ok=True)
            place.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise StorageFullError(f"the folder of tenant {name} cannot be made: {error.strerror}") from error
        if place.is_symlink():
            raise InputError(f"the folder of tenant {name} is a link: put the folder itself there")
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
        mark = DiskWatermark(path.parent, low_bytes=settings.disk_low_bytes, low_percent=settings.disk_low_percent)
        return Store(path, dim=self._dim, quick_check_s=settings.quick_check_s, watermark=mark)

    async def _close_idle(self) -> None:
        """Close the one that was not asked for longest, if nobody can still use it."""
        for tenant in sorted(self._open.values(), key=lambda one: one.asked_s):
            idle = time.monotonic() - tenant.asked_s >= IDLE_S and not tenant.users
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
    """How long is kept what nobody needs any more, in seconds.

    Attributes:
        audit_s: rows of the audit; a day at least.
        space_s: features of a space that another one has taken the place of, for the way back.
    """

    audit_s: float
    space_s: float


async def purge_expired(store: Store, kept: RetentionPeriods, *, taken_in: Sequence[tuple[int, int]] = ()) -> None:
    """Remove what has had its time; each step by itself, and in parts, so that enrolments do not wait.

    Args:
        store: whose.
        kept: how long.
        taken_in: (collection key, revision) that indexes have reached: the change log up to there goes.

    Raises:
        StorageFullError: the disk takes nothing, not even a deletion.
        StoreError: the database is damaged.
    """
    while await store.read(reads.any_expired):
        await store.erase(writes.purge)
    retired_us = now_us() - int(kept.space_s * 1e6)
    for name, space_id in await store.read(spaces.spaces_retired_before, retired_us):
        dropped = await store.erase(spaces.drop_retired_space, name, space_id, retired_us)
        log.info("space dropped collection=%s space=%s features=%d", name, space_id, dropped)
    await audit.purge_older_events(store, kept.audit_s)
    await store.write_unchecked(statistics.purge_counts)
    await store.write_unchecked(writes.purge_requests, taken_in)
    await erase_from_snapshots(store)
