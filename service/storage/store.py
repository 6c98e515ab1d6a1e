"""Connections and threads of the gallery's database: one writer thread with group commit, and a pool of readers.

The statements themselves are in `resight.service.storage.writes` and `resight.service.storage.reads`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from resight.errors import DrainingError, ReIDError
from resight.service.storage.data_folder import DiskWatermark, finish_swap, load_key, register_keyed_hash
from resight.service.storage.schema import connect, open_database, translate_error

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
GROUP = 256  # writes per commit: above it the flush is a small part of the cost
SCRUB_LATER_S = 0.5
READERS = 2


class _Job:
    """One queued write: a function of the connection, its outcome, and the future that completes after the commit."""

    def __init__(self, run: Callable[[sqlite3.Connection], Any], *, deletes: bool) -> None:
        self.run, self.deletes = run, deletes
        self.future: Future[None] = Future()
        self.outcome: Any = None
        self.scrubbed = False


class Store:
    """An open gallery database. The caller holds the data folder's lock.

    ``key`` is the folder's secret for `resight.service.storage.data_folder.keyed_hash`; it is created beside the
    database when missing. ``commits`` counts commits since the start: while it is unchanged, no acknowledged write has
    changed the database.

    Args:
        path: the SQLite file; created when missing.
        dim: length of the features to be stored.
        quick_check_s: see `resight.service.storage.schema.open_database`, whose errors are raised unchanged.
        watermark: makes `write` fail while the disk has too little free space.
    """

    def __init__(
        self, path: Path, *, dim: int, quick_check_s: float = 5.0, watermark: DiskWatermark | None = None
    ) -> None:
        self._watermark = watermark
        self.path, self.folder = path, path.parent
        finish_swap(self.folder)
        self._connection = open_database(path, dim=dim, quick_check_s=quick_check_s)
        try:
            self.key = load_key(self.folder)
        except BaseException:
            self._connection.close()
            raise
        register_keyed_hash(self._connection, self.key)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._local = threading.local()
        self._readers: list[sqlite3.Connection] = []
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self.commits = 0
        self._closing = False
        self._unscrubbed = True  # a server killed between a deletion and its scrub left the log
        self._writer = threading.Thread(target=self._write_forever, name="writer")
        self._writer.start()

    @property
    def is_low(self) -> bool:
        """Whether `write` is refused because the disk has too little free space."""
        return self._watermark is not None and self._watermark.is_low

    def reader(self) -> sqlite3.Connection:
        """This thread's read-only connection.

        Fetch all rows at once: an open read transaction keeps deleted pages in the write-ahead log.
        """
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = connect(self.path, read_only=True)
            self._readers.append(connection)
        return connection

    async def read(
        self, function: Callable[Concatenate[sqlite3.Connection, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run ``function(connection, …)`` in a reader thread.

        Raises:
            StoreError: the database is damaged.
        """

        def run() -> T:
            try:
                return function(self.reader(), *args, **kwargs)
            except sqlite3.Error as error:
                raise translate_error(error) from error

        return await asyncio.get_running_loop().run_in_executor(self._pool, run)

    async def write(
        self, function: Callable[Concatenate[sqlite3.Connection, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run ``function(connection, …)`` in a transaction; returns once it is flushed to disk.

        If the function raises, its own writes are rolled back; the other writes of the same commit are kept.

        Raises:
            DiskWatermarkError: too little free disk space.
            StorageFullError: no disk space; nothing was stored.
            StoreError: the database is damaged.
            DrainingError: the store is closing.
        """
        if self._watermark is not None:
            self._watermark.check()
        return await self.write_unchecked(function, *args, **kwargs)

    async def write_unchecked(
        self, function: Callable[Concatenate[sqlite3.Connection, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Like `write`, without the watermark check: for the few bytes of audit and bookkeeping."""
        return await self._submit(lambda connection: function(connection, *args, **kwargs), deletes=False)

    async def erase(
        self, function: Callable[Concatenate[sqlite3.Connection, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Like `write`, for deletions: before it returns, it tries to empty the log that still holds the old pages.

        If a reader blocks that, the log is emptied as soon as the reader has ended.
        """
        return await self._submit(lambda connection: function(connection, *args, **kwargs), deletes=True)

    async def scrub(self) -> bool:
        """Try to empty the write-ahead log after all queued writes; returns whether SQLite reported it emptied.

        False while a reader still uses a page of it; it is then emptied as soon as the reader has ended.
        """
        job = await self._put(lambda connection: None, deletes=True)
        return job.scrubbed

    async def _submit(self, run: Callable[[sqlite3.Connection], T], *, deletes: bool) -> T:
        result: T = (await self._put(run, deletes=deletes)).outcome
        return result

    async def _put(self, run: Callable[[sqlite3.Connection], Any], *, deletes: bool) -> _Job:
        if self._closing:
            raise DrainingError("the gallery is closing: try again when the server is back")
        job = _Job(run, deletes=deletes)
        self._jobs.put(job)
        await asyncio.wrap_future(job.future)
        return job

    def close(self) -> None:
        """Finish the queued writes, empty the log and close. Call it when no reader is running."""
        self._closing = True
        self._jobs.put(None)
        self._writer.join()
        self._pool.shutdown()
        for connection in self._readers:
            connection.close()
        self._connection.close()

    def _write_forever(self) -> None:
        last = False
        while not last:
            jobs: list[_Job] = []
            with contextlib.suppress(queue.Empty):
                first = self._jobs.get(timeout=SCRUB_LATER_S if self._unscrubbed else None)
                last = first is None
                if first is not None:
                    jobs.append(first)
                while not last and len(jobs) < GROUP:  # everything queued while the last commit ran
                    job = self._jobs.get_nowait()
                    last = job is None
                    if job is not None:
                        jobs.append(job)
            jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            self._commit(jobs)
            self._unscrubbed |= any(job.deletes for job in jobs)
            if self._unscrubbed:
                self._scrub()
            self._report_free_pages()
            for job in jobs:
                job.scrubbed = not self._unscrubbed
                if isinstance(job.outcome, BaseException):
                    job.future.set_exception(job.outcome)
                else:
                    job.future.set_result(None)

    def _commit(self, jobs: list[_Job]) -> None:
        """Run all jobs in one transaction; if SQLite fails, retry each alone, so that only the failing one fails."""
        if not jobs:
            return
        connection = self._connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            for job in jobs:
                connection.execute("SAVEPOINT job")
                try:
                    job.outcome = job.run(connection)
                except sqlite3.Error:
                    raise
                except Exception as error:
                    if not isinstance(error, ReIDError):
                        log.exception("a write failed")
                    job.outcome = error
                    connection.execute("ROLLBACK TO job")
                connection.execute("RELEASE job")
            connection.execute("COMMIT")
            self.commits += 1
        except sqlite3.Error as error:
            if connection.in_transaction:  # some of SQLite's errors have rolled back already
                connection.execute("ROLLBACK")
            log.exception("a commit of %d writes failed", len(jobs))
            if len(jobs) == 1:
                jobs[0].outcome = translate_error(error)
                return
            for job in jobs:
                self._commit([job])

    def _scrub(self) -> None:
        """Checkpoint the log into the database, whose freed pages secure_delete has zeroed, and truncate it."""
        try:
            self._unscrubbed = bool(self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])
        except sqlite3.Error as error:
            log.error("the write-ahead log could not be emptied, will retry: %s", error)

    def _report_free_pages(self) -> None:
        """Report to the watermark the size of the free pages inside the file, which the next writes will reuse."""
        if self._watermark is not None:
            with contextlib.suppress(sqlite3.Error):  # the next write reports a broken disk
                (pages,) = self._connection.execute("PRAGMA freelist_count").fetchone()
                (size,) = self._connection.execute("PRAGMA page_size").fetchone()
                self._watermark.reusable_bytes = pages * size
