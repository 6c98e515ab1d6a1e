"""Roles, principals, API tokens, and the role that each method requires.

`resight.service.access.interceptors` sets the principal of a call. Servicers read it with `current`, before they pass
work to a task or thread that serves several callers.

Tokens have 256 random bits, are shown once at creation, and are stored as SHA-256 in ``DATA/tokens.json``; a fast hash
is sufficient, since tokens cannot be guessed. `resight token` may change the file while a server runs; the server
reloads it within half a second.
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
    """The permissions of a principal; each role includes the ones below it."""

    READER = 1
    ENROLLER = 2
    OPERATOR = 3
    ADMIN = 4

    @property
    def word(self) -> str:
        """The name used in files, flags and messages."""
        return self.name.lower()


@dataclass(frozen=True)
class Principal:
    """The authenticated caller.

    Attributes:
        name: of the credential, for the audit and the rate limit.
        tenant: the tenant whose gallery they use; never taken from a request.
        role: their permissions.
    """

    name: str
    tenant: str
    role: Role


ANONYMOUS_ADMIN = Principal("anonymous", DEFAULT_TENANT, Role.ADMIN)  # authentication is off
_principal: ContextVar[Principal] = ContextVar("resight_principal", default=ANONYMOUS_ADMIN)


def current() -> Principal:
    """The principal of the current call; `ANONYMOUS_ADMIN` if authentication is off."""
    return _principal.get()


@contextlib.contextmanager
def acting_as(principal: Principal) -> Iterator[None]:
    """Set the `current` principal within the block."""
    token = _principal.set(principal)
    try:
        yield
    finally:
        _principal.reset(token)


def _methods(service: str, role: Role | None, *names: str) -> dict[str, Role | None]:
    return {f"/{service}/{name}": role for name in names}


# None = no authentication: a load balancer's health check carries no credential.
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
    | _methods("resight.v1.AdminService", Role.OPERATOR, "GetSearchStatistics", "GetSearchFigures")
    | _methods("resight.v1.AdminService", Role.OPERATOR, "StartAdaptation", "ReportAdaptation")
    | _methods("resight.v1.AdminService", Role.ADMIN, "RebuildIndex", "CreateSnapshot")
    | _methods("grpc.health.v1.Health", None, "Check", "Watch", "List")
    | _methods("grpc.reflection.v1.ServerReflection", Role.OPERATOR, "ServerReflectionInfo")
    | _methods("grpc.reflection.v1alpha.ServerReflection", Role.OPERATOR, "ServerReflectionInfo")
)


def required_role(method: str) -> Role | None:
    """The minimum role for a method, by its full name (``/resight.v1.SearchService/Search``).

    Methods that are missing in the table require ADMIN, so that an omission grants no access.
    """
    return REQUIRED_ROLES.get(method, Role.ADMIN)


TOKENS_FILE = "tokens.json"
TOKEN_PREFIX = "rst_"  # lets secret scanners recognise a leaked token
RANDOM_BYTES = 32
RELOAD_EVERY_S = 0.5  # a revocation takes effect within a second
TOKENS_SCHEMA_VERSION = 1
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")  # also a tenant's folder name
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FIELDS = {"name", "tenant", "role", "sha256", "created", "expires"}


@dataclass(frozen=True)
class Token:
    """A stored token: its hash and permissions.

    Attributes:
        name: of the principal; several tokens of one name may be active, which allows rotation.
        tenant: whose gallery it gives access to.
        role: the permissions it grants.
        sha256: of the token's text, hexadecimal.
        created: creation time, UTC.
        expires: end of validity, UTC; None = never.
    """

    name: str
    tenant: str
    role: Role
    sha256: str
    created: datetime
    expires: datetime | None

    @property
    def token_id(self) -> str:
        """Distinguishes tokens of one name; a prefix of the hash, which reveals nothing of the text."""
        return self.sha256[:8]

    def active(self, now: datetime) -> bool:
        """Whether it is valid at a time."""
        return self.expires is None or now < self.expires


class TokenFile:
    """The token file of a data folder."""

    def __init__(self, data: Path) -> None:
        self.path = data / TOKENS_FILE

    def exists(self) -> bool:
        """Whether a token was ever created here; the file remains when all tokens are revoked."""
        return self.path.exists()

    def read(self) -> list[Token]:
        """All tokens, including expired ones; empty if there is no file.

        Raises:
            FormatError: the file is damaged, or other users can read or write it.
        """
        try:
            with self.path.open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                text = file.read()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FormatError(
                f"{self.path} cannot be read: {error.strerror}: give the server's user read access"
            ) from error
        if mode & 0o077:
            raise FormatError(f"{self.path} is accessible to other users (mode {mode & 0o777:04o}): chmod 600 it")
        try:
            content = json.loads(text)
            if not isinstance(content, dict) or content.keys() != {"schema_version", "tokens"}:
                raise ValueError("expected an object with schema_version and tokens")
            if content["schema_version"] != TOKENS_SCHEMA_VERSION:
                raise ValueError(
                    f"expected schema_version {TOKENS_SCHEMA_VERSION}, found {content['schema_version']!r}"
                )
            return [_parse_token(one) for one in content["tokens"]]
        except (ValueError, TypeError) as error:
            raise FormatError(
                f"{self.path} is damaged ({error}): restore it, or delete it and create new tokens"
            ) from error

    def create(
        self, name: str, role: Role, *, tenant: str = DEFAULT_TENANT, lifetime: timedelta | None = None
    ) -> tuple[str, Token]:
        """Create a token and store its hash.

        Returns:
            The token's text, which cannot be recovered later, and the stored token.

        Raises:
            InputError: a name or tenant that is not 1-63 characters of ``a-z 0-9 . _ -``.
        """
        for what, text in (("name", name), ("tenant", tenant)):
            if not _NAME.fullmatch(text):
                raise InputError(
                    f"a {what} has 1-63 characters a-z 0-9 . _ - and starts with a letter or digit; found {text!r}"
                )
        now = datetime.now(UTC).replace(microsecond=0)
        secret = TOKEN_PREFIX + base64.b32encode(secrets.token_bytes(RANDOM_BYTES)).decode().rstrip("=").lower()
        token = Token(name, tenant, role, token_digest(secret), now, None if lifetime is None else now + lifetime)
        with self._update() as tokens:
            tokens.append(token)
        return secret, token

    def revoke(self, name: str, *, token_id: str | None = None) -> int:
        """Revoke all tokens of a name, or the one with an id; returns how many.

        Raises:
            NotFoundError: there is none.
        """
        with self._update() as tokens:
            kept = [one for one in tokens if one.name != name or token_id not in (None, one.token_id)]
            revoked = len(tokens) - len(kept)
            if not revoked:
                raise NotFoundError(f"{name} has no such token: see `resight token list`")
            tokens[:] = kept
        return revoked

    @contextlib.contextmanager
    def _update(self) -> Iterator[list[Token]]:
        """The list of tokens, written back on exit; locked against concurrent changes."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock"), mode=OWNER_ONLY):
            tokens = self.read()
            yield tokens
            content = {"schema_version": TOKENS_SCHEMA_VERSION, "tokens": [_token_fields(one) for one in tokens]}
            write_atomic(self.path, (json.dumps(content, indent=1) + "\n").encode(), mode=0o600)


