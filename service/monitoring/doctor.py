"""The checks of `resight doctor`: the machine, a bundle, a running server, and a data folder, also while it is in use.

Each check reports ok, warn or fail, what was found, and what to do next. Nothing is changed. Every tenant's database is
read completely: SQLite's integrity check, the checksum of each feature, the saved graphs and the snapshots.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import sqlite3
import stat
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from resight.bundle.bundle import open_bundle
from resight.client import Client
from resight.errors import ReIDError
from resight.files import files_below
from resight.locks import lock_holder
from resight.machine import cores
from resight.runtime.onnx import OnnxRuntime
from resight.runtime.providers import open_runtime
from resight.service.access.auth import TokenFile
from resight.service.index.graph import is_intact
from resight.service.storage import snapshots
from resight.service.storage.data_folder import (
    DATABASE_FILE,
    INDEX_FOLDER,
    LOCK_FILE,
    SWAP_MARKER,
    TENANT_NAME,
    TENANTS_FOLDER,
    disk_room,
)
from resight.service.storage.schema import APPLICATION_ID, SCHEMA_VERSION, connect

Verdict = Literal["ok", "warn", "fail"]
MIB = 1 << 20
PACKAGES = ("resight", "numpy", "pillow", "grpcio", "protobuf", "onnxruntime", "faiss-cpu")
MIN_MEMORY_MIB = 1024  # a server with an empty gallery and a ResNet-50 uses half of it
MIN_OPEN_FILES = 1024  # for connections, pipes and the databases of 64 tenants
PINGS = 5


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        area: machine, bundle, data or server.
        name: of the check.
        verdict: ok, warn or fail.
        found: what was found.
        next_step: what to do; empty when the check passed.
    """

    area: str
    name: str
    verdict: Verdict
    found: str
    next_step: str = ""


def make_check(area: str, name: str, good: bool, found: str, next_step: str, bad: Verdict = "warn") -> Check:
    """A passed check, or a failed one with its next step."""
    return Check(area, name, "ok", found) if good else Check(area, name, bad, found, next_step)


@contextlib.contextmanager
def catch_failure(area: str, name: str, checks: list[Check], next_step: str) -> Iterator[None]:
    """Turn an error inside the block into a failed check, so that later checks still run."""
    try:
        yield
    except (ReIDError, OSError, sqlite3.Error) as error:
        checks.append(Check(area, name, "fail", str(error), next_step))


def check_machine() -> list[Check]:
    """Versions, providers, cores, memory, clock and limits of this machine and this process."""
    import onnxruntime

    checks = [Check("machine", "versions", "ok", f"python {platform.python_version()}, {', '.join(_versions())}")]
    sqlite = sqlite3.sqlite_version_info >= (3, 38)
    found = f"SQLite {sqlite3.sqlite_version}"
    checks.append(make_check("machine", "sqlite", sqlite, found, "install a Python with SQLite 3.38 or newer", "fail"))
    providers = [name.removesuffix("ExecutionProvider").lower() for name in onnxruntime.get_available_providers()]
    step = "pip install 'resight[cpu]' again: onnxruntime has no CPU provider"
    checks.append(make_check("machine", "providers", "cpu" in providers, ", ".join(providers), step, "fail"))
    usable = cores()
    checks.append(
        make_check("machine", "cores", usable >= 2, str(usable), "use two: one core decodes and infers in turn")
    )
    free, total = _memory_mib()
    found = f"{free} of {total} MiB available"
    checks.append(
        make_check("machine", "memory", free >= MIN_MEMORY_MIB, found, f"a server needs {MIN_MEMORY_MIB} MiB free")
    )
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    checks.append(
        make_check(
            "machine", "open files", soft >= MIN_OPEN_FILES, str(soft), f"ulimit -n {MIN_OPEN_FILES}, or LimitNOFILE"
        )
    )
    now = datetime.now(UTC)
    built = datetime.fromtimestamp(Path(__file__).stat().st_mtime, UTC)
    step = "set the clock (NTP): expiry and certificates depend on it"
    checks.append(make_check("machine", "clock", now >= built, f"{now:%Y-%m-%d %H:%M:%S} UTC", step, "fail"))
    return checks


def _versions() -> Iterator[str]:
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            yield f"{name} {version(name)}"


