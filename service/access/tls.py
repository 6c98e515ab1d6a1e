"""TLS and mTLS: certificate, key and client CA from files, reloaded when the files change.

gRPC requests the certificate for each new connection, so a replaced file is used from the next connection on, without
a restart; open connections keep the old one until their maximum age (30 minutes). gRPC supports only TLS 1.2 and 1.3.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from resight.errors import StartupError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

log = logging.getLogger(__name__)

WARN_BEFORE = timedelta(days=14)  # 90-day certificates are usually renewed 30 days before their end; half of that
WARN_EVERY_S = 24 * 3600.0
PRIVATE_IF_OURS, PRIVATE_IF_NOT = 0o077, 0o027  # PostgreSQL's rule: another owner's (a mounted secret) may be 0640


@dataclass(frozen=True)
class TlsFiles:
    """Paths of the PEM files.

    Attributes:
        certificate: of the server, followed by its chain.
        key: its private key, not encrypted.
        client_ca: CA certificates of clients; None = clients need no certificate.
    """

    certificate: Path
    key: Path
    client_ca: Path | None


@dataclass(frozen=True)
class _LoadedCertificates:
    config: grpc.ServerCertificateConfiguration
    ends: tuple[tuple[Path, datetime], ...]


class Certificates:
    """The server's TLS credentials, reloaded when their files change.

    Raises:
        StartupError: a file is missing, not PEM or expired, the key is readable by others or does not match.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()  # gRPC calls `_reload` from its own threads
        self._seen = self._stamp()
        self._loaded = _load_certificates(files)
        self._warned = -WARN_EVERY_S
        self._warn()

    def credentials(self) -> grpc.ServerCredentials:
        """Credentials for `grpc.aio.Server.add_secure_port`; with a client CA, clients must present a certificate."""
        return grpc.dynamic_ssl_server_credentials(
            self._loaded.config,
            self._reload,  # type: ignore[arg-type]  # the stubs lack None, which means "no change"
            require_client_authentication=self._files.client_ca is not None,
        )

    def _reload(self) -> grpc.ServerCertificateConfiguration | None:
        """The new configuration if the files changed since the last connection and are usable, else None."""
        with self._lock:
            stamp = self._stamp()
            if stamp == self._seen:
                self._warn()
                return None
            try:
                loaded = _load_certificates(self._files)
            except (
                StartupError
            ) as error:  # perhaps only one of two files was replaced so far: retry at the next connection
                log.error("changed TLS files rejected, the old certificate remains in use: %s", error)
                return None
            self._seen, self._loaded = stamp, loaded
            log.info("TLS files changed: new connections use the certificate of %s", self._files.certificate.name)
            self._warned = -WARN_EVERY_S
            self._warn()
            return loaded.config

    def _stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        """Identifies a version of the files, or of the targets of links to them (Kubernetes swaps links)."""
        return tuple(_stamp(path) for path in (self._files.certificate, self._files.key, self._files.client_ca))

    def _warn(self) -> None:
        """Log certificates that expire soon, once a day."""
        if time.monotonic() - self._warned < WARN_EVERY_S:
            return
        self._warned = time.monotonic()
        now = datetime.now(UTC)
        for path, end in self._loaded.ends:
            if end - now < WARN_BEFORE:
                log.warning("certificate %s expires on %s: renew it", path, f"{end:%Y-%m-%d %H:%M} UTC")


def _stamp(path: Path | None) -> tuple[int, int, int] | None:
    try:
        found = path.stat() if path is not None else None
    except OSError:
        return None
    return found and (found.st_ino, found.st_mtime_ns, found.st_size)


def _load_certificates(files: TlsFiles) -> _LoadedCertificates:
    """Read and check the files.

    Raises:
        StartupError: see `Certificates`.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise StartupError("TLS requires the package cryptography: `pip install 'resight[service]'`") from error
    certificate, key = _read(files.certificate), _read_private(files.key)
    chain = _parse_certificates(files.certificate, certificate)
    try:
        same = load_pem_private_key(key, password=None).public_key() == chain[0].public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise StartupError(
            f"{files.key} is not an unencrypted private key in PEM: remove its passphrase or pass another file"
        ) from error
    if not same:
        raise StartupError(f"{files.key} does not match {files.certificate}: pass the key of this certificate")
    ends = [(files.certificate, one.not_valid_after_utc) for one in chain]
    roots = None
    if files.client_ca is not None:
        roots = _read(files.client_ca)
        ends += [(files.client_ca, one.not_valid_after_utc) for one in _parse_certificates(files.client_ca, roots)]
    now = datetime.now(UTC)
    for path, end in ends[:1]:
        if end <= now:
            raise StartupError(f"certificate {path} expired on {end:%Y-%m-%d %H:%M} UTC: renew it")
    return _LoadedCertificates(grpc.ssl_server_certificate_configuration([(key, certificate)], roots), tuple(ends))


def _parse_certificates(path: Path, data: bytes) -> list[Certificate]:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise StartupError(f"{path} contains no PEM certificate: pass a file that begins with -----BEGIN") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error.strerror}: pass a PEM file") from error


def _read_private(path: Path) -> bytes:
    """Read a private key; raises StartupError if other users can read it."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            data = file.read()
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error.strerror}: pass the key in PEM") from error
    if found.st_mode & (PRIVATE_IF_OURS if found.st_uid == os.getuid() else PRIVATE_IF_NOT):
        raise StartupError(
            f"private key {path} is accessible to other users (mode {found.st_mode & 0o777:04o}): chmod 600 it"
        )
    return data