class TokenLookup:
    """Looks up tokens for a running server, and reloads the file when it changes.

    Args:
        file: of the data folder.

    Raises:
        FormatError: the file is damaged.

    Attributes:
        required: whether a token was ever created, so that authentication is on.
    """

    def __init__(self, file: TokenFile) -> None:
        self._file = file
        self._seen = self._stamp()
        self._tokens: Sequence[tuple[bytes, Token]] = _hashed(file.read())
        self._next_check = time.monotonic() + RELOAD_EVERY_S
        self.required = self._seen is not None  # remains True if the file is deleted

    def find(self, secret: str) -> Principal | None:
        """The principal of a token; None if it is unknown, expired or revoked.

        All tokens are compared, each in constant time.

        Raises:
            FormatError: the changed file is damaged; no token is accepted until it is repaired.
        """
        self.reload()
        given, found = hashlib.sha256(secret.encode()).digest(), None
        for digest, token in self._tokens:
            if hmac.compare_digest(given, digest):
                found = token
        if found is None or not found.active(datetime.now(UTC)):
            return None
        return Principal(found.name, found.tenant, found.role)

    def reload(self) -> None:
        """Reload the file if it changed; checked at most twice a second.

        Raises:
            FormatError: it is damaged; the next call tries again.
        """
        if time.monotonic() < self._next_check:
            return
        stamp = self._stamp()
        if stamp != self._seen:
            self._tokens = _hashed(self._file.read())
            self._seen = stamp
            self.required = True
        self._next_check = time.monotonic() + RELOAD_EVERY_S

    def _stamp(self) -> tuple[int, int, int, int] | None:
        """Identifies a version of the file; every write replaces the file, so its inode changes."""
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
    """Parse one token of the file; raises ValueError or TypeError."""
    if not isinstance(raw, dict) or raw.keys() != _FIELDS:
        raise ValueError(f"expected a token with {', '.join(sorted(_FIELDS))}")
    if not (_NAME.fullmatch(raw["name"]) and _NAME.fullmatch(raw["tenant"]) and _SHA256.fullmatch(raw["sha256"])):
        raise ValueError("invalid name, tenant or sha256")
    roles = {role.word: role for role in Role}
    if raw["role"] not in roles:
        raise ValueError(f"expected a role of {', '.join(roles)}, found {raw['role']!r}")
    expires = None if raw["expires"] is None else _parse_time(raw["expires"])
    return Token(raw["name"], raw["tenant"], roles[raw["role"]], raw["sha256"], _parse_time(raw["created"]), expires)


def _parse_time(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    if found.tzinfo is None:
        raise ValueError(f"expected a time with a zone, found {text!r}")
    return found
