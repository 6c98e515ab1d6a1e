"""Loading of initial weights: the built-in ones, torchvision's, and files of several formats.

    builtin, osnet_x0_25  resight's OSNet x0.25, trained with labels on synthetic people (docs/weights.md)
    resnet18, resnet50    torchvision's ImageNet weights, by torchvision's own download and cache
    FILE.pth              a torchreid OSNet or torchvision ResNet state dict (never a pickled module)
    FILE.onnx             an OSNet export with batch norms folded into the convolutions
    FOLDER                a resight checkpoint

If a file does not fit, the error lists the missing and the unexpected tensors.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from resight.encoder.backbone import OSNET_CHANNELS, RESNET_CHANNELS
from resight.encoder.checkpoint import describe_mismatch, is_checkpoint, load_checkpoint
from resight.encoder.model import Encoder, EncoderConfig
from resight.errors import WeightsError
from resight.image import ImageSpec

BUILTIN = "builtin"
BUILTIN_BACKBONE = "osnet_x0_25"  # the built-in weights are the only ones of this backbone that may be shipped
TORCHREID_IMAGE = ImageSpec(256, 128, "bilinear")  # torchreid's default transform
IMAGENET_IMAGE = ImageSpec(256, 128, "bicubic")  # SpCL, Cluster Contrast, LP and O2CAP
EXPECTED = "expected 'builtin' (an osnet_x0_25), 'resnet18', 'resnet50', a .pth or .onnx file, or a checkpoint folder"


@dataclass(frozen=True)
class InitialWeights:
    """An encoder to start from.

    Attributes:
        encoder: in eval mode; its local heads are copies of the global head unless the source has them.
        source: name, sha256 and licence, for the provenance.
        statistics_missing: batch norms were folded; call `restore_batch_norm` with crops before training.
    """

    encoder: Encoder
    source: Mapping[str, str]
    statistics_missing: bool = False


def load_weights(source: str) -> InitialWeights:
    """Load initial weights; see the module's docstring for the kinds of sources.

    Raises:
        WeightsError: the source does not exist, cannot be read or does not fit an encoder.
        CheckpointError: a checkpoint folder is damaged.
    """
    if source in (BUILTIN, BUILTIN_BACKBONE):
        with resources.as_file(resources.files("resight.encoder") / "builtin") as folder:
            return _from_checkpoint(folder, BUILTIN, "Apache-2.0")
    if source in RESNET_CHANNELS:
        return _from_torchvision(source)
    path = Path(source)
    if is_checkpoint(path):
        return _from_checkpoint(path, path.name, "")
    if not path.is_file():
        raise WeightsError(f"no initial weights at {source!r}: {EXPECTED}")
    if path.suffix == ".onnx":
        return _from_onnx(path)
    if path.suffix in (".pth", ".pt"):
        return _from_state_dict(_read_pth(path), path)
    raise WeightsError(f"unknown suffix {path.suffix!r} of {source!r}: {EXPECTED}")


def _from_checkpoint(folder: Path, name: str, licence: str) -> InitialWeights:
    """Load a checkpoint; it keeps the licence of its initial weights."""
    checkpoint = load_checkpoint(folder)
    kept = licence or str(checkpoint.provenance.initial_weights.get("licence", "unknown"))
    return InitialWeights(checkpoint.encoder, _describe(folder / "model.safetensors", name, kept))


def _from_torchvision(name: str) -> InitialWeights:
    """ImageNet weights, downloaded once into torch's cache."""
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        state = weights.get_state_dict(check_hash=True)
    except OSError as error:
        raise WeightsError(
            f"torchvision's {weights} could not be downloaded ({error}): on a machine without network, put the file "
            f"{Path(weights.url).name} there and give its path"
        ) from error
    encoder = _build(name, state, name)
    return InitialWeights(encoder, {"name": str(weights), "sha256": "", "licence": "BSD-3-Clause, trained on ImageNet"})


def _read_pth(path: Path) -> dict[str, Tensor]:
    """Tensors of a state dict, by torch's restricted unpickler."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # invalid files raise struct.error, IndexError, ...
        raise WeightsError(
            f"{path} is not a state dict that can be read safely "
            f"({str(error).partition(chr(10))[0] or 'it is empty'}): save it with torch.save(model.state_dict(), path)"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} holds {type(state).__name__}, expected a state dict: names and tensors")
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def _from_state_dict(state: dict[str, Tensor], path: Path) -> InitialWeights:
    """Recognise the architecture by its tensors, not by the file's name."""
    name = _recognise(state, path)
    return InitialWeights(
        _build(name, state, str(path)), _describe(path, path.name, "unknown: see where the file came from")
    )


def _recognise(state: Mapping[str, Tensor], path: Path) -> str:
    """The backbone that a state dict belongs to."""
    stem = state.get("conv1.conv.weight")
    for name, channels in OSNET_CHANNELS.items():
        if stem is not None and stem.shape[0] == channels[0]:
            return name
    if "layer4.0.conv1.weight" in state:
        return "resnet50" if "layer4.0.conv3.weight" in state else "resnet18"
    names = ", ".join(list(state)[:4])
    raise WeightsError(
        f"{path} holds no OSNet (x0.25, x1.0) or ResNet (18, 50): missing conv1.conv.weight and layer4.0.conv1.weight; "
        f"unexpected {len(state)} tensors beginning with {names}"
    )


