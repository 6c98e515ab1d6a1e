"""A fake `tensorrt` 11.4 and `cuda.bindings.runtime` 13: records every call, and computes on the CPU.

It has the names of the current API and no others, so that a call or flag that was removed (or never was) fails here as
it would there; names of enumerations are those in the 11.4 bindings. It holds the caller to the documented contract:
memory has an owner, a size and a GPU, copies name their direction, work on a stream happens when it is synchronised and
not before, uint8 is cast before anything else, quantisation is symmetric, a batch outside the profile is refused. The
features come from onnxruntime, so whatever is built on top can be compared with real ones.
"""

from __future__ import annotations

import ctypes
import enum
import json
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, numpy_helper

GPU = "NVIDIA Stand-in"
BUILDER_FLAGS = (
    "REFIT DEBUG GPU_FALLBACK DISABLE_TIMING_CACHE EDITABLE_TIMING_CACHE TF32 SPARSE_WEIGHTS SAFETY_SCOPE DIRECT_IO "
    "VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME ERROR_ON_TIMING_CACHE_MISS DISABLE_COMPILATION_CACHE STRIP_PLAN "
    "REFIT_IDENTICAL WEIGHT_STREAMING REFIT_INDIVIDUAL STRICT_NANS MONITOR_MEMORY DISTRIBUTIVE_INDEPENDENCE"
)
MEMORY_POOLS = "WORKSPACE DLA_MANAGED_SRAM DLA_LOCAL_DRAM DLA_GLOBAL_DRAM TACTIC_DRAM TACTIC_SHARED_MEMORY"
CREATION_FLAGS = "STRONGLY_TYPED PREFER_AOT_PYTHON_PLUGINS PREFER_JIT_PYTHON_PLUGINS"
SEVERITIES = "INTERNAL_ERROR ERROR WARNING INFO VERBOSE"


@dataclass
class Machine:
    """A fake machine: its GPUs and the recorded calls."""

    version: str = "11.4.0.106"
    gpu: str = GPU
    devices: int = 2
    calls: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    memory: dict[int, tuple[ctypes.Array[ctypes.c_uint8], str, int]] = field(default_factory=dict)
    current: dict[int, int] = field(default_factory=dict)
    streams: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    refuse_build: bool = False

    def called(self, name: str, **details: Any) -> None:
        self.calls.append(name)
        self.details |= details

    @property
    def device(self) -> int:
        return self.current.get(threading.get_ident(), 0)

    def find(self, address: int, size: int, kind: str) -> int:
        """The address, if it is in memory of that kind on the current GPU."""
        for start, (buffer, owner, device) in self.memory.items():
            if start <= address and address + size <= start + len(buffer) and owner == kind:
                assert device == self.device, "memory of another GPU"
                return address
        raise AssertionError(f"{size} bytes at {address} are no {kind} memory")


