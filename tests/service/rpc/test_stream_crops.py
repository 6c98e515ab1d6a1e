"""StreamCrops against a real server: order, resumption, flow control, deleted entries."""

import asyncio
import io
import itertools
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import grpc
import numpy as np
import pytest
from google.protobuf import timestamp_pb2
from grpc_status import rpc_status
from PIL import Image
from serving import ServerProcess, jpeg

from resight.client import AsyncClient, Client, NewEntry, Where
from resight.client.requests import CollectionChange
from resight.client.transport import ResumableStream
from resight.errors import (
    CollectionNotFoundError,
    CropsMissingError,
    DeadlineError,
    InputError,
    OverloadedError,
    PermissionDeniedError,
    UnavailableError,
)
from resight.service.access.auth import Role
from resight.status import from_status
from resight.v1 import gallery_pb2, gallery_pb2_grpc

pytestmark = pytest.mark.long

FEW = 12


def noise(seed: int, side: int = 600) -> bytes:
    """A crop of a megabyte, so that a few fill every window of the transport."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


BIG = noise(0)


@pytest.fixture
def crop_collection(client, collection):
    """A collection that keeps crops, with entries e0..e11 of two cameras, every third of two shots."""
    client.update_collection(collection, CollectionChange(keep_crops=True))
    client.enrol_batch(collection, [new(number) for number in range(FEW)])
    return collection


def shots(number: int) -> list[bytes]:
    return [jpeg(number, shot) for shot in range(2 if number % 3 == 0 else 1)]


def new(number: int, **more) -> NewEntry:
    return NewEntry(shots(number), f"e{number}", camera_id=f"cam{number % 2}", track_id=f"t{number // 2}", **more)


def ids(answers) -> list[str]:
    return [one.entry.entry_id for one in answers]


def audited_counts(client, collection) -> list[int]:
    rows = [row for row in client.audit_events() if row.collection == collection]
    return [row.affected for row in reversed(rows) if row.method == "GalleryService.StreamCrops"]


def test_crops_are_streamed_unchanged_in_order_of_enrolment(client, crop_collection):
    found = list(client.stream_crops(crop_collection))
    assert ids(found) == [f"e{number}" for number in range(FEW)]
    assert [list(one.images) for one in found] == [shots(number) for number in range(FEW)]
    assert found[5].entry == client.get_entry(crop_collection, "e5") and found[5].entry.track_id == "t2"
    assert ids(client.stream_crops(crop_collection, where=Where(camera_ids=["cam1"], exclude_track_ids=["t0"]))) == [
        f"e{number}" for number in range(3, FEW, 2)
    ]
    assert audited_counts(client, crop_collection) == [FEW, FEW // 2 - 1]


def test_a_cursor_resumes_after_the_last_entry(client, crop_collection):
    first = list(itertools.islice(client.stream_crops(crop_collection), 5))
    rest = list(client.stream_crops(crop_collection, cursor=first[-1].cursor))
    assert ids(first + rest) == [f"e{number}" for number in range(FEW)]
    assert list(client.stream_crops(crop_collection, cursor=rest[-1].cursor)) == []
    client.enrol(crop_collection, new(FEW))
    assert ids(client.stream_crops(crop_collection, cursor=rest[-1].cursor)) == [f"e{FEW}"]
    client.delete_entry(crop_collection, "e4")  # the cursor's own entry may be gone
    assert ids(client.stream_crops(crop_collection, cursor=first[-1].cursor))[0] == "e5"


def test_only_entries_enrolled_since_a_time(client, crop_collection):
    since = client.get_entry(crop_collection, "e7").create_time
    found = ids(client.stream_crops(crop_collection, since=since))
    assert (
        set(found) == {e.entry_id for e in client.entries(crop_collection) if e.create_time >= since} and "e7" in found
    )
    assert list(client.stream_crops(crop_collection, since=datetime.now(UTC) + timedelta(hours=1))) == []


def test_entries_without_crops_are_left_out(client, collection):
    client.enrol(collection, new(0))  # before anything was kept
    client.update_collection(collection, CollectionChange(keep_crops=True))
    client.enrol(collection, NewEntry(client.get_feature(collection, "e0"), "given"))
    client.enrol(collection, new(1))
    assert ids(client.stream_crops(collection)) == ["e1"]
    client.update_collection(collection, CollectionChange(keep_crops=False))
    with pytest.raises(CropsMissingError, match="CROP_RETENTION_STORE"):
        next(client.stream_crops(collection))


def test_entries_deleted_while_a_stream_waits_are_not_sent(client, collection):
    """Including entries that existed when the stream started and were read ahead."""
    client.update_collection(collection, CollectionChange(keep_crops=True))
    client.enrol_batch(collection, [NewEntry(BIG, f"e{number}", "anna") for number in range(24)])
    ends = datetime.now(UTC) + timedelta(seconds=2)
    client.enrol(collection, NewEntry(BIG, "short", expire_time=ends))
    client.enrol(collection, NewEntry(BIG, "last"))
    stream = client.stream_crops(collection)
    assert next(stream).entry.entry_id == "e0"
    client.delete_entry(collection, "e22")
    client.erase_subject("anna", collection=collection)
    client.enrol(collection, NewEntry(BIG, "late"))
    while datetime.now(UTC) <= ends:
        time.sleep(0.05)
    rest = ids(stream)
    assert rest[-1] == "last" and not {"e22", "e23", "short", "late"} & set(rest)


def test_a_slow_reader_does_not_block_others(client, collection, address):
    client.update_collection(collection, CollectionChange(keep_crops=True))
    client.enrol_batch(collection, [NewEntry(BIG, f"e{number}") for number in range(24)])
    with Client(address) as slow:
        streams = [slow.stream_crops(collection) for _ in range(4)]
        for stream in streams:
            next(stream)
        assert client.search(collection, jpeg(1)).hits
        assert client.delete_entries(collection, Where(track_ids=["none"])) == 0
        for stream in streams[1:]:
            stream.close()
        assert len(ids(streams[0])) == 23
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: len(ids(client.stream_crops(collection))), range(4))) == [24] * 4


def test_a_cancelled_stream_is_audited_with_the_entries_sent(client, crop_collection):
    stream = client.stream_crops(crop_collection)
    for _ in range(3):
        next(stream)
    stream.close()
    until = time.monotonic() + 10
    while not (audited := audited_counts(client, crop_collection)):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert len(audited) == 1 and 3 <= audited[0] <= FEW


def test_a_stream_may_exceed_the_default_deadline_but_not_its_own(bundle_path, tmp_path):
    """After a crash of the server the client resumes behind the last entry."""
    server = ServerProcess(bundle_path, tmp_path / "data", RESIGHT_DEADLINE_S="0.5")
    address = server.wait_ready()
    with Client(address) as client:
        client.create_collection("crops", unlimited_retention=True, keep_crops=True)
        for number in range(24):
            client.enrol("crops", NewEntry(BIG, f"e{number}"))
        found = 0
        for _ in client.stream_crops("crops"):
            time.sleep(0.05)  # 24 entries: twice the default deadline
            found += 1
        assert found == 24
        with pytest.raises(DeadlineError):
            for _ in client.stream_crops("crops", timeout_s=0.3):
                time.sleep(0.1)
        stream = client.stream_crops("crops")
        taken = [next(stream).entry.entry_id]
        server.end(signal.SIGKILL)
        server = ServerProcess(bundle_path, tmp_path / "data", listen=address)
        server.wait_ready()
        try:
            taken += ids(stream)
            assert taken == [f"e{number}" for number in range(24)]
            assert 0 < audited_counts(client, "crops")[-1] < 24
        finally:
            assert server.end() == 0
    with pytest.raises(UnavailableError), Client("127.0.0.1:1") as unreachable:
        next(unreachable.stream_crops("crops"))


def test_stream_retries_are_limited_and_reset_by_each_response():
    stream = ResumableStream("gallery.StreamCrops", gallery_pb2.StreamCropsRequest(), lambda reply: reply.cursor)
    for _ in range(3):
        for _ in range(4):
            assert 0 < stream.pause(UnavailableError("away")) < 1
        with pytest.raises(UnavailableError):
            stream.pause(UnavailableError("away"))
        assert stream.advance(gallery_pb2.StreamCropsResponse(cursor="c")) == "c" == stream.request.cursor
    assert stream.pause(OverloadedError("full", retry_after_s=2.0)) > 2
    with pytest.raises(InputError):
        stream.pause(InputError("no"))


def refused(channel, **wrong):
    with pytest.raises(grpc.RpcError) as failure:
        list(gallery_pb2_grpc.GalleryServiceStub(channel).StreamCrops(gallery_pb2.StreamCropsRequest(**wrong)))
    return from_status(rpc_status.from_call(failure.value))


def test_hostile_requests_are_refused_by_their_field(client, crop_collection, channel):
    for cursor in ("x", "!!", "AAAA", "é", "A" * 5000):
        error = refused(channel, collection_id=crop_collection, cursor=cursor)
        assert isinstance(error, InputError) and error.field == "cursor"
    far = timestamp_pb2.Timestamp(seconds=1 << 60)
    assert refused(channel, collection_id=crop_collection, enrolled_since=far).field == "enrolled_since"
    many = gallery_pb2.EntryFilter(camera_ids=["c"] * 1001)
    assert refused(channel, collection_id=crop_collection, filter=many).field == "filter.camera_ids"
    assert isinstance(refused(channel, collection_id="nowhere"), CollectionNotFoundError)
    for cursor in ("gAAAAAAAAAA", "f_________8"):  # the smallest and the largest key
        found = list(client.stream_crops(crop_collection, cursor=cursor))
        assert len(found) == (FEW if cursor[0] == "g" else 0)


def test_crops_require_an_operator_of_the_tenant(guarded):
    with guarded.client(Role.OPERATOR) as operator, guarded.client(Role.OPERATOR, "north") as north:
        for own, number in ((operator, 1), (north, 2)):
            own.create_collection("crops", unlimited_retention=True, keep_crops=True)
            own.enrol("crops", new(number))
        with guarded.client(Role.ENROLLER) as enroller, pytest.raises(PermissionDeniedError, match="operator"):
            next(enroller.stream_crops("crops"))
        (one,), (other,) = operator.stream_crops("crops"), north.stream_crops("crops")
        assert (list(one.images), list(other.images)) == (shots(1), shots(2))
        assert ids(north.stream_crops("crops", cursor=one.cursor)) == []
        for own in (operator, north):
            own.delete_collection("crops", force=True)


def test_the_async_client_streams_the_same(client, crop_collection, address):
    async def body():
        async with AsyncClient(address) as own:
            found = [one async for one in own.stream_crops(crop_collection)]
            rest = [one.entry.entry_id async for one in own.stream_crops(crop_collection, cursor=found[7].cursor)]
            pair = await own.confirm(crop_collection, "e1", "e0")
            listed = [one async for one in own.list_feedback(crop_collection)]
            return found, rest, pair, listed

    found, rest, pair, listed = asyncio.run(body())
    assert found == list(client.stream_crops(crop_collection)) and rest == ids(found)[8:]
    assert listed == [pair] and pair.same
