"""Ed25519 signatures in minisign's file format, and their private keys.

The format is specified at https://jedisct1.github.io/minisign/; signatures are interchangeable with ``minisign -S`` and
``-V``. One rule is stricter here: the untrusted comment, which minisign does not sign, must be one fixed text, so that
every change of a signature file is detected. Private keys are PKCS#8 PEM in files that only their owner can read.

Needs the package ``cryptography``, which is imported only to sign or verify.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from resight.bundle.manifest import MANIFEST_FILE, SIGNATURE_FILE
from resight.errors import AlreadyExistsError, BundleError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


UNTRUSTED = "untrusted comment: signature of a resight bundle"
TRUSTED = "trusted comment: "
MAX_COMMENT = 1024  # bytes; minisign reads trusted comments up to 8192
MAX_SIGNATURE_BYTES = 16 * 1024  # four lines; minisign's longest comment has 8 KiB
MAX_PUBLIC_KEY_BYTES = 16 * 1024  # two lines; a comment may be long
_LEGACY, _PREHASHED = b"Ed", b"ED"  # of the data itself, or of its BLAKE2b-512 (minisign's default)


@dataclass(frozen=True)
class PrivateKey:
    """A private key; see `load_private_key`."""

    ed25519: Ed25519PrivateKey = field(repr=False)

    @property
    def public(self) -> str:
        """The public key in the form that `load_public_keys` and ``minisign -P`` read.

        minisign chooses random key ids; ours are derived from the key, because PKCS#8 cannot store them.
        """
        raw = self.ed25519.public_key().public_bytes_raw()
        key_id = hashlib.blake2b(raw, digest_size=8, person=b"resight-key-id").digest()
        return _encode(_LEGACY + key_id + raw).decode()


def to_public_file(public: str) -> str:
    """The text of a minisign ``.pub`` file.

    Raises:
        BundleError: not a public key.
    """
    number = int.from_bytes(_parse_public(public)[0], "little")  # as minisign writes it
    return f"untrusted comment: resight public key {number:016X}\n{public}\n"


def sign(data: bytes, key: PrivateKey, trusted_comment: str) -> bytes:
    """Sign a manifest like ``minisign -S``.

    Args:
        data: its bytes.
        key: of the signer.
        trusted_comment: one printable line, also signed.

    Returns:
        The signature file: four lines.

    Raises:
        BundleError: the comment is longer than 1024 bytes or not one printable line.
    """
    comment = trusted_comment.encode(errors="replace")
    if len(comment) > MAX_COMMENT or not _printable(trusted_comment):
        raise BundleError(
            f"expected a trusted comment of one printable line of at most {MAX_COMMENT} bytes, found {len(comment)} "
            f"bytes {trusted_comment[:80]!r}: shorten it"
        )
    signature = key.ed25519.sign(hashlib.blake2b(data).digest())
    whole = key.ed25519.sign(signature + comment)
    head = _PREHASHED + _parse_public(key.public)[0] + signature
    return b"\n".join((UNTRUSTED.encode(), _encode(head), TRUSTED.encode() + comment, _encode(whole), b""))


def verify(data: bytes, signature: bytes, public_key: str) -> str:
    """Check a signature file byte by byte.

    Args:
        data: the manifest's bytes.
        signature: the file, of `sign` or ``minisign -S -c "signature of a resight bundle"``.
        public_key: the signer's public key, as its base64 line.

    Returns:
        The trusted comment.

    Raises:
        BundleError: ``cryptography`` is missing, the public key is invalid, or the signature is invalid or altered.
    """
    require_cryptography()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    expected_id, raw = _parse_public(public_key)
    head, comment, whole = _parse_signature(signature)
    algorithm, key_id, signed = head[:2], head[2:10], head[10:]
    if algorithm not in (_LEGACY, _PREHASHED):
        _refuse(f"the algorithm is {algorithm!r}, expected {_PREHASHED!r}, or {_LEGACY!r} by older programs")
    if key_id != expected_id:
        _refuse(f"it is by the key with id {key_id.hex()}, expected {expected_id.hex()} of {public_key}")
    verifier = Ed25519PublicKey.from_public_bytes(raw)
    try:
        verifier.verify(signed, hashlib.blake2b(data).digest() if algorithm == _PREHASHED else data)
    except InvalidSignature:
        _refuse(f"{MANIFEST_FILE} is not the file that {public_key} signed")
    try:
        verifier.verify(whole, signed + comment)
    except InvalidSignature:
        _refuse(f"its trusted comment is not the one that {public_key} signed")
    text = comment.decode(errors="replace")
    if not _printable(text):
        _refuse(f"expected a trusted comment of one printable line, found {text[:80]!r}")
    return text


def load_public_keys(keys: Iterable[Path | str]) -> tuple[str, ...]:
    """Read public keys, each a minisign ``.pub`` file or its base64 line.

    Returns:
        The base64 lines without duplicates, in the given order.

    Raises:
        BundleError: neither a file nor a key, or a file without a key.
    """
    found = []
    for key in keys:
        line = str(key)
        if isinstance(key, Path) or not _is_public(line):
            line = _read_public(Path(key))
        found.append(line)
    return tuple(dict.fromkeys(found))


def _read_public(path: Path) -> str:
    try:
        with path.open("rb") as file:
            lines = file.read(MAX_PUBLIC_KEY_BYTES).decode(errors="replace").splitlines()
    except OSError as error:
        raise BundleError(
            f"expected a minisign public key of 56 base64 characters or the file that holds it, found {str(path)!r} "
            f"({error.strerror}): give the .pub file that `resight bundle keygen` or `minisign -G` wrote"
        ) from error
    lines = [line.strip() for line in lines if line.strip() and not line.startswith("untrusted comment:")]
    if len(lines) != 1 or not _is_public(lines[0]):
        raise BundleError(
            f"expected a minisign public key in {path}, a comment and 56 base64 characters, found "
            f"{len(lines)} other lines: give the .pub file that `resight bundle keygen` or `minisign -G` wrote"
        )
    return lines[0]


def _parse_signature(signature: bytes) -> tuple[bytes, bytes, bytes]:
    """Algorithm, key id and signature (74 bytes), trusted comment, signature of both (64 bytes)."""
    lines = signature.split(b"\n")
    if len(lines) != 5 or lines[4]:
        _refuse(f"expected four lines, each ended by a newline, found {len(lines)} parts and {len(signature)} bytes")
    if lines[0] != UNTRUSTED.encode():
        _refuse(f"expected the first line {UNTRUSTED!r}, found {lines[0][:80]!r}")
    if not lines[2].startswith(TRUSTED.encode()):
        _refuse(f"expected a third line that begins with {TRUSTED!r}, found {lines[2][:80]!r}")
    head, whole = _decode(lines[1]), _decode(lines[3])
    if len(head) != 74 or len(whole) != 64:
        _refuse(f"expected signatures of 74 and 64 bytes in canonical base64, found {len(head)} and {len(whole)}")
    return head, lines[2][len(TRUSTED) :], whole


def _parse_public(line: str) -> tuple[bytes, bytes]:
    """Key id (8 bytes, arbitrary) and key (32 bytes)."""
    raw = _decode(line.encode(errors="replace"))
    if len(raw) != 42 or raw[:2] != _LEGACY:
        raise BundleError(
            f"expected a minisign public key of 56 base64 characters beginning with RW, found {line[:80]!r}: "
            "give the second line of the .pub file"
        )
    return raw[2:10], raw[10:]


def _is_public(line: str) -> bool:
    raw = _decode(line.encode(errors="replace"))
    return len(raw) == 42 and raw[:2] == _LEGACY


def _encode(data: bytes) -> bytes:
    return base64.b64encode(data)


def _decode(line: bytes) -> bytes:
    """Decode canonical base64; empty for any other input."""
    try:
        data = base64.b64decode(line, validate=True)
    except (binascii.Error, ValueError):
        return b""
    return data if _encode(data) == line else b""


def _printable(text: str) -> bool:
    """Whether a text is one printable line; tabs are allowed, because minisign's own comments have them."""
    return text.replace("\t", " ").isprintable()


