"""TensorRT engines: what decides one, and where it is found again on the machine that built it."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import time
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from resight.engine_cache import EngineCache
from resight.errors import ReIDError, StartupError
from resight.image import ImageSpec

log = logging.getLogger(__name__)

_HELP = "install resight[gpu] on a machine with an NVIDIA GPU, or use --provider cpu"


@dataclass(frozen=True)
class Profile:
    """Batch sizes an engine accepts, ``least`` to ``most``, and the one, ``tuned``, its kernels are chosen for."""

    least: int
    tuned: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.tuned <= self.most:
            raise ValueError(f"expected 1 <= least <= tuned <= most, found {self}")


@dataclass(frozen=True)
class EngineKey:
    """Everything an engine depends on; another value of any of them is another engine.

    Attributes:
        gpu: the product's name, such as ``NVIDIA H200``.
        compute_capability: ``9.0``.
        driver: newest CUDA version the driver supports, 1000 x major + 10 x minor.
        tensorrt: its version.
        onnx_sha256: of the graph.
        precision: of the graph; decides whether TF32 is allowed.
        image: height and width of a crop.
        profile: batch sizes.
    """

    gpu: str
    compute_capability: str
    driver: int
    tensorrt: str
    onnx_sha256: str
    precision: str
    image: tuple[int, int]
    profile: Profile

    def to_bytes(self) -> bytes:
        """One spelling for one key."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @property
    def file(self) -> str:
        """The engine's name in the cache."""
        return f"{hashlib.sha256(self.to_bytes()).hexdigest()[:32]}.plan"


def load_tensorrt() -> ModuleType:
    """The package ``tensorrt``.

    Raises:
        StartupError: it cannot be imported.
    """
    return _load("tensorrt", "tensorrt")


def load_cudart() -> ModuleType:
    """CUDA's runtime API, `cuda.bindings.runtime`.

    Raises:
        StartupError: it cannot be imported.
    """
    return _load("cuda.bindings.runtime", "cuda-bindings")


def _load(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a library of the package does not load
        raise StartupError(
            f"TensorRT needs the package {package}, which cannot be imported ({error}): {_HELP}"
        ) from error


def cuda(result: tuple[Any, ...], kind: type[ReIDError] = StartupError) -> Any:
    """The value of a call to `cuda.bindings.runtime`, which answers (error, value).

    Args:
        result: the call's answer.
        kind: raised where the error is not ``cudaSuccess``.

    Raises:
        ReIDError: of that kind.
    """
    cudart = load_cudart()
    if result[0] != cudart.cudaError_t.cudaSuccess:
        _, told = cudart.cudaGetErrorString(result[0])
        raise kind(
            f"expected success of CUDA, found {result[0].name} ({told.decode()}): see that `nvidia-smi` shows the GPU "
            "with memory to spare, or use --provider cpu"
        )
    return result[1] if len(result) > 1 else None


def tensorrt_logger(trt: ModuleType) -> Any:
    """TensorRT's log as Python's."""
    severity = trt.ILogger.Severity
    levels = {
        severity.INTERNAL_ERROR: logging.ERROR,
        severity.ERROR: logging.ERROR,
        severity.WARNING: logging.WARNING,
        severity.INFO: logging.DEBUG,
    }

    class Logger(trt.ILogger):  # type: ignore[misc,name-defined]  # tensorrt is imported late
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity in levels:  # its verbose lines are tens of thousands
                log.log(levels[severity], "tensorrt: %s", msg)

    return Logger()


def engine_key(data: bytes, *, precision: str, image: ImageSpec, profile: Profile, device_id: int = 0) -> EngineKey:
    """The key of a graph's engine on this machine.

    Raises:
        StartupError: no TensorRT, no CUDA, or no such GPU.
    """
    cudart = load_cudart()
    properties = cuda(cudart.cudaGetDeviceProperties(device_id))
    return EngineKey(
        gpu=properties.name.split(b"\0")[0].decode(),
        compute_capability=f"{properties.major}.{properties.minor}",
        driver=cuda(cudart.cudaDriverGetVersion()),
        tensorrt=load_tensorrt().__version__,
        onnx_sha256=hashlib.sha256(data).hexdigest(),
        precision=precision,
        image=(image.height, image.width),
        profile=profile,
    )


def find_engine(data: bytes, key: EngineKey, cache: EngineCache, *, anew: bool = False) -> bytes:
    """The engine of a graph: from the cache, or built, which takes minutes and is told in the log.

    Args:
        data: the ONNX graph, already checked by `resight.graph_check.check_graph`.
        key: from `engine_key`, on the GPU that is current.
        cache: looked into first and written last.
        anew: build although the cache has one, which TensorRT refused.

    Raises:
        BundleError: TensorRT does not take the graph.
        StartupError: no TensorRT, or the cache cannot be used.
    """
    from resight.engine_build import build

    plan = None if anew else cache.load(key.file, key.to_bytes())
    if plan is not None:
        return plan
    with cache.lock():
        plan = None if anew else cache.load(key.file, key.to_bytes())  # built while this one waited
        if plan is not None:
            return plan
        timings = f"{key.compute_capability}-{key.tensorrt}.timing"
        environment = f"{key.gpu} {key.compute_capability} {key.driver} {key.tensorrt}".encode()
        log.info("building a TensorRT engine of %s for %s, which takes minutes", key.precision, key.gpu)
        started = time.monotonic()
        plan, timing_cache = build(data, key, cache.load(timings, environment) or b"")
        cache.store(key.file, key.to_bytes(), plan)
        cache.store(timings, environment, timing_cache)
        log.info("engine built seconds=%.0f bytes=%d file=%s", time.monotonic() - started, len(plan), key.file)
    return plan
