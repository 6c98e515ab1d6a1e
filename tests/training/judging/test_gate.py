"""The gate: losses that refuse a candidate despite a gain on the site."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from references_judge import people_features, people_store

from resight.arrays import Floats
from resight.training.clustering.cluster import ClusterSettings, try_cluster
from resight.training.curation.hygiene import Hygiene
from resight.training.judging.agreement import LinkedCrops
from resight.training.judging.gate import ModelPair, compare, gate
from resight.training.judging.judge import ModelJudgement, judge
from resight.training.judging.latency import Latency
from resight.training.store.crops import CropStore
from resight.training.store.datasets import Site, held_out_crops

SETTINGS = ClusterSettings(k1=12, k2=3)
SOUND = Hygiene({}, (), {}, 0.01)


@pytest.fixture(scope="module")
def store() -> CropStore:
    return people_store(persons=24, cameras=3, crops=4)


def judged(
    rows: Floats, store: CropStore, *, clusters: bool = False, linked: LinkedCrops | None = None
) -> ModelJudgement:
    own = None if linked is None else (linked, rows[: len(linked.store)])
    return judge(rows, store, clustering=try_cluster(rows, store, SETTINGS) if clusters else None, linked=own)


def model_pair(store: CropStore, before: float, after: float, **more: LinkedCrops) -> ModelPair:
    """Two models with different amounts of noise."""
    return ModelPair(*(judged(people_features(store, spread=spread), store, **more) for spread in (before, after)))


def links(store: CropStore) -> LinkedCrops:
    """Pairs of the first 96 crops, half of them of one person."""
    rng = np.random.default_rng(0)
    rows = np.unique(np.sort(rng.integers(96, size=(2000, 2)), axis=1), axis=0)
    rows = rows[rows[:, 0] != rows[:, 1]]
    same = store.persons[rows[:, 0]] == store.persons[rows[:, 1]]
    kept = np.concatenate([np.flatnonzero(same)[:60], np.flatnonzero(~same)[:60]])
    return LinkedCrops(store.subset(np.arange(96)), rows[kept], same[kept])


def test_a_better_candidate_on_sound_crops_is_promoted(store: CropStore) -> None:
    site = model_pair(store, 1.6, 0.7)
    latency = Latency(0.01, 0.012, 1.2, 1.1, 1.3, limit=1.5)
    verdict = gate(site, reference=model_pair(store, 1.5, 0.9), hygiene={"crops judged on": SOUND}, latency=latency)
    assert verdict.decision == "promote" and verdict.evidence == "tracks"
    names = set(verdict.differences)
    assert {"auc", "reference.auc", "searches.tpir_at_fpir_0.1", "reference.cameras.cam2.auc"} <= names
    json.dumps(verdict.to_json(), allow_nan=False)
    assert compare(site.before, site.after).decision == "promote"


def test_a_loss_on_earlier_nights_refuses(store: CropStore) -> None:
    verdict = gate(model_pair(store, 1.6, 0.7), reference=model_pair(store, 0.7, 1.6))
    assert (verdict.decision, verdict.evidence) == ("refuse", "reference")
    assert verdict.reasons[0].startswith("worse in reference.auc: -0.")


def test_a_loss_in_one_camera_refuses_despite_a_gain_of_the_site(store: CropStore) -> None:
    before, better = people_features(store, spread=1.6), people_features(store, spread=0.4)
    noise = people_features(replace(store, persons=np.arange(len(store))), spread=0.1, seed=3)
    after = np.where((store.cameras == 1)[:, None], noise, better)
    verdict = gate(ModelPair(judged(before, store), judged(after, store)))
    assert (verdict.decision, verdict.evidence) == ("refuse", "cameras")
    assert "worse in cameras.cam1.auc" in verdict.reasons[0]
    assert all("cam0" not in words for words in verdict.reasons)


def test_labelled_pairs_refuse_and_promote(store: CropStore) -> None:
    linked = links(store)
    down = gate(model_pair(store, 0.5, 2.2, linked=linked))
    assert down.decision == "refuse" and any(words.startswith("worse in links.auc") for words in down.reasons)
    trackless = replace(store, tracks=np.full(len(store), -1))
    up = gate(model_pair(trackless, 2.2, 0.5, linked=linked))
    assert (up.decision, up.evidence) == ("promote", "links") and "links.auc" in up.reasons[0]
    assert "links.accuracy" not in up.differences  # without tracks there is no threshold
    level = gate(model_pair(trackless, 1.0, 1.0, linked=linked))
    assert level.decision == "undecided"


def test_searches_alone_refuse(store: CropStore) -> None:
    site = model_pair(store, 0.8, 0.8)
    worse = judged(people_features(store, spread=2.5), store).searches
    verdict = gate(replace(site, after=replace(site.after, searches=worse)))
    assert (verdict.decision, verdict.evidence) == ("refuse", "searches")


def test_unsound_crops_refuse_the_best_candidate(store: CropStore) -> None:
    dead = Hygiene({"cam1": "its crops are noise"}, (), {}, None)
    verdict = gate(model_pair(store, 1.6, 0.7), hygiene={"crops judged on": SOUND, "crops adapted to": dead})
    assert (verdict.decision, verdict.evidence) == ("refuse", "crops")
    assert verdict.reasons[0] == "crops adapted to: camera cam1: its crops are noise"


def test_a_slower_candidate_is_refused_only_beyond_the_limit(store: CropStore) -> None:
    site = model_pair(store, 1.6, 0.7)
    for low, limit, decision in ((1.9, 1.5, "refuse"), (1.4, 1.5, "promote"), (1.9, None, "promote")):
        assert gate(site, latency=Latency(0.01, 0.02, 2.0, low, 2.1, limit)).decision == decision


def test_a_collapse_of_the_active_model_may_be_due_to_the_crops(store: CropStore) -> None:
    trackless = replace(store, tracks=np.full(len(store), -1))
    good = judged(people_features(store, spread=0.5), trackless)
    collapsed = replace(good, collapse="all crops fell into one cluster")
    site = ModelPair(collapsed, good)
    assert compare(site.before, site.after).decision == "promote"
    alone = gate(site)
    assert alone.decision == "refuse" and "one person on most crops" in alone.reasons[0]
    tracked = ModelPair(
        replace(judged(people_features(store, spread=1.0), store), collapse="one cluster"),
        model_pair(store, 1, 0.5).after,
    )
    assert gate(tracked).decision == "promote"  # tracks show that there are several people
    elsewhere = gate(tracked, reference=model_pair(store, 1.0, 0.9))
    assert elsewhere.decision == "refuse" and "many on the reference crops" in elsewhere.reasons[0]


def test_crops_of_one_person_are_detected_by_the_active_models_variance(store: CropStore) -> None:
    alone = replace(store, persons=np.zeros(len(store), np.int64))
    one = ModelPair(*(judged(people_features(alone, spread=spread), store) for spread in (0.6, 0.5)))
    verdict = gate(one, reference=model_pair(store, 0.6, 0.5))
    assert (verdict.decision, verdict.evidence) == ("refuse", "crops")
    assert "as alike as crops of one person" in verdict.reasons[0]
    assert "one person" not in "".join(gate(model_pair(store, 0.6, 0.5), reference=model_pair(store, 0.6, 0.5)).reasons)


def test_with_few_held_out_tracks_the_crops_adapted_to_decide(store: CropStore) -> None:
    few = people_store(persons=3, cameras=3, crops=4)
    held = model_pair(few, 1.0, 0.9)
    assert gate(held).decision == "undecided" and not held.after.separation.figures
    up, down = gate(held, adapted=model_pair(store, 1.6, 0.7)), gate(held, adapted=model_pair(store, 0.7, 1.6))
    assert (up.decision, up.evidence, down.decision, down.evidence) == ("promote", "adapted", "refuse", "adapted")
    assert up.reasons[0].startswith("better in adapted.auc +0.") and "worse in auc" in down.reasons[0]
    assert gate(held, adapted=model_pair(store, 1.0, 1.0)).decision == "undecided"
    assert gate(held, adapted=model_pair(store, 1.6, 0.7), reference=model_pair(store, 0.7, 1.6)).decision == "refuse"
    clustered = ModelPair(*(judged(people_features(few, spread=spread), few, clusters=True) for spread in (1.2, 0.2)))
    assert gate(clustered).evidence == "clusters" and gate(clustered).decision == "promote"
    assert gate(clustered, adapted=model_pair(store, 0.7, 1.6)).decision == "refuse"


def test_one_person_in_overlapping_tracks_is_detected_if_nothing_improved(store: CropStore) -> None:
    doubles = replace(store, persons=np.where(store.persons < 10, 0, store.persons))
    rows = people_features(doubles, spread=0.3)
    same = ModelPair(*(judged(rows, store, clusters=True) for _ in range(2)))
    verdict = gate(same)
    assert (verdict.decision, verdict.evidence) == ("refuse", "crops")
    assert "look like one person to the active model" in verdict.reasons[0]
    assert gate(ModelPair(same.before, judged(people_features(store, spread=0.3), store))).decision == "promote"
    sound = judged(people_features(store, spread=0.3), store, clusters=True)
    assert gate(ModelPair(sound, sound)).decision == "undecided"


def test_a_gain_on_earlier_nights_promotes_if_the_site_is_undecided(store: CropStore) -> None:
    verdict = gate(model_pair(store, 0.9, 0.9), reference=model_pair(store, 1.6, 0.7))
    assert (verdict.decision, verdict.evidence) == ("promote", "reference")


def test_held_out_tracks_are_a_gallery_without_queries(store: CropStore) -> None:
    back = store.subset(np.arange(40))
    assert held_out_crops(Site(store.root, store, None, back)) is back
    assert (
        held_out_crops(Site(store.root, store, back, back)) is None and held_out_crops(Site(store.root, store)) is None
    )
