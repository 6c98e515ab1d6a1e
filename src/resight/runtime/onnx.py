"""A bundle's ONNX graph in onnxruntime, on the CPU or on a GPU, without fallback to another provider.

On a CPU a batch is split into runs of a few crops, one single-threaded run per core. A multi-threaded run synchronises
its threads after every operator: sleeping threads cost small operators more than their work, and spinning threads take
the cores that decoding and gRPC need. Single-threaded runs need no synchronisation, and a run of few crops fits in its
core's cache. OSNet x0.25 on two idle cores: 712 crops/s in batches of 32 with sleeping threads, 794 with spinning
threads; with one run per core 781 in batches of 16, 843 in batches of 4 and 872 one by one. ResNet-50: 27 to 29 in
each case.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import onnxruntime as ort

from resight.arrays import Feature, Features, Pixels
from resight.bundle.bundle import Bundle
from resight.bundle.graph_check import check_graph
from resight.bundle.manifest import GRAPH_INPUT, GRAPH_OUTPUT
from resight.bundle.probes import BATCH_SIZES, check_probes, min_cosine_for
from resight.errors import BundleError, ReIDError, StartupError
from resight.machine import cores
from resight.runtime.base import Provider, warm_up
from resight.runtime.engine import WORKSPACE_BYTES, EngineCache

PROVIDER = "CPUExecutionProvider"
# Time of a multi-threaded run relative to a single-threaded one, below which a second session is worth its memory.
MAX_SHARED_TIME_RATIO = 0.8
TRIALS = 5
CROPS_PER_CORE = 4  # crops per run: within 3 % of the fastest size of OSNet x0.25, ResNet-18 and ResNet-50


class CpuSession:
    """One graph in onnxruntime on the CPU; thread-safe.

    Up to `CROPS_PER_CORE` crops are computed in the calling thread; larger batches are split into parts of that size
    and distributed over all cores. A batch with fewer crops than cores would leave cores idle: if no other call is
    running, it is run by a second, multi-threaded session, provided that is faster (it is for ResNet-50: 38 ms a crop
    instead of 76, not for OSNet x0.25: 2.5 ms instead of 2.3).

    Args:
        data: serialised ONNX, checked.
        threads: cores to use; 0 = all that this process may use.
    """

    def __init__(self, data: bytes, threads: int = 0) -> None:
        self._threads = threads = threads or cores()
        self._alone = open_session(data, 1)
        self._together = self._alone
        self._callers, self._lock = 0, Lock()  # calls in progress
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="core")
        if threads > 1:
            together = open_session(data, threads)
            crop = np.zeros((1, *self._alone.get_inputs()[0].shape[1:]), np.uint8)
            if _single_crop_s(together, crop) < MAX_SHARED_TIME_RATIO * _single_crop_s(self._alone, crop):
                self._together = together

    def run(self, images: Pixels) -> Features:
        """Compute features, float32 (N, D), of crops, uint8 (N, H, W, 3)."""
        with self._lock:
            self._callers += 1
            idle = self._callers == 1
        try:
            if len(images) <= CROPS_PER_CORE:
                return _run(self._together if idle and len(images) < self._threads else self._alone, images)
            parts = np.array_split(images, -(-len(images) // CROPS_PER_CORE))
            return np.concatenate(list(self._pool.map(lambda part: _run(self._alone, part), parts)))
        finally:
            with self._lock:
                self._callers -= 1


def open_session(data: bytes, threads: int) -> ort.InferenceSession:
    """Open a session on the CPU; onnxruntime's exceptions are not converted."""
    return ort.InferenceSession(data, session_options(threads), providers=[PROVIDER])


def session_options(threads: int) -> ort.SessionOptions:
    """Session options for a graph that shares its cores with a service; measured by `benchmarks/bench_session.py`.

    Args:
        threads: number of threads per run; 1 = the calling thread.
    """
    options = ort.SessionOptions()
    # An explicit number, even if it is onnxruntime's default: with 0 onnxruntime also pins each thread to a core (its
    # page "Thread management"), where it competes with the service's threads.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # A memory pattern is kept for every shape, and a batcher makes max_batch of them: the peak memory of OSNet x0.25
    # was 182 MiB with patterns and 123 MiB without, at the same speed. The arena is kept: without it each run
    # allocates again (RSS 139 MiB, no faster); after the warm-up it grew by only 2 MiB, so it is not shrunk.
    options.enable_cpu_mem_arena = True
    options.enable_mem_pattern = False
    # Spinning threads took 1.6-1.9 times the CPU time per crop, which decoding and gRPC on the same cores need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors only: its warnings concern authors of graphs
    return options


