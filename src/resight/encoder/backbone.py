"""The convolutional trunks of the encoder: images to feature maps.

OSNet (Zhou et al., "Omni-Scale Feature Learning for Person Re-Identification", ICCV 2019) and
ResNet (He et al., CVPR 2016) with the last stride set to 1, as BNNeck re-ID networks use it.
Modules of OSNet carry the names of torchreid's state dicts, so that its weights load by name.

Letters: B batch, C channels, H and W of an image, h and w of a feature map.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn

OSNET_CHANNELS = {  # ICCV 2019, table 2 and torchreid's width multipliers: stem, three stages
    "osnet_x0_25": (16, 64, 96, 128),
    "osnet_x1_0": (64, 256, 384, 512),
}
RESNET_CHANNELS = {"resnet18": 512, "resnet50": 2048}
BACKBONES = (*OSNET_CHANNELS, *RESNET_CHANNELS)


class ConvLayer(nn.Module):
    """Convolution, batch norm and (unless ``linear``) ReLU."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int = 1, *, stride: int = 1, linear: bool = False
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h', w')."""
        x = self.bn(self.conv(x))
        return x if self.linear else torch.relu_(x)


class LightConv3x3(nn.Module):
    """Pointwise then depthwise 3x3 convolution (OSNet's "Lite 3x3", section 3.1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        return torch.relu_(self.bn(self.conv2(self.conv1(x))))


class ChannelGate(nn.Module):
    """The unified aggregation gate G(x) of OSNet (section 3.2): one weight in (0, 1) per channel."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape, each channel weighted."""
        weight = x.mean((2, 3), keepdim=True)  # (B, C, 1, 1)
        return x * torch.sigmoid(self.fc2(torch.relu_(self.fc1(weight))))


class OSBlock(nn.Module):
    """Omni-scale residual block: four streams of 1-4 Lite 3x3 layers under one shared gate."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        mid = out_channels // 4
        self.conv1 = ConvLayer(in_channels, mid)
        self.conv2a = LightConv3x3(mid)
        self.conv2b = nn.Sequential(*(LightConv3x3(mid) for _ in range(2)))
        self.conv2c = nn.Sequential(*(LightConv3x3(mid) for _ in range(3)))
        self.conv2d = nn.Sequential(*(LightConv3x3(mid) for _ in range(4)))
        self.gate = ChannelGate(mid)
        self.conv3 = ConvLayer(mid, out_channels, linear=True)
        self.downsample = ConvLayer(in_channels, out_channels, linear=True) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, h, w) -> (B, out, h, w)."""
        stem = self.conv1(x)
        # Summed one by one: stacking them would take an eighth of the graph's time in onnxruntime.
        mixed = self.gate(self.conv2a(stem)) + self.gate(self.conv2b(stem))
        mixed = mixed + self.gate(self.conv2c(stem)) + self.gate(self.conv2d(stem))
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu_(self.conv3(mixed) + shortcut)


class OSNet(nn.Module):
    """OSNet without its embedding layer: total stride 16."""

    def __init__(self, channels: tuple[int, int, int, int]) -> None:
        super().__init__()
        stem, first, second, third = channels
        self.conv1 = ConvLayer(3, stem, 7, stride=2)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.conv2 = nn.Sequential(OSBlock(stem, first), OSBlock(first, first), _reduce(first))
        self.conv3 = nn.Sequential(OSBlock(first, second), OSBlock(second, second), _reduce(second))
        self.conv4 = nn.Sequential(OSBlock(second, third), OSBlock(third, third))
        self.conv5 = ConvLayer(third, third)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> feature map (B, C, H/16, W/16)."""
        x = self.maxpool(self.conv1(images))
        x = self.conv4(self.conv3(self.conv2(x)))
        features: Tensor = self.conv5(x)
        return features


def _reduce(channels: int) -> nn.Sequential:
    """Transition between OSNet stages: pointwise layer, then 2x2 average pooling."""
    return nn.Sequential(ConvLayer(channels, channels), nn.AvgPool2d(2))


class ResNetTrunk(nn.Module):
    """Torchvision's ResNet without pooling and classifier, its last stage de-strided: total stride 16."""

    def __init__(self, name: str) -> None:
        super().__init__()
        net: torchvision.models.ResNet = torchvision.models.get_model(name, weights=None)
        self.conv1, self.bn1, self.maxpool = net.conv1, net.bn1, net.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        for module in self.layer4.modules():
            if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
                module.stride = (1, 1)  # the strided 3x3 and the shortcut of the first block

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) -> feature map (B, C, H/16, W/16)."""
        x = self.maxpool(torch.relu_(self.bn1(self.conv1(images))))
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return features


def build_backbone(name: str) -> tuple[nn.Module, int]:
    """Build a trunk by name (see `BACKBONES`); returns it and the number of channels of its map.

    Raises:
        ValueError: an unknown name.
    """
    if name in OSNET_CHANNELS:
        return OSNet(OSNET_CHANNELS[name]), OSNET_CHANNELS[name][-1]
    if name in RESNET_CHANNELS:
        return ResNetTrunk(name), RESNET_CHANNELS[name]
    raise ValueError(f"unknown backbone {name!r}: expected one of {', '.join(BACKBONES)}")
