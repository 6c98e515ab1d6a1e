"""Pixels to features: what runs the model, behind one small protocol.

A runtime proves itself on the bundle's probes before it is handed out, and that run is its warm-up.
"""

from __future__ import annotations

import logging
from typing import Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from resight.bundle import Bundle, check_probes
from resight.errors import BundleError, StartupError
from resight.image import ImageSpec, Pixels

log = logging.getLogger(__name__)

Feature = NDArray[np.float32]
"""float32 (D,), unit length; (N, D) for a batch."""

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# fp32 must equal what was exported; the lower precisions are held to the parity of their own export,
# less this much for another machine's kernels.
MIN_COSINE_FP32 = 0.9999
KERNEL_SLACK = 0.001


class Runtime(Protocol):
    """What the batcher needs of a model."""

    name: str
    space_id: str
    feature_dim: int
    image: ImageSpec
    max_batch: int
    provider: str

    def embed(self, images: Pixels) -> Feature:
        """Embed fitted crops: uint8 (N, H, W, 3) RGB, N in 1..max_batch -> float32 (N, D) unit rows."""
        ...


class OnnxRuntime:
    """The bundle's ONNX graph in onnxruntime, on one provider chosen by name.

    Args:
        bundle: verified by `resight.bundle.open_bundle`.
        provider: ``cpu`` or ``cuda``; no silent fallback from one to the other.
        precision: which of the bundle's graphs.
        max_batch: crops per run.
        threads: of one run; 0 = onnxruntime's choice.

    Raises:
        BundleError: the graph cannot be loaded, is not uint8 (N, H, W, 3) -> (N, D), or fails the probes.
        StartupError: this onnxruntime has no such provider.
    """

    def __init__(
        self, bundle: Bundle, *, provider: str = "cpu", precision: str = "fp32", max_batch: int = 32, threads: int = 0
    ) -> None:
        manifest = bundle.manifest
        self.name, self.space_id, self.feature_dim = manifest.name, manifest.space_id, manifest.feature_dim
        self.image, self.max_batch, self.provider = manifest.image, max_batch, f"{provider}-{precision}"
        if PROVIDERS[provider] not in ort.get_available_providers():
            raise StartupError(
                f"provider {provider} needs {PROVIDERS[provider]}, this onnxruntime has "
                f"{', '.join(ort.get_available_providers())}: install resight[gpu] or use --provider cpu"
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(bundle.read(precision), options, providers=[PROVIDERS[provider]])
        except Exception as error:  # onnxruntime raises a dozen classes of its own that share no base
            raise BundleError(
                f"bundle {bundle.path.name}: onnxruntime cannot load its {precision} graph: "
                f"{str(error).splitlines()[0][:300]}: export the bundle anew"
            ) from error
        self._check_provider(provider)
        self._check_signature(bundle)
        parity = next(a.min_cosine for a in manifest.artefacts if a.precision == precision and a.runtime == "onnx")
        found = check_probes(
            bundle.probes(),
            self.image,
            self.embed,
            what=f"the {precision} graph of bundle {self.name} on {provider}",
            min_cosine=MIN_COSINE_FP32 if precision == "fp32" else parity - KERNEL_SLACK,
        )
        # The largest batch once, so that the first full one does not pay for its allocations.
        self.embed(np.zeros((max_batch, self.image.height, self.image.width, 3), np.uint8))
        log.info("probes passed bundle=%s provider=%s min_cosine=%.6f", self.name, self.provider, found.min_cosine)

    def _check_provider(self, provider: str) -> None:
        """Onnxruntime falls back to the CPU with a warning when a GPU's libraries are missing; we do not."""
        if self._session.get_providers()[0] != PROVIDERS[provider]:
            raise StartupError(
                f"provider {provider} could not be started, onnxruntime chose {self._session.get_providers()[0]}: "
                "mend the GPU's driver and libraries, or use --provider cpu"
            )

    def _check_signature(self, bundle: Bundle) -> None:
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        found = [(node.name, node.type, len(node.shape)) for node in (*inputs, *outputs)]
        expected = [("images", "tensor(uint8)", 4), ("features", "tensor(float)", 2)]
        if found != expected:
            raise BundleError(
                f"bundle {bundle.path.name}: expected a graph {expected[0]} -> {expected[1]}, found {found}: "
                "export the bundle anew"
            )

    def embed(self, images: Pixels) -> Feature:
        """Embed fitted crops: uint8 (N, H, W, 3) RGB -> float32 (N, D) unit rows."""
        features: Feature = self._session.run(["features"], {"images": images})[0]
        return features


class DummyRuntime:
    """A model whose answer can be computed by hand: mean colour of a 4x4 grid of cells, centred, unit length.

    D = 48. For tests of everything around the model, and for load tests that must not measure it.
    """

    name, space_id, feature_dim, provider = "dummy", "d0" * 16, 48, "dummy"

    def __init__(self, image: ImageSpec | None = None, *, max_batch: int = 32) -> None:
        self.image, self.max_batch = image or ImageSpec(), max_batch

    def embed(self, images: Pixels) -> Feature:
        """uint8 (N, H, W, 3), H and W divisible by 4 -> float32 (N, 48) unit rows."""
        count, height, width, _ = images.shape
        cells = images.reshape(count, 4, height // 4, 4, width // 4, 3).astype(np.float32)
        centred = cells.mean(axis=(2, 4)).reshape(count, 48) - 127.5  # (N, 48)
        unit: Feature = centred / np.linalg.norm(centred, axis=1, keepdims=True)
        return unit
