"""Files a run writes: JSON lines, labels and TensorBoard events."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from resight.training.adaptation.run import RunLog


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(folder))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(tag)]


def test_each_epoch_is_logged_as_json_scalar_and_console_line(tmp_path: Path) -> None:
    shown = console()
    with RunLog(tmp_path / "log", console=shown) as log:
        log.epoch("teacher", 0, {"loss": 2.5, "clusters": 7})
        # a line is written at once, not at the end
        assert lines(tmp_path / "log") == [{"stage": "teacher", "epoch": 0, "loss": 2.5, "clusters": 7}]
        log.epoch("student", -1, {"loss": 1.25, "clusters": 8})
    assert [row["stage"] for row in lines(tmp_path / "log")] == ["teacher", "student"]
    assert scalars(tmp_path / "log", "teacher/loss") == [(0, 2.5)]
    assert scalars(tmp_path / "log", "student/clusters") == [(-1, 8.0)]
    printed = shown.file.getvalue()  # type: ignore[attr-defined]
    assert "teacher epoch  0  loss 2.5  clusters 7" in printed


def test_an_append_keeps_the_earlier_part_and_a_new_run_does_not(tmp_path: Path) -> None:
    for append, epochs in ((False, [0]), (True, [0, 1]), (False, [2])):
        with RunLog(tmp_path, console=console(), append=append) as log:
            log.epoch("teacher", epochs[-1], {"loss": 1.0})
        assert [row["epoch"] for row in lines(tmp_path)] == epochs
        # TensorBoard orders files of one second by their names, and 10 comes before 9 there
        assert sorted(step for step, _ in scalars(tmp_path, "teacher/loss")) == epochs


def test_a_run_without_metrics_does_not_change_an_earlier_log(tmp_path: Path) -> None:
    with RunLog(tmp_path, console=console()) as log:
        log.epoch("teacher", 0, {"loss": 1.0})
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with RunLog(tmp_path, console=console()):
        pass
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_last_labels_of_each_stage_are_kept(tmp_path: Path) -> None:
    with RunLog(tmp_path, console=console()) as log:
        log.labels("teacher", np.array([0, 1, -1]))
        log.labels("student", np.array([1, 1, 0]))
        log.labels("teacher", np.array([2, -1, 0]))
    assert np.load(tmp_path / "teacher-labels.npy", allow_pickle=False).tolist() == [2, -1, 0]
    assert np.load(tmp_path / "student-labels.npy", allow_pickle=False).tolist() == [1, 1, 0]


def test_a_progress_bar_is_removed_when_its_work_fails(tmp_path: Path) -> None:
    with RunLog(tmp_path, console=console()) as log:
        with pytest.raises(KeyError), log.progress("features", 3) as advance:
            advance(1)
            raise KeyError
        assert not log._progress.tasks
