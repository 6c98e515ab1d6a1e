"""Updates against a real server: entries, settings, etags, limits, atomic batches and erasure."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from serving import jpeg

from resight.client import CollectionChange, GivenFeature, NewEntry, Where
from resight.errors import (
    CollectionFullError,
    ConflictError,
    EntryExistsError,
    EntryNotFoundError,
    ImageUndecodableError,
    InputError,
    LimitError,
    ModelNotFoundError,
    QualityTooLowError,
)
from resight.v1 import gallery_pb2, gallery_pb2_grpc


def test_an_entry_is_changed_in_place(client, collection):
    made = client.enrol(collection, NewEntry(jpeg(1), "e", "anna", labels={"hat": "red"}))
    later = datetime.now(UTC).replace(microsecond=0) + timedelta(days=3)
    changed = client.update_entry(collection, "e", subject_id="bo", expire_time=later)
    assert (changed.subject_id, changed.expire_time, changed.labels) == ("bo", later, {"hat": "red"})
    assert changed.etag != made.etag and changed.create_time == made.create_time
    assert client.update_entry(collection, "e", labels={}).labels == {}
    assert client.update_entry(collection, "e", subject_id="").subject_id == ""
    hit = client.search(collection, jpeg(1), top_k=1).hits[0]
    assert hit.entry == client.get_entry(collection, "e") and hit.similarity > 0.999
    with pytest.raises(EntryNotFoundError):
        client.update_entry(collection, "unknown", subject_id="x")


def test_only_mutable_fields_can_be_changed(client, collection, address):
    client.enrol(collection, NewEntry(jpeg(1), "e", camera_id="door"))
    with pytest.raises(InputError, match="update_mask"):
        client.update_entry(collection, "e")
    with pytest.raises(InputError, match="update_mask"):
        client.update_collection(collection, CollectionChange())
    with grpc.insecure_channel(address) as channel:
        stub = gallery_pb2_grpc.GalleryServiceStub(channel)
        for path in ("camera_id", "entry_id", "*", "quality"):
            request = gallery_pb2.UpdateEntryRequest(
                collection_id=collection, entry=gallery_pb2.Entry(entry_id="e"), update_mask=FieldMask(paths=[path])
            )
            with pytest.raises(grpc.RpcError) as refused:
                stub.UpdateEntry(request)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert client.get_entry(collection, "e").camera_id == "door"


def test_a_stale_etag_is_refused(client, collection):
    first = client.enrol(collection, NewEntry(jpeg(1), "e", "anna"))
    second = client.update_entry(collection, "e", subject_id="bo", etag=first.etag)
    for stale in (
        lambda: client.update_entry(collection, "e", subject_id="cy", etag=first.etag),
        lambda: client.delete_entry(collection, "e", etag=first.etag),
    ):
        with pytest.raises(ConflictError) as refused:
            stale()
        assert refused.value.facts["etag"] == second.etag
    assert client.get_entry(collection, "e").subject_id == "bo"
    client.delete_entry(collection, "e", etag=second.etag)
    old = client.collection(collection)
    client.update_collection(collection, CollectionChange(max_entries=5), etag=old.etag)
    with pytest.raises(ConflictError):
        client.update_collection(collection, CollectionChange(max_entries=6), etag=old.etag)
    with pytest.raises(ConflictError):
        client.delete_collection(collection, etag=old.etag)
    assert client.collection(collection).max_entries == 5


def test_a_collections_settings(client, collection):
    kept = client.update_collection(
        collection, CollectionChange(timedelta(days=2), 3, True, min_quality=0.25, accept_probability=0.9)
    )
    assert (kept.ttl, kept.max_entries, kept.keep_crops) == (timedelta(days=2), 3, True)
    assert kept.accept_probability == 0.9 and abs(kept.min_quality - 0.25) < 1e-6
    for bad in (
        CollectionChange(ttl=timedelta(0)),
        CollectionChange(max_entries=-1),
        CollectionChange(min_quality=1.5),
        CollectionChange(accept_probability=-0.1),
        CollectionChange(accept_probability=0.2, reject_probability=0.3),
    ):
        with pytest.raises(InputError):
            client.update_collection(collection, bad)
    assert client.collection(collection) == kept
    with pytest.raises(ModelNotFoundError):
        client.create_collection("other-model", unlimited_retention=True, model="unknown")


def test_readers_never_see_settings_older_than_acknowledged(client, collection):
    acknowledged, stop = [0], threading.Event()

    def reading() -> int:
        seen = 0
        while not stop.is_set():
            least = acknowledged[0]
            assert client.collection(collection).max_entries >= least
            seen += 1
        return seen

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(reading) for _ in range(3)]
        try:
            for number in range(1, 151):
                client.update_collection(collection, CollectionChange(max_entries=number))
                acknowledged[0] = number
                assert client.collection(collection).max_entries == number
        finally:
            stop.set()
    assert all(reader.result() for reader in readers)
    client.update_collection(collection, CollectionChange(max_entries=0))
    client.enrol(collection, NewEntry(jpeg(1), "e"))
    assert client.search(collection, jpeg(1), top_k=1).hits[0].entry.entry_id == "e"


def test_a_time_to_live_cannot_be_removed(client, collection, address):
    client.update_collection(collection, CollectionChange(ttl=timedelta(days=2)))
    with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as refused:
        gallery_pb2_grpc.GalleryServiceStub(channel).UpdateCollection(
            gallery_pb2.UpdateCollectionRequest(
                collection=gallery_pb2.Collection(collection_id=collection),
                update_mask=FieldMask(paths=["default_ttl"]),
            )
        )
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_full_collection_refuses_new_entries_and_takes_replacements(client, collection):
    client.update_collection(collection, CollectionChange(max_entries=2))
    client.enrol_batch(collection, [NewEntry(jpeg(p), f"e{p}") for p in range(2)])
    with pytest.raises(CollectionFullError) as refused:
        client.enrol(collection, NewEntry(jpeg(3)))
    assert refused.value.facts["max_entries"] == "2"
    client.enrol(collection, NewEntry(jpeg(4), "e1", replace=True))
    client.delete_entry(collection, "e0")
    client.enrol(collection, NewEntry(jpeg(3)))


def test_a_crop_below_min_quality_is_refused(client, collection, bundle):
    plain = client.enrol(collection, NewEntry(jpeg(1), "good"))
    client.update_collection(collection, CollectionChange(min_quality=min(1.0, plain.quality + 0.01)))
    with pytest.raises(QualityTooLowError) as refused:
        client.enrol(collection, NewEntry(jpeg(1), "same"))
    assert refused.value.field == "image" and float(refused.value.facts["quality"]) < float(
        refused.value.facts["min_quality"]
    )
    outcomes = client.enrol_batch(collection, [NewEntry([jpeg(1), jpeg(1, 1)])])
    assert (type(outcomes[0]), outcomes[0].field) == (QualityTooLowError, "requests[0].shots.images")
    given = GivenFeature(client.embed(jpeg(2)), bundle.manifest.space_id)
    client.enrol(collection, NewEntry(given, "given"))  # the quality of a sent feature is not checked
    assert client.search(collection, jpeg(1), top_k=1).hits[0].entry.entry_id == "good"


def test_an_atomic_batch(client, collection):
    client.enrol(collection, NewEntry(jpeg(1), "taken"))
    for wrong, kind, field in (
        (NewEntry(jpeg(3), "taken"), EntryExistsError, "requests[2].entry.entry_id"),
        (NewEntry(b"x", "e2"), ImageUndecodableError, "requests[2].image.data"),
        (NewEntry(jpeg(3), "x" * 300), InputError, "requests[2].entry.entry_id"),
    ):
        with pytest.raises(kind) as refused:
            client.enrol_batch(collection, [NewEntry(jpeg(1), "e0"), NewEntry(jpeg(2), "e1"), wrong], atomic=True)
        assert refused.value.field == field
        assert client.collection(collection).entry_count == 1
    made = client.enrol_batch(collection, [NewEntry(jpeg(p), f"e{p}") for p in range(5)], atomic=True)
    assert [entry.entry_id for entry in made] == [f"e{p}" for p in range(5)]
    with pytest.raises(LimitError):
        client.enrol_batch(collection, [NewEntry(jpeg(1))] * 65, atomic=True)


def test_a_person_is_erased_everywhere(client, collection):
    other = f"{collection[:50]}-2"
    client.create_collection(other, unlimited_retention=True, keep_crops=True)
    for name in (collection, other):
        client.enrol_batch(name, [NewEntry(jpeg(p, s), f"{p}-{s}", f"erased-{p}") for p in range(3) for s in range(2)])
    here = client.erase_subject("erased-1", collection=collection, reason="requested on 2026-03-01")
    assert (here.count, here.storage_scrubbed) == (2, True) and here.audit_id
    everywhere = client.erase_subject("erased-1")
    assert everywhere.count == 2 and client.erase_subject("erased-1").count == 0
    for name in (collection, other):
        found = {hit.entry.subject_id for hit in client.search(name, jpeg(1), top_k=10).hits}
        assert found == {"erased-0", "erased-2"}
        assert list(client.entries(name, where=Where(subject_ids=["erased-1"]))) == []
    with pytest.raises(InputError, match="subject"):
        client.erase_subject("")
    rows = [row for row in client.audit_events() if row.method == "GalleryService.EraseSubject"]
    assert rows[0].affected == 0 and {row.audit_id for row in rows} >= {here.audit_id, everywhere.audit_id}
    row = next(row for row in rows if row.audit_id == here.audit_id)
    assert (row.reason, row.collection) == ("requested on 2026-03-01", collection)
    assert row.subject_hash and "erased" not in row.subject_hash
    client.delete_collection(other, force=True)
