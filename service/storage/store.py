"""Connections and threads of the gallery's database: one writer with group commit, many short readers.

What is written by whom stands in `resight.service.storage.writes`, what is read in `resight.service.storage.reads`.
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
GROUP = 256  # writes of one commit: above it the flush is a small part of the cost
SCRUB_LATER_S = 0.5
READERS = 2


class _Job:
    """One write: a function of the connection, and where its answer goes."""

    def __init__(self, run: Callable[[sqlite3.Connection], Any], *, deletes: bool) -> None:
        self.run, self.deletes = run, deletes
        self.future: Future[None] = Future()
        self.outcome: Any = None
        self.scrubbed = False


class Store:
    """An open gallery database. The caller holds the data folder's lock.

    ``key`` is the folder's own, for `resight.service.storage.data_folder.keyed_hash`; it is made beside the database
    when missing. ``commits`` counts those since the start: between two equal readings of it nothing in the database has
    changed that anybody was told of.

    Args:
        path: of the SQLite file; made when missing.
        dim: length of the features to come.
        quick_check_s: see `resight.service.storage.schema.open_database`, whose errors come through.
        watermark: refuses what `write` would add while the disk has too little room.
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
    def low(self) -> bool:
        """Whether `write` refuses for want of room."""
        return self._watermark is not None and self._watermark.low

    def reader(self) -> sqlite3.Connection:
        """This thread's connection for reading. Fetch all rows at once: an open read keeps deletions in the log."""
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
        """Run ``function(connection, …)`` in a transaction; returns when it is on disk.

        A `ReIDError` it raises undoes that function's writes alone.

        Raises:
            DiskWatermarkError: little room is left on the disk.
            StorageFullError: no room; nothing was stored.
            StoreError: the database is damaged.
            DrainingError: the store is closing.
        """
        if self._watermark is not None:
            self._watermark.check()
        return await self.book(function, *args, **kwargs)

    async def book(
        self, function: Callable[Concatenate[sqlite3.Connection, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Like `write`, for the few bytes of audit and bookkeeping that go on when the room is short."""
        return await self._submit(lambda connection: function(connection, *args, **kwargs), deletes=False)

    async def erase(
        self, function: Callable[Concatenate[sqlite3.Connection, P], T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Like `write`, for deletions: before it returns, the log that still holds the old pages is emptied.

        A reader in the way delays that by at most a moment; it is then done as soon as the reader ends.
        """
        return await self._submit(lambda connection: function(connection, *args, **kwargs), deletes=True)

    async def scrub(self) -> bool:
        """Try to empty the log, after all writes that came; what SQLite reported.

        False while a reader holds a page of it; it is then emptied as soon as the reader ends.
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
        """Finish the writes that came, empty the log and close. Call it when no reader runs."""
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
                while not last and len(jobs) < GROUP:  # whatever came while the last commit ran
                    job = self._jobs.get_nowait()
                    last = job is None
                    if job is not None:
                        jobs.append(job)
            jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            self._commit(jobs)
            self._unscrubbed |= any(job.deletes for job in jobs)
            if self._unscrubbed:
                self._scrub()
            self._tell_spare()
            for job in jobs:
                job.scrubbed = not self._unscrubbed
                if isinstance(job.outcome, BaseException):
                    job.future.set_exception(job.outcome)
                else:
                    job.future.set_result(None)

    def _commit(self, jobs: list[_Job]) -> None:
        """One transaction for all; if SQLite itself fails, each alone, so that only the culprit fails."""
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
        """Move the log into the database, whose freed pages secure_delete has zeroed, and empty it."""
        try:
            self._unscrubbed = bool(self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])
        except sqlite3.Error as error:
            log.error("the write-ahead log could not be emptied, it is tried again: %s", error)

    def _tell_spare(self) -> None:
        """Let the watermark count the pages that deletions have freed and the next writes fill."""
        if self._watermark is not None:
            with contextlib.suppress(sqlite3.Error):  # of a broken disk the next write tells
                (pages,) = self._connection.execute("PRAGMA freelist_count").fetchone()
                (size,) = self._connection.execute("PRAGMA page_size").fetchone()
                self._watermark.spare = pages * size