def _build(name: str, state: Mapping[str, Tensor], source: str) -> Encoder:
    """Build an encoder with these weights; missing heads are initialised from the global layer or as identity."""
    if name in OSNET_CHANNELS:
        dim = state["fc.0.weight"].shape[0] if "fc.0.weight" in state else 512
        encoder = Encoder(EncoderConfig(name, "avg", dim, TORCHREID_IMAGE))
    else:
        encoder = Encoder(EncoderConfig(name, "gem", 0, IMAGENET_IMAGE))
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        layer, _, rest = key.partition(".")
        if layer == "fc" and name in OSNET_CHANNELS:  # torchreid: fc.0 linear, fc.1 batch norm, fc.2 ReLU
            part = {"0": "embedding", "1": "neck"}.get(rest[0], rest[0]) + rest[1:]
            renamed |= {f"heads.{view}.{part}": tensor for view in encoder.config.views}
        elif layer not in ("classifier", "fc"):
            renamed[f"backbone.{key}"] = tensor
    expected = encoder.state_dict()
    if name in RESNET_CHANNELS:  # ImageNet weights have no heads: pooling and neck keep their initial values
        renamed |= {key: tensor for key, tensor in expected.items() if key.startswith("heads.")}
    renamed = {key: tensor.to(expected[key].dtype) if key in expected else tensor for key, tensor in renamed.items()}
    problems = describe_mismatch(expected, renamed)
    if problems:
        raise WeightsError(f"{source} does not hold a complete {name}: {problems}")
    encoder.load_state_dict(renamed)
    return encoder.eval()


def _from_onnx(path: Path) -> InitialWeights:
    """Load an OSNet export whose batch norms were folded: see `restore_batch_norm`."""
    state = _read_onnx(path)
    name = _recognise(state, path)
    norms = {key: value for key, value in _identity_norms(name).items() if key not in state}
    encoder = _build(name, {**state, **norms}, str(path))
    return InitialWeights(encoder, _describe(path, path.name, "unknown: see where the file came from"), True)


def _read_onnx(path: Path) -> dict[str, Tensor]:
    """Tensors by the names of their torch modules; folded biases become batch-norm biases."""
    import onnx  # only this source needs it

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
        stored = {item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()) for item in graph.initializer}
    except Exception as error:  # onnx raises protobuf's errors and its own
        raise WeightsError(f"{path} is not an ONNX file that contains its weights ({error})") from error
    state = {
        name: value for name, value in stored.items() if name.partition(".")[0] in ("conv2", "conv3", "conv4", "fc")
    }
    for node in graph.node:
        if node.op_type == "Conv" and len(node.input) == 3 and node.input[1] not in state:
            scope = _module_path(node.name)
            norm = scope.rpartition(".")[0] + ".bn"
            state[f"{scope}.weight"] = stored[node.input[1]]
            state[f"{norm}.bias"] = stored[node.input[2]]
    return state


def _module_path(node: str) -> str:
    """Module of a node: /conv2/conv2.0/conv1/conv/Conv -> conv2.0.conv1.conv; sequences repeat their name."""
    path: list[str] = []
    for part in node.strip("/").split("/")[:-1]:
        repeated = next((i for i in range(len(path)) if part.startswith(".".join(path[i:]) + ".")), len(path))
        path = path[:repeated] + part.split(".")
    return ".".join(path)


def _identity_norms(name: str) -> dict[str, Tensor]:
    """Batch-norm tensors of a trunk that are the identity in eval mode."""
    trunk = Encoder(EncoderConfig(name)).backbone
    found: dict[str, Tensor] = {}
    for scope, module in trunk.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            size = module.num_features
            found |= {
                f"{scope}.weight": torch.ones(size),
                f"{scope}.running_mean": torch.zeros(size),
                f"{scope}.running_var": torch.full((size,), 1 - module.eps),
                f"{scope}.num_batches_tracked": torch.tensor(0),
            }
    found |= {"fc.1.num_batches_tracked": torch.tensor(0)}
    return found


@torch.no_grad()
def restore_batch_norm(encoder: Encoder, batches: Iterable[Tensor]) -> None:
    """Restore the statistics of folded batch norms in place, so that train mode computes nearly the same as eval mode.

    Each norm's input mean mu and variance v are measured over unlabelled crops; then the weight is set to
    sqrt(v + eps) and mu is added to the bias, which does not change the result in eval mode.

    Args:
        encoder: with identity norms, in eval mode.
        batches: normalised images (B, 3, H, W), a few hundred images in total.
    """
    norms = [module for module in encoder.backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    moments: defaultdict[nn.Module, list[Tensor]] = defaultdict(list)

    def collect(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        values = inputs[0].double().transpose(0, 1).flatten(1)  # (C, B*h*w)
        count = torch.full_like(values[:, 0], values.shape[1])
        moments[norm].append(torch.stack([count, values.sum(1), values.square().sum(1)]))  # (3, C)

    hooks = [norm.register_forward_pre_hook(collect) for norm in norms]
    for images in batches:
        encoder.backbone(images)
    for hook in hooks:
        hook.remove()
    for norm in norms:
        count, total, squares = torch.stack(moments[norm]).sum(0)
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        assert norm.running_mean is not None and norm.running_var is not None  # OSNet's norms track statistics
        norm.bias.add_(mean)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt())


def _describe(path: Path, name: str, licence: str) -> dict[str, Any]:
    """The provenance of a file of weights."""
    return {"name": name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "licence": licence}
