import asyncio
import sqlite3
import zlib

import numpy as np
import pytest
from stores import DIM, SPACE, count_entries, create_collection, enrolment, feature, open_gallery

from resight.errors import (
    CollectionNotFoundError,
    EntryExistsError,
    EntryNotFoundError,
    InputError,
    ReIDError,
    StorageFullError,
    StoreError,
    UnavailableError,
)
from resight.service.records import Enrolment, EntryRecord, Filter, now_us
from resight.service.storage import reads, writes
from resight.service.storage.schema import APPLICATION_ID, SCHEMA_VERSION
from resight.service.storage.store import Store


@pytest.fixture
def store(tmp_path):
    with open_gallery(tmp_path) as made:
        yield made


def test_a_new_file_has_our_application_id_full_sync_and_secure_delete(tmp_path):
    with open_gallery(tmp_path):
        pass
    with sqlite3.connect(tmp_path / "gallery.sqlite3") as raw:
        assert raw.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
        assert raw.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION
        assert raw.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert raw.execute("PRAGMA page_size").fetchone()[0] == 16384
    raw.close()
    assert (tmp_path / "gallery.sqlite3").stat().st_mode & 0o077 == 0


def test_long_features_use_small_pages(tmp_path):
    Store(tmp_path / "g", dim=2048).close()
    raw = sqlite3.connect(tmp_path / "g")
    assert raw.execute("PRAGMA page_size").fetchone()[0] == 4096
    raw.close()


def test_writes_are_there_after_reopening(tmp_path):
    async def write():
        lobby = await create_collection(store, keep_crops=True)
        await store.write(
            writes.enrol, lobby, enrolment(1, labels={"hat": "red"}, camera_id="door", crops=(b"one", b"two"))
        )

    async def read():
        lobby = await store.read(reads.collection, "lobby")
        assert (await count_entries(store), lobby.space, lobby.keep_crops) == (1, SPACE, True)
        key, entry = await store.read(reads.entry, lobby, "e1")
        assert (entry.labels, entry.camera_id) == ({"hat": "red"}, "door")
        assert np.array_equal(await store.read(reads.feature, key, SPACE), feature(1))
        crops = await store.read(lambda c: c.execute("SELECT image FROM crop ORDER BY number").fetchall())
        assert crops == [(b"one",), (b"two",)]

    with open_gallery(tmp_path) as store:
        asyncio.run(write())
    with open_gallery(tmp_path) as store:
        asyncio.run(read())


def test_crops_are_stored_only_if_the_collection_keeps_them(store):
    async def body():
        lobby = await create_collection(store)
        await store.write(writes.enrol, lobby, enrolment(1, crops=(b"one",)))
        assert await store.read(lambda c: c.execute("SELECT count(*) FROM crop").fetchone()) == (0,)

    asyncio.run(body())


def test_concurrent_writes_are_all_stored_and_a_refused_one_is_rolled_back_alone(store):
    async def body():
        lobby = await create_collection(store)
        new = [enrolment(number % 150) for number in range(300)]
        jobs = (store.write(writes.enrol, lobby, one) for one in new)
        outcomes = await asyncio.gather(*jobs, return_exceptions=True)
        assert sum(isinstance(outcome, EntryExistsError) for outcome in outcomes) == 150
        revisions = [outcome.revision for outcome in outcomes if not isinstance(outcome, BaseException)]
        assert len(revisions) == 150 and len(set(revisions)) == 150
        assert await count_entries(store) == 150

    asyncio.run(body())


def test_a_write_that_violates_a_constraint_fails_alone(store):
    async def body():
        lobby = await create_collection(store)
        bad = store.write(lambda c: c.execute("INSERT INTO feature VALUES (99999, 'x', x'00', 0)"))
        good = [store.write(writes.enrol, lobby, enrolment(number)) for number in range(20)]
        outcomes = await asyncio.gather(*good[:10], bad, *good[10:], return_exceptions=True)
        assert [isinstance(one, ReIDError) for one in outcomes] == [False] * 10 + [True] + [False] * 10
        assert await count_entries(store) == 20

    asyncio.run(body())


