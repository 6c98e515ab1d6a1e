"""Nights are checked separately: excluded cameras and nights, and the grouping into nights."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from drawn_nights import NIGHT_S, add_night, end_of

from resight.training.curation.hygiene import _nights, filter_nights
from resight.training.store.copying import open_all_splits
from resight.training.store.crops import CropStore

TRACKS = {"door": 8, "hall": 8}
NIGHT = 16 * 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CropStore:
    """Three nights; the hall camera is dead in the second."""
    root: Path = tmp_path_factory.mktemp("nights")
    for night in range(3):
        add_night(root, night, TRACKS, each=3, dead=("hall",) if night == 1 else ())
    return open_all_splits(root)


def test_a_dead_camera_affects_only_its_night(store: CropStore) -> None:
    found = filter_nights(store, store.times_s, group=20)
    hall = store.cameras == store.camera_names.index("hall")
    second = (store.times_s > end_of(0)) & (store.times_s < end_of(1))
    assert not found.refused and np.array_equal(~found.kept, second)  # one of two cameras is not enough
    assert any(reason.startswith("1 days before: camera hall") for reason in found.reasons)
    diluted = filter_nights(store, store.times_s, group=1000)
    assert diluted.kept.all() and diluted.reasons == ()
    latest = store.subset(np.flatnonzero(store.times_s < end_of(1)))
    bad = filter_nights(latest, latest.times_s, group=20)
    assert bad.refused and bad.reasons[0].startswith("camera hall") and bad.kept.sum() == NIGHT
    assert not hall[bad.kept.nonzero()[0]].all()


def test_a_small_sample_of_each_camera_is_enough(store: CropStore) -> None:
    found = filter_nights(store, store.times_s, group=20, sample_limit=20)
    assert (~found.kept).sum() == NIGHT and not found.refused


@pytest.mark.parametrize("group", [1, 5, 12, 40, 400])
def test_nights_contain_every_row_once_latest_first_and_at_least_the_group_size(group: int) -> None:
    rng = np.random.default_rng(group)
    times = end_of(0) + NIGHT_S * rng.integers(0, 6, 120) + rng.uniform(0, 3600, 120)
    found = _nights(times, group)
    assert sorted(np.concatenate(found).tolist()) == list(range(120))
    assert all(len(rows) >= group for rows in found) or len(found) == 1
    assert all(times[one].min() > times[other].max() for one, other in pairwise(found))
