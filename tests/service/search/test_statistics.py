"""Search statistics of a real server compared with loops; over restarts, several spaces and a full reference."""

import asyncio
import signal
from datetime import UTC, datetime, timedelta

import grpc
import numpy as np
import pytest
from serving import ServerProcess, features_by_hand, jpeg, make_bundle
from stores import SPACE, create_collection, open_gallery

from resight.calibration import Calibration
from resight.client import Client, NewEntry, Query
from resight.errors import CollectionNotFoundError, InputError
from resight.service.records import EntryRecord, Hit, now_us
from resight.service.search import statistics as statistics_module
from resight.service.search.ranking import RankedResult, ScoredHit
from resight.service.search.statistics import (
    MIN_HITS,
    MINUTE_US,
    RECENT_HITS,
    REFERENCE_HITS,
    SearchCounts,
    StatisticsRecorder,
    bin_of,
    stability_index,
)
from resight.service.storage import writes
from resight.v1 import admin_pb2, admin_pb2_grpc

CURVE = Calibration(0.5, 10.0, 0.95, 0.3, 0.001, 0.05, 100, 100, "tests", "tests", 0.01)
ENROLLED = [jpeg(p, s) for p in range(8) for s in range(2)]
QUERIES = [jpeg(p, 5) for p in (*range(6), *range(100, 112))]


@pytest.fixture
def root(tmp_path):
    for seed, name in enumerate(("a", "b")):
        make_bundle(tmp_path / "models" / name, seed=seed, calibration=CURVE)
    return tmp_path / "models"


def start(root, tmp_path) -> ServerProcess:
    return ServerProcess(root / "a", tmp_path / "data", "--models", str(root))


def expected_statistics(seed: int) -> dict[str, object]:
    """Statistics of the searches for `QUERIES`, with loops over the model's features."""
    gallery, best = features_by_hand(ENROLLED, seed), []
    for query in features_by_hand(QUERIES, seed):
        best.append(max(float(query @ entry) for entry in gallery))
    probable = [float(CURVE.probability(cosine)) for cosine in best]
    counts = [0] * 64
    for cosine in best:
        counts[bin_of(cosine)] += 1
    unknown = sum(p < CURVE.reject for p in probable)
    return {
        "searches": len(QUERIES),
        "matches": sum(p >= CURVE.accept for p in probable),
        "unknown": unknown,
        "unknown_share": pytest.approx(unknown / len(QUERIES)),
        "mean_cosine": pytest.approx(np.mean(best), abs=1e-5),
        "mean_probability": pytest.approx(np.mean(probable), abs=1e-4),
        "cosine_histogram": tuple(counts),
        "reference_searches": len(QUERIES),
    }


def assert_statistics(stats, expected: dict[str, object]) -> None:
    for name, value in expected.items():
        assert getattr(stats, name) == value, name


def test_each_space_is_counted_and_nothing_is_lost_in_a_restart(root, tmp_path):
    first = start(root, tmp_path)
    with Client(first.wait_ready()) as client:
        client.create_collection("lobby", unlimited_retention=True, keep_crops=True)
        client.enrol_batch("lobby", [NewEntry(crop) for crop in ENROLLED])
        assert client.search_statistics("lobby") == []
        begun = datetime.now(UTC)
        for crop in QUERIES[:3]:
            client.search("lobby", crop)
        client.search_batch("lobby", [Query(crop) for crop in QUERIES[3:9]])
        list(client.stream_search("lobby", [Query(crop) for crop in QUERIES[9:]]))
        old = client.collection("lobby").space_id
        (before,) = client.search_statistics("lobby")
        assert_statistics(
            before, expected_statistics(0) | {"space_id": old, "model_id": "tiny-0", "active": True, "without_hit": 0}
        )
        assert before.unknown > 0 and before.matches > 0 and before.drift_index is None  # too few to tell
        assert begun <= before.first_time <= before.last_time <= datetime.now(UTC)
        client.wait(client.load_model("b"))
        client.wait(client.migrate("lobby", "b", auto_activate=True))
        for crop in QUERIES:
            client.search("lobby", crop)
        client.search("lobby", QUERIES[0], min_similarity=1.0)  # cut off, so without any hit
        kept = client.search_statistics("lobby")
        was, now = kept
        new = client.collection("lobby").space_id
        assert was == before.__class__(**(vars(before) | {"active": False}))
        expected = expected_statistics(1)
        unknown = now.unknown
        assert (now.searches, now.without_hit, now.space_id) == (len(QUERIES) + 1, 1, new)
        assert unknown == expected["unknown"] + 1 and now.unknown_share == pytest.approx(unknown / now.searches)
        assert now.mean_cosine == expected["mean_cosine"] and now.cosine_histogram == expected["cosine_histogram"]
    assert first.end() == 0
    second = start(root, tmp_path)
    with Client(second.wait_ready()) as client:
        assert client.search_statistics("lobby") == kept
        assert client.search_statistics("lobby", space_id=old) == [was]
        later = datetime.now(UTC) + timedelta(minutes=2)
        assert client.search_statistics("lobby", start=later) == []
        assert client.search_statistics("lobby", space_id="ff" * 16) == []
        assert client.search_statistics("lobby", start=begun, end=later) == kept
        with pytest.warns(DeprecationWarning, match="use search_statistics"):
            assert client.search_figures("lobby", start=begun, end=later) == kept
        with grpc.insecure_channel(client.address) as channel:  # the deprecated method
            request = admin_pb2.GetSearchFiguresRequest(collection_id="lobby")
            response = admin_pb2_grpc.AdminServiceStub(channel).GetSearchFigures(request)
        assert [one.searches for one in response.figures] == [one.searches for one in kept]
        client.search("lobby", QUERIES[0])
        assert client.search_statistics("lobby", space_id=new)[0].searches == now.searches + 1  # which writes it
        with pytest.raises(CollectionNotFoundError):
            client.search_statistics("nowhere")
        with pytest.raises(InputError, match="end_time"):
            client.search_statistics("lobby", start=later, end=begun)
        assert second.end(signal.SIGKILL) == -signal.SIGKILL
    third = start(root, tmp_path)
    with Client(third.wait_ready()) as client:
        assert client.search_statistics("lobby", space_id=new)[0].searches == now.searches + 1
        client.delete_collection("lobby", force=True)
        client.create_collection("lobby", unlimited_retention=True)
        assert client.search_statistics("lobby") == []  # of the same name, not the same
    assert third.end() == 0, third.log.read_text()


