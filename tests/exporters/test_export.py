"""Exported bundles in a plain onnxruntime session compute torch's features."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from resight.bundle.bundle import Bundle, open_bundle
from resight.bundle.manifest import to_json
from resight.encoder.checkpoint import Provenance, write_checkpoint
from resight.encoder.model import Encoder, EncoderConfig
from resight.encoder.weights import load_weights
from resight.errors import AlreadyExistsError, BundleError, CheckpointError
from resight.exporters.export import encoder_space_id, export_checkpoint, export_encoder, model_name
from resight.exporters.forms import ExportOptions, SiteData, export_steps
from resight.exporters.onnx_graph import ServingGraph, to_onnx
from resight.exporters.verify import run_onnx, verify_bundle, verify_graph
from resight.image import ImageSpec, decode, fit

pytestmark = pytest.mark.long

SHARED = Path(__file__).parents[3] / "shared"
CONFIGS = {
    "osnet-avg": EncoderConfig("osnet_x0_25", "avg", 512, ImageSpec(64, 32, "bilinear")),
    "resnet18-gem": EncoderConfig("resnet18", "gem", 0, ImageSpec(64, 48)),
    "osnet-stripes": EncoderConfig("osnet_x0_25", "avg", 64, ImageSpec(64, 32), parts=4, part_dim=16, local_share=0.5),
}


@dataclasses.dataclass(frozen=True)
class Exported:
    """An encoder, its bundle, and the reported steps."""

    encoder: Encoder
    bundle: Bundle
    steps: tuple[str, ...]


def random_encoder(config: EncoderConfig, seed: int = 0) -> Encoder:
    """Weights from torch's initialisers; batch norms far from identity, with statistics of real activations."""
    torch.manual_seed(seed)
    encoder = Encoder(config)
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.momentum = 0.7
                if module.bias.requires_grad:
                    module.bias.normal_(0.0, 0.3)
        if config.pooling == "gem":
            encoder.heads["global"].pool.p.fill_(2.7)  # a power without special case
        encoder.train()
        for _ in range(3):
            images = torch.randint(0, 256, (16, config.image.height, config.image.width, 3), dtype=torch.uint8)
            encoder(encoder.normalise(images))
    return encoder.eval()


def random_images(config: EncoderConfig, count: int, seed: int = 1) -> np.ndarray:
    """uint8 (count, H, W, 3): coarse colour blocks, different in each image."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, config.image.height // 8, config.image.width // 8, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)


@pytest.fixture(scope="session", params=CONFIGS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    encoder = random_encoder(CONFIGS[request.param])
    path, steps = tmp_path_factory.mktemp("exported") / request.param, []
    bundle = export_encoder(
        encoder,
        path,
        name=request.param,
        training={"recipe": {}},
        weights_licence="CC0-1.0",
        progress=steps.append,
    )
    return Exported(encoder, bundle, tuple(steps))


def torch_features(encoder: Encoder, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    with torch.inference_mode():
        return encoder.embed(encoder.normalise(torch.from_numpy(images))).numpy()


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Row by row, in double precision."""
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    return (wide_a * wide_b).sum(1) / np.linalg.norm(wide_a, axis=1) / np.linalg.norm(wide_b, axis=1)


@pytest.mark.parametrize("batch", [1, 7, 16])
def test_onnxruntime_equals_torch(exported: Exported, batch: int) -> None:
    images = random_images(exported.encoder.config, batch)
    session = onnxruntime.InferenceSession(str(exported.bundle.artefact()), providers=["CPUExecutionProvider"])
    features = session.run(["features"], {"images": images})[0]
    expected = torch_features(exported.encoder, images)
    assert features.shape == (batch, exported.encoder.feature_dim) and features.dtype == np.float32
    assert cosines(features, expected).min() >= 0.9999
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, atol=1e-5)
    if batch > 1:  # features of different images differ, so the cosine above is meaningful
        assert (expected @ expected.T).min() < 0.9


def test_a_feature_does_not_depend_on_the_other_rows_of_its_batch(exported: Exported) -> None:
    images = random_images(exported.encoder.config, 9)
    run = run_onnx(exported.bundle.read())
    alone = np.concatenate([run(images[i : i + 1]) for i in range(9)])
    np.testing.assert_allclose(run(images), alone, atol=1e-5)


