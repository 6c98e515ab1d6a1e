"""Search results of every kind of index over a real store."""

import asyncio
import zlib
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest

from resight.errors import CollectionNotFoundError, DeadlineError, InputError, OverloadedError
from resight.service.index.base import IndexPolicy
from resight.service.records import Collection, Enrolment, EntryRecord, Filter, Space, now_us
from resight.service.search.searcher import NearestQuery, Searcher
from resight.service.storage import reads, writes
from resight.service.storage.store import Store

pytestmark = pytest.mark.long

DIM = 24
SPACE = Space("ab" * 16, "tiny", DIM)
KINDS = ("flat", "flat-fp16", "hnsw", "milvus")
PEOPLE, SHOTS = 40, 8
ANY = Filter()


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def people(seed=0, count=PEOPLE * SHOTS):
    """Features as a camera gives them: some shots of each person, near one another. float32 (count, D)."""
    rng = np.random.default_rng(seed)
    centres = unit(rng.normal(size=(PEOPLE, DIM)))
    return unit(centres[np.arange(count) % PEOPLE] + 0.2 * rng.normal(size=(count, DIM)))


class Site:
    """A store with a searcher, and what a caller does with them."""

    def __init__(self, store, searcher):
        self.store, self.searcher = store, searcher

    async def create(self, name="lobby"):
        return await self.store.write(writes.create_collection, Collection(name, SPACE))

    async def enrol(self, into, features, prefix="e", **more):
        cameras = ("door", "hall", "yard")
        return await asyncio.gather(
            *(
                self.store.write(
                    writes.enrol,
                    into,
                    Enrolment(EntryRecord(f"{prefix}{n}", camera_id=cameras[n % 3], **more), feature),
                )
                for n, feature in enumerate(features)
            )
        )

    async def ids(self, collection, feature, k=10, filters=ANY, **more):
        (found,) = await self.searcher.search(
            collection, [NearestQuery(feature, k, filters)], with_features=False, **more
        )
        return [hit.entry.entry_id for hit in found.hits]


@asynccontextmanager
async def open_site(path, kind, **rules):
    store = Store(path / "gallery.sqlite3", dim=DIM)
    where = {"milvus": str(path / "milvus.db")} if kind == "milvus" else {"kind": kind}
    searcher = Searcher(store, IndexPolicy(folder=path, **where, **rules))
    try:
        await searcher.load()
        yield Site(store, searcher)
    finally:
        searcher.close()
        store.close()


async def index_ready(site, collection, kind):
    """Wait until the collection has an index of this kind that is not being replaced."""
    await site.ids(collection, people()[0])
    for _ in range(1000):
        stats = site.searcher.stats(collection)
        if stats.index_type == kind and not stats.building:
            return stats
        await asyncio.sleep(0.01)
    raise AssertionError(stats)


def brute_force(features, query, k, allowed=lambda n: True):
    scored = sorted((-float(np.clip((row * query).sum(), -1, 1)), n) for n, row in enumerate(features) if allowed(n))
    return [f"e{n}" for _, n in scored[:k]]


@pytest.fixture(params=KINDS)
def kind(request):
    if request.param == "milvus":
        pytest.importorskip("milvus_lite", reason="needs milvus-lite: install resight[dev]")
    return request.param


def test_finds_what_brute_force_finds_also_after_a_restart(tmp_path, kind):
    features = people()

    async def body():
        async with open_site(tmp_path, kind) as site:
            lobby = await site.create()
            await site.enrol(lobby, features)
            await index_ready(site, lobby, kind)
            first = [await site.ids(lobby, query, 12, exact=True) for query in features[:20]]
            assert first == [brute_force(features, query, 12) for query in features[:20]]
            loose = [await site.ids(lobby, query, 12) for query in features[:20]]
            assert np.mean([len({*a} & {*b}) / 12 for a, b in zip(first, loose, strict=True)]) > 0.95
        async with open_site(tmp_path, kind) as site:
            lobby = await site.store.read(reads.collection, "lobby")
            await index_ready(site, lobby, kind)
            assert [await site.ids(lobby, query, 12, exact=True) for query in features[:20]] == first
            assert [await site.ids(lobby, query, 12) for query in features[:20]] == loose

    asyncio.run(body())