def _memory_mib() -> tuple[int, int]:
    """Available and total MiB, within the limits of the control group."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (int(lines[name].split()[0]) // 1024 for name in ("MemAvailable", "MemTotal"))
    with contextlib.suppress(OSError, ValueError):  # "max", or another kind of control group
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text()) // MIB
        used = int(Path("/sys/fs/cgroup/memory.current").read_text()) // MIB
        free, total = min(free, limit - used), min(total, limit)
    return free, total


def check_disk(folder: Path) -> Check:
    """Free disk space of a folder, against the default watermarks of `resight serve`."""
    free, total = disk_room(folder)
    found = f"{free // MIB} of {total // MIB} MiB free"
    good = free >= 512 * MIB and free >= 0.07 * total
    return make_check("data", "disk", good, found, "free disk space: below 256 MiB or 2 % the server refuses writes")


def check_bundle(path: Path) -> list[Check]:
    """A bundle's checksums, and its probes through this machine's decoder, resize and onnxruntime."""
    checks: list[Check] = []
    with catch_failure("bundle", "bytes", checks, "copy or export the bundle again"):
        opened = open_bundle(path)
        manifest = opened.manifest
        found = f"{manifest.name}, space {manifest.space_id}, {manifest.feature_dim}-d"
        checks.append(Check("bundle", "bytes", "ok", found))
        fitted = manifest.calibration is not None
        step = "searches return no probability: export it with a calibration (docs/calibration.md)"
        checks.append(make_check("bundle", "calibration", fitted, "present" if fitted else "none", step))
        with catch_failure("bundle", "probes", checks, "export the bundle again with the version that serves it"):
            runtime = open_runtime(opened, provider="cpu", precision="fp32", max_batch=8)
            cosine = f"smallest cosine {runtime.min_cosine:.6f}" if isinstance(runtime, OnnxRuntime) else "passed"
            checks.append(Check("bundle", "probes", "ok", cosine))
    return checks


def check_server(connect: Callable[[], Client]) -> list[Check]:
    """Health, limits and response time of a running server."""
    checks: list[Check] = []
    with catch_failure(
        "server", "reachable", checks, "start it with `resight serve`, or see its log and docs/security.md"
    ):
        with connect() as client:
            client.wait_ready(3.0)
            checks.append(Check("server", "health", "ok", "SERVING"))
            info = client.info()
            same = info.version == version("resight")
            found = f"resight {info.version}, model {info.model}, {info.provider}"
            step = f"this is {version('resight')}: use one version"
            checks.append(make_check("server", "version", same, found, step))
            limits = ", ".join(f"{name} {value}" for name, value in sorted(info.limits.items()))
            checks.append(Check("server", "limits", "ok", limits))
            times = []
            for _ in range(PINGS):
                started = time.perf_counter()
                client.info()
                times.append((time.perf_counter() - started) * 1000)
            median = statistics.median(times)
            step = "above 50 ms for a trivial call: a slow network or an overloaded machine; see its metrics"
            checks.append(make_check("server", "latency", median < 50, f"{median:.1f} ms, median of {PINGS}", step))
    return checks


MAX_WAL_MIB = 256  # normally the log is emptied long before; more means a long read, or failing checkpoints


def check_data(folder: Path) -> list[Check]:
    """All checks of a data folder, with those of every tenant."""
    if not folder.is_dir():
        return [Check("data", "folder", "fail", f"{folder} does not exist", "name the folder of `resight serve`")]
    checks = [_check_lock(folder), check_disk(folder), *_check_permissions(folder)]
    with catch_failure("data", "tokens", checks, "see docs/security.md"):
        tokens = TokenFile(folder)
        if tokens.exists():
            checks.append(Check("data", "tokens", "ok", f"{len(tokens.read())} stored, as hashes"))
    for name, place in _tenant_folders(folder):
        checks += _check_tenant(f"{name}: " if name else "", place)
    return checks


def _tenant_folders(folder: Path) -> Iterator[tuple[str, Path]]:
    yield "", folder
    for path in sorted((folder / TENANTS_FOLDER).glob("*")):
        if TENANT_NAME.fullmatch(path.name) and (path / DATABASE_FILE).is_file():
            yield path.name, path


def _check_lock(folder: Path) -> Check:
    """Whether a server holds the folder's lock; tries to acquire it, and releases it at once."""
    path = folder / LOCK_FILE
    try:
        holder = lock_holder(path)
    except OSError as error:
        return Check("data", "lock", "fail", str(error), "run the doctor as the server's user")
    if holder is not None:
        return Check("data", "lock", "ok", f"held by process {holder}")
    return Check("data", "lock", "ok", "free" if path.exists() else "no server has used it yet")


