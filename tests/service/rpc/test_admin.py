"""AdminService against a real server: statistics, indexes, snapshots, audit and operations."""

from datetime import UTC, datetime, timedelta

import pytest
from serving import ServerProcess, jpeg

from resight.client import NewEntry, Where
from resight.errors import CollectionNotFoundError, InputError, OperationNotFoundError


def test_statistics_count_what_there_is(client, collection):
    soon = datetime.now(UTC) + timedelta(seconds=1)
    client.enrol_batch(collection, [NewEntry(jpeg(p), f"e{p}") for p in range(20)])
    client.enrol(collection, NewEntry(jpeg(30), "short", expire_time=soon))
    client.delete_entry(collection, "e3")
    client.search(collection, jpeg(1))
    found = client.stats(collection)
    assert found.live_entries in (19, 20) and found.live_entries + found.expired_pending == 20
    assert (found.index_type, found.revision_lag, found.sampled_recall_at_10) == ("flat", 0, None)
    assert found.index_bytes > 0 and found.disk_bytes > 10_000 and found.tombstones == 0
    with pytest.raises(CollectionNotFoundError):
        client.stats("nowhere")


def test_an_index_is_rebuilt_while_it_serves(client, collection):
    client.enrol_batch(collection, [NewEntry(jpeg(p), f"e{p}") for p in range(60)])
    before = client.search(collection, jpeg(7), top_k=5).hits
    begun = client.rebuild_index(collection, "flat-fp16")
    assert begun.kind == "rebuild" and begun.state in ("running", "succeeded")
    done = client.wait(begun)
    assert (done.state, done.succeeded, done.result["index_type"]) == ("succeeded", 60, "flat-fp16")
    assert client.stats(collection).index_type == "flat-fp16"
    after = client.search(collection, jpeg(7), top_k=5).hits
    assert [hit.entry.entry_id for hit in after] == [hit.entry.entry_id for hit in before]
    assert client.wait(client.rebuild_index(collection)).state == "succeeded"
    with pytest.raises(InputError, match="index_type"):
        client.rebuild_index(collection, "ivf_pq; DROP TABLE")
    with pytest.raises(CollectionNotFoundError):
        client.rebuild_index("nowhere")


def test_a_snapshot_is_created_while_the_server_runs(client, collection, server: ServerProcess):
    client.enrol(collection, NewEntry(jpeg(1)))
    done = client.wait(client.create_snapshot("before-the-change"))
    assert (done.state, done.result["snapshot_id"]) == ("succeeded", "before-the-change") and done.finished is not None
    assert (server.data / "snapshots/before-the-change/manifest.json").is_file()
    again = client.wait(client.create_snapshot("before-the-change"))
    assert again.state == "failed" and isinstance(again.error, InputError)
    assert client.wait(client.create_snapshot()).state == "succeeded"  # named after the time
    for name in ("../x", "/etc", "a/b", "A"):
        with pytest.raises(InputError, match="name"):
            client.create_snapshot(name)


def test_operations_are_listed_and_queried(client, collection):
    made = [client.wait(client.rebuild_index(collection)).operation_id for _ in range(3)]
    listed = [one.operation_id for one in client.operations()]
    assert listed[:3] == made[::-1]
    found = client.operation(made[0])
    assert found.ended and found.finished >= found.started
    assert client.cancel_operation(made[0]).state == "succeeded"  # a finished operation does not change
    with pytest.raises(OperationNotFoundError):
        client.operation("nothing")


def test_the_audit_records_searches_and_erasures(client, collection):
    begun = datetime.now(UTC)
    client.enrol_batch(collection, [NewEntry(jpeg(p), f"e{p}", camera_id="door") for p in range(4)])
    client.search(collection, jpeg(1), top_k=3)
    client.verify(collection, jpeg(1), jpeg(2))
    client.delete_entry(collection, "e0")
    client.delete_entries(collection, Where(camera_ids=["door"]))
    rows = [row for row in client.audit_events(start=begun) if row.collection == collection]
    rows.sort(key=lambda row: row.time)  # rows of searches are written later than those of deletions
    assert [(row.method.partition(".")[2], row.affected) for row in rows] == [
        ("BatchEnrollEntries", 4),
        ("Search", 3),
        ("Verify", 0),
        ("DeleteEntry", 1),
        ("DeleteEntries", 3),
    ]
    assert {row.principal for row in rows} == {"anonymous"} and all(row.time >= begun for row in rows)
    assert [row for row in client.audit_events(end=begun) if row.collection == collection] == []
