"""The encoder: images to unit features of three views.

Backbone, pooling, optional linear embedding and a batch-norm neck (BNNeck, Luo et al., CVPRW 2019),
once for the whole map (global) and once for its upper and its lower half, as *Learning to
Purification* does (Lan et al., TIP 2023; the two "local views"). Only the global head is used
once a model is trained.

Letters: B batch, C channels, D feature size, H and W of an image, h and w of a feature map.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from resight.backbone import BACKBONES, build_backbone
from resight.image import ImageSpec

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB in [0, 1], the statistics every initial weight here was trained with
IMAGENET_STD = (0.229, 0.224, 0.225)
VIEWS = ("global", "upper", "lower")


@dataclass(frozen=True)
class EncoderConfig:
    """What must be equal for two encoders to have the same parameters.

    Attributes:
        backbone: one of `resight.backbone.BACKBONES`.
        pooling: "gem" (LP, section 3.2 of the released code: p learnable, initially 3) or "avg" (OSNet, O2CAP).
        embedding_dim: outputs of a linear layer between pooling and neck; 0 means none (BNNeck of LP and O2CAP).
        image: input size and resize filter.

    Raises:
        ValueError: a field is outside what is said above.
    """

    backbone: str = "osnet_x0_25"
    pooling: Literal["avg", "gem"] = "avg"
    embedding_dim: int = 512
    image: ImageSpec = field(default_factory=ImageSpec)

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ValueError(f"unknown backbone {self.backbone!r}: expected one of {', '.join(BACKBONES)}")
        if self.pooling not in ("avg", "gem"):
            raise ValueError(f"unknown pooling {self.pooling!r}: expected avg or gem")
        if not 0 <= self.embedding_dim <= 8192:
            raise ValueError(f"embedding_dim must be 0 (none) to 8192, found {self.embedding_dim}")

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `from_json` reads them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> EncoderConfig:
        """Read what `to_json` wrote.

        Raises:
            ValueError, TypeError: unknown, missing or impossible values.
        """
        return cls(**{**values, "image": ImageSpec(**values["image"])})


class Views(NamedTuple):
    """Unit features of the three views, each float32 (B, D)."""

    whole: Tensor
    upper: Tensor
    lower: Tensor


class GeM(nn.Module):
    """Generalised-mean pooling: (mean of max(x, 1e-6)^p)^(1/p), p learnable (Radenovic et al., TPAMI 2019)."""

    def __init__(self, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([p]))
        self.eps = eps

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C)."""
        return features.float().clamp(min=self.eps).pow(self.p).mean((2, 3)).pow(1.0 / self.p)


class AveragePool(nn.Module):
    """Mean over the map."""

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C)."""
        return features.float().mean((2, 3))


class Head(nn.Module):
    """Pooling, optional embedding, batch-norm neck: a map to a vector not yet of unit length."""

    def __init__(self, channels: int, config: EncoderConfig) -> None:
        super().__init__()
        dim = config.embedding_dim or channels
        self.pool = GeM() if config.pooling == "gem" else AveragePool()
        self.embedding = nn.Linear(channels, dim) if config.embedding_dim else nn.Identity()
        self.neck = nn.BatchNorm1d(dim)
        self.neck.bias.requires_grad_(False)  # BNNeck: features stay centred around the origin

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, D)."""
        out: Tensor = self.neck(self.embedding(self.pool(features)))
        return out


class Encoder(nn.Module):
    """Images to unit features; see the module's docstring."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone, self.channels = build_backbone(config.backbone)
        self.heads = nn.ModuleDict({view: Head(self.channels, config) for view in VIEWS})
        # Buffers outside the state dict: constants of the input contract, not weights.
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    @property
    def feature_dim(self) -> int:
        """D, the length of a feature."""
        return self.config.embedding_dim or self.channels

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) RGB -> float32 (B, 3, H, W) with ImageNet statistics."""
        return (images.permute(0, 3, 1, 2).float() - self.mean) / self.std

    def forward(self, images: Tensor) -> Views:
        """Normalised images (B, 3, H, W) -> unit features of all three views.

        With an odd map height the last row is left out of both halves (LP's released code).
        """
        features = self.backbone(images)  # (B, C, h, w)
        half = features.shape[2] // 2
        maps = (features, features[:, :, :half], features[:, :, half : 2 * half])
        return Views(*(unit(self.heads[view](part)) for view, part in zip(VIEWS, maps, strict=True)))

    def embed(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> unit features (B, D) of the global view alone."""
        return unit(self.heads["global"](self.backbone(images)))


def unit(features: Tensor) -> Tensor:
    """Rows of length 1, in float32: similarities must not be rounded to bfloat16."""
    return functional.normalize(features.float(), dim=1)