def _run(session: ort.InferenceSession, images: Pixels) -> Features:
    features: Features = session.run([GRAPH_OUTPUT], {GRAPH_INPUT: images})[0]
    return features


def _single_crop_s(session: ort.InferenceSession, crop: Pixels) -> float:
    """Seconds per run of one crop: the fastest of `TRIALS`, which other load affects least."""
    _run(session, crop)  # warm-up
    best = float("inf")
    for _ in range(TRIALS):
        started = time.perf_counter()
        _run(session, crop)
        best = min(best, time.perf_counter() - started)
    return best


log = logging.getLogger(__name__)

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
}


class OnnxRuntime:
    """The bundle's ONNX graph in onnxruntime.

    Args:
        bundle: verified by `resight.bundle.bundle.open_bundle`.
        provider: ``cpu``, ``cuda`` or ``ort-tensorrt``; no silent fallback from one to another.
        precision: which of the bundle's graphs.
        max_batch: crops per run.
        threads: of one run on the CPU; 0 = one for each core this process may use.
        device_id: which GPU.
        engine_cache: folder for the engines of ``ort-tensorrt``; None = `resight.runtime.engine.default_folder`.

    Raises:
        BundleError: the graph is rejected, cannot be loaded, or fails the probes.
        StartupError: this onnxruntime has no such provider, or it does not start.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        provider: Provider = "cpu",
        precision: str = "fp32",
        max_batch: int = 32,
        threads: int = 0,
        device_id: int = 0,
        engine_cache: Path | None = None,
    ) -> None:
        manifest = bundle.manifest
        self.name, self.space_id, self.feature_dim = manifest.name, manifest.space_id, manifest.feature_dim
        self.image, self.max_batch, self.provider = manifest.image, max_batch, f"{provider}-{precision}"
        if PROVIDERS[provider] not in ort.get_available_providers():
            raise StartupError(
                f"provider {provider} needs {PROVIDERS[provider]}, this onnxruntime has "
                f"{', '.join(ort.get_available_providers())}: install resight[gpu] or use --provider cpu"
            )
        runtime = "tensorrt" if (provider, precision) == ("ort-tensorrt", "int8") else "onnx"
        artefact, data = bundle.find(precision, runtime), bundle.read(precision, runtime)
        check_graph(data, self.image, self.feature_dim, what=artefact.file)
        with contextlib.ExitStack() as stack:
            if provider == "ort-tensorrt":
                folder = stack.enter_context(_engines(EngineCache(engine_cache), data, self.provider, max_batch))
                options = tensorrt_options(folder, self._batch_shapes(), precision=precision, device_id=device_id)
            else:
                options = cuda_options(precision=precision, device_id=device_id) if provider == "cuda" else {}
            self._run = self._open(data, provider, options, threads, artefact.file)
            what = f"{artefact.file} of bundle {self.name} on {provider}"
            try:
                found = check_probes(
                    bundle.probes(), self.image, self.embed, what=what, min_cosine=min_cosine_for(artefact)
                )
                warm_up(self, every_size=provider != "cpu")
            except ReIDError:
                raise
            except Exception as error:  # some graphs load but fail to run
                raise _unusable(provider, f"{what} does not run", error) from error
        self.min_cosine = found.min_cosine
        log.info("probes passed bundle=%s provider=%s min_cosine=%.6f", self.name, self.provider, found.min_cosine)

    def _batch_shapes(self) -> tuple[str, str, str]:
        """Smallest, typical and largest input shape in the notation of onnxruntime's TensorRT provider."""
        crop = f"{self.image.height}x{self.image.width}x3"
        batches = (1, self.max_batch, max(self.max_batch, *BATCH_SIZES))
        least, usual, most = (f"{GRAPH_INPUT}:{batch}x{crop}" for batch in batches)
        return least, usual, most

    def _open(
        self, data: bytes, provider: str, options: dict[str, str], threads: int, file: str
    ) -> Callable[[Pixels], Feature]:
        """A function that runs a batch on the given provider."""
        try:
            if provider == "cpu":
                return CpuSession(data, threads).run
            return _open_gpu(data, provider, options)
        except ReIDError:
            raise
        except Exception as error:  # onnxruntime's exceptions have no common base class
            raise _unusable(
                provider, f"bundle {self.name}: onnxruntime {ort.__version__} cannot load {file} on {provider}", error
            ) from error

    def embed(self, images: Pixels) -> Feature:
        """Embed fitted crops: uint8 (N, H, W, 3) RGB -> float32 (N, D) unit rows."""
        return self._run(images)


