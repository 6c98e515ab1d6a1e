"""The judge ranks models on real crops like their true mAP, without labels."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from resight.encoder.model import Encoder, EncoderConfig
from resight.encoder.weights import load_weights
from resight.image import ImageSpec
from resight.metrics.ranking import evaluate_ranking
from resight.training.features.extract import PixelCache, extract_features
from resight.training.judging.judge import judge
from resight.training.store.crops import CropStore
from resight.training.store.datasets import Site, join_splits, open_site

SHARED = Path(__file__).parents[4] / "shared"
PERSONS = 50
SMALL = ImageSpec(128, 64, "bilinear")  # the size of the crops: a quarter of the work of 256 x 128
pytestmark = [pytest.mark.real, pytest.mark.long]


@pytest.fixture(scope="module")
def site() -> Site:
    if not (SHARED / "data").is_dir() or not (SHARED / "weights").is_dir():
        pytest.skip("no real crops and weights: ../shared/data or ../shared/weights is not there")
    whole = open_site(SHARED / "data/market-subset", tracks_from_names=True)
    assert whole.query is not None and whole.gallery is not None
    chosen = np.unique(whole.query.persons)[:PERSONS]
    query, gallery = (
        part.subset(np.flatnonzero(np.isin(part.persons, chosen))) for part in (whole.query, whole.gallery)
    )
    return replace(whole, query=query, gallery=gallery)


def resized(encoder: Encoder) -> Encoder:
    made = Encoder(EncoderConfig(**{**vars(encoder.config), "image": SMALL}))
    made.load_state_dict(encoder.state_dict())
    return made.eval()


def noisy(encoder: Encoder, level: float) -> Encoder:
    made, rng = copy.deepcopy(encoder), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in made.parameters():
            if tensor.ndim > 1:
                tensor += level * tensor.std() * torch.randn(tensor.shape, generator=rng)
    return made


def true_map(features: np.ndarray, store: CropStore, site: Site) -> float:
    row = {path: number for number, path in enumerate(store.paths)}
    query, gallery = site.query, site.gallery
    assert query is not None and gallery is not None
    parts = [features[[row[path] for path in part.paths]] for part in (query, gallery)]
    return evaluate_ranking(*parts, query.persons, gallery.persons, query.cameras, gallery.cameras).mAP


@pytest.mark.slow
def test_the_score_ranks_models_like_their_map(site: Site) -> None:
    assert site.gallery is not None
    store = join_splits(replace(site, train=site.gallery))
    unlabelled = replace(store, persons=np.full(len(store), -1))
    real = resized(load_weights(str(SHARED / "weights/osnet_x0_25_msmt17.pth")).encoder)
    drawn = resized(load_weights("builtin").encoder)
    models = [
        real,
        drawn,
        *(noisy(real, level) for level in (0.1, 0.2, 0.3, 0.5)),
        noisy(drawn, 0.2),
        noisy(drawn, 0.4),
    ]
    cache, found = PixelCache(), []
    for encoder in models:
        features = extract_features(encoder, store, local=False, cache=cache)[0]
        judged = judge(features, unlabelled)
        found.append((true_map(features, store, site), judged.score))
    rank = spearmanr(*zip(*found, strict=True)).statistic
    assert len(models) >= 8 and rank >= 0.8, (rank, found)
