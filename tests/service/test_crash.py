"""Crash consistency: a process with concurrent writes is killed at random times, and the gallery is reopened.

ROUNDS=200 (``make crash``) sets the number of rounds.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ledger import Ledger, State, Write
from stores import SPACE, feature, open_gallery
from watchdog import progress_expected

from resight.service.records import Filter
from resight.service.search.searcher import NearestQuery, Searcher
from resight.service.storage import reads
from resight.service.storage.store import Store

log = logging.getLogger(__name__)

ROUNDS = int(os.environ.get("ROUNDS", "6"))
TESTS = Path(__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]


@pytest.fixture(autouse=True)
def _watched(tmp_path: Path) -> Iterator[None]:
    """No time limit, but a limit on the time without progress: each round writes."""
    with progress_expected(tmp_path):
        yield


def apply_output(ledger: Ledger, lines: list[dict[str, Any]]) -> tuple[list[Write], int]:
    """Apply a killed process's output to the ledger; returns the unacknowledged writes and the last revision."""
    begun: dict[int, Write] = {}
    revision = 0
    for line in lines:
        if "began" in line:
            begun[line["number"]] = line["began"]
        elif "answered" in line:
            ledger.acknowledge(begun.pop(line["answered"]))
            revision = max(revision, line["revision"])
        else:
            assert "ready" in line, line
    return list(begun.values()), revision


def run_and_kill(folder: Path, seed: int, states: dict[str, State], after_s: float) -> list[dict[str, Any]]:
    """Run the writes on the gallery and kill the process after a while; returns its output lines."""
    (folder / "states.json").write_text(json.dumps(states))
    command = [sys.executable, TESTS / "storm.py", folder, str(seed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0)
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first, "the storm ended by itself"
    got, end = bytearray(first), time.monotonic() + after_s
    while (left := end - time.monotonic()) > 0:
        if select.select([process.stdout], [], [], left)[0]:
            got += process.stdout.read(1 << 16)
    assert process.poll() is None, f"the storm ended by itself: {bytes(got[-2000:]).decode()}"
    process.send_signal(signal.SIGKILL)
    process.wait()
    with process.stdout:
        got += process.stdout.readall()  # the rest of its output
    return [json.loads(line) for line in got.splitlines(keepends=True) if line.endswith(b"\n")]


async def read_entries(store: Store) -> dict[str, dict[str, Any]]:
    """Every entry in the form of the writes, after checking that each is complete."""
    lobby = await store.read(reads.collection, "lobby")
    found = {}
    crops = await store.read(lambda c: c.execute("SELECT entry, image FROM crop ORDER BY entry, number").fetchall())
    kept: dict[int, list[bytes]] = {}
    for key, image in crops:
        kept.setdefault(key, []).append(image)
    for key, entry in await store.read(reads.entries, lobby.key, Filter(), after=0, limit=1 << 30):
        vector = await store.read(reads.feature, key, SPACE)
        images = kept.pop(key, [])
        found[entry.entry_id] = {"subject": entry.subject_id, "label": entry.labels["n"], "crops": len(images)}
        found[entry.entry_id] |= {"vector": vector.tobytes(), "images": images}
    assert not kept, "crops without an entry"
    return found


def with_seeds(found: dict[str, dict[str, Any]], states: list[Write]) -> dict[str, dict[str, Any]]:
    """Find the seed of each entry, whose feature and crops it has bit for bit."""
    result: dict[str, dict[str, Any]] = {}
    for entry_id, one in found.items():
        seeds = {state["seed"] for known in states if (state := known.get(entry_id)) is not None}
        (seed,) = [
            seed for seed in seeds if feature(seed).tobytes() == one["vector"] and set(one["images"]) <= {b"%d" % seed}
        ]
        rest = {name: one[name] for name in ("subject", "label", "crops")}
        result[entry_id] = {"id": entry_id, **rest, "seed": seed}
    return result


async def check_index(store: Store, found: dict[str, dict[str, Any]]) -> None:
    """The rebuilt index returns exactly the stored entries, each with its feature."""
    searcher = Searcher(store)
    try:
        await searcher.load()
        lobby = await store.read(reads.collection, "lobby")
        queries = [NearestQuery(feature(1), len(found) + 10, Filter())]
        (answer,) = await searcher.search(lobby, queries, with_features=True)
        held = {hit.entry.entry_id: np.asarray(hit.feature, np.float32).tobytes() for hit in answer.hits}
        assert held == {entry_id: one["vector"] for entry_id, one in found.items()}
        assert answer.revision == lobby.revision
    finally:
        searcher.close()


def check_database(path: Path) -> None:
    """SQLite's own checks, and consistent counts."""
    raw = sqlite3.connect(path)
    assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert raw.execute("PRAGMA foreign_key_check").fetchall() == []
    held, entries, features = raw.execute(
        "SELECT (SELECT sum(held) FROM collection), (SELECT count(*) FROM entry), (SELECT count(*) FROM feature)"
    ).fetchone()
    assert held == entries == features
    (last,) = raw.execute("SELECT seq FROM sqlite_sequence WHERE name = 'change'").fetchone()
    assert raw.execute("SELECT max(revision) FROM collection").fetchone()[0] <= last
    raw.close()


def test_acknowledged_writes_survive_a_kill_at_any_time(tmp_path: Path) -> None:
    ledger = Ledger()
    chance = random.Random(os.environ.get("SEED", "resight"))
    answered = in_flight = last = 0
    for number in range(ROUNDS):
        lines = run_and_kill(tmp_path, number, ledger.states, after_s=chance.uniform(0.02, 0.9))
        before = dict(ledger.states)
        open_writes, revision = apply_output(ledger, lines)
        last = max(last, revision)
        answered += sum("answered" in line for line in lines)
        in_flight += len(open_writes)
        check_database(tmp_path / "gallery.sqlite3")

        async def check(store: Store, states: list[Write], writes: list[Write], last: int) -> None:
            found = await read_entries(store)
            lobby = await store.read(reads.collection, "lobby")
            assert lobby.revision >= last
            ledger.reconcile(with_seeds(found, states), writes)
            await check_index(store, found)

        with open_gallery(tmp_path) as store:
            asyncio.run(check(store, [before, ledger.states, *open_writes], open_writes, last))
        assert not list((tmp_path / "snapshots").glob(".*"))
    log.info("%d rounds, %d answered, %d in flight, %d entries left", ROUNDS, answered, in_flight, len(ledger.states))
    assert answered > ROUNDS and in_flight
