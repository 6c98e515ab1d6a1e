"""The methods of the API against a real server."""

import io

import grpc
import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from PIL import Image
from serving import DIM, features_by_hand, jpeg
from wire import rich

from resight.client import Client, EntryId, GivenFeature, NewEntry, Query, Where
from resight.errors import (
    DeadlineError,
    ImageTooLargeError,
    ImageTooSmallError,
    ImageUndecodableError,
    InputError,
    LimitError,
    ReIDError,
    SpaceMismatchError,
)
from resight.service.app import SERVICES
from resight.v1 import (
    common_pb2,
    embedding_pb2,
    embedding_pb2_grpc,
    search_pb2,
    search_pb2_grpc,
)


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def bad_crops() -> dict[str, tuple[bytes, type[ReIDError]]]:
    return {
        "empty": (b"", ImageUndecodableError),
        "text": (b"not a picture at all", ImageUndecodableError),
        "truncated": (jpeg(1)[:700], ImageUndecodableError),
        "1x1": (encoded(Image.new("RGB", (1, 1))), ImageTooSmallError),
        "9000x9000": (encoded(Image.new("RGB", (9000, 9000))), ImageTooLargeError),
    }


def test_a_feature_over_the_wire_equals_the_one_computed_offline(client):
    crops = [jpeg(person, size=size) for person, size in ((1, (48, 96)), (2, (32, 64)), (3, (200, 150)))]
    expected = features_by_hand(crops)
    for crop, feature in zip(crops, expected, strict=True):
        assert float(client.embed(crop) @ feature) >= 0.99999
    for outcome, feature in zip(client.embed_batch(crops), expected, strict=True):
        assert float(outcome @ feature) >= 0.99999
        assert abs(float(np.linalg.norm(outcome)) - 1) < 1e-5


def test_embed_returns_space_quality_and_timings(channel, bundle):
    stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
    reply = stub.Embed(embedding_pb2.EmbedRequest(image=common_pb2.ImageCrop(data=jpeg(1))))
    assert (reply.space.space_id, reply.space.dim) == (bundle.manifest.space_id, DIM)
    assert reply.embedding.space_id == reply.space.space_id
    assert 0 < reply.quality <= 1
    assert reply.timings.decode_ns > 0 and reply.timings.infer_ns > 0


def test_a_featureless_crop_has_quality_zero_but_a_feature(channel):
    stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
    black = encoded(Image.new("RGB", (64, 128)))
    reply = stub.Embed(embedding_pb2.EmbedRequest(image=common_pb2.ImageCrop(data=black)))
    assert reply.quality == 0 and len(reply.embedding.float32_le) == 4 * DIM


def test_one_bad_crop_does_not_fail_the_rest_of_its_batch(client, bad_crops):
    crops = [jpeg(1), *(data for data, _ in bad_crops.values()), jpeg(2)]
    outcomes = client.embed_batch(crops)
    for (name, (_, kind)), outcome in zip(bad_crops.items(), outcomes[1:-1], strict=True):
        assert type(outcome) is kind, name
    assert [outcome.field for outcome in outcomes[1:-1]] == [f"images[{n}].data" for n in range(1, 6)]
    expected = features_by_hand([jpeg(1), jpeg(2)])
    assert float(outcomes[0] @ expected[0]) > 0.9999 and float(outcomes[-1] @ expected[1]) > 0.9999


def test_bad_crops_in_enrol_and_search_are_named_too(client, collection, bad_crops):
    for data, kind in bad_crops.values():
        with pytest.raises(kind):
            client.enrol(collection, NewEntry(data))
        with pytest.raises(kind):
            client.search(collection, data)
    outcomes = client.enrol_batch(
        collection, [NewEntry(jpeg(1), "a"), NewEntry(bad_crops["text"][0], "b"), NewEntry([jpeg(1), b"x"], "c")]
    )
    assert outcomes[0].entry_id == "a"
    assert (type(outcomes[1]), outcomes[1].field) == (ImageUndecodableError, "requests[1].image.data")
    assert (type(outcomes[2]), outcomes[2].field) == (ImageUndecodableError, "requests[2].shots.images[1].data")
    found = client.search_batch(collection, [Query(b"x"), Query(jpeg(1), top_k=1)])
    assert type(found[0]) is ImageUndecodableError and found[1].hits[0].entry.entry_id == "a"
    assert client.collection(collection).entry_count == 1


