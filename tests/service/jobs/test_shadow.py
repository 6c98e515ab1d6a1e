"""A candidate model shadows the active one: statistics against a reference, limits, and behaviour under overload."""

import json
import signal
import threading
import time
import urllib.request
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from serving import ServerProcess, features_by_hand, jpeg, make_bundle

from resight.calibration import Calibration
from resight.client import Client, EntryId, GivenFeature, NewEntry, Query, Shadow, Where
from resight.errors import (
    ConflictError,
    InputError,
    ModelInUseError,
    ModelNotFoundError,
    ShadowNotFoundError,
    SpaceMismatchError,
)

pytestmark = pytest.mark.long

CURVES = (
    Calibration(0.5, 10.0, 0.95, 0.3, 0.001, 0.05, 100, 100, "tests", "tests", 0.01),
    Calibration(0.6, 12.0, 0.9, 0.4, 0.001, 0.05, 100, 100, "tests", "tests", 0.01),
)
ENTRIES = [(person, shot) for person in range(8) for shot in range(3)]
ENROLLED = [jpeg(*entry) for entry in ENTRIES]
QUERY_CROPS = [jpeg(p, 5) for p in (*range(6), *range(100, 114))]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("a", "b", "c")):
        make_bundle(folder / name, seed=seed, calibration=CURVES[seed % 2])
    return folder


def start(root, data, **env) -> ServerProcess:
    return ServerProcess(root / "a", data, "--models", str(root), "--metrics", "127.0.0.1:0", **env)


def filled(client: Client, name: str) -> None:
    """Half of the people have a subject id."""
    client.create_collection(name, unlimited_retention=True, keep_crops=True)
    entries = [
        NewEntry(
            crop, f"{person}-{shot}", f"p{person}" if person % 2 else "", camera_id=f"c{shot}", track_id=str(person)
        )
        for crop, (person, shot) in zip(ENROLLED, ENTRIES, strict=True)
    ]
    client.enrol_batch(name, entries)


@pytest.fixture(scope="module")
def server(root, tmp_path_factory):
    """A server with ``a`` active, ``b`` and ``c`` loaded, and ``lobby`` and ``hall`` migrated to ``b``."""
    process = start(root, tmp_path_factory.mktemp("shadowed") / "data")
    try:
        with Client(process.wait_ready()) as client:
            for model in ("b", "c"):
                client.wait(client.load_model(model))
            for name in ("lobby", "hall"):
                filled(client, name)
                client.wait(client.migrate(name, "b"))
        yield process
    finally:
        assert process.end() == 0, process.log.read_text()


@pytest.fixture
def client(server):
    with Client(server.wait_ready(), timeout_s=30) as made:
        yield made


def until(client: Client, name: str, done) -> Shadow:
    """Wait until ``done`` is true of the shadow; returns it."""
    for _ in range(3000):
        if done(now := client.get_shadow(name)):
            return now
        time.sleep(0.01)
    raise AssertionError(now)


def settled(now: Shadow) -> bool:
    """Whether every sample was answered, dropped or failed."""
    figures = now.figures
    return figures.sampled == figures.answered + figures.dropped + figures.failed


def search_each(client: Client, name: str, crops, **how) -> None:
    """Search one crop after the other, waiting for the shadow each time, so that no sample is dropped."""
    for crop in crops:
        client.search(name, crop, **how)
        until(client, name, settled)


def reference_search(query: bytes, seed: int, top_k: int = 10) -> tuple[list[int], float, str]:
    """The entries of one search, best first, the best cosine, and the decision."""
    cosines = [float(features_by_hand([query], seed)[0] @ entry) for entry in features_by_hand(ENROLLED, seed)]
    order = sorted(range(len(cosines)), key=lambda number: -cosines[number])[:top_k]
    curve = CURVES[seed]
    probability = float(curve.probability(cosines[order[0]]))
    decision = "match" if probability >= curve.accept else "uncertain" if probability >= curve.reject else "unknown"
    return order, cosines[order[0]], decision


