"""The stages that use the server: switching, shadow, watch, rollback, and conflicts with switches by hand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cycles import COLLECTION, ENTRIES, write_site
from serving import jpeg
from tiny import resight_here, the_error

from resight.calibration import Calibration
from resight.client import Client, NewEntry
from resight.client.responses import SearchStatistics
from resight.cycle import stages
from resight.cycle.conductor import STAGES
from resight.cycle.runs import RunDatabase
from resight.cycle.site import load_site
from resight.cycle.stages import StageContext
from resight.cycle.state_folder import read_active

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from conftest import Place

DECIDES_UNKNOWN = Calibration(0.9999, 10_000.0, 0.95, 0.3, 0.001, 0.05, 100, 100, "tests", "tests", 0.01)
NO_WATCH = ("minutes = 0.0\n[schedule]", "minutes = 0.2\nmin_searches = 10\n[schedule]")


@contextmanager
def searching(address: str, until: threading.Event | None = None) -> Iterator[None]:
    """Search with crops that were never enrolled, within the block."""
    stop = threading.Event()

    def search() -> None:
        with Client(address) as client:
            number = 0
            while not stop.is_set():
                client.search(COLLECTION, jpeg(number % ENTRIES, 1 + number // ENTRIES))
                number += 1
                stop.wait(0.01)

    thread = threading.Thread(target=search)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_a_candidate_is_promoted_and_two_promotions_are_rolled_back_one_by_one(place: Place) -> None:
    spaces = [place.client.collection(COLLECTION).space_id]
    for seed in (1, 2):
        place.begin(seed=seed)
        ended, stages = place.run_once()
        assert (ended.state, list(stages)) == ("promoted", list(STAGES)), stages
        spaces.append(place.client.collection(COLLECTION).space_id)
    assert len(set(spaces)) == 3 and place.active() == "lobby-000002"
    place.client.enrol(COLLECTION, NewEntry(jpeg(500), entry_id="newcomer"))
    for back in (1, 0):
        done = resight_here("cycle", "rollback", place.file)
        assert done.returncode == 0 and "active again" in done.stdout, done.stderr
        assert place.active() == ("first", "lobby-000001")[back]
        assert place.client.collection(COLLECTION).space_id == spaces[back]
        assert place.client.collection(COLLECTION).entry_count == ENTRIES + 1
        assert min(place.finds(person) for person in (0, ENTRIES - 1, 500)) > 0.999  # no entry was lost
    assert "there is nothing to roll back" in the_error(resight_here("cycle", "rollback", place.file))
    history = resight_here("cycle", "history", place.file, "--json", place.folder / "history.json")
    assert history.returncode == 0
    listed = json.loads((place.folder / "history.json").read_text())
    assert [(run["run"], run["state"], run["reason"]) for run in listed] == [
        (2, "rolled_back", "by hand"),
        (1, "rolled_back", "by hand"),
    ]
    assert "rolled back" in place.layout.page(1).read_text()


def test_the_next_run_begins_from_what_the_server_has_active(place: Place) -> None:
    place.begin(seed=1)
    place.run_once()
    first = read_active(place.layout.active)
    assert first is not None and first.run == 1
    place.client.activate_model("first")  # manually
    place.begin(seed=2)
    baseline = read_active(place.layout.run(2).baseline)
    assert baseline is not None and (baseline.model_id, baseline.checkpoint, baseline.run) == ("first", "", 0)


def test_a_switch_by_hand_during_a_run_is_not_undone(place: Place) -> None:
    place.begin(seed=1)
    place.run_once()
    run = place.begin(seed=2)
    place.client.activate_model("first")  # after the run began
    space = place.client.collection(COLLECTION).space_id
    ended, stages = place.run_once()
    assert ended.state == "failed" and "model first is active, but run 2 began with lobby-000001" in ended.reason
    assert place.active() == "first" and place.client.collection(COLLECTION).space_id == space
    assert stages["promote"].starts == 1  # a retry would not help
    alert = json.loads(place.layout.alerts.read_text().splitlines()[-1])
    assert alert["run"] == run and "promote" in alert["text"]


def test_entries_without_crops_fail_the_run_and_name_the_key(place: Place) -> None:
    place.client.create_collection("bare", unlimited_retention=True)
    place.client.enrol("bare", NewEntry(jpeg(1)))
    place.write(("[gate]", '[migrate]\ncollections = ["bare"]\n[gate]'))
    place.begin(seed=1)
    ended, _ = place.run_once()
    assert ended.state == "failed" and "no stored crop" in ended.reason and place.active() == "first"
    place.write(("[gate]", '[migrate]\ncollections = ["bare"]\nmissing_crops = "drop"\n[gate]'))
    place.begin(seed=1)
    assert place.run_once()[0].state == "promoted"


def test_live_searches_agree_or_refuse_the_candidate(place: Place) -> None:
    well = ("max_minutes = 0.0", "max_minutes = 1.0\nmin_searches = 20\nmax_latency_ratio = 100.0")
    place.write(well)
    place.begin(seed=1)
    with searching(place.client.address):
        ended, stages = place.run_once()
    shadow = stages["shadow"].outcome
    assert (
        ended.state == "promoted" and shadow is not None and "live searches, the same best hit in" in shadow.reasons[0]
    )
    figures = shadow.figures[COLLECTION]
    assert figures["answered"] >= 20 and figures["top1_agreement"] > 0.5

    place.write((well[0], well[1] + "\nmin_agreement = 1.0"))
    place.begin(seed=77)
    space = place.client.collection(COLLECTION).space_id
    with searching(place.client.address):
        place.client.enrol_batch(COLLECTION, [NewEntry(jpeg(person, 3)) for person in range(ENTRIES)])
        ended, stages = place.run_once()
    if ended.state == "refused":
        assert "at least 100.0% required" in ended.reason
        assert place.client.collection(COLLECTION).space_id == space and place.active() == "lobby-000001"
        assert not (place.models / "lobby-000002").exists()  # unloaded and removed
        assert [one.model_id for one in place.client.models()] == ["first", "lobby-000001"]


def test_without_live_searches_a_required_shadow_refuses_the_candidate(place: Place) -> None:
    place.write(("max_minutes = 0.0", "max_minutes = 0.0\nrequired = true"))
    place.begin(seed=1)
    ended, _ = place.run_once()
    assert ended.state == "refused" and not ended.used  # its crops count again in the next run
    assert "0 live searches" in ended.reason and place.active() == "first"


@pytest.mark.parametrize("action", ["rollback", "alert"])
def test_a_promoted_model_without_hits_is_rolled_back_or_causes_an_alert(place: Place, action: str) -> None:
    place.write((NO_WATCH[0], NO_WATCH[1].replace("[schedule]", f'action = "{action}"\n[schedule]')))
    space = place.client.collection(COLLECTION).space_id
    with searching(place.client.address):
        place.begin(seed=9, calibration=DECIDES_UNKNOWN)  # a space keeps its calibration, so not that of another test
        ended, stages = place.run_once()
    watch = stages["watch"].outcome
    assert watch is not None and "of searches are decided unknown" in watch.reasons[0]
    assert "of searches are decided unknown" in place.layout.alerts.read_text()
    if action == "alert":
        assert ended.state == "promoted" and place.active() == "lobby-000001"
        return
    assert ended.state == "rolled_back" and place.active() == "first"
    assert place.client.collection(COLLECTION).space_id == space
    assert place.finds(3) > 0.999
    found = read_active(place.layout.active)
    assert found is not None and found.model_id == "first"


def test_a_rollback_ends_a_run_in_its_watch_stage(place: Place) -> None:
    place.write(("minutes = 0.0\n[schedule]", "minutes = 30.0\n[schedule]"))
    run = place.begin(seed=1)
    stop = threading.Event()
    watcher = threading.Thread(target=place.run_once, args=(stop,))
    watcher.start()
    while not place.layout.run(run).log("watch").exists():
        assert watcher.is_alive()
        time.sleep(0.02)
    assert "is held by process" in the_error(resight_here("cycle", "rollback", place.file))
    stop.set()
    watcher.join()
    assert resight_here("cycle", "rollback", place.file).returncode == 0
    with RunDatabase(place.layout.database) as runs:
        assert (runs.run(run).state, runs.unfinished(), runs.since_s()) == ("rolled_back", None, 7.0)
    assert place.active() == "first"


def figures(**more: Any) -> SearchStatistics:
    """Figures of a hundred searches without a regression."""
    at = datetime(2026, 3, 1, tzinfo=UTC)
    counts = {"searches": 100, "matches": 90, "uncertain": 5, "unknown": 5, "without_hit": 0, "unknown_share": 0.05}
    means = {"mean_cosine": 0.8, "mean_probability": 0.9, "drift_index": 0.05, "mean_shift": 0.0}
    fixed = {"space_id": "a", "model_id": "m", "active": True, "reference_searches": 1000, "cosine_histogram": ()}
    return SearchStatistics(**{**fixed, **counts, **means, "first_time": at, "last_time": at, **more})


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        ({}, {}, ""),
        ({"unknown_share": 0.24}, {}, ""),
        ({"unknown_share": 0.26}, {}, "26.0% of searches are decided unknown, 5.0% before"),
        ({"unknown_share": 0.9}, {"unknown_share": None}, ""),  # the previous model had no calibration
        ({"unknown_share": None, "drift_index": 0.26}, {}, "stability index 0.26, at most 0.25 allowed"),
        ({"drift_index": None}, {}, ""),
        ({"unknown_share": 0.9, "drift_index": 9.0, "searches": 99}, {}, ""),  # too few searches
    ],
)
def test_the_watch_reports_regressions(
    tmp_path: Path, now: dict[str, Any], before: dict[str, Any], expected: str
) -> None:
    context = StageContext(load_site(write_site(tmp_path, "127.0.0.1:1")), 1, 0.0, lambda words: 0)
    found = stages._regressions(context, stages.WatchedCollection("lobby", figures(**now), figures(**before)))
    assert (expected in found[0]) if expected else found == []
    first = stages._regressions(context, stages.WatchedCollection("lobby", figures(**now), None))
    assert first == [one for one in found if "decided unknown" not in one]


def test_a_promoted_model_without_regression_stays_active(place: Place) -> None:
    place.write(NO_WATCH)
    with searching(place.client.address):
        place.begin(seed=1)
        ended, stages = place.run_once()
    watch = stages["watch"].outcome
    assert ended.state == "promoted" and watch is not None and "no regression" in watch.reasons[0]
