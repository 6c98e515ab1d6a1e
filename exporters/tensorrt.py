"""Build a bundle's TensorRT engines ahead of the first start, on the machine that will serve them.

An engine runs on the GPU and the version of TensorRT it was built for, and is executable code, so none enters a
bundle: they lie in this machine's engine cache, where the service finds them.
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
    """One engine that proved itself.

    Attributes:
        precision: fp32, fp16 or int8.
        seconds: it took; a second or two where it was in the cache already.
        min_cosine: smallest cosine similarity of a probe's feature to torch's.
        max_abs_diff: largest difference of a component.
    """

    precision: str
    seconds: float
    min_cosine: float
    max_abs_diff: float


def engine_precisions(bundle: Bundle) -> tuple[str, ...]:
    """The precisions of a bundle that TensorRT can run: fp32 and fp16 as they are, int8 where made for it."""
    forms = {(artefact.precision, artefact.runtime) for artefact in bundle.manifest.artefacts}
    wanted = (("fp32", "onnx"), ("fp16", "onnx"), ("int8", "tensorrt"))
    return tuple(precision for precision, runtime in wanted if (precision, runtime) in forms)


def build_engines(
    bundle: Bundle,
    precisions: Sequence[str] | None = None,
    *,
    cache: Path | None = None,
    max_batch: int = MAX_BATCH,
    device_id: int = 0,
    progress: Callable[[str], None] | None = None,
) -> tuple[BuiltEngine, ...]:
    """Build each engine, or find it in the cache, and prove it on the bundle's probes.

    Args:
        bundle: verified by `resight.bundle.bundle.open_bundle`.
        precisions: of `engine_precisions`; all of them by default.
        cache: folder of engines; `resight.runtime.engine.default_folder` by default.
        max_batch: what the service will be started with: another one needs another engine.
        device_id: the GPU.
        progress: told which precision begins.

    Returns:
        One entry for each precision, in their order.

    Raises:
        BundleError: the bundle has no such form, TensorRT does not take it, or an engine fails the probes.
        StartupError: TensorRT, CUDA or the GPU is missing, or the cache cannot be used.
    """
    load_tensorrt(), load_cudart()  # before anything is computed
    wanted = engine_precisions(bundle) if precisions is None else precisions
    missing = sorted(set(wanted) - set(engine_precisions(bundle)))
    if missing:
        raise BundleError(
            f"bundle {bundle.manifest.name} has no graph of {', '.join(missing)} for TensorRT, only of "
            f"{', '.join(engine_precisions(bundle))}: export it with --precision {missing[0]} --tensorrt"
        )
    built = []
    for precision in wanted:
        if progress is not None:
            progress(f"TensorRT engine {precision}")
        started = time.monotonic()
        session, found = open_engine(
            bundle, precision=precision, max_batch=max_batch, device_id=device_id, folder=cache
        )
        session.close()  # the next one may need its memory
        seconds = time.monotonic() - started
        built.append(BuiltEngine(precision, seconds, found.min_cosine, found.max_abs_diff))
        log.info("engine proven precision=%s seconds=%.0f min_cosine=%.6f", precision, seconds, found.min_cosine)
    return tuple(built)