def test_similarities_and_features_are_those_of_the_store_to_the_bit(tmp_path, kind):
    features = people()

    async def body():
        async with open_site(tmp_path, kind) as site:
            lobby = await site.create()
            await site.enrol(lobby, features)
            await index_ready(site, lobby, kind)
            (found,) = await site.searcher.search(lobby, [NearestQuery(features[5], 9, Filter())], with_features=True)
            assert found.exact == (kind in ("flat", "flat-fp16")) and len(found.hits) == 9
            for hit in found.hits:
                row = features[int(hit.entry.entry_id[1:])]
                assert np.array_equal(hit.feature, row)
                assert hit.similarity == np.float32(np.clip((row * features[5]).sum(), -1, 1))

    asyncio.run(body())


def test_deleted_expired_and_foreign_entries_never_return(tmp_path, kind):
    features = people()

    async def body():
        async with open_site(tmp_path, kind) as site:
            lobby, other = await site.create(), await site.create("other")
            await site.enrol(lobby, features)
            await site.enrol(other, features[:3], prefix="foreign")
            await index_ready(site, lobby, kind)
            target = features[7]
            assert (await site.ids(lobby, target))[0] == "e7"
            await site.store.erase(writes.delete_entry, lobby, "e7", allow_missing=False)
            assert "e7" not in await site.ids(lobby, target, 400)
            await site.enrol(lobby, [target], prefix="brief", expire_us=now_us() + 300_000)
            assert (await site.ids(lobby, target))[0] == "brief0"
            await asyncio.sleep(0.35)
            for exact in (False, True):
                found = await site.ids(lobby, target, 400, exact=exact)
                assert not [one for one in found if one.startswith(("brief", "foreign"))]
                assert len(found) == len(features) - 1  # k is satisfied as far as there are so many

    asyncio.run(body())


def test_a_filter_is_respected_and_top_k_hits_returned(tmp_path, kind):
    features = people()

    async def body():
        async with open_site(tmp_path, kind) as site:
            lobby = await site.create()
            await site.enrol(lobby, features)
            await index_ready(site, lobby, kind)
            for query in features[:5]:
                there = await site.ids(lobby, query, 20, Filter(camera_ids=("hall",)))
                assert there == brute_force(features, query, 20, lambda n: n % 3 == 1)
                without = Filter(exclude_camera_ids=("door", "hall"))
                elsewhere = await site.ids(lobby, query, 20, without, exact=True)
                assert elsewhere == brute_force(features, query, 20, lambda n: n % 3 == 2)
                assert len(await site.ids(lobby, query, 20, without)) == 20
                assert await site.ids(lobby, query, 5, Filter(camera_ids=("nowhere",))) == []

    asyncio.run(body())


def test_equal_entries_come_in_order_of_enrolment(tmp_path, kind):
    features = people()
    features[100:130] = features[3]

    async def body():
        async with open_site(tmp_path, kind) as site:
            lobby = await site.create()
            await site.enrol(lobby, features)
            await index_ready(site, lobby, kind)
            assert await site.ids(lobby, features[3], 20, exact=True) == brute_force(features, features[3], 20)
            near = await site.ids(lobby, features[3], 31)
            assert near == sorted(near, key=lambda one: int(one[1:]))

    asyncio.run(body())


def test_writes_during_an_index_build_are_not_lost(tmp_path):
    features = people(count=900)

    async def body():
        async with open_site(tmp_path, "auto", flat_max=150, half_max=300, tail_max=40) as site:
            lobby = await site.create()
            kinds = []
            for start in range(0, 900, 100):
                batch = [
                    site.store.write(writes.enrol, lobby, Enrolment(EntryRecord(f"e{n}"), features[n]))
                    for n in range(start, start + 100)
                ]
                await asyncio.gather(*batch)
                deleted = f"e{start + 50}"
                await site.store.erase(writes.delete_entry, lobby, deleted, allow_missing=False)
                found = await site.ids(lobby, features[start + 50], 1000, exact=True)
                assert deleted not in found and f"e{start + 99}" in found
                await site.store.write(writes.purge_requests, site.searcher.revisions())
                kinds.append(site.searcher.stats(lobby).index_type)
            stats = await index_ready(site, lobby, "hnsw")
            assert kinds[0] == "flat" and stats.index_bytes > 900 * DIM * 2
            expected = brute_force(features, features[0], 1000, lambda n: n % 100 != 50)
            assert await site.ids(lobby, features[0], 1000, exact=True) == expected

    asyncio.run(body())