def test_a_replay_returns_the_first_result_and_never_enrols_twice(store):
    async def body():
        lobby = await create_collection(store)
        new = enrolment(1, request_id="r1", digest=b"d")
        first = await store.write(writes.enrol, lobby, new)
        again = await store.write(writes.enrol, lobby, new)
        assert again.replayed and not first.replayed
        assert (again.entry, again.revision) == (first.entry, first.revision)
        with pytest.raises(InputError, match="another request"):
            await store.write(writes.enrol, lobby, enrolment(2, request_id="r1", digest=b"other"))
        await store.erase(writes.delete_entry, lobby, "e1", allow_missing=False)
        with pytest.raises(EntryNotFoundError, match="deleted since"):
            await store.write(writes.enrol, lobby, new)

    asyncio.run(body())


def test_replacing_gives_a_new_key_and_one_entry(store):
    async def body():
        lobby = await create_collection(store)
        await store.write(writes.enrol, lobby, enrolment(1))
        before, _ = await store.read(reads.entry, lobby, "e1")
        await store.write(writes.enrol, lobby, Enrolment(EntryRecord("e1"), feature(2), replace=True))
        after, _ = await store.read(reads.entry, lobby, "e1")
        assert after > before
        assert np.array_equal(await store.read(reads.feature, after, SPACE), feature(2))
        assert await count_entries(store) == 1

    asyncio.run(body())


def test_time_to_live_starts_at_enrolment_and_expired_entries_are_hidden_at_once(store):
    async def body():
        lobby = await create_collection(store, ttl_us=3_600_000_000)
        kept = await store.write(writes.enrol, lobby, enrolment(1))
        assert kept.entry.expire_us == kept.entry.created_us + 3_600_000_000
        await store.write(writes.enrol, lobby, enrolment(2, expire_us=now_us() - 1))
        with pytest.raises(EntryNotFoundError):
            await store.read(reads.entry, lobby, "e2")
        assert [e.entry_id for _, e in await store.read(reads.entries, lobby.key, Filter(), after=0, limit=9)] == ["e1"]
        assert await store.read(reads.any_expired)
        assert await store.erase(writes.purge) == 1
        assert not await store.read(reads.any_expired)
        await store.write(writes.enrol, lobby, enrolment(2))

    asyncio.run(body())


def test_a_deleted_entry_leaves_no_byte_in_any_file(tmp_path):
    crop = b"CROP-OF-A-PERSON" * 2000

    async def body():
        lobby = await create_collection(store, keep_crops=True)
        for number in range(60):
            await store.write(
                writes.enrol,
                lobby,
                enrolment(number, subject_id=f"SUBJECT{number:03d}SECRET", crops=(crop + b"%03d" % number,)),
            )
        assert find(b"SUBJECT007SECRET")
        await store.erase(writes.delete_entries, lobby, Filter(subject_ids=("SUBJECT007SECRET",)), cap=None)
        for secret in (b"SUBJECT007SECRET", feature(7).tobytes(), crop + b"007"):
            assert find(secret) == []
        assert find(b"SUBJECT008SECRET") and find(feature(8).tobytes())
        await store.erase(writes.delete_collection, "lobby", force=True)
        assert find(b"SUBJECT008SECRET") == [] and find(crop[:64]) == []

    def find(secret):
        return [file.name for file in tmp_path.iterdir() if secret in file.read_bytes()]

    with open_gallery(tmp_path) as store:
        asyncio.run(body())


def test_a_reader_delays_the_scrub_but_does_not_prevent_it(tmp_path):
    async def body():
        lobby = await create_collection(store)
        await store.write(writes.enrol, lobby, enrolment(7))
        holder = sqlite3.connect(tmp_path / "gallery.sqlite3", isolation_level=None)
        holder.execute("BEGIN")
        holder.execute("SELECT count(*) FROM entry").fetchone()
        await store.erase(writes.delete_entry, lobby, "e7", allow_missing=False)
        holder.execute("COMMIT")
        holder.close()
        for _ in range(200):
            if not any(feature(7).tobytes() in file.read_bytes() for file in tmp_path.iterdir()):
                return
            await asyncio.sleep(0.05)
        raise AssertionError("the feature is still in a file")

    with open_gallery(tmp_path) as store:
        asyncio.run(body())


