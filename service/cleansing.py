"""Erased people leave the snapshots beside the database too, at the next purge.

A snapshot that was made before an erasure is written anew without them, and takes the old one's place in one step. A
restore would leave them out in any case (`resight.service.restore`); this takes their bytes off the disk.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

from resight.atomic import replace_folder, temporary_folder, write_atomic
from resight.errors import ReIDError, StorageFullError
from resight.service import erasure, snapshot
from resight.service.erasure import Erased
from resight.service.exchange import SNAPSHOTS
from resight.service.folder import DATABASE_FILE
from resight.service.schema import open_database, translated
from resight.service.secret import register
from resight.service.snapshot import MANIFEST_FILE, Manifest
from resight.service.store import Store

log = logging.getLogger(__name__)


async def cleanse(store: Store) -> int:
    """Write anew every snapshot that may hold somebody who was erased since; returns how many.

    One that cannot be written anew, for want of room or because it is damaged, is named in the log and tried again.
    """
    lines = await store.read(erasure.in_database)
    done = 0
    for name in await asyncio.to_thread(snapshot.names, store.folder):
        try:
            done += await asyncio.to_thread(_without, store.folder, name, store.key, lines)
        except ReIDError as error:
            if name not in await asyncio.to_thread(snapshot.names, store.folder):
                continue  # somebody removed it meanwhile
            log.error("erased people may still be in snapshot %s, remove it or see to this: %s", name, error)
    return done


def _without(folder: Path, name: str, key: bytes, lines: Sequence[Erased]) -> bool:
    """Whether the snapshot had to be written anew, as it now is."""
    before = snapshot.manifest_of(folder, name)
    if before.erased >= len(lines):
        return False
    snapshot.verify(folder, name)
    final = folder / SNAPSHOTS / name
    try:
        with temporary_folder(final) as made:
            made.chmod(0o700)
            copy = made / DATABASE_FILE
            os.close(os.open(copy, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            shutil.copyfile(final / DATABASE_FILE, copy)
            gone = _replay(copy, key, lines)
            after: Manifest = replace(snapshot.described(copy, name, key), created=before.created)
            write_atomic(made / MANIFEST_FILE, (json.dumps(asdict(after), indent=1) + "\n").encode())
            replace_folder(made, final)
    except OSError as error:
        raise StorageFullError(f"it cannot be written anew: {error.strerror}: make room on the disk") from error
    log.info("snapshot %s written anew without %d entries of erased people", name, gone)
    return True


def _replay(copy: Path, key: bytes, lines: Sequence[Erased]) -> int:
    try:
        with closing(open_database(copy, dim=0, quick_check_s=0.0)) as connection:
            register(connection, key)
            connection.execute("BEGIN IMMEDIATE")
            gone = erasure.replay(connection, key, lines)
            connection.execute("COMMIT")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.Error as error:
        raise translated(error, copy.parent.name) from error
    return gone
