"""TensorRT engines: building one from a bundle's ONNX graph, and the cache of engines built on this machine.

An engine is executable code that TensorRT does not check ("never deserialize an engine file from an untrusted source",
its migration guide). Therefore each file in the cache carries an HMAC with a secret that never leaves the folder: a
file that was copied from elsewhere, altered, truncated or renamed is not loaded but rebuilt.

Works with TensorRT 10.x and 11.x: every call used here is the same in both (compared with the names and docstrings in
the 11.4 bindings; its migration guide lists the removed ones under "Removed Python APIs and Replacements"). The graph
determines the precision: TensorRT 11 only has strongly typed networks, and 10 is configured to use them.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import importlib
import json
import logging
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from filelock import FileLock, Timeout

from resight.bundle.manifest import GRAPH_INPUT
from resight.errors import BundleError, ReIDError, StartupError
from resight.files import write_atomic
from resight.image import ImageSpec
from resight.locks import OWNER_ONLY

log = logging.getLogger(__name__)

SECRET_FILE, LOCK_FILE = "secret", "lock"
SECRET_BYTES = 32  # as long as the HMAC's digest (RFC 2104, section 3)
MAX_FILE_BYTES = 2**32  # an engine of ResNet-50 takes 100 MB; a timing cache less
_MAGIC = b"resight-engine-1\n"
_PRIVATE = 0o077  # permission bits of group and others


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/resight/engines``, or the same below ``~/.cache`` (XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "resight" / "engines"


class EngineCache:
    """A folder of files sealed with an HMAC, for one user of one machine.

    Args:
        folder: created with mode 0700 if missing; `default_folder` by default.

    Raises:
        StartupError: the folder or its secret is a link, has another owner, is open to others, or cannot be written.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                self.folder.mkdir(mode=0o700)
            self._check_folder()
            self._secret = self._open_secret()
        except OSError as error:
            raise StartupError(
                f"engine cache {self.folder} cannot be used: {error.strerror}: choose another with --engine-cache"
            ) from error

    def _check_folder(self) -> None:
        status = self.folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & _PRIVATE:
            raise StartupError(
                f"engine cache {self.folder}: expected a folder accessible only to this user (mode 0700), found "
                f"{stat.filemode(status.st_mode)} of user {status.st_uid}: engines are executable code; remove it, or "
                "choose another with --engine-cache"
            )

    def _open_secret(self) -> bytes:
        path = self.folder / SECRET_FILE
        if not path.exists() and not path.is_symlink():
            made = self.folder / f".{SECRET_FILE}.{os.getpid()}"
            self._write(made, secrets.token_bytes(SECRET_BYTES))
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(made)  # the first of two processes wins; nothing is overwritten
            made.unlink()
        secret = _read_private(path)
        if secret is None or len(secret) != SECRET_BYTES:
            raise StartupError(
                f"{path}: expected {SECRET_BYTES} bytes in a file accessible only to this user (mode 0600), found "
                f"something else: remove the folder {self.folder}, its engines are rebuilt"
            )
        return secret

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder: one process builds at a time, since two builds would distort each other's timings."""
        lock = FileLock(self.folder / LOCK_FILE, mode=OWNER_ONLY)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("another process builds an engine in %s: waiting for it", self.folder)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def load(self, name: str, key: bytes) -> bytes | None:
        """Read a file that `store` wrote with this name and key.

        Args:
            name: a file name.
            key: everything the content depends on; part of the seal.

        Returns:
            The content; None if there is no such file, or (with a warning in the log) if its seal does not match.
        """
        path = self.folder / name
        if not path.exists() and not path.is_symlink():
            return None
        data = _read_private(path)
        start = len(_MAGIC) + hashlib.sha256().digest_size
        if data is not None and data.startswith(_MAGIC):
            content = data[start:]
            if hmac.compare_digest(data[len(_MAGIC) : start], self._seal(name, key, content)):
                return content
        log.warning("%s does not match its seal (altered, truncated, or copied): it is rebuilt", path)
        return None

    def store(self, name: str, key: bytes, content: bytes) -> None:
        """Seal and write a file atomically."""
        self._write(self.folder / name, _MAGIC + self._seal(name, key, content) + content)

    def _seal(self, name: str, key: bytes, content: bytes) -> bytes:
        parts = b"".join(hashlib.sha256(part).digest() for part in (name.encode(), key, content))
        return hmac.digest(self._secret, _MAGIC + parts, "sha256")

    @contextlib.contextmanager
    def sealed_folder(self, name: str, key: bytes) -> Iterator[Path]:
        """A folder in which another library stores its engines: checked before the block, sealed after it.

        If a file was added, removed or altered since the folder was sealed, the folder is emptied first.
        """
        folder, seal = self.folder / name, f"{name}.seal"
        if folder.is_symlink():
            folder.unlink()
        sealed = self.load(seal, key)
        if folder.exists() and (sealed is None or sealed != _list(folder)):
            log.warning("%s was changed since it was sealed: emptied, its engines are rebuilt", folder)
            shutil.rmtree(folder)
        folder.mkdir(mode=0o700, exist_ok=True)
        yield folder
        for path in folder.iterdir():
            path.chmod(0o600)
        self.store(seal, key, _list(folder))

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        write_atomic(path, data)
        path.chmod(0o600)  # the folder is closed to others anyway


