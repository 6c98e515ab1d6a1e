"""A graph on all the cores of a CPU: a few crops at a time on each core.

Onnxruntime shares every operator of a run among its threads, and they meet after each: waiting asleep costs small
operators more than their work, and waiting awake (spinning) takes the cores that decoding and gRPC need. Runs of one
thread never meet, and a run of few crops stays in its core's cache. OSNet x0.25 on two idle cores: 712 crops/s in
batches of 32 with threads asleep, 794 with threads spinning; with a run on each core 781 in batches of 16, 843 in
batches of 4 and 872 one by one. ResNet-50 27 to 29 in each way.

The bundle's ONNX graph in onnxruntime, on the provider that was asked for and no other.
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
MAX_SHARED_TIME_RATIO = (
    0.8  # of the time of one core: below it a second session for batches too small to part pays for its weights
)
TRIALS = 5
CROPS_PER_CORE = 4  # crops of a run: within 3 % of the fastest size of OSNet x0.25, ResNet-18 and ResNet-50


class CpuSession:
    """One graph in onnxruntime.

    Up to `CROPS_PER_CORE` crops are computed in the calling thread; more go in such parts to all cores. Fewer crops
    than cores would leave some idle: if nobody else is here they go to a second session that shares its operators among
    all cores, where that is faster (ResNet-50: 38 ms a crop instead of 76) and not slower (OSNet x0.25: 2.5 ms instead
    of 2.3). Any thread may call.

    Args:
        data: serialised ONNX, checked.
        threads: cores to use; 0 = all that this process may use.
    """

    def __init__(self, data: bytes, threads: int = 0) -> None:
        self._threads = threads = threads or cores()
        self._alone = open_session(data, 1)
        self._together = self._alone
        self._callers, self._lock = 0, Lock()  # within `run`
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="core")
        if threads > 1:
            together = open_session(data, threads)
            crop = np.zeros((1, *self._alone.get_inputs()[0].shape[1:]), np.uint8)
            if _single_crop_s(together, crop) < MAX_SHARED_TIME_RATIO * _single_crop_s(self._alone, crop):
                self._together = together

    def run(self, images: Pixels) -> Features:
        """Features, float32 (N, D), of uint8 (N, H, W, 3)."""
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
    """A session on the CPU; onnxruntime's own exceptions come through."""
    return ort.InferenceSession(data, session_options(threads), providers=[PROVIDER])


def session_options(threads: int) -> ort.SessionOptions:
    """How onnxruntime runs a graph beside a service on the same cores; figures by `benchmarks/bench_session.py`.

    Args:
        threads: of one run; 1 = the calling thread.
    """
    options = ort.SessionOptions()
    # Given as a number, even where it is onnxruntime's own: left at 0 it also pins each thread to a core (its page
    # "Thread management"), where it waits for whatever of the service runs there.
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # A pattern is planned and kept for every shape, and a batcher makes max_batch of them: the peak of OSNet x0.25
    # was 182 MiB with patterns and 123 MiB without, at the same speed. The arena itself stays: without it each run
    # asks the system anew (RSS 139 MiB, no faster); after the warm-up it grew by 2 MiB, so nothing is shrunk.
    options.enable_cpu_mem_arena = True
    options.enable_mem_pattern = False
    # Threads that spin for work took 1.6-1.9 times the CPU time per crop; decoding and gRPC on these cores want it.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors: its warnings are about graphs, and a user of a bundle writes none
    return options


def _run(session: ort.InferenceSession, images: Pixels) -> Features:
    features: Features = session.run([GRAPH_OUTPUT], {GRAPH_INPUT: images})[0]
    return features


