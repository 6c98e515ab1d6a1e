import asyncio

import pytest
from stores import OTHER, SPACE, count_entries, create_collection, enrolment, feature, files_with, open_gallery

from resight.service import records
from resight.service.records import Filter, now_us
from resight.service.storage import audit, reads, spaces, writes
from resight.service.storage.audit import AuditEvent, AuditLog
from resight.service.tenants import RetentionPeriods, purge_expired

DAY_S = 86_400.0


@pytest.fixture
def store(tmp_path):
    with open_gallery(tmp_path) as made:
        yield made


def test_data_is_deleted_after_its_retention_period(store, tmp_path):
    async def body():
        await create_collection(store)
        both = await store.write(spaces.begin_space, "lobby", OTHER)
        for number in range(8):
            expire_us = now_us() - 1 if number < 3 else None
            others = ((OTHER.space_id, feature(100 + number)),)
            await store.write(writes.enrol, both, enrolment(number, expire_us=expire_us, others=others))
        await store.write(spaces.activate_space, "lobby", OTHER.space_id, expected=SPACE.space_id)
        audit_log = AuditLog(store)
        await audit_log.record(AuditEvent("a", "old", at_us=now_us() - int(40 * DAY_S * 1e6)))
        await audit_log.record(AuditEvent("a", "new"))

        await purge_expired(store, RetentionPeriods(audit_s=90 * DAY_S, space_s=7 * DAY_S))
        assert not files_with(tmp_path, feature(2).tobytes()) and not files_with(tmp_path, feature(102).tobytes())
        assert files_with(tmp_path, feature(5).tobytes())  # the way back is open
        assert [event.method for event in await audit_log.list_events()] == ["new", "old"]

        reached = (await store.read(reads.collection, "lobby")).revision
        await purge_expired(store, RetentionPeriods(audit_s=30 * DAY_S, space_s=0.0), indexed=[(both.key, reached)])
        assert not files_with(tmp_path, feature(5).tobytes()) and files_with(tmp_path, feature(105).tobytes())
        assert [event.method for event in await audit_log.list_events()] == ["new"]
        assert await store.read(lambda c: c.execute("SELECT count(*) FROM change").fetchall()) == [(0,)]
        lobby = await store.read(reads.collection, "lobby")
        assert (await count_entries(store), lobby.space, lobby.previous_space_id, lobby.other_space_ids) == (
            5,
            OTHER,
            "",
            (),
        )

    asyncio.run(body())


def test_revisions_rise_after_the_change_log_is_purged(store):
    async def body():
        lobby = await create_collection(store)
        first = await store.write(writes.enrol, lobby, enrolment(1))
        await purge_expired(store, RetentionPeriods(audit_s=DAY_S, space_s=0.0), indexed=[(lobby.key, first.revision)])
        second = await store.write(writes.enrol, lobby, enrolment(2))
        assert second.revision > first.revision

    asyncio.run(body())


def test_a_clock_set_back_keeps_order_and_audit(store, monkeypatch):
    async def body():
        lobby = await create_collection(store, ttl_us=3_600_000_000)
        first = await store.write(writes.enrol, lobby, enrolment(1))
        audit_log = AuditLog(store)
        await audit_log.record(AuditEvent("a", "before"))
        await purge_expired(store, RetentionPeriods(audit_s=2 * DAY_S, space_s=0.0))
        back = now_us() - int(30 * DAY_S * 1e6)
        for module in (writes, reads, audit, records, writes):
            if hasattr(module, "now_us"):
                monkeypatch.setattr(module, "now_us", lambda: back)
        second = await store.write(writes.enrol, lobby, enrolment(2))
        assert second.revision > first.revision
        found = await store.read(reads.entries, lobby.key, Filter(), after=0, limit=9)
        assert [entry.entry_id for _, entry in found] == ["e1", "e2"]
        assert found[0][1].expire_us == first.entry.expire_us  # unchanged
        await audit_log.record(AuditEvent("a", "after"))
        await purge_expired(store, RetentionPeriods(audit_s=2 * DAY_S, space_s=0.0))
        assert [event.method for event in await audit_log.list_events()] == ["after", "before"]
        monkeypatch.undo()
        left = await store.read(reads.entries, lobby.key, Filter(), after=0, limit=9)
        assert [entry.entry_id for _, entry in left] == ["e1"]  # the other one has expired

    asyncio.run(body())
