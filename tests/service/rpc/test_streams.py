"""StreamEmbed and StreamSearch against a real server: order of completion, status per item, flow control."""

import asyncio
import threading

import grpc
import pytest
from serving import features_by_hand, jpeg

from resight.client import Client, NewEntry, Query
from resight.errors import CollectionNotFoundError, DeadlineError, ImageUndecodableError, InputError
from resight.service.rpc.streams import map_as_completed
from resight.v1 import common_pb2, embedding_pb2, embedding_pb2_grpc


def test_every_crop_is_answered_once_and_a_bad_one_does_not_end_the_stream(client):
    crops = [b"bad" if number % 10 == 3 else jpeg(number % 7, number) for number in range(100)]
    found = dict(client.stream_embed(iter(crops)))
    assert sorted(found) == list(range(100))
    assert {number for number, one in found.items() if type(one) is ImageUndecodableError} == set(range(3, 100, 10))
    good = [number for number in range(100) if number % 10 != 3]
    for number, feature in zip(good, features_by_hand([crops[number] for number in good]), strict=True):
        assert float(found[number] @ feature) > 0.9999


def test_streamed_searches_equal_single_ones(client, collection):
    client.enrol_batch(collection, [NewEntry(jpeg(p, s), f"{p}-{s}", f"p{p}") for p in range(5) for s in range(3)])
    queries = [Query(jpeg(number % 5, 50 + number), 2, group_by="subject") for number in range(30)]
    queries[7] = Query(jpeg(1), top_k=0)
    queries[8] = Query([])
    found = dict(client.stream_search(collection, queries))
    assert sorted(found) == list(range(30)) and isinstance(found[7], InputError) and isinstance(found[8], InputError)
    for number in (0, 11, 29):
        alone = client.search(collection, queries[number].source, top_k=2, group_by="subject")
        assert found[number].hits == alone.hits
    lost = dict(client.stream_search("nowhere", [Query(jpeg(1))] * 3))
    assert [type(one) for one in lost.values()] == [CollectionNotFoundError] * 3


def test_an_empty_stream_ends(client):
    assert list(client.stream_embed([])) == []


def test_ids_of_request_and_crop_come_back(address):
    with grpc.insecure_channel(address) as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        image = common_pb2.ImageCrop(data=jpeg(1), crop_id="c1")
        sent = [embedding_pb2.StreamEmbedRequest(request_id="r", image=image)]
        (reply,) = stub.StreamEmbed(iter(sent))
        assert (reply.request_id, reply.result.crop_id) == ("r", "c1") and reply.result.quality > 0
        images = [image, common_pb2.ImageCrop(data=b"x", crop_id="c2")]
        batch = stub.BatchEmbed(embedding_pb2.BatchEmbedRequest(images=images))
        assert [result.crop_id for result in batch.results] == ["c1", "c2"]
        with pytest.raises(grpc.RpcError) as refused:
            stub.Embed(embedding_pb2.EmbedRequest(image=common_pb2.ImageCrop(data=jpeg(1), crop_id="x" * 257)))
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as refused:
            stub.Embed(embedding_pb2.EmbedRequest(image=image, model_id="unknown"))
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("max_pending", [1, 3])
def test_no_more_requests_are_read_than_may_be_pending(max_pending):
    """Unread requests stay in gRPC's window and slow down the sender."""
    read, ended = [], []

    async def requests():
        for number in range(20):
            read.append(number)
            yield number

    async def work(number: int) -> int:
        await asyncio.sleep(0.001 * (number % 3))
        ended.append(number)
        return number

    async def body():
        taken = []
        async for answer in map_as_completed(requests(), work, max_pending):
            await asyncio.sleep(0.005)  # the client reads slowly
            taken.append(answer)
            assert len(read) <= len(taken) - 1 + max_pending
        assert sorted(taken) == list(range(20)) and taken == ended

    asyncio.run(body())


def test_a_broken_stream_cancels_its_work_and_raises():
    cancelled = []

    async def requests():
        yield 1
        await asyncio.sleep(0.01)
        raise ConnectionError("lost")

    async def work(number: int) -> int:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(number)
            raise
        return number

    async def body():
        with pytest.raises(ConnectionError):
            async for _ in map_as_completed(requests(), work, 8):
                pass

    asyncio.run(body())
    assert cancelled == [1]


def test_a_stream_keeps_to_its_deadline(client):
    never = threading.Event()

    def slow():
        yield jpeg(1)
        never.wait(5)

    with pytest.raises(DeadlineError):
        list(client.stream_embed(slow(), timeout_s=0.5))
    never.set()


def test_a_cancelled_stream_disturbs_no_other_call(client, address):
    for _ in range(5):
        stream = client.stream_embed(jpeg(1, number) for number in range(200))
        next(stream)
        stream.close()
    with Client(address) as other:
        assert other.embed(jpeg(1)).shape == client.embed(jpeg(1)).shape
