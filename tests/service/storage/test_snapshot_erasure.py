import asyncio
import shutil
import sqlite3
import time

import pytest
from stores import count_entries, create_collection, enrolment, feature, files_with, open_gallery

from resight.service.storage import snapshots, writes
from resight.service.storage.erasure import erase_subject
from resight.service.storage.snapshots import erase_from_snapshots, restore
from resight.service.tenants import RetentionPeriods, purge_expired

DATABASE = "gallery.sqlite3"
KEPT = RetentionPeriods(audit_s=90 * 86_400.0, space_s=86_400.0)


async def erased(store, who: str = "ANNA-SECRET") -> int:
    return (await erase_subject(store, who, principal="op", deadline=time.monotonic() + 10)).erased_count


async def filled(store) -> None:
    lobby = await create_collection(store, keep_crops=True)
    for number in range(20):
        who = "ANNA-SECRET" if number % 5 == 0 else f"SOMEBODY-{number}"
        await store.write(
            writes.enrol, lobby, enrolment(number, subject_id=who, crops=(b"CROP-OF-%02d-" % number * 999,))
        )


def test_a_purge_removes_erased_people_from_every_snapshot(tmp_path):
    async def body():
        await filled(store)
        first = await asyncio.to_thread(snapshots.create, store.path, "first")
        await asyncio.to_thread(snapshots.create, store.path, "second")
        assert await erased(store) == 4
        await asyncio.to_thread(snapshots.create, store.path, "third")
        assert files_with(tmp_path / "snapshots", feature(5).tobytes()) == [DATABASE] * 2
        await purge_expired(store, KEPT)
        for secret in (b"ANNA-SECRET", *(feature(n).tobytes() for n in (0, 5, 10, 15)), b"CROP-OF-05", b"CROP-OF-15"):
            assert files_with(tmp_path, secret) == []
        after = {one.name: one for one in snapshots.list_manifests(tmp_path)}
        assert [after[name].entries for name in ("first", "second", "third")] == [16, 16, 16]
        assert after["first"].created == first.created and after["first"].sha256 != first.sha256
        for name in after:
            assert snapshots.verify(tmp_path, name).erased == 1
        assert await erase_from_snapshots(store) == 0
        assert {path.name for path in (tmp_path / "snapshots").iterdir()} == set(after)

    with open_gallery(tmp_path) as store:
        asyncio.run(body())
    assert restore(tmp_path, "first").erased_count == 0
    with open_gallery(tmp_path) as store:
        assert asyncio.run(count_entries(store)) == 16


def test_a_damaged_snapshot_is_logged_and_does_not_stop_the_others(tmp_path, caplog):
    async def body():
        await filled(store)
        for name in ("bad", "good", "odd"):
            await asyncio.to_thread(snapshots.create, store.path, name)
        with (tmp_path / "snapshots" / "bad" / DATABASE).open("ab") as file:
            file.write(b"more")
        (tmp_path / "snapshots" / "odd" / "manifest.json").write_text("{}")
        await erased(store)
        assert await erase_from_snapshots(store) == 1
        assert "in snapshot bad" in caplog.text and "in snapshot odd" in caplog.text
        assert snapshots.verify(tmp_path, "good").entries == 16

    with open_gallery(tmp_path) as store:
        asyncio.run(body())


@pytest.mark.parametrize("successor", [False, True])
def test_a_crash_during_a_rewrite_loses_no_snapshot(tmp_path, successor):
    async def body():
        await filled(store)
        await asyncio.to_thread(snapshots.create, store.path, "s")

    with open_gallery(tmp_path) as store:
        asyncio.run(body())
    folder = tmp_path / "snapshots"
    (folder / "s").rename(folder / ".s.old")  # between the two renames, or after them
    shutil.copytree(folder / ".s.old", folder / ".s.k3jd")
    if successor:
        shutil.copytree(folder / ".s.old", folder / "s")
    with open_gallery(tmp_path):
        assert [path.name for path in folder.iterdir()] == ["s"]
        assert snapshots.verify(tmp_path, "s").entries == 20
    raw = sqlite3.connect(folder / "s" / DATABASE)
    assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    raw.close()
