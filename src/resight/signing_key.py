"""Private keys that sign bundles: Ed25519 in PKCS#8 PEM, in files that only their owner can read.

What is signed and how, see `resight.signature`. Needs the package ``cryptography``, imported only when called.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from resight.errors import AlreadyExistsError, BundleError
from resight.signature import PrivateKey, need_cryptography, to_public_file

MAX_KEY_BYTES = 16 * 1024  # an encrypted Ed25519 key in PEM has about 400


def generate_key(path: Path, passphrase: str | None = None) -> str:
    """Make a key: the private one at ``path``, readable by its owner only, the public one at ``path.pub``.

    Args:
        path: a new file.
        passphrase: encrypts the private key (PBES2, as ``cryptography`` chooses best); None leaves it plain.

    Returns:
        The public key, as `load_public_keys` and ``minisign -P`` take it.

    Raises:
        AlreadyExistsError: one of the two files exists; a key is never overwritten.
        BundleError: ``cryptography`` is missing, or the passphrase is empty.
        OSError: the disk refused.
    """
    need_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if passphrase == "":
        raise BundleError("expected a passphrase of at least one character, found none: type one, or leave it out")
    beside = public_path(path)
    for file in (path, beside):
        if os.path.lexists(file):
            raise AlreadyExistsError(f"expected a new file for the key, found {file}: choose another name")
    key = Ed25519PrivateKey.generate()
    lock = serialization.BestAvailableEncryption(passphrase.encode()) if passphrase else serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
    public = PrivateKey(key).public
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as private:
        private.write(pem)
        private.flush()
        os.fsync(private.fileno())
    with beside.open("x") as text:
        text.write(to_public_file(public))
    return public


def public_path(path: Path) -> Path:
    """Where `generate_key` puts the public half: ``site.key`` -> ``site.key.pub``."""
    return path.with_name(f"{path.name}.pub")


def load_private_key(path: Path, passphrase: str | None = None) -> PrivateKey:
    """Read a private key.

    Args:
        path: PKCS#8 PEM with an Ed25519 key, of `generate_key` or ``openssl genpkey -algorithm ed25519``.
        passphrase: where the key is encrypted.

    Raises:
        BundleError: ``cryptography`` is missing, no such file, others may read it, no Ed25519 key in it, or
            the passphrase does not fit.
    """
    need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    pem = _read_private(path)
    if is_encrypted(pem) and not passphrase:
        raise BundleError(f"the private key {path} is encrypted, found no passphrase: give it")
    try:
        key = load_pem_private_key(pem, passphrase.encode() if passphrase and is_encrypted(pem) else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise BundleError(
            f"expected an Ed25519 key in PKCS#8 PEM{' and its passphrase' if is_encrypted(pem) else ''} in {path}, "
            f"found something else ({error}): make one with `resight bundle keygen KEY`"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BundleError(
            f"expected an Ed25519 key in {path}, found {type(key).__name__.lstrip('_')}: "
            "make one with `resight bundle keygen KEY`"
        )
    return PrivateKey(key)


def is_encrypted(pem: bytes) -> bool:
    """Whether a PEM file needs a passphrase."""
    return b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in pem


def _read_private(path: Path) -> bytes:
    """The bytes of a file that nobody else may read; asked of the open file, so that it cannot be swapped."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise BundleError(
            f"expected a private key in {path}, found none ({error.strerror}): "
            "make one with `resight bundle keygen KEY`"
        ) from error
    with file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if os.name == "posix" and mode & 0o077:
            raise BundleError(
                f"expected a private key that only its owner may read, found mode {mode:04o} of {path}: "
                f"`chmod 600 {path}`, and make a new key if others may have read it"
            )
        return file.read(MAX_KEY_BYTES)
