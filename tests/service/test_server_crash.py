"""Crash consistency of the server: `resight serve` is killed at random times under load, restarted and checked.

ROUNDS=200 (``make crash``) sets the number of rounds, SEED the random seed.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ledger import Ledger, State, Write
from server_storm import COLLECTION, ENTRY_OF_PAIR, Storm, after_expiry, draw_crop
from serving import ServerProcess, features_by_hand, make_bundle
from stores import files_with
from watchdog import progress_expected

from resight.client import Client, Query
from resight.errors import ReIDError, StoreError
from resight.service.storage import snapshots

log = logging.getLogger(__name__)

ROUNDS = int(os.environ.get("ROUNDS", "3"))
MODELS = ("tiny-0", "tiny-1")
EAGER = {"RESIGHT_PURGE_INTERVAL_S": "0.3", "RESIGHT_KEEP_RETIRED_SPACE_S": "0.2"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]


@pytest.fixture(autouse=True)
def _watched(tmp_path: Path) -> Iterator[None]:
    """No time limit, but a limit on the time without progress: each round writes."""
    with progress_expected(tmp_path):
        yield


@lru_cache(8192)
def expected_feature(person: int, shot: int, model: str) -> np.ndarray:
    return features_by_hand([draw_crop(person, shot)], MODELS.index(model))[0]


def start_server(root: Path, data: Path) -> ServerProcess:
    return ServerProcess(root / MODELS[0], data, RESIGHT_MODELS=str(root), **EAGER)


def check_operations(client: Client, storm: Storm) -> None:
    """Each operation is known, and has ended, resumes, or is a pending adaptation."""
    found = {one.operation_id: one for one in client.operations()}
    assert set(storm.operations) <= set(found)
    for one in found.values():
        if one.kind == "adapt":
            assert one.state == "pending"
        elif not one.ended:
            assert one.kind == "migrate", one  # only migrations resume
            done = client.wait(one, timeout_s=60)
            assert done.state == "succeeded", (done, done.error)
    migrations = [one for one in found.values() if one.kind == "migrate"]  # the newest first
    for one in migrations:
        if one.operation_id in storm.operations and one.state == "interrupted" and "continued_by" not in one.result:
            assert one is migrations[0], one  # its collection had just been switched, so nothing was left to resume


def check_entries(client: Client, ledger: Ledger, in_flight: list[Write]) -> None:
    """Every acknowledged write is stored, with its crop and its feature, and none is stored partly."""
    candidates = [ledger.states, *in_flight]
    of = client.collection(COLLECTION)
    images = {one.entry.entry_id: one.images for one in client.stream_crops(COLLECTION)}
    found: dict[str, State] = {}
    for entry in client.entries(COLLECTION):
        crops = {state["crop"] for known in candidates if (state := known.get(entry.entry_id)) is not None}
        (image,) = images.pop(entry.entry_id)
        matching: list[Any] = [crop for crop in crops if draw_crop(*crop[1:]) == image]
        assert len(matching) == 1, (entry, crops)
        found[entry.entry_id] = {"subject": entry.subject_id, "label": entry.labels["n"], "crop": matching[0]}
        found[entry.entry_id] |= {"ends": None}
        feature = client.get_feature(COLLECTION, entry.entry_id)
        assert feature.space_id == of.space_id
        assert np.allclose(feature.vector, expected_feature(*matching[0][1:], of.model), atol=1e-5), entry
    assert not images, "crops of no entry"
    count = len(found)
    for pair in client.list_feedback(COLLECTION):
        found[ENTRY_OF_PAIR.join(sorted((pair.entry_id, pair.other_entry_id)))] = {"same": pair.same}
    ledger.reconcile(found, in_flight)
    assert of.entry_count == client.stats(COLLECTION).live_entries == count


def check_index(client: Client, ledger: Ledger) -> None:
    """Each entry is found by its own crop, and a search for all returns exactly the expected entries."""
    own = {name: state["crop"] for name, state in ledger.states.items() if state is not None and "crop" in state}
    queries = [Query(draw_crop(*crop[1:]), 1, exact=True) for crop in own.values()]
    for name, answer in zip(own, client.search_batch(COLLECTION, queries), strict=True):
        assert not isinstance(answer, ReIDError), answer
        (hit,) = answer.hits
        assert (hit.entry.entry_id, hit.similarity > 0.9999) == (name, True), (name, hit)
    everything = client.search(COLLECTION, draw_crop(1, 0), top_k=1000, exact=True).hits
    assert {hit.entry.entry_id for hit in everything} == set(own) and len(everything) == len(own)


def check_files(data: Path, storm: Storm) -> None:
    """SQLite's checks, consistent counts, intact snapshots, and no name of an erased subject in any file."""
    with closing(sqlite3.connect(f"file:{data / 'gallery.sqlite3'}?mode=ro", uri=True)) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert raw.execute("PRAGMA foreign_key_check").fetchall() == []
        assert (
            raw.execute("SELECT sum(held) FROM collection").fetchone()
            == raw.execute("SELECT count(*) FROM entry").fetchone()
        )
        lacking = (
            "SELECT count(*) FROM entry e JOIN collection c ON c.key = e.collection WHERE NOT EXISTS (SELECT 1 FROM "
        )
        assert raw.execute(
            lacking + "feature f WHERE f.entry = e.key AND f.space_id = c.space_id) OR NOT EXISTS "
            "(SELECT 1 FROM crop k WHERE k.entry = e.key)"
        ).fetchone() == (0,)
        apart = "SELECT count(*) FROM feedback f JOIN entry a ON a.key = f.low JOIN entry b ON b.key = f.high WHERE "
        assert raw.execute(apart + "a.collection <> b.collection OR a.collection <> f.collection").fetchone() == (0,)
        stray = "SELECT count(*) FROM feature f JOIN entry e ON e.key = f.entry WHERE NOT EXISTS (SELECT 1 FROM "
        assert raw.execute(
            stray + "collection_space s WHERE s.collection = e.collection AND s.space_id = f.space_id)"
        ).fetchone() == (0,)
        (last,) = raw.execute("SELECT max(seq) FROM sqlite_sequence WHERE name = 'change'").fetchone()
        assert raw.execute("SELECT max(revision) FROM collection").fetchone()[0] <= (last or 0)
    eventually(lambda: [snapshots.verify(data, name) for name in snapshots.list_names(data)])
    eventually(lambda: no_remnants(data / "snapshots"))
    for subject in storm.erased:
        assert files_with(data, subject.encode()) == [], subject