def _open_gpu(data: bytes, provider: str, options: dict[str, str]) -> Callable[[Pixels], Feature]:
    """Open a session on a GPU, with onnxruntime's fallback to the CPU disabled.

    Raises:
        StartupError: the provider did not start.
    """
    # Operators that TensorRT does not support run on CUDA.
    secondary = [("CUDAExecutionProvider", {"device_id": options["device_id"]})] if provider == "ort-tensorrt" else []
    session = ort.InferenceSession(
        data, session_options(1), providers=[(PROVIDERS[provider], options), *secondary], enable_fallback=0
    )
    session.disable_fallback()  # also for failures of a run
    if session.get_providers()[0] != PROVIDERS[provider]:
        raise StartupError(
            f"provider {provider} could not be started, onnxruntime chose {session.get_providers()[0]}: "
            "repair the GPU's driver and libraries, or use --provider cpu"
        )

    def run(images: Pixels) -> Feature:
        features: Feature = session.run([GRAPH_OUTPUT], {GRAPH_INPUT: images})[0]
        return features

    return run


def _unusable(provider: str, what: str, error: Exception) -> ReIDError:
    """The error for a failure of onnxruntime: on a CPU the graph is at fault, on a GPU the driver or its memory."""
    message = f"{what}: {(str(error).splitlines() or [type(error).__name__])[0][:300]}"
    if provider == "cpu":
        return BundleError(f"{message}: export the bundle again")
    return StartupError(f"{message}: repair the GPU's driver, free its memory, or use --provider cpu")


def cuda_options(*, precision: str, device_id: int) -> dict[str, str]:
    """Options of onnxruntime's CUDA provider, documented on its page "CUDA Execution Provider"."""
    return {
        "device_id": str(device_id),
        # The default benchmarks every algorithm for each new shape, and a batcher makes many shapes.
        "cudnn_conv_algo_search": "HEURISTIC",
        # The default doubles the arena each time; a gallery's index may need that memory.
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0" if precision == "fp32" else "1",  # on by default; has only 10 bits of mantissa
    }


def tensorrt_options(folder: Path, shapes: tuple[str, str, str], *, precision: str, device_id: int) -> dict[str, str]:
    """Options of onnxruntime's TensorRT provider, documented on its page "TensorRT Execution Provider".

    Args:
        folder: for its engines and timing cache.
        shapes: smallest, typical and largest input. Without them the engine is rebuilt for each larger batch.
        precision: of the graph; with TensorRT 10 it has to be enabled for the build.
        device_id: the GPU.
    """
    least, usual, most = shapes
    return {
        "device_id": str(device_id),
        "trt_max_workspace_size": str(WORKSPACE_BYTES),
        "trt_profile_min_shapes": least,
        "trt_profile_opt_shapes": usual,
        "trt_profile_max_shapes": most,
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(folder),
        "trt_fp16_enable": str(precision == "fp16"),
        "trt_int8_enable": str(precision == "int8"),
    }


@contextlib.contextmanager
def _engines(cache: EngineCache, data: bytes, provider: str, max_batch: int) -> Iterator[Path]:
    """The sealed folder of one graph; onnxruntime separates GPUs and versions of TensorRT by file name."""
    key: dict[str, Any] = {
        "onnx": hashlib.sha256(data).hexdigest(),
        "provider": provider,
        "max_batch": max_batch,
        "onnxruntime": ort.__version__,
    }
    key_json = json.dumps(key, sort_keys=True).encode()
    with (
        cache.lock(),
        cache.sealed_folder(f"{hashlib.sha256(key_json).hexdigest()[:32]}.onnxruntime", key_json) as folder,
    ):
        yield folder
