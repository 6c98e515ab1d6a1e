from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tiny import random_encoder

from resight.training.evaluation.evaluate import evaluate_site, percentages
from resight.training.features.extract import extract_features
from resight.training.report.ranked_lists import measure_before_after
from resight.training.store.datasets import Site


def test_both_models_are_scored_on_the_sites_query_and_gallery(tiny_site: Site) -> None:
    one, other = random_encoder(1), random_encoder(2)
    found = measure_before_after(tiny_site, one, other, device="cpu")
    assert found is not None and found.ranked
    for figures, encoder in ((found.before, one), (found.after, other)):
        expected = percentages(
            evaluate_site(tiny_site, lambda store, e=encoder: extract_features(e, store, local=False)[0])
        )
        assert figures == pytest.approx(expected)


def test_a_site_that_cannot_be_evaluated_has_no_scores(tiny_site: Site) -> None:
    one = random_encoder(1)
    assert (
        measure_before_after(dataclasses.replace(tiny_site, query=None, gallery=None), one, one, device="cpu") is None
    )
    assert tiny_site.query is not None and tiny_site.gallery is not None
    alone = [
        dataclasses.replace(store, cameras=np.zeros(len(store), np.int64))
        for store in (tiny_site.query, tiny_site.gallery)
    ]
    assert (
        measure_before_after(dataclasses.replace(tiny_site, query=alone[0], gallery=alone[1]), one, one, device="cpu")
        is None
    )
