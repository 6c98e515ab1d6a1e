"""The `Runtime` protocol: a model that computes features of crops, its warm-up, and a dummy for tests."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from resight.arrays import Feature, Pixels
from resight.image import ImageSpec

Provider = Literal["cpu", "cuda", "ort-tensorrt", "tensorrt"]
"""``cpu``, ``cuda`` and ``ort-tensorrt`` are onnxruntime's, ``tensorrt`` is TensorRT's own API."""


class Runtime(Protocol):
    """A model as the batcher uses it; ``min_cosine`` is the smallest cosine of a probe on this machine."""

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
    """Run the largest batch, so that memory is allocated before the first request.

    Args:
        runtime: the runtime to warm up.
        every_size: also run the smaller powers of two. A GPU's libraries choose kernels at the first run of a shape,
            and the sizes in between use the same kernels; on a CPU nothing depends on the size.
    """
    size = runtime.max_batch
    while size:
        runtime.embed(np.zeros((size, runtime.image.height, runtime.image.width, 3), np.uint8))
        size = size // 2 if every_size else 0


class DummyRuntime:
    """A model with a simple known result: the mean colours of a 4x4 grid of cells, centred, with unit length.

    D = 48. For tests of the code around the model, and for load tests that must not measure the model.
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
