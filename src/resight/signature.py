"""Ed25519 signatures in minisign's file format, so that `minisign -V` can check what we signed and we what it signed.

The format: https://jedisct1.github.io/minisign/. One thing is stricter here: the untrusted comment, which
minisign lets anyone change, is one fixed text, so that no byte of a signature file can change unnoticed.
Needs the package ``cryptography``, imported only when something is signed or verified: a machine without signed
bundles does without it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from resight.errors import BundleError
from resight.manifest import MANIFEST_FILE, SIGNATURE_FILE

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

UNTRUSTED = "untrusted comment: signature of a resight bundle"
TRUSTED = "trusted comment: "
MAX_COMMENT = 1024  # bytes; minisign reads trusted comments up to 8192
MAX_SIGNATURE_BYTES = 16 * 1024  # four lines; minisign's longest comment has 8 KiB
MAX_KEY_BYTES = 16 * 1024  # two lines; a comment may be long
_LEGACY, _PREHASHED = b"Ed", b"ED"  # signed is the data itself, or its BLAKE2b-512 (minisign's default)


@dataclass(frozen=True)
class PrivateKey:
    """A key that signs, as `resight.signing_key.load_private_key` reads it."""

    ed25519: Ed25519PrivateKey = field(repr=False)

    @property
    def public(self) -> str:
        """The public half, as `load_public_keys` and ``minisign -P`` take it.

        minisign draws key ids by chance; ours follow from the key, so that PKCS#8 need not hold them.
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
    """Sign a manifest the way ``minisign -S`` does.

    Args:
        data: its bytes.
        key: of the signer.
        trusted_comment: one printable line, signed too.

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
        public_key: the one key that may have signed, as its base64 line.

    Returns:
        The trusted comment.

    Raises:
        BundleError: ``cryptography`` is missing, the public key is none, or anything about the signature is not
            exactly as it was written.
    """
    need_cryptography()
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    expected_id, raw = _parse_public(public_key)
    head, comment, whole = _parse_signature(signature)
    algorithm, key_id, signed = head[:2], head[2:10], head[10:]
    if algorithm not in (_LEGACY, _PREHASHED):
        _refuse(f"the algorithm is {algorithm!r}, expected {_PREHASHED!r}, or {_LEGACY!r} of older programs")
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
    """Read public keys, each a minisign ``.pub`` file or the base64 line that is in it.

    Returns:
        The base64 lines, each once, in the order given.

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
            lines = file.read(MAX_KEY_BYTES).decode(errors="replace").splitlines()
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
    """Key id, 8 bytes that anyone may choose, and key, 32 bytes."""
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
    """Canonical base64 only: one spelling for each value; nothing for any other."""
    try:
        data = base64.b64decode(line, validate=True)
    except (binascii.Error, ValueError):
        return b""
    return data if _encode(data) == line else b""


def _printable(text: str) -> bool:
    """One line; tabs pass, because minisign's own comments have them."""
    return text.replace("\t", " ").isprintable()


def _refuse(why: str) -> NoReturn:
    raise BundleError(f"{SIGNATURE_FILE} is refused: {why}: copy the bundle again, or sign it with a key you trust")


def need_cryptography() -> None:
    """Say what to install where the package is missing.

    Raises:
        BundleError: it is missing.
    """
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise BundleError(
            "signatures need the package cryptography, found none: `pip install 'resight[sign]'`, or trust no key"
        ) from error
