"""`resight judge`: the table, the verdict, and the JSON file."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import resight_here, the_error, without_persons, write_random_checkpoint

from resight.training.store.crops import write_store
from resight.training.store.datasets import Site
from resight.training.store.links import write_links


@pytest.fixture(scope="module")
def tracked(tiny_site: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny site with one track per person and camera, all at the same time, without labels."""
    root = tmp_path_factory.mktemp("tracked") / "site"
    shutil.copytree(tiny_site.root, root)
    store = tiny_site.train
    shot = np.arange(len(store)) % 30 // 3
    seen = replace(store, root=root, tracks=store.persons, times_s=shot + store.persons * 0.1)
    write_store(root, without_persons(seen), ["train"] * len(store))
    return root


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("other") / "other", seed=9)


def run(site: Path, model: Path, out: Path, *more: object) -> tuple[str, dict[str, Any]]:
    done = resight_here("judge", "--model", model, "--site", site, "--recipe", "purify", "--json", out, *more)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(out.read_text())


def test_a_model_is_judged_by_tracks_and_clusters(tracked: Path, tiny_init: Path, tmp_path: Path) -> None:
    output, found = run(tracked, tiny_init, tmp_path / "found.json")
    figures = found["model"]
    assert set(found) == {"model", "settings", "hygiene"} and figures["crops"] == 240
    assert found["hygiene"]["crops judged on"]["problems_by_camera"] == {}
    assert figures["tracks"]["tracks"] == 24 and figures["tracks"]["overlaps"] == 3 * 8 * 7 // 2
    assert f"{figures['tracks']['auc']['value']:.4f}" in output and "cameras per cluster" in output
    assert "no tpr_at_fpr_0.001: " in output and "promote" not in output
    assert figures["clusters"]["clusters"] >= 2


def test_two_models_get_a_verdict(tracked: Path, tiny_init: Path, other: Path, tmp_path: Path) -> None:
    output, found = run(tracked, tiny_init, tmp_path / "one.json", "--against", other)
    _, back = run(tracked, other, tmp_path / "two.json", "--against", tiny_init)
    assert (found["model"], found["against"]) == (back["against"] | {"stability": found["model"]["stability"]},
                                                  back["model"] | {"stability": None})  # fmt: skip
    verdict, reverse = found["verdict"], back["verdict"]
    assert verdict["evidence"] == "tracks" and f"{verdict['decision']} by tracks" in output
    assert verdict["differences"]["auc"]["value"] == pytest.approx(-reverse["differences"]["auc"]["value"])
    assert all(reason in output for reason in verdict["reasons"])
    assert found["model"]["stability"]["ari"] == pytest.approx(back["model"]["stability"]["ari"])
    _, same = run(tracked, other, tmp_path / "same.json", "--against", other)
    assert same["verdict"]["decision"] == "undecided" and same["model"]["stability"]["ari"] == 1


def test_without_tracks_it_judges_by_clusters_and_says_so(tiny_site: Site, tiny_init: Path, tmp_path: Path) -> None:
    output, found = run(tiny_site.root, tiny_init, tmp_path / "found.json", "--against", tiny_init)
    assert found["verdict"]["evidence"] == "clusters" and "no auc: the store has no tracks" in output
    assert found["model"]["tracks"]["auc"] is None
    _, every = run(tiny_site.root, tiny_init, tmp_path / "all.json", "--all")
    assert every["model"]["crops"] == 240 + 90 and every["settings"]["all"] is True


def test_confirmed_and_rejected_pairs_are_labels(
    tracked: Path, tiny_site: Site, tiny_init: Path, other: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    shutil.copytree(tracked, site)
    persons, paths = tiny_site.train.persons, tiny_site.train.paths
    pairs = [(row, (row + 7 * step) % len(paths)) for row in range(12) for step in (1, 9)]
    write_links(site, [(paths[a], paths[b], bool(persons[a] == persons[b])) for a, b in pairs])
    output, found = run(site, tiny_init, tmp_path / "found.json", "--against", other)
    links = found["model"]["links"]
    assert links["missing"] == {} and f"{links['accuracy']['value']:.4f}" in output
    assert found["verdict"]["differences"]["links.auc"]["low"] <= found["verdict"]["differences"]["links.auc"]["high"]
    _, without = run(tracked, tiny_init, tmp_path / "without.json", "--reference", site, "--against", other)
    assert without["model"]["links"] is None and without["reference"]["model"]["links"] == found["model"]["links"]
    assert "reference.links.auc" in without["verdict"]["differences"]


def test_a_missing_site_is_one_sentence(tiny_init: Path, tmp_path: Path) -> None:
    done = resight_here("judge", "--model", tiny_init, "--site", tmp_path / "nowhere")
    assert "no site at" in the_error(done)


def test_tracks_are_taken_from_market_1501_names(tiny_site: Site, tiny_init: Path) -> None:
    done = resight_here("judge", "--model", tiny_init, "--site", tiny_site.root, "--tracks-from-names")
    assert "to derive tracks from names" in the_error(done)
