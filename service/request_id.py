"""One id for each call: from the client's ``x-request-id`` or made here, in every log line and in the trailers."""

from __future__ import annotations

import contextlib
import logging
import random
import re
from collections.abc import AsyncIterator
from contextvars import ContextVar

from resight.service.guard import Call

HEADER = "x-request-id"
_WELL_FORMED = re.compile(r"[A-Za-z0-9._-]{1,64}")  # a UUID has 36; nothing that could forge a line of the log
_current: ContextVar[str] = ContextVar("resight_request_id", default="-")


def request_id() -> str:
    """The id of the call that this code serves; ``-`` outside of calls."""
    return _current.get()


@contextlib.asynccontextmanager
async def with_request_id(call: Call) -> AsyncIterator[None]:
    """The stage that gives a call its id; one that is not well formed is replaced."""
    given = next((value for name, value in call.context.invocation_metadata() or () if name == HEADER), "")
    text = given if isinstance(given, str) and _WELL_FORMED.fullmatch(given) else f"{random.getrandbits(64):016x}"
    call.trailers = (*call.trailers, (HEADER, text))
    call.context.set_trailing_metadata(call.trailers)
    token = _current.set(text)
    try:
        yield
    finally:
        _current.reset(token)


class RequestIdFilter(logging.Filter):
    """Gives every line of a log handler a ``request_id``, for its format."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let the line through, with its id."""
        record.request_id = request_id()
        return True
