import asyncio
import json
import sqlite3
import time
from contextlib import closing

import pytest
from stores import OTHER, count_entries, create_collection, enrolment, feature, files_with, open_gallery

from resight.errors import CollectionNotFoundError, EntryNotFoundError, InputError, StoreError
from resight.service.records import EntryRecord, now_us
from resight.service.storage import erasure, reads, spaces, writes
from resight.service.storage.audit import AuditLog
from resight.service.storage.data_folder import keyed_hash
from resight.service.storage.erasure import LIST_FILE, erase_subject, erasures_in_file

ANNA = "ANNA-SECRET-NAME"
CROP = b"CROP-OF-A-PERSON" * 2000


def soon() -> float:
    return time.monotonic() + 10


async def filled(store):
    """Forty people in two collections, one of them in two spaces; every tenth entry is Anna."""
    lobby = await create_collection(store, keep_crops=True)
    lobby = await store.write(spaces.begin_space, "lobby", OTHER)
    yard = await create_collection(store, "yard")
    for number in range(40):
        who = ANNA if number % 10 == 7 else f"SOMEBODY-{number:03d}"
        one = enrolment(
            number,
            subject_id=who,
            crops=(CROP + b"%03d" % number,),
            labels={"name": who},
            request_id=f"REQUEST-{who}-{number}",
            digest=b"d",
            others=((OTHER.space_id, feature(1000 + number)),) if number % 2 else (),
        )
        await store.write(writes.enrol, lobby if number % 2 else yard, one)
    await store.write(writes.enrol, yard, enrolment(77, subject_id=ANNA, expire_us=now_us() - 1))
    return lobby, yard


def test_no_byte_of_an_erased_person_is_left_in_any_file(tmp_path):
    async def body():
        lobby, yard = await filled(store)
        for number in range(0, 40, 2):  # so that Anna is also in the other collection
            if number % 10 == 8:
                await store.erase(writes.update_entry, yard, EntryRecord(f"e{number}", ANNA), ["subject_id"])
        mine = [7, 17, 27, 37, 8, 18, 28, 38, 77]
        assert files_with(tmp_path, ANNA.encode()) and files_with(tmp_path, feature(7).tobytes())
        before = await count_entries(store), await count_entries(store, "yard")
        done = await erase_subject(store, ANNA, principal="op", deadline=soon(), reason="asked to")
        assert (done.erased_count, done.storage_scrubbed) == (9, True)
        for secret in (ANNA.encode(), *(feature(number).tobytes() for number in mine)):
            assert files_with(tmp_path, secret) == []
        for number in mine:
            assert files_with(tmp_path, CROP[:64] + CROP[64:] + b"%03d" % number) == []
            assert files_with(tmp_path, feature(1000 + number).tobytes()) == []
        assert files_with(tmp_path, b"SOMEBODY-003") and files_with(tmp_path, feature(1003).tobytes())
        assert (await count_entries(store), await count_entries(store, "yard")) == (before[0] - 4, before[1] - 4)
        (event,) = await AuditLog(store).list_events()
        assert (event.audit_id, event.affected, event.reason) == (done.audit_id, 9, "asked to")
        assert event.subject_hash == keyed_hash(store.key, ANNA) and event.principal == "op"
        again = await erase_subject(store, ANNA, principal="op", deadline=soon())
        assert (again.erased_count, again.storage_scrubbed) == (0, True) and again.audit_id != done.audit_id
        with pytest.raises(EntryNotFoundError, match="deleted since"):  # a late replay does not bring her back
            replay = enrolment(7, request_id=f"REQUEST-{ANNA}-7", digest=b"d")
            await store.write(writes.enrol, lobby, replay)

    with open_gallery(tmp_path) as store:
        asyncio.run(body())


def test_erasure_can_be_limited_to_one_collection(tmp_path):
    async def body():
        await filled(store)
        dropped: list[int] = []

        async def drop(key: int) -> None:
            dropped.append(key)

        lobby = await store.read(reads.collection, "lobby")
        done = await erase_subject(
            store, ANNA, principal="op", deadline=soon(), collection="lobby", drop_segments=[drop]
        )
        assert (done.erased_count, dropped) == (4, [lobby.key])
        assert (await erase_subject(store, ANNA, principal="op", deadline=soon())).erased_count == 1
        with pytest.raises(CollectionNotFoundError):
            await erase_subject(store, ANNA, principal="op", deadline=soon(), collection="cellar")
        with pytest.raises(InputError, match="found none"):
            await erase_subject(store, "", principal="op", deadline=soon())
        with pytest.raises(InputError, match="256"):
            await erase_subject(store, "x", principal="op", deadline=soon(), reason="y" * 257)

    with open_gallery(tmp_path) as store:
        asyncio.run(body())


def test_a_reader_that_blocks_the_scrub_is_reported_and_waited_for(tmp_path):
    async def body():
        await filled(store)
        with closing(sqlite3.connect(tmp_path / "gallery.sqlite3", isolation_level=None)) as holder:
            holder.execute("BEGIN")
            holder.execute("SELECT count(*) FROM entry").fetchone()
            done = await erase_subject(store, ANNA, principal="op", deadline=time.monotonic() + 0.3)
            assert (done.erased_count, done.storage_scrubbed) == (5, False)
            assert files_with(tmp_path, feature(7).tobytes())  # so reporting False was correct
            later = asyncio.create_task(erase_subject(store, ANNA, principal="op", deadline=soon()))
            await asyncio.sleep(0.2)
            assert not later.done()
            holder.execute("COMMIT")
        assert (await later).storage_scrubbed
        assert not files_with(tmp_path, feature(7).tobytes())

    with open_gallery(tmp_path) as store:
        asyncio.run(body())


def test_the_erase_list_contains_no_names_and_survives_a_truncated_line(tmp_path):
    async def body():
        await filled(store)
        await erase_subject(store, ANNA, principal="op", deadline=soon())

    with open_gallery(tmp_path) as store:
        asyncio.run(body())
        in_database = erasure.erasures_in_database(store.reader())
    path = tmp_path / LIST_FILE
    assert path.stat().st_mode & 0o077 == 0 and (tmp_path / "secret.key").stat().st_mode & 0o077 == 0
    (line,) = erasures_in_file(path)
    assert [line] == in_database and line.collection == "" and len(line.entries) == 5 and line.up_to == 41
    whole = path.read_text()
    path.write_text(whole + '\n{"at_us": 17, "coll')
    erasure.append_erasures(path, [line])
    assert erasures_in_file(path) == [line, line]
    path.write_text(whole + json.dumps({"at": 1}) + "\n")
    with pytest.raises(StoreError, match="line 3"):
        erasures_in_file(path)
