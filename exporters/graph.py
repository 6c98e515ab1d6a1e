"""The graph a bundle carries: bytes of RGB in, unit vectors out, nothing left for the caller to get wrong."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from resight.model import Encoder, cut, join


class ServingGraph(nn.Module):
    """An encoder's embedding with normalisation and L2 inside; heads it does not use stay behind.

    The division by the standard deviation is folded into the first convolution (exact: it is linear).
    The mean is subtracted, not folded: a convolution pads with zeros, and zero means "average colour" only
    after the subtraction.
    """

    mean: Tensor

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        source = copy.deepcopy(encoder).cpu().float().eval()
        self.config = source.config
        self.backbone = source.backbone
        # a list: "global" is a word of Python's, and the exporter writes Python
        self.heads = nn.ModuleList(list(source.heads.values())[: None if source.config.local_share else 1])
        self.register_buffer("mean", source.mean)
        first = next(module for module in self.backbone.modules() if isinstance(module, nn.Conv2d))
        assert first.in_channels == 3, "the trunk's first convolution must be the one that sees the image"
        with torch.no_grad():
            first.weight /= source.std.view(1, 3, 1, 1)
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Embed images.

        Args:
            images: uint8 (N, H, W, 3) RGB, fitted by `resight.image.fit`.

        Returns:
            float32 (N, D), unit rows.
        """
        # Cast first: TensorRT takes bytes only as an input that a cast follows. It costs nothing measurable.
        pixels = images.float().permute(0, 3, 1, 2) - self.mean  # (N, 3, H, W)
        maps = cut(self.backbone(pixels), self.config.parts)
        views = [_unit(head(part)) for head, part in zip(self.heads, maps, strict=False)]
        return join(views, self.config.local_share) if self.config.local_share else views[0]


def _unit(features: Tensor) -> Tensor:
    """Rows of length 1."""
    length: Tensor = features.norm(dim=1, keepdim=True)
    return features / length.clamp_min(1e-12)
