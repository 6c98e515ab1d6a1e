"""Roles, principals, API tokens, and the least role of every method.

`resight.service.access.interceptors` sets the principal of a call; servicers ask `current` for it, before they hand
work to another task or thread that serves several callers.

Tokens have 256 random bits, are shown once, when they are made, and are kept as SHA-256 in ``DATA/tokens.json``; a fast
hash is enough, since they cannot be guessed. `resight token` writes the file while a server runs, and the server reads
it again within half a second.
"""

from __future__ import annotations

import base64
import contextlib
import enum
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

from filelock import FileLock

from resight.errors import FormatError, InputError, NotFoundError
from resight.files import write_atomic
from resight.locks import OWNER_ONLY
from resight.service.records import DEFAULT_TENANT


class Role(enum.IntEnum):
    """What a principal may do; each role may do all that the ones below it may."""

    READER = 1
    ENROLLER = 2
    OPERATOR = 3
    ADMIN = 4

    @property
    def word(self) -> str:
        """The name as it stands in files, flags and messages."""
        return self.name.lower()


@dataclass(frozen=True)
class Principal:
    """Who calls.

    Attributes:
        name: of the credential, for the audit log and the limits on rate.
        tenant: whose galleries they see; never taken from a request.
        role: what they may do.
    """

    name: str
    tenant: str
    role: Role


ANONYMOUS_ADMIN = Principal("anonymous", DEFAULT_TENANT, Role.ADMIN)  # authentication is off
_principal: ContextVar[Principal] = ContextVar("resight_principal", default=ANONYMOUS_ADMIN)


def current() -> Principal:
    """Who makes the call that this code serves; ``anonymous``, an admin, where authentication is off."""
    return _principal.get()


@contextlib.contextmanager
def acting_as(principal: Principal) -> Iterator[None]:
    """Make a principal the `current` one within the block."""
    token = _principal.set(principal)
    try:
        yield
    finally:
        _principal.reset(token)


def _methods(service: str, role: Role | None, *names: str) -> dict[str, Role | None]:
    return {f"/{service}/{name}": role for name in names}


# None = anybody: a balancer's health check carries no credential.
REQUIRED_ROLES = MappingProxyType(
    _methods("resight.v1.EmbeddingService", Role.READER, "Embed", "BatchEmbed", "StreamEmbed")
    | _methods("resight.v1.SearchService", Role.READER, "Search", "BatchSearch", "StreamSearch", "Verify")
    | _methods("resight.v1.GalleryService", Role.READER, "GetCollection", "ListCollections")
    | _methods("resight.v1.GalleryService", Role.ENROLLER, "EnrollEntry", "BatchEnrollEntries", "GetEntry")
    | _methods("resight.v1.GalleryService", Role.ENROLLER, "ListEntries", "UpdateEntry", "DeleteEntry", "DeleteEntries")
    | _methods("resight.v1.GalleryService", Role.OPERATOR, "CreateCollection", "UpdateCollection", "DeleteCollection")
    | _methods("resight.v1.GalleryService", Role.ENROLLER, "AddFeedback", "ListFeedback", "RemoveFeedback")
    | _methods("resight.v1.GalleryService", Role.OPERATOR, "EraseSubject", "StreamCrops")
    | _methods("resight.v1.OperationService", Role.OPERATOR, "GetOperation", "ListOperations", "CancelOperation")
    | _methods("resight.v1.ModelService", Role.ADMIN, "ListModels", "GetModel", "LoadModel", "UnloadModel")
    | _methods("resight.v1.ModelService", Role.ADMIN, "ActivateModel", "MigrateCollection", "ActivateSpace")
    | _methods("resight.v1.ModelService", Role.ADMIN, "StartShadow", "GetShadow", "StopShadow")
    | _methods("resight.v1.AdminService", Role.READER, "GetServerInfo")
    | _methods("resight.v1.AdminService", Role.OPERATOR, "GetCollectionStats", "ListAuditEvents")
    | _methods("resight.v1.AdminService", Role.OPERATOR, "GetSearchFigures")
    | _methods("resight.v1.AdminService", Role.OPERATOR, "StartAdaptation", "ReportAdaptation")
    | _methods("resight.v1.AdminService", Role.ADMIN, "RebuildIndex", "CreateSnapshot")
    | _methods("grpc.health.v1.Health", None, "Check", "Watch", "List")
    | _methods("grpc.reflection.v1.ServerReflection", Role.OPERATOR, "ServerReflectionInfo")
    | _methods("grpc.reflection.v1alpha.ServerReflection", Role.OPERATOR, "ServerReflectionInfo")
)


