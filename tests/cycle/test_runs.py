"""Runs and stages as rows: one run at a time, ended runs are kept, foreign files are rejected."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from resight.cycle.runs import SCHEMA_VERSION, RunDatabase
from resight.cycle.state_folder import StageOutcome, read_outcome, write_outcome
from resight.errors import CycleError


def test_a_run_is_unfinished_until_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "state" / "cycle.sqlite3"
    with RunDatabase(path) as runs:
        assert runs.unfinished() is None and runs.runs() == [] and runs.since_s() == 0
        first = runs.begin(operation="op")
        with pytest.raises(sqlite3.IntegrityError):
            runs.begin()
    with RunDatabase(path) as runs:
        assert runs.unfinished() == first
        runs.end(first.run, "refused", "worse", until_s=70.0)
        assert runs.unfinished() is None and runs.since_s() == 0  # its crops count again
        second = runs.begin()
        runs.end(second.run, "promoted", "better", used=True, until_s=50.0)
        runs.mark(second.run, "rolled_back", "by hand")
        assert runs.since_s() == 50
        found = runs.runs()
    assert [(one.run, one.state, one.reason, one.operation) for one in found] == [
        (2, "rolled_back", "by hand", ""),
        (1, "refused", "worse", "op"),
    ]
    assert found[0].ended_s is not None and found[0].used and not found[1].used


def test_a_stage_records_its_starts_and_its_outcome(tmp_path: Path) -> None:
    outcome = StageOutcome("refused", ("worse",), {"auc": 0.5, "spaces": {"lobby": "a"}}, used=True)
    with RunDatabase(tmp_path / "cycle.sqlite3") as runs:
        run = runs.begin().run
        assert runs.start_stage(run, "ingest", 11) == 1
        runs.end_stage(run, "ingest", error="no server")
        assert (runs.stages(run)["ingest"].state, runs.stages(run)["ingest"].error) == ("failed", "no server")
        assert runs.start_stage(run, "ingest", 12) == 2
        assert runs.stages(run)["ingest"].state == "running" and runs.stages(run)["ingest"].ended_s is None
        runs.end_stage(run, "ingest", outcome=outcome)
        runs.start_stage(run, "collect", 13)
        found = runs.stages(run)
    assert list(found) == ["ingest", "collect"]
    assert (found["ingest"].state, found["ingest"].starts, found["ingest"].outcome) == ("done", 2, outcome)


def test_an_outcome_is_read_back_and_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "results" / "judge.json"
    assert read_outcome(path) is None
    outcome = StageOutcome(reasons=("a", "b"), figures={"n": [1, 2]})
    write_outcome(path, outcome)
    assert read_outcome(path) == outcome
    for text in ("{", "[]", '{"verdict": "maybe", "reasons": [], "figures": {}, "used": false}', "{}"):
        path.write_text(text)
        with pytest.raises(CycleError, match=r"judge\.json is damaged .* the stage will run again"):
            read_outcome(path)


def test_a_file_of_another_version_or_kind_is_refused(tmp_path: Path) -> None:
    newer, foreign = tmp_path / "newer.sqlite3", tmp_path / "foreign.sqlite3"
    with RunDatabase(newer):
        pass
    with sqlite3.connect(newer) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(CycleError, match=f"schema {SCHEMA_VERSION + 1}, expected {SCHEMA_VERSION}"):
        RunDatabase(newer)
    foreign.write_bytes(b"no database at all, but long enough to be looked at as one" * 20)
    with pytest.raises(CycleError, match="cannot be read"):
        RunDatabase(foreign)