def test_shots_are_joined_by_their_quality(client, collection, channel):
    shots = [jpeg(1, 0), jpeg(1, 1), jpeg(2, 0, size=(20, 24))]
    reply = embedding_pb2_grpc.EmbeddingServiceStub(channel).BatchEmbed(
        embedding_pb2.BatchEmbedRequest(images=[common_pb2.ImageCrop(data=shot) for shot in shots])
    )
    weights = [result.quality for result in reply.results]
    mean = sum(w * feature for w, feature in zip(weights, features_by_hand(shots), strict=True))
    client.enrol(collection, NewEntry(shots, "joined"))
    stored, _ = client.get_feature(collection, "joined")
    assert float(stored @ mean) / np.linalg.norm(mean) > 0.9999
    assert client.search(collection, shots, top_k=1).hits[0].similarity > 0.9999


def test_the_four_kinds_of_query_find_the_same_person(client, collection, bundle):
    client.enrol_batch(collection, [NewEntry(jpeg(p, s), f"{p}-{s}", f"p{p}") for p in range(8) for s in range(3)])
    space = bundle.manifest.space_id
    feature = client.embed(jpeg(3, 9))
    for source in (jpeg(3, 9), [jpeg(3, 9), jpeg(3, 8)], GivenFeature(feature * 7, space), EntryId("3-0")):
        answer = client.search(collection, source, top_k=2, with_features=True)
        assert [hit.entry.subject_id for hit in answer.hits] == ["p3", "p3"], source
        assert answer.exact and answer.space_id == space
        assert answer.revision == client.collection(collection).revision
        for hit in answer.hits:
            stored, _ = client.get_feature(collection, hit.entry.entry_id)
            assert np.array_equal(stored, hit.feature)
    assert "3-0" not in {hit.entry.entry_id for hit in client.search(collection, EntryId("3-0"), top_k=99).hits}


def test_a_feature_of_another_length_or_space_is_refused(client, collection, bundle, channel):
    space, feature = bundle.manifest.space_id, client.embed(jpeg(1))
    with pytest.raises(InputError, match="128 bytes, found 124"):
        client.search(collection, GivenFeature(feature[:-1], space))
    with pytest.raises(InputError, match="finite"):
        client.enrol(collection, NewEntry(GivenFeature(feature * np.nan, space)))
    with pytest.raises(InputError, match="finite and not zero"):
        client.enrol(collection, NewEntry(GivenFeature(feature * 0, space)))
    for wrong in ("", "f" * 32):
        with pytest.raises(SpaceMismatchError) as refused:
            client.search(collection, GivenFeature(feature, wrong))
        assert refused.value.facts == {"expected_space_id": space, "found_space_id": wrong}
    stub = search_pb2_grpc.SearchServiceStub(channel)
    request = search_pb2.SearchRequest(collection_id=collection, embedding=common_pb2.Embedding(space_id="other"))
    code, found = rich(lambda: stub.Search(request))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert found["ErrorInfo"].reason == "EMBEDDING_SPACE_MISMATCH" and "PreconditionFailure" in found


@pytest.mark.parametrize("top_k", [0, -1, 1001, 1_000_000])
def test_top_k_has_published_limits(client, collection, top_k):
    with pytest.raises(LimitError, match=r"1\.\.1000") as refused:
        client.search(collection, jpeg(1), top_k=top_k)
    assert refused.value.field == "top_k" and refused.value.facts == {"max_top_k": "1000"}
    assert client.info().limits["max_top_k"] == 1000


