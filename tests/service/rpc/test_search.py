"""Search options against a real server: grouping, re-ranking, waiting for a revision, tracks."""

import itertools
import threading
import time

import numpy as np
import pytest
from references_rerank import expanded as slow_expanded
from references_rerank import k_reciprocal as slow_k_reciprocal
from serving import features_by_hand, jpeg

from resight.client import Client, EntryId, NewEntry, Query, Rerank, Where
from resight.errors import (
    CollectionNotFoundError,
    ImageUndecodableError,
    InputError,
    LimitError,
    RevisionNotSearchableError,
    UncalibratedError,
)


@pytest.fixture
def crowd(client, collection) -> str:
    """Persons with 60 to 1 crops, tracks of three crops, five cameras; some fields empty."""
    new = []
    for person, shots in enumerate([60, 9, 5, 3, 2, 1, 1, 1]):
        for shot in range(shots):
            subject = "" if person == 7 else f"p{person}"
            track = "" if person == 6 else f"p{person}-{shot // 3}"
            camera = "" if person == 5 else f"c{shot % 5}"
            new.append(NewEntry(jpeg(person, shot), f"{person}-{shot:02d}", subject, camera, track))
    client.enrol_batch(collection, new)
    return collection


@pytest.mark.parametrize(
    ("group_by", "field"), [("subject", "subject_id"), ("track", "track_id"), ("camera", "camera_id")]
)
@pytest.mark.parametrize("top_k", [1, 3, 6, 100])
def test_groups_equal_brute_force(client, crowd, group_by, field, top_k):
    everyone = client.search(crowd, jpeg(0, 99), top_k=1000).hits
    best: dict[str, object] = {}
    for hit in everyone:
        best.setdefault(getattr(hit.entry, field) or f"alone {hit.entry.entry_id}", hit)
    answer = client.search(crowd, jpeg(0, 99), top_k=top_k, group_by=group_by)
    assert [hit.entry.entry_id for hit in answer.hits] == [hit.entry.entry_id for hit in best.values()][:top_k]
    assert answer.exact and all(hit.group_size >= 1 for hit in answer.hits)
    if top_k == 100:
        sizes = {hit.entry.entry_id: hit.group_size for hit in answer.hits}
        alone = [hit.entry.entry_id for hit in everyone if not getattr(hit.entry, field)]
        assert alone and all(sizes[name] == 1 for name in alone)


def test_groups_work_with_filters_limits_and_batches(client, crowd):
    where = Where(exclude_camera_ids=["c0"])
    answer = client.search(crowd, EntryId("0-00"), top_k=3, group_by="subject", where=where, min_similarity=0.9)
    assert {hit.entry.subject_id for hit in answer.hits} == {"p0"}
    queries = [Query(jpeg(p, 99), 3, group_by=by) for p in range(3) for by in (None, "subject", "track")]
    for query, found in zip(queries, client.search_batch(crowd, queries), strict=True):
        alone = client.search(crowd, query.source, top_k=3, group_by=query.group_by)
        assert [hit.entry for hit in found.hits] == [hit.entry for hit in alone.hits]


@pytest.mark.parametrize(
    "how", [Rerank(candidates=40), Rerank("query_expansion", 40), Rerank("k_reciprocal", 30, 7, 3, 0.5)]
)
def test_reranking_equals_the_reference(client, crowd, how):
    query = jpeg(1, 99)
    near = client.search(crowd, query, top_k=how.candidates, with_features=True).hits
    candidates, own = np.stack([hit.feature for hit in near]), features_by_hand([query])[0]
    if how.method == "k_reciprocal":
        numbers = {"k1": how.k1 or 20, "k2": how.k2 or 6, "weight": 0.3 if how.weight is None else how.weight}
        expected = slow_k_reciprocal(np.concatenate((own[None], candidates)), **numbers)
    else:
        expected = slow_expanded(own, candidates, joined=5, alpha=3.0)
    answer = client.search(crowd, query, top_k=how.candidates, rerank=how)
    names = [hit.entry.entry_id for hit in near]
    scores = {hit.entry.entry_id: hit.ranking_score for hit in answer.hits}
    np.testing.assert_allclose([scores[name] for name in names], expected, atol=1e-4)
    ranking_scores = [hit.ranking_score for hit in answer.hits]
    assert ranking_scores == sorted(ranking_scores, reverse=True) and answer.rerank_ns > 0
    assert {hit.entry.entry_id: hit.similarity for hit in answer.hits} == {n.entry.entry_id: n.similarity for n in near}
    assert all(hit.feature is None for hit in answer.hits)


def test_reranking_works_with_groups_and_thresholds(client, crowd):
    plain = client.search(crowd, jpeg(1, 99), top_k=3)
    assert plain.rerank_ns == 0 and [hit.ranking_score for hit in plain.hits] == [hit.similarity for hit in plain.hits]
    grouped = client.search(crowd, jpeg(1, 99), top_k=4, group_by="subject", rerank=True)
    names = [hit.entry.subject_id or hit.entry.entry_id for hit in grouped.hits]
    assert names[0] == "p1" and len(set(names)) == len(names) == 4
    few = client.search(crowd, jpeg(1, 99), top_k=50, rerank=True, min_similarity=0.9)
    assert {hit.entry.subject_id for hit in few.hits} == {"p1"} and len(few.hits) == 9
    tight = client.search(crowd, jpeg(0, 99), top_k=5, group_by="subject", rerank=Rerank(candidates=5))
    assert len(tight.hits) == 5  # further groups join the candidates