def reference_same_top1(one: int, other: int) -> bool:
    person, second = ENTRIES[one][0], ENTRIES[other][0]
    return person == second if person % 2 and second % 2 else one == other


def test_statistics_equal_those_of_loops_over_both_spaces(client):
    begun = client.start_shadow("lobby", "b")
    assert (begun.state, begun.sample, begun.active_model_id, begun.model_id) == ("running", 1.0, "a", "b")
    assert begun.space_id == client.model("b").space_id and begun.active_space_id == client.model("a").space_id
    search_each(client, "lobby", QUERY_CROPS)
    pairs = [(reference_search(crop, 0), reference_search(crop, 1)) for crop in QUERY_CROPS]
    shadow = client.stop_shadow("lobby")
    figures, count = shadow.figures, len(QUERY_CROPS)
    assert (figures.offered, figures.sampled, figures.answered, figures.dropped, figures.failed) == (
        *3 * (count,),
        0,
        0,
    )
    same = sum(reference_same_top1(a[0][0], b[0][0]) for a, b in pairs)
    assert 0 < same < count and figures.top1_agreement == pytest.approx(same / count)
    overlaps = [len(set(a[0]) & set(b[0])) / 10 for a, b in pairs]
    assert 0 < np.mean(overlaps) < 1 and figures.overlap_at_10 == pytest.approx(np.mean(overlaps))
    assert figures.decision_agreement == pytest.approx(sum(a[2] == b[2] for a, b in pairs) / count)
    assert figures.cosine_shift == pytest.approx(np.mean([b[1] - a[1] for a, b in pairs]), abs=1e-5)
    for side, seed in ((figures.active, 0), (figures.candidate, 1)):
        found = [pair[seed] for pair in pairs]
        unknown = sum(decision == "unknown" for _, _, decision in found)
        assert (side.matches, side.unknown) == (sum(decision == "match" for _, _, decision in found), unknown)
        assert side.unknown > 0 and side.unknown_share == pytest.approx(unknown / count) and side.without_hit == 0
        assert side.mean_cosine == pytest.approx(np.mean([cosine for _, cosine, _ in found]), abs=1e-5)
        probable = [float(CURVES[seed].probability(cosine)) for _, cosine, _ in found]
        assert side.mean_probability == pytest.approx(np.mean(probable), abs=1e-4)
        assert side.measured == count / 4  # every fourth was searched with both models
        for p50, p95 in (
            (side.infer_p50_ns, side.infer_p95_ns),
            (side.search_p50_ns, side.search_p95_ns),
            (side.total_p50_ns, side.total_p95_ns),
        ):
            assert 0 < p50 <= p95
    assert figures.active.measured == figures.candidate.measured
    assert shadow.state == "stopped" and shadow.started <= shadow.ended <= datetime.now(UTC)
    assert client.get_shadow("lobby") == shadow  # now read from the operation
    done = client.wait(client.operation(shadow.operation_id))
    assert (done.kind, done.state, done.succeeded, done.total) == ("shadow", "cancelled", count, count)


def test_only_searches_by_crop_are_sampled_with_their_parameters(client):
    client.start_shadow("lobby", "b")
    feature = client.get_feature("lobby", "1-1")
    client.search("lobby", GivenFeature(feature.vector, feature.space_id))
    client.search("lobby", EntryId("1-1"))
    assert client.get_shadow("lobby").figures.offered == 0
    only = Where(exclude_camera_ids=["c0", "c1"])
    client.search("lobby", [QUERY_CROPS[0], jpeg(0, 6)], where=only, top_k=2)  # a track
    until(client, "lobby", lambda now: now.figures.answered == 1)
    client.search_batch("lobby", [Query(crop, top_k=1, group_by="subject") for crop in QUERY_CROPS[:3]])
    list(client.stream_search("lobby", [Query(crop, min_similarity=1.0) for crop in QUERY_CROPS[:2]]))
    now = until(client, "lobby", settled)
    assert (now.figures.offered, now.figures.answered, now.figures.failed) == (6, 6, 0)
    assert now.figures.active.without_hit == now.figures.candidate.without_hit == 2
    searched = client.search_figures("lobby", space_id=now.space_id)
    assert searched == []  # the shadow's searches are not counted
    client.stop_shadow("lobby")


