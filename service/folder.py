"""The data folder: held by one server at a time, which tells its address there.

``lock`` is held with flock, so the kernel frees it however the holder dies; ``server.json`` exists
while the server is ready.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Self

from resight.errors import InputError, StartupError, StorageFullError
from resight.service.auth import DEFAULT_TENANT

DATABASE_FILE = "gallery.sqlite3"
LOCK_FILE = "lock"
SERVER_FILE = "server.json"
TENANTS_FOLDER = "tenants"
TENANT_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


class DataFolder:
    """Holds the folder between ``with`` and its end.

    Raises:
        StartupError: the folder cannot be made or written, or another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)  # features of people: for the owner only
            self._lock = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StartupError(
                f"data folder {path} cannot be written: {error.strerror}: choose another with --data"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(self._lock, 32).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            raise StartupError(
                f"data folder {path} is held by process {holder}: stop that server or choose another --data",
                holder=holder,
            ) from error
        os.truncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def announce(self, address: str, space_id: str, metrics_url: str = "") -> None:
        """Tell that the server is ready, and where: one atomic write of ``server.json``."""
        told = {"address": address, "pid": os.getpid(), "space_id": space_id}
        text = json.dumps({**told, "metrics": metrics_url} if metrics_url else told)
        temporary = self.path / f"{SERVER_FILE}.tmp"
        try:
            temporary.write_text(text + "\n")
            temporary.replace(self.path / SERVER_FILE)
        except OSError as error:
            raise StorageFullError(f"{self.path / SERVER_FILE} cannot be written: {error.strerror}") from error

    def withdraw(self) -> None:
        """Take ``server.json`` away: stopping, or a remnant of a server that was killed."""
        with contextlib.suppress(FileNotFoundError):
            (self.path / SERVER_FILE).unlink()

    def __enter__(self) -> Self:
        self.withdraw()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.withdraw()
        os.close(self._lock)


def tenant_folder(data: Path, name: str) -> Path:
    """Where a tenant's database stands: the default one's in the data folder itself.

    Raises:
        InputError: no name of a tenant.
    """
    if not TENANT_NAME.fullmatch(name):
        raise InputError(f"a tenant's name is 1-63 of a-z 0-9 . _ -, a letter or digit first; found {name!r}")
    return data if name == DEFAULT_TENANT else data / TENANTS_FOLDER / name


def disk_bytes(folder: Path) -> int:
    """What a tenant's files take on the disk, less its snapshots and the folders of other tenants."""
    files = [*folder.glob(f"{DATABASE_FILE}*"), *folder.glob("index/*")]
    return sum(path.stat().st_size for path in files if path.is_file())
