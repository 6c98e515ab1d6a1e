"""Signatures: interchangeable with minisign's, and rejected if any byte is changed."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from resight.bundle.signing import (
    MAX_COMMENT,
    PrivateKey,
    generate_key,
    is_encrypted,
    load_private_key,
    load_public_keys,
    public_path,
    sign,
    verify,
)
from resight.errors import AlreadyExistsError, BundleError

DATA = b"the manifest of a bundle\n"
COMMENT = "bundle lobby\tspace 12"
# Made by minisign 0.11 of DATA: `minisign -S -W -c "signature of a resight bundle"`, then with -l.
THEIR_PUBLIC = "RWQStdAK7WSygMfGhbdvsqNgyFuqq4nUIaIiVfYrS7EKvLB2BdgkyK0i"
THEIR_PREHASHED = b"""untrusted comment: signature of a resight bundle
RUQStdAK7WSygH+WTZur6z1riSBoHm9+EiQfEcAeByPqX5c02vm1MvJ5dR5I60idyuTSx9fdVGJ8jVEVOs0s8ERQUfmvQLWbXQU=
trusted comment: by minisign 0.11
sAspEGqCy95Xii7quJVBBa1BMIda4KB580Azv7AoW0sol70RN6MiM2iz55/VQ2BWD565xo34DZoLyqvrrWQjCw==
"""
THEIR_LEGACY = b"""untrusted comment: signature of a resight bundle
RWQStdAK7WSygApMjcm3ffglS0cO4YPjKnGDhxZ2JxxbVmvpXw5bFb95p8FYff1ZFN0eSYtWpaKqoil9NFk6YlCy6b7f6vz+2wU=
trusted comment: timestamp:1795279346\tfile:manifest.json
Bo8OqaFvUmGVCwpTdAqXQIQ9Ly9UYzUIS4RNx5PIVfnuBNEF5D0fzXftY3Tmb4ulromQVfkjWVlbXCi6VOMTDg==
"""

needs_minisign = pytest.mark.skipif(shutil.which("minisign") is None, reason="the program minisign is not installed")


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> PrivateKey:
    path = tmp_path_factory.mktemp("keys") / "site.key"
    public = generate_key(path)
    loaded = load_private_key(path)
    assert loaded.public == public
    return loaded


def test_a_signature_is_verified_with_its_comment(key: PrivateKey) -> None:
    for comment in (COMMENT, "", "Zoë", "x" * MAX_COMMENT):
        assert verify(DATA, sign(DATA, key, comment), key.public) == comment
    assert verify(b"", sign(b"", key, COMMENT), key.public) == COMMENT
    assert sign(DATA, key, COMMENT) == sign(DATA, key, COMMENT)  # Ed25519 is deterministic


def test_the_file_is_minisigns_format(key: PrivateKey) -> None:
    """Parsed by the specification https://jedisct1.github.io/minisign/."""
    untrusted, signature, trusted, whole, end = sign(DATA, key, COMMENT).split(b"\n")
    assert (untrusted, end) == (b"untrusted comment: signature of a resight bundle", b"")
    assert trusted == b"trusted comment: " + COMMENT.encode()
    raw, public = base64.b64decode(signature), base64.b64decode(key.public)
    assert (raw[:2], public[:2], len(raw), len(public)) == (b"ED", b"Ed", 2 + 8 + 64, 2 + 8 + 32)
    assert raw[2:10] == public[2:10]
    ed25519 = key.ed25519.public_key()
    assert ed25519.public_bytes_raw() == public[10:]
    ed25519.verify(raw[10:], hashlib.blake2b(DATA).digest())
    ed25519.verify(base64.b64decode(whole), raw[10:] + COMMENT.encode())


def test_signatures_of_minisign_are_accepted_prehashed_and_legacy() -> None:
    assert verify(DATA, THEIR_PREHASHED, THEIR_PUBLIC) == "by minisign 0.11"
    assert verify(DATA, THEIR_LEGACY, THEIR_PUBLIC) == "timestamp:1795279346\tfile:manifest.json"


