"""The bundle's model in TensorRT's own API: an engine built on this machine, proven on the probes."""

from __future__ import annotations

import logging
from pathlib import Path

from resight.bundle import Bundle
from resight.engine_session import open_engine
from resight.image import Pixels
from resight.service.runtime import Feature, warm_up

log = logging.getLogger(__name__)


class TensorRTRuntime:
    """One engine on one GPU.

    Args:
        bundle: verified by `resight.bundle.open_bundle`.
        precision: fp32 and fp16 are the bundle's ONNX graphs, int8 the one made for TensorRT.
        max_batch: crops per run, and the batch the engine is tuned for.
        device_id: the GPU.
        engine_cache: folder of engines; None = `resight.engine_cache.default_folder`. The first start builds the
            engine, which takes minutes and is told in the log.

    Raises:
        BundleError: no such graph, a hostile one, TensorRT does not take it, or it fails the probes.
        StartupError: TensorRT, CUDA or the GPU is missing, or the cache cannot be used.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        precision: str = "fp32",
        max_batch: int = 32,
        device_id: int = 0,
        engine_cache: Path | None = None,
    ) -> None:
        manifest = bundle.manifest
        self.name, self.space_id, self.feature_dim = manifest.name, manifest.space_id, manifest.feature_dim
        self.image, self.max_batch, self.provider = manifest.image, max_batch, f"tensorrt-{precision}"
        self._session, found = open_engine(
            bundle, precision=precision, max_batch=max_batch, device_id=device_id, folder=engine_cache
        )
        warm_up(self, every_size=True)
        self.min_cosine = found.min_cosine
        log.info("probes passed bundle=%s provider=%s min_cosine=%.6f", self.name, self.provider, found.min_cosine)

    def embed(self, images: Pixels) -> Feature:
        """Embed fitted crops: uint8 (N, H, W, 3) RGB -> float32 (N, D) unit rows."""
        return self._session.run(images)

    def close(self) -> None:
        """Give the GPU's memory back now; otherwise it goes with the object."""
        self._session.close()
