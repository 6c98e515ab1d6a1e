"""The token file: stored content, lookup, damaged and insecure files."""

import hashlib
import json
import subprocess
import sys
from datetime import timedelta

import pytest

from resight.errors import FormatError, InputError, NotFoundError
from resight.service.access import auth as module
from resight.service.access.auth import Principal, Role, TokenFile, TokenLookup


@pytest.fixture
def file(tmp_path) -> TokenFile:
    return TokenFile(tmp_path / "data")


@pytest.fixture
def eager(monkeypatch):
    """Check the token file at every call."""
    monkeypatch.setattr(module, "RELOAD_EVERY_S", 0.0)


def test_a_token_is_256_random_bits_and_only_its_hash_is_kept(file):
    secrets = {file.create("anna", Role.READER)[0] for _ in range(20)}
    assert len(secrets) == 20
    kept = file.path.read_text()
    for secret in secrets:
        assert secret.startswith("rst_") and len(secret) == 4 + 52  # base32 of 32 bytes
        assert secret not in kept and secret[4:] not in kept
        assert hashlib.sha256(secret.encode()).hexdigest() in kept
    assert file.path.stat().st_mode & 0o777 == 0o600
    assert file.path.parent.stat().st_mode & 0o777 == 0o700


def test_a_token_has_its_tenant_and_role(file):
    secret, made = file.create("anna", Role.ENROLLER, tenant="north", lifetime=timedelta(days=1))
    lookup = TokenLookup(file)
    assert lookup.find(secret) == Principal("anna", "north", Role.ENROLLER)
    assert file.read() == [made]
    for wrong in ("", "rst_", secret[:-1], secret.upper(), secret + "a", made.sha256, "rst_é"):
        assert lookup.find(wrong) is None


def test_an_expired_token_is_unknown(file):
    secret, _ = file.create("anna", Role.ADMIN, lifetime=timedelta(seconds=-1))
    assert TokenLookup(file).find(secret) is None


def test_two_tokens_of_a_name_are_valid_during_rotation(file, eager):
    old, first = file.create("anna", Role.READER)
    lookup = TokenLookup(file)
    new, _ = file.create("anna", Role.READER)
    assert lookup.find(old) and lookup.find(new)
    assert file.revoke("anna", token_id=first.token_id) == 1
    assert lookup.find(old) is None and lookup.find(new)


def test_revoking_the_last_token_keeps_authentication_on(file, eager):
    secret, _ = file.create("anna", Role.ADMIN)
    lookup = TokenLookup(file)
    assert file.revoke("anna") == 1
    assert lookup.find(secret) is None and lookup.required and TokenLookup(file).required
    file.path.unlink()
    assert lookup.find(secret) is None and lookup.required


def test_the_first_token_turns_authentication_on(file, eager):
    lookup = TokenLookup(file)
    assert not lookup.required
    secret, _ = file.create("anna", Role.ADMIN)
    assert lookup.find(secret) and lookup.required


def test_revoking_an_unknown_token_is_an_error(file):
    file.create("anna", Role.READER)
    for wrong in ({"name": "bob"}, {"name": "anna", "token_id": "00000000"}):
        with pytest.raises(NotFoundError, match="resight token list"):
            file.revoke(**wrong)
    assert len(file.read()) == 1


@pytest.mark.parametrize("name", ["", "Anna", "../anna", ".anna", "a/b", "a" * 64, "a b", "a\n"])
def test_names_that_could_be_paths_or_lines_are_refused(file, name):
    for made in ({"name": name}, {"name": "anna", "tenant": name}):
        with pytest.raises(InputError, match="a-z"):
            file.create(role=Role.READER, **made)
    assert not file.exists()


def damaged(raw: dict, **changes: object) -> str:
    one = raw["tokens"][0] | changes
    return json.dumps(raw | {"tokens": [one]})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: "",
        lambda raw: "[]",
        lambda raw: json.dumps(raw | {"schema_version": 2}),
        lambda raw: json.dumps(raw | {"more": 1}),
        lambda raw: damaged(raw, role="root"),
        lambda raw: damaged(raw, role=4),
        lambda raw: damaged(raw, role=["admin"]),
        lambda raw: damaged(raw, sha256="00"),
        lambda raw: damaged(raw, name=None),
        lambda raw: damaged(raw, tenant="../north"),
        lambda raw: damaged(raw, expires="tomorrow"),
        lambda raw: damaged(raw, expires="2030-01-01T00:00:00"),
        lambda raw: damaged(raw, more=1),
        lambda raw: json.dumps(raw)[:-5],
    ],
)
def test_a_damaged_file_rejects_all_tokens(file, eager, spoil):
    secret, _ = file.create("anna", Role.ADMIN)
    lookup = TokenLookup(file)
    good = file.path.read_text()
    file.path.write_text(spoil(json.loads(good)))
    for _ in range(2):
        with pytest.raises(FormatError, match=r"damaged.*restore it"):
            lookup.find(secret)
    with pytest.raises(FormatError):
        TokenLookup(file)
    file.path.write_text(good)
    assert lookup.find(secret)


def test_a_file_accessible_to_others_is_refused(file):
    file.create("anna", Role.ADMIN)
    file.path.chmod(0o640)
    with pytest.raises(FormatError, match="chmod 600"):
        file.read()


def test_concurrent_processes_lose_no_tokens(file):
    code = (
        "import sys; from pathlib import Path; from resight.service.access.auth import Role\n"
        "from resight.service.access.auth import TokenFile\n"
        "for n in range(8): TokenFile(Path(sys.argv[1])).create(sys.argv[2], Role.READER)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(file.path.parent), f"p{number}"]) for number in range(3)
    ]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert sorted(one.name for one in file.read()) == ["p0"] * 8 + ["p1"] * 8 + ["p2"] * 8