def test_a_damaged_feature_is_noticed_and_the_others_are_read(store, caplog):
    async def body():
        lobby = await create_collection(store)
        for number in range(3):
            await store.write(writes.enrol, lobby, enrolment(number))
        spoilt = bytearray(feature(1).tobytes())
        spoilt[5] ^= 1
        await store.write(lambda c: c.execute("UPDATE feature SET vector = ? WHERE entry = 2", (bytes(spoilt),)))
        with pytest.raises(StoreError, match="damaged"):
            await store.read(reads.feature, 2, SPACE)
        change = await store.read(reads.changes_since, lobby.key, SPACE, -1)
        assert change.added.tolist() == [1, 3] and "damaged" in caplog.text
        assert zlib.crc32(feature(0).tobytes()) != zlib.crc32(bytes(spoilt))

    asyncio.run(body())


def test_the_change_log_lists_additions_and_deletions(store):
    async def body():
        lobby = await create_collection(store)
        for number in range(4):
            await store.write(writes.enrol, lobby, enrolment(number))
        start = await store.read(reads.changes_since, lobby.key, SPACE, -1)
        assert start.added.tolist() == [1, 2, 3, 4]
        await store.write(writes.purge_requests, [(lobby.key, start.revision)])
        await store.erase(writes.delete_entry, lobby, "e1", allow_missing=False)
        await store.write(writes.enrol, lobby, enrolment(9))
        change = await store.read(reads.changes_since, lobby.key, SPACE, start.revision)
        assert (change.added.tolist(), change.removed.tolist()) == ([5], [2])
        assert np.array_equal(change.features[0], feature(9))
        assert change.revision == await store.read(reads.revision, lobby.key) > start.revision

    asyncio.run(body())


def test_enrolling_into_a_collection_deleted_in_the_meantime_is_refused(store):
    async def body():
        lobby = await create_collection(store)
        await store.erase(writes.delete_collection, "lobby", force=False)
        with pytest.raises(CollectionNotFoundError):
            await store.write(writes.enrol, lobby, enrolment(1))

    asyncio.run(body())


def test_a_full_disk_refuses_writes_loses_nothing_and_recovers(store):
    """SQLite's own page limit makes the same error as a full disk."""

    async def body():
        lobby = await create_collection(store, keep_crops=True)
        await store.write(writes.enrol, lobby, enrolment(1))
        pages = await store.read(lambda c: c.execute("PRAGMA page_count").fetchone()[0])
        await store.write(lambda c: c.execute(f"PRAGMA max_page_count={pages + 2}").fetchall())
        big = [store.write(writes.enrol, lobby, enrolment(n, crops=(bytes(200_000),))) for n in range(2, 5)]
        outcomes = await asyncio.gather(*big, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [StorageFullError] * 3
        assert await count_entries(store) == 1
        await store.erase(writes.delete_entry, lobby, "e1", allow_missing=False)
        await store.write(lambda c: c.execute("PRAGMA max_page_count=1000000").fetchall())
        await store.write(writes.enrol, lobby, enrolment(2, crops=(bytes(200_000),)))
        assert await count_entries(store) == 1

    asyncio.run(body())


def test_a_closed_store_refuses_writes(tmp_path):
    with open_gallery(tmp_path) as store:
        pass
    with pytest.raises(UnavailableError):
        asyncio.run(store.write(reads.any_expired))


def test_newer_foreign_and_damaged_files_are_refused(tmp_path):
    path = tmp_path / "gallery.sqlite3"
    with open_gallery(tmp_path):
        pass
    raw = sqlite3.connect(path)
    raw.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    raw.close()
    with pytest.raises(StoreError, match="upgrade resight"):
        Store(path, dim=DIM)
    other = tmp_path / "other.sqlite3"
    raw = sqlite3.connect(other)
    raw.execute("CREATE TABLE mine (x)")
    raw.close()
    with pytest.raises(StoreError, match="another program"):
        Store(other, dim=DIM)
    text = tmp_path / "text"
    text.write_bytes(b"no database " * 100)
    with pytest.raises(StoreError, match="restore"):
        Store(text, dim=DIM)


def test_a_damaged_page_is_found_at_start(tmp_path):
    async def fill():
        lobby = await create_collection(store)
        await asyncio.gather(*(store.write(writes.enrol, lobby, enrolment(number)) for number in range(400)))

    with open_gallery(tmp_path) as store:
        asyncio.run(fill())
    path = tmp_path / "gallery.sqlite3"
    data = bytearray(path.read_bytes())
    for page in range(3, len(data) // 16384):
        data[page * 16384 : page * 16384 + 64] = b"\xff" * 64
    path.write_bytes(data)
    with pytest.raises(StoreError):
        Store(path, dim=DIM)
