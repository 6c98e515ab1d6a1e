"""The stage that lets a call in: a credential becomes a principal, and its role must do for the method."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator

from resight.errors import FormatError, PermissionDeniedError, UnauthenticatedError, UnavailableError
from resight.service.auth import DEFAULT_TENANT, NOBODY_ASKED, Principal, Role, acting_as, least_role
from resight.service.guard import Call
from resight.service.tokens import TokenBook

log = logging.getLogger(__name__)

HEADER, SCHEME = "authorization", "bearer"
ANYBODY = Principal("anonymous", DEFAULT_TENANT, Role.READER)  # of a method that asks for no credential
LOG_EVERY_S = 1.0  # a guesser must not fill the disk


class Gate:
    """Asks for a token where authentication is on.

    Args:
        book: the tokens.
        always: on although no token was ever made: nobody gets in until one is.
    """

    def __init__(self, book: TokenBook, *, always: bool) -> None:
        self._book, self._always = book, always
        self._refused, self._log_at = 0, 0.0

    @contextlib.asynccontextmanager
    async def __call__(self, call: Call) -> AsyncIterator[None]:
        """Let the call act as its principal."""
        with acting_as(self._admit(call)):
            yield

    def _admit(self, call: Call) -> Principal:
        """Who calls.

        Raises:
            UnauthenticatedError: no token, or not a good one.
            PermissionDeniedError: the role is too small.
            UnavailableError: the tokens cannot be read.
        """
        least = least_role(call.method)
        if least is None:
            return ANYBODY
        try:
            self._book.follow()
            if not (self._always or self._book.asked):
                return NOBODY_ASKED
            principal = self._book.find(_bearer(call))
        except FormatError as error:
            log.error("nobody gets in: %s", error)
            raise UnavailableError("the server cannot read its tokens: its log says why") from error
        except UnauthenticatedError:
            self._told(call, "no token")
            raise
        if principal is None:
            self._told(call, "unknown token")
            raise UnauthenticatedError(
                "the token is unknown, expired or revoked: `resight token create` makes a new one"
            )
        if principal.role < least:
            self._told(call, f"role {principal.role.word}, name {principal.name}")
            raise PermissionDeniedError(
                f"this call needs the role {least.word}, and {principal.name} is {principal.role.word}: "
                "use another token, or have one made with that role",
                role=principal.role.word,
                needed=least.word,
            )
        return principal

    def _told(self, call: Call, why: str) -> None:
        """A line for a refusal; those of the same second are counted in the next."""
        self._refused += 1
        if time.monotonic() >= self._log_at:
            log.warning(
                "refused %s from %s: %s (%d since last told)", call.method, call.context.peer(), why, self._refused
            )
            self._refused, self._log_at = 0, time.monotonic() + LOG_EVERY_S


def _bearer(call: Call) -> str:
    """The token that a call carries.

    Raises:
        UnauthenticatedError: none, two, or another scheme.
    """
    found = [value for name, value in call.context.invocation_metadata() or () if name == HEADER]
    scheme, _, secret = str(found[0]).partition(" ") if len(found) == 1 else ("", "", "")
    if scheme.lower() != SCHEME or not secret:
        raise UnauthenticatedError(
            "a token is needed: send `authorization: Bearer TOKEN` once, or set RESIGHT_TOKEN for the command line"
        )
    return secret.strip()
