"""Everything that version 0.1.0 wrote before its modules moved (commit dc1a5b5) still opens.

`tests/data/formats-0.1.0.zip` was written by that commit: a bundle of a tiny graph, a checkpoint of random weights, a
crop store of drawn fields with links, a data folder with a snapshot, and the `site.toml` of `resight cycle init`.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
from serving import ServerProcess, jpeg
from tiny import resight_here

from resight.bundle.bundle import open_bundle
from resight.client import Client
from resight.cycle.site import load_site
from resight.encoder.checkpoint import load_checkpoint
from resight.exporters.verify import verify_bundle
from resight.image import decode
from resight.training.store.crops import open_store
from resight.training.store.links import read_links

ARCHIVE = Path(__file__).parent / "data" / "formats-0.1.0.zip"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The folder written by that commit."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    for folder in ("gallery", "gallery/snapshots", "gallery/snapshots/kept"):
        (tmp_path / folder).chmod(0o700)
    return tmp_path


def test_a_bundle_opens_and_verifies(old: Path) -> None:
    bundle = open_bundle(old / "bundle")
    assert bundle.manifest.name == "tiny-0" and bundle.manifest.schema_version == 2
    assert verify_bundle(bundle)["model.onnx"].min_cosine > 0.9999


def test_a_checkpoint_loads(old: Path) -> None:
    loaded = load_checkpoint(old / "checkpoint")
    assert loaded.encoder.config.backbone == "osnet_x0_25"


def test_a_crop_store_opens_with_its_links(old: Path) -> None:
    store = open_store(old / "crops")["train"]
    assert len(store) == 12 and decode(store.read(0)).shape == (64, 32, 3)
    assert [link[2] for link in read_links(old / "crops")] == [True, False]


def test_the_file_of_a_site_loads(old: Path) -> None:
    site = load_site(old / "site" / "site.toml")
    assert site.name == "lobby" and site.adapt.recipe == "purify-camera"


def test_a_data_folder_is_served_and_its_snapshot_restored(old: Path) -> None:
    shutil.rmtree(old / "restored", ignore_errors=True)
    verified = resight_here("snapshot", "verify", "kept", "--data", old / "gallery")
    assert verified.returncode == 0, verified.stderr
    (old / "gallery" / "tokens.json").unlink()  # with tokens, every call needs one
    for restore in (False, True):
        if restore:
            done = resight_here("snapshot", "restore", "kept", "--data", old / "gallery")
            assert done.returncode == 0, done.stderr
        server = ServerProcess(old / "bundle", old / "gallery")
        try:
            with Client(server.wait_ready()) as client:
                hits = client.search("lobby", jpeg(1)).hits
                assert {entry.entry_id for entry in client.entries("lobby")} == {f"e{n}" for n in range(6)}
                assert hits[0].entry.entry_id == "e2" and hits[0].similarity > 0.9999
                assert hits[0].entry.labels == {"shift": "night"}
                (verdict,) = client.list_feedback("lobby")
                assert {verdict.entry_id, verdict.other_entry_id} == {"e0", "e1"}
        finally:
            server.end()
