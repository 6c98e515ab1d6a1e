import asyncio
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from stores import OTHER, SPACE, count_entries, create_collection, enrolment, feature, open_gallery

from resight.errors import InputError, StoreError
from resight.service.records import Enrolment, EntryRecord, Filter
from resight.service.storage import data_folder, reads, snapshots, spaces, writes
from resight.service.storage.audit import AuditEvent, AuditLog
from resight.service.storage.erasure import LIST_FILE, erase_subject
from resight.service.storage.snapshots import restore

DATABASE = "gallery.sqlite3"


async def fill(store, count: int = 30):
    lobby = await create_collection(store, keep_crops=True)
    lobby = await store.write(spaces.begin_space, "lobby", OTHER)
    for number in range(count):
        one = enrolment(
            number,
            subject_id=f"person-{number % 5}",
            labels={"n": str(number)},
            crops=(b"CROP-%d" % number,),
            others=((OTHER.space_id, feature(500 + number)),),
        )
        await store.write(writes.enrol, lobby, one)
    return lobby


async def content(store) -> list[tuple[int, EntryRecord, bytes]]:
    lobby = await store.read(reads.collection, "lobby")
    found = await store.read(reads.entries, lobby.key, Filter(), after=0, limit=9999)
    return [(key, one, (await store.read(reads.feature, key, SPACE)).tobytes()) for key, one in found]


def run(folder: Path, body):
    with open_gallery(folder) as store:
        return asyncio.run(body(store))


def test_a_restored_snapshot_has_exactly_the_content_at_its_time(tmp_path):
    async def before(store):
        await fill(store)
        return await content(store)

    async def after(store):
        lobby = await store.read(reads.collection, "lobby")
        await store.erase(writes.delete_entries, lobby, Filter(subject_ids=("person-1",)), cap=None)
        last = await store.write(writes.enrol, lobby, Enrolment(EntryRecord("late"), feature(99)))
        await AuditLog(store).record(AuditEvent("vms", "since then"))
        return last.revision

    async def check(store):
        assert await content(store) == was
        lobby = await store.read(reads.collection, "lobby")
        assert lobby.revision > revision  # no client has seen this one
        new = await store.write(writes.enrol, lobby, Enrolment(EntryRecord("late"), feature(98)))
        key, _ = await store.read(reads.entry, lobby, "late")
        assert key > 31 and new.revision > lobby.revision  # 31 was the key of the other "late"
        methods = [event.method for event in await AuditLog(store).list_events()]
        assert methods == ["snapshot.restore", "since then"]
        assert (await store.read(spaces.collection_spaces, lobby.key))[1].entries == 30

    was = run(tmp_path, before)
    made = snapshots.create(tmp_path / DATABASE, "monday")
    revision = run(tmp_path, after)
    assert made.entries == 30 and made.collections == {"lobby": {"entries": 30, "space_id": SPACE.space_id}}
    assert snapshots.list_manifests(tmp_path) == [made] == [snapshots.verify(tmp_path, "monday")]
    index = tmp_path / "index" / "1.hnsw"
    index.parent.mkdir()
    index.write_bytes(b"of the old database")
    assert restore(tmp_path, "monday").erased_count == 0
    assert not index.exists() and not (tmp_path / data_folder.SWAP_MARKER).exists()
    run(tmp_path, check)


def test_a_copy_made_during_writes_is_consistent(tmp_path):
    async def body(store):
        lobby = await create_collection(store)
        stop = threading.Event()
        copies = []

        def copy():
            for number in range(3):
                copies.append(snapshots.create(tmp_path / DATABASE, f"s{number}"))
            stop.set()

        copying = threading.Thread(target=copy)
        copying.start()
        number = 0
        while not stop.is_set():
            batch = [enrolment(number + step) for step in range(8)]
            await store.write(writes.enrol_all, lobby, batch)
            number += 8
        copying.join()
        assert number > 0 and [one.entries % 8 for one in copies] == [0, 0, 0]
        assert copies[0].entries <= copies[1].entries <= copies[2].entries <= number

    run(tmp_path, body)
    for one in snapshots.list_manifests(tmp_path):
        assert snapshots.verify(tmp_path, one.name) == one
        raw = sqlite3.connect(tmp_path / "snapshots" / one.name / DATABASE)
        assert raw.execute("SELECT count(*) FROM feature").fetchone()[0] == one.entries
        raw.close()
        assert {path.name for path in (tmp_path / "snapshots" / one.name).iterdir()} == {DATABASE, "manifest.json"}
    assert (tmp_path / "snapshots").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("lost", ["nothing", "database", "list"])