def _list(folder: Path) -> bytes:
    """Names and digests of a folder's files; for anything else a random value, so that no seal matches."""
    found = {}
    for path in sorted(folder.iterdir()):
        data = _read_private(path) if path.is_file() else None
        found[path.name] = secrets.token_hex() if data is None else hashlib.sha256(data).hexdigest()
    return json.dumps(found).encode()


def _read_private(path: Path) -> bytes | None:
    """The bytes of a regular file that only this user can access; None for anything else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    status = os.fstat(descriptor)
    ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & _PRIVATE
    if not ours or status.st_size > MAX_FILE_BYTES:
        os.close(descriptor)
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


_HELP = "install resight[gpu] on a machine with an NVIDIA GPU, or use --provider cpu"


@dataclass(frozen=True)
class ShapeProfile:
    """The batch sizes an engine accepts, ``least`` to ``most``; its kernels are chosen for size ``tuned``."""

    least: int
    tuned: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.tuned <= self.most:
            raise ValueError(f"expected 1 <= least <= tuned <= most, found {self}")


@dataclass(frozen=True)
class EngineKey:
    """Everything an engine depends on; if one value differs, another engine is built.

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
    profile: ShapeProfile

    def to_bytes(self) -> bytes:
        """A canonical serialisation."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @property
    def file(self) -> str:
        """The engine's name in the cache."""
        return f"{hashlib.sha256(self.to_bytes()).hexdigest()[:32]}.plan"


def load_tensorrt() -> ModuleType:
    """Import the package ``tensorrt``.

    Raises:
        StartupError: it cannot be imported.
    """
    return _load("tensorrt", "tensorrt")


def load_cudart() -> ModuleType:
    """Import CUDA's runtime API, ``cuda.bindings.runtime``.

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


def check_cuda(result: tuple[Any, ...], kind: type[ReIDError] = StartupError) -> Any:
    """Return the value of a call to ``cuda.bindings.runtime``, or raise its error.

    Args:
        result: the call's result, (error, value).
        kind: class of the error to raise if the result is not ``cudaSuccess``.

    Raises:
        ReIDError: of class ``kind``.
    """
    cudart = load_cudart()
    if result[0] != cudart.cudaError_t.cudaSuccess:
        _, description = cudart.cudaGetErrorString(result[0])
        raise kind(
            f"expected success of CUDA, found {result[0].name} ({description.decode()}): check that `nvidia-smi` shows "
            "the GPU with free memory, or use --provider cpu"
        )
    return result[1] if len(result) > 1 else None


def tensorrt_logger(trt: ModuleType) -> Any:
    """A TensorRT logger that writes to Python's ``logging``."""
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
            if severity in levels:  # verbose messages, tens of thousands, are dropped
                log.log(levels[severity], "tensorrt: %s", msg)

    return Logger()


def engine_key(
    data: bytes, *, precision: str, image: ImageSpec, profile: ShapeProfile, device_id: int = 0
) -> EngineKey:
    """The key of a graph's engine on this machine.

    Raises:
        StartupError: no TensorRT, no CUDA, or no such GPU.
    """
    cudart = load_cudart()
    properties = check_cuda(cudart.cudaGetDeviceProperties(device_id))
    return EngineKey(
        gpu=properties.name.split(b"\0")[0].decode(),
        compute_capability=f"{properties.major}.{properties.minor}",
        driver=check_cuda(cudart.cudaDriverGetVersion()),
        tensorrt=load_tensorrt().__version__,
        onnx_sha256=hashlib.sha256(data).hexdigest(),
        precision=precision,
        image=(image.height, image.width),
        profile=profile,
    )


