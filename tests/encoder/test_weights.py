from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torchvision

from resight.encoder.backbone import OSNet
from resight.encoder.checkpoint import Provenance, write_checkpoint
from resight.encoder.model import Encoder, EncoderConfig
from resight.encoder.weights import load_weights, restore_batch_norm
from resight.errors import WeightsError
from resight.image import ImageSpec


def torchreid_state(channels: tuple[int, int, int, int], dim: int = 512) -> dict[str, torch.Tensor]:
    """The tensors torchreid saves for an OSNet, classifier included."""
    torch.manual_seed(1)
    state = dict(OSNet(channels).state_dict())
    state["fc.0.weight"], state["fc.0.bias"] = torch.randn(dim, channels[-1]), torch.zeros(dim)
    for name in ("weight", "bias", "running_mean", "running_var"):
        state[f"fc.1.{name}"] = torch.rand(dim) + 0.5
    state["fc.1.num_batches_tracked"] = torch.tensor(7)
    return state | {"classifier.weight": torch.randn(10, dim), "classifier.bias": torch.zeros(10)}


@pytest.mark.parametrize(
    "backbone, channels", [("osnet_x0_25", (16, 64, 96, 128)), ("osnet_x1_0", (64, 256, 384, 512))]
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_torchreid_files_are_recognised_by_their_tensors(
    tmp_path: Path, backbone: str, channels: tuple[int, int, int, int], wrapped: bool
) -> None:
    state = torchreid_state(channels)
    content = (
        {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3} if wrapped else state
    )
    torch.save(content, tmp_path / "anything.pth")
    encoder = load_weights(str(tmp_path / "anything.pth")).encoder
    assert encoder.config.backbone == backbone and encoder.feature_dim == 512
    for view in ("global", "upper", "lower"):
        assert torch.equal(encoder.state_dict()[f"heads.{view}.embedding.weight"], state["fc.0.weight"])
    assert torch.equal(encoder.state_dict()["backbone.conv5.conv.weight"], state["conv5.conv.weight"])


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_resnets_from_a_file(tmp_path: Path, name: str) -> None:
    net = torchvision.models.get_model(name, weights=None)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    encoder = load_weights(str(tmp_path / "net.pth")).encoder
    assert encoder.config.backbone == name and encoder.config.pooling == "gem"
    assert torch.equal(encoder.state_dict()["backbone.layer4.0.conv1.weight"], net.layer4[0].conv1.weight)


def test_a_checkpoint_can_be_loaded_and_keeps_its_licence(tmp_path: Path) -> None:
    origin = Encoder(EncoderConfig(image=ImageSpec(64, 32)))
    write_checkpoint(tmp_path / "mine", origin, Provenance(initial_weights={"licence": "MIT"}))
    found = load_weights(str(tmp_path / "mine"))
    assert found.encoder.config == origin.config and found.source["licence"] == "MIT"


def test_builtin_weights_are_small_and_complete() -> None:
    found = load_weights("builtin")
    assert found.source["licence"] == "Apache-2.0" and not found.statistics_missing
    folder = Path(__import__("resight").__file__).parent / "encoder" / "builtin"
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1.5e6
    assert all(torch.isfinite(tensor).all() for tensor in found.encoder.state_dict().values())


def test_errors_list_missing_and_unexpected_tensors(tmp_path: Path) -> None:
    torch.save({"foo.weight": torch.zeros(1), "bar": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(
        WeightsError, match=r"missing conv1\.conv\.weight .* unexpected 2 tensors beginning with foo\.weight"
    ):
        load_weights(str(tmp_path / "other.pth"))
    state = torchreid_state((16, 64, 96, 128))
    del state["conv5.bn.bias"]
    state["conv9.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "holes.pth")
    with pytest.raises(
        WeightsError, match=r"1 missing \(backbone\.conv5\.bn\.bias\); 1 unexpected \(backbone\.conv9\.weight\)"
    ):
        load_weights(str(tmp_path / "holes.pth"))


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, ("/nonexistent/should-never-run",)


@pytest.mark.parametrize("content", ["text", "pickle", "empty", "list"])
def test_files_that_are_not_state_dicts_are_rejected_and_not_executed(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.pth"
    if content == "pickle":
        torch.save(Hostile(), path)
    elif content == "list":
        torch.save([torch.zeros(1)], path)
    else:
        path.write_bytes(b"just text" if content == "text" else b"")
    with pytest.raises(WeightsError):
        load_weights(str(path))


@pytest.mark.parametrize("source", ["nowhere.pth", "vgg16", "."])
def test_unknown_sources_list_the_valid_ones(source: str) -> None:
    with pytest.raises(WeightsError, match="expected 'builtin'"):
        load_weights(source)


def test_other_onnx_files_are_rejected(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "g",
        [value],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    )
    onnx.save(onnx.helper.make_model(graph), tmp_path / "relu.onnx")
    with pytest.raises(WeightsError, match="holds no OSNet"):
        load_weights(str(tmp_path / "relu.onnx"))
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(WeightsError, match="is not an ONNX file"):
        load_weights(str(tmp_path / "text.onnx"))


@pytest.mark.real
def test_both_real_files_compute_the_same_features_as_onnxruntime(shared_weights: Path) -> None:
    import onnxruntime

    images = torch.randn(8, 3, 256, 128, generator=torch.Generator().manual_seed(0))
    path = shared_weights / "osnet_x0_25_msmt17.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"images": images.numpy()})[0]
    for name in ("osnet_x0_25_msmt17.onnx", "osnet_x0_25_msmt17.pth"):
        encoder = load_weights(str(shared_weights / name)).encoder
        with torch.inference_mode():
            found = torch.relu(encoder.heads["global"](encoder.backbone(images))).numpy()
        assert np.abs(found - expected).max() < 2e-4 * np.abs(expected).max(), name


@pytest.mark.real
def test_restored_batch_norm_computes_the_same_in_train_mode(shared_weights: Path) -> None:
    found = load_weights(str(shared_weights / "osnet_x0_25_msmt17.onnx"))
    assert found.statistics_missing
    images = torch.randn(16, 3, 256, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = found.encoder.embed(images)
    restore_batch_norm(found.encoder, [images[:8], images[8:]])
    with torch.inference_mode():
        evaluated = found.encoder.embed(images)
        found.encoder.backbone.train()
        trained = found.encoder.embed(images)
    assert (before * evaluated).sum(1).min() > 0.99999
    assert (before * trained).sum(1).min() > 0.999


def test_torchvision_names_load_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = torchvision.models.get_model("resnet18", weights=None)
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(net.state_dict(), cache / Path(torchvision.models.ResNet18_Weights.DEFAULT.url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    found = load_weights("resnet18")
    assert found.encoder.config.backbone == "resnet18" and "ImageNet" in found.source["licence"]
    assert torch.equal(found.encoder.state_dict()["backbone.layer1.0.conv1.weight"], net.layer1[0].conv1.weight)


def test_a_failed_download_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request._opener", None)  # it keeps its proxy settings, also for later tests
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # a closed port
    with pytest.raises(WeightsError, match=r"put the file resnet18-\w+\.pth there and give its path"):
        load_weights("resnet18")


def test_the_backbones_name_loads_the_builtin_weights() -> None:
    one, other = load_weights("builtin"), load_weights("osnet_x0_25")
    assert other.encoder.config.backbone == "osnet_x0_25" and other.source == one.source