def eventually(check: Callable[[], object]) -> None:
    """Passes within ten seconds: a purge may just now be taking the erased out of a snapshot, which it replaces."""
    until = time.monotonic() + 10
    while True:
        try:
            check()
            return
        except (AssertionError, StoreError):
            if time.monotonic() > until:
                raise
            time.sleep(0.05)


def no_remnants(folder: Path) -> None:
    assert list(folder.glob(".*")) == []


def check_log(server: ServerProcess) -> None:
    assert [line for line in server.log.read_text().splitlines() if " ERROR " in line or "Traceback" in line] == []


def test_acknowledged_calls_survive_a_kill_of_the_server_at_any_time(tmp_path: Path) -> None:
    root, data, ledger = tmp_path / "models", tmp_path / "data", Ledger()
    for seed, name in enumerate(MODELS):
        make_bundle(root / name, seed=seed)
    chance, counts, refused = random.Random(os.environ.get("SEED", "resight")), Counter[str](), Counter[str]()
    server = start_server(root, data)
    try:
        with Client(server.wait_ready()) as client:
            client.create_collection(COLLECTION, unlimited_retention=True, keep_crops=True)
            client.wait(client.load_model(MODELS[1]))
        for number in range(ROUNDS):
            storm = Storm(server.wait_ready(), ledger, number, MODELS)
            storm.start()
            time.sleep(chance.uniform(0.0, 1.2))
            assert server.process.poll() is None, server.log.read_text()
            in_flight = storm.stop(partial(server.end, signal.SIGKILL))
            counts.update(storm.answered | Counter({"in flight": len(in_flight)}))
            refused.update(storm.refused)
            check_log(server)
            for name in snapshots.list_names(data):  # so that they do not accumulate; leftovers of the crash are kept
                snapshots.remove(data, name)
            server = start_server(root, data)
            while chance.random() < 0.2:  # also killed during start, while it resumes interrupted work
                time.sleep(chance.uniform(0.0, 1.0))
                server.end(signal.SIGKILL)
                check_log(server)
                server = start_server(root, data)
                counts["killed at start"] += 1
            with Client(server.wait_ready(), timeout_s=30) as client:
                check_operations(client, storm)
                time.sleep(max([0.0, *(state["ends"] - time.time() for state in ending([ledger.states, *in_flight]))]))
                ledger.states = after_expiry(ledger.states)
                check_entries(client, ledger, [after_expiry(write) for write in in_flight])
                of = client.collection(COLLECTION)
                assert of.model in storm.searched_in and of.revision >= storm.revision
                check_index(client, ledger)
                check_files(data, storm)
            check_log(server)
    finally:
        server.end(signal.SIGKILL)
        log.info("answered %s; refused %s; left %d", dict(counts), dict(refused), len(ledger.states))
    assert counts["in flight"] and sum(counts.values()) > 10 * ROUNDS
    assert ROUNDS < 50 or min(counts[kind] for kind in ("migrate succeeded", "erase", "snapshot", "killed at start"))


def ending(writes: list[Write]) -> list[dict[str, Any]]:
    """States of entries that expire by themselves."""
    return [state for write in writes for state in write.values() if state is not None and state.get("ends")]
