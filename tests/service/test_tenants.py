import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest
from stores import DIM, SPACE, count_entries, create_collection, enrolment, feature, files_with

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
async def open_tenants_of(folder, **more):
    """Tenants whose entries are enrolled as features, so that no model is needed."""
    settings = Settings(bundle=folder, data=folder, **more)
    with DataFolder(folder):
        models = SimpleNamespace(active=SimpleNamespace(space=SPACE))
        found = Tenants(folder, settings, dim=DIM, make=lambda store: Gallery(store, models, settings))
        await found.start()
        try:
            yield found
        finally:
            await found.stop()


async def found_ids(gallery: Gallery, store: Store, number: int) -> list[str]:
    lobby = await store.read(reads.collection, "lobby")
    (found,) = await gallery.searcher.search(lobby, [NearestQuery(feature(number), 9, Filter())], with_features=False)
    return [hit.entry.entry_id for hit in found.hits]


def test_tenants_share_nothing_but_the_folder(tmp_path):
    async def body():
        async with open_tenants_of(tmp_path) as all_tenants:
            acme, beta = await all_tenants.tenant("acme"), await all_tenants.tenant("beta")
            for tenant, number in ((acme, 1), (beta, 2)):
                lobby = await create_collection(tenant.store)
                await tenant.store.write(writes.enrol, lobby, enrolment(number))
            assert (
                await found_ids(acme.gallery, acme.store, 1) == await found_ids(acme.gallery, acme.store, 2) == ["e1"]
            )
            assert await found_ids(beta.gallery, beta.store, 1) == ["e2"]
            with pytest.raises(CollectionNotFoundError):
                await (await all_tenants.gallery("default")).collection("lobby")
            assert await all_tenants.gallery("acme") is acme.gallery
            assert files_with(tmp_path / "tenants" / "acme", feature(2).tobytes()) == []
            assert list(all_tenants.names()) == ["default", "acme", "beta"]
            assert (tmp_path / "tenants" / "acme").stat().st_mode & 0o077 == 0

    asyncio.run(body())


@pytest.mark.parametrize("name", ["", "..", "A", "a/b", "../x", "-a", "a" * 64, ".a"])
def test_a_tenant_name_cannot_be_a_path(tmp_path, name):
    async def body():
        async with open_tenants_of(tmp_path) as all_tenants:
            with pytest.raises(InputError, match="tenant's name"):
                await all_tenants.gallery(name)
        assert not (tmp_path / "tenants").exists()

    asyncio.run(body())


def test_concurrent_calls_open_a_tenant_once(tmp_path):
    async def body():
        async with open_tenants_of(tmp_path) as all_tenants:
            found = await asyncio.gather(*(all_tenants.gallery("acme") for _ in range(20)))
            assert len(set(map(id, found))) == 1

    asyncio.run(body())


def test_the_longest_idle_tenant_is_closed_and_reopened_unchanged(tmp_path, monkeypatch):
    async def body():
        async with open_tenants_of(tmp_path, max_tenants_open=3) as all_tenants:
            one = await all_tenants.tenant("one")
            await one.store.write(writes.enrol, await create_collection(one.store), enrolment(1))
            busy = await all_tenants.tenant("busy")
            work = await busy.operations.start("migrate")
            with pytest.raises(OverloadedError, match="max_tenants_open"):
                await all_tenants.gallery("three")  # the others may still be in use
            monkeypatch.setattr(tenants, "IDLE_S", 0.0)
            await all_tenants.gallery("three")
            again = await all_tenants.tenant("one")  # "three" was closed, as "busy" has a running operation
            assert again is not one and await found_ids(again.gallery, again.store, 1) == ["e1"]
            assert (await busy.operations.get(work.operation_id)).state is OperationState.RUNNING
        async with open_tenants_of(tmp_path) as all_tenants:
            found = await (await all_tenants.tenant("busy")).operations.get(work.operation_id)
            assert found.state is OperationState.INTERRUPTED

    asyncio.run(body())


def test_expired_entries_of_unused_tenants_are_deleted_from_disk(tmp_path):
    async def body():
        async with open_tenants_of(tmp_path) as all_tenants:
            for name in ("idle", "used"):
                tenant = await all_tenants.tenant(name)
                lobby = await create_collection(tenant.store)
                await tenant.store.write(writes.enrol, lobby, enrolment(3))
                soon = Enrolment(
                    EntryRecord("gone", subject_id="SECRET-GONE", expire_us=now_us() + 300_000), feature(9)
                )
                await tenant.store.write(writes.enrol, lobby, soon)
        async with open_tenants_of(tmp_path, purge_interval_s=0.2) as all_tenants:
            used = await all_tenants.tenant("used")
            for _ in range(100):
                if not files_with(tmp_path, b"SECRET-GONE"):
                    break
                await asyncio.sleep(0.1)
            assert files_with(tmp_path, b"SECRET-GONE") == [] and files_with(tmp_path, feature(9).tobytes()) == []
            assert await count_entries(used.store) == 1
            await asyncio.sleep(0.3)
            idle = await all_tenants.tenant("idle")
            assert await count_entries(idle.store) == 1 and await found_ids(idle.gallery, idle.store, 3) == ["e3"]

    asyncio.run(body())


def test_tenants_with_interrupted_operations_are_found_without_opening_them(tmp_path):
    async def body():
        async with open_tenants_of(tmp_path) as all_tenants:
            for name in ("acme", "beta"):
                tenant = await all_tenants.tenant(name)
                begun = await tenant.operations.start("migrate")
                if name == "beta":
                    await tenant.operations.finish(begun.operation_id)
            assert await all_tenants.unfinished("migrate") == ["acme"]
            assert await all_tenants.unfinished("rebuild") == []
        async with open_tenants_of(tmp_path) as all_tenants:  # the operation of acme was interrupted
            assert await all_tenants.unfinished("migrate") == ["acme"]
            assert [tenant.name for tenant in all_tenants.open_tenants()] == ["default"]

    asyncio.run(body())