def _single_crop_s(session: ort.InferenceSession, crop: Pixels) -> float:
    """Seconds of a lone crop: the best of a few, since whatever else runs only adds to them."""
    _run(session, crop)  # allocates
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
        engine_cache: where ``ort-tensorrt`` keeps its engines; None = `resight.runtime.engine.default_folder`.

    Raises:
        BundleError: the graph is refused, cannot be loaded, or fails the probes.
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
                chosen = tensorrt_options(folder, self._batch_shapes(), precision=precision, device_id=device_id)
            else:
                chosen = cuda_options(precision=precision, device_id=device_id) if provider == "cuda" else {}
            self._run = self._open(data, provider, chosen, threads, artefact.file)
            what = f"{artefact.file} of bundle {self.name} on {provider}"
            try:
                found = check_probes(
                    bundle.probes(), self.image, self.embed, what=what, min_cosine=min_cosine_for(artefact)
                )
                warm_up(self, every_size=provider != "cpu")
            except ReIDError:
                raise
            except Exception as error:  # a graph can load and still not run
                raise _unusable(provider, f"{what} does not run", error) from error
        self.min_cosine = found.min_cosine
        log.info("probes passed bundle=%s provider=%s min_cosine=%.6f", self.name, self.provider, found.min_cosine)

    def _batch_shapes(self) -> tuple[str, str, str]:
        """Smallest, usual and largest input, as onnxruntime's TensorRT provider spells shapes."""
        crop = f"{self.image.height}x{self.image.width}x3"
        batches = (1, self.max_batch, max(self.max_batch, *BATCH_SIZES))
        least, usual, most = (f"{GRAPH_INPUT}:{batch}x{crop}" for batch in batches)
        return least, usual, most

    def _open(
        self, data: bytes, provider: str, chosen: dict[str, str], threads: int, file: str
    ) -> Callable[[Pixels], Feature]:
        """What runs a batch on the chosen provider and no other."""
        try:
            if provider == "cpu":
                return CpuSession(data, threads).run
            return _open_gpu(data, provider, chosen)
        except ReIDError:
            raise
        except Exception as error:  # onnxruntime raises a dozen classes of its own that share no base
            raise _unusable(
                provider, f"bundle {self.name}: onnxruntime {ort.__version__} cannot load {file} on {provider}", error
            ) from error

    def embed(self, images: Pixels) -> Feature:
        """Embed fitted crops: uint8 (N, H, W, 3) RGB -> float32 (N, D) unit rows."""
        return self._run(images)


def _open_gpu(data: bytes, provider: str, chosen: dict[str, str]) -> Callable[[Pixels], Feature]:
    """A session on a GPU; onnxruntime would fall back to the CPU with a printed line, we do not.

    Raises:
        StartupError: the provider did not start.
    """
    # What TensorRT leaves runs on CUDA.
    beside = [("CUDAExecutionProvider", {"device_id": chosen["device_id"]})] if provider == "ort-tensorrt" else []
    session = ort.InferenceSession(
        data, session_options(1), providers=[(PROVIDERS[provider], chosen), *beside], enable_fallback=0
    )
    session.disable_fallback()  # nor when a run fails
    if session.get_providers()[0] != PROVIDERS[provider]:
        raise StartupError(
            f"provider {provider} could not be started, onnxruntime chose {session.get_providers()[0]}: "
            "mend the GPU's driver and libraries, or use --provider cpu"
        )

    def run(images: Pixels) -> Feature:
        features: Feature = session.run([GRAPH_OUTPUT], {GRAPH_INPUT: images})[0]
        return features

    return run


def _unusable(provider: str, what: str, error: Exception) -> ReIDError:
    """On a CPU the graph is to blame, on a GPU what is around it."""
    told = f"{what}: {(str(error).splitlines() or [type(error).__name__])[0][:300]}"
    if provider == "cpu":
        return BundleError(f"{told}: export the bundle anew")
    return StartupError(f"{told}: mend the GPU's driver, free its memory, or use --provider cpu")


def cuda_options(*, precision: str, device_id: int) -> dict[str, str]:
    """Of onnxruntime's CUDA provider; names and meanings from its page "CUDA Execution Provider"."""
    return {
        "device_id": str(device_id),
        # The default tries every algorithm for each new shape, and a batcher makes many shapes.
        "cudnn_conv_algo_search": "HEURISTIC",
        # The default doubles what it takes; a gallery's index may want the rest.
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0" if precision == "fp32" else "1",  # on by default: 10 bits of mantissa, which is no fp32
    }


def tensorrt_options(folder: Path, shapes: tuple[str, str, str], *, precision: str, device_id: int) -> dict[str, str]:
    """Of onnxruntime's TensorRT provider; names and meanings from its page "TensorRT Execution Provider".

    Args:
        folder: for its engines and timings.
        shapes: smallest, usual and largest input. Without them the engine is built anew for each larger batch.
        precision: of the graph; its build for TensorRT 10 has to be allowed what the graph holds.
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
    """The sealed folder of one graph; onnxruntime itself tells GPUs and versions of TensorRT apart in it."""
    key: dict[str, Any] = {
        "onnx": hashlib.sha256(data).hexdigest(),
        "provider": provider,
        "max_batch": max_batch,
        "onnxruntime": ort.__version__,
    }
    spelled = json.dumps(key, sort_keys=True).encode()
    with (
        cache.lock(),
        cache.sealed_folder(f"{hashlib.sha256(spelled).hexdigest()[:32]}.onnxruntime", spelled) as folder,
    ):
        yield folder
