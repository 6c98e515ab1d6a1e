"""Pages of a listing: how many a page holds, and the opaque cursor after which the next one begins."""

from __future__ import annotations

import base64
import binascii
import struct

from resight.errors import InputError

MAX_PAGE, DEFAULT_PAGE = 1000, 100


def page_size(asked: int) -> int:
    """What a page holds: 100 when not told, at most 1000.

    Raises:
        InputError: negative.
    """
    if asked < 0:
        raise InputError(f"page_size is 0 (for {DEFAULT_PAGE}) to {MAX_PAGE}, found {asked}", field="page_size")
    return min(asked or DEFAULT_PAGE, MAX_PAGE)


def page_token(after: int | str) -> str:
    """The opaque cursor after which the next page begins."""
    raw = struct.pack(">q", after) if isinstance(after, int) else after.encode()
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def key_of_token(token: str, field: str = "page_token") -> int:
    """The key a cursor stands for; 0 = from the beginning. Raises InputError for what is none of ours."""
    if not token:
        return 0
    raw = _unpacked(token, field)
    if len(raw) != 8:
        raise _bad(token, field)
    return int(struct.unpack(">q", raw)[0])


def name_of_token(token: str) -> str:
    """The name a page token stands for; empty = from the beginning. Raises InputError for what is none of ours."""
    try:
        return _unpacked(token, "page_token").decode()
    except UnicodeDecodeError as error:
        raise _bad(token, "page_token") from error


def _unpacked(token: str, field: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    except (binascii.Error, ValueError) as error:
        raise _bad(token, field) from error


def _bad(token: str, field: str) -> InputError:
    return InputError(
        f"{field} {token[:40]!r} is none of ours: pass the one of the answer before, or none", field=field
    )
