"""`resight demo`: its scores, its report, the order of its steps, and failed steps."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny import draw_site, resight, resight_here, the_error

from resight.bundle.bundle import open_bundle
from resight.encoder.checkpoint import load_checkpoint
from resight.training.store.datasets import Site


def servers_of(folder: Path) -> list[str]:
    """Command lines of running servers with data below a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if str(folder) in command and " serve " in command:
            found.append(command)
    return found


def demo(site: Path, init: Path, out: Path, *rest: object) -> list[object]:
    return ["demo", "--site", site, "--init", init, "--out", out, "--epochs", 1, "--iters", 2, *rest]


@pytest.fixture(scope="module")
def finished(tiny_site: Site, tiny_init: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    done = resight(*demo(tiny_site.root, tiny_init, folder / "demo", "--json", folder / "figures.json"))
    assert done.returncode == 0, done.stderr
    (folder / "log").write_text(done.stderr)
    return folder


def results(finished: Path) -> dict[str, Any]:
    return dict(json.loads((finished / "figures.json").read_text()))


@pytest.mark.slow
def test_results_are_percentages_and_every_step_is_timed(finished: Path) -> None:
    found = results(finished)
    assert set(found) == {"initial", "adapted", "seconds", "report"}
    for model in ("initial", "adapted"):
        assert {"mAP", "rank1"} <= set(found[model])
        assert all(0 <= value <= 100 for value in found[model].values()) and found[model]["mAP"] > 1
    assert list(found["seconds"]) == [
        "site",
        "export the initial model",
        "serve, enrol and search (initial model)",
        "adapt",
        "export",
        "serve, enrol and search (adapted model)",
        "report",
    ]
    assert all(value >= 0 for value in found["seconds"].values())
    log = (finished / "log").read_text()
    positions = [log.index(step) for step in found["seconds"]]
    assert positions[0] < positions[1] < positions[2]
    assert "adaptation without labels:" in log


@pytest.mark.slow
def test_a_picture_shows_queries_with_hits_of_both_models(finished: Path) -> None:
    with Image.open(finished / "demo" / "ranked-lists.jpg") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] > 500 and np.ptp(pixels) == 255


@pytest.mark.slow
def test_the_report_is_one_page_that_loads_nothing(finished: Path) -> None:
    report = Path(results(finished)["report"])
    assert report == finished / "demo" / "report.html"
    page = report.read_text()
    for source in re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page):
        assert source.startswith(("data:", "#")), source
    assert not re.search(r"<script[^>]*\ssrc|@import|url\((?!['\"]?(?:data:|#))", page)
    assert page.count("data:image/jpeg") > 20
    for model in ("initial", "adapted"):
        assert f"{results(finished)[model]['mAP']:.1f}" in page


@pytest.mark.slow
def test_checkpoint_and_bundles_of_the_demo_are_usable(finished: Path) -> None:
    assert load_checkpoint(finished / "demo" / "checkpoint").provenance.stage == "student"
    initial, adapted = (open_bundle(finished / "demo" / f"{name}.bundle") for name in ("initial", "adapted"))
    assert initial.manifest.space_id != adapted.manifest.space_id
    assert adapted.manifest.artefacts[0].min_cosine >= 0.9999
    assert adapted.manifest.weights_licence == "none"


@pytest.mark.slow
def test_no_server_keeps_running(finished: Path) -> None:
    assert servers_of(finished) == []
    assert not list((finished / "demo").glob("*/server.json"))


@pytest.mark.slow
def test_the_service_gives_the_same_scores_as_the_bundle_offline(finished: Path, tiny_site: Site) -> None:
    for model in ("initial", "adapted"):
        target = finished / f"{model}.json"
        done = resight_here(
            *["evaluate", "--model", finished / "demo" / f"{model}.bundle", "--site", tiny_site.root, "--json", target]
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(target.read_text())["mAP"] == pytest.approx(results(finished)[model]["mAP"], abs=0.1)


@pytest.mark.slow
def test_a_later_demo_replaces_an_earlier_one_only_if_it_can_start(
    finished: Path, tiny_site: Site, tiny_init: Path
) -> None:
    out = finished / "demo"
    inside = shutil.copytree(tiny_site.root, out / "site")
    for site, init, word in (
        (finished / "missing", tiny_init, "no site at"),
        (tiny_site.root, finished / "missing", "no initial weights"),
        (tiny_site.root, out / "checkpoint", "choose another --out"),
        (inside, tiny_init, "choose another --out"),
    ):
        assert word in the_error(resight_here(*demo(site, init, out)))
        assert (out / "report.html").exists() and (out / "checkpoint").exists()


@pytest.mark.slow
def test_a_failed_step_ends_the_demo_with_its_error(tmp_path: Path, tiny_init: Path) -> None:
    site = draw_site(tmp_path / "site")
    same = (site.root / site.train.paths[0]).read_bytes()
    for path in site.train.paths:
        (site.root / path).write_bytes(same)
    done = resight_here(*demo(site.root, tiny_init, tmp_path / "demo", "--json", tmp_path / "figures.json"))
    assert "one cluster" in the_error(done)
    assert not (tmp_path / "figures.json").exists() and servers_of(tmp_path) == []


@pytest.mark.slow
def test_a_corrupt_gallery_crop_is_named_and_the_server_stopped(tmp_path: Path, tiny_init: Path) -> None:
    site = draw_site(tmp_path / "site")
    assert site.gallery is not None
    (site.root / site.gallery.paths[4]).write_text("no image")
    message = the_error(resight_here(*demo(site.root, tiny_init, tmp_path / "demo")))
    assert site.gallery.paths[4] in message
    assert servers_of(tmp_path) == []


def test_a_folder_not_created_by_a_demo_is_not_deleted(tmp_path: Path, tiny_site: Site, tiny_init: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    assert "was not created by a demo" in the_error(resight_here(*demo(tiny_site.root, tiny_init, out)))
    assert (out / "letter.txt").read_text() == "dear"
    os.symlink(out, tmp_path / "link")
    assert "was not created by a demo" in the_error(resight_here(*demo(tiny_site.root, tiny_init, tmp_path / "link")))
    shutil.rmtree(out)
