"""A site's metrics against a slow count with loops."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny import CONFIG, random_encoder, without_persons

from resight.errors import ImageError, InputError, SiteError
from resight.image import decode, fit
from resight.training.evaluation.evaluate import evaluate_site, evaluation_splits, measure_site, percentages
from resight.training.features.extract import embed_store, encoder_embedding, extract_features
from resight.training.store.crops import CropStore
from resight.training.store.datasets import Site, open_site


def embed_by_chance(store: CropStore) -> NDArray[np.float32]:
    """Large differences between persons, small ones between cameras: both right and wrong hits occur."""
    rows = []
    for person, camera, path in zip(store.persons, store.cameras, store.paths, strict=True):
        own = np.random.default_rng(int(person)).normal(size=16)
        seen = np.random.default_rng([int(camera), 77]).normal(size=16)
        noise = np.random.default_rng(list(path.encode())).normal(size=16)
        rows.append(own + seen + noise)
    features = np.array(rows, np.float32)
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def by_hand(query: CropStore, gallery: CropStore) -> tuple[float, float]:
    """mAP and rank-1 by the Market-1501 rule, one query after the other."""
    queries, others = embed_by_chance(query), embed_by_chance(gallery)
    precisions, first = [], []
    for i in range(len(query)):
        hits = []
        for j in np.argsort(-(others @ queries[i]), kind="stable"):
            same = gallery.persons[j] == query.persons[i]
            if not (same and gallery.cameras[j] == query.cameras[i]):
                hits.append(bool(same))
        found, total = 0, 0.0
        for place, hit in enumerate(hits, 1):
            if hit:
                found += 1
                total += found / place
        precisions.append(total / found)
        first.append(hits[0])
    return float(np.mean(precisions)), float(np.mean(first))


def test_metrics_equal_a_manual_count(tiny_site: Site) -> None:
    query, gallery = evaluation_splits(tiny_site)
    score = evaluate_site(tiny_site, embed_by_chance)
    mean_precision, rank1 = by_hand(query, gallery)
    assert 0.2 < mean_precision < 0.999  # not trivially perfect
    assert score.mAP == pytest.approx(mean_precision, abs=1e-6)
    assert score.rank(1) == pytest.approx(rank1)
    assert score.valid_queries == len(query)
    figures = percentages(score)
    assert list(figures) == ["mAP", "rank1", "rank5", "rank10", "mINP"]
    assert figures["mAP"] == pytest.approx(100 * mean_precision, abs=0.0051)


def test_a_site_without_queries_or_labels_cannot_be_evaluated(tiny_site: Site) -> None:
    with pytest.raises(SiteError, match=r"no query and gallery.*resight adapt"):
        evaluate_site(Site(tiny_site.root, without_persons(tiny_site.train)), embed_by_chance)


def test_measure_site_agrees_with_evaluate_site(tiny_site: Site) -> None:
    query, _ = evaluation_splits(tiny_site)
    alone, whole = evaluate_site(tiny_site, embed_by_chance), measure_site(tiny_site, embed_by_chance)
    assert percentages(whole.ranking) == percentages(alone)
    assert (whole.queries, whole.gallery) == (len(query), 72)
    assert whole.open_set is not None and whole.reservation == ""
    assert len(whole.open_set.mated_similarity) == len(whole.open_set.nonmated_similarity) == len(query)
    assert (whole.open_set.persons, whole.open_set.entries) == ((3, 3), (36, 36))
    assert whole.pairs.valid_queries.tolist() == [[0, 6, 6], [6, 0, 6], [6, 6, 0]]
    assert whole.camera_names == ("cam0", "cam1", "cam2")


def test_re_ranking_changes_rankings_but_no_threshold(tiny_site: Site) -> None:
    plain = measure_site(tiny_site, embed_by_chance)
    again = measure_site(tiny_site, embed_by_chance, reranked=True)
    assert again.ranking.mAP > plain.ranking.mAP  # twelve crops per person, which are mutual neighbours
    assert again.pairs.mAP.tolist() != plain.pairs.mAP.tolist()
    assert plain.open_set is not None and again.open_set is not None
    assert again.open_set.mated_similarity.tolist() == plain.open_set.mated_similarity.tolist()


def test_a_site_of_one_person_has_no_open_set_metrics_with_a_reason(tiny_site: Site) -> None:
    query, gallery = evaluation_splits(tiny_site)
    person = query.persons[0]
    few = (store.subset(np.flatnonzero(store.persons == person)) for store in (query, gallery))
    score = measure_site(Site(tiny_site.root, tiny_site.train, *few), embed_by_chance)
    assert score.ranking.mAP == 1.0
    assert score.open_set is None and "at least two persons" in score.reservation


def test_features_are_those_of_the_training_loop(tiny_site: Site) -> None:
    query, _ = evaluation_splits(tiny_site)
    encoder = random_encoder()
    found = embed_store(query, CONFIG.image, encoder_embedding(encoder.train(), "cpu"))
    np.testing.assert_array_equal(found, extract_features(encoder, query, local=False)[0])


def test_flip_averages_a_crop_with_its_mirror_image(tiny_site: Site) -> None:
    query, _ = evaluation_splits(tiny_site)
    embed = encoder_embedding(random_encoder(), "cpu")
    found = embed_store(query, CONFIG.image, embed, flip=True)
    for row in range(3):
        pixels = fit(decode(query.read(row)), CONFIG.image)
        mirrored = np.stack([[line[::-1] for line in pixels]])
        mean = embed(pixels[None])[0] + embed(np.ascontiguousarray(mirrored))[0]
        np.testing.assert_allclose(found[row], mean / np.linalg.norm(mean), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert np.abs(found - embed_store(query, CONFIG.image, embed)).max() > 1e-3


def test_one_camera_cannot_be_evaluated(tiny_site: Site) -> None:
    query, gallery = evaluation_splits(tiny_site)
    alone = Site(
        tiny_site.root,
        tiny_site.train,
        query.subset(np.flatnonzero(query.cameras == 0)),
        gallery.subset(np.flatnonzero(gallery.cameras == 0)),
    )
    with pytest.raises(InputError, match=r"camera"):
        evaluate_site(alone, embed_by_chance)


def test_a_corrupt_query_is_named(tiny_site: Site, tmp_path: Path) -> None:
    shutil.copytree(tiny_site.root, tmp_path / "site")
    site = open_site(tmp_path / "site")
    query, _ = evaluation_splits(site)
    (site.root / query.paths[2]).write_text("no image")
    encoder = random_encoder()
    with pytest.raises(ImageError, match=query.paths[2]):
        evaluate_site(site, lambda store: extract_features(encoder, store, local=False)[0])
