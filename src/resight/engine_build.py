"""Build a TensorRT engine from a bundle's ONNX graph, on the GPU that will run it.

Written for TensorRT 10.x and 11.x, whose Python API is the same in every call made here (compared with the names and
docstrings in the 11.4 bindings; what 11 removed stands in its migration guide, "Removed Python APIs and
Replacements"). The precision is the graph's own: 11 knows strongly typed networks only, and 10 is asked for them.
"""

from __future__ import annotations

import logging
import time
from types import ModuleType
from typing import Any

from resight.engine import EngineKey, load_tensorrt, tensorrt_logger
from resight.errors import BundleError
from resight.graph_check import INPUT

log = logging.getLogger(__name__)

# What a layer's kernels may take beside its tensors. TensorRT's own default is all of the GPU's memory, which a
# gallery's index may share; this is onnxruntime's default for it (trt_max_workspace_size).
WORKSPACE_BYTES = 2**30
PROGRESS_S = 10.0  # between two lines of the log


def build(data: bytes, key: EngineKey, timing_cache: bytes = b"") -> tuple[bytes, bytes]:
    """Build an engine.

    Args:
        data: the ONNX graph, uint8 ``images`` (batch, H, W, 3) in.
        key: its profile and precision are used; the rest names it.
        timing_cache: from an earlier build; TensorRT itself refuses one of another GPU or version.

    Returns:
        The engine and the timing cache as it is now.

    Raises:
        BundleError: TensorRT does not take the graph, or finds no kernels for it.
    """
    trt = load_tensorrt()
    logger = tensorrt_logger(trt)
    builder = trt.Builder(logger)
    # 11.0: "strongly typed mode is always enabled. This flag is retained ... but is ignored."
    strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if trt.__version__.startswith("10.") else 0
    network = builder.create_network(strong)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(data):
        told = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise BundleError(
            f"TensorRT {trt.__version__} does not take the {key.precision} graph: {told[:500]}: export it anew"
        )
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    monitor = _monitor(trt)  # by a name, as the timings below: both must outlive the build
    config.progress_monitor = monitor
    if key.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default: 10 bits of mantissa, which is no fp32
    timings = config.create_timing_cache(timing_cache)
    if not config.set_timing_cache(timings, False):  # of another GPU or version
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, False)
    profile = builder.create_optimization_profile()
    shapes = [(batch, *key.image, 3) for batch in (key.profile.least, key.profile.tuned, key.profile.most)]
    profile.set_shape(INPUT, *shapes)
    if config.add_optimization_profile(profile) < 0:
        raise BundleError(f"TensorRT {trt.__version__} does not take batches of {key.profile} for this graph")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BundleError(
            f"TensorRT {trt.__version__} could build no engine of the {key.precision} graph on {key.gpu}: its log "
            "says why; use --provider cuda, or another precision"
        )
    return bytes(plan), bytes(config.get_timing_cache().serialize())


def _monitor(trt: ModuleType) -> Any:
    """A line of the log every `PROGRESS_S` while an engine is built."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._told = time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if time.monotonic() - self._told >= PROGRESS_S:
                self._told = time.monotonic()
                log.info("building: %s %d/%d", phase_name, step + 1, self._steps.get(phase_name, step + 1))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()