def test_the_sampling_rate_and_the_end_states_of_a_shadow(client):
    client.start_shadow("lobby", "b", sample=0.3, max_searches=8)
    for crop in QUERY_CROPS * 6:
        client.search("lobby", crop, top_k=1)
        if (now := until(client, "lobby", settled)).state != "running":
            break
    assert now.state == "done" and now.figures.answered == 8 and now.figures.offered > 8 and now.ended is not None
    client.start_shadow("lobby", "b")
    client.search_batch("lobby", [Query(crop) for crop in QUERY_CROPS])
    now = client.stop_shadow("lobby")  # while most of them wait
    assert now.figures.sampled == 20 and settled(now) and now.figures.dropped > 0
    assert client.get_shadow("lobby") == now
    begun = client.start_shadow("lobby", "b", expire_after=timedelta(hours=1))
    assert begun.figures.offered == 0 and begun.expires > begun.started
    client.search("lobby", QUERY_CROPS[0])
    again = client.start_shadow("lobby", "b", sample=0.5, expire_after=timedelta(milliseconds=300))
    assert (again.operation_id, again.started, again.sample) == (begun.operation_id, begun.started, 0.5)
    assert again.figures.offered == 1
    assert until(client, "lobby", lambda now: now.state != "running").state == "expired"
    begun = client.start_shadow("lobby", "b")
    client.search("lobby", QUERY_CROPS[0])
    for _ in range(1000):
        if (now := client.operation(begun.operation_id)).succeeded:
            break
        time.sleep(0.01)
    assert (now.state, now.total, now.succeeded) == ("running", 1, 1)
    client.cancel_operation(begun.operation_id)
    assert client.wait(client.operation(begun.operation_id)).state == "cancelled"
    assert client.get_shadow("lobby").state == "stopped"


def test_invalid_shadows_are_refused(client):
    with pytest.raises(SpaceMismatchError, match="migrate it to that model first"):
        client.start_shadow("lobby", "c")
    with pytest.raises(SpaceMismatchError, match="searched with model a already"):
        client.start_shadow("lobby", "a")
    with pytest.raises(ModelNotFoundError):
        client.start_shadow("lobby", "d")
    client.create_collection("new", unlimited_retention=True, keep_crops=True)
    client.wait(client.migrate("new", "b"))
    client.start_shadow("new", "b")
    client.delete_collection("new", force=True)
    client.create_collection("new", unlimited_retention=True)  # of the same name, never shadowed
    for call in (client.get_shadow, client.stop_shadow):
        with pytest.raises(ShadowNotFoundError, match="no model has shadowed"):
            call("new")
    for bad in ({"sample": 0.0}, {"sample": 1.1}, {"max_searches": -1}, {"expire_after": timedelta(0)}):
        with pytest.raises(InputError, match=r"expected sample|or more|must be positive"):
            client.start_shadow("lobby", "b", **bad)
    client.start_shadow("lobby", "b")
    client.wait(client.migrate("lobby", "c"))
    with pytest.raises(ConflictError, match="stop it first"):
        client.start_shadow("lobby", "c")
    with pytest.raises(ModelInUseError, match="shadow uses model b"):
        client.unload_model("b")
    client.stop_shadow("lobby")


