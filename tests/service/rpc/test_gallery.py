"""Collections and entries against a real server: created, listed, filtered, deleted, retried."""

import itertools
import threading
from datetime import UTC, datetime, timedelta

import grpc
import numpy as np
import pytest
from serving import DIM, jpeg
from wire import rich

from resight.client import Client, NewEntry, Query, Where
from resight.errors import (
    CollectionExistsError,
    CollectionNotEmptyError,
    CollectionNotFoundError,
    DeleteCapError,
    EntryExistsError,
    EntryNotFoundError,
    InputError,
    ReIDError,
)
from resight.v1 import (
    gallery_pb2,
    gallery_pb2_grpc,
)


def test_an_entry_is_returned_as_it_was_enrolled(client, collection):
    seen = datetime(2026, 3, 1, 12, 30, 15, 250_000, tzinfo=UTC)
    expires = datetime.now(UTC).replace(microsecond=0) + timedelta(days=2)
    new = NewEntry([jpeg(1, 0), jpeg(1, 1)], "e", "anna", "door", "t7", seen, expires, {"hat": "röd"})
    entry = client.enrol(collection, new)
    assert entry == client.get_entry(collection, "e")
    assert (entry.subject_id, entry.camera_id, entry.track_id) == ("anna", "door", "t7")
    assert (entry.capture_time, entry.expire_time, entry.labels) == (seen, expires, {"hat": "röd"})
    assert entry.shot_count == 2 and 0 < entry.quality < 1
    assert client.enrol(collection, NewEntry(jpeg(2))).entry_id not in ("", "e")


def test_filters_equal_brute_force(client, collection):
    """Every filter alone and in pairs, for small and large top_k."""
    rng = np.random.default_rng(5)
    day = datetime(2026, 1, 1, tzinfo=UTC)
    new = [
        NewEntry(
            jpeg(number % 17, number),
            entry_id=f"e{number:03d}",
            subject_id=["", "anna", "bo"][rng.integers(3)],
            camera_id=["", "c1", "c2", "c3"][rng.integers(4)],
            track_id=["", "t1", "t2"][rng.integers(3)],
            capture_time=None if number % 7 == 0 else day + timedelta(minutes=int(rng.integers(1000))),
            labels={"hat": ["red", "blue"][rng.integers(2)]} if number % 3 else {},
        )
        for number in range(120)
    ]
    assert all(not isinstance(outcome, ReIDError) for outcome in client.enrol_batch(collection, new))
    held = list(client.entries(collection, page_size=50))
    assert [entry.entry_id for entry in held] == sorted(entry.entry_id for entry in held) and len(held) == 120
    features = {entry.entry_id: client.get_feature(collection, entry.entry_id).vector for entry in held}
    window = (day + timedelta(minutes=200), day + timedelta(minutes=700))
    median = sorted(entry.quality for entry in held)[60]
    singles = {
        "none": (Where(), lambda e: True),
        "camera": (Where(camera_ids=["c1", "c2"]), lambda e: e.camera_id in ("c1", "c2")),
        "not camera": (Where(exclude_camera_ids=["c1"]), lambda e: e.camera_id != "c1"),
        "window": (
            Where(start=window[0], end=window[1]),
            lambda e: e.capture_time and window[0] <= e.capture_time < window[1],
        ),
        "track": (Where(track_ids=["t1"]), lambda e: e.track_id == "t1"),
        "not track": (Where(exclude_track_ids=["t1", "t2"]), lambda e: e.track_id == ""),
        "subject": (Where(subject_ids=["anna"]), lambda e: e.subject_id == "anna"),
        "labels": (Where(labels={"hat": "red"}), lambda e: e.labels.get("hat") == "red"),
        "quality": (Where(min_quality=median), lambda e: e.quality >= median),
        "nothing": (Where(camera_ids=["nowhere"]), lambda e: False),
    }
    cases = list(singles.values())
    for (a, keep_a), (b, keep_b) in itertools.combinations(singles.values(), 2):
        joined = {name: getattr(a, name) or getattr(b, name) for name in Where.__dataclass_fields__}
        if not any(getattr(a, name) and getattr(b, name) for name in Where.__dataclass_fields__):
            cases.append((Where(**joined), lambda e, x=keep_a, y=keep_b: x(e) and y(e)))
    query = client.embed(jpeg(4, 999))
    queries = [Query(jpeg(4, 999), k, where) for where, _ in cases for k in (3, 200)]
    answers = client.search_batch(collection, queries)
    for case_query, answer, (_, keep) in zip(queries, answers, [case for case in cases for _ in range(2)], strict=True):
        scored = [(-float((features[e.entry_id] * query).sum()), n) for n, e in enumerate(held) if keep(e)]
        expected = [held[n].entry_id for _, n in sorted(scored)][: case_query.top_k]
        assert [hit.entry.entry_id for hit in answer.hits] == expected, case_query.where
    for where, keep in cases[:10]:
        assert [e.entry_id for e in client.entries(collection, where=where)] == [e.entry_id for e in held if keep(e)]
        alone = client.search(collection, jpeg(4, 999), top_k=5, where=where)
        assert alone.hits == client.search_batch(collection, [Query(jpeg(4, 999), 5, where)])[0].hits


