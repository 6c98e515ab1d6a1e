"""Runs and stages in a small SQLite file: what a killed cycle goes on from.

One writer, the cycle that holds the site's lock; `resight cycle status` reads beside it. A commit is on the disk
when it returns (WAL, synchronous FULL).
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from resight.cycle.outcome import Outcome
from resight.errors import CycleError

RunState = Literal["running", "skipped", "refused", "promoted", "rolled_back", "failed"]
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE run (
    run INTEGER PRIMARY KEY AUTOINCREMENT, state TEXT NOT NULL, began_s REAL NOT NULL, ended_s REAL,
    reason TEXT NOT NULL DEFAULT '', operation TEXT NOT NULL DEFAULT '', until_s REAL,
    used INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE UNIQUE INDEX one_at_a_time ON run (state) WHERE state = 'running';
CREATE TABLE stage (
    run INTEGER NOT NULL REFERENCES run, stage TEXT NOT NULL, state TEXT NOT NULL, starts INTEGER NOT NULL,
    began_s REAL NOT NULL, ended_s REAL, pid INTEGER NOT NULL DEFAULT 0, error TEXT NOT NULL DEFAULT '',
    outcome TEXT, PRIMARY KEY (run, stage)
) STRICT;
"""


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        run: its number, from 1.
        state: how it stands, or ended.
        began_s, ended_s: Unix time in seconds.
        reason: why it ended so.
        operation: of the server, that asked for it; empty = the schedule or a person did.
        until_s: capture time of its newest crop.
        used: its crops do not count as new again.
    """

    run: int
    state: RunState
    began_s: float
    ended_s: float | None
    reason: str
    operation: str
    until_s: float | None
    used: bool


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        state: running, done, or failed; running may also mean that its cycle was killed.
        starts: how often its process was started.
        began_s, ended_s: of the last start, Unix time in seconds.
        pid: of the last process.
        error: of the last failure.
        outcome: once done.
    """

    run: int
    stage: str
    state: Literal["running", "done", "failed"]
    starts: int
    began_s: float
    ended_s: float | None
    pid: int
    error: str
    outcome: Outcome | None


class Runs:
    """The file, open.

    Args:
        path: of the file; made when missing.

    Raises:
        CycleError: it is damaged, or of another version.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, timeout=10.0, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;")
            with self._writing():
                version = self._db.execute("PRAGMA user_version").fetchone()[0]
                if version == 0:
                    for statement in SCHEMA.split(";"):
                        self._db.execute(statement)
                    self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        except sqlite3.Error as error:
            raise CycleError(f"{path} cannot be read ({error}): restore it, or move it away to begin anew") from error
        if version not in (0, SCHEMA_VERSION):
            self._db.close()
            raise CycleError(f"{path} has schema {version}, expected {SCHEMA_VERSION}: use the resight that wrote it")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def begin(self, *, operation: str = "") -> Run:
        """A new run; there must be no unfinished one."""
        with self._writing():
            row = self._db.execute(
                "INSERT INTO run (state, began_s, operation) VALUES ('running', ?, ?) RETURNING run",
                (time.time(), operation),
            ).fetchone()
        return self.run(row[0])

    def unfinished(self) -> Run | None:
        """The run that goes on, if one does."""
        row = self._db.execute("SELECT run FROM run WHERE state = 'running'").fetchone()
        return None if row is None else self.run(row[0])

    def run(self, number: int) -> Run:
        """One run; CycleError where there is none of that number."""
        row = self._db.execute("SELECT * FROM run WHERE run = ?", (number,)).fetchone()
        if row is None:
            raise CycleError(f"there is no run {number}: see `resight cycle history`")
        return _run(row)

    def runs(self, *, limit: int = -1) -> list[Run]:
        """The newest first."""
        rows = self._db.execute("SELECT * FROM run ORDER BY run DESC LIMIT ?", (limit,)).fetchall()
        return [_run(row) for row in rows]

    def since_s(self) -> float:
        """Capture time up to which crops were used by earlier runs; 0 = none were."""
        return float(self._db.execute("SELECT coalesce(max(until_s), 0) FROM run WHERE used").fetchone()[0])

    def end(self, number: int, state: RunState, reason: str, *, used: bool = False, until_s: float | None) -> None:
        """End a run."""
        with self._writing():
            self._db.execute(
                "UPDATE run SET state = ?, reason = ?, ended_s = ?, used = ?, until_s = ? WHERE run = ?",
                (state, reason, time.time(), used, until_s, number),
            )

    def mark(self, number: int, state: RunState, reason: str) -> None:
        """Say of a run that had ended what became of it since."""
        with self._writing():
            self._db.execute("UPDATE run SET state = ?, reason = ? WHERE run = ?", (state, reason, number))

    def ask(self, number: int, operation: str) -> None:
        """Note which operation of the server asked for a run."""
        with self._writing():
            self._db.execute("UPDATE run SET operation = ? WHERE run = ?", (operation, number))

    def stages(self, number: int) -> dict[str, Stage]:
        """The stages of a run that were started, in that order."""
        rows = self._db.execute("SELECT * FROM stage WHERE run = ? ORDER BY rowid", (number,)).fetchall()
        return {row["stage"]: _stage(row) for row in rows}

    def start_stage(self, number: int, stage: str, pid: int) -> int:
        """Note that a stage's process runs; returns how often that was."""
        with self._writing():
            row = self._db.execute(
                "INSERT INTO stage (run, stage, state, starts, began_s, pid) VALUES (?, ?, 'running', 1, ?, ?) "
                "ON CONFLICT DO UPDATE SET state = 'running', starts = starts + 1, began_s = excluded.began_s, "
                "pid = excluded.pid, ended_s = NULL RETURNING starts",
                (number, stage, time.time(), pid),
            ).fetchone()
        return int(row[0])

    def end_stage(self, number: int, stage: str, *, outcome: Outcome | None = None, error: str = "") -> None:
        """Note what a stage came to, or why it failed; of one whose start a kill left unnoted too."""
        text = None if outcome is None else json.dumps(json.loads(outcome.to_json()))
        now_s = time.time()
        with self._writing():
            self._db.execute(
                "INSERT INTO stage (run, stage, state, starts, began_s, ended_s, error, outcome) "
                "VALUES (?, ?, ?, 0, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET state = excluded.state, "
                "ended_s = excluded.ended_s, error = excluded.error, outcome = excluded.outcome",
                (number, stage, "failed" if outcome is None else "done", now_s, now_s, error, text),
            )


def _run(row: sqlite3.Row) -> Run:
    told: dict[str, Any] = dict(row)
    return Run(**told | {"used": bool(told["used"])})


def _stage(row: sqlite3.Row) -> Stage:
    told: dict[str, Any] = dict(row)
    outcome = told.pop("outcome")
    return Stage(**told, outcome=None if outcome is None else Outcome.of(outcome))