def test_a_restore_does_not_bring_back_an_erased_person(tmp_path, lost):
    async def erase(store):
        lobby = await store.read(reads.collection, "lobby")
        renamed = await store.write(writes.enrol, lobby, Enrolment(EntryRecord("x"), feature(77)))
        done = await erase_subject(store, "person-2", principal="op", deadline=time.monotonic() + 10)
        assert done.erased_count == 6 and renamed
        again = enrolment(7, subject_id="person-2")  # enrolled again after the erasure, with her consent
        await store.write(writes.enrol, lobby, again)

    async def check_erased(store):
        found = await content(store)
        assert len(found) == 24 and "person-2" not in {entry.subject_id for _, entry, _ in found}
        assert not await store.read(
            lambda c: c.execute("SELECT 1 FROM crop WHERE image IN (x'43524f502d32', x'43524f502d37')").fetchall()
        )
        (event, *_) = await AuditLog(store).list_events()
        assert (event.method, event.affected) == ("snapshot.restore", 6)

    async def check_enrolled_again(store):
        found = await content(store)
        assert [entry.entry_id for _, entry, _ in found if entry.subject_id == "person-2"] == ["e7"]

    run(tmp_path, fill)
    snapshots.create(tmp_path / DATABASE, "before")
    run(tmp_path, erase)
    snapshots.create(tmp_path / DATABASE, "after")
    if lost == "database":
        (tmp_path / DATABASE).write_bytes(b"\xff" * 100_000)
    elif lost == "list":
        (tmp_path / LIST_FILE).unlink()
    assert restore(tmp_path, "before").erased_count == 6
    run(tmp_path, check_erased)
    for secret in (feature(2).tobytes(), feature(507).tobytes(), b"CROP-27"):
        assert secret not in (tmp_path / DATABASE).read_bytes()
    assert restore(tmp_path, "after").erased_count == 0
    run(tmp_path, check_enrolled_again)
    assert restore(tmp_path, "before").erased_count == 6
    run(tmp_path, check_erased)


def test_a_restore_does_not_bring_back_an_erased_entry_without_its_later_subject(tmp_path):
    async def fill_nameless(store):
        lobby = await create_collection(store)
        await store.write(writes.enrol, lobby, enrolment(1))

    async def name_and_erase(store):
        lobby = await store.read(reads.collection, "lobby")
        await store.erase(writes.update_entry, lobby, EntryRecord("e1", "anna"), ["subject_id"])
        assert (await erase_subject(store, "anna", principal="op", deadline=time.monotonic() + 9)).erased_count == 1

    run(tmp_path, fill_nameless)
    snapshots.create(tmp_path / DATABASE, "s")
    run(tmp_path, name_and_erase)
    assert restore(tmp_path, "s").erased_count == 1
    assert run(tmp_path, count_entries) == 0


