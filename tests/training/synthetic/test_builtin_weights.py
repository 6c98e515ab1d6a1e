from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from resight.encoder.checkpoint import load_checkpoint
from resight.encoder.weights import load_weights
from resight.training.adaptation.recipe import load_recipe
from resight.training.evaluation.evaluate import evaluate_site, percentages
from resight.training.features.extract import extract_features
from resight.training.store.datasets import Site, open_site
from resight.training.synthetic.builtin_weights import ENCODER, LICENCE, SOURCE_SITE, train_builtin
from resight.training.synthetic.site import demo_site

pytestmark = pytest.mark.long


@pytest.mark.slow
def test_the_training_command_of_the_builtin_weights_works(tmp_path: Path) -> None:
    few = replace(SOURCE_SITE, train_persons=12, test_persons=6, strangers=2, cameras=4, visits=(3, 4), crops=2)
    recipe = load_recipe("supervised").with_schedule(epochs=1, iters=2)
    metrics = train_builtin(
        tmp_path / "made",
        tmp_path / "site",
        seed=3,
        device="cpu",
        console=Console(quiet=True),
        settings=few,
        recipe=recipe,
    )
    made, shipped = load_weights(str(tmp_path / "made")), load_weights("builtin")
    assert made.encoder.config == shipped.encoder.config == ENCODER
    assert made.source["licence"] == shipped.source["licence"] == LICENCE
    assert load_checkpoint(tmp_path / "made").provenance.history[-1]["source_mAP"] == metrics["mAP"]


@pytest.mark.slow
def test_builtin_weights_find_people_in_unseen_cameras(tmp_path: Path) -> None:
    site = demo_site(tmp_path / "site", seed=11)  # not the seed of the published results
    assert site.query is not None and site.gallery is not None
    some = np.flatnonzero(site.query.persons < np.median(site.query.persons))
    part = Site(site.root, site.train, site.query.subset(some), site.gallery)
    encoder = load_weights("builtin").encoder
    metrics = percentages(evaluate_site(part, lambda store: extract_features(encoder, store, local=False)[0]))
    assert metrics["rank1"] > 40  # raw pixels reach about 6
    assert open_site(tmp_path / "site").train.fingerprint == site.train.fingerprint
