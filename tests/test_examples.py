"""The examples as processes, against real servers. Node's is tested with the other foreign clients."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from serving import ServerProcess, make_bundle

from resight.cli.export import SiteDataLoader
from resight.client import Client, Where
from resight.encoder.weights import load_weights
from resight.exporters.export import export_encoder
from resight.training.synthetic.site import SiteSettings, render_site

ANALYTICS = Path(__file__).resolve().parents[1] / "examples" / "analytics.py"


def analytics(address: str, *flags: str) -> tuple[int, dict[str, int], str]:
    """Exit status, the summary and the log."""
    done = subprocess.run(
        [sys.executable, ANALYTICS, "--server", address, *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@pytest.mark.slow
def test_analytics_finds_the_people_of_one_camera_in_another(tmp_path: Path) -> None:
    initial = load_weights("builtin")
    site = render_site(
        tmp_path / "site",
        SiteSettings("source", train_persons=40, test_persons=0, strangers=0, cameras=3, visits=(2, 3)),
        seed=7,
    )
    bundle = export_encoder(
        initial.encoder,
        tmp_path / "bundle",
        name="builtin",
        training={},
        weights_licence=initial.source["licence"],
        site=SiteDataLoader(site.train, initial.encoder.config.image).load(crops=False),
    )
    assert bundle.manifest.calibration is not None
    server = ServerProcess(bundle.path, tmp_path / "data")
    try:
        address = server.wait_ready()
        status, summary, log = analytics(address, "--people", "16", "--strangers", "4")
        assert status == 0, log
        assert (summary["enrolled"], summary["searched"]) == (16, 16)
        assert summary["match"] + summary["uncertain"] + summary["unknown"] == 16
        assert summary["match"] and summary["right_matches"] >= 0.8 * summary["match"], (
            summary
        )  # the calibration claims .95
        with Client(address) as client:
            yard = list(client.entries("analytics", where=Where(camera_ids=["yard"])))
            assert len(yard) == 16 and all(entry.shot_count >= 1 and entry.track_id for entry in yard)
            named = {entry.subject_id for entry in client.entries("analytics", where=Where(camera_ids=["entrance"]))}
            assert sum(entry.subject_id in named for entry in yard) == summary["match"]
    finally:
        assert server.end() == 0


def test_analytics_decides_nothing_without_a_calibration(tmp_path: Path) -> None:
    server = ServerProcess(make_bundle(tmp_path / "tiny").path, tmp_path / "data")
    try:
        status, summary, log = analytics(server.wait_ready(), "--people", "6", "--strangers", "2")
        assert status == 0, log
        assert summary == {"enrolled": 6, "searched": 6, "match": 0, "uncertain": 6, "unknown": 0, "right_matches": 0}
        assert log.count("an operator should check") == 6
    finally:
        assert server.end() == 0


def test_analytics_reports_an_unreachable_server() -> None:
    status, summary, log = analytics("127.0.0.1:9", "--people", "1", "--strangers", "0", "--wait", "1")
    assert status == 1 and not summary and "no server became ready" in log
