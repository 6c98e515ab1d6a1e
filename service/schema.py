"""How a gallery's database file is opened, made or brought up to date, and which files are refused.

SQLite is the truth: WAL, a flush to disk per commit, and secure_delete, so that what was deleted
cannot be read from the file.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from pathlib import Path

from resight.errors import StorageFullError, StoreError
from resight.service.tables import BOOKS, CORE, FIGURES, LESSONS, SCHEMA_VERSION, UPGRADES

log = logging.getLogger(__name__)

APPLICATION_ID = 0x52534754  # "RSGT": tells our file from any other SQLite database
# A 2 KB vector cannot share a 4 KB page: 16 KB pages store 512-d vectors in 57 % of the space and
# insert 1.7 times as fast; above 1024-d it is the other way round. It cannot be changed later.
SMALL_DIM, SMALL_DIM_PAGE, LARGE_DIM_PAGE = 1024, 16384, 4096


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection with our settings, in autocommit: transactions are begun by hand.

    One thread uses it at a time; any thread may close it.
    """
    busy_s = 10.0 if read_only else 0.1  # the one writer waits for readers only to empty the log: they are short
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=busy_s)
    for pragma in ("foreign_keys=ON", "synchronous=FULL", "secure_delete=ON", "temp_store=MEMORY"):
        connection.execute(f"PRAGMA {pragma}")
    if read_only:
        connection.execute("PRAGMA query_only=ON")
    return connection


def open_database(path: Path, *, dim: int, quick_check_s: float) -> sqlite3.Connection:
    """Open a gallery's database for writing, or make it.

    Args:
        path: of the file.
        dim: length of the features to come; decides the page size of a new file.
        quick_check_s: at most this long is an existing file checked for damage.

    Raises:
        StoreError: no database of ours, of a newer version, or damaged.
        StorageFullError: no room for a new one.
    """
    try:
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))  # for the owner only; WAL inherits it
        connection = connect(path)
        try:
            _prepare(connection, path, dim)
            _quick_check(connection, path, quick_check_s)
        except BaseException:
            connection.close()
            raise
        return connection
    except sqlite3.Error as error:
        raise translated(error, path.name) from error


def _prepare(connection: sqlite3.Connection, path: Path, dim: int) -> None:
    """Create the tables in an empty file, upgrade older ones; refuse a file that is not ours or newer than we are."""
    empty = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
    if empty:
        connection.execute(f"PRAGMA page_size={SMALL_DIM_PAGE if dim <= SMALL_DIM else LARGE_DIM_PAGE}")
        connection.execute("PRAGMA journal_mode=WAL")
        marks = f"PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={SCHEMA_VERSION};"
        connection.executescript(f"BEGIN; {marks} {CORE} {BOOKS} {FIGURES} {LESSONS} COMMIT;")
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION_ID:
        raise StoreError(
            f"{path.name} is a database of another program (application id {application:#x}, expected "
            f"{APPLICATION_ID:#x}): choose another --data"
        )
    if version not in (SCHEMA_VERSION, *(known - 1 for known in UPGRADES)):
        raise StoreError(
            f"{path.name} has schema version {version}, this program reads {SCHEMA_VERSION}: "
            f"{'upgrade resight' if version > SCHEMA_VERSION else 'restore it from a backup'} or choose another --data"
        )
    connection.execute("PRAGMA journal_mode=WAL")
    for newer in range(version + 1, SCHEMA_VERSION + 1):
        connection.executescript(f"BEGIN IMMEDIATE; {UPGRADES[newer]} PRAGMA user_version={newer}; COMMIT;")
        log.info("%s brought from schema version %d to %d", path.name, newer - 1, newer)


def _quick_check(connection: sqlite3.Connection, path: Path, limit_s: float) -> None:
    """Look for damage until the time is up; a large gallery is not kept from starting."""
    stop = time.monotonic() + limit_s
    connection.set_progress_handler(lambda: int(time.monotonic() > stop), 100_000)
    try:
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
            raise
        log.warning("quick check of %s stopped after %.1f s", path.name, limit_s)
        return
    finally:
        connection.set_progress_handler(None, 0)
    if found != "ok":
        raise StoreError(f"{path.name} is damaged ({found}): restore it from a backup")


def translated(error: sqlite3.Error, what: str = "the gallery's database") -> StoreError | StorageFullError:
    """The error of ours for one of SQLite's."""
    code = getattr(error, "sqlite_errorcode", None) or 0
    if code & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
        return StorageFullError(
            f"{what} cannot be written ({error}): nothing of this was stored; make room on the disk and try again"
        )
    return StoreError(f"{what} cannot be used ({error}): restore it from a backup")
