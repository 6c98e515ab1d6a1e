"""Copies of a gallery's database, made while it is in use: ``snapshots/NAME/`` with the database and a manifest.

A snapshot is what one transaction saw. Index files are left out, they are built anew; so is the folder's key, which
must be kept apart (`resight.service.secret`). Putting one back stands in `resight.service.restore`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resight.atomic import replace_folder, temporary_folder, write_atomic
from resight.errors import InputError, StorageFullError, StoreError
from resight.service.exchange import SNAPSHOTS
from resight.service.folder import DATABASE_FILE
from resight.service.schema import APPLICATION_ID, connect, translated
from resight.service.secret import keyed, load_key
from resight.service.tables import SCHEMA_VERSION

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
MAX_MANIFEST_BYTES = 1 << 20
PAGES_A_STEP = 1024  # 16 MiB between two tellings of progress
CHUNK = 1 << 20

Progress = Callable[[int, int], None]
"""Told pages copied and pages in all; what it raises ends the copy and leaves nothing."""


@dataclass(frozen=True)
class Manifest:
    """What a snapshot holds.

    Attributes:
        name: of its folder.
        created: ISO 8601, UTC.
        schema_version: of the database.
        bytes: of the database.
        sha256: of the database.
        entries: in all collections, expired ones too.
        collections: name to its entries and the space it is searched in.
        key_id: tells whether a folder's key is the one its hashes were made with.
        erased: lines of the erase list that it has taken account of.
    """

    name: str
    created: str
    schema_version: int
    bytes: int
    sha256: str
    entries: int
    collections: dict[str, dict[str, Any]]
    key_id: str
    erased: int
    format_version: int = FORMAT_VERSION


def key_id(key: bytes) -> str:
    """Names a key without telling it: 8 hexadecimal digits."""
    return keyed(key, "key-id")[:8]


def check_name(name: str) -> str:
    """A snapshot's name, which is never a path.

    Raises:
        InputError: another one than ``[a-z0-9][a-z0-9._-]{0,62}``.
    """
    if not NAME.fullmatch(name):
        raise InputError(
            f"a snapshot's name is 1-63 of a-z, 0-9, '.', '_' and '-', a letter or digit first; found {name!r}",
            field="snapshot_id",
        )
    return name


def name_of_now() -> str:
    """A name for a snapshot without one, from the clock."""
    return time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{time.time_ns() % 1_000_000_000 // 1_000_000:03d}"


def create(database: Path, name: str, *, progress: Progress | None = None) -> Manifest:
    """Copy a database, also while it is written to; takes a thread for the time of the copy.

    Readers and writers go on. Pages that are deleted meanwhile stay in the log until the copy is done.

    Raises:
        InputError: a bad name, or one that is taken.
        StorageFullError: no room for the copy; nothing is left of it.
        StoreError: the database is damaged.
    """
    final = database.parent / SNAPSHOTS / check_name(name)
    if final.exists():
        raise InputError(f"snapshot {name} exists: choose another name, or remove it first", field="snapshot_id")
    _make_private(final.parent)
    try:
        with temporary_folder(final) as folder:
            folder.chmod(0o700)
            copy = folder / DATABASE_FILE
            os.close(os.open(copy, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            _copy(database, copy, progress)
            manifest = described(copy, name, load_key(database.parent))
            write_atomic(folder / MANIFEST_FILE, (json.dumps(asdict(manifest), indent=1) + "\n").encode())
            replace_folder(folder, final)
    except sqlite3.Error as error:
        raise translated(error) from error
    except OSError as error:
        raise StorageFullError(f"snapshot {name} cannot be written: {error.strerror}: make room on the disk") from error
    return manifest


def names(folder: Path) -> list[str]:
    """The snapshots beside a database, by name; what is no snapshot is left out."""
    return [
        path.name
        for path in sorted((folder / SNAPSHOTS).glob("*"))
        if NAME.fullmatch(path.name) and not path.is_symlink() and (path / MANIFEST_FILE).is_file()
    ]


def listed(folder: Path) -> list[Manifest]:
    """Manifests of the snapshots beside a database, by name; raises StoreError for a damaged one."""
    return [manifest_of(folder, name) for name in names(folder)]


def remove(folder: Path, name: str) -> None:
    """Remove a snapshot; one that is not there is no error. Raises InputError for a bad name.

    What a kill has left of an older one under its name goes first, or the next start would put that in its place.
    """
    path = folder / SNAPSHOTS / check_name(name)
    shutil.rmtree(path.with_name(f".{name}.old"), ignore_errors=True)  # see `resight.atomic.replace_folder`
    if path.is_dir() and not path.is_symlink():
        gone = path.with_name(f".{name}.removed")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)  # in one step: a kill leaves all of it or nothing
        shutil.rmtree(gone, ignore_errors=True)


def manifest_of(folder: Path, name: str) -> Manifest:
    """Read a snapshot's manifest.

    Raises:
        InputError: a bad name.
        StoreError: there is none, or it is damaged or newer than this program.
    """
    path = folder / SNAPSHOTS / check_name(name) / MANIFEST_FILE
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            body = json.loads(file.read(MAX_MANIFEST_BYTES))
        found = Manifest(**body)
    except FileNotFoundError as error:
        raise StoreError(f"there is no snapshot {name} here: `resight snapshot list` tells which there are") from error
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"the manifest of snapshot {name} is damaged ({error}): use another snapshot") from error
    if found.format_version > FORMAT_VERSION or found.schema_version > SCHEMA_VERSION:
        raise StoreError(f"snapshot {name} is newer than this program: upgrade resight")
    return found


def verify(folder: Path, name: str) -> Manifest:
    """Read all of a snapshot and let SQLite check it.

    Raises:
        InputError: a bad name.
        StoreError: it is not there, altered, cut short, damaged or newer than this program.
    """
    manifest = manifest_of(folder, name)
    path = folder / SNAPSHOTS / name / DATABASE_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise StoreError(f"the database of snapshot {name} cannot be read: {error.strerror}") from error
    with os.fdopen(descriptor, "rb") as file:
        size, digest = os.fstat(descriptor).st_size, hashlib.file_digest(file, "sha256").hexdigest()
    if (size, digest) != (manifest.bytes, manifest.sha256):
        raise StoreError(
            f"snapshot {name} is not what was written ({size} bytes, expected {manifest.bytes}; SHA-256 "
            f"{'equal' if digest == manifest.sha256 else 'differs'}): use another snapshot"
        )
    try:
        with closing(_immutable(path)) as connection:
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (told,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        raise translated(error, f"snapshot {name}") from error
    if application != APPLICATION_ID or told != "ok":
        raise StoreError(f"snapshot {name} is damaged ({told}): use another snapshot")
    return manifest


def _immutable(path: Path) -> sqlite3.Connection:
    """Read a database that nobody writes, without making a log beside it."""
    return sqlite3.connect(path.resolve().as_uri() + "?immutable=1", uri=True)


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageFullError(f"folder {folder.name} cannot be made: {error.strerror}") from error


def _copy(database: Path, copy: Path, progress: Progress | None) -> None:
    """SQLite's online backup, inside one read, so that writes do not make it begin anew."""
    with closing(connect(database, read_only=True)) as source, closing(sqlite3.connect(copy)) as target:
        source.execute("BEGIN")
        source.execute("SELECT 1 FROM entry LIMIT 1").fetchone()

        def told(status: int, remaining: int, total: int) -> None:
            if progress is not None:
                progress(total - remaining, total)

        source.backup(target, pages=PAGES_A_STEP, progress=told, sleep=0.0)
        source.execute("COMMIT")
        target.execute("PRAGMA journal_mode=DELETE")  # one file, without a log beside it


def described(copy: Path, name: str, key: bytes) -> Manifest:
    """The manifest of a database that nobody writes to any more."""
    with copy.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    with closing(_immutable(copy)) as connection:
        rows = connection.execute(
            "SELECT name, space_id, (SELECT count(*) FROM entry e WHERE e.collection = c.key) FROM collection c"
        ).fetchall()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (erased,) = connection.execute("SELECT count(*) FROM erased").fetchone()
    return Manifest(
        name=name,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        schema_version=version,
        bytes=copy.stat().st_size,
        sha256=digest,
        entries=sum(count for *_, count in rows),
        collections={of: {"entries": count, "space_id": space} for of, space, count in rows},
        key_id=key_id(key),
        erased=erased,
    )