def required_role(method: str) -> Role | None:
    """The least role for a method, by its full name (``/resight.v1.SearchService/Search``).

    A method that the table does not know is for admins: nothing opens by being forgotten.
    """
    return REQUIRED_ROLES.get(method, Role.ADMIN)


TOKENS_FILE = "tokens.json"
TOKEN_PREFIX = "rst_"  # lets scanners of repositories and logs find a leaked one
RANDOM_BYTES = 32
RELOAD_EVERY_S = 0.5  # a revocation counts within a second
TOKENS_SCHEMA_VERSION = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")  # tenants become folders
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIELDS = {"name", "tenant", "role", "sha256", "created", "expires"}


@dataclass(frozen=True)
class Token:
    """What is kept of a token.

    Attributes:
        name: whose it is; several of one name may be active, so that one can replace another.
        tenant: whose galleries it opens.
        role: what it allows.
        sha256: of the token's text, hexadecimal.
        created: when it was made, UTC.
        expires: when it stops to count, UTC; None = never.
    """

    name: str
    tenant: str
    role: Role
    sha256: str
    created: datetime
    expires: datetime | None

    @property
    def token_id(self) -> str:
        """Names this one among tokens of a name; tells nothing of its text."""
        return self.sha256[:8]

    def active(self, now: datetime) -> bool:
        """Whether it counts at a moment."""
        return self.expires is None or now < self.expires


