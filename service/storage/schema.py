"""The schema of a gallery's database: its tables, how a file is opened or created, and upgrades of older versions.

SQLite with WAL, a flush to disk per commit, and secure_delete, so that deleted data cannot be read from the file.

`CORE_TABLES` holds the searchable entries, `BOOKKEEPING_TABLES` operations, audit log and erase list,
`STATISTICS_TABLES` counts of searches, `FEEDBACK_TABLES` the verdicts that the next adaptation uses. A new file gets
all of them; `UPGRADES` brings an older file to the same tables, one version at a time.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
from pathlib import Path

from resight.errors import StorageFullError, StoreError

SCHEMA_VERSION = 3

CORE_TABLES = """
CREATE TABLE space (
    space_id TEXT PRIMARY KEY, model_id TEXT NOT NULL, dim INTEGER NOT NULL, created_us INTEGER NOT NULL,
    model_version TEXT NOT NULL DEFAULT '', calibration TEXT
) STRICT;
-- space_id is the one searched now; version counts changes of this row, for the etag; held counts entries, also
-- expired ones not yet purged, so that a full collection is noticed without counting.
CREATE TABLE collection (
    key INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, space_id TEXT NOT NULL REFERENCES space,
    ttl_us INTEGER, keep_crops INTEGER NOT NULL, revision INTEGER NOT NULL, created_us INTEGER NOT NULL,
    max_entries INTEGER NOT NULL DEFAULT 0, accept_probability REAL NOT NULL DEFAULT 0,
    reject_probability REAL NOT NULL DEFAULT 0, min_quality REAL NOT NULL DEFAULT 0,
    previous_space_id TEXT REFERENCES space, version INTEGER NOT NULL DEFAULT 1, held INTEGER NOT NULL DEFAULT 0
) STRICT;
-- AUTOINCREMENT: a key is the entry's id in the index and must never be reused.
CREATE TABLE entry (
    key INTEGER PRIMARY KEY AUTOINCREMENT, collection INTEGER NOT NULL REFERENCES collection ON DELETE CASCADE,
    entry_id TEXT NOT NULL, subject_id TEXT NOT NULL, camera_id TEXT NOT NULL, track_id TEXT NOT NULL,
    capture_us INTEGER, expire_us INTEGER, quality REAL NOT NULL, shot_count INTEGER NOT NULL,
    created_us INTEGER NOT NULL, version INTEGER NOT NULL DEFAULT 1, UNIQUE (collection, entry_id)
) STRICT;
CREATE INDEX entry_by_key ON entry (collection, key);
CREATE INDEX entry_by_camera ON entry (collection, camera_id, capture_us);
CREATE INDEX entry_by_time ON entry (collection, capture_us);
CREATE INDEX entry_by_subject ON entry (collection, subject_id);
CREATE INDEX entry_by_track ON entry (collection, track_id);
CREATE INDEX entry_by_expiry ON entry (expire_us) WHERE expire_us IS NOT NULL;
CREATE TABLE feature (
    entry INTEGER NOT NULL REFERENCES entry ON DELETE CASCADE, space_id TEXT NOT NULL REFERENCES space,
    vector BLOB NOT NULL, crc32 INTEGER NOT NULL, PRIMARY KEY (entry, space_id)
) STRICT;
CREATE TABLE crop (
    entry INTEGER NOT NULL REFERENCES entry ON DELETE CASCADE, number INTEGER NOT NULL, image BLOB NOT NULL,
    PRIMARY KEY (entry, number)
) STRICT;
CREATE TABLE label (
    entry INTEGER NOT NULL REFERENCES entry ON DELETE CASCADE, name TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (entry, name)
) STRICT, WITHOUT ROWID;
CREATE INDEX label_by_value ON label (name, value);
-- The index follows this log; rows it has applied are removed. entry 0: a change that does not concern the index.
CREATE TABLE change (
    revision INTEGER PRIMARY KEY AUTOINCREMENT, collection INTEGER NOT NULL REFERENCES collection ON DELETE CASCADE,
    entry INTEGER NOT NULL, deleted INTEGER NOT NULL
) STRICT;
CREATE INDEX change_by_collection ON change (collection, revision);
-- A replayed request is answered from the entry it created; it must not enrol again what was deleted since.
CREATE TABLE request (
    request_id TEXT PRIMARY KEY, digest BLOB NOT NULL, collection INTEGER NOT NULL REFERENCES collection
    ON DELETE CASCADE, entry INTEGER REFERENCES entry ON DELETE SET NULL, revision INTEGER NOT NULL,
    at_us INTEGER NOT NULL
) STRICT;
CREATE INDEX request_by_entry ON request (entry);
CREATE INDEX request_by_collection ON request (collection);
CREATE INDEX request_by_time ON request (at_us);
"""

DAY_S = 86_400
BOOKKEEPING_TABLES = f"""
-- The spaces a collection has features in: building, ready, active, retired. New entries are written to each.
CREATE TABLE collection_space (
    collection INTEGER NOT NULL REFERENCES collection ON DELETE CASCADE, space_id TEXT NOT NULL REFERENCES space,
    state TEXT NOT NULL CHECK (state IN ('building', 'ready', 'active', 'retired')), since_us INTEGER NOT NULL,
    PRIMARY KEY (collection, space_id)
) STRICT, WITHOUT ROWID;
CREATE TABLE operation (
    key INTEGER PRIMARY KEY AUTOINCREMENT, operation_id TEXT NOT NULL UNIQUE, kind TEXT NOT NULL, state TEXT NOT NULL,
    total INTEGER NOT NULL, succeeded INTEGER NOT NULL, failed INTEGER NOT NULL, skipped INTEGER NOT NULL,
    error BLOB, result TEXT NOT NULL, start_us INTEGER NOT NULL, end_us INTEGER, cancel INTEGER NOT NULL,
    request_id TEXT NOT NULL, details TEXT NOT NULL
) STRICT;
CREATE INDEX operation_by_request ON operation (request_id) WHERE request_id <> '';
-- Append-only: a row can be deleted only once it is older than the horizon, which is at least a day in the past.
CREATE TABLE audit (
    key INTEGER PRIMARY KEY AUTOINCREMENT, at_us INTEGER NOT NULL, principal TEXT NOT NULL, method TEXT NOT NULL,
    collection TEXT NOT NULL, subject_hash TEXT NOT NULL, affected INTEGER NOT NULL, reason TEXT NOT NULL
) STRICT;
CREATE INDEX audit_by_time ON audit (at_us);
CREATE TABLE audit_horizon (one INTEGER PRIMARY KEY CHECK (one = 1), before_us INTEGER NOT NULL) STRICT;
INSERT INTO audit_horizon VALUES (1, 0);
CREATE TRIGGER audit_stays BEFORE UPDATE ON audit BEGIN SELECT raise(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER audit_is_kept BEFORE DELETE ON audit
WHEN old.at_us >= (SELECT before_us FROM audit_horizon)
BEGIN SELECT raise(ABORT, 'the audit log is append-only'); END;
CREATE TRIGGER audit_horizon_rises BEFORE UPDATE ON audit_horizon
WHEN new.before_us < old.before_us OR new.before_us > (strftime('%s', 'now') - {DAY_S}) * 1000000
BEGIN SELECT raise(ABORT, 'the audit log is kept for a day at least'); END;
-- Erased subjects, removed again from a restored snapshot. entries: keys as JSON; up_to: the highest key at the time.
CREATE TABLE erased (
    key INTEGER PRIMARY KEY AUTOINCREMENT, at_us INTEGER NOT NULL, collection TEXT NOT NULL,
    subject_hash TEXT NOT NULL, up_to INTEGER NOT NULL, entries TEXT NOT NULL
) STRICT;
"""

STATISTICS_TABLES = """
-- Results of the searches in a space, per minute since 1970. bins: histogram of the best hits' cosine over -1..1, as
-- little-endian uint32 counts. Contains no query, entry or person.
CREATE TABLE search_minute (
    collection INTEGER NOT NULL REFERENCES collection ON DELETE CASCADE, space_id TEXT NOT NULL REFERENCES space,
    minute INTEGER NOT NULL, searches INTEGER NOT NULL, matches INTEGER NOT NULL, uncertain INTEGER NOT NULL,
    unknown INTEGER NOT NULL, hits INTEGER NOT NULL, probable INTEGER NOT NULL, cosine_sum REAL NOT NULL,
    probability_sum REAL NOT NULL, first_us INTEGER NOT NULL, last_us INTEGER NOT NULL, bins BLOB NOT NULL,
    PRIMARY KEY (collection, space_id, minute)
) STRICT, WITHOUT ROWID;
CREATE INDEX search_minute_by_time ON search_minute (minute);
-- The first best hits in a space, the reference for later ones, and the last minute that contributed.
CREATE TABLE search_reference (
    collection INTEGER NOT NULL REFERENCES collection ON DELETE CASCADE, space_id TEXT NOT NULL REFERENCES space,
    hits INTEGER NOT NULL, cosine_sum REAL NOT NULL, minute INTEGER NOT NULL, bins BLOB NOT NULL,
    PRIMARY KEY (collection, space_id)
) STRICT, WITHOUT ROWID;
"""

FEEDBACK_TABLES = """
-- Verdicts on pairs of entries: low < high, so that a pair has one row; a new verdict replaces the old one.
CREATE TABLE feedback (
    key INTEGER PRIMARY KEY AUTOINCREMENT, collection INTEGER NOT NULL REFERENCES collection ON DELETE CASCADE,
    low INTEGER NOT NULL REFERENCES entry ON DELETE CASCADE, high INTEGER NOT NULL REFERENCES entry ON DELETE CASCADE,
    same INTEGER NOT NULL, principal TEXT NOT NULL, at_us INTEGER NOT NULL, UNIQUE (low, high), CHECK (low < high)
) STRICT;
CREATE INDEX feedback_by_high ON feedback (high);
CREATE INDEX feedback_by_collection ON feedback (collection, key);
"""

# Version number: the statements that upgrade a file from the version before it.
UPGRADES = {
    2: f"""
ALTER TABLE space ADD COLUMN model_version TEXT NOT NULL DEFAULT '';
ALTER TABLE space ADD COLUMN calibration TEXT;
ALTER TABLE collection ADD COLUMN max_entries INTEGER NOT NULL DEFAULT 0;
ALTER TABLE collection ADD COLUMN accept_probability REAL NOT NULL DEFAULT 0;
ALTER TABLE collection ADD COLUMN reject_probability REAL NOT NULL DEFAULT 0;
ALTER TABLE collection ADD COLUMN min_quality REAL NOT NULL DEFAULT 0;
ALTER TABLE collection ADD COLUMN previous_space_id TEXT REFERENCES space;
ALTER TABLE collection ADD COLUMN version INTEGER NOT NULL DEFAULT 1;
ALTER TABLE collection ADD COLUMN held INTEGER NOT NULL DEFAULT 0;
ALTER TABLE entry ADD COLUMN version INTEGER NOT NULL DEFAULT 1;
{BOOKKEEPING_TABLES}
UPDATE collection SET held = (SELECT count(*) FROM entry e WHERE e.collection = collection.key);
INSERT INTO collection_space SELECT key, space_id, 'active', created_us FROM collection;
""",
    3: STATISTICS_TABLES + FEEDBACK_TABLES,
}


log = logging.getLogger(__name__)

APPLICATION_ID = 0x52534754  # "RSGT": distinguishes our file from any other SQLite database
# A 2 KB vector cannot share a 4 KB page: 16 KB pages store 512-d vectors in 57 % of the space and
# insert 1.7 times as fast; above 1024-d it is the other way round. It cannot be changed later.
SMALL_DIM, SMALL_DIM_PAGE, LARGE_DIM_PAGE = 1024, 16384, 4096


def connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    """A connection with our settings, in autocommit mode: transactions are started explicitly.

    One thread may use it at a time; any thread may close it.
    """
    busy_s = 10.0 if read_only else 0.1  # the only writer waits for readers just to empty the log, and retries that
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=busy_s)
    for pragma in ("foreign_keys=ON", "synchronous=FULL", "secure_delete=ON", "temp_store=MEMORY"):
        connection.execute(f"PRAGMA {pragma}")
    if read_only:
        connection.execute("PRAGMA query_only=ON")
    return connection


def open_database(path: Path, *, dim: int, quick_check_s: float) -> sqlite3.Connection:
    """Open a gallery's database for writing; creates the file when there is none.

    Args:
        path: of the file.
        dim: length of the features to be stored; decides the page size of a new file.
        quick_check_s: time limit for checking an existing file for damage.

    Raises:
        StoreError: another program's database, a newer version, or damaged.
        StorageFullError: no disk space for a new file.
    """
    try:
        if not path.exists():
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))  # SQLite gives the WAL the same mode
        connection = connect(path)
        try:
            _prepare_schema(connection, path, dim)
            _quick_check(connection, path, quick_check_s)
        except BaseException:
            connection.close()
            raise
        return connection
    except sqlite3.Error as error:
        raise translate_error(error, path.name) from error


def _prepare_schema(connection: sqlite3.Connection, path: Path, dim: int) -> None:
    """Create the tables in an empty file or upgrade an older one; refuse a foreign file or a newer version."""
    empty = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0] == 0
    if empty:
        connection.execute(f"PRAGMA page_size={SMALL_DIM_PAGE if dim <= SMALL_DIM else LARGE_DIM_PAGE}")
        connection.execute("PRAGMA journal_mode=WAL")
        marks = f"PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version={SCHEMA_VERSION};"
        connection.executescript(
            f"BEGIN; {marks} {CORE_TABLES} {BOOKKEEPING_TABLES} {STATISTICS_TABLES} {FEEDBACK_TABLES} COMMIT;"
        )
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
        log.info("%s upgraded from schema version %d to %d", path.name, newer - 1, newer)


def _quick_check(connection: sqlite3.Connection, path: Path, limit_s: float) -> None:
    """Check for damage until the time limit, so that a large gallery does not delay the start."""
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


def translate_error(error: sqlite3.Error, what: str = "the gallery's database") -> StoreError | StorageFullError:
    """The resight error for an SQLite error."""
    code = getattr(error, "sqlite_errorcode", None) or 0
    if code & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
        return StorageFullError(
            f"{what} cannot be written ({error}): nothing was stored; free disk space and try again"
        )
    return StoreError(f"{what} cannot be used ({error}): restore it from a backup")
