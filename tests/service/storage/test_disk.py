import asyncio
import os
import subprocess
from pathlib import Path

import pytest
from stores import DIM, count_entries, create_collection, enrolment

from resight.errors import DiskWatermarkError, StorageFullError
from resight.service.records import Filter
from resight.service.storage import data_folder, reads, writes
from resight.service.storage.audit import AuditEvent, AuditLog
from resight.service.storage.data_folder import DiskRoom, DiskWatermark
from resight.service.storage.store import Store

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path):
    """A mounted file system of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_writes_stop_below_the_watermark_and_resume_well_above_it(monkeypatch, tmp_path):
    monkeypatch.setattr(data_folder, "DISK_CHECK_EVERY_S", 0.0)
    free = [0]
    monkeypatch.setattr(data_folder, "disk_room", lambda folder: DiskRoom(free[0], 1000))
    by_percent = DiskWatermark(tmp_path, low_bytes=0, low_percent=10.0)
    by_bytes = DiskWatermark(tmp_path, low_bytes=100, low_percent=0.0)

    def is_low(*free_bytes: int) -> list[tuple[bool, bool]]:
        answers = []
        for free[0] in free_bytes:
            answers.append((by_percent.is_low, by_bytes.is_low))
        return answers

    assert is_low(101, 100, 99) == [(False, False), (False, False), (True, True)]
    assert is_low(149, 150, 199, 200) == [(True, True), (False, True), (False, True), (False, False)]
    free[0] = 5
    with pytest.raises(DiskWatermarkError, match="5 of 1000 bytes free"):
        by_percent.check()
    assert not DiskWatermark(tmp_path, low_bytes=0, low_percent=0.0).is_low


def test_free_disk_space_is_that_of_the_system(tmp_path):
    found = data_folder.disk_room(tmp_path)
    assert (
        0 < found.free <= found.total and found.total == os.statvfs(tmp_path).f_blocks * os.statvfs(tmp_path).f_frsize
    )


def test_a_small_disk_refuses_writes_keeps_reading_and_recovers(small_disk: Path, monkeypatch):
    monkeypatch.setattr(data_folder, "DISK_CHECK_EVERY_S", 0.0)

    async def body():
        lobby = await create_collection(store, keep_crops=True)
        for number in range(200):
            try:
                await store.write(writes.enrol, lobby, enrolment(number, crops=(bytes(500_000),)))
            except DiskWatermarkError as error:
                assert int(error.facts["free_bytes"]) < 24 * MIB
                break
        stored = await count_entries(store)
        assert 5 < stored == number
        assert (
            data_folder.disk_room(small_disk).free > 8 * MIB
        )  # stopped near the mark: a checkpoint adds up to 16 MiB at once
        await AuditLog(store).record(AuditEvent("vms", "SearchService.Search"))
        assert len(await store.read(reads.entries, lobby.key, Filter(), after=0, limit=999)) == stored
        with pytest.raises(DiskWatermarkError):
            await store.write(writes.enrol, lobby, enrolment(999))
        for deleted in range(number):  # one by one: a deletion writes its zeros to the log before the database
            await store.erase(writes.delete_entry, lobby, f"e{deleted}", allow_missing=False)
        assert await count_entries(store) == 0
        for again in range(number):  # recovered: deletions freed pages in the database
            await store.write(writes.enrol, lobby, enrolment(again, crops=(bytes(500_000),)))
            if again > 10:
                break
        assert await count_entries(store) == again + 1

    # The log grows to 1000 pages of 16 KiB before its checkpoint: the watermark leaves space for that.
    store = Store(small_disk / "g", dim=DIM, watermark=DiskWatermark(small_disk, low_bytes=24 * MIB, low_percent=0.0))
    try:
        asyncio.run(body())
    finally:
        store.close()


def test_a_disk_that_fills_up_loses_no_acknowledged_write(small_disk: Path):
    async def body():
        lobby = await create_collection(store, keep_crops=True)
        full = 0
        answered = set()
        for number in range(120):
            try:
                await store.write(writes.enrol, lobby, enrolment(number, crops=(os.urandom(1_000_000),)))
                answered.add(f"e{number}")
            except StorageFullError as error:
                assert not isinstance(error, DiskWatermarkError)
                full += 1
        assert full and answered
        return lobby, answered

    async def again(lobby, answered):
        found = await store.read(reads.entries, lobby.key, Filter(), after=0, limit=999)
        assert {entry.entry_id for _, entry in found} == answered
        whole = await store.read(lambda c: c.execute("PRAGMA integrity_check").fetchall())
        crops = await store.read(lambda c: c.execute("SELECT DISTINCT length(image) FROM crop").fetchall())
        assert (whole, crops) == ([("ok",)], [(1_000_000,)])

    store = Store(small_disk / "g", dim=DIM)
    try:
        lobby, answered = asyncio.run(body())
        asyncio.run(again(lobby, answered))
    finally:
        store.close()
    store = Store(small_disk / "g", dim=DIM)
    try:
        asyncio.run(again(lobby, answered))
    finally:
        store.close()
