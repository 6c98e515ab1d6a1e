"""The cycle itself: what ends a run, what waits for the next call, who may ask for one, and what is left behind."""

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

from resight.cycle import conductor, retention
from resight.cycle.conductor import MOST_STARTS, Conductor
from resight.cycle.layout import Layout
from resight.cycle.outcome import Outcome, write_outcome
from resight.cycle.site_file import load_site
from resight.cycle.state import Runs

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from conftest import Place

NOBODY = "127.0.0.1:1"
LONG_S = 120.0


@pytest.fixture
def lonely(tmp_path: Path) -> Path:
    """A site whose server is away."""
    (tmp_path / "models").mkdir()
    return write_site(tmp_path, NOBODY)


def test_a_site_without_crops_is_skipped_and_told(lonely: Path) -> None:
    done = once(lonely, "--json", lonely.parent / "told.json")
    assert done.returncode == 0 and "run 1: skipped" in done.stdout, done.stderr
    told = json.loads((lonely.parent / "told.json").read_text())
    assert told["state"] == "skipped" and [stage["stage"] for stage in told["stages"]] == ["ingest", "collect"]
    assert "ingest some first" in told["reason"] and not told["used"]
    shown = resight_here("cycle", "status", lonely, "--json", lonely.parent / "status.json")
    assert shown.returncode == 0 and "nobody works on it" in shown.stdout and "skipped" in shown.stdout
    status = json.loads((lonely.parent / "status.json").read_text())
    assert status["run"]["state"] == "skipped" and status["held_by"] is None and status["next"]


def begun(site: Path, *done: str) -> Layout:
    """A run of which some stages are done."""
    layout = Layout(load_site(site).state)
    with Runs(layout.database) as runs:
        number = runs.begin().run
    for stage in done:
        write_outcome(layout.run(number).result(stage), Outcome())
    return layout


def test_what_may_pass_is_tried_again_and_then_waits_for_the_next_call(lonely: Path) -> None:
    layout = begun(lonely, "ingest", "collect")
    assert Conductor(lonely, pauses_s=(0.01,)).once().state == "running"
    with Runs(layout.database) as runs:
        found = runs.stages(1)["adapt"]
        assert (found.state, found.starts) == ("failed", 2) and NOBODY in found.error
        for pid in range(found.starts, MOST_STARTS - 1):
            runs.start_stage(1, "adapt", pid)
    ended = Conductor(lonely, pauses_s=(0.01,)).once()
    assert ended.state == "failed" and f"not done in {MOST_STARTS} tries" in ended.reason and NOBODY in ended.reason


def test_an_error_that_stays_ends_the_run_and_the_next_call_begins_another(lonely: Path) -> None:
    layout = begun(lonely, "ingest", "collect")
    layout.run(1).baseline.write_text("{")
    ended = Conductor(lonely).once()
    assert ended.state == "failed" and ended.reason.startswith("adapt: ") and "baseline.json is damaged" in ended.reason
    assert "baseline.json is damaged" in json.loads(layout.alerts.read_text())["text"]
    stop = Event()
    stop.set()
    assert Conductor(lonely, stop).once().run == 2


def test_what_fails_after_promotion_takes_nothing_back_and_is_told(place: Place) -> None:
    run = place.begin(seed=1)
    for stage in ("backfill", "shadow"):
        write_outcome(place.layout.run(run).result(stage), Outcome())
    write_outcome(place.layout.run(run).result("promote"), Outcome(figures={}))  # without a time to watch from
    ended, stages = place.once()
    assert (ended.state, stages["watch"].state, ended.used) == ("promoted", "failed", True)
    assert "is active, but watch" in ended.reason and "is active, but watch" in place.layout.alerts.read_text()


def test_a_call_without_time_leaves_the_run_to_the_next(lonely: Path) -> None:
    stop = Event()
    stop.set()
    assert Conductor(lonely, stop).once().state == "running"
    text = lonely.read_text()
    lonely.write_text(text + "budget_minutes = 0.0001\n")
    assert Conductor(lonely).once().state == "running"
    hour = (time.gmtime().tm_hour + 3) % 24
    lonely.write_text(text + f'window = "{hour:02d}:00-{hour:02d}:30"\n')
    assert "window" in the_error(resight_here("cycle", "once", lonely))
    assert Conductor(lonely, stop, ignore_window=True).once().state == "running"
    with Runs(Layout(lonely.parent / "state").database) as runs:
        assert len(runs.runs()) == 1


