"""The encoder: images to unit features of three views.

Backbone, then pooling, optional linear embedding and a batch-norm neck (BNNeck, Luo et al., CVPRW 2019) for the whole
map (global) and for each of its parts: upper and lower half in *Learning to Purification* (LP; Lan et al., TIP 2023;
the two "local views"). A trained model uses only the global head, unless the config has a ``local_share``.

Letters: B batch, C channels, D feature size, H and W of an image, h and w of a feature map.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from resight.encoder.backbone import BACKBONES, build_backbone
from resight.image import ImageSpec

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB in [0, 1], used for all initial weights
IMAGENET_STD = (0.229, 0.224, 0.225)
STRIDE = 16  # image rows per row of the feature map, for all backbones
HALVES = ("upper", "lower")  # LP's two local views
Views = tuple[Tensor, ...]  # unit features (B, D): the global view, then one per part from top to bottom


@dataclass(frozen=True)
class EncoderConfig:
    """The architecture of an encoder: equal configs have the same parameters.

    Attributes:
        backbone: one of `resight.encoder.backbone.BACKBONES`.
        pooling: "gem" (LP, section 3.2 of the released code: p learnable, initially 3) or "avg" (OSNet, O2CAP).
        embedding_dim: outputs of a linear layer between pooling and neck; 0 means none (BNNeck of LP and O2CAP).
        image: input size and resize filter.
        parts: horizontal stripes of equal height with a head of their own; 2 in LP, 8 in selective contrast.
        part_dim: length of a part's feature; 0 = the global feature's.
        local_share: share of the parts in the squared distance between embeddings; 0 = global view only.

    Raises:
        ValueError: a field is out of range.
    """

    backbone: str = "osnet_x0_25"
    pooling: Literal["avg", "gem"] = "avg"
    embedding_dim: int = 512
    image: ImageSpec = field(default_factory=ImageSpec)
    parts: int = 2
    part_dim: int = 0
    local_share: float = 0.0

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ValueError(f"unknown backbone {self.backbone!r}: expected one of {', '.join(BACKBONES)}")
        if self.pooling not in ("avg", "gem"):
            raise ValueError(f"unknown pooling {self.pooling!r}: expected avg or gem")
        if not 0 <= self.embedding_dim <= 8192:
            raise ValueError(f"embedding_dim must be 0 (none) to 8192, found {self.embedding_dim}")
        if not (1 <= self.parts <= 16 and 0 <= self.part_dim <= 8192 and 0 <= self.local_share < 1):
            raise ValueError(
                f"expected 1 to 16 parts, part_dim 0 to 8192 and local_share in [0, 1), found {self.parts}, "
                f"{self.part_dim} and {self.local_share}"
            )
        if self.image.height // STRIDE < self.parts:
            raise ValueError(f"{self.parts} parts need a height of {STRIDE * self.parts} at least: {self.image}")

    @property
    def views(self) -> tuple[str, ...]:
        """Names of the heads."""
        return ("global", *(HALVES if self.parts == 2 else (f"part{i}" for i in range(self.parts))))

    def to_json(self) -> dict[str, Any]:
        """Plain values for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> EncoderConfig:
        """Parse the output of `to_json`.

        Raises:
            ValueError, TypeError: unknown, missing or invalid values.
        """
        return cls(**{**values, "image": ImageSpec(**values["image"])})


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


