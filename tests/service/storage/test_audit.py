import asyncio
import sqlite3

import pytest
from stores import open_gallery

from resight.errors import ReIDError, StorageFullError
from resight.service.records import now_us
from resight.service.storage import audit
from resight.service.storage.audit import AuditEvent, AuditLog

DAY_US = 86_400_000_000


@pytest.fixture
def store(tmp_path):
    with open_gallery(tmp_path) as made:
        yield made


def test_searches_are_written_within_a_moment_and_listed_newest_first(store, tmp_path):
    async def body():
        audit_log = AuditLog(store)
        await audit_log.start()
        for number in range(30):
            audit_log.add(AuditEvent("vms", "SearchService.Search", "lobby", affected=number, reason="r"))
        for _ in range(100):
            raw = sqlite3.connect(tmp_path / "gallery.sqlite3")
            (count,) = raw.execute("SELECT count(*) FROM audit").fetchone()
            raw.close()
            if count == 30:
                break
            await asyncio.sleep(0.05)
        assert count == 30
        audit_log.add(AuditEvent("vms", "SearchService.Search"))
        first = await audit_log.list_events(limit=10)
        assert len(first) == 10 and first[0].affected == 0 and first[1].affected == 29
        second = await audit_log.list_events(before=int(first[-1].audit_id), limit=10)
        assert [event.affected for event in second] == list(range(20, 10, -1))
        assert await audit_log.list_events(end_us=first[0].at_us - DAY_US) == []
        assert len(await audit_log.list_events(start_us=first[0].at_us - DAY_US)) == 31
        audit_log.add(AuditEvent("vms", "last"))
        await audit_log.stop()
        assert (await audit_log.list_events(limit=1))[0].method == "last"

    asyncio.run(body())


def test_rows_can_be_neither_changed_nor_removed(store):
    async def body():
        audit_log = AuditLog(store)
        await audit_log.record(AuditEvent("a", "m"))
        old = await audit_log.record(AuditEvent("a", "old", at_us=now_us() - 3 * DAY_US))
        for statement in (
            "UPDATE audit SET principal = 'nobody'",
            "DELETE FROM audit",
            "UPDATE audit_horizon SET before_us = 1 << 60",
            "UPDATE audit_horizon SET before_us = -1",
        ):
            with pytest.raises(ReIDError, match="audit log"):
                await store.write(lambda c, s=statement: c.execute(s))
        assert len(await audit_log.list_events()) == 2
        assert await audit.purge_older_events(store, 10.0) == 1  # the last day is kept, whatever is configured
        (left,) = await audit_log.list_events()
        assert left.method == "m" and int(left.audit_id) < int(old)
        with pytest.raises(ReIDError, match="audit log"):
            await store.write(lambda c: c.execute("DELETE FROM audit"))

    asyncio.run(body())


def test_a_full_disk_delays_rows_and_lost_ones_are_counted(store, monkeypatch):
    monkeypatch.setattr(audit, "MAX_WAITING", 20)

    async def body():
        audit_log = AuditLog(store)
        pages = await store.read(lambda c: c.execute("PRAGMA page_count").fetchone()[0])
        await store.write(lambda c: c.execute(f"PRAGMA max_page_count={pages}").fetchall())
        with pytest.raises(StorageFullError):
            await audit_log.record(AuditEvent("x" * 100_000, "fill"))
        for number in range(25):
            audit_log.add(AuditEvent("y" * 5000, "SearchService.Search", affected=number))
        await audit_log.flush()
        await store.write(lambda c: c.execute("PRAGMA max_page_count=1000000").fetchall())
        found = await audit_log.list_events()
        assert [(event.method, event.affected) for event in found[:2]] == [
            (audit.LOST_EVENT, 5),
            ("SearchService.Search", 19),
        ]
        assert len(found) == 21

    asyncio.run(body())