def test_the_graph_matches_the_specified_format(exported: Exported) -> None:
    model = onnx.load(exported.bundle.artefact(), load_external_data=False)
    spec = exported.encoder.config.image
    assert {opset.domain for opset in model.opset_import} == {""}
    images, features = model.graph.input[0], model.graph.output[0]
    assert (images.name, features.name, len(model.graph.input), len(model.graph.output)) == ("images", "features", 1, 1)
    assert images.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    shape = [dim.dim_param or dim.dim_value for dim in images.type.tensor_type.shape.dim]
    assert shape == ["batch", spec.height, spec.width, 3]
    operators = [node.op_type for node in model.graph.node]
    assert operators.count("BatchNormalization") <= 1  # folded, except a neck without a linear layer before it
    assert ("Pow" in operators) == (exported.encoder.config.pooling == "gem")
    elements = sum(np.prod(tensor.dims, dtype=int) for tensor in model.graph.initializer)
    backbone = sum(tensor.numel() for tensor in exported.encoder.backbone.parameters())
    assert elements < backbone + exported.encoder.feature_dim * (exported.encoder.channels + 8) + 1000  # one head
    text = exported.bundle.read()
    assert b"site-packages" not in text and b"/work" not in text and os.fsencode(Path.home()) not in text


def test_the_manifest_contains_the_measurements(exported: Exported) -> None:
    manifest = open_bundle(exported.bundle.path).manifest
    assert exported.steps == export_steps(ExportOptions(), SiteData())
    assert manifest.training == {"recipe": {}} and manifest.evaluation["left_out"] == {}
    assert manifest.evaluation["forms"]["model.onnx"]["images_per_s"] > 0
    artefact = manifest.artefacts[0]
    assert (artefact.file, artefact.precision, artefact.runtime) == ("model.onnx", "fp32", "onnx")
    assert 0.9999 <= artefact.min_cosine <= 1.0
    assert 0.0 <= artefact.max_abs_diff < 1e-3
    assert manifest.image == exported.encoder.config.image
    assert manifest.space_id == encoder_space_id(exported.encoder)
    assert set(manifest.versions) == {"numpy", "onnx", "onnxruntime", "resight", "torch"}
    probes = exported.bundle.probes()
    assert cosines(torch_features(exported.encoder, probes.pixels), probes.features).min() > 0.99999


def test_a_moved_bundle_verifies(exported: Exported, tmp_path: Path) -> None:
    moved = tmp_path / "another name"
    shutil.copytree(exported.bundle.path, moved)
    assert verify_bundle(open_bundle(moved))["model.onnx"].min_cosine >= 0.9999


@pytest.mark.parametrize("exported", ["resnet18-gem"], indirect=True)
def test_a_bundle_with_another_models_graph_does_not_verify(exported: Exported, tmp_path: Path) -> None:
    """With valid hashes and signature but another model's features, only the probes detect it."""
    other = to_onnx(ServingGraph(random_encoder(exported.encoder.config, seed=5)), exported.encoder.config.image)
    with pytest.raises(BundleError, match=r"the other graph differs from the torch model: min cosine -?0\."):
        verify_graph(other, exported.bundle.probes(), what="the other graph")
    path = tmp_path / "swapped"
    shutil.copytree(exported.bundle.path, path)
    manifest = exported.bundle.manifest
    artefact = dataclasses.replace(manifest.artefacts[0], sha256=hashlib.sha256(other).hexdigest())
    (path / "model.onnx").write_bytes(other)
    (path / "manifest.json").write_bytes(to_json(dataclasses.replace(manifest, artefacts=(artefact,))))
    with pytest.raises(BundleError, match=r"model\.onnx gives other features than the exported model"):
        verify_bundle(open_bundle(path))


@pytest.mark.parametrize("exported", ["resnet18-gem"], indirect=True)
def test_exporting_again_gives_the_same_bytes(exported: Exported, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in exported.encoder.state_dict().items()}
    again = export_encoder(
        exported.encoder.train(), tmp_path / "again", name="x", training={}, weights_licence="CC0-1.0"
    )
    assert exported.encoder.training, "the caller's encoder must be left as it was"
    exported.encoder.eval()
    assert all(torch.equal(before[name], tensor) for name, tensor in exported.encoder.state_dict().items())
    assert again.read() == exported.bundle.read()
    assert again.manifest.space_id == exported.bundle.manifest.space_id
    assert again.manifest.probes == exported.bundle.manifest.probes


def test_the_space_id_depends_only_on_what_determines_features() -> None:
    encoder = random_encoder(CONFIGS["osnet-avg"])
    first = encoder_space_id(encoder)
    with torch.no_grad():
        encoder.heads["upper"].neck.weight += 1.0
        encoder.heads["global"].neck.num_batches_tracked += 1
        assert encoder_space_id(encoder) == first
        encoder.heads["global"].neck.running_mean += 1e-3
    assert encoder_space_id(encoder) != first