@pytest.mark.parametrize("harm", ["short", "flipped", "missing", "manifest", "newer", "link"])
def test_an_altered_snapshot_is_refused(tmp_path, harm):
    run(tmp_path, fill)
    snapshots.create(tmp_path / DATABASE, "s")
    was = run(tmp_path, content)
    folder = tmp_path / "snapshots" / "s"
    data, manifest = (folder / DATABASE).read_bytes(), json.loads((folder / "manifest.json").read_text())
    if harm == "short":
        (folder / DATABASE).write_bytes(data[:-16384])
    elif harm == "flipped":
        (folder / DATABASE).write_bytes(data[:70_000] + bytes([data[70_000] ^ 1]) + data[70_001:])
    elif harm == "missing":
        (folder / DATABASE).unlink()
    elif harm == "manifest":
        (folder / "manifest.json").write_text('{"name": "s"}')
    elif harm == "newer":
        (folder / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    else:
        (folder / DATABASE).rename(tmp_path / "elsewhere")
        (folder / DATABASE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError):
        restore(tmp_path, "s")
    assert run(tmp_path, content) == was
    assert not (tmp_path / data_folder.PREPARED_FILE).exists()


@pytest.mark.parametrize("name", ["", "../x", "A", ".hidden", "a/b", "x" * 64, "-x"])
def test_names_are_never_paths(tmp_path, name):
    run(tmp_path, fill)
    for call in (snapshots.create, snapshots.verify, restore, snapshots.remove):
        with pytest.raises(InputError, match="snapshot's name"):
            call(tmp_path / DATABASE if call is snapshots.create else tmp_path, name)


def test_names_are_unique_and_a_missing_key_is_reported(tmp_path):
    run(tmp_path, fill)
    snapshots.create(tmp_path / DATABASE, snapshots.timestamp_name())
    snapshots.create(tmp_path / DATABASE, "s")
    with pytest.raises(InputError, match="exists"):
        snapshots.create(tmp_path / DATABASE, "s")
    with pytest.raises(StoreError, match="no snapshot t here"):
        snapshots.verify(tmp_path, "t")
    key = (tmp_path / "secret.key").read_bytes()
    (tmp_path / "secret.key").write_bytes(os.urandom(32))
    with pytest.raises(StoreError, match="not the one in use"):
        restore(tmp_path, "s")
    (tmp_path / "secret.key").unlink()
    with pytest.raises(StoreError, match="missing"):
        restore(tmp_path, "s")
    (tmp_path / "secret.key").write_bytes(key)
    assert restore(tmp_path, "s").manifest.entries == 30
    snapshots.remove(tmp_path, "s")
    assert [one.name for one in snapshots.list_manifests(tmp_path)] != ["s"] and len(
        snapshots.list_manifests(tmp_path)
    ) == 1


RESTORE = """
import sys, os, signal
from pathlib import Path
from resight.service.storage import snapshots
steps = [int(sys.argv[2])]
def die(*arguments):
    if steps[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    steps[0] -= 1
for name in ("replace", "unlink"):
    def wrap(path, *arguments, _real=getattr(Path, name), **more):
        die()
        _real(path, *arguments, **more)
    setattr(Path, name, wrap)
snapshots.restore(Path(sys.argv[1]), "s")
die()
"""
WRITE = """
import asyncio, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from stores import *
store = Store(Path(sys.argv[1]) / "gallery.sqlite3", dim=DIM)
async def body():
    lobby = await store.read(reads.collection, "lobby")
    for _ in range(2):  # the first empties the log of the last start
        await store.write(writes.enrol, lobby, enrolment(99, replace=True))
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(body())
"""


@pytest.mark.slow
def test_a_restore_killed_at_any_step_leaves_the_old_or_the_new_database(tmp_path):
    """The old one keeps its last write, which is still in the log, and the old log is never applied to the new one."""

    died = tmp_path / "died"
    died.mkdir()
    run(died, fill)
    old = run(died, content)
    snapshots.create(died / DATABASE, "s")
    tests = str(Path(__file__).parents[2])
    assert subprocess.run([sys.executable, "-c", WRITE, died, tests]).returncode == -signal.SIGKILL
    assert (died / f"{DATABASE}-wal").stat().st_size > 0
    seen = set()
    for step in range(40):
        folder = tmp_path / str(step)
        shutil.copytree(died, folder)
        done = subprocess.run([sys.executable, "-c", RESTORE, folder, str(step)])
        found = run(folder, content)
        late = any(entry.entry_id == "e99" for _, entry, _ in found)
        assert [one for one in found if one[1].entry_id != "e99"] == old
        assert not (folder / data_folder.SWAP_MARKER).exists() and not (folder / data_folder.PREPARED_FILE).exists()
        seen.add(late)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    assert done.returncode == 0 and not late and seen == {True, False}
    assert np.array_equal(np.frombuffer(found[0][2], np.float32), feature(0))


def test_a_removed_snapshot_does_not_come_back_from_leftovers_of_a_crash(tmp_path):
    with open_gallery(tmp_path) as store:
        asyncio.run(fill(store, 3))
    snapshots.create(tmp_path / DATABASE, "one")
    shutil.copytree(tmp_path / "snapshots" / "one", tmp_path / "snapshots" / ".one.old")
    (tmp_path / "snapshots" / ".one.old" / DATABASE).unlink()  # killed while it removed the old one
    snapshots.remove(tmp_path, "one")
    with open_gallery(tmp_path):
        assert list((tmp_path / "snapshots").iterdir()) == []
