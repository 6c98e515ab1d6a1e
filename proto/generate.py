"""Write the Python stubs beside the .proto files: ``python proto/generate.py [OUT]``.

Four files come from each proto: messages, their types, services, their types. OUT (default: this
folder) lets a test generate elsewhere and compare, so that committed stubs cannot go stale. ``google/rpc/status.proto``
is a copy of Google's (Apache-2.0), so that ``protoc -Iproto`` works for other languages; Python's stub of it comes from
googleapis-common-protos.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grpc_tools

HERE = Path(__file__).resolve().parent
INCLUDES = (HERE, Path(grpc_tools.__path__[0]) / "_proto")
PLUGINS = ("python", "grpc_python", "mypy", "mypy_grpc")


def generate(out: Path) -> None:
    """Run protoc over every proto of ours; the stubs land under ``out/resight/v1``.

    Raises:
        subprocess.CalledProcessError: protoc refused a file; its own message is on stderr.
    """
    protos = sorted(str(path.relative_to(HERE)) for path in HERE.glob("resight/v1/*.proto"))
    arguments = [f"-I{include}" for include in INCLUDES] + [f"--{plugin}_out={out}" for plugin in PLUGINS]
    scripts = Path(sys.executable).parent
    plugins = [f"--plugin=protoc-gen-{name}={scripts / f'protoc-gen-{name}'}" for name in PLUGINS[2:]]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *plugins, *arguments, *protos], check=True)


if __name__ == "__main__":
    generate(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else HERE)