def test_a_second_cycle_is_refused_and_a_signal_lets_the_first_go(place: Place) -> None:
    place.write(("max_minutes = 0.0", "max_minutes = 5.0"))
    place.begin(seed=1)
    with started("once", place.file) as first:
        while "shadow" not in (stages := running(place.layout)):
            assert first.poll() is None
            time.sleep(0.02)
        assert f"held by process {first.pid}" in the_error(resight_here("cycle", "once", place.file))
        first.send_signal(signal.SIGTERM)
        told, _ = first.communicate(timeout=LONG_S)
        assert first.returncode == 75 and "run 1: running" in told
    with pytest.raises(ProcessLookupError):
        os.killpg(stages["shadow"], 0)
    place.write()
    ended, found = place.once()
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


def running(layout: Layout) -> dict[str, int]:
    with Runs(layout.database) as runs:
        return {name: one.pid for name, one in runs.stages(1).items() if one.state == "running"}


def test_a_run_that_was_asked_for_is_told_to_who_asked(place: Place) -> None:
    asked = place.client.start_adaptation("lobby")
    other = place.client.start_adaptation("elsewhere")
    place.begin(seed=1)
    ended, _ = place.once()
    assert ended.operation == asked.operation_id
    found = place.client.operation(asked.operation_id)
    assert (found.state, found.result["state"], found.result["run"]) == ("succeeded", "promoted", "1")
    assert place.client.operation(other.operation_id).state == "pending"


def test_who_asked_may_cancel_until_it_is_promoted(place: Place) -> None:
    asked = place.client.start_adaptation("lobby")
    run = place.begin(seed=1)
    with Runs(place.layout.database) as runs:
        runs.ask(run, asked.operation_id)
    place.client.cancel_operation(asked.operation_id)
    ended, stages = place.once()
    assert ended.state == "failed" and "cancelled" in ended.reason and place.active() == "first"
    assert "promote" not in stages


def test_the_scheduler_goes_on_with_what_was_left_and_ends_on_a_signal(place: Place) -> None:
    place.begin(seed=1)
    with started("run", place.file) as keeper:
        while place.active() != "lobby-000001":
            assert keeper.poll() is None
            time.sleep(0.05)
        keeper.send_signal(signal.SIGTERM)
        told, _ = keeper.communicate(timeout=LONG_S)
        assert keeper.returncode == 0 and "Traceback" not in told, told
    assert "the next run begins" in told and "executed successfully" not in told


def test_pages_and_models_go_in_time_and_figures_stay(place: Place) -> None:
    kept = []
    for seed in (1, 2, 3, 4):
        place.begin(seed=seed)
        place.layout.run(seed).page.write_text("<p>crops of people</p>")
        for stage in ("shadow", "watch"):
            write_outcome(place.layout.run(seed).result(stage), Outcome())
        assert place.once()[0].state == "promoted"
        kept.append(sorted(path.name for path in place.models.iterdir()))
    # The active one and the two before it are kept, and the server's own.
    assert kept[2:] == [["first", *(f"lobby-00000{number}" for number in numbers)] for numbers in ("123", "234")]
    assert not (place.layout.run(1).path / "checkpoint").exists() and place.layout.run(2).path.exists()
    assert "crops of people" in place.layout.page(3).read_text()
    site = load_site(place.file)
    old = site.model_copy(update={"collect": site.collect.model_copy(update={"history_days": 1e-9})})
    with Runs(place.layout.database) as runs:
        retention.tidy(old, place.layout, runs)
        conductor.history.write(old, place.layout, runs)
        assert runs.stages(3)["promote"].outcome is not None
    assert not place.layout.run(3).page.exists()
    page = place.layout.page(3).read_text()
    assert "crops of people" not in page and "promoted" in page
    assert place.client.collection(COLLECTION).entry_count > 0