def result_with(cosine: float) -> RankedResult:
    hit = ScoredHit(Hit(EntryRecord("e"), cosine), None, None, cosine)
    return RankedResult((hit,), None, 1, True, 0)


def counted(cosines, minute: int) -> SearchCounts:
    whole = SearchCounts()
    for cosine in cosines:
        whole.add(result_with(float(cosine)), minute * MINUTE_US)
    return whole


def test_drift_compares_the_newest_hits_with_the_first_and_survives_restarts(tmp_path):
    rng, now = np.random.default_rng(0), now_us() // MINUTE_US
    parts = [rng.normal(0.7, 0.05, 400) for _ in range(3)]  # the third fills the reference, and counts whole
    parts += [rng.normal(0.7, 0.05, 50), rng.normal(0.6, 0.05, 600), rng.normal(0.6, 0.05, 600)]

    async def body(store) -> None:
        lobby = await create_collection(store)
        place = (lobby.key, SPACE.space_id)
        statistics = StatisticsRecorder(store)
        for number, part in enumerate(parts):
            drifts = await store.write_unchecked(
                statistics_module.write_counts, {(place, now - 10 + number): counted(part, now)}
            )
            if number < 4:
                assert drifts == {}  # the reference is not full, or fewer than enough came after it
        assert (
            sum(map(len, parts[:3])) >= REFERENCE_HITS
            and len(parts[3]) < MIN_HITS
            and sum(map(len, parts[4:])) >= RECENT_HITS
        )
        reference = counted(np.concatenate(parts[:3]), now)
        late = counted(np.concatenate(parts[4:]), now)
        expected = stability_index(reference.bins, late.bins), late.cosine_sum / late.hits - reference.cosine_sum / 1200
        assert drifts[place] == pytest.approx(expected) and expected[0] > 0.25
        statistics.record(lobby, [result_with(0.6)])
        assert statistics.drift(lobby) is None
        await statistics.stop()
        assert statistics.drift(lobby)[0] > 0.25
        (stats,) = await statistics.window_stats(lobby)
        assert (stats.counts.searches, stats.reference.hits) == (sum(map(len, parts)) + 1, 1200)
        window = ((now - 7) * MINUTE_US, (now - 6) * MINUTE_US)
        (stats,) = await statistics.window_stats(
            lobby, window=window, reference=((now - 10) * MINUTE_US, (now - 9) * MINUTE_US)
        )
        assert (stats.counts.hits, stats.reference.hits) == (50, 400)

    with open_gallery(tmp_path) as store:
        asyncio.run(body(store))


def test_minutes_are_summed_kept_for_a_month_and_deleted_with_their_collection(tmp_path):
    async def body(store) -> None:
        lobby = await create_collection(store)
        place, now = (lobby.key, SPACE.space_id), now_us() // MINUTE_US
        for minute in (now - 31 * 1440, now - 29 * 1440, now, now):
            await store.write_unchecked(statistics_module.write_counts, {(place, minute): counted((0.5, 0.9), minute)})
        assert await store.write_unchecked(statistics_module.purge_counts) == 1
        statistics = StatisticsRecorder(store)
        (stats,) = await statistics.window_stats(lobby)
        assert (stats.counts.searches, stats.reference.hits) == (6, 8)
        assert stats.counts.cosine_sum == pytest.approx(4.2) and stats.counts.bins.sum() == 6
        await store.erase(writes.delete_collection, "lobby", force=True)
        statistics.record(lobby, [result_with(0.5)])
        await statistics.flush()  # nothing is there to be written to, and nothing fails
        counts = "SELECT (SELECT count(*) FROM search_minute) + (SELECT count(*) FROM search_reference)"
        assert await store.read(lambda c: c.execute(counts).fetchone()[0]) == 0

    with open_gallery(tmp_path) as store:
        asyncio.run(body(store))


def test_failed_writes_are_retried_and_cancelled_flushes_lose_nothing(tmp_path):
    async def body(store) -> None:
        lobby, statistics = await create_collection(store), StatisticsRecorder(store)
        statistics.record(lobby, [result_with(0.5)])
        leaving = asyncio.create_task(statistics.flush())
        await asyncio.sleep(0)
        leaving.cancel()
        (stats,) = await statistics.window_stats(lobby)
        assert stats.counts.searches == 1
        statistics.record(lobby, [result_with(0.5)])
        await store.write_unchecked(lambda c: c.execute("ALTER TABLE search_minute RENAME TO away") and None)
        await statistics.flush()  # refused
        statistics.record(lobby, [result_with(0.5)])
        await store.write_unchecked(lambda c: c.execute("ALTER TABLE away RENAME TO search_minute") and None)
        (stats,) = await statistics.window_stats(lobby)
        assert stats.counts.searches == 3

    with open_gallery(tmp_path) as store:
        asyncio.run(body(store))
