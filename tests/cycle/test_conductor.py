"""The conductor: ends of a run, resuming, requested runs, locking, and retention."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

import pytest
from cycles import COLLECTION, cycle, environment, once, write_site
from tiny import resight_here, the_error

from resight.cycle import history
from resight.cycle.conductor import MAX_STARTS, Conductor
from resight.cycle.runs import RunDatabase
from resight.cycle.site import load_site
from resight.cycle.state_folder import StageOutcome, StateFolder, write_outcome

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from conftest import Place

UNREACHABLE = "127.0.0.1:1"
LONG_S = 120.0


@pytest.fixture
def unserved(tmp_path: Path) -> Path:
    """A site whose server is unreachable."""
    (tmp_path / "models").mkdir()
    return write_site(tmp_path, UNREACHABLE)


def test_a_run_without_crops_is_skipped_and_says_why(unserved: Path) -> None:
    done = once(unserved, "--json", unserved.parent / "run.json")
    assert done.returncode == 0 and "run 1: skipped" in done.stdout, done.stderr
    report = json.loads((unserved.parent / "run.json").read_text())
    assert report["state"] == "skipped" and [stage["stage"] for stage in report["stages"]] == ["ingest", "collect"]
    assert "ingest some first" in report["reason"] and not report["used"]
    shown = resight_here("cycle", "status", unserved, "--json", unserved.parent / "status.json")
    assert shown.returncode == 0 and "not running" in shown.stdout and "skipped" in shown.stdout
    status = json.loads((unserved.parent / "status.json").read_text())
    assert status["run"]["state"] == "skipped" and status["held_by"] is None and status["next"]


def begun(site: Path, *done: str) -> StateFolder:
    """A run with some completed stages."""
    layout = StateFolder(load_site(site).state)
    with RunDatabase(layout.database) as runs:
        number = runs.begin().run
    for stage in done:
        write_outcome(layout.run(number).result(stage), StageOutcome())
    return layout


def test_transient_errors_are_retried_and_then_left_to_the_next_call(unserved: Path) -> None:
    layout = begun(unserved, "ingest", "collect")
    assert Conductor(unserved, pauses_s=(0.01,)).run_once().state == "running"
    with RunDatabase(layout.database) as runs:
        found = runs.stages(1)["adapt"]
        assert (found.state, found.starts) == ("failed", 2) and UNREACHABLE in found.error
        for pid in range(found.starts, MAX_STARTS - 1):
            runs.start_stage(1, "adapt", pid)
    ended = Conductor(unserved, pauses_s=(0.01,)).run_once()
    assert (
        ended.state == "failed"
        and f"not done after {MAX_STARTS} attempts" in ended.reason
        and UNREACHABLE in ended.reason
    )


def test_a_permanent_error_ends_the_run_and_the_next_call_begins_another(unserved: Path) -> None:
    layout = begun(unserved, "ingest", "collect")
    layout.run(1).baseline.write_text("{")
    ended = Conductor(unserved).run_once()
    assert ended.state == "failed" and ended.reason.startswith("adapt: ") and "baseline.json is damaged" in ended.reason
    assert "baseline.json is damaged" in json.loads(layout.alerts.read_text())["text"]
    stop = Event()
    stop.set()
    assert Conductor(unserved, stop).run_once().run == 2


def test_a_failure_after_promotion_does_not_roll_back_and_causes_an_alert(place: Place) -> None:
    run = place.begin(seed=1)
    for stage in ("backfill", "shadow"):
        write_outcome(place.layout.run(run).result(stage), StageOutcome())
    write_outcome(
        place.layout.run(run).result("promote"), StageOutcome(figures={})
    )  # without the start time of the watch
    ended, stages = place.run_once()
    assert (ended.state, stages["watch"].state, ended.used) == ("promoted", "failed", True)
    assert "is active, but watch" in ended.reason and "is active, but watch" in place.layout.alerts.read_text()


def test_a_run_out_of_time_is_resumed_by_the_next_call(unserved: Path) -> None:
    stop = Event()
    stop.set()
    assert Conductor(unserved, stop).run_once().state == "running"
    text = unserved.read_text()
    unserved.write_text(text + "budget_minutes = 0.0001\n")
    assert Conductor(unserved).run_once().state == "running"
    hour = (time.gmtime().tm_hour + 3) % 24
    unserved.write_text(text + f'window = "{hour:02d}:00-{hour:02d}:30"\n')
    assert "window" in the_error(resight_here("cycle", "once", unserved))
    assert Conductor(unserved, stop, ignore_window=True).run_once().state == "running"
    with RunDatabase(StateFolder(unserved.parent / "state").database) as runs:
        assert len(runs.runs()) == 1


def test_a_second_cycle_is_refused_and_a_signal_interrupts_the_first(place: Place) -> None:
    place.write(("max_minutes = 0.0", "max_minutes = 5.0"))
    place.begin(seed=1)
    with started("once", place.file) as first:
        while "shadow" not in (stages := running(place.layout)):
            assert first.poll() is None
            time.sleep(0.02)
        assert f"held by process {first.pid}" in the_error(resight_here("cycle", "once", place.file))
        first.send_signal(signal.SIGTERM)
        output, _ = first.communicate(timeout=LONG_S)
        assert first.returncode == 75 and "run 1: running" in output
    with pytest.raises(ProcessLookupError):
        os.killpg(stages["shadow"], 0)
    place.write()
    ended, found = place.run_once()
    assert ended.state == "promoted" and found["shadow"].starts == 2 and found["backfill"].starts == 1


@contextmanager
def started(command: str, site: Path) -> Iterator[subprocess.Popen[str]]:
    """A command of the cycle as a process that does not outlive the test."""
    process = subprocess.Popen(
        cycle(command, site), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def running(layout: StateFolder) -> dict[str, int]:
    with RunDatabase(layout.database) as runs:
        return {name: one.pid for name, one in runs.stages(1).items() if one.state == "running"}


def test_a_requested_run_is_reported_to_its_operation(place: Place) -> None:
    requested = place.client.start_adaptation("lobby")
    other = place.client.start_adaptation("elsewhere")
    place.begin(seed=1)
    ended, _ = place.run_once()
    assert ended.operation == requested.operation_id
    found = place.client.operation(requested.operation_id)
    assert (found.state, found.result["state"], found.result["run"]) == ("succeeded", "promoted", "1")
    assert place.client.operation(other.operation_id).state == "pending"


def test_a_requested_run_can_be_cancelled_until_its_promotion(place: Place) -> None:
    requested = place.client.start_adaptation("lobby")
    run = place.begin(seed=1)
    with RunDatabase(place.layout.database) as runs:
        runs.set_operation(run, requested.operation_id)
    place.client.cancel_operation(requested.operation_id)
    ended, stages = place.run_once()
    assert ended.state == "failed" and "cancelled" in ended.reason and place.active() == "first"
    assert "promote" not in stages


def test_the_scheduler_resumes_an_unfinished_run_and_stops_on_a_signal(place: Place) -> None:
    place.begin(seed=1)
    with started("run", place.file) as scheduler:
        while place.active() != "lobby-000001":
            assert scheduler.poll() is None
            time.sleep(0.05)
        scheduler.send_signal(signal.SIGTERM)
        output, _ = scheduler.communicate(timeout=LONG_S)
        assert scheduler.returncode == 0 and "Traceback" not in output, output
    assert "the next run begins" in output and "executed successfully" not in output


def test_pages_and_models_expire_and_figures_are_kept(place: Place) -> None:
    kept = []
    for seed in (1, 2, 3, 4):
        place.begin(seed=seed)
        place.layout.run(seed).page.write_text("<p>crops of people</p>")
        for stage in ("shadow", "watch"):
            write_outcome(place.layout.run(seed).result(stage), StageOutcome())
        assert place.run_once()[0].state == "promoted"
        kept.append(sorted(path.name for path in place.models.iterdir()))
    # The active model and its two predecessors are kept, and the server's own.
    assert kept[2:] == [["first", *(f"lobby-00000{number}" for number in numbers)] for numbers in ("123", "234")]
    assert not (place.layout.run(1).path / "checkpoint").exists() and place.layout.run(2).path.exists()
    assert "crops of people" in place.layout.page(3).read_text()
    site = load_site(place.file)
    old = site.model_copy(update={"collect": site.collect.model_copy(update={"history_days": 1e-9})})
    with RunDatabase(place.layout.database) as runs:
        history.apply_retention(old, place.layout, runs)
        history.write_pages(old, place.layout, runs)
        assert runs.stages(3)["promote"].outcome is not None
    assert not place.layout.run(3).page.exists()
    page = place.layout.page(3).read_text()
    assert "crops of people" not in page and "promoted" in page
    assert place.client.collection(COLLECTION).entry_count > 0
