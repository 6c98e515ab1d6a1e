"""What `resight doctor` looks at outside of the data folder: the machine, a bundle, a running server.

Each check tells ok, warn or fail, what was found, and what to do next. Nothing is changed.
"""

from __future__ import annotations

import contextlib
import platform
import resource
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from resight.bundle import open_bundle
from resight.client import Client
from resight.errors import ReIDError
from resight.machine import cores
from resight.service.disk import room
from resight.service.onnx_runtime import OnnxRuntime
from resight.service.runtime import open_runtime

Verdict = Literal["ok", "warn", "fail"]
MIB = 1 << 20
PACKAGES = ("resight", "numpy", "pillow", "grpcio", "protobuf", "onnxruntime", "faiss-cpu")
MEMORY_MIB = 1024  # a server with an empty gallery and a ResNet-50 takes half of it
FILES = 1024  # connections, threads' pipes and databases of 64 tenants
PINGS = 5


@dataclass(frozen=True)
class Check:
    """One thing looked at.

    Attributes:
        area: machine, bundle, data or server.
        next_step: what to do; empty when all is well.
    """

    area: str
    name: str
    verdict: Verdict
    found: str
    next_step: str = ""


def judged(area: str, name: str, good: bool, found: str, next_step: str, bad: Verdict = "warn") -> Check:
    """A check with its next step only where it is needed."""
    return Check(area, name, "ok", found) if good else Check(area, name, bad, found, next_step)


@contextlib.contextmanager
def failing(area: str, name: str, checks: list[Check], next_step: str) -> Iterator[None]:
    """An error inside is a failed check; what follows is still looked at."""
    try:
        yield
    except (ReIDError, OSError, sqlite3.Error) as error:
        checks.append(Check(area, name, "fail", str(error), next_step))


def machine() -> list[Check]:
    """Versions, providers, cores, memory, clock and limits of this machine and this process."""
    import onnxruntime

    checks = [Check("machine", "versions", "ok", f"python {platform.python_version()}, {', '.join(_versions())}")]
    sqlite = sqlite3.sqlite_version_info >= (3, 38)
    found = f"SQLite {sqlite3.sqlite_version}"
    checks.append(judged("machine", "sqlite", sqlite, found, "install a Python with SQLite 3.38 or newer", "fail"))
    providers = [name.removesuffix("ExecutionProvider").lower() for name in onnxruntime.get_available_providers()]
    told = "pip install 'resight[cpu]' anew: onnxruntime has no CPU provider"
    checks.append(judged("machine", "providers", "cpu" in providers, ", ".join(providers), told, "fail"))
    usable = cores()
    checks.append(judged("machine", "cores", usable >= 2, str(usable), "one core decodes and infers in turn: give two"))
    free, total = _memory_mib()
    found = f"{free} of {total} MiB available"
    checks.append(judged("machine", "memory", free >= MEMORY_MIB, found, f"leave {MEMORY_MIB} MiB for a server"))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    checks.append(judged("machine", "open files", soft >= FILES, str(soft), f"ulimit -n {FILES}, or LimitNOFILE"))
    now = datetime.now(UTC)
    built = datetime.fromtimestamp(Path(__file__).stat().st_mtime, UTC)
    told = "set the clock (NTP): expiry and certificates go by it"
    checks.append(judged("machine", "clock", now >= built, f"{now:%Y-%m-%d %H:%M:%S} UTC", told, "fail"))
    return checks


def _versions() -> Iterator[str]:
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            yield f"{name} {version(name)}"


def _memory_mib() -> tuple[int, int]:
    """MiB available and in all, no more than the control group allows."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (int(lines[name].split()[0]) // 1024 for name in ("MemAvailable", "MemTotal"))
    with contextlib.suppress(OSError, ValueError):  # "max", or another kind of control group
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text()) // MIB
        used = int(Path("/sys/fs/cgroup/memory.current").read_text()) // MIB
        free, total = min(free, limit - used), min(total, limit)
    return free, total


def disk(folder: Path) -> Check:
    """Room where a folder stands, against the marks that `resight serve` has by default."""
    free, total = room(folder)
    found = f"{free // MIB} of {total // MIB} MiB free"
    good = free >= 512 * MIB and free >= 0.07 * total
    return judged("data", "disk", good, found, "make room: below 256 MiB or 2 % the server refuses writes")


def bundle(path: Path) -> list[Check]:
    """Every byte of a bundle, and its probes through this machine's decoder, resize and onnxruntime."""
    checks: list[Check] = []
    with failing("bundle", "bytes", checks, "copy the bundle again, or export it anew"):
        opened = open_bundle(path)
        manifest = opened.manifest
        told = f"{manifest.name}, space {manifest.space_id}, {manifest.feature_dim}-d"
        checks.append(Check("bundle", "bytes", "ok", told))
        fitted = manifest.calibration is not None
        step = "searches tell no probability: export it with a calibration (docs/calibration.md)"
        checks.append(judged("bundle", "calibration", fitted, "there" if fitted else "none", step))
        with failing("bundle", "probes", checks, "export the bundle anew on the version that serves it"):
            runtime = open_runtime(opened, provider="cpu", precision="fp32", max_batch=8)
            cosine = f"smallest cosine {runtime.min_cosine:.6f}" if isinstance(runtime, OnnxRuntime) else "passed"
            checks.append(Check("bundle", "probes", "ok", cosine))
    return checks


def server(connect: Callable[[], Client]) -> list[Check]:
    """Health, limits and answering time of a running server."""
    checks: list[Check] = []
    with failing("server", "reachable", checks, "start it with `resight serve`, or see its log and docs/security.md"):
        with connect() as client:
            client.wait_ready(3.0)
            checks.append(Check("server", "health", "ok", "SERVING"))
            info = client.info()
            same = info.version == version("resight")
            told = f"resight {info.version}, model {info.model}, {info.provider}"
            checks.append(judged("server", "version", same, told, f"this is {version('resight')}: use one version"))
            limits = ", ".join(f"{name} {value}" for name, value in sorted(info.limits.items()))
            checks.append(Check("server", "limits", "ok", limits))
            times = []
            for _ in range(PINGS):
                started = time.perf_counter()
                client.info()
                times.append((time.perf_counter() - started) * 1000)
            median = statistics.median(times)
            step = "above 50 ms without work: the way is long or the machine is full; see its metrics"
            checks.append(judged("server", "latency", median < 50, f"{median:.1f} ms, median of {PINGS}", step))
    return checks
