"""The server's log: one line an event, with the id of the call it belongs to, as text or as JSON.

No line holds a crop, a feature, a token, or the id of a subject or an entry: those belong into the audit, where a
subject is a keyed hash. `tests/service/test_logs.py` looks for them in the log of a server that was put through it.
"""

from __future__ import annotations

import json
import logging
import traceback
from datetime import UTC, datetime
from typing import Literal

from resight.service.request_id import RequestIdFilter

TEXT = "%(asctime)s %(levelname)s %(name)s request=%(request_id)s %(message)s"


class JsonFormatter(logging.Formatter):
    """A line of JSON: time (RFC 3339, UTC), level, logger, request, message, and the stack of an error."""

    def format(self, record: logging.LogRecord) -> str:
        """One record; a message of several lines stays one line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "request": getattr(record, "request_id", "-"),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["stack"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(line, ensure_ascii=False)


def set_up_log(form: Literal["text", "json"]) -> None:
    """Write the log of this process to standard error, in one form, from INFO up."""
    handler = logging.StreamHandler()
    handler.addFilter(RequestIdFilter())
    handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(TEXT))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