def test_top_k_defaults_to_ten_and_may_exceed_the_entries(client, collection):
    client.enrol_batch(collection, [NewEntry(jpeg(p)) for p in range(14)])
    assert len(client.search(collection, jpeg(1)).hits) == 10
    assert len(client.search(collection, jpeg(1), top_k=1000).hits) == 14
    above = client.search(collection, jpeg(1), top_k=1000, min_similarity=0.5).hits
    assert 0 < len(above) < 14 and all(hit.similarity >= 0.5 for hit in above)


def test_batches_have_a_size_limit(channel, collection, client):
    embedding = embedding_pb2_grpc.EmbeddingServiceStub(channel)
    for count in (0, 65):
        images = [common_pb2.ImageCrop(data=b"x")] * count
        code, found = rich(lambda images=images: embedding.BatchEmbed(embedding_pb2.BatchEmbedRequest(images=images)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT and found["ErrorInfo"].reason == "LIMIT_EXCEEDED"
    with pytest.raises(LimitError, match="shots"):
        client.enrol(collection, NewEntry([jpeg(1)] * 33))
    with pytest.raises(LimitError, match="shots"):
        client.search(collection, [])
    search = search_pb2_grpc.SearchServiceStub(channel)
    two = [search_pb2.SearchRequest(collection_id=name, entry_id="e") for name in (collection, "other")]
    assert (
        rich(lambda: search.BatchSearch(search_pb2.BatchSearchRequest(requests=two)))[0]
        is grpc.StatusCode.INVALID_ARGUMENT
    )


def test_the_client_splits_large_batches_in_order(client, collection):
    outcomes = client.enrol_batch(collection, [NewEntry(jpeg(n % 5, n), f"e{n:03d}") for n in range(150)])
    assert [entry.entry_id for entry in outcomes] == [f"e{n:03d}" for n in range(150)]
    assert len(client.embed_batch([jpeg(1)] * 70)) == 70
    assert len(client.search_batch(collection, [Query(jpeg(1), 1)] * 70)) == 70


def test_a_message_over_the_limit_is_refused_by_the_transport(client):
    with pytest.raises(LimitError):
        client.embed(b"x" * (9 * 1024 * 1024))
    with pytest.raises(ImageTooLargeError):
        client.embed(b"x" * (3 * 1024 * 1024))
    assert client.embed(jpeg(1)).shape == (DIM,)


@pytest.mark.parametrize("wrong", [float("nan"), -0.1, 1.1])
def test_a_quality_outside_its_range_is_refused(client, collection, wrong):
    with pytest.raises(InputError, match="min_quality"):
        list(client.entries(collection, where=Where(min_quality=wrong)))
    with pytest.raises(InputError, match="min_cosine"):
        client.search(collection, jpeg(1), min_similarity=wrong - 1.2 if wrong < 0 else wrong)


def test_health_of_the_server_and_of_each_service(channel):
    stub = health_pb2_grpc.HealthStub(channel)
    for name in ("", *SERVICES):
        reply = stub.Check(health_pb2.HealthCheckRequest(service=name))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as refused:
        stub.Check(health_pb2.HealthCheckRequest(service="resight.v1.Nothing"))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_lists_the_services_on_loopback(channel):
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (reply,) = stub.ServerReflectionInfo(iter([request]))
    assert set(SERVICES) <= {service.name for service in reply.list_services_response.service}


def test_info_publishes_the_limits(client, bundle):
    info = client.info()
    assert (info.space_id, info.feature_dim, info.provider) == (bundle.manifest.space_id, DIM, "cpu-fp32")
    assert info.limits["max_batch_items"] == 64 and info.limits["max_image_pixels"] == 4_000_000
    assert min(info.limits.values()) > 0


def test_responses_can_be_serialised_as_json(channel, collection, client):
    client.enrol(collection, NewEntry(jpeg(1), "e"))
    stub = search_pb2_grpc.SearchServiceStub(channel)
    reply = stub.Search(search_pb2.SearchRequest(collection_id=collection, entry_id="e"))
    assert MessageToDict(reply)["exact"] is True


def test_a_deadline_ends_the_call(address):
    with Client(address, timeout_s=1e-4) as hasty, pytest.raises(DeadlineError):
        hasty.embed(jpeg(1))