def test_copies_of_one_crop_are_found_in_order_of_enrolment(client, collection):
    client.enrol_batch(collection, [NewEntry(jpeg(1), f"copy{number:02d}") for number in range(30)])
    names = [hit.entry.entry_id for hit in client.search(collection, jpeg(1), top_k=12).hits]
    assert names == [f"copy{number:02d}" for number in range(12)]


def test_deleted_entries_are_never_returned(client, collection):
    client.enrol_batch(collection, [NewEntry(jpeg(p), f"e{p}", camera_id=f"c{p % 2}") for p in range(10)])
    client.delete_entry(collection, "e3")
    assert "e3" not in {hit.entry.entry_id for hit in client.search(collection, jpeg(3), top_k=10).hits}
    with pytest.raises(EntryNotFoundError):
        client.get_entry(collection, "e3")
    with pytest.raises(EntryNotFoundError):
        client.delete_entry(collection, "e3")
    client.delete_entry(collection, "e3", allow_missing=True)
    odd = Where(camera_ids=["c1"])
    assert client.delete_entries(collection, odd, dry_run=True) == 4
    with pytest.raises(DeleteCapError) as refused:
        client.delete_entries(collection, odd, max_deletes=3)
    assert refused.value.facts == {"matched_count": "4"}
    assert client.collection(collection).entry_count == 9
    assert client.delete_entries(collection, odd, max_deletes=4) == 4
    assert {hit.entry.camera_id for hit in client.search(collection, jpeg(3), top_k=10).hits} == {"c0"}
    with pytest.raises(InputError, match="empty filter"):
        client.delete_entries(collection, Where())


