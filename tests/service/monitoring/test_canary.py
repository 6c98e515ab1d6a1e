"""Health over a real socket while the model's thread hangs, returns wrong features, or is overloaded."""

import asyncio
import threading

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import jpeg

from resight.runtime.onnx import OnnxRuntime
from resight.service.app import running_server
from resight.service.settings import Settings
from resight.v1 import common_pb2, embedding_pb2, embedding_pb2_grpc, gallery_pb2, gallery_pb2_grpc

STATUS = health_pb2.HealthCheckResponse
READY = ("Embedding", "Search", "Gallery")


async def states(channel) -> dict[str, int]:
    stub = health_pb2_grpc.HealthStub(channel)
    names = {"": "", **{name: f"resight.v1.{name}Service" for name in (*READY, "Admin")}}
    return {
        short: (await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)).status
        for short, name in names.items()
    }


async def becomes(channel, expected: int) -> dict[str, int]:
    for _ in range(400):
        found = await states(channel)
        if all(found[name] == expected for name in READY):
            return found
        await asyncio.sleep(0.02)
    raise AssertionError(found)


@pytest.fixture
def model(monkeypatch):
    """The real runtime behind an event that blocks it, and one that negates its features."""
    gate, turned, embed = threading.Event(), threading.Event(), OnnxRuntime.embed
    gate.set()

    def gated(self, images):
        assert gate.wait(60)
        return -embed(self, images) if turned.is_set() else embed(self, images)

    monkeypatch.setattr(OnnxRuntime, "embed", gated)
    yield gate, turned
    gate.set()


def run(test, bundle_path, tmp_path, **settings):
    async def body():
        configured = Settings(bundle=bundle_path, data=tmp_path / "data", listen="127.0.0.1:0", **settings)
        async with running_server(configured) as server, grpc.aio.insecure_channel(server.address) as channel:
            await test(channel)

    asyncio.run(body())


def test_a_hanging_model_makes_the_server_not_ready_until_it_recovers(bundle_path, tmp_path, model):
    gate, turned = model

    async def test(channel):
        made = gallery_pb2.CreateCollectionRequest(
            collection=gallery_pb2.Collection(collection_id="lobby"), allow_unlimited_retention=True
        )
        await gallery_pb2_grpc.GalleryServiceStub(channel).CreateCollection(made)
        await becomes(channel, STATUS.SERVING)
        gate.clear()
        found = await becomes(channel, STATUS.NOT_SERVING)
        assert found[""] == found["Admin"] == STATUS.SERVING
        gate.set()
        await becomes(channel, STATUS.SERVING)
        turned.set()
        await becomes(channel, STATUS.NOT_SERVING)
        turned.clear()
        await becomes(channel, STATUS.SERVING)

    run(test, bundle_path, tmp_path, canary_interval_s=0.3)


def test_a_flooded_server_stays_ready(bundle_path, tmp_path):
    async def test(channel):
        stub, done, answered = embedding_pb2_grpc.EmbeddingServiceStub(channel), asyncio.Event(), [0, 0]
        request = embedding_pb2.BatchEmbedRequest(
            images=[common_pb2.ImageCrop(data=jpeg(n, size=(200, 300))) for n in range(16)]
        )

        async def flood():
            while not done.is_set():
                try:
                    await stub.BatchEmbed(request)
                    answered[0] += 1
                except grpc.aio.AioRpcError as refusal:
                    answered[1] += refusal.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                    await asyncio.sleep(0.005)

        floods = [asyncio.create_task(flood()) for _ in range(12)]
        seen = []
        for _ in range(20):
            await asyncio.sleep(0.1)
            seen.append(await states(channel))
        done.set()
        await asyncio.gather(*floods)
        assert min(answered) > 0
        assert all(set(one.values()) == {STATUS.SERVING} for one in seen)

    run(test, bundle_path, tmp_path, canary_interval_s=2.0, max_queue=64)