def test_a_switch_of_the_collection_ends_the_shadow(client):
    old = client.collection("hall").space_id
    shadow = client.start_shadow("hall", "b")
    client.activate_space("hall", shadow.space_id)
    client.search("hall", QUERY_CROPS[0])
    now = client.get_shadow("hall")
    assert now.state == "superseded" and now.figures.offered == 0
    with pytest.raises(SpaceMismatchError, match="migrate it again"):  # it was retired, and may lack entries
        client.start_shadow("hall", "a")
    client.activate_space("hall", old)


def test_metrics_include_running_shadows(client, server):
    url = json.loads((server.data / "server.json").read_text())["metrics"]
    where = 'collection="lobby",model="b",'
    client.start_shadow("lobby", "b")
    before = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    search_each(client, "lobby", QUERY_CROPS[:4])
    text = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    for calls in ('resight_stage_seconds_count{stage="infer"}', "resight_searches_total{decision="):
        was, now = (
            sum(float(line.split()[-1]) for line in page.splitlines() if calls in line) for page in (before, text)
        )
        assert now - was == 4  # a shadow's searches are not counted as callers'
    samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if "resight_shadow" in line and where in line)
    assert samples[f'resight_shadow_searches_total{{{where}outcome="answered",tenant="default"}}'] == "4.0"
    figures = client.stop_shadow("lobby").figures
    assert float(samples[f'resight_shadow_overlap_at_10{{{where}tenant="default"}}']) == pytest.approx(
        figures.overlap_at_10
    )
    assert sum("resight_shadow_seconds" in line for line in samples) == 4
    after = urllib.request.urlopen(f"{url}/metrics", timeout=10).read().decode()
    assert where not in after and "resight_shadow_searches_total" in after


def test_overload_drops_shadow_searches_and_no_caller(root, tmp_path):
    server = start(root, tmp_path / "data", RESIGHT_MAX_BATCH="1")
    with Client(server.wait_ready(), timeout_s=60) as client:
        client.wait(client.load_model("b"))
        filled(client, "lobby")
        client.wait(client.migrate("lobby", "b"))
        client.start_shadow("lobby", "b")
        queries = [Query(jpeg(n, size=(192, 384))) for n in range(24)]
        failures: list[object] = []

        def load() -> None:
            with Client(server.wait_ready(), timeout_s=60) as own:
                for _ in range(4):
                    failures.extend(one for one in own.search_batch("lobby", queries) if isinstance(one, Exception))

        threads = [threading.Thread(target=load) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert failures == []
        now = until(client, "lobby", settled)
        assert now.figures.sampled == 24 * 4 * 6 and now.figures.dropped > now.figures.sampled / 2
        assert now.figures.failed == 0 and now.state == "running"
        answered = now.figures.answered
        client.search("lobby", QUERY_CROPS[0])  # it continues once the load is gone
        until(client, "lobby", lambda now: now.figures.answered == answered + 1)
    assert server.end() == 0, server.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_stop_interrupts_the_shadow_and_it_can_be_started_again(root, tmp_path, number):
    first = start(root, tmp_path / "data")
    with Client(first.wait_ready()) as client:
        client.wait(client.load_model("b"))
        filled(client, "lobby")
        client.wait(client.migrate("lobby", "b"))
        begun = client.start_shadow("lobby", "b", sample=0.75, max_searches=100)
        client.search("lobby", QUERY_CROPS[0])
    first.end(number)
    second = start(root, tmp_path / "data")
    with Client(second.wait_ready()) as client:
        shadow = client.get_shadow("lobby")
        assert shadow.state == "interrupted" and shadow.figures.offered == 0 and shadow.ended is not None
        assert (shadow.operation_id, shadow.started, shadow.sample) == (begun.operation_id, begun.started, 0.75)
        again = client.start_shadow("lobby", "b")
        assert again.state == "running" and again.operation_id != begun.operation_id
        client.search("lobby", QUERY_CROPS[0])
        assert until(client, "lobby", settled).figures.answered == 1
    assert second.end() == 0, second.log.read_text()
