"""What a GPU gives: the training step, the runtimes, the faiss index and the service, each against the CPU in one run.

Pieces whose package or GPU is missing are left out, saying which. On a machine with an NVIDIA GPU the figures are
written below the line of docs/gpu.md, under the GPU's name; `--device cpu` tries every line of this program that a
machine without one can run, prints, and writes nothing.

    python benchmarks/bench_gpu.py [--tests] [--device cpu] [--bundle FOLDER] [--seconds 3]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gpu_pieces import Rows, export, index, runtimes, service, training

from resight.bundle.bundle import Bundle, open_bundle
from resight.errors import StartupError
from resight.runtime.engine import load_cudart

ROOT = Path(__file__).resolve().parents[1]
DOC = ROOT / "docs" / "gpu.md"
LINE = "<!-- figures: written by benchmarks/bench_gpu.py -->\n"
PACKAGES = ("torch", "onnxruntime-gpu", "onnxruntime", "tensorrt", "cuda-bindings", "faiss-gpu-cuvs", "faiss-cpu")


def gpu_name() -> str:
    """The first GPU's name, or nothing."""
    with contextlib.suppress(StartupError):
        error, properties = load_cudart().cudaGetDeviceProperties(0)
        return "" if int(error) else properties.name.split(b"\0")[0].decode()
    with contextlib.suppress(ImportError):
        import torch

        return torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    return ""


def measure(device: str, bundle_path: Path | None, seconds: float) -> Rows:
    """All pieces; one that cannot be imported is left out, saying which package."""
    providers = ("cpu", "cuda", "ort-tensorrt", "tensorrt")
    found: Rows = []

    def take(name: str, piece: Callable[[], Rows]) -> None:
        try:
            rows = piece()
        except ImportError as error:
            rows = [(name, f"not run: the package {error.name or error} is missing")]
        except Exception as error:  # one piece that fails must not cost the figures of the others
            rows = [(name, f"failed: {type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}")]
        for what, figure in rows:
            print(f"{what}: {figure}", flush=True)
        found.extend(rows)

    take("training step", lambda: training(device, seconds))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made: list[Bundle] = []

        def bundle() -> Bundle:
            if not made:
                made.append(open_bundle(bundle_path) if bundle_path else export(folder))
            return made[0]

        take("runtimes", lambda: runtimes(bundle(), providers, seconds, folder / "engines"))
        take("faiss index", lambda: index(device, seconds))
        take("service", lambda: service(bundle(), providers if device == "cuda" else ("cpu",), seconds, folder))
    return found


def versions() -> str:
    """Of what is installed of `PACKAGES`."""
    found = []
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def write(gpu: str, rows: Rows, tests: str) -> None:
    """Put the figures into docs/gpu.md, in the place of those of the same GPU."""
    text = DOC.read_text()
    head, _, below = text.partition(LINE)
    parts = [part.strip() for part in re.split(r"^(?=## )", below, flags=re.MULTILINE)]
    kept = "".join(f"{part}\n\n" for part in parts if part and not part.startswith(f"## {gpu}\n"))
    table = "\n".join(f"| {what} | {figure.replace('|', '/')} |" for what, figure in rows)
    day = datetime.now(UTC).date().isoformat()
    found = f"## {gpu}\n\n{day}, {platform.machine()}, {os.cpu_count()} cores; {versions()}. {tests}\n\n"
    DOC.write_text(head + LINE + "\n" + kept + found + f"| what | figure |\n| --- | --- |\n{table}\n")


def main() -> None:
    """Measure, and write where there is a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", action="store_true", help="run the tests that need a GPU first")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--bundle", type=Path, help="measure this one; the built-in encoder by default")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement")
    arguments = parser.parse_args()
    gpu = gpu_name()
    if arguments.device == "cuda" and not gpu:
        print(
            "no NVIDIA GPU on this machine: nothing was run, docs/gpu.md is as it was (--device cpu tries the program)"
        )
        return
    tests = ""
    if arguments.tests:
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        print(ran.stdout)
        tests = f"`pytest -m gpu`: {ran.stdout.strip().splitlines()[-1].strip('= ')}."
    rows = measure(arguments.device, arguments.bundle, arguments.seconds)
    if arguments.device == "cuda":
        write(gpu, rows, tests)
        print(f"written to {DOC.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
