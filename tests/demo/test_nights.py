"""The cycle on a simulated site: several nights including bad ones, a rollback, and continuous live searches."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from serving import ServerProcess, jpeg, make_bundle
from tiny import resight_here, the_error
from watchdog import progress_expected

from resight.client import Client, NewEntry
from resight.cycle.site import load_site
from resight.demo.harness import LiveSearches
from resight.demo.nights import DemoScale, NightsDemo, plan_nights, run_nights_demo, site_toml
from resight.encoder.model import Encoder
from resight.encoder.weights import load_weights
from resight.training.synthetic.nights import Night

SMALL = DemoScale(
    visitors=36, enrolled=14, cameras=3, iters=24, precision="fp32"
)  # with fewer tracks no candidate can be judged
FAINT = 300.0  # constant added to features, relative to their mean length: a variance of about 1 / FAINT**2
NIGHTS = [
    (Night(1, SMALL.visitors, SMALL.cameras), "the first night the cycle sees"),
    (Night(2, SMALL.visitors, SMALL.cameras, dead=SMALL.cameras), "every camera delivers noise"),
    (Night(3, SMALL.visitors, SMALL.cameras + 1, dusk=True), "a new camera, dusk on the others"),
    (Night(4, SMALL.visitors, SMALL.cameras + 1, dead=SMALL.cameras + 1, one_person=True), "every camera is dead"),
]
"""Each verdict is certain: a model adapted to a normal night is better than one with nearly constant features, and
noise is refused by the data checks. Decisions in less clear cases are measured in benchmarks, not tested."""


def faint_encoder() -> Encoder:
    """The built-in weights plus a constant in each feature: the same ranking, but a broken model for the judge."""
    encoder = load_weights("builtin").encoder
    neck = encoder.heads["global"].neck
    with torch.no_grad():
        neck.bias += FAINT * neck.weight.abs()
    return encoder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = io.StringIO()
    console = Console(file=output, width=200)
    folder = tmp_path_factory.mktemp("nights")
    with progress_expected(folder):
        demo = NightsDemo(folder / "demo", SMALL, 1, console, NIGHTS, faint_encoder())
        return {**run_nights_demo(demo), "output": output.getvalue()}


@pytest.mark.slow
@pytest.mark.timeout(0)  # `progress_expected` watches the fixture
def test_every_claim_holds(finished: dict[str, Any]) -> None:
    assert [text for text, met in finished["promises"] if not met] == [], finished["output"]
    assert len(finished["promises"]) == 7
    assert [step["name"] for step in finished["steps"]] == ["Night 1", "Night 2", "Rollback", "Night 3", "Night 4"]
    assert all(step["searches"] > 10 for step in finished["steps"] if step["name"] != "Rollback")


@pytest.mark.slow
@pytest.mark.timeout(0)  # `progress_expected` watches the fixture
def test_search_is_better_than_by_the_first_model_on_every_later_night(finished: dict[str, Any]) -> None:
    for step in finished["steps"][1:]:
        if step["name"] != "Rollback":
            assert step["after"] > step["first"], step


@pytest.mark.slow
@pytest.mark.timeout(0)  # `progress_expected` watches the fixture
def test_the_page_shows_every_step_and_links_to_the_pages_of_the_cycle(finished: dict[str, Any]) -> None:
    path = Path(finished["page"])
    page = path.read_text()
    for source in re.findall(r"""src\s*=\s*["']([^"']*)""", page):
        assert source.startswith("data:"), source
    for link in re.findall(r'href="([^"#]+)"', page):
        assert (path.parent / link).is_file(), link
    for step in finished["steps"]:
        assert step["name"] in page and f"{step['after']:.1f}" in page


def test_the_site_file_is_valid_and_lists_the_installed_cameras(tmp_path: Path) -> None:
    demo = NightsDemo(tmp_path, DemoScale(cameras=3), 1, Console())
    for night, _ in plan_nights(demo.scale):
        demo.file.write_text(site_toml(demo, "127.0.0.1:1", night.cameras))
        site = load_site(demo.file)
        assert [camera.name for camera in site.camera] == [f"cam{n}" for n in range(1, night.cameras + 1)]
        assert site.service.bundle == tmp_path / "models" / "first"


def test_a_folder_not_created_by_a_demo_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    assert "was not created by a demo" in the_error(resight_here("cycle", "demo", "--out", tmp_path))
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_live_searches_count_results_and_collect_errors(tmp_path: Path) -> None:
    server = ServerProcess(make_bundle(tmp_path / "bundle").path, tmp_path / "data")
    try:
        address = server.wait_ready()
        with Client(address) as client:
            client.create_collection("people", unlimited_retention=True)
            client.enrol("people", NewEntry(jpeg(1), entry_id="1"))
            with LiveSearches(address, "people", [jpeg(1), b"no image"], per_s=200) as live:
                while live.answered < 3 or len(live.errors) < 3:
                    assert server.process.poll() is None
        assert live.answered >= 3 and "JPEG" in live.errors[0]
    finally:
        server.end()
