"""Opening a bundle's model on a provider: the one place that chooses the runtime."""

from __future__ import annotations

from pathlib import Path

from resight.bundle.bundle import Bundle
from resight.runtime.base import Provider, Runtime


def open_runtime(
    bundle: Bundle,
    *,
    provider: Provider = "cpu",
    precision: str = "fp32",
    max_batch: int = 32,
    threads: int = 0,
    device_id: int = 0,
    engine_cache: Path | None = None,
) -> Runtime:
    """Open the requested runtime, check it on the bundle's probes and warm it up; there is no fallback.

    Args:
        bundle: verified by `resight.bundle.bundle.open_bundle`.
        provider: where the model runs.
        precision: which of the bundle's graphs.
        max_batch: crops per run.
        threads: of one run on the CPU; 0 = one for each core this process may use.
        device_id: which GPU.
        engine_cache: folder of TensorRT's engines; None = `resight.runtime.engine.default_folder`.

    Raises:
        BundleError: the bundle has no such graph, the graph is rejected, or it fails the probes.
        StartupError: the provider's library or GPU is missing, or the cache cannot be used.
    """
    # Imported on use: both libraries are large, and TensorRT may not be installed.
    if provider == "tensorrt":
        from resight.runtime.tensorrt import TensorRTRuntime

        return TensorRTRuntime(
            bundle, precision=precision, max_batch=max_batch, device_id=device_id, engine_cache=engine_cache
        )
    from resight.runtime.onnx import OnnxRuntime

    return OnnxRuntime(
        bundle,
        provider=provider,
        precision=precision,
        max_batch=max_batch,
        threads=threads,
        device_id=device_id,
        engine_cache=engine_cache,
    )
