"""A bundle's model in TensorRT: an engine built on this machine, checked on the probes and run through CUDA."""

from __future__ import annotations

import ctypes
import logging
import math
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resight.arrays import Feature, Pixels
from resight.bundle.bundle import Bundle
from resight.bundle.graph_check import check_graph
from resight.bundle.manifest import GRAPH_INPUT, GRAPH_OUTPUT
from resight.bundle.probes import BATCH_SIZES, Parity, check_probes, min_cosine_for
from resight.errors import BundleError, LimitError, ModelError
from resight.image import ImageSpec
from resight.runtime.base import warm_up
from resight.runtime.engine import (
    EngineCache,
    ShapeProfile,
    check_cuda,
    engine_key,
    load_cudart,
    load_or_build_engine,
    load_tensorrt,
    tensorrt_logger,
)

log = logging.getLogger(__name__)


class EngineSession:
    """One engine on one GPU, with buffers for its largest batch. Calls from several threads are serialised.

    Args:
        plan: from `resight.runtime.engine.load_or_build_engine`, built on this machine: an engine is executable code.
        image: height and width of a crop.
        device_id: the GPU.

    Raises:
        BundleError: TensorRT rejects the engine, or it is not uint8 (N, H, W, 3) -> float32 (N, D).
        StartupError: no TensorRT, no CUDA, or no memory on the GPU.
    """

    def __init__(self, plan: bytes, image: ImageSpec, *, device_id: int = 0) -> None:
        trt, self._cudart = load_tensorrt(), load_cudart()
        self._device_id = device_id
        self._lock = threading.Lock()
        check_cuda(self._cudart.cudaSetDevice(device_id))
        # All three must live as long as the session: an engine needs its runtime, a runtime its logger.
        self._logger = tensorrt_logger(trt)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise BundleError("TensorRT rejects the engine: it is of another version or GPU and has to be rebuilt")
        self.profile, self.feature_dim = self._check_tensors(trt, image)
        self._shape = (image.height, image.width, 3)
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise BundleError("not enough GPU memory for the engine's context: free memory, or lower max_batch")
        self._allocate()

    def _check_tensors(self, trt: ModuleType, image: ImageSpec) -> tuple[ShapeProfile, int]:
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        found = {
            name: (engine.get_tensor_mode(name), engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name)))
            for name in names
        }
        dim = found[GRAPH_OUTPUT][2][-1] if GRAPH_OUTPUT in found else 0
        expected = {
            GRAPH_INPUT: (trt.TensorIOMode.INPUT, trt.uint8, (-1, image.height, image.width, 3)),
            GRAPH_OUTPUT: (trt.TensorIOMode.OUTPUT, trt.float32, (-1, dim)),
        }
        if found != expected or dim < 1:
            raise BundleError(f"expected an engine with tensors {expected}, found {found}: export the bundle again")
        batches = [int(shape[0]) for shape in engine.get_tensor_profile_shape(GRAPH_INPUT, 0)]
        return ShapeProfile(*batches), int(dim)

    def _allocate(self) -> None:
        """Allocate page-locked buffers on the host, which need no staging for copies, and buffers on the GPU."""
        cudart, most = self._cudart, self.profile.most
        sizes = (int(most * np.prod(self._shape)), most * self.feature_dim * 4)
        held: list[tuple[Callable[[Any], Any], Any]] = []
        self._release = weakref.finalize(self, _free, held)
        self._stream = check_cuda(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        held.append((cudart.cudaStreamDestroy, self._stream))
        host, self._device = [], []
        for size in sizes:
            host.append(check_cuda(cudart.cudaMallocHost(size)))
            held.append((cudart.cudaFreeHost, host[-1]))
            self._device.append(check_cuda(cudart.cudaMalloc(size)))
            held.append((cudart.cudaFree, self._device[-1]))
        shapes = (most, *self._shape), (most, self.feature_dim)
        self._images: Pixels = _array_at(host[0], shapes[0], np.uint8)
        self._features: NDArray[np.float32] = _array_at(host[1], shapes[1], np.float32)
        self._images[:] = 0
        for name, address in zip((GRAPH_INPUT, GRAPH_OUTPUT), self._device, strict=True):
            if not self._context.set_tensor_address(name, int(address)):
                raise BundleError(f"TensorRT rejects the address of {name}: export the bundle again")

    def run(self, images: Pixels) -> NDArray[np.float32]:
        """Embed fitted crops.

        Args:
            images: uint8 (N, H, W, 3) RGB, N in 1..profile.most; fewer than ``profile.least`` are padded with black.

        Returns:
            float32 (N, D), unit rows.

        Raises:
            LimitError: too many crops, or crops of another size.
            ModelError: the GPU failed, or the session was closed.
        """
        count = len(images)
        if not 1 <= count <= self.profile.most or images.shape[1:] != self._shape or images.dtype != np.uint8:
            raise LimitError(
                f"expected uint8 of 1..{self.profile.most} x {self._shape}, found {images.dtype} {images.shape}: "
                "the engine was built only for such batches"
            )
        with self._lock:
            if not self._release.alive:
                raise ModelError("the engine was closed: open the bundle again")
            batch = max(count, self.profile.least)
            self._images[:count] = images
            self._images[count:batch] = 0
            self._compute(batch)
            features: NDArray[np.float32] = self._features[:count].copy()
        return features

    def close(self) -> None:
        """Free the GPU's memory after the current batch; otherwise it is freed with the object."""
        with self._lock:
            self._release()

    def _compute(self, batch: int) -> None:
        """Compute the features of the first ``batch`` crops of the buffers on the GPU."""
        cudart, kinds, stream = self._cudart, self._cudart.cudaMemcpyKind, self._stream
        incoming, outgoing = self._images[:batch], self._features[:batch]
        check_cuda(cudart.cudaSetDevice(self._device_id), ModelError)  # the current GPU is per thread
        check_cuda(
            cudart.cudaMemcpyAsync(
                self._device[0], incoming.ctypes.data, incoming.nbytes, kinds.cudaMemcpyHostToDevice, stream
            ),
            ModelError,
        )
        fits = self._context.set_input_shape(GRAPH_INPUT, (batch, *self._shape))
        if not fits or not self._context.execute_async_v3(int(stream)):
            raise ModelError(f"TensorRT failed on a batch of {batch}: its log says why; restart the server")
        check_cuda(
            cudart.cudaMemcpyAsync(
                outgoing.ctypes.data, self._device[1], outgoing.nbytes, kinds.cudaMemcpyDeviceToHost, stream
            ),
            ModelError,
        )
        check_cuda(cudart.cudaStreamSynchronize(stream), ModelError)


def _array_at(address: Any, shape: tuple[int, ...], kind: type[np.generic]) -> NDArray[Any]:
    """An array over memory that CUDA allocated, which must outlive the array."""
    size = math.prod(shape) * np.dtype(kind).itemsize
    buffer: Any = (ctypes.c_uint8 * size).from_address(int(address))
    return np.frombuffer(buffer, kind).reshape(shape)


def _free(held: list[tuple[Callable[[Any], Any], Any]]) -> None:
    """Release a session's resources in reverse order, ignoring errors (the CUDA context may be gone)."""
    while held:
        release, handle = held.pop()
        release(handle)


def open_engine(
    bundle: Bundle, *, precision: str, max_batch: int, device_id: int = 0, folder: Path | None = None
) -> tuple[EngineSession, Parity]:
    """Load or build the engine of one form of a bundle and check it on the bundle's probes.

    Args:
        bundle: verified by `resight.bundle.bundle.open_bundle`.
        precision: fp32 and fp16 are the bundle's ONNX graphs, int8 the one made for TensorRT.
        max_batch: the engine's largest batch.
        device_id: the GPU.
        folder: of the engine cache; `resight.runtime.engine.default_folder` by default.

    Returns:
        The session and the parity of its features of the probes.

    Raises:
        BundleError: no such form, the graph is rejected by the check or by TensorRT, or it fails the probes.
        StartupError: no TensorRT, no CUDA, no such GPU, or the cache cannot be used.
    """
    load_tensorrt()
    check_cuda(load_cudart().cudaSetDevice(device_id))
    manifest, runtime = bundle.manifest, "tensorrt" if precision == "int8" else "onnx"
    artefact, data = bundle.find(precision, runtime), bundle.read(precision, runtime)
    check_graph(data, manifest.image, manifest.feature_dim, what=artefact.file)
    profile = ShapeProfile(1, max_batch, max(max_batch, *BATCH_SIZES))  # tuned for full batches
    key = engine_key(data, precision=precision, image=manifest.image, profile=profile, device_id=device_id)
    cache = EngineCache(folder)
    plan = load_or_build_engine(data, key, cache)
    try:
        session = EngineSession(plan, manifest.image, device_id=device_id)
    except BundleError as error:
        log.warning("%s (%s in %s)", error, key.file, cache.folder)
        plan = load_or_build_engine(data, key, cache, rebuild=True)
        session = EngineSession(plan, manifest.image, device_id=device_id)
    found = check_probes(
        bundle.probes(),
        manifest.image,
        session.run,
        what=f"the TensorRT engine of {artefact.file}",
        min_cosine=min_cosine_for(artefact),
    )
    return session, found


class TensorRTRuntime:
    """One engine on one GPU.

    Args:
        bundle: verified by `resight.bundle.bundle.open_bundle`.
        precision: fp32 and fp16 are the bundle's ONNX graphs, int8 the one made for TensorRT.
        max_batch: crops per run, and the batch the engine is tuned for.
        device_id: the GPU.
        engine_cache: folder of engines; None = `resight.runtime.engine.default_folder`. The first start builds the
            engine, which takes minutes; progress is logged.

    Raises:
        BundleError: no such graph, it is rejected by the check or by TensorRT, or it fails the probes.
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
        """Free the GPU's memory now; otherwise it is freed with the object."""
        self._session.close()
