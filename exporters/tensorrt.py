"""Build a bundle's TensorRT engines before the first start of the service, on the machine that will serve them.

An engine runs only on the GPU and with the version of TensorRT it was built for, and it is executable code. Therefore
engines are never part of a bundle: they are stored in this machine's engine cache, from which the service loads them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from resight.bundle.bundle import Bundle
from resight.errors import BundleError
from resight.runtime.engine import load_cudart, load_tensorrt
from resight.runtime.tensorrt import open_engine

log = logging.getLogger(__name__)

MAX_BATCH = 32  # the service's default


@dataclass(frozen=True)
class BuiltEngine:
    """An engine that passed the bundle's probes.

    Attributes:
        precision: fp32, fp16 or int8.
        seconds: time to build it, or a second or two to load it from the cache.
        min_cosine: smallest cosine similarity of a probe's feature to torch's.
        max_abs_diff: largest difference of a component.
    """

    precision: str
    seconds: float
    min_cosine: float
    max_abs_diff: float


def engine_precisions(bundle: Bundle) -> tuple[str, ...]:
    """The precisions of a bundle that TensorRT can run: fp32, fp16, and int8 if it was exported for TensorRT."""
    forms = {(artefact.precision, artefact.runtime) for artefact in bundle.manifest.artefacts}
    usable = (("fp32", "onnx"), ("fp16", "onnx"), ("int8", "tensorrt"))
    return tuple(precision for precision, runtime in usable if (precision, runtime) in forms)


def build_engines(
    bundle: Bundle,
    precisions: Sequence[str] | None = None,
    *,
    cache: Path | None = None,
    max_batch: int = MAX_BATCH,
    device_id: int = 0,
    progress: Callable[[str], None] | None = None,
) -> tuple[BuiltEngine, ...]:
    """Build each engine, or load it from the cache, and check it on the bundle's probes.

    Args:
        bundle: verified by `resight.bundle.bundle.open_bundle`.
        precisions: a subset of `engine_precisions`; all of them by default.
        cache: the engine cache folder; `resight.runtime.engine.default_folder` by default.
        max_batch: the service's ``max_batch``; an engine is built for one value of it.
        device_id: index of the GPU.
        progress: called with the name of each engine before it is built.

    Returns:
        One entry per precision, in the given order.

    Raises:
        BundleError: the bundle has no such form, TensorRT rejects it, or an engine fails the probes.
        StartupError: TensorRT, CUDA or the GPU is missing, or the cache cannot be used.
    """
    load_tensorrt(), load_cudart()  # raises early if they are missing
    requested = engine_precisions(bundle) if precisions is None else precisions
    missing = sorted(set(requested) - set(engine_precisions(bundle)))
    if missing:
        raise BundleError(
            f"bundle {bundle.manifest.name} has no graph of {', '.join(missing)} for TensorRT, only of "
            f"{', '.join(engine_precisions(bundle))}: export it with --precision {missing[0]} --tensorrt"
        )
    built = []
    for precision in requested:
        if progress is not None:
            progress(f"TensorRT engine {precision}")
        started = time.monotonic()
        session, found = open_engine(
            bundle, precision=precision, max_batch=max_batch, device_id=device_id, folder=cache
        )
        session.close()  # free its GPU memory for the next engine
        seconds = time.monotonic() - started
        built.append(BuiltEngine(precision, seconds, found.min_cosine, found.max_abs_diff))
        log.info("engine verified precision=%s seconds=%.0f min_cosine=%.6f", precision, seconds, found.min_cosine)
    return tuple(built)
