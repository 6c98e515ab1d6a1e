"""TLS and mTLS: certificate, key and client CA from files, taken up anew when the files change.

gRPC asks for the certificate at each new connection, so a replaced file counts from the next one, without
a restart; connections that stand keep what they began with, at most for their age (30 minutes).
gRPC's core speaks TLS 1.2 and 1.3 only.
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

WARN_BEFORE = timedelta(days=14)  # half of what is left of a 90-day certificate when renewals begin, at 30 days
WARN_EVERY_S = 24 * 3600.0
PRIVATE_IF_OURS, PRIVATE_IF_NOT = 0o077, 0o027  # PostgreSQL's rule: another owner's (a mounted secret) may be 0640


@dataclass(frozen=True)
class TlsFiles:
    """Where the PEM files are.

    Attributes:
        certificate: of the server, with the chain below it.
        key: its private key, not encrypted.
        client_ca: certificates that sign clients'; None = clients need none.
    """

    certificate: Path
    key: Path
    client_ca: Path | None


@dataclass(frozen=True)
class _LoadedCertificates:
    config: grpc.ServerCertificateConfiguration
    ends: tuple[tuple[Path, datetime], ...]


class Certificates:
    """The server's credentials, which follow their files.

    Raises:
        StartupError: a file is missing, not PEM, out of date, open to others, or the key is of another certificate.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._lock = threading.Lock()  # gRPC asks from its own threads
        self._seen = self._stamp()
        self._loaded = _load_certificates(files)
        self._warned = -WARN_EVERY_S
        self._warn()

    def credentials(self) -> grpc.ServerCredentials:
        """For `grpc.aio.Server.add_secure_port`; clients must show a certificate where a client CA is given."""
        return grpc.dynamic_ssl_server_credentials(
            self._loaded.config,
            self._fetch,  # type: ignore[arg-type]  # the stubs forget None, "no change"
            require_client_authentication=self._files.client_ca is not None,
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """What changed since the last connection; None = nothing, or nothing that can be used."""
        with self._lock:
            stamp = self._stamp()
            if stamp == self._seen:
                self._warn()
                return None
            try:
                loaded = _load_certificates(self._files)
            except StartupError as error:  # perhaps one of two files is replaced: look again at the next connection
                log.error("new TLS files are not used, the old certificate stays: %s", error)
                return None
            self._seen, self._loaded = stamp, loaded
            log.info("TLS files changed: new connections get the certificate of %s", self._files.certificate.name)
            self._warned = -WARN_EVERY_S
            self._warn()
            return loaded.config

    def _stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        """What changes when a file does, or the target of a link to it (Kubernetes swaps links)."""
        return tuple(_stamp(path) for path in (self._files.certificate, self._files.key, self._files.client_ca))

    def _warn(self) -> None:
        """Tell once a day what ends soon."""
        if time.monotonic() - self._warned < WARN_EVERY_S:
            return
        self._warned = time.monotonic()
        now = datetime.now(UTC)
        for path, end in self._loaded.ends:
            if end - now < WARN_BEFORE:
                log.warning("certificate %s ends on %s: renew it", path, f"{end:%Y-%m-%d %H:%M} UTC")


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
        raise StartupError(
            "TLS needs the package cryptography, found none: `pip install 'resight[service]'`"
        ) from error
    certificate, key = _read(files.certificate), _read_private(files.key)
    chain = _parse_certificates(files.certificate, certificate)
    try:
        same = load_pem_private_key(key, password=None).public_key() == chain[0].public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise StartupError(f"{files.key} is no private key in PEM without a passphrase: write one so") from error
    if not same:
        raise StartupError(f"{files.key} is not the key of {files.certificate}: give the two that belong together")
    ends = [(files.certificate, one.not_valid_after_utc) for one in chain]
    roots = None
    if files.client_ca is not None:
        roots = _read(files.client_ca)
        ends += [(files.client_ca, one.not_valid_after_utc) for one in _parse_certificates(files.client_ca, roots)]
    now = datetime.now(UTC)
    for path, end in ends[:1]:
        if end <= now:
            raise StartupError(f"certificate {path} ended on {end:%Y-%m-%d %H:%M} UTC: renew it")
    return _LoadedCertificates(grpc.ssl_server_certificate_configuration([(key, certificate)], roots), tuple(ends))


def _parse_certificates(path: Path, data: bytes) -> list[Certificate]:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise StartupError(f"{path} holds no certificate in PEM: give the file that begins -----BEGIN") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error.strerror}: name a PEM file") from error


def _read_private(path: Path) -> bytes:
    """A private key's bytes, unless others could have read them."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            data = file.read()
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error.strerror}: name the key in PEM") from error
    if found.st_mode & (PRIVATE_IF_OURS if found.st_uid == os.getuid() else PRIVATE_IF_NOT):
        raise StartupError(f"private key {path} is open to others (mode {found.st_mode & 0o777:04o}): chmod 600 it")
    return data