def test_weights_that_are_not_finite_are_rejected(tmp_path: Path) -> None:
    encoder = random_encoder(CONFIGS["osnet-avg"])
    with torch.no_grad():
        encoder.heads["global"].embedding.weight[0, 0] = torch.nan
    with pytest.raises(BundleError, match=r"heads\.global\.embedding\.weight are not finite"):
        export_encoder(encoder, tmp_path / "bundle", name="x", training={}, weights_licence="none")
    assert not (tmp_path / "bundle").exists()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    encoder = random_encoder(CONFIGS["resnet18-gem"])
    provenance = Provenance(
        recipe={"name": "purify", "epochs": 3},
        stage="student",
        epoch=2,
        store_fingerprint="ab" * 32,
        initial_weights={"name": "builtin", "licence": "Apache-2.0"},
    )
    write_checkpoint(tmp_path / "checkpoint", encoder, provenance)
    return tmp_path / "checkpoint"


def test_the_command_makes_a_bundle_that_opens(checkpoint: Path, tmp_path: Path) -> None:
    out, figures = tmp_path / "My Site (2)", tmp_path / "figures.json"
    code = "import typer; from resight.cli.export import export; typer.run(export)"
    arguments = [str(checkpoint), "--out", str(out), "--json", str(figures)]
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ | {"COLUMNS": "160"})
    assert done.returncode == 0, done.stderr
    assert "model.onnx" in done.stdout and "min cosine" in done.stdout
    bundle = open_bundle(out)
    manifest = bundle.manifest
    assert manifest.name == "my-site-2"
    assert manifest.weights_licence == "Apache-2.0"
    assert manifest.training["recipe"] == {"name": "purify", "epochs": 3}
    assert manifest.training["stage"] == "student" and manifest.training["store_fingerprint"] == "ab" * 32
    assert EncoderConfig.from_json(manifest.training["config"]) == CONFIGS["resnet18-gem"]
    result = json.loads(figures.read_text())
    assert result["artefacts"][0]["min_cosine"] == manifest.artefacts[0].min_cosine >= 0.9999
    with pytest.raises(AlreadyExistsError, match="choose another"):
        export_checkpoint(checkpoint, out)


def test_a_checkpoint_of_another_architecture_is_rejected(checkpoint: Path, tmp_path: Path) -> None:
    index = json.loads((checkpoint / "checkpoint.json").read_text())
    index["encoder"] |= {"backbone": "osnet_x0_25", "pooling": "avg", "embedding_dim": 512}
    (checkpoint / "checkpoint.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"osnet_x0_25 encoder: .*missing .*unexpected"):
        export_checkpoint(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_missing_checkpoint_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        export_checkpoint(tmp_path, tmp_path / "bundle")


@pytest.mark.parametrize(
    ("folder", "name"),
    [("My Site (2)", "my-site-2"), ("..", "model"), ("Über", "ber"), ("a.b_c-1", "a.b_c-1"), ("x" * 99, "x" * 63)],
)
def test_names_are_normalised(folder: str, name: str) -> None:
    assert model_name(folder) == name


@pytest.mark.slow
@pytest.mark.real
def test_real_weights_equal_an_independent_export_of_them(tmp_path: Path) -> None:
    """The same network as exported by torchreid, whose last ReLU ours omits."""
    weights, crops = SHARED / "weights" / "osnet_x0_25_msmt17", SHARED / "data" / "market-subset" / "query"
    if not crops.is_dir() or not weights.with_suffix(".pth").is_file():
        pytest.skip(f"no real crops or weights at {SHARED}")
    start = load_weights(str(weights.with_suffix(".pth")))
    bundle = export_encoder(start.encoder, tmp_path / "real", name="real", training={}, weights_licence="research")
    spec = ImageSpec(256, 128, "bilinear")
    paths = sorted(crops.glob("*.jpg"))[::9][:21]
    images = np.stack([fit(decode(path.read_bytes()), spec) for path in paths])
    ours = run_onnx(bundle.read())(images)
    assert cosines(ours, torch_features(start.encoder, images)).min() >= 0.9999
    peer = onnxruntime.InferenceSession(str(weights.with_suffix(".onnx")), providers=["CPUExecutionProvider"])
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalised = ((images / 255.0 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)
    theirs = peer.run(None, {peer.get_inputs()[0].name: normalised})[0]
    assert cosines(np.maximum(ours, 0.0), theirs).min() >= 0.9999
