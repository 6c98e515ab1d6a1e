"""The last step of a restore, which every start finishes: a prepared database takes the place of the one in use.

Before the marker is written the old database counts, after it the new one. The old one's log must go before the new
file comes, or SQLite would read the new one through it; between the two a crash leaves a database without its log,
which is why a start must not open it before `finish` ran.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from resight.atomic import sync, write_atomic
from resight.errors import StorageFullError
from resight.service.folder import DATABASE_FILE

log = logging.getLogger(__name__)

READY = "restored.sqlite3"
MARKER = "restoring"
INDEX_FOLDER = "index"
SNAPSHOTS = "snapshots"
LOGS = ("-wal", "-shm", "-journal")


def exchange(folder: Path) -> None:
    """Put the prepared database, which is whole and on the disk, in the place of the one in use.

    Raises:
        StorageFullError: the folder cannot be written; the old database counts, or the new one after the next start.
    """
    try:
        write_atomic(folder / MARKER, b"")
    except OSError as error:
        raise StorageFullError(f"a restore cannot be begun: {error.strerror}: make room on the disk") from error
    finish(folder)


def finish(folder: Path) -> None:
    """End an exchange that was begun, or clear away one, and snapshots, that were only half prepared.

    Mostly there is nothing to do.

    Raises:
        StorageFullError: the folder cannot be written.
    """
    database, ready = folder / DATABASE_FILE, folder / READY
    try:
        _settle_snapshots(folder / SNAPSHOTS)
        if not (folder / MARKER).exists():
            remove(ready)
            return
        if ready.exists():
            for suffix in LOGS:
                _beside(database, suffix).unlink(missing_ok=True)
            ready.replace(database)
        shutil.rmtree(folder / INDEX_FOLDER, ignore_errors=True)  # it is of the old one, and is built anew
        sync(folder)
        (folder / MARKER).unlink()
        sync(folder)
    except OSError as error:
        raise StorageFullError(f"a restore cannot be finished: {error.strerror}: let {folder} be written") from error
    log.info("a restored database took the place of the old one in %s", folder.name)


def _settle_snapshots(folder: Path) -> None:
    """Put back a snapshot that was moved aside and has no successor yet; remove what else a crash left."""
    for remnant in folder.glob(".*"):
        final = folder / remnant.name.removeprefix(".").removesuffix(".old")
        if remnant.name.endswith(".old") and not final.exists():  # see resight.atomic.replace_folder
            remnant.rename(final)
        else:
            shutil.rmtree(remnant)


def remove(database: Path) -> None:
    """Remove a database and what SQLite keeps beside it; one that is not there is no error."""
    for suffix in ("", *LOGS):
        _beside(database, suffix).unlink(missing_ok=True)


def _beside(database: Path, suffix: str) -> Path:
    return database.with_name(database.name + suffix)