def _refuse(why: str) -> NoReturn:
    raise BundleError(f"{SIGNATURE_FILE} is rejected: {why}: copy the bundle again, or sign it with a key you trust")


def require_cryptography() -> None:
    """Check that the package ``cryptography`` is installed.

    Raises:
        BundleError: it is missing.
    """
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise BundleError(
            "signatures need the package cryptography, found none: `pip install 'resight[sign]'`, or trust no key"
        ) from error


MAX_PRIVATE_KEY_BYTES = 16 * 1024  # an encrypted Ed25519 key in PEM has about 400


def generate_key(path: Path, passphrase: str | None = None) -> str:
    """Create a key pair: the private key at ``path``, readable by its owner only, the public key at ``path.pub``.

    Args:
        path: a new file.
        passphrase: encrypts the private key (PBES2 with ``cryptography``'s best algorithm); None = not encrypted.

    Returns:
        The public key in the form that `load_public_keys` and ``minisign -P`` read.

    Raises:
        AlreadyExistsError: one of the two files exists; a key is never overwritten.
        BundleError: ``cryptography`` is missing, or the passphrase is empty.
        OSError: writing failed.
    """
    require_cryptography()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if passphrase == "":
        raise BundleError("expected a passphrase of at least one character, found none: type one, or omit it")
    public_file = public_path(path)
    for file in (path, public_file):
        if os.path.lexists(file):
            raise AlreadyExistsError(f"expected a new file for the key, found {file}: choose another name")
    key = Ed25519PrivateKey.generate()
    cipher = serialization.BestAvailableEncryption(passphrase.encode()) if passphrase else serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, cipher)
    public = PrivateKey(key).public
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as private:
        private.write(pem)
        private.flush()
        os.fsync(private.fileno())
    with public_file.open("x") as text:
        text.write(to_public_file(public))
    return public


def public_path(path: Path) -> Path:
    """The file of the public key that `generate_key` writes: ``site.key`` -> ``site.key.pub``."""
    return path.with_name(f"{path.name}.pub")


def load_private_key(path: Path, passphrase: str | None = None) -> PrivateKey:
    """Read a private key.

    Args:
        path: PKCS#8 PEM with an Ed25519 key, made by `generate_key` or ``openssl genpkey -algorithm ed25519``.
        passphrase: if the key is encrypted.

    Raises:
        BundleError: ``cryptography`` is missing, no such file, others may read it, no Ed25519 key in it, or
            the passphrase does not fit.
    """
    require_cryptography()
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
    """Read a file that only its owner may read; the mode is checked on the open file, so that it cannot be swapped."""
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
        return file.read(MAX_PRIVATE_KEY_BYTES)
