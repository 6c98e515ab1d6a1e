"""SIGKILL at every stage of a cycle, then `resight cycle once`: it completes, once."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cycles import COLLECTION, ENTRIES, crops, cycle, environment, logs, once, site_served
from serving import ServerProcess
from watchdog import progress_expected

from resight.cycle.conductor import STAGES
from resight.cycle.runs import RunDatabase
from resight.cycle.state_folder import StateFolder, read_active
from resight.locks import lock_holder

pytestmark = pytest.mark.slow

if TYPE_CHECKING:
    from conftest import Place

LONG_S = 120.0
KILLS = 8  # fewer than the allowed number of starts


def stage_pid(database: Path, stage: str) -> int | None:
    """The process of a stage, once its row says running; its process group has the same id."""
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as db:
            row = db.execute("SELECT pid FROM stage WHERE stage = ? AND state = 'running'", (stage,)).fetchone()
        db.close()
    except sqlite3.OperationalError:  # not there yet
        return None
    return None if row is None else int(row[0])


def is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def killed_during(stage: str, site: Path, database: Path) -> None:
    """Start or resume the cycle, and kill it as soon as a stage runs; the stage's process ends with it."""
    process = subprocess.Popen(
        cycle("once", site), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    deadline = time.monotonic() + LONG_S
    while (pid := stage_pid(database, stage)) is None:
        assert process.poll() is None and time.monotonic() < deadline, (stage, logs(site))
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + LONG_S
    while is_alive(pid):
        assert time.monotonic() < deadline, stage
        time.sleep(0.01)


def test_many_kills_cause_one_switch_and_lose_no_entry(place: Place) -> None:
    """At random moments of the stages that change the server, not only at their start."""
    place.begin(seed=1)
    rng, kills = random.Random(5), 0
    with RunDatabase(place.layout.database) as runs:
        while runs.unfinished() is not None and kills < KILLS:
            process = subprocess.Popen(
                cycle("once", place.file), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
            )
            try:
                process.wait(rng.uniform(0.5, 2.0))  # it takes three seconds in total, one of them to start
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
        if runs.unfinished() is not None:
            place.run_once()
        assert runs.run(1).state == "promoted" and kills > 0
    assert place.active() == "lobby-000001"
    collection = place.client.collection(COLLECTION)
    assert (collection.model, collection.entry_count) == ("tiny-1", ENTRIES)
    assert min(place.finds(person) for person in (0, ENTRIES - 1)) > 0.999
    found = read_active(place.layout.active)
    assert found is not None and [one.model_id for one in found.chain()] == ["lobby-000001", "first"]


def test_the_cycle_waits_for_a_restarted_server(own_place: Place) -> None:
    place = own_place
    place.begin(seed=1)
    address = place.client.address
    place.server.end(signal.SIGKILL)
    stopped, _ = place.run_once()
    assert stopped.state == "running"
    data = place.folder / "data"
    models = ("--models", str(place.folder / "models"))
    again = ServerProcess(place.folder / "models" / "first", data, *models, listen=address)
    try:
        again.wait_ready()
        ended, stages = place.run_once()
        assert ended.state == "promoted" and stages["backfill"].starts == 3  # two while it was away
        assert place.active() == "lobby-000001" and place.finds(1) > 0.999
    finally:
        again.end()


@pytest.mark.timeout(0)  # `progress_expected` watches it
def test_a_cycle_that_is_killed_at_every_stage_completes_once(tmp_path: Path) -> None:
    with progress_expected(tmp_path), site_served(tmp_path) as (site, client):
        layout = StateFolder(tmp_path / "state")
        before = {one.entry_id for one in client.entries(COLLECTION)}
        for stage in STAGES:
            killed_during(stage, site, layout.database)
        assert "is held by" not in str(lock_holder(layout.lock))
        done = once(site)
        assert done.returncode == 0, done.stderr + logs(site)
        with RunDatabase(layout.database) as runs:
            (run,) = runs.runs()
            stages = runs.stages(run.run)
        assert (run.state, list(stages)) == ("promoted", list(STAGES))
        assert {name: (one.state, one.starts) for name, one in stages.items()} == dict.fromkeys(STAGES, ("done", 2))
        # The service: the new model embeds, the collection is searched in its space, no entry was lost.
        (active,) = (one for one in client.models() if one.active)
        collection = client.collection(COLLECTION)
        assert (active.model_id, collection.space_id) == ("lobby-000001", active.space_id)
        assert {one.entry_id for one in client.entries(COLLECTION)} == before and len(before) == ENTRIES
        assert sum(one.model_id.startswith("lobby") for one in client.models()) == 1
        night = crops(site)
        seen = client.search(COLLECTION, night.read(0))
        assert seen.space_id == active.space_id and seen.hits[0].similarity > 0.999
        found = read_active(layout.active)
        assert found is not None and (found.model_id, found.run) == ("lobby-000001", 1)
        assert found.previous is not None and found.previous.model_id == "first"
        assert not layout.run(1).site.exists()  # crops are deleted when the run has ended
        assert (
            "promoted" in layout.page(1).read_text()
            and "run-000001.html" in (layout.history / "index.html").read_text()
        )