def test_fields_out_of_range_are_named(client, crowd):
    for how, field in (
        (Rerank(candidates=1001), "reranking.candidates"),
        (Rerank(candidates=5), "reranking.candidates"),  # fewer than top_k
        (Rerank(k1=-1), "reranking.k1"),
        (Rerank(k2=5000), "reranking.k2"),
        (Rerank(weight=1.5), "reranking.lambda"),
        (Rerank(weight=float("nan")), "reranking.lambda"),
    ):
        with pytest.raises(InputError) as refused:
            client.search(crowd, jpeg(1), rerank=how)
        assert refused.value.field == field
    for more, field in (({"min_revision": -1}, "min_revision"), ({"min_probability": 1.1}, "min_probability")):
        with pytest.raises(InputError) as refused:
            client.search(crowd, jpeg(1), **more)
        assert refused.value.field == field
    with pytest.raises(LimitError):
        client.search(crowd, jpeg(1), top_k=1001, group_by="subject")
    assert client.info().limits["max_rerank_candidates"] == 1000


def test_a_space_without_calibration_has_no_probabilities(client, crowd):
    answer = client.search(crowd, jpeg(1), top_k=2)
    assert answer.decision is None and all((hit.probability, hit.decision) == (None, None) for hit in answer.hits)
    with pytest.raises(UncalibratedError):
        client.search(crowd, jpeg(1), min_probability=0.5)
    found = client.search_batch(crowd, [Query(jpeg(1), 1), Query(jpeg(1), 1, min_probability=0.5)])
    assert found[0].hits and type(found[1]) is UncalibratedError


def test_a_search_waits_for_a_revision_until_its_deadline(client, collection, address):
    client.enrol(collection, NewEntry(jpeg(1), "first"))
    reached = client.collection(collection).revision
    assert client.search(collection, jpeg(1), min_revision=reached).revision >= reached

    def later():
        time.sleep(0.4)
        with Client(address) as own:
            for number in itertools.count():
                if own.collection(collection).revision >= reached + 1:
                    return
                own.enrol(collection, NewEntry(jpeg(2, number), f"late{number}"))

    thread = threading.Thread(target=later)
    thread.start()
    answer = client.search(collection, jpeg(2), min_revision=reached + 1)
    thread.join(20)
    assert "late0" in {hit.entry.entry_id for hit in answer.hits}
    with Client(address, timeout_s=0.8) as impatient, pytest.raises(RevisionNotSearchableError) as refused:
        impatient.search(collection, jpeg(1), min_revision=10**9)
    assert refused.value.facts["min_revision"] == str(10**9) and int(refused.value.facts["revision"]) > reached


def test_the_response_says_whether_the_search_was_exact(client, crowd):
    assert client.search(crowd, jpeg(1), exact=True).exact


def test_undecodable_shots_of_a_track_are_left_out(client, crowd):
    answer = client.search(crowd, [jpeg(1, 90), b"no picture", jpeg(1, 91)], top_k=3)
    assert (answer.shots_used, answer.shots_rejected) == (2, 1)
    assert {hit.entry.subject_id for hit in answer.hits} == {"p1"}
    with pytest.raises(ImageUndecodableError) as refused:
        client.search(crowd, [b"x", b"y"])
    assert refused.value.field == "shots.images[0].data"
    assert client.search(crowd, jpeg(1, 90), top_k=1).shots_used == 1


def test_a_foreign_shot_of_a_track_is_left_out(client, crowd):
    shots = [jpeg(1, 80 + number) for number in range(7)]
    answer = client.search(crowd, [*shots[:4], jpeg(40), *shots[4:]], top_k=5)
    clean = client.search(crowd, shots, top_k=5)
    assert (answer.shots_used, answer.shots_rejected) == (7, 1)
    assert [(hit.entry, hit.similarity) for hit in answer.hits] == [(hit.entry, hit.similarity) for hit in clean.hits]
    entry = client.enrol(crowd, NewEntry([*shots, jpeg(40)], "tracked"))
    assert entry.shot_count == 7


def test_two_sets_of_crops_are_compared(client, collection):
    same = client.verify(collection, jpeg(1, 0), [jpeg(1, 1), jpeg(1, 2)])
    other = client.verify(collection, [jpeg(1, 0)], jpeg(2, 1))
    expected = features_by_hand([jpeg(1, 0), jpeg(2, 1)])
    assert abs(other.similarity - float(expected[0] @ expected[1])) < 1e-4
    assert same.similarity > 0.9 > other.similarity and (same.probability, same.decision) == (None, None)
    assert 0 < same.left_quality <= 1 and 0 < same.right_quality <= 1
    with pytest.raises(ImageUndecodableError) as refused:
        client.verify(collection, jpeg(1), b"x")
    assert refused.value.field == "right.images[0].data"
    with pytest.raises(LimitError) as refused:
        client.verify(collection, [], jpeg(1))
    assert refused.value.field == "left.images"
    with pytest.raises(CollectionNotFoundError):
        client.verify("nowhere", jpeg(1), jpeg(1))