class EmbeddingHead(nn.Module):
    """Pooling, optional embedding, batch-norm neck: a map to a vector that is not normalised."""

    def __init__(self, channels: int, config: EncoderConfig, dim: int) -> None:
        super().__init__()
        self.pool = GeM() if config.pooling == "gem" else AveragePool()
        self.embedding = nn.Linear(channels, dim) if dim else nn.Identity()
        dim = dim or channels
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
        whole, *parts = config.views
        self.heads = nn.ModuleDict({whole: EmbeddingHead(self.channels, config, config.embedding_dim)})
        self.heads.update(
            {part: EmbeddingHead(self.channels, config, config.part_dim or config.embedding_dim) for part in parts}
        )
        # Buffers outside the state dict: constants of the input contract, not weights.
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    @property
    def feature_dim(self) -> int:
        """D, the length of an embedding."""
        whole = self.config.embedding_dim or self.channels
        parts = self.config.parts * (self.config.part_dim or whole) if self.config.local_share else 0
        return whole + parts

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, 3) RGB -> float32 (B, 3, H, W) with ImageNet statistics."""
        batch, height, width, _ = images.shape
        rows = images.reshape(batch, height, 3 * width).float()  # whole rows at a time: three times as fast on a CPU
        rows.sub_(self.mean.flatten().repeat(width)).div_(self.std.flatten().repeat(width))
        return rows.view(batch, height, width, 3).permute(0, 3, 1, 2)  # channels last in memory

    def forward(self, images: Tensor) -> Views:
        """Normalised images (B, 3, H, W) -> unit features of all views, the global one first.

        If the height is not a multiple of the parts, the last rows are ignored (as in LP's released code).
        """
        maps = split_stripes(self.backbone(images), self.config.parts)
        return tuple(unit_rows(head(part)) for head, part in zip(self.heads.values(), maps, strict=True))

    def embed(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> unit embeddings (B, D); with the parts if `local_share` > 0."""
        if not self.config.local_share:
            return unit_rows(self.heads["global"](self.backbone(images)))
        return join_views(self(images), self.config.local_share)


def split_stripes(features: Tensor, parts: int) -> list[Tensor]:
    """A map (B, C, h, w), then its stripes from top to bottom, each (B, C, h // parts, w)."""
    height = features.shape[2] // parts
    return [features, *(features[:, :, i * height : (i + 1) * height] for i in range(parts))]


def join_views(views: Sequence[Tensor], local_share: float) -> Tensor:
    """Views of unit length -> unit embeddings (B, D).

    With local_share l and S parts: [sqrt(1 - l) g, sqrt(l / S) p_1, ...]; its squared distance is the weighted sum of
    the views' (selective contrast's distance for ranking, without its camera term).
    """
    whole, *parts = views
    share = (local_share / len(parts)) ** 0.5
    return torch.cat([(1 - local_share) ** 0.5 * whole, *(share * part for part in parts)], 1)


def with_parts(encoder: Encoder, parts: int, local_share: float) -> Encoder:
    """A copy of an encoder with other parts; their features together are as long as the global one.

    Part i is initialised with the i-th slice of the global head's outputs, so that together the parts compute the
    global feature, each slice from one stripe. If the global head has no linear layer (ResNet), the parts are random.
    """
    config = encoder.config
    if (config.parts, config.local_share) == (parts, local_share):
        return copy.deepcopy(encoder)
    if config.parts == parts:
        changed = Encoder(replace(config, local_share=local_share))
        changed.load_state_dict(encoder.state_dict())
        return changed.train(encoder.training)
    whole = encoder.heads["global"]
    dim = (config.embedding_dim or encoder.channels) // parts
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)  # for the random parts of a ResNet
        changed = Encoder(replace(config, parts=parts, part_dim=dim, local_share=local_share))
    changed.backbone.load_state_dict(encoder.backbone.state_dict())
    changed.heads["global"].load_state_dict(whole.state_dict())
    if config.embedding_dim:
        for i, name in enumerate(changed.config.views[1:]):
            changed.heads[name].load_state_dict(_rows_of(whole.state_dict(), slice(i * dim, (i + 1) * dim)))
    return changed.train(encoder.training)


def _rows_of(state: Mapping[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """The state of some outputs of a head; pooling parameters are unchanged."""
    return {key: value[rows] if value.ndim and not key.startswith("pool.") else value for key, value in state.items()}


def unit_rows(features: Tensor) -> Tensor:
    """Rows of length 1, in float32: similarities must not be rounded to bfloat16."""
    return functional.normalize(features.float(), dim=1)