@pytest.mark.parametrize("whose", ["ours", "prehashed", "legacy"])
def test_every_changed_byte_of_a_signature_is_rejected(key: PrivateKey, whose: str) -> None:
    public = key.public if whose == "ours" else THEIR_PUBLIC
    whole = {"ours": sign(DATA, key, COMMENT), "prehashed": THEIR_PREHASHED, "legacy": THEIR_LEGACY}[whose]
    verify(DATA, whole, public)
    harms = [whole[:-1], whole + b"\n", b"\n" + whole, whole.replace(b"\n", b"\r\n"), b"", whole + whole]
    for place in range(len(whole)):
        for flip in (1, 2, 4, 8, 16, 32, 64, 128, 255):
            harms.append(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
        harms += [whole[:place] + whole[place + 1 :], whole[:place] + b"=" + whole[place:], whole[:place]]
    for harm in harms:
        with pytest.raises(BundleError, match=r"^manifest\.json\.minisig is rejected: .*: copy the bundle again"):
            verify(DATA, harm, public)


def test_only_canonical_base64_is_accepted(key: PrivateKey) -> None:
    """The last letter before `=` has unused bits: only its canonical value is accepted."""
    lines = sign(DATA, key, COMMENT).split(b"\n")
    assert lines[1].endswith(b"=") and lines[3].endswith(b"==")
    letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    for line, place in ((1, -2), (3, -3)):
        same = [
            lines[line][:place] + bytes([letter]) + lines[line][place + 1 :]
            for letter in letters
            if base64.b64decode(lines[line][:place] + bytes([letter]) + lines[line][place + 1 :])
            == base64.b64decode(lines[line])
        ]
        assert len(same) in (4, 16)
        for spelled in same:
            changed = b"\n".join([*lines[:line], spelled, *lines[line + 1 :]])
            if spelled != lines[line]:
                with pytest.raises(BundleError, match="canonical base64"):
                    verify(DATA, changed, key.public)


def test_other_data_and_other_keys_are_rejected(key: PrivateKey, tmp_path: Path) -> None:
    signature = sign(DATA, key, COMMENT)
    for place in range(len(DATA)):
        with pytest.raises(BundleError, match=r"manifest\.json is not the file"):
            verify(DATA[:place] + b"#" + DATA[place + 1 :], signature, key.public)
    other = generate_key(tmp_path / "other.key")
    with pytest.raises(BundleError, match=r"it is by the key with id [0-9a-f]{16}, expected"):
        verify(DATA, signature, other)
    # A key id is no proof: another key with the same id fails the signature.
    posing = base64.b64encode(base64.b64decode(key.public)[:10] + base64.b64decode(other)[10:]).decode()
    with pytest.raises(BundleError, match="is not the file that"):
        verify(DATA, signature, posing)
    for junk in ("", "RW", key.public[:-4], key.public + "AAAA", key.public.lower(), "\ud800", "x" * 56):
        with pytest.raises(BundleError, match="expected a minisign public key"):
            verify(DATA, signature, junk)


def test_a_signature_of_the_hash_is_not_one_of_the_data(key: PrivateKey) -> None:
    """Ed is a signature of the data, ED of its hash; they must not be interchangeable."""
    digest = hashlib.blake2b(DATA).digest()
    lines = sign(DATA, key, COMMENT).split(b"\n")
    lines[1] = base64.b64encode(b"Ed" + base64.b64decode(lines[1])[2:])
    assert (
        verify(digest, b"\n".join(lines), key.public) == COMMENT
    )  # a weakness of the format; a manifest is never a hash
    with pytest.raises(BundleError, match="is not the file that"):
        verify(DATA, b"\n".join(lines), key.public)


@pytest.mark.parametrize("comment", ["two\nlines", "bell\a", "x" * (MAX_COMMENT + 1), "\ud800"])
def test_comments_that_could_not_be_read_back_are_not_signed(key: PrivateKey, comment: str) -> None:
    with pytest.raises(BundleError, match="one printable line"):
        sign(DATA, key, comment)


def test_a_key_file_is_readable_only_by_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    mask = os.umask(0)
    try:
        public = generate_key(path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert public_path(path).read_text().splitlines()[1] == public
    for mode in (0o640, 0o604, 0o620, 0o601, 0o777):
        path.chmod(mode)
        with pytest.raises(BundleError, match=rf"found mode {mode:04o} of .*site\.key: `chmod 600"):
            load_private_key(path)
    path.chmod(0o400)
    assert load_private_key(path).public == public


@pytest.mark.parametrize("taken", ["site.key", "site.key.pub"])
def test_no_key_is_overwritten(tmp_path: Path, taken: str) -> None:
    (tmp_path / taken).symlink_to(tmp_path / "dangling")
    with pytest.raises(AlreadyExistsError, match=taken):
        generate_key(tmp_path / "site.key")
    assert [entry.name for entry in tmp_path.iterdir()] == [taken]


def test_a_passphrase_is_required_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    public = generate_key(path, "correct horse")
    assert is_encrypted(path.read_bytes())
    assert load_private_key(path, "correct horse").public == public
    for wrong, said in (
        (None, "is encrypted, found no passphrase"),
        ("", "no passphrase"),
        ("battery", "its passphrase"),
    ):
        with pytest.raises(BundleError, match=said):
            load_private_key(path, wrong)
    with pytest.raises(BundleError, match="at least one character"):
        generate_key(tmp_path / "other.key", "")
    plain = tmp_path / "plain.key"
    public = generate_key(plain)
    assert load_private_key(plain, "not needed").public == public


def test_other_private_keys_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "some.key"
    with pytest.raises(BundleError, match="found none"):
        load_private_key(path)
    other = generate_private_key(SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for content, said in ((b"", "something else"), (b"untrusted comment: x\nRWQ=\n", "something else"), (other, "EC")):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(BundleError, match=said):
            load_private_key(path)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the program openssl is not installed")
def test_a_key_of_openssl_signs(tmp_path: Path) -> None:
    path = tmp_path / "theirs.key"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", path], check=True, capture_output=True)
    path.chmod(0o600)
    theirs = load_private_key(path)
    assert verify(DATA, sign(DATA, theirs, COMMENT), theirs.public) == COMMENT


def test_public_keys_are_read_from_files_or_lines(key: PrivateKey, tmp_path: Path) -> None:
    file = tmp_path / "site.pub"
    file.write_text(f"untrusted comment: ours\n{key.public}\n")
    crlf = tmp_path / "windows.pub"
    crlf.write_bytes(f"untrusted comment: theirs\r\n{THEIR_PUBLIC}\r\n".encode())
    assert load_public_keys([file, str(crlf), THEIR_PUBLIC, key.public]) == (key.public, THEIR_PUBLIC)
    assert load_public_keys([]) == ()
    for content in (b"", b"\xff\xfe", b"untrusted comment: none\n", f"{key.public}\n{THEIR_PUBLIC}\n".encode()):
        file.write_bytes(content)
        with pytest.raises(BundleError, match=r"expected a minisign public key in .*site\.pub"):
            load_public_keys([file])
    for absent in (tmp_path / "absent", key.public[:-1], tmp_path):
        with pytest.raises(BundleError, match="or the file that holds it, found"):
            load_public_keys([absent])


def test_without_cryptography_only_verifying_fails_and_names_the_package() -> None:
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "import resight.bundle.bundle, resight.bundle.signing as s\n"
        f"print(s.load_public_keys(['{THEIR_PUBLIC}'])[0])\n"
        f"try: s.verify(b'', b'', '{THEIR_PUBLIC}')\n"
        "except resight.errors.BundleError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == THEIR_PUBLIC and "pip install" in second and "resight[sign]" in second


@needs_minisign
def test_minisign_accepts_ours(key: PrivateKey, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(DATA)
    (tmp_path / "manifest.json.minisig").write_bytes(sign(DATA, key, COMMENT))
    command = ["minisign", "-V", "-H", "-m", "manifest.json", "-P", key.public]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and f"Trusted comment: {COMMENT}" in done.stdout
    (tmp_path / "manifest.json").write_bytes(DATA + b" ")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode != 0


@needs_minisign
def test_minisign_reads_our_public_key_file(tmp_path: Path) -> None:
    generate_key(tmp_path / "site.key")
    (tmp_path / "m").write_bytes(DATA)
    (tmp_path / "m.minisig").write_bytes(sign(DATA, load_private_key(tmp_path / "site.key"), COMMENT))
    done = subprocess.run(["minisign", "-V", "-m", "m", "-p", "site.key.pub"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr


@needs_minisign
@pytest.mark.parametrize("more", [[], ["-l"], ["-t", "trusted by Zoë"]])
def test_minisigns_signatures_are_accepted(tmp_path: Path, more: list[str]) -> None:
    (tmp_path / "m").write_bytes(DATA)
    for command in (
        ["-G", "-W", "-p", "k.pub", "-s", "k.key"],
        ["-S", *more, "-W", "-s", "k.key", "-c", "signature of a resight bundle", "-m", "m"],
    ):
        done = subprocess.run(["minisign", *command], cwd=tmp_path, capture_output=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
    (public,) = load_public_keys([tmp_path / "k.pub"])
    assert verify(DATA, (tmp_path / "m.minisig").read_bytes(), public)