def test_many_tombstones_cause_a_rebuild(tmp_path, monkeypatch):
    monkeypatch.setattr("resight.service.index.base.MIN_TOMBSTONES", 10)
    features = people()

    async def body():
        async with open_site(tmp_path, "flat-fp16") as site:
            lobby = await site.create()
            await site.enrol(lobby, features)
            await index_ready(site, lobby, "flat-fp16")
            for n in range(0, 60):
                await site.store.erase(writes.delete_entry, lobby, f"e{n}", allow_missing=False)
            await site.ids(lobby, features[0])
            assert site.searcher.stats(lobby).tombstones == 60
            await site.store.erase(writes.delete_entry, lobby, "e60", allow_missing=False)
            for n in range(61, 90):
                await site.store.erase(writes.delete_entry, lobby, f"e{n}", allow_missing=False)
            stats = await index_ready(site, lobby, "flat-fp16")
            assert stats.tombstones < 60
            assert await site.ids(lobby, features[0], 5) == brute_force(features, features[0], 5, lambda n: n >= 90)

    asyncio.run(body())


def test_a_graph_with_low_recall_is_rejected_with_a_note(tmp_path):
    rng = np.random.default_rng(1)

    async def body():
        async with open_site(tmp_path, "flat-fp16", min_recall=1.1) as site:
            lobby = await site.create()
            await site.enrol(lobby, unit(rng.normal(size=(300, DIM))))
            stats = await site.searcher.rebuild(lobby, "hnsw")
            assert stats.index_type == "flat-fp16" and "1.10 is required" in stats.note
            assert len(await site.ids(lobby, people()[0], 300)) == 300

    asyncio.run(body())


def test_an_empty_collection_can_have_a_graph(tmp_path):
    async def body():
        async with open_site(tmp_path, "hnsw") as site:
            lobby = await site.create()
            assert (await index_ready(site, lobby, "hnsw")).note == ""
            assert await site.ids(lobby, people()[0]) == []
            await site.enrol(lobby, people(count=5))
            assert len(await site.ids(lobby, people()[0])) == 5

    asyncio.run(body())


def test_rebuild_changes_the_kind_and_samples_recall(tmp_path):
    async def body():
        async with open_site(tmp_path, "auto", sample=1) as site:
            lobby = await site.create()
            await site.enrol(lobby, people())
            assert (await site.searcher.rebuild(lobby)).index_type == "flat"
            assert site.searcher.stats(lobby).sampled_recall_at_10 is None
            stats = await site.searcher.rebuild(lobby, "hnsw")
            assert (stats.index_type, stats.note, stats.revision) == ("hnsw", "", site.searcher.revision(lobby))
            await site.ids(lobby, people()[0])
            assert site.searcher.stats(lobby).sampled_recall_at_10 > 0.9
            with pytest.raises(InputError, match="flat, flat-fp16, hnsw or auto"):
                await site.searcher.rebuild(lobby, "ivf")
            assert (await site.searcher.rebuild(lobby, "auto")).index_type == "flat"

    asyncio.run(body())


def test_entries_inserted_among_older_keys_are_found(tmp_path, kind):
    """As when a migration fills a space in: features of old entries arrive after those of new ones."""
    features = people()

    async def body():
        async with open_site(tmp_path, kind) as site:
            lobby = await site.create()
            await site.enrol(lobby, features)
            new = Space("cd" * 16, "next", DIM)

            def fill(connection, numbers):
                connection.execute("INSERT INTO space (space_id, model_id, dim, created_us) VALUES (?, ?, ?, 0) "
                                   "ON CONFLICT DO NOTHING", (new.space_id, new.model_id, DIM))  # fmt: skip
                for n in numbers:
                    row = connection.execute("SELECT key FROM entry WHERE entry_id = ?", (f"e{n}",)).fetchone()
                    vector = (-features[n]).astype("<f4").tobytes()
                    connection.execute(
                        "INSERT INTO feature VALUES (?, ?, ?, ?)", (row[0], new.space_id, vector, zlib.crc32(vector))
                    )
                    connection.execute(
                        "INSERT INTO change (collection, entry, deleted) VALUES (?, ?, 0)", (lobby.key, row[0])
                    )
                connection.execute("UPDATE collection SET revision = (SELECT max(revision) FROM change)")

            there = replace(lobby, space=new)
            await site.store.write(fill, range(100, 200))
            await index_ready(site, there, kind)
            assert await site.ids(there, -features[150], 3, exact=True) == brute_force(
                features, features[150], 3, lambda n: 100 <= n < 200
            )
            await site.store.write(fill, range(0, 100))
            assert (await site.ids(there, -features[7], exact=True))[0] == "e7"
            assert (await site.ids(lobby, features[250], exact=True))[0] == "e250"  # the other space stands beside it

    asyncio.run(body())