def tensorrt_module(machine: Machine) -> ModuleType:
    trt = ModuleType("tensorrt")
    trt.__version__ = machine.version
    severities = enum.Enum("Severity", SEVERITIES)
    flags = CREATION_FLAGS if machine.version.startswith("11") else f"EXPLICIT_BATCH {CREATION_FLAGS}"
    trt.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", flags, start=0)
    trt.BuilderFlag = enum.Enum("BuilderFlag", BUILDER_FLAGS)
    trt.MemoryPoolType = enum.Enum("MemoryPoolType", MEMORY_POOLS)
    trt.TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT")
    trt.uint8, trt.float32, trt.float16 = "DataType.UINT8", "DataType.FLOAT", "DataType.HALF"

    class ILogger:
        Severity = severities

        def __init__(self) -> None:
            self.started = True

    class IProgressMonitor:
        def __init__(self) -> None:
            self.started = True

    class IHostMemory(bytes):
        @property
        def nbytes(self) -> int:
            return len(self)

    class Network:
        def __init__(self, flags: int) -> None:
            self.flags, self.model = flags, b""

    class OptimizationProfile:
        def __init__(self) -> None:
            self.shapes: dict[str, list[tuple[int, ...]]] = {}

        def set_shape(self, input: str, min: tuple[int, ...], opt: tuple[int, ...], max: tuple[int, ...]) -> None:
            self.shapes[input] = [tuple(min), tuple(opt), tuple(max)]

    class TimingCache:
        def __init__(self, data: bytes) -> None:
            self.data = data

        def serialize(self) -> IHostMemory:
            return IHostMemory(self.data)

    class BuilderConfig:
        def __init__(self) -> None:
            self.flags = {trt.BuilderFlag.TF32}
            self.profiles: list[OptimizationProfile] = []
            self.cache: TimingCache | None = None
            self.progress_monitor: Any = None
            self.limits: dict[Any, int] = {}

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            assert isinstance(pool, trt.MemoryPoolType)
            self.limits[pool] = pool_size

        def set_flag(self, flag: Any) -> None:
            assert isinstance(flag, trt.BuilderFlag)
            self.flags.add(flag)

        def clear_flag(self, flag: Any) -> None:
            assert isinstance(flag, trt.BuilderFlag)
            self.flags.discard(flag)

        def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
            return TimingCache(serialized_timing_cache or f"timings of {machine.gpu};".encode())

        def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
            machine.called("set_timing_cache")
            if machine.gpu.encode() not in cache.data and not ignore_mismatch:
                return False
            self.cache = cache
            return True

        def get_timing_cache(self) -> TimingCache | None:
            return self.cache

        def add_optimization_profile(self, profile: OptimizationProfile) -> int:
            machine.called("add_optimization_profile", profile=profile.shapes)
            least, tuned, most = profile.shapes["images"]
            if not least <= tuned <= most:
                return -1
            self.profiles.append(profile)
            return len(self.profiles) - 1

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            assert logger.started
            machine.called("Builder")
            self.logger = logger

        def create_network(self, flags: int = 0) -> Network:
            machine.called("create_network", network_flags=flags)
            return Network(flags)

        def create_builder_config(self) -> BuilderConfig:
            return BuilderConfig()

        def create_optimization_profile(self) -> OptimizationProfile:
            return OptimizationProfile()

        def build_serialized_network(self, network: Network, config: BuilderConfig) -> IHostMemory | None:
            machine.called("build_serialized_network", builder_flags=set(config.flags), limits=config.limits)
            assert network.model and len(config.profiles) == 1
            if machine.refuse_build:
                self.logger.log(severities.ERROR, "no kernel")
                return None
            monitor = config.progress_monitor
            if monitor is not None:
                assert monitor.started
                monitor.phase_start("Building", None, 2)
                assert monitor.step_complete("Building", 0) and monitor.step_complete("Building", 1)
                monitor.phase_finish("Building")
            assert config.cache is not None
            config.cache.data += b"one more;"
            self.logger.log(severities.VERBOSE, "thousands of lines")
            self.logger.log(severities.WARNING, "built by a stand-in")
            head = {"version": machine.version, "gpu": machine.gpu, "profile": config.profiles[0].shapes}
            return IHostMemory(json.dumps(head).encode() + b"\n" + network.model)

    class OnnxParser:
        def __init__(self, network: Network, logger: ILogger) -> None:
            self._network, self._errors = network, []

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> SimpleNamespace:
            return SimpleNamespace(desc=lambda: self._errors[index])

        def parse(self, model: bytes, path: str | None = None) -> bool:
            machine.called("parse")
            self._errors = refused(onnx.load_from_string(model), machine, self._network.flags)
            self._network.model = b"" if self._errors else model
            return not self._errors

    class ExecutionContext:
        def __init__(self, engine: Engine) -> None:
            self._engine, self._addresses, self._shape = engine, {}, None

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            least, _, most = self._engine.head["profile"][name]
            fits = all(low <= side <= high for low, side, high in zip(least, shape, most, strict=True))
            self._shape = tuple(shape) if fits else None
            return fits

        def set_tensor_address(self, name: str, memory: int) -> bool:
            machine.called("set_tensor_address")
            self._addresses[name] = memory
            return name in ("images", "features")

        def execute_async_v3(self, stream_handle: int) -> bool:
            machine.called("execute_async_v3", batch=None if self._shape is None else self._shape[0])
            if self._shape is None or set(self._addresses) != {"images", "features"}:
                return False
            if machine.device != self._engine.device:
                return False
            assert stream_handle, "the default stream"
            shape, addresses = self._shape, dict(self._addresses)
            size = int(np.prod(shape))
            machine.find(addresses["images"], size, "device")
            machine.find(addresses["features"], shape[0] * self._engine.dim * 4, "device")

            def work() -> None:
                images = np.frombuffer(ctypes.string_at(addresses["images"], size), np.uint8).reshape(shape)
                features = self._engine.session.run(["features"], {"images": images})[0]
                ctypes.memmove(addresses["features"], features.tobytes(), features.nbytes)

            machine.streams[stream_handle].append(work)
            return True

    class Engine:
        def __init__(self, head: dict[str, Any], model: bytes) -> None:
            self.head, self.device = head, machine.device
            self.session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
            self.dim = int(self.session.get_outputs()[0].shape[1])

        @property
        def num_io_tensors(self) -> int:
            return 2

        def get_tensor_name(self, index: int) -> str:
            return ("images", "features")[index]

        def get_tensor_mode(self, name: str) -> Any:
            return trt.TensorIOMode.INPUT if name == "images" else trt.TensorIOMode.OUTPUT

        def get_tensor_dtype(self, name: str) -> str:
            return trt.uint8 if name == "images" else trt.float32

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return (-1, *self.session.get_inputs()[0].shape[1:]) if name == "images" else (-1, self.dim)

        def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, ...]]:
            assert profile_index == 0
            return [tuple(shape) for shape in self.head["profile"][name]]

        def create_execution_context(self) -> ExecutionContext:
            machine.called("create_execution_context")
            return ExecutionContext(self)

    class Runtime:
        def __init__(self, logger: ILogger) -> None:
            assert logger.started
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: bytes) -> Engine | None:
            machine.called("deserialize_cuda_engine")
            head, _, model = serialized_engine.partition(b"\n")
            header = json.loads(head)
            if (header["version"], header["gpu"]) != (machine.version, machine.gpu):
                self._logger.log(severities.ERROR, "the engine is of another version or GPU")
                return None
            return Engine(header, model)

    trt.ILogger, trt.IProgressMonitor = ILogger, IProgressMonitor
    trt.Builder, trt.OnnxParser, trt.Runtime = Builder, OnnxParser, Runtime
    return trt


