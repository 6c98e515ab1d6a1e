"""Nights of a simulated site: new people every night, the same cameras, dusk, and a bad night."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from resight.image import decode
from resight.training.ingest.sources import open_footage
from resight.training.store.crops import open_store
from resight.training.synthetic.nights import DAY_S, Night, SimulatedSite, enrolment_set, write_enrolment_crops

FIRST, THIRD = Night(1, 6, 2), Night(3, 6, 3, dusk=True)


@pytest.fixture(scope="module")
def site() -> SimulatedSite:
    return SimulatedSite(seed=4, first_cameras=2, all_cameras=3)


def test_visitors_are_new_each_night_and_different_from_enrolled_people(site: SimulatedSite) -> None:
    first, third = site.visitors(FIRST), site.visitors(THIRD)
    assert len(first) == len(third) == 6
    assert not {*first} & {*third} and not {*enrolment_set(site, 9)} & {*first, *third}
    assert enrolment_set(site, 9) == enrolment_set(SimulatedSite(seed=4, first_cameras=2, all_cameras=3), 9)


def test_dusk_affects_only_the_cameras_of_the_first_night(site: SimulatedSite) -> None:
    changed = [site.camera_on(THIRD, camera) is not site.camera_on(FIRST, camera) for camera in range(3)]
    assert changed == [True, True, False]


def test_a_bad_night_has_a_dead_camera_and_one_person(site: SimulatedSite, tmp_path: Path) -> None:
    night = Night(2, 5, 2, dead=1, one_person=True)
    dead, other = (site.record(tmp_path, night, camera) for camera in range(2))
    assert dead.truth.read_text() == "" and len(dead.detections.read_text().splitlines()) > 3 * dead.frames
    persons = [json.loads(line)["person"] for line in other.truth.read_text().splitlines()]
    assert set(persons) == {0} and len(persons) > 50
    footage = open_footage(str(dead.video), camera="cam1", fps=5.0)
    assert next(footage.frames()).time_s == pytest.approx(site.start_s(night))
    assert site.start_s(night) - site.start_s(FIRST) == DAY_S


def test_enrolled_people_have_crops_of_every_camera(site: SimulatedSite, tmp_path: Path) -> None:
    people = enrolment_set(site, 5)
    store = write_enrolment_crops(tmp_path / "one", site, THIRD, people, take=0, split="query")
    assert len({*zip(store.persons, store.cameras, strict=True)}) == len(store) >= 12
    assert store.camera_names == site.names and set(store.persons) == {1, 2, 3, 4, 5}
    sides = np.array([decode(store.read(row)).shape[:2] for row in range(len(store))])
    assert (sides[:, 0] > sides[:, 1]).all() and sides[:, 0].min() > 50
    again = write_enrolment_crops(tmp_path / "again", site, THIRD, people, take=0, split="query")
    assert again.fingerprint == store.fingerprint
    other = write_enrolment_crops(tmp_path / "other", site, THIRD, people, take=1, split="query")
    assert other.fingerprint != store.fingerprint
    assert open_store(tmp_path / "one")["query"].paths == store.paths
