"""Exports with fp16, INT8, calibration and signature, by the command line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from exports import draw_crops, make_encoder
from tiny import CONFIG, draw_site, random_encoder, resight_here, the_error, write_random_checkpoint

from resight.bundle.bundle import Bundle, open_bundle
from resight.bundle.signing import generate_key
from resight.cli.export import SiteDataLoader, fitted_pixels, sample_crops, sample_tracks
from resight.encoder.checkpoint import Provenance, write_checkpoint
from resight.encoder.weights import load_weights
from resight.errors import BundleError, RecipeError
from resight.exporters.export import export_encoder
from resight.exporters.forms import ExportOptions, SiteData, export_steps
from resight.exporters.verify import run_onnx, verify_bundle
from resight.training.store.datasets import Site, open_site

pytestmark = pytest.mark.long

SHARED = Path(__file__).parents[3] / "shared"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return draw_site(tmp_path_factory.mktemp("drawn") / "site")


@pytest.fixture(scope="module")
def exported(site: Site, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, dict[str, object], str]:
    """A bundle with every form, the JSON output and the printed output."""
    root = tmp_path_factory.mktemp("exported")
    checkpoint = root / "checkpoint"  # with real weights: INT8 of random ones is meaningless
    write_checkpoint(checkpoint, load_weights("builtin").encoder, Provenance(initial_weights={"licence": "Apache-2.0"}))
    public = generate_key(root / "site.key")
    done = resight_here(
        "export",
        checkpoint,
        "--out",
        root / "lobby",
        "--precision",
        "fp32, fp16,int8",
        "--tensorrt",
        "--site",
        site.root,
        "--evaluation",
        draw_site(root / "certain", test_noise=6).root,
        "--sign-key",
        root / "site.key",
        "--json",
        root / "figures.json",
    )
    assert done.returncode == 0, done.stderr
    return (
        open_bundle(root / "lobby", trusted_keys=(public,)),
        json.loads((root / "figures.json").read_text()),
        done.stdout,
    )


def test_every_form_reproduces_the_model(exported: tuple[Bundle, dict[str, object], str], site: Site) -> None:
    bundle, figures, _ = exported
    assert [(a.file, a.precision, a.runtime) for a in bundle.manifest.artefacts] == [
        ("model.onnx", "fp32", "onnx"),
        ("model.fp16.onnx", "fp16", "onnx"),
        ("model.int8.onnx", "int8", "onnx"),
        ("model.int8.tensorrt.onnx", "int8", "tensorrt"),
    ]
    assert figures["left_out"] == {} and verify_bundle(bundle).keys() == {a.file for a in bundle.manifest.artefacts}
    crops = fitted_pixels(site.train.subset(np.arange(0, 240, 5)), bundle.manifest.image)
    whole = run_onnx(bundle.read())(crops)
    for precision, runtime, least in (("fp16", "onnx", 0.9999), ("int8", "onnx", 0.98), ("int8", "tensorrt", 0.98)):
        cosine = (run_onnx(bundle.read(precision, runtime))(crops) * whole).sum(axis=1)
        assert cosine.mean() >= least, (precision, runtime)


def test_measurements_are_in_the_manifest_and_in_the_table(exported: tuple[Bundle, dict[str, object], str]) -> None:
    bundle, figures, output = exported
    forms = bundle.manifest.evaluation["forms"]
    assert forms["model.int8.onnx"]["mean_cosine"] >= 0.98
    assert forms["model.onnx"]["mAP"] > 0.999  # robust against rounding differences between CPUs
    assert abs(forms["model.int8.onnx"]["mAP"] - forms["model.onnx"]["mAP"]) <= 0.01
    assert forms["model.onnx"]["images_per_s"] > 0 and "cores" in bundle.manifest.evaluation["measured_on"]
    for artefact in bundle.manifest.artefacts:
        assert artefact.file in output
    for column in ("min cosine", "max diff", "crops/s", "site cosine", "mAP"):
        assert column in output
    assert figures["signer"] == bundle.manifest.signer != ""


def test_the_report_states_why_there_is_no_calibration(exported: tuple[Bundle, dict[str, object], str]) -> None:
    """Eight persons are too few for a calibration; the page states that instead of drawing a curve."""
    bundle, figures, output = exported
    page = bundle.path.with_name("lobby-report.html")
    assert figures["report"] == str(page) and str(page) in output
    assert bundle.manifest.calibration is None and "not calibrated" in output
    text = page.read_text()
    assert "Not calibrated:" in text and "model.int8.onnx" in text and "<script" not in text


def test_missing_tensorrt_is_reported(exported: tuple[Bundle, dict[str, object], str]) -> None:
    _, figures, _ = exported
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        assert figures["engines"] == []


def test_a_signed_bundle_is_served_only_with_its_trusted_key(
    exported: tuple[Bundle, dict[str, object], str], tmp_path: Path
) -> None:
    bundle, _, _ = exported
    moved = tmp_path / "moved"
    shutil.copytree(bundle.path, moved)
    other = generate_key(tmp_path / "other.key")
    assert open_bundle(moved).manifest == bundle.manifest
    with pytest.raises(BundleError, match="is signed by"):
        open_bundle(moved, trusted_keys=(other,))
    (moved / "manifest.json.minisig").unlink()
    with pytest.raises(BundleError, match=r"manifest\.json\.minisig is missing"):
        open_bundle(moved)


def test_int8_that_fails_its_criteria_is_skipped_with_a_reason(tmp_path: Path) -> None:
    measured = iter((0.9, 0.5))  # mAP before and after, as of a model that INT8 degrades
    bundle = export_encoder(
        make_encoder("osnet_x0_25"),
        tmp_path / "bundle",
        name="x",
        training={},
        weights_licence="none",
        options=ExportOptions(("int8",)),
        site=SiteData(draw_crops(), measure=lambda run: next(measured)),
    )
    assert [artefact.precision for artefact in bundle.manifest.artefacts] == ["fp32"]
    assert bundle.manifest.evaluation["left_out"] == {
        "model.int8.onnx": "mAP 50.0 against 90.0 of fp32: 40.0 lost, more than 1"
    }


def test_impossible_exports_are_rejected_before_the_work(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "checkpoint")
    out = tmp_path / "bundle"
    assert "--site" in the_error(resight_here("export", checkpoint, "--out", out, "--precision", "int8"))
    assert "fp32, fp16, int8" in the_error(resight_here("export", checkpoint, "--out", out, "--precision", "fp8"))
    with pytest.raises(RecipeError, match="unknown precision"):
        ExportOptions(("fp32", ""))
    assert not out.exists()


def test_too_few_crops_are_rejected(site: Site, tmp_path: Path) -> None:
    site_data = SiteData(fitted_pixels(site.train.subset(np.arange(3)), CONFIG.image))
    with pytest.raises(BundleError, match="found 3"):
        export_encoder(
            random_encoder(),
            tmp_path / "b",
            name="x",
            training={},
            weights_licence="none",
            options=ExportOptions(("int8",)),
            site=site_data,
        )
    assert not (tmp_path / "b").exists()


def test_samples_are_even_over_cameras_and_keep_tracks_whole(site: Site) -> None:
    store = site.train
    some = sample_crops(store, 30)
    assert np.bincount(some.cameras).tolist() == [10, 10, 10] and sample_crops(store, 30).paths == some.paths
    assert len(sample_crops(store, 1000)) == len(store)
    tracked = dataclasses.replace(store, tracks=np.arange(len(store)) // 6)
    kept = sample_tracks(tracked, 60)
    assert len(kept) == 60
    _, counts = np.unique(np.stack([kept.cameras, kept.tracks]), axis=1, return_counts=True)
    assert (counts == 2).sum() >= len(counts) - 1  # six rows of a track are two of each camera; the last is cut
    assert len(sample_tracks(store, 60)) == 60 and len(sample_tracks(tracked, 240)) == 240


def test_steps_are_reported_in_order() -> None:
    options = ExportOptions(("int8", "fp16"), tensorrt=True)
    crops = np.zeros((16, 64, 32, 3), np.uint8)
    assert export_steps(options, SiteData(crops, calibrate=lambda run: None)) == (
        "reference features",
        "graph",
        "parity",
        "fp32",
        "fp16",
        "int8",
        "int8 for TensorRT",
        "calibration",
        "files",
    )
    assert export_steps(ExportOptions(), SiteData()) == ("reference features", "graph", "parity", "fp32", "files")


@pytest.mark.slow
@pytest.mark.real
def test_int8_of_a_real_model_meets_the_criteria_on_real_crops(tmp_path: Path) -> None:
    weights, market = SHARED / "weights" / "osnet_x0_25_msmt17.pth", SHARED / "data" / "market-subset"
    if not weights.is_file() or not market.is_dir():
        pytest.skip(f"no real crops or weights at {SHARED}")
    start, site = load_weights(str(weights)), open_site(market)
    spec = start.encoder.config.image
    assert site.query is not None and site.gallery is not None
    few = np.unique(site.query.persons)[:40]  # of 101; the whole set is measured by benchmarks/bench_runtime.py
    known = dataclasses.replace(
        site,
        query=site.query.subset(np.flatnonzero(np.isin(site.query.persons, few))),
        gallery=site.gallery.subset(np.flatnonzero(np.isin(site.gallery.persons, few))),
    )
    bundle = export_encoder(
        start.encoder,
        tmp_path / "bundle",
        name="real",
        training={},
        weights_licence="research",
        options=ExportOptions(("int8",)),
        site=SiteData(
            fitted_pixels(sample_crops(site.train, 256), spec), measure=SiteDataLoader(None, spec, known).measure
        ),
    )
    forms = bundle.manifest.evaluation["forms"]
    assert forms["model.int8.onnx"]["mean_cosine"] >= 0.98
    assert forms["model.onnx"]["mAP"] - forms["model.int8.onnx"]["mAP"] <= 0.01
