"""Verdicts on candidates of known quality: each rule with its reason."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from references_judge import people_features, people_store

from resight.arrays import Floats
from resight.training.clustering.cluster import ClusterSettings, try_cluster
from resight.training.clustering.health import CameraMix
from resight.training.judging.gate import compare
from resight.training.judging.judge import ModelJudgement, judge
from resight.training.judging.separation import RESAMPLES, Estimate
from resight.training.store.crops import CropStore

SETTINGS = ClusterSettings(k1=12, k2=3)


@pytest.fixture(scope="module")
def store() -> CropStore:
    return people_store(persons=24, cameras=3, crops=4)


@pytest.fixture(scope="module")
def trackless(store: CropStore) -> CropStore:
    return replace(store, tracks=np.full(len(store), -1))


def judged(rows: Floats, store: CropStore, *, clusters: bool = True) -> ModelJudgement:
    return judge(rows, store, clustering=try_cluster(rows, store, SETTINGS) if clusters else None)


@pytest.mark.parametrize("clusters", [True, False])
def test_the_better_model_is_promoted_and_the_worse_refused(store: CropStore, clusters: bool) -> None:
    poor = judged(people_features(store, spread=1.6), store, clusters=False)
    good = judged(people_features(store, spread=0.7), store, clusters=clusters)
    up, down = compare(poor, good), compare(good, poor)
    assert (up.decision, up.evidence, down.decision, down.evidence) == ("promote", "tracks", "refuse", "tracks")
    change = up.differences["auc"]
    assert 0 < change.low < change.value < change.high
    back = down.differences["auc"]
    assert (back.value, back.low, back.high) == pytest.approx((-change.value, -change.high, -change.low))
    assert f"auc {change.value:+.4f}" in up.reasons[1] and "worse in auc" in down.reasons[0]
    json.dumps(up.to_json(), allow_nan=False)


def test_a_paired_difference_has_a_narrower_interval(store: CropStore) -> None:
    rows = people_features(store, spread=1.6)
    nearly = people_features(store, spread=1.5)
    one, other = judged(rows, store, clusters=False), judged(nearly, store, clusters=False)
    paired, alone = compare(one, other).differences["auc"], one.separation.figures["auc"]
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)
    drawn = other.separation.resampled["auc"] - one.separation.resampled["auc"]
    assert len(drawn) == RESAMPLES
    assert (paired.low, paired.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])))


def test_equal_models_are_undecided(store: CropStore) -> None:
    same = judged(people_features(store, spread=1.0), store)
    verdict = compare(same, same)
    assert (verdict.decision, verdict.evidence) == ("undecided", "tracks")
    assert verdict.differences["auc"] == Estimate(0, 0, 0)
    assert verdict.reasons[0] == "no significant difference on tracks"


def test_equal_tracks_and_better_clusters_promote(store: CropStore) -> None:
    rows = people_features(store, spread=0.02)
    across = people_features(store, spread=0.02, camera=1.2)
    verdict = compare(judged(across, store), judged(rows, store))
    assert all(change == Estimate(0, 0, 0) for change in verdict.differences.values())
    assert verdict.decision == "promote" and "its clusters improved" in verdict.reasons[0]
    assert compare(judged(rows, store), judged(across, store)).decision == "undecided"


def test_clusters_split_by_camera_prevent_a_promotion(store: CropStore) -> None:
    before = judged(people_features(store, spread=1.1), store)
    after = judged(people_features(store, spread=0.1, camera=3.0), store)
    verdict = compare(before, after)
    assert after.clusters is not None and after.clusters.cameras is not None
    assert after.clusters.cameras.cameras_per_cluster < 1.5
    assert verdict.differences["auc"].low > 0
    assert verdict.decision == "undecided" and "its clusters are worse across cameras" in verdict.reasons[0]


def test_contradicting_metrics_are_undecided(store: CropStore) -> None:
    one = judged(people_features(store, spread=1.2), store, clusters=False)
    other = judged(people_features(store, spread=0.7), store, clusters=False)
    twisted = replace(
        other.separation,
        figures=dict(other.separation.figures),
        resampled={**other.separation.resampled, "tpr_at_fpr_0.1": np.full(RESAMPLES, -1.0)},
    )
    verdict = compare(one, replace(other, separation=twisted))
    assert verdict.decision == "undecided" and verdict.reasons[0] == "better in auc and worse in tpr_at_fpr_0.1"


@pytest.mark.parametrize("tracks", [True, False])
def test_a_collapsed_candidate_is_refused(store: CropStore, trackless: CropStore, tracks: bool) -> None:
    used = store if tracks else trackless
    good = judged(people_features(used, spread=1.0), used)
    same = np.tile(people_features(used, spread=1.0)[:1], (len(used), 1))
    for bad in (same, np.full_like(same, np.nan), np.zeros_like(same)):
        for clusters in (True, False):
            verdict = compare(good, judged(bad, used, clusters=clusters))
            assert (verdict.decision, verdict.evidence) == ("refuse", "features"), verdict
            assert verdict.reasons[0].startswith("candidate: ")
            assert compare(judged(bad, used, clusters=clusters), good).decision == "promote"
            assert compare(judged(bad, used, clusters=clusters), judged(bad, used)).decision == "refuse"


def test_features_with_lost_variance_are_refused_even_if_they_separate(store: CropStore) -> None:
    rows = people_features(store, spread=0.5)
    pale = np.concatenate([rows, np.full((len(rows), 1), 9, np.float32)], 1)  # one large component in all
    pale /= np.linalg.norm(pale, axis=1, keepdims=True)
    good, bad = judged(rows, store, clusters=False), judged(pale, store, clusters=False)
    assert bad.separation.figures["auc"].value > 0.95
    verdict = compare(good, bad)
    assert verdict.decision == "refuse" and "far less spread" in verdict.reasons[0]
    assert compare(bad, bad).evidence == "tracks"  # no refusal if the active model has the same variance


def test_without_tracks_clusters_decide(trackless: CropStore) -> None:
    poor = judged(people_features(trackless, spread=1.0), trackless)
    good = judged(people_features(trackless, spread=0.5), trackless)
    up, down, level = compare(poor, good), compare(good, poor), compare(good, good)
    assert (up.decision, down.decision, level.decision) == ("promote", "refuse", "undecided")
    assert up.evidence == down.evidence == "clusters"
    assert up.reasons[-1] == "no comparison by tracks: the store has no tracks" and any(
        "silhouette" in reason for reason in up.reasons
    )


def test_clusters_split_by_camera_or_lost_to_outliers_refuse(trackless: CropStore) -> None:
    good = judged(people_features(trackless, spread=0.8), trackless)
    assert good.clusters is not None and good.clusters.silhouette is not None
    better = replace(good.clusters, silhouette=good.clusters.silhouette + 0.2)
    assert compare(good, replace(good, clusters=better)).decision == "promote"
    apart = replace(better, cameras=CameraMix(1.2, 0.2, 2.5, 1.0))
    assert compare(good, replace(good, clusters=apart)).decision == "refuse"
    by_chance = replace(better, cameras=CameraMix(1.2, 0.2, 2.5, 1.0, cameras_per_cluster_error=1.0))
    assert compare(good, replace(good, clusters=by_chance)).decision == "promote"
    lost = replace(better, outlier_share=good.clusters.outlier_share + 0.11)
    assert compare(good, replace(good, clusters=lost)).decision == "refuse"


def test_without_evidence_the_verdict_is_undecided(trackless: CropStore) -> None:
    one = judged(people_features(trackless, spread=1.0), trackless, clusters=False)
    verdict = compare(one, one)
    assert (verdict.decision, verdict.evidence, verdict.differences) == ("undecided", "none", {})


def test_judgements_of_different_stores_or_seeds_are_not_compared(store: CropStore) -> None:
    rows = people_features(store, spread=1.0)
    with pytest.raises(AssertionError, match="one store, one seed"):
        compare(judge(rows, store), judge(rows, store, seed=1))
    fewer = store.subset(np.arange(200))
    with pytest.raises(AssertionError, match="one store, one seed"):
        compare(judge(rows, store), judge(rows[:200], fewer))
