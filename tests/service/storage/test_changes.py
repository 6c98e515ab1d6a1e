import asyncio

import numpy as np
import pytest
from stores import SPACE, create_collection, enrolment, feature, files_with, open_gallery

from resight.errors import CollectionFullError, ConflictError, EntryExistsError, EntryNotFoundError, InputError
from resight.service.records import Collection, EntryRecord, Filter, now_us
from resight.service.storage import reads, writes


@pytest.fixture
def store(tmp_path):
    with open_gallery(tmp_path) as made:
        yield made


def test_an_entry_is_updated_in_place_and_its_old_subject_is_removed_from_disk(store, tmp_path):
    async def body():
        lobby = await create_collection(store)
        old = enrolment(1, subject_id="SECRET-OLD-NAME", labels={"hat": "SECRET-RED", "bag": "no"})
        first = await store.write(writes.enrol, lobby, old)
        new = EntryRecord("e1", subject_id="bo", labels={"hat": "blue"})
        key, before = await store.read(reads.entry, lobby, "e1")
        assert before.etag == first.entry.etag
        done = await store.erase(writes.update_entry, lobby, new, ["subject_id", "labels"], etag=before.etag)
        assert (done.entry.subject_id, done.entry.labels) == ("bo", {"hat": "blue"})
        assert done.revision > first.revision and done.entry.etag != before.etag
        assert await store.read(reads.entry, lobby, "e1") == (key, done.entry)
        assert np.array_equal(await store.read(reads.feature, key, SPACE), feature(1))
        assert not files_with(tmp_path, b"SECRET")
        change = await store.read(reads.changes_since, lobby.key, SPACE, first.revision)
        assert (len(change.added), len(change.removed), change.revision) == (0, 0, done.revision)
        with pytest.raises(ConflictError, match="changed in the meantime"):
            await store.erase(writes.update_entry, lobby, new, ["labels"], etag=before.etag)
        with pytest.raises(ConflictError):
            await store.erase(writes.delete_entry, lobby, "e1", allow_missing=False, etag=before.etag)
        await store.erase(writes.delete_entry, lobby, "e1", allow_missing=False, etag=done.entry.etag)

    asyncio.run(body())


def test_an_entry_enrolled_again_has_another_etag(store):
    async def body():
        lobby = await create_collection(store)
        one = await store.write(writes.enrol, lobby, enrolment(1))
        two = await store.write(writes.enrol, lobby, enrolment(1, replace=True))
        assert one.entry.etag != two.entry.etag

    asyncio.run(body())


def test_expiry_is_set_reset_and_never_lost(store):
    async def body():
        lobby = await create_collection(store, ttl_us=3_600_000_000)
        first = (await store.write(writes.enrol, lobby, enrolment(1))).entry
        later = first.expire_us + 5
        changed = await store.erase(writes.update_entry, lobby, EntryRecord("e1", expire_us=later), ["expire_us"])
        assert changed.entry.expire_us == later
        back = await store.erase(writes.update_entry, lobby, EntryRecord("e1"), ["expire_us"])
        assert back.entry.expire_us == first.expire_us  # no "never" in a collection with a time to live
        expired = await store.erase(
            writes.update_entry, lobby, EntryRecord("e1", expire_us=now_us() - 1), ["expire_us"]
        )
        assert expired.entry.expire_us < now_us()
        with pytest.raises(EntryNotFoundError):
            await store.erase(writes.update_entry, lobby, EntryRecord("e1"), ["labels"])

    asyncio.run(body())


@pytest.mark.parametrize("fields", [[], ["camera_id"], ["labels", "entry_id = 1 --"]])
def test_only_updatable_fields_can_be_updated(store, fields):
    async def body():
        lobby = await create_collection(store)
        await store.write(writes.enrol, lobby, enrolment(1))
        with pytest.raises(InputError, match="update_mask"):
            await store.erase(writes.update_entry, lobby, EntryRecord("e1"), fields)
        with pytest.raises(InputError, match="update_mask"):
            await store.erase(writes.update_collection, Collection("lobby", SPACE), fields)

    asyncio.run(body())


