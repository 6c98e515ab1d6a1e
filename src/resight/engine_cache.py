"""Where TensorRT's engines lie on the machine that built them: a private folder that trusts only its own hand.

An engine is executable code, and TensorRT runs what it is given ("never deserialize an engine file from an untrusted
source", its migration guide). So each file carries an HMAC by a secret that never leaves the folder: a plan that was
copied from elsewhere, altered, cut short or renamed is not loaded but built anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from resight.atomic import write_atomic
from resight.errors import StartupError

log = logging.getLogger(__name__)

SECRET_FILE, LOCK_FILE = "secret", "lock"
SECRET_BYTES = 32  # as long as the HMAC's digest (RFC 2104, section 3)
MAX_FILE_BYTES = 2**32  # an engine of ResNet-50 takes 100 MB; a timing cache less
_MAGIC = b"resight-engine-1\n"
_PRIVATE = 0o077  # what group and others must not have


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/resight/engines``, or the same below ``~/.cache`` (XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "resight" / "engines"


class EngineCache:
    """A folder of sealed files, for one user of one machine.

    Args:
        folder: made with mode 0700 when missing; `default_folder` by default.

    Raises:
        StartupError: the folder or its secret is a link, of another owner, open to others, or cannot be written.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir(mode=0o700)
            self._check_folder()
            self._secret = self._open_secret()
        except OSError as error:
            raise StartupError(
                f"engine cache {self.folder} cannot be used: {error.strerror}: choose another with --engine-cache"
            ) from error

    def _check_folder(self) -> None:
        status = self.folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & _PRIVATE:
            raise StartupError(
                f"engine cache {self.folder}: expected a folder of this user alone (mode 0700), found "
                f"{stat.filemode(status.st_mode)} of user {status.st_uid}: engines are executable code; remove it, or "
                "choose another with --engine-cache"
            )

    def _open_secret(self) -> bytes:
        path = self.folder / SECRET_FILE
        if not path.exists() and not path.is_symlink():
            made = self.folder / f".{SECRET_FILE}.{os.getpid()}"
            self._write(made, secrets.token_bytes(SECRET_BYTES))
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(made)  # the first of two processes wins, and neither overwrites
            made.unlink()
        secret = _read_private(path)
        if secret is None or len(secret) != SECRET_BYTES:
            raise StartupError(
                f"{path}: expected {SECRET_BYTES} bytes in a file of this user alone (mode 0600), found something "
                f"else: remove the folder {self.folder}, its engines are built anew"
            )
        return secret

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder: one process builds at a time, for two on one GPU would spoil each other's timings."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(self.folder / LOCK_FILE, flags, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log.info("another process builds an engine in %s: waiting for it", self.folder)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def load(self, name: str, key: bytes) -> bytes | None:
        """What `store` put there under this name and key.

        Args:
            name: a file name.
            key: everything the content depends on; part of the seal.

        Returns:
            The content, or None when there is none, or it is not ours: the log says so.
        """
        path = self.folder / name
        if not path.exists() and not path.is_symlink():
            return None
        data = _read_private(path)
        start = len(_MAGIC) + hashlib.sha256().digest_size
        if data is not None and data.startswith(_MAGIC):
            content = data[start:]
            if hmac.compare_digest(data[len(_MAGIC) : start], self._seal(name, key, content)):
                return content
        log.warning("%s was not sealed here as it stands (altered, cut short, or copied): it is built anew", path)
        return None

    def store(self, name: str, key: bytes, content: bytes) -> None:
        """Seal and write a file, all or nothing."""
        self._write(self.folder / name, _MAGIC + self._seal(name, key, content) + content)

    def _seal(self, name: str, key: bytes, content: bytes) -> bytes:
        parts = b"".join(hashlib.sha256(part).digest() for part in (name.encode(), key, content))
        return hmac.digest(self._secret, _MAGIC + parts, "sha256")

    @contextlib.contextmanager
    def sealed_folder(self, name: str, key: bytes) -> Iterator[Path]:
        """A folder that another library keeps its engines in: checked before the block, sealed after it.

        Whatever in it was not there when it was last sealed, or was altered since, empties it first.
        """
        folder, seal = self.folder / name, f"{name}.seal"
        if folder.is_symlink():
            folder.unlink()
        told = self.load(seal, key)
        if folder.exists() and (told is None or told != _list(folder)):
            log.warning("%s is not as it was left: emptied, its engines are built anew", folder)
            shutil.rmtree(folder)
        folder.mkdir(mode=0o700, exist_ok=True)
        yield folder
        for path in folder.iterdir():
            path.chmod(0o600)
        self.store(seal, key, _list(folder))

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        write_atomic(path, data)
        path.chmod(0o600)  # the folder is closed to others anyway


def _list(folder: Path) -> bytes:
    """Names and digests of a folder's files; anything else in it makes a list that no seal holds."""
    found = {}
    for path in sorted(folder.iterdir()):
        data = _read_private(path) if path.is_file() else None
        found[path.name] = secrets.token_hex() if data is None else hashlib.sha256(data).hexdigest()
    return json.dumps(found).encode()


def _read_private(path: Path) -> bytes | None:
    """The bytes of a regular file of this user alone; None for anything else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    status = os.fstat(descriptor)
    ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & _PRIVATE
    if not ours or status.st_size > MAX_FILE_BYTES:
        os.close(descriptor)
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read()
