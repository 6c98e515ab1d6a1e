"""Alerts: a line in the log and a line of JSON in `alerts.jsonl`, for whatever reads files; nothing is called."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

log = logging.getLogger(__name__)


def alert(path: Path, run: int, text: str) -> None:
    """Tell the operator something; it is on the disk when this returns."""
    log.error("ALERT run=%d %s", run, text)
    line = json.dumps({"time_s": time.time(), "run": run, "text": text}) + "\n"
    with path.open("a") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def alerts(path: Path, *, run: int | None = None) -> list[dict[str, object]]:
    """The alerts so far, the oldest first, of one run or of all; a half line that a kill left is passed over."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            one = json.loads(line)
        except ValueError:
            continue
        if run is None or one.get("run") == run:
            found.append(one)
    return found