def _check_permissions(folder: Path) -> Iterator[Check]:
    """Whether the folder and the files with personal data or secrets are accessible to their owner only."""
    open_ = []
    for path in (folder, *files_below(folder)):
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue  # the server that is running has removed it
        secret = path == folder or path.name in ("tokens.json", "secret.key") or path.name.startswith(DATABASE_FILE)
        if secret and stat.S_IMODE(found.st_mode) & 0o077:
            open_.append(path.name)
    step = f"chmod -R go= {folder}"
    yield make_check(
        "data", "permissions", not open_, ", ".join(open_[:5]) + " open to others" if open_ else "ok", step
    )
    foreign = folder.stat().st_uid != os.getuid()
    found_owner = f"owner {folder.stat().st_uid}, this is user {os.getuid()}"
    yield make_check("data", "owner", not foreign, found_owner, "run the doctor as the server's user")


def _check_tenant(whose: str, place: Path) -> list[Check]:
    """One tenant's database, graphs and snapshots."""
    checks: list[Check] = []
    database, restore = place / DATABASE_FILE, "restore a snapshot: resight snapshot restore (docs/operations.md)"
    if not database.is_file():
        return [Check("data", f"{whose}database", "warn", "none yet", "start the server once")]
    if (place / SWAP_MARKER).exists():
        return [
            Check("data", f"{whose}database", "warn", "a restore was interrupted", "start the server: it finishes it")
        ]
    wal = place / f"{DATABASE_FILE}-wal"
    size = wal.stat().st_size // MIB if wal.exists() else 0
    step = "stop the server cleanly once; if it grows again, check its log for long reads and a full disk"
    checks.append(make_check("data", f"{whose}write-ahead log", size <= MAX_WAL_MIB, f"{size} MiB", step))
    with (
        catch_failure("data", f"{whose}database", checks, restore),
        closing(connect(database, read_only=True)) as opened,
    ):
        checks += _check_database(whose, opened, restore)
        checks.append(_check_graphs(whose, place))
    for name in snapshots.list_names(place):
        step = "remove it and create a new one"
        with catch_failure("data", f"{whose}snapshot {name}", checks, step):
            found = snapshots.verify(place, name)
            checks.append(Check("data", f"{whose}snapshot {name}", "ok", f"{found.entries} entries, {found.created}"))
    return checks


def _check_database(whose: str, opened: sqlite3.Connection, restore: str) -> Iterator[Check]:
    (application,) = opened.execute("PRAGMA application_id").fetchone()
    (found,) = opened.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION_ID or found > SCHEMA_VERSION:
        problem = f"application {application:#x}, schema {found}; expected {APPLICATION_ID:#x}, {SCHEMA_VERSION}"
        yield Check("data", f"{whose}schema", "fail", problem, "upgrade resight, or name another folder")
        return
    step = "start the server once: it upgrades the database"
    yield make_check("data", f"{whose}schema", found == SCHEMA_VERSION, f"version {found}", step)
    problems = [row[0] for row in opened.execute("PRAGMA integrity_check(10)").fetchall()]
    good = problems == ["ok"]
    yield make_check("data", f"{whose}integrity", good, "; ".join(problems), restore, "fail")
    if not good:
        return
    count, damaged = 0, []
    for entry, vector, crc32 in opened.execute("SELECT entry, vector, crc32 FROM feature"):
        count += 1
        if zlib.crc32(vector) != crc32:
            damaged.append(entry)
    wrong = f"{len(damaged)} of {count} damaged, of entries with keys {damaged[:10]}"
    result = wrong if damaged else f"{count} checksums are correct"
    yield make_check("data", f"{whose}features", not damaged, result, "enrol these again, or " + restore, "fail")


def _check_graphs(whose: str, place: Path) -> Check:
    """Saved graphs; a start validates them and rebuilds damaged ones."""
    saved = sorted((place / INDEX_FOLDER).glob("*.graph"))
    bad = [path.name for path in saved if not is_intact(path)]
    found = f"damaged: {', '.join(bad)}" if bad else f"{len(saved)} saved"
    return make_check("data", f"{whose}graphs", not bad, found, "nothing: the next start builds them again")
