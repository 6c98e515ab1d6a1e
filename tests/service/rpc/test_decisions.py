"""A server whose bundle has a calibration: probabilities, decisions, and a collection's own thresholds."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from serving import ServerProcess, jpeg, make_bundle

from resight.calibration import Calibration
from resight.client import Client, CollectionChange, NewEntry
from resight.errors import InputError

CURVE = Calibration(0.5, 10.0, 0.95, 0.05, 0.001, 0.05, 100, 100, "tests", "tests", 0.01)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder: Path = tmp_path_factory.mktemp("calibrated")
    process = ServerProcess(make_bundle(folder / "tiny", calibration=CURVE).path, folder / "data")
    try:
        with Client(process.wait_ready()) as client:
            client.create_collection("lobby", unlimited_retention=True)
            client.enrol_batch(
                "lobby", [NewEntry(jpeg(p, s), f"{p}-{s}", f"p{p}") for p in range(12) for s in range(2)]
            )
            yield client
    finally:
        assert process.end() == 0, process.log.read_text()


def expected(similarity: float, accept: float = CURVE.accept, reject: float = CURVE.reject) -> str:
    probability = float(CURVE.probability(similarity))
    return "match" if probability >= accept else "uncertain" if probability >= reject else "unknown"


def test_every_hit_has_a_probability_and_a_decision(calibrated):
    answer = calibrated.search("lobby", jpeg(3, 9), top_k=24)
    for hit in answer.hits:
        assert abs(hit.probability - float(CURVE.probability(hit.similarity))) < 1e-5
        assert hit.decision == expected(hit.similarity)
    assert len({hit.decision for hit in answer.hits}) == 3 and answer.decision == "match"
    assert {hit.entry.subject_id for hit in answer.hits if hit.decision == "match"} == {"p3"}


def test_a_stranger_is_unknown(calibrated):
    for answer in (
        calibrated.search("lobby", jpeg(99), top_k=3),
        calibrated.search("lobby", jpeg(3), min_similarity=1.0, top_k=1),
    ):
        assert answer.decision == (expected(answer.hits[0].similarity) if answer.hits else "unknown")
    calibrated.create_collection("empty", unlimited_retention=True)
    assert calibrated.search("empty", jpeg(3)).decision == "unknown"


def test_hits_are_filtered_by_min_probability(calibrated):
    everyone = calibrated.search("lobby", jpeg(3, 9), top_k=24).hits
    for hit in everyone:
        kept = calibrated.search("lobby", jpeg(3, 9), top_k=24, min_probability=hit.probability).hits
        assert [one.entry.entry_id for one in kept] == [
            one.entry.entry_id for one in everyone if np.float32(one.probability) >= np.float32(hit.probability)
        ]
    reordered = calibrated.search("lobby", jpeg(3, 9), top_k=24, min_probability=0.95, rerank=True).hits
    assert {one.entry.subject_id for one in reordered} == {"p3"}
    assert len(calibrated.search("lobby", jpeg(3, 9), top_k=24, min_probability=0.0).hits) == 24


def test_verification_has_a_decision(calibrated):
    same, other = calibrated.verify("lobby", jpeg(3), jpeg(3, 1)), calibrated.verify("lobby", jpeg(3), jpeg(4))
    assert same.decision == "match" and other.decision == expected(other.similarity) != "match"
    assert abs(same.probability - float(CURVE.probability(same.similarity))) < 1e-5


def test_a_collection_has_its_own_thresholds(calibrated):
    made = calibrated.create_collection(
        "strict", unlimited_retention=True, accept_probability=0.999, reject_probability=0.5
    )
    calibrated.enrol_batch("strict", [NewEntry(jpeg(p, s)) for p in range(6) for s in range(2)])
    hits = calibrated.search("strict", jpeg(3, 9), top_k=12).hits
    assert [hit.decision for hit in hits] == [expected(hit.similarity, 0.999, 0.5) for hit in hits]
    assert (made.accept_probability, made.reject_probability) == (0.999, 0.5)
    changed = calibrated.update_collection("strict", CollectionChange(accept_probability=0.0, reject_probability=0.0))
    assert changed.accept_probability == 0 and changed.etag != made.etag
    assert calibrated.search("strict", jpeg(3, 9), top_k=12).hits[-1].decision == expected(hits[-1].similarity)
    for accept, reject in (
        (0.01, 0.0),
        (0.5, 0.6),
        (0.0, 0.99),
    ):  # accept below the calibration's reject 0.05; reject above its accept 0.95
        with pytest.raises(InputError, match="reject_probability"):
            calibrated.update_collection(
                "strict", CollectionChange(accept_probability=accept, reject_probability=reject)
            )


def test_shots_of_another_person_are_rejected_by_the_reject_threshold(calibrated):
    answer = calibrated.search("lobby", [jpeg(3, 7), jpeg(99), jpeg(3, 8)], top_k=1)
    assert (answer.shots_used, answer.shots_rejected) == (2, 1)
    pair = calibrated.search("lobby", [jpeg(3, 7), jpeg(99)], top_k=1)  # of two there is no majority
    assert (pair.shots_used, pair.shots_rejected) == (2, 0)
