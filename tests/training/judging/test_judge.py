"""Judging models without labels: on synthetic people with real encoders, and on stores without evidence."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from references_judge import people_features, people_store, random_store
from tiny import random_encoder

from resight.encoder.weights import load_weights
from resight.errors import TrainingError
from resight.training.clustering.cluster import Clustering, ClusterSettings, try_cluster
from resight.training.clustering.health import CameraMix, Stability, TrackAgreement
from resight.training.features.extract import extract_features
from resight.training.judging.gate import Decision
from resight.training.judging.judge import ClusterFigures, TrackCounts, judge
from resight.training.store.crops import CropStore
from resight.training.store.datasets import Site, join_splits, open_site
from resight.training.store.track_pairs import draw_track_pairs
from resight.training.synthetic.site import SiteSettings, render_site

SETTINGS = ClusterSettings(k1=12, k2=3)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Site:
    people = SiteSettings(
        train_persons=36, test_persons=4, strangers=2, cameras=3, visits=(2, 3), crops=4, height=64, width=32
    )
    return render_site(tmp_path_factory.mktemp("judge") / "site", people, seed=5)


def rush_hour(store: CropStore) -> CropStore:
    """The same people within seconds: tracks start 300 times closer together and last as long as before."""
    begins = {track: store.times_s[store.tracks == track].min() for track in np.unique(store.tracks)}
    begin = np.array([begins[track] for track in store.tracks])
    return replace(store, times_s=begin / 300 + (store.times_s - begin))


def test_certain_pairs_of_a_synthetic_site_are_correct(drawn: Site) -> None:
    for store in (drawn.train, rush_hour(drawn.train)):
        assert (store.tracks >= 0).all() and np.isfinite(store.times_s).all()
        pairs = draw_track_pairs(store)
        assert (store.persons[pairs.positives[:, 0]] == store.persons[pairs.positives[:, 1]]).all()
        assert (store.persons[pairs.negatives[:, 0]] != store.persons[pairs.negatives[:, 1]]).all()
        assert (store.cameras[pairs.negatives[:, 0]] == store.cameras[pairs.negatives[:, 1]]).all()
    assert len(pairs.positives) == 4 * pairs.track_count and pairs.overlaps > 50


def test_a_better_model_separates_tracks_better_and_noise_does_not(drawn: Site) -> None:
    store = rush_hour(drawn.train)
    trained = extract_features(load_weights("builtin").encoder, store, local=False)[0]
    untrained = extract_features(random_encoder(), store, local=False)[0]
    noise = np.random.default_rng(0).normal(size=(len(store), 64)).astype(np.float32)
    noise /= np.linalg.norm(noise, axis=1, keepdims=True)
    good, poor, none = (judge(rows, store).separation.figures["auc"] for rows in (trained, untrained, noise))
    assert good.value > poor.value + 0.05 and good.value > 0.85
    assert abs(none.value - 0.5) < 0.07 and none.low < 0.5 < none.high


def test_labels_of_persons_are_not_used(drawn: Site) -> None:
    store = rush_hour(drawn.train)
    unlabelled = replace(store, persons=np.full(len(store), -1))
    rows = extract_features(random_encoder(), store, local=False)[0]
    assert judge(rows, store).to_json() == judge(rows, unlabelled).to_json()


def test_every_metric_of_a_sound_clustering_is_serialised() -> None:
    store = people_store(persons=16, cameras=3, crops=4)
    clustering = try_cluster(people_features(store, spread=0.5), store, SETTINGS)
    other = try_cluster(people_features(store, spread=0.9, seed=1), store, SETTINGS)
    assert isinstance(clustering, Clustering)
    judged = judge(people_features(store, spread=0.5), store, clustering=clustering, previous=other)
    values = json.loads(json.dumps(judged.to_json(), allow_nan=False))
    assert values["crops"] == 192 and values["problem"] == values["collapse"] == ""
    assert values["tracks"]["tracks"] == 48 and values["tracks"]["auc"]["value"] > 0.95
    assert (
        values["tracks"]["tpr_at_fpr_0.001"] is None
        and "negative pairs" in values["tracks"]["missing"]["tpr_at_fpr_0.001"]
    )
    assert values["clusters"]["clusters"] == 16 and values["clusters"]["silhouette"] == clustering.silhouette
    assert values["clusters"]["cameras"]["many_camera_share"] == 1
    assert values["clusters"]["tracks"]["whole_share"] == 1 and values["clusters"]["tracks"]["confused_share"] == 0
    assert values["stability"]["ari"] > 0.3


def test_a_judgement_is_deterministic_per_seed() -> None:
    store = people_store(persons=16, cameras=2, crops=5)
    rows = people_features(store, spread=0.9)
    first, again, other = (judge(rows, store, seed=seed).to_json() for seed in (3, 3, 4))
    assert first == again != other


def test_variance_is_the_mean_squared_distance_from_the_mean() -> None:
    store = random_store(50, 1)
    rows = people_features(store, spread=1.0)
    slow = np.mean([np.sum((row - rows.mean(0)) ** 2) for row in rows.astype(np.float64)])
    assert judge(rows, store).variance == pytest.approx(slow, abs=1e-6)
    assert judge(np.tile(rows[:1], (50, 1)), store).variance == pytest.approx(0, abs=1e-6)


def test_unusable_features_are_a_problem_without_metrics() -> None:
    store = people_store(persons=12, cameras=2, crops=4)
    rows = people_features(store, spread=0.5)
    rows[3] = np.nan
    judged = judge(rows, store, clustering=try_cluster(rows, store, SETTINGS))
    assert judged.problem.startswith("1 of 96 features are not finite") and judged.problem in judged.collapse
    assert judged.variance is None and not judged.separation.figures
    assert set(judged.separation.missing.values()) == {judged.problem}
    json.dumps(judged.to_json(), allow_nan=False)
    rows[3] = 0
    assert "do not have length 1" in judge(rows, store).problem


def test_a_collapse_is_reported_with_the_clusterings_message() -> None:
    store = people_store(persons=12, cameras=2, crops=4)
    same = np.tile(people_features(store, spread=0.5)[:1], (96, 1))
    found = try_cluster(same, store, SETTINGS)
    assert isinstance(found, TrainingError)
    judged = judge(same, store, clustering=found, previous=found)
    assert judged.collapse == str(found) and judged.clusters is None and judged.stability is None
    assert judged.separation.figures["auc"].value == 0.5


def test_one_camera_without_tracks_still_has_cluster_metrics() -> None:
    store = people_store(persons=12, cameras=1, crops=8)
    bare = replace(store, tracks=np.full(len(store), -1), times_s=np.full(len(store), np.nan))
    rows = people_features(bare, spread=0.5)
    judged = judge(rows, bare, clustering=try_cluster(rows, bare, SETTINGS))
    assert judged.clusters is not None and judged.clusters.cameras is not None
    assert judged.clusters.cameras.chance_cameras_per_cluster == 1
    assert judged.clusters.tracks.majority_share is None and judged.clusters.tracks.confused_share is None
    assert set(judged.separation.missing.values()) == {"the store has no tracks"} and not judged.separation.figures


def test_all_crops_of_a_site_are_joined_once(drawn: Site, tmp_path: Path) -> None:
    joined = join_splits(drawn)
    assert drawn.query is not None and drawn.gallery is not None
    assert joined.paths == drawn.train.paths + drawn.query.paths + drawn.gallery.paths
    assert joined.tracks[len(drawn.train)] == drawn.query.tracks[0]
    for number in range(8):
        path = tmp_path / f"cam{number % 2}" / f"person{number // 4}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((drawn.root / drawn.train.paths[number]).read_bytes())
    plain = open_site(tmp_path)
    assert plain.query is not None and join_splits(plain).paths == plain.train.paths


@pytest.mark.parametrize("kind", [TrackCounts, ClusterFigures, CameraMix, TrackAgreement, Stability])
def test_every_metric_is_documented(kind: type[Any]) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs/judging.md").read_text()
    named = set(re.findall(r"`(?:\w+\.)?(\w+)`", page))
    assert {entry.name for entry in fields(kind)} - {"cameras", "tracks"} <= named


def test_every_track_metric_and_every_decision_is_documented() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs/judging.md").read_text()
    store = people_store(persons=16, cameras=2, crops=4)
    separated = judge(people_features(store, spread=0.5), store).separation
    assert all(f"`{name}`" in page for name in (*separated.figures, *separated.missing))
    assert all(f"*{decision}*" in page for decision in get_args(Decision))