def test_a_collection_is_updated_by_field_and_drops_crops_it_no_longer_keeps(store, tmp_path):
    async def body():
        lobby = await create_collection(store, keep_crops=True, ttl_us=50_000_000)
        await store.write(writes.enrol, lobby, enrolment(1, crops=(b"SECRET-CROP" * 50,)))
        changed = Collection("lobby", SPACE, max_entries=7, accept_probability=0.9, min_quality=0.25)
        done = await store.erase(
            writes.update_collection, changed, ["max_entries", "accept_probability", "keep_crops"], etag=lobby.etag
        )
        assert (done.max_entries, done.accept_probability, done.min_quality) == (7, 0.9, 0.0)
        assert (done.ttl_us, done.keep_crops) == (50_000_000, False) and done.etag != lobby.etag
        assert not files_with(tmp_path, b"SECRET-CROP")
        with pytest.raises(ConflictError):
            await store.erase(writes.update_collection, changed, ["ttl_us"], etag=lobby.etag)
        with pytest.raises(ConflictError):
            await store.erase(writes.delete_collection, "lobby", force=True, etag=lobby.etag)
        await store.erase(writes.delete_collection, "lobby", force=True, etag=done.etag)

    asyncio.run(body())


def test_a_full_collection_refuses_entries_until_one_is_deleted_or_expires(store):
    async def body():
        lobby = await create_collection(store, max_entries=3)
        for number in range(3):
            await store.write(writes.enrol, lobby, enrolment(number))
        with pytest.raises(CollectionFullError, match="at most 3 are allowed") as refused:
            await store.write(writes.enrol, lobby, enrolment(4))
        assert refused.value.facts["max_entries"] == "3"
        await store.write(writes.enrol, lobby, enrolment(1, replace=True))
        await store.erase(writes.delete_entry, lobby, "e1", allow_missing=False)
        await store.write(writes.enrol, lobby, enrolment(4))
        for number in (0, 2):
            await store.erase(
                writes.update_entry, lobby, EntryRecord(f"e{number}", expire_us=now_us() - 1), ["expire_us"]
            )
        await store.write(writes.enrol, lobby, enrolment(5))  # two have expired and are not yet purged
        await store.write(writes.enrol, lobby, enrolment(6))
        with pytest.raises(CollectionFullError):
            await store.write(writes.enrol, lobby, enrolment(7))
        while await store.erase(writes.purge):
            pass
        assert await store.read(lambda c: c.execute("SELECT held FROM collection").fetchall()) == [(3,)]

    asyncio.run(body())


def test_an_atomic_batch_is_stored_completely_or_not_at_all(store):
    async def body():
        lobby = await create_collection(store, max_entries=5)
        await store.write(writes.enrol, lobby, enrolment(3, request_id="r", digest=b"d"))
        before = await store.read(reads.collection, "lobby")
        batch = [enrolment(number) for number in (1, 2, 3, 4)]
        other = store.write(writes.enrol, lobby, enrolment(9))
        with pytest.raises(EntryExistsError) as refused:
            await store.write(writes.enrol_all, lobby, batch)
        assert refused.value.facts["item"] == "2"
        await other
        with pytest.raises(CollectionFullError) as refused:
            await store.write(writes.enrol_all, lobby, [enrolment(number) for number in (1, 2, 4, 5)])
        assert refused.value.facts["item"] == "3"
        found = await store.read(reads.entries, lobby.key, Filter(), after=0, limit=9)
        assert [entry.entry_id for _, entry in found] == ["e3", "e9"]
        done = await store.write(writes.enrol_all, lobby, [batch[0], batch[1], batch[3]])
        assert [one.entry.entry_id for one in done] == ["e1", "e2", "e4"]
        assert done[-1].revision == (await store.read(reads.collection, "lobby")).revision > before.revision

    asyncio.run(body())


def test_each_entry_of_a_batch_is_stored_or_refused_independently(store):
    async def body():
        lobby = await create_collection(store, max_entries=4)
        await store.write(writes.enrol, lobby, enrolment(1))
        batch = [enrolment(0), enrolment(1), enrolment(1, replace=True), enrolment(2), enrolment(3), enrolment(4)]
        done = await store.write(writes.enrol_each, lobby, batch)
        kinds = [type(one).__name__ for one in done]
        assert kinds == ["Enrolled", "EntryExistsError", "Enrolled", "Enrolled", "Enrolled", "CollectionFullError"]
        (full,) = await store.write(writes.enrol_each, lobby, [enrolment(9)])
        assert isinstance(full, CollectionFullError)
        (swapped,) = await store.write(writes.enrol_each, lobby, [enrolment(1, replace=True)])
        assert swapped.entry.entry_id == "e1"  # allowed in a full collection, as it replaces the old one
        found = await store.read(reads.entries, lobby.key, Filter(), after=0, limit=9)
        assert [entry.entry_id for _, entry in found] == ["e0", "e2", "e3", "e1"]

    asyncio.run(body())