class TokenFile:
    """The tokens of a data folder."""

    def __init__(self, data: Path) -> None:
        self.path = data / TOKENS_FILE

    def exists(self) -> bool:
        """Whether a token was ever made here; an empty file still asks for one."""
        return self.path.exists()

    def read(self) -> list[Token]:
        """All tokens, expired ones too; none where there is no file.

        Raises:
            FormatError: the file is damaged, or others may write or read it.
        """
        try:
            with self.path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                text = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FormatError(f"{self.path} cannot be read: {error.strerror}: let the server's user read it") from error
        if mode & 0o077:
            raise FormatError(f"{self.path} is open to others (mode {mode & 0o777:04o}): chmod 600 it")
        try:
            whole = json.loads(text)
            if not isinstance(whole, dict) or whole.keys() != {"schema_version", "tokens"}:
                raise ValueError("an object with schema_version and tokens is expected")
            if whole["schema_version"] != TOKENS_SCHEMA_VERSION:
                raise ValueError(
                    f"schema_version {TOKENS_SCHEMA_VERSION} is expected, found {whole['schema_version']!r}"
                )
            return [_parse_token(one) for one in whole["tokens"]]
        except (ValueError, TypeError) as error:
            raise FormatError(f"{self.path} is damaged ({error}): restore it, or make the tokens anew") from error

    def create(
        self, name: str, role: Role, *, tenant: str = DEFAULT_TENANT, lives: timedelta | None = None
    ) -> tuple[str, Token]:
        """Make a token and keep its hash.

        Returns:
            The token's text, which nothing can tell again, and what is kept.

        Raises:
            InputError: a name or tenant that is not 1-63 of ``a-z 0-9 . _ -``.
        """
        for what, text in (("name", name), ("tenant", tenant)):
            if not _NAME.fullmatch(text):
                raise InputError(f"a {what} is 1-63 of a-z 0-9 . _ -, not . _ or - first; found {text!r}")
        now = datetime.now(UTC).replace(microsecond=0)
        secret = TOKEN_PREFIX + base64.b32encode(secrets.token_bytes(RANDOM_BYTES)).decode().rstrip("=").lower()
        token = Token(name, tenant, role, token_digest(secret), now, None if lives is None else now + lives)
        with self._changing() as tokens:
            tokens.append(token)
        return secret, token

    def revoke(self, name: str, *, token_id: str | None = None) -> int:
        """Take tokens away: all of a name, or the one of an id; returns how many.

        Raises:
            NotFoundError: there is none.
        """
        with self._changing() as tokens:
            kept = [one for one in tokens if one.name != name or token_id not in (None, one.token_id)]
            gone = len(tokens) - len(kept)
            if not gone:
                raise NotFoundError(f"there is no such token of {name}: see `resight token list`")
            tokens[:] = kept
        return gone

    @contextlib.contextmanager
    def _changing(self) -> Iterator[list[Token]]:
        """The list, written back at the end; one process at a time changes it."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock"), mode=OWNER_ONLY):
            tokens = self.read()
            yield tokens
            written = {"schema_version": TOKENS_SCHEMA_VERSION, "tokens": [_token_fields(one) for one in tokens]}
            write_atomic(self.path, (json.dumps(written, indent=1) + "\n").encode(), mode=0o600)


class TokenLookup:
    """The tokens of a running server: follows the file, and finds whose a token is.

    Args:
        file: of the data folder.

    Raises:
        FormatError: the file is damaged.
    """

    def __init__(self, file: TokenFile) -> None:
        self._file = file
        self._seen = self._stamp()
        self._tokens: Sequence[tuple[bytes, Token]] = _hashed(file.read())
        self._look_again = time.monotonic() + RELOAD_EVERY_S
        self.required = self._seen is not None  # stays true when the file goes: revoking all must not open the door

    def find(self, secret: str) -> Principal | None:
        """Whose token this is; None for one that is unknown, expired or revoked.

        Every token is compared, in constant time, whatever is found.

        Raises:
            FormatError: the file was changed into something unreadable; nobody gets in until it is mended.
        """
        self.follow()
        given, found = hashlib.sha256(secret.encode()).digest(), None
        for kept, token in self._tokens:
            if hmac.compare_digest(given, kept):
                found = token
        if found is None or not found.active(datetime.now(UTC)):
            return None
        return Principal(found.name, found.tenant, found.role)

    def follow(self) -> None:
        """Read the file again if it changed; it is looked at twice a second at most.

        Raises:
            FormatError: it is damaged; it is read again at the next call.
        """
        if time.monotonic() < self._look_again:
            return
        stamp = self._stamp()
        if stamp != self._seen:
            self._tokens = _hashed(self._file.read())
            self._seen = stamp
            self.required = True
        self._look_again = time.monotonic() + RELOAD_EVERY_S

    def _stamp(self) -> tuple[int, int, int, int] | None:
        """What changes when the file does; its inode does, for each write replaces the file."""
        try:
            found = self._file.path.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode


def token_digest(secret: str) -> str:
    """SHA-256 of a token's text, hexadecimal."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _hashed(tokens: Sequence[Token]) -> list[tuple[bytes, Token]]:
    return [(bytes.fromhex(one.sha256), one) for one in tokens]


def _token_fields(token: Token) -> dict[str, Any]:
    expires = None if token.expires is None else token.expires.isoformat()
    return asdict(token) | {"role": token.role.word, "created": token.created.isoformat(), "expires": expires}


def _parse_token(raw: Any) -> Token:
    """One token of the file; ValueError or TypeError for anything else."""
    if not isinstance(raw, dict) or raw.keys() != _FIELDS:
        raise ValueError(f"each token has {', '.join(sorted(_FIELDS))}")
    if not (_NAME.fullmatch(raw["name"]) and _NAME.fullmatch(raw["tenant"]) and _SHA256.fullmatch(raw["sha256"])):
        raise ValueError("a name, tenant or sha256 is not well formed")
    roles = {role.word: role for role in Role}
    if raw["role"] not in roles:
        raise ValueError(f"a role is one of {', '.join(roles)}, found {raw['role']!r}")
    expires = None if raw["expires"] is None else _parse_time(raw["expires"])
    return Token(raw["name"], raw["tenant"], roles[raw["role"]], raw["sha256"], _parse_time(raw["created"]), expires)


def _parse_time(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError(f"a time has a zone, found {text!r}")
    return found