def refused(model: onnx.ModelProto, machine: Machine, flags: int) -> list[str]:
    """The errors of TensorRT's parser for a graph."""
    errors = []
    if any(node.op_type != "Cast" for node in model.graph.node if "images" in node.input):
        errors.append("UINT8 inputs must be cast before they are used")
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
            zero = constants[node.input[2]]
            if zero.dtype != np.int8 or zero.any():
                errors.append(f"{node.op_type} is not symmetric INT8")
    half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer)
    if machine.version.startswith("10") and half and not flags & 2:
        errors.append("half floats need a strongly typed network")
    return errors


def cudart_module(machine: Machine) -> ModuleType:
    rt = ModuleType("cuda.bindings.runtime")
    rt.cudaError_t = enum.IntEnum(
        "cudaError_t", {"cudaSuccess": 0, "cudaErrorInvalidValue": 1, "cudaErrorInvalidDevice": 101}
    )
    rt.cudaMemcpyKind = enum.IntEnum(
        "cudaMemcpyKind",
        "cudaMemcpyHostToHost cudaMemcpyHostToDevice cudaMemcpyDeviceToHost cudaMemcpyDeviceToDevice cudaMemcpyDefault",
        start=0,
    )
    rt.cudaStreamNonBlocking = 1
    good = rt.cudaError_t.cudaSuccess

    def allocate(size: int, kind: str) -> tuple[Any, int]:
        machine.called(f"allocate {kind}")
        buffer = (ctypes.c_uint8 * size)(*([0xFF] * size))
        address = ctypes.addressof(buffer)
        machine.memory[address] = (buffer, kind, machine.device)
        return good, address

    def free(address: int, kind: str) -> tuple[Any]:
        buffer, owner, _ = machine.memory.pop(address)
        assert owner == kind and buffer is not None
        return (good,)

    def copy(dst: int, src: int, count: int, kind: Any, stream: Stream) -> tuple[Any]:
        into, out_of = {
            rt.cudaMemcpyKind.cudaMemcpyHostToDevice: ("device", "host"),
            rt.cudaMemcpyKind.cudaMemcpyDeviceToHost: ("host", "device"),
        }[kind]
        machine.called(f"copy {out_of} to {into}")
        machine.find(dst, count, into)
        machine.find(src, count, out_of)
        machine.streams[int(stream)].append(lambda: ctypes.memmove(dst, src, count) and None)
        return (good,)

    class Stream(int):
        """Like the real one, a handle with an address."""

    def create_stream(flags: int) -> tuple[Any, Stream]:
        assert flags == rt.cudaStreamNonBlocking
        stream = Stream(max(machine.streams, default=0) + 1)
        machine.streams[stream] = []
        return good, stream

    def synchronize(stream: Stream) -> tuple[Any]:
        machine.called("synchronize")
        while machine.streams[int(stream)]:
            machine.streams[int(stream)].pop(0)()
        return (good,)

    def set_device(device: int) -> tuple[Any]:
        if device >= machine.devices:
            return (rt.cudaError_t.cudaErrorInvalidDevice,)
        machine.current[threading.get_ident()] = device
        return (good,)

    def properties(device: int) -> tuple[Any, Any]:
        if device >= machine.devices:
            return rt.cudaError_t.cudaErrorInvalidDevice, None
        return good, SimpleNamespace(name=machine.gpu.encode(), major=9, minor=0)

    rt.cudaMalloc = lambda size: allocate(size, "device")
    rt.cudaFree = lambda devPtr: free(devPtr, "device")
    rt.cudaMallocHost = lambda size: allocate(size, "host")
    rt.cudaFreeHost = lambda ptr: free(ptr, "host")
    rt.cudaMemcpyAsync = copy
    rt.cudaStreamCreateWithFlags = create_stream
    rt.cudaStreamSynchronize = synchronize
    rt.cudaStreamDestroy = lambda stream: (machine.streams.pop(int(stream)) and None, good)[1:]
    rt.cudaSetDevice = set_device
    rt.cudaGetDeviceProperties = properties
    rt.cudaDriverGetVersion = lambda: (good, 13000)
    rt.cudaGetErrorString = lambda error: (good, b"invalid device ordinal")
    return rt


def install(monkeypatch: pytest.MonkeyPatch, **described: Any) -> Machine:
    """Install the fake modules for `import tensorrt` and `import cuda.bindings.runtime`."""
    machine = Machine(**described)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_module(machine))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cudart_module(machine))
    return machine
