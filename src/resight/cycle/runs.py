"""The runs of a site: their database, and the lock that allows one cycle at a time.

Runs and stages are in a small SQLite file,
from which a killed cycle is resumed. The only writer is the cycle that holds the lock; `resight cycle status` reads
concurrently. A commit is durable when it returns (WAL, synchronous FULL).
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from resight.cycle.state_folder import StageOutcome
from resight.errors import CycleBusyError, CycleError
from resight.locks import LockHeldError, hold_lock


class CycleLock:
    """A lock held within a ``with`` block. Child processes do not inherit it, so it never outlives its process.

    Args:
        path: of the lock file; its folder is created if missing.
        what: name of the locked resource, for the error message.
        wait_s: how long to wait for the lock.

    Raises:
        CycleBusyError: another process holds it.
    """

    def __init__(self, path: Path, what: str, *, wait_s: float = 0.0) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # contains crops of people: owner only
        text = f"process {os.getpid()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        try:
            self._lock = hold_lock(path, text, wait_s=wait_s)
        except LockHeldError as error:
            raise CycleBusyError(
                f"{what} is held by {error.holder or 'a process that just started'}: wait for it; see "
                "`resight cycle status`",
                holder=error.holder.partition(" since")[0].removeprefix("process "),
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()


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
class CycleRun:
    """One run.

    Attributes:
        run: its number, from 1.
        state: its current or final state.
        began_s, ended_s: Unix time in seconds.
        reason: for its final state.
        operation: id of the server's operation that requested it; empty = started by the schedule or by hand.
        until_s: capture time of its newest crop.
        used: its crops do not count as new in later runs.
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
class StageRun:
    """One stage of a run.

    Attributes:
        state: running, done, or failed; running may also mean that its cycle was killed.
        starts: number of times its process was started.
        began_s, ended_s: of the last start, as Unix time in seconds.
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
    outcome: StageOutcome | None


class RunDatabase:
    """The database of a site's runs and stages.

    Args:
        path: of the file; created if missing.

    Raises:
        CycleError: the file is damaged, or has another schema version.
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
            raise CycleError(
                f"{path} cannot be read ({error}): restore it, or move it away to start with an empty one"
            ) from error
        if version not in (0, SCHEMA_VERSION):
            self._db.close()
            raise CycleError(
                f"{path} has schema {version}, expected {SCHEMA_VERSION}: use the version of resight that wrote it"
            )

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

    def begin(self, *, operation: str = "") -> CycleRun:
        """Start a new run; there must be no unfinished one."""
        with self._writing():
            row = self._db.execute(
                "INSERT INTO run (state, began_s, operation) VALUES ('running', ?, ?) RETURNING run",
                (time.time(), operation),
            ).fetchone()
        return self.run(row[0])

    def unfinished(self) -> CycleRun | None:
        """The unfinished run, if there is one."""
        row = self._db.execute("SELECT run FROM run WHERE state = 'running'").fetchone()
        return None if row is None else self.run(row[0])

    def run(self, number: int) -> CycleRun:
        """A run by its number; CycleError if it does not exist."""
        row = self._db.execute("SELECT * FROM run WHERE run = ?", (number,)).fetchone()
        if row is None:
            raise CycleError(f"there is no run {number}: see `resight cycle history`")
        return _run_of(row)

    def runs(self, *, limit: int = -1) -> list[CycleRun]:
        """All runs, newest first."""
        rows = self._db.execute("SELECT * FROM run ORDER BY run DESC LIMIT ?", (limit,)).fetchall()
        return [_run_of(row) for row in rows]

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
        """Change the state of a run that has ended."""
        with self._writing():
            self._db.execute("UPDATE run SET state = ?, reason = ? WHERE run = ?", (state, reason, number))

    def set_operation(self, number: int, operation: str) -> None:
        """Record which operation of the server requested a run."""
        with self._writing():
            self._db.execute("UPDATE run SET operation = ? WHERE run = ?", (operation, number))

    def stages(self, number: int) -> dict[str, StageRun]:
        """The stages of a run that were started, in order of their start."""
        rows = self._db.execute("SELECT * FROM stage WHERE run = ? ORDER BY rowid", (number,)).fetchall()
        return {row["stage"]: _stage_of(row) for row in rows}

    def start_stage(self, number: int, stage: str, pid: int) -> int:
        """Record that the process of a stage was started; returns the number of starts."""
        with self._writing():
            row = self._db.execute(
                "INSERT INTO stage (run, stage, state, starts, began_s, pid) VALUES (?, ?, 'running', 1, ?, ?) "
                "ON CONFLICT DO UPDATE SET state = 'running', starts = starts + 1, began_s = excluded.began_s, "
                "pid = excluded.pid, ended_s = NULL RETURNING starts",
                (number, stage, time.time(), pid),
            ).fetchone()
        return int(row[0])

    def end_stage(self, number: int, stage: str, *, outcome: StageOutcome | None = None, error: str = "") -> None:
        """Record the outcome or the error of a stage; its start may be missing if the cycle was killed."""
        text = None if outcome is None else json.dumps(json.loads(outcome.to_json()))
        now_s = time.time()
        with self._writing():
            self._db.execute(
                "INSERT INTO stage (run, stage, state, starts, began_s, ended_s, error, outcome) "
                "VALUES (?, ?, ?, 0, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET state = excluded.state, "
                "ended_s = excluded.ended_s, error = excluded.error, outcome = excluded.outcome",
                (number, stage, "failed" if outcome is None else "done", now_s, now_s, error, text),
            )


def _run_of(row: sqlite3.Row) -> CycleRun:
    columns: dict[str, Any] = dict(row)
    return CycleRun(**columns | {"used": bool(columns["used"])})


def _stage_of(row: sqlite3.Row) -> StageRun:
    columns: dict[str, Any] = dict(row)
    outcome = columns.pop("outcome")
    return StageRun(**columns, outcome=None if outcome is None else StageOutcome.from_json(outcome))
