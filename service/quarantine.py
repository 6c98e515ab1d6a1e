"""Crops that made a batch fail are remembered, so that their neighbours do not pay twice."""

from __future__ import annotations

import hashlib

from resight.errors import ModelError

QUARANTINED = 1024  # crops remembered; 16 bytes each


class Quarantine:
    """Digests of the latest crops that a model failed on. Any thread may use it."""

    def __init__(self) -> None:
        self._held: dict[bytes, None] = {}  # as an ordered set

    def add(self, crop: bytes) -> None:
        """Remember a crop, and forget the oldest of too many."""
        self._held[_digest(crop)] = None
        while len(self._held) > QUARANTINED:
            self._held.pop(next(iter(self._held)), None)

    def check(self, crop: bytes) -> None:
        """Refuse a crop that made a batch fail before.

        Raises:
            ModelError: it did.
        """
        if self._held and _digest(crop) in self._held:
            raise failed("the model failed on this very crop before, and it is not tried again")


def failed(what: str, cause: Exception | None = None) -> ModelError:
    """The error of a crop that no inference has an answer for."""
    error = ModelError(f"{what}: the crop cannot be embedded by this bundle; leave it out and report it")
    error.__cause__ = cause
    return error


def _digest(crop: bytes) -> bytes:
    return hashlib.blake2b(crop, digest_size=16).digest()
