"""What is specific to Milvus; test_searcher.py tests that it answers as every index does."""

import asyncio
import sqlite3
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest

from resight.errors import InputError, StartupError, UnavailableError
from resight.service.index.base import IndexPolicy
from resight.service.index.milvus import connect_milvus
from resight.service.records import Collection, Enrolment, EntryRecord, Filter, Space
from resight.service.search.searcher import NearestQuery, Searcher
from resight.service.storage import writes
from resight.service.storage.store import Store

pytest.importorskip("milvus_lite", reason="needs milvus-lite: install resight[dev]")

DIM = 16
SPACE = Space("ab" * 16, "tiny", DIM)


def feature(n):
    row = np.random.default_rng(n).normal(size=DIM).astype(np.float32)
    return row / np.linalg.norm(row)


def test_milvus_is_reconciled_with_the_store(tmp_path):
    address = str(tmp_path / "milvus.db")

    async def body():
        store = Store(tmp_path / "gallery.sqlite3", dim=DIM)
        searcher = Searcher(store, IndexPolicy(milvus=address))
        await searcher.load()
        lobby = await store.write(writes.create_collection, Collection("lobby", SPACE))
        for n in range(30):
            await store.write(writes.enrol, lobby, Enrolment(EntryRecord(f"e{n}"), feature(n)))
        await searcher.search(lobby, [NearestQuery(feature(0), 1, Filter())], with_features=False)
        stats = searcher.stats(lobby)
        assert stats.index_type == "milvus" and stats.revision == searcher.revision(lobby) > 0
        with pytest.raises(InputError, match="builds its own index"):
            await searcher.rebuild(lobby, "flat")
        searcher.close()
        await store.erase(writes.delete_entry, lobby, "e3", allow_missing=False)
        await store.write(writes.enrol, lobby, Enrolment(EntryRecord("new"), feature(99)))
        await store.write(writes.purge_requests, [(lobby.key, 10**9)])  # the change log no longer has it
        searcher = Searcher(store, IndexPolicy(milvus=address))
        await searcher.load()
        queries = [NearestQuery(feature(n), 31, Filter()) for n in (3, 99)]
        deleted, added = await searcher.search(lobby, queries, with_features=False)
        assert len(deleted.hits) == len(added.hits) == 30 and added.hits[0].entry.entry_id == "new"
        assert "e3" not in {hit.entry.entry_id for hit in deleted.hits}
        client = connect_milvus(address)
        (name,) = client.list_collections()
        assert client.get_collection_stats(name)["row_count"] == 30
        client.create_collection(f"{name[:-24]}{24 * 'f'}", dimension=4)  # of a collection deleted in the meantime
        client.create_collection("someone_elses", dimension=4)
        client.close()
        searcher.close()
        searcher = Searcher(store, IndexPolicy(milvus=address))
        await searcher.load()
        searcher.drop(lobby)
        await store.erase(writes.delete_collection, "lobby", force=True)
        searcher.close()
        client = connect_milvus(address)
        assert client.list_collections() == ["someone_elses"] and not searcher.erases
        client.close()
        store.close()

    asyncio.run(body())


def test_a_failing_milvus_is_reported_and_the_store_still_works(tmp_path):
    address = str(tmp_path / "milvus.db")

    async def body():
        store = Store(tmp_path / "gallery.sqlite3", dim=DIM)
        searcher = Searcher(store, IndexPolicy(milvus=address))
        await searcher.load()
        lobby = await store.write(writes.create_collection, Collection("lobby", SPACE))
        await store.write(writes.enrol, lobby, Enrolment(EntryRecord("one"), feature(1)))
        queries = [NearestQuery(feature(1), 1, Filter())]
        await searcher.search(lobby, queries, with_features=False)
        client = connect_milvus(address)
        client.drop_collection(client.list_collections()[0])
        await store.write(writes.enrol, lobby, Enrolment(EntryRecord("two"), feature(2)))
        with pytest.raises(UnavailableError, match="nothing is lost"):
            await searcher.search(lobby, queries, with_features=False)
        searcher.close()
        searcher = Searcher(store, IndexPolicy(milvus=address))
        await searcher.load()
        (found,) = await searcher.search(lobby, [NearestQuery(feature(2), 2, Filter())], with_features=True)
        assert [hit.entry.entry_id for hit in found.hits] == ["two", "one"]
        searcher.close()
        store.close()
        with closing(sqlite3.connect(tmp_path / "gallery.sqlite3")) as raw:
            assert raw.execute("SELECT count(*) FROM feature").fetchone() == (2,)

    asyncio.run(body())


def test_an_unreachable_address_is_refused_at_start():
    with pytest.raises(StartupError, match="cannot be reached"):
        connect_milvus("milvus://127.0.0.1:1")


IDLE = """
import sys, time
from pathlib import Path
from resight.service.index.milvus import connect_milvus
client = connect_milvus(sys.argv[1])
client.create_collection("someone_elses", dimension=4)
time.sleep(160)  # with pymilvus' own settings the server ended the connection after 132 s
print(client.list_collections())
client.close()
"""


@pytest.mark.slow
def test_an_idle_client_is_not_disconnected(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", IDLE, tmp_path / "milvus.db"], capture_output=True, text=True, timeout=290
    )
    assert done.returncode == 0 and done.stdout.strip() == "['someone_elses']", done.stderr
    assert "GOAWAY" not in done.stderr and "too_many_pings" not in done.stderr
