"""What `resight doctor` looks at in a data folder, also while its server runs: nothing is written.

Every tenant's database is read whole: SQLite's own check, the checksum of each feature, the kept graphs and the
snapshots.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from resight.service import snapshot
from resight.service.doctor import MIB, Check, disk, failing, judged
from resight.service.exchange import INDEX_FOLDER, MARKER
from resight.service.folder import DATABASE_FILE, LOCK_FILE, TENANT_NAME, TENANTS_FOLDER
from resight.service.schema import APPLICATION_ID, connect
from resight.service.segment import sound
from resight.service.tables import SCHEMA_VERSION
from resight.service.tokens import TokenFile

WAL_MIB = 256  # the log is emptied far below; more means that a reader holds it, or that checkpoints fail


def data(folder: Path) -> list[Check]:
    """A whole data folder."""
    if not folder.is_dir():
        return [Check("data", "folder", "fail", f"{folder} is not there", "name the folder that `resight serve` made")]
    checks = [_held(folder), disk(folder), *_permissions(folder)]
    with failing("data", "tokens", checks, "see docs/security.md"):
        tokens = TokenFile(folder)
        if tokens.exists():
            checks.append(Check("data", "tokens", "ok", f"{len(tokens.read())} kept, as hashes"))
    for name, place in _tenants(folder):
        checks += _tenant(f"{name}: " if name else "", place)
    return checks


def _tenants(folder: Path) -> Iterator[tuple[str, Path]]:
    yield "", folder
    for path in sorted((folder / TENANTS_FOLDER).glob("*")):
        if TENANT_NAME.fullmatch(path.name) and (path / DATABASE_FILE).is_file():
            yield path.name, path


def _held(folder: Path) -> Check:
    """Whether a server holds the folder; asked for and given back at once."""
    try:
        lock = os.open(folder / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return Check("data", "lock", "ok", "no server has used it yet")
    except OSError as error:
        return Check("data", "lock", "fail", str(error), "run the doctor as the server's user")
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 32).decode(errors="replace").strip()
        return Check("data", "lock", "ok", f"held by process {holder}")
    finally:
        os.close(lock)
    return Check("data", "lock", "ok", "free")


def _permissions(folder: Path) -> Iterator[Check]:
    """The folder and what tells of people are for their owner alone."""
    open_ = []
    for path in (folder, *folder.rglob("*")):
        found = path.lstat()
        secret = path == folder or path.name in ("tokens.json", "secret.key") or path.name.startswith(DATABASE_FILE)
        if secret and stat.S_IMODE(found.st_mode) & 0o077:
            open_.append(path.name)
    step = f"chmod -R go= {folder}"
    yield judged("data", "permissions", not open_, ", ".join(open_[:5]) + " open to others" if open_ else "ok", step)
    foreign = folder.stat().st_uid != os.getuid()
    told = f"owner {folder.stat().st_uid}, this is user {os.getuid()}"
    yield judged("data", "owner", not foreign, told, "run the doctor as the server's user")


def _tenant(whose: str, place: Path) -> list[Check]:
    """One tenant's database, graphs and snapshots."""
    checks: list[Check] = []
    database, restore = place / DATABASE_FILE, "restore a snapshot: resight snapshot restore (docs/operations.md)"
    if not database.is_file():
        return [Check("data", f"{whose}database", "warn", "there is none yet", "start the server once")]
    if (place / MARKER).exists():
        return [
            Check("data", f"{whose}database", "warn", "a restore was cut short", "start the server: it finishes it")
        ]
    wal = place / f"{DATABASE_FILE}-wal"
    size = wal.stat().st_size // MIB if wal.exists() else 0
    step = "stop the server orderly once; if it grows again, look for long reads and a full disk in its log"
    checks.append(judged("data", f"{whose}write-ahead log", size <= WAL_MIB, f"{size} MiB", step))
    with failing("data", f"{whose}database", checks, restore), closing(connect(database, read_only=True)) as opened:
        checks += _database(whose, opened, restore)
        checks.append(_graphs(whose, place))
    for name in snapshot.names(place):
        step = "remove it and make another one"
        with failing("data", f"{whose}snapshot {name}", checks, step):
            found = snapshot.verify(place, name)
            checks.append(Check("data", f"{whose}snapshot {name}", "ok", f"{found.entries} entries, {found.created}"))
    return checks


def _database(whose: str, opened: sqlite3.Connection, restore: str) -> Iterator[Check]:
    (application,) = opened.execute("PRAGMA application_id").fetchone()
    (found,) = opened.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID or found > SCHEMA_VERSION:
        told = f"application {application:#x}, schema {found}; expected {APPLICATION_ID:#x}, {SCHEMA_VERSION}"
        yield Check("data", f"{whose}schema", "fail", told, "upgrade resight, or name another folder")
        return
    step = "start the server once: it brings it up to date"
    yield judged("data", f"{whose}schema", found == SCHEMA_VERSION, f"version {found}", step)
    problems = [row[0] for row in opened.execute("PRAGMA integrity_check(10)").fetchall()]
    good = problems == ["ok"]
    yield judged("data", f"{whose}integrity", good, "; ".join(problems), restore, "fail")
    if not good:
        return
    count, damaged = 0, []
    for entry, vector, crc32 in opened.execute("SELECT entry, vector, crc32 FROM feature"):
        count += 1
        if zlib.crc32(vector) != crc32:
            damaged.append(entry)
    wrong = f"{len(damaged)} of {count} damaged, of entries with keys {damaged[:10]}"
    seen = wrong if damaged else f"{count} checksums are right"
    yield judged("data", f"{whose}features", not damaged, seen, "enrol these anew, or " + restore, "fail")


def _graphs(whose: str, place: Path) -> Check:
    """Kept graphs; a start reads them as hostile and builds again what is of no use."""
    kept = sorted((place / INDEX_FOLDER).glob("*.graph"))
    bad = [path.name for path in kept if not sound(path)]
    found = f"damaged: {', '.join(bad)}" if bad else f"{len(kept)} kept"
    return judged("data", f"{whose}graphs", not bad, found, "nothing: the next start builds them again")
