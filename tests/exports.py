"""Small encoders of every backbone, their exported graphs, and crops to test them on."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from resight.arrays import Pixels
from resight.bundle.probes import EmbedBatch
from resight.encoder.model import Encoder, EncoderConfig
from resight.encoder.weights import load_weights
from resight.exporters.onnx_graph import ServingGraph, to_onnx
from resight.image import ImageSpec

SPEC = ImageSpec(64, 32)
CONFIGS = {
    "osnet_x0_25": EncoderConfig("osnet_x0_25", "avg", 512, SPEC),
    "osnet_x1_0": EncoderConfig("osnet_x1_0", "avg", 64, SPEC),
    "resnet18": EncoderConfig("resnet18", "gem", 0, SPEC),
    "resnet50": EncoderConfig("resnet50", "gem", 0, SPEC),
}


@cache
def draw_crops(count: int = 128, spec: ImageSpec = SPEC, seed: int = 5) -> Pixels:
    """uint8 (count, H, W, 3): smooth fields of colour with noise, different in each crop."""
    rng = np.random.default_rng(seed)
    crops = []
    for field in rng.integers(0, 256, (count, 6, 3, 3), dtype=np.uint8):
        smooth = Image.fromarray(field).resize((spec.width, spec.height), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth) + rng.normal(0, 12, (spec.height, spec.width, 3))
        crops.append(noisy.clip(0, 255).astype(np.uint8))
    return np.stack(crops)


def settled(encoder: Encoder) -> Encoder:
    """The encoder with batch norm statistics of crops: features as far apart as a trained model's."""
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        encoder.train()(encoder.normalise(torch.from_numpy(draw_crops(64, encoder.config.image, seed=6))))
    return encoder.eval()


@cache
def make_encoder(name: str) -> Encoder:
    """OSNet x0.25 with the built-in weights; the other backbones with random weights."""
    if name == "osnet_x0_25":
        trained = load_weights("builtin").encoder
        encoder = Encoder(replace(trained.config, image=SPEC))
        encoder.load_state_dict(trained.state_dict())
        return encoder.eval()
    torch.manual_seed(0)
    return settled(Encoder(CONFIGS[name]))


@cache
def export(name: str) -> bytes:
    """The fp32 graph of `make_encoder`."""
    return to_onnx(ServingGraph(make_encoder(name)), CONFIGS[name].image)


def in_batches(run: EmbedBatch, crops: Pixels, batch: int) -> NDArray[np.float32]:
    """Features of all crops, ``batch`` at a time."""
    return np.concatenate([run(crops[start : start + batch]) for start in range(0, len(crops), batch)])


def cosines(found: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosines without normalisation: a form without unit length must not pass."""
    return (found.astype(np.float64) * expected).sum(1)
