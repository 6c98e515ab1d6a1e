"""Pixels to features: what runs the model, behind one small protocol, and the one place that chooses it.

A runtime proves itself on the bundle's probes before it is handed out, and that run is its warm-up.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from resight.arrays import Feature, Pixels
from resight.image import ImageSpec

Provider = Literal["cpu", "cuda", "ort-tensorrt", "tensorrt"]
"""``cpu``, ``cuda`` and ``ort-tensorrt`` are onnxruntime's, ``tensorrt`` is TensorRT's own API."""


class Runtime(Protocol):
    """What the batcher needs of a model; ``min_cosine`` is of its worst probe here."""

    name: str
    space_id: str
    feature_dim: int
    image: ImageSpec
    max_batch: int
    provider: str
    min_cosine: float

    def embed(self, images: Pixels) -> Feature:
        """Embed fitted crops: uint8 (N, H, W, 3) RGB, N in 1..max_batch -> float32 (N, D) unit rows."""
        ...


def warm_up(runtime: Runtime, *, every_size: bool) -> None:
    """Run what later runs should not pay for: the largest batch, which takes all memory there is to take.

    Args:
        runtime: to run.
        every_size: also the other powers of two a batcher makes. A GPU's libraries choose kernels when they first
            meet a shape, and the sizes between share them with a neighbour; on a CPU nothing depends on the size.
    """
    size = runtime.max_batch
    while size:
        runtime.embed(np.zeros((size, runtime.image.height, runtime.image.width, 3), np.uint8))
        size = size // 2 if every_size else 0


class DummyRuntime:
    """A model whose answer can be computed by hand: mean colour of a 4x4 grid of cells, centred, unit length.

    D = 48. For tests of everything around the model, and for load tests that must not measure it.
    """

    name, space_id, feature_dim, provider, min_cosine = "dummy", "d0" * 16, 48, "dummy", 1.0

    def __init__(self, image: ImageSpec | None = None, *, max_batch: int = 32) -> None:
        self.image, self.max_batch = image or ImageSpec(), max_batch

    def embed(self, images: Pixels) -> Feature:
        """uint8 (N, H, W, 3), H and W divisible by 4 -> float32 (N, 48) unit rows."""
        count, height, width, _ = images.shape
        cells = images.reshape(count, 4, height // 4, 4, width // 4, 3).astype(np.float32)
        centred = cells.mean(axis=(2, 4)).reshape(count, 48) - 127.5  # (N, 48)
        unit: Feature = centred / np.linalg.norm(centred, axis=1, keepdims=True)
        return unit
