import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from stores import DIM, SPACE, enrolment, feature, held, holding, made

from resight.errors import CollectionNotFoundError, InputError, OverloadedError
from resight.service import tenants
from resight.service.gallery import Gallery
from resight.service.records import Enrolment, EntryRecord, Filter, now_us
from resight.service.search.searcher import NearestQuery
from resight.service.settings import Settings
from resight.service.storage import reads, writes
from resight.service.storage.data_folder import DataFolder
from resight.service.storage.operations import OperationState
from resight.service.storage.store import Store
from resight.service.tenants import Tenants


@asynccontextmanager
async def opened(folder, **more):
    """Galleries that are given features: they need no model."""
    settings = Settings(bundle=folder, data=folder, **more)
    with DataFolder(folder):
        models = SimpleNamespace(active=SimpleNamespace(space=SPACE))
        found = Tenants(folder, settings, dim=DIM, make=lambda store: Gallery(store, models, settings))
        await found.start()
        try:
            yield found
        finally:
            await found.stop()


async def searched(gallery: Gallery, store: Store, number: int) -> list[str]:
    lobby = await store.read(reads.collection, "lobby")
    (found,) = await gallery.searcher.search(lobby, [NearestQuery(feature(number), 9, Filter())], with_features=False)
    return [hit.entry.entry_id for hit in found.hits]


def test_tenants_share_nothing_but_the_folder(tmp_path):
    async def body():
        async with opened(tmp_path) as every:
            acme, beta = await every.tenant("acme"), await every.tenant("beta")
            for tenant, number in ((acme, 1), (beta, 2)):
                lobby = await made(tenant.store)
                await tenant.store.write(writes.enrol, lobby, enrolment(number))
            assert await searched(acme.gallery, acme.store, 1) == await searched(acme.gallery, acme.store, 2) == ["e1"]
            assert await searched(beta.gallery, beta.store, 1) == ["e2"]
            with pytest.raises(CollectionNotFoundError):
                await (await every.gallery("default")).collection("lobby")
            assert await every.gallery("acme") is acme.gallery
            assert holding(tmp_path / "tenants" / "acme", feature(2).tobytes()) == []
            assert list(every.names()) == ["default", "acme", "beta"]
            assert (tmp_path / "tenants" / "acme").stat().st_mode & 0o077 == 0

    asyncio.run(body())


@pytest.mark.parametrize("name", ["", "..", "A", "a/b", "../x", "-a", "a" * 64, ".a"])
def test_a_tenant_name_cannot_be_a_path(tmp_path, name):
    async def body():
        async with opened(tmp_path) as every:
            with pytest.raises(InputError, match="tenant's name"):
                await every.gallery(name)
        assert not (tmp_path / "tenants").exists()

    asyncio.run(body())


def test_concurrent_calls_open_a_tenant_once(tmp_path):
    async def body():
        async with opened(tmp_path) as every:
            found = await asyncio.gather(*(every.gallery("acme") for _ in range(20)))
            assert len(set(map(id, found))) == 1

    asyncio.run(body())


def test_the_longest_idle_tenant_is_closed_and_reopened_unchanged(tmp_path, monkeypatch):
    async def body():
        async with opened(tmp_path, max_tenants_open=3) as every:
            one = await every.tenant("one")
            await one.store.write(writes.enrol, await made(one.store), enrolment(1))
            busy = await every.tenant("busy")
            work = await busy.operations.start("migrate")
            with pytest.raises(OverloadedError, match="max_tenants_open"):
                await every.gallery("three")  # somebody may still use the others
            monkeypatch.setattr(tenants, "IDLE_S", 0.0)
            await every.gallery("three")
            again = await every.tenant("one")  # "three" gave way: "busy" works
            assert again is not one and await searched(again.gallery, again.store, 1) == ["e1"]
            assert (await busy.operations.get(work.operation_id)).state is OperationState.RUNNING
        async with opened(tmp_path) as every:
            found = await (await every.tenant("busy")).operations.get(work.operation_id)
            assert found.state is OperationState.INTERRUPTED

    asyncio.run(body())


def test_expired_entries_of_unused_tenants_are_deleted_from_disk(tmp_path):
    async def body():
        async with opened(tmp_path) as every:
            for name in ("idle", "used"):
                tenant = await every.tenant(name)
                lobby = await made(tenant.store)
                await tenant.store.write(writes.enrol, lobby, enrolment(3))
                soon = Enrolment(
                    EntryRecord("gone", subject_id="SECRET-GONE", expire_us=now_us() + 300_000), feature(9)
                )
                await tenant.store.write(writes.enrol, lobby, soon)
        async with opened(tmp_path, purge_interval_s=0.2) as every:
            used = await every.tenant("used")
            for _ in range(100):
                if not holding(tmp_path, b"SECRET-GONE"):
                    break
                await asyncio.sleep(0.1)
            assert holding(tmp_path, b"SECRET-GONE") == [] and holding(tmp_path, feature(9).tobytes()) == []
            assert await held(used.store) == 1
            await asyncio.sleep(0.3)
            idle = await every.tenant("idle")
            assert await held(idle.store) == 1 and await searched(idle.gallery, idle.store, 3) == ["e3"]

    asyncio.run(body())


def test_tenants_with_interrupted_operations_are_found_without_opening_them(tmp_path):
    async def body():
        async with opened(tmp_path) as every:
            for name in ("acme", "beta"):
                tenant = await every.tenant(name)
                begun = await tenant.operations.start("migrate")
                if name == "beta":
                    await tenant.operations.finish(begun.operation_id)
            assert await every.unfinished("migrate") == ["acme"]
            assert await every.unfinished("rebuild") == []
        async with opened(tmp_path) as every:  # nobody ended acme's
            assert await every.unfinished("migrate") == ["acme"]
            assert [tenant.name for tenant in every.open_tenants()] == ["default"]

    asyncio.run(body())