def test_waiting_searches_are_batched_and_each_gets_its_result(tmp_path):
    features = people()

    async def body():
        async with open_site(tmp_path, "flat") as site:
            lobby = await site.create()
            await site.enrol(lobby, features)
            filters = (Filter(), Filter(camera_ids=("hall",)), Filter(exclude_camera_ids=("hall",)))
            allowed = (lambda n: True, lambda n: n % 3 == 1, lambda n: n % 3 != 1)
            searches = [(n, n % 3, 1 + n % 13) for n in range(200)]
            found = await asyncio.gather(*(site.ids(lobby, features[n], k, filters[f]) for n, f, k in searches))
            for (n, f, k), ids in zip(searches, found, strict=True):
                assert ids == brute_force(features, features[n], k, allowed[f])

    asyncio.run(body())


def test_a_full_queue_and_a_past_deadline_are_refused_and_a_deleted_collection_fails_alone(tmp_path):
    features = people()

    async def body():
        store = Store(tmp_path / "gallery.sqlite3", dim=DIM)
        searcher = Searcher(store, max_queue=4)
        site = Site(store, searcher)
        try:
            lobby, deleted = await site.create(), await site.create("gone")
            await site.enrol(lobby, features[:50])
            await store.erase(writes.delete_collection, "gone", force=True)
            with pytest.raises(DeadlineError):
                await site.ids(lobby, features[0], deadline=0.0)
            outcomes = await asyncio.gather(
                *(site.ids(one, features[0], 1) for one in (lobby, deleted, lobby, lobby, lobby)),
                return_exceptions=True,
            )
            assert [type(one) for one in outcomes] == [list, CollectionNotFoundError, list, list, OverloadedError]
        finally:
            searcher.close()
            store.close()

    asyncio.run(body())


def test_a_saved_graph_is_updated_after_a_restart(tmp_path):
    features = people(count=600)

    async def body():
        async with open_site(tmp_path, "hnsw") as site:
            lobby = await site.create()
            await site.enrol(lobby, features[:500])
            await index_ready(site, lobby, "hnsw")
        (path,) = (tmp_path / "index").iterdir()
        written = path.stat().st_mtime_ns
        store = Store(tmp_path / "gallery.sqlite3", dim=DIM)
        for n in range(0, 500, 50):
            await store.erase(writes.delete_entry, lobby, f"e{n}", allow_missing=False)
        for n in range(500, 600):
            await store.write(writes.enrol, lobby, Enrolment(EntryRecord(f"e{n}"), features[n]))
        store.close()
        async with open_site(tmp_path, "hnsw") as site:
            stats = await index_ready(site, lobby, "hnsw")
            assert stats.tombstones == 5 and path.stat().st_mtime_ns == written  # half of the entries are the tail
            allowed = lambda n: n >= 500 or n % 50 != 0  # noqa: E731
            for query in features[::60]:
                assert await site.ids(lobby, query, 12, exact=True) == brute_force(features, query, 12, allowed)
                near = await site.ids(lobby, query, 12)
                assert len(near) == 12 and all(allowed(int(one[1:])) for one in near)
            await site.store.erase(writes.delete_collection, "lobby", force=True)
            site.searcher.drop(lobby)
        assert not path.exists()

    asyncio.run(body())


def test_a_failed_build_keeps_the_old_index_with_a_note(tmp_path, monkeypatch):
    def no_room(*_):
        raise MemoryError("no room for a graph")

    async def body():
        async with open_site(tmp_path, "auto") as site:
            lobby = await site.create()
            await site.enrol(lobby, people())
            monkeypatch.setattr("resight.service.index.builder.empty_graph", no_room)
            with pytest.raises(MemoryError):
                await site.searcher.rebuild(lobby, "hnsw")
            stats = site.searcher.stats(lobby)
            assert stats.index_type == "flat" and "no room for a graph" in stats.note and not stats.building
            assert (await site.ids(lobby, people()[4]))[0] == "e4" and site.searcher.waiting == 0
            await site.ids(lobby, people()[4])
            assert not site.searcher.stats(lobby).building  # it is not tried again at once

    asyncio.run(body())