def load_or_build_engine(data: bytes, key: EngineKey, cache: EngineCache, *, rebuild: bool = False) -> bytes:
    """Load a graph's engine from the cache, or build it, which takes minutes and is logged.

    Args:
        data: the ONNX graph, already checked by `resight.bundle.graph_check.check_graph`.
        key: from `engine_key`, on the current GPU.
        cache: the engine is loaded from it, or stored in it.
        rebuild: ignore the cached engine, because TensorRT rejected it.

    Raises:
        BundleError: TensorRT does not accept the graph.
        StartupError: no TensorRT, or the cache cannot be used.
    """
    plan = None if rebuild else cache.load(key.file, key.to_bytes())
    if plan is not None:
        return plan
    with cache.lock():
        plan = None if rebuild else cache.load(key.file, key.to_bytes())  # another process may have built it meanwhile
        if plan is not None:
            return plan
        timings = f"{key.compute_capability}-{key.tensorrt}.timing"
        environment = f"{key.gpu} {key.compute_capability} {key.driver} {key.tensorrt}".encode()
        log.info("building a TensorRT engine of %s for %s, which takes minutes", key.precision, key.gpu)
        started = time.monotonic()
        plan, timing_cache = build_engine(data, key, cache.load(timings, environment) or b"")
        cache.store(key.file, key.to_bytes(), plan)
        cache.store(timings, environment, timing_cache)
        log.info("engine built seconds=%.0f bytes=%d file=%s", time.monotonic() - started, len(plan), key.file)
    return plan


# Limit of the scratch memory of a layer's kernels. TensorRT's own default is all of the GPU's memory, which a gallery's
# index may share; this is onnxruntime's default (trt_max_workspace_size).
WORKSPACE_BYTES = 2**30
PROGRESS_S = 10.0  # interval of progress messages in the log


def build_engine(data: bytes, key: EngineKey, timing_cache: bytes = b"") -> tuple[bytes, bytes]:
    """Build an engine.

    Args:
        data: the ONNX graph with input uint8 ``images`` (batch, H, W, 3).
        key: its profile and precision are used; the rest names it.
        timing_cache: from an earlier build; TensorRT rejects one of another GPU or version.

    Returns:
        The engine and the updated timing cache.

    Raises:
        BundleError: TensorRT does not accept the graph, or finds no kernels for it.
    """
    trt = load_tensorrt()
    logger = tensorrt_logger(trt)
    builder = trt.Builder(logger)
    # 11.0: "strongly typed mode is always enabled. This flag is retained ... but is ignored."
    strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if trt.__version__.startswith("10.") else 0
    network = builder.create_network(strong)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(data):
        problems = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise BundleError(
            f"TensorRT {trt.__version__} does not accept the {key.precision} graph: {problems[:500]}: export it again"
        )
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE_BYTES)
    monitor = _monitor(trt)  # in a variable, like `timings`: both must outlive the build
    config.progress_monitor = monitor
    if key.precision == "fp32":
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default; has only 10 bits of mantissa
    timings = config.create_timing_cache(timing_cache)
    if not config.set_timing_cache(timings, False):  # of another GPU or version
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, False)
    profile = builder.create_optimization_profile()
    shapes = [(batch, *key.image, 3) for batch in (key.profile.least, key.profile.tuned, key.profile.most)]
    profile.set_shape(GRAPH_INPUT, *shapes)
    if config.add_optimization_profile(profile) < 0:
        raise BundleError(f"TensorRT {trt.__version__} does not accept batches of {key.profile} for this graph")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BundleError(
            f"TensorRT {trt.__version__} could build no engine of the {key.precision} graph on {key.gpu}: its log "
            "says why; use --provider cuda, or another precision"
        )
    return bytes(plan), bytes(config.get_timing_cache().serialize())


def _monitor(trt: ModuleType) -> Any:
    """A progress monitor that logs every `PROGRESS_S` while an engine is built."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._steps: dict[str, int] = {}
            self._last_logged_s = time.monotonic()

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            if time.monotonic() - self._last_logged_s >= PROGRESS_S:
                self._last_logged_s = time.monotonic()
                log.info("building: %s %d/%d", phase_name, step + 1, self._steps.get(phase_name, step + 1))
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor()