def test_deleted_entries_are_not_found_by_concurrent_searches(client, collection, address):
    """A search started after an enrolment has returned finds it."""
    client.enrol_batch(collection, [NewEntry(jpeg(1, n), f"e{n:02d}") for n in range(20)])
    deleted: set[str] = set()
    failures: list[str] = []
    done = threading.Event()

    def searching():
        with Client(address) as own:
            while not done.is_set():
                before = set(deleted)
                found = {hit.entry.entry_id for hit in own.search(collection, jpeg(1), top_k=100).hits}
                failures.extend(found & before)

    threads = [threading.Thread(target=searching) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(20):
        client.delete_entry(collection, f"e{number:02d}")
        deleted.add(f"e{number:02d}")
        new = client.enrol(collection, NewEntry(jpeg(2, number))).entry_id
        if client.search(collection, jpeg(2, number), top_k=1).hits[0].entry.entry_id != new:
            failures.append(new)
    done.set()
    for thread in threads:
        thread.join(30)
    assert failures == []


def test_collections_are_created_listed_and_deleted(client, bundle):
    with pytest.raises(InputError, match="must expire"):
        client.create_collection("made-here")
    made = client.create_collection("made-here", ttl=timedelta(hours=1.5), keep_crops=True)
    assert (made.ttl, made.keep_crops, made.entry_count) == (timedelta(hours=1.5), True, 0)
    assert (made.space_id, made.feature_dim, made.model) == (bundle.manifest.space_id, DIM, "tiny-0")
    with pytest.raises(CollectionExistsError):
        client.create_collection("made-here", ttl=timedelta(hours=1))
    entry = client.enrol("made-here", NewEntry(jpeg(1)))
    assert entry.expire_time - entry.create_time == timedelta(hours=1.5)
    assert "made-here" in {found.name for found in client.collections()}
    with pytest.raises(CollectionNotEmptyError):
        client.delete_collection("made-here")
    client.delete_collection("made-here", force=True)
    for call in (client.collection, client.delete_collection, lambda name: client.search(name, jpeg(1))):
        with pytest.raises(CollectionNotFoundError) as refused:
            call("made-here")
        assert refused.value.facts["collection"] == "made-here"
    for name in ("", "Upper", "1st", "a" * 64, "a/b", "ü"):
        with pytest.raises(InputError, match="1-63"):
            client.create_collection(name, ttl=timedelta(hours=1))


def test_lists_come_in_pages(client, collection, channel):
    client.enrol_batch(collection, [NewEntry(jpeg(p), f"e{p}") for p in range(7)])
    stub = gallery_pb2_grpc.GalleryServiceStub(channel)
    request = gallery_pb2.ListEntriesRequest(collection_id=collection, page_size=3)
    sizes, names = [], []
    while True:
        page = stub.ListEntries(request)
        sizes.append(len(page.entries))
        names += [entry.entry_id for entry in page.entries]
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
        client.delete_entry(collection, page.entries[0].entry_id)  # a cursor is not affected, an offset would be
    assert sizes == [3, 3, 1] and names == [f"e{p}" for p in range(7)]
    for bad in ("%%%", "AAAA", "é"):
        with pytest.raises(grpc.RpcError) as refused:
            stub.ListEntries(gallery_pb2.ListEntriesRequest(collection_id=collection, page_token=bad))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    one = stub.ListCollections(gallery_pb2.ListCollectionsRequest(page_size=1))
    assert len(one.collections) == 1


def test_a_duplicate_id_is_refused_or_replaced(client, collection):
    client.enrol(collection, NewEntry(jpeg(1), "e", "anna"))
    with pytest.raises(EntryExistsError) as refused:
        client.enrol(collection, NewEntry(jpeg(2), "e", "bo"))
    assert refused.value.facts["entry"] == "e"
    client.enrol(collection, NewEntry(jpeg(2), "e", "bo", replace=True))
    hits = client.search(collection, jpeg(2), top_k=5).hits
    assert [(hit.entry.subject_id, round(hit.similarity, 3)) for hit in hits] == [("bo", 1.0)]


def test_a_retried_enrolment_returns_the_same_and_stores_nothing(client, collection, channel):
    stub = gallery_pb2_grpc.GalleryServiceStub(channel)
    request = NewEntry(jpeg(1), subject_id="anna").message(collection, "request-1-" + collection)
    first, second = stub.EnrollEntry(request), stub.EnrollEntry(request)
    assert (first.entry, first.revision) == (second.entry, second.revision)
    assert (first.replayed, second.replayed) == (False, True)
    assert client.collection(collection).entry_count == 1
    request.entry.subject_id = "bo"
    code, found = rich(lambda: stub.EnrollEntry(request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert found["BadRequest"].field_violations[0].field == "request_id"


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda r: r.ClearField("source"), "source"),
        (lambda r: setattr(r.entry, "entry_id", "x" * 257), "entry.entry_id"),
        (lambda r: setattr(r.entry, "camera_id", "a\nb"), "entry.camera_id"),
        (lambda r: setattr(r.entry, "quality", 1.5), "entry.quality"),
        (lambda r: setattr(r.entry.capture_time, "seconds", 10**15), "entry.capture_time"),
        (lambda r: r.entry.labels.update({str(n): "" for n in range(17)}), "entry.labels"),
        (lambda r: setattr(r.entry.expire_time, "seconds", 1), "entry.expire_time"),
        (lambda r: r.entry.labels.update({"x" * 64: ""}), "entry.labels"),
        (lambda r: setattr(r, "request_id", "x" * 129), "request_id"),
    ],
)
def test_a_bad_field_is_named(channel, collection, change, field):
    request = NewEntry(jpeg(1)).message(collection, "")
    change(request)
    code, found = rich(lambda: gallery_pb2_grpc.GalleryServiceStub(channel).EnrollEntry(request))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert found["BadRequest"].field_violations[0].field == field
    assert found["ErrorInfo"].domain == "resight.v1"


def test_writes_return_their_revision_and_embed_its_space_and_quality(client, collection):
    first = client.enrol(collection, NewEntry(jpeg(0), entry_id="a"))
    (second,) = client.enrol_batch(collection, [NewEntry(jpeg(1), entry_id="b")])
    changed = client.update_entry(collection, "a", subject_id="anna")
    assert 0 < first.revision < second.revision < changed.revision and not first.replayed
    assert client.get_entry(collection, "a").revision == 0  # only read
    hits = client.search(collection, jpeg(1), min_revision=second.revision).hits
    assert hits[0].entry.entry_id == "b"
    crop = client.embed_crop(jpeg(0))
    np.testing.assert_array_equal(crop.vector, client.embed(jpeg(0)))
    assert crop.space_id == client.collection(collection).space_id and 0 < crop.quality <= 1
