"""A tiny real bundle and real server processes over real sockets, for the tests of serving."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from resight.bundle.bundle import Bundle, Graph, write_bundle
from resight.bundle.manifest import space_id
from resight.bundle.probes import Parity, make_probes
from resight.calibration import Calibration
from resight.client import Client
from resight.image import ImageSpec, decode, fit
from resight.service.access.auth import Role, TokenFile

SPEC = ImageSpec(height=64, width=32)
DIM = 32
SERVE = "import typer; from resight.cli.server import serve; typer.run(serve)"


def weights(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(96, DIM)).astype(np.float32)


def embed_by_hand(pixels: NDArray[np.uint8], seed: int = 0) -> NDArray[np.float32]:
    """The features of the tiny graph, in float64: 8x8 cell means, centred, projected, unit length."""
    cells = pixels.reshape(len(pixels), 8, 8, 4, 8, 3).astype(np.float64).mean(axis=(2, 4))  # (N, 8, 4, 3)
    flat = (cells / 255.0 - 0.5).transpose(0, 3, 1, 2).reshape(len(pixels), 96)
    out = flat @ weights(seed).astype(np.float64)
    return (out / np.linalg.norm(out, axis=1, keepdims=True)).astype(np.float32)


def features_by_hand(jpegs: list[bytes], seed: int = 0) -> NDArray[np.float32]:
    return embed_by_hand(np.stack([fit(decode(jpeg), SPEC) for jpeg in jpegs]), seed)


def graph(seed: int) -> bytes:
    nodes = [
        helper.make_node("Cast", ["images"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["f", "scale"], ["s"]),
        helper.make_node("Sub", ["s", "half"], ["c"]),
        helper.make_node("Transpose", ["c"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("AveragePool", ["t"], ["p"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["p"], ["v"]),
        helper.make_node("MatMul", ["v", "w"], ["m"]),
        helper.make_node("ReduceL2", ["m"], ["n"], axes=[1], keepdims=1),
        helper.make_node("Div", ["m", "n"], ["features"]),
    ]
    initial = [
        numpy_helper.from_array(np.float32(255.0), "scale"),
        numpy_helper.from_array(np.float32(0.5), "half"),
        numpy_helper.from_array(weights(seed), "w"),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", SPEC.height, SPEC.width, 3])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["N", DIM])
    made = helper.make_graph(nodes, "tiny", [images], [features], initial)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def make_bundle(
    path: Path, *, seed: int = 0, probes_of: int | None = None, calibration: Calibration | None = None
) -> Bundle:
    """A bundle of the tiny graph; ``probes_of`` another seed makes one that fails its probes."""
    source = seed if probes_of is None else probes_of
    return write_bundle(
        path,
        name=f"tiny-{seed}",
        space_id=space_id(weights(seed).tobytes(), SPEC, DIM),
        image=SPEC,
        graphs=[Graph(graph(seed), Parity(0.0, 1.0))],
        probes=make_probes(SPEC, lambda pixels: embed_by_hand(pixels, source), count=8),
        weights_licence="none",
        training={},
        calibration=calibration,
    )


def jpeg(person: int, shot: int = 0, *, size: tuple[int, int] = (48, 96)) -> bytes:
    """A crop of a synthetic person: a colour field per person, with noise per shot."""
    own, noise = np.random.default_rng(person), np.random.default_rng(10_000 + 97 * person + shot)
    coarse = own.integers(0, 256, (6, 3, 3)).astype(np.float64) + noise.normal(0, 12, (6, 3, 3))
    image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


class ServerProcess:
    """``resight serve`` as its own process on a free port; stopped by its pid."""

    def __init__(self, bundle: Path, data: Path, *flags: str, listen: str = "127.0.0.1:0", **env: str) -> None:
        self.data = data
        self.log = data.parent / f"{data.name}-{time.monotonic_ns()}.log"
        arguments = ["--bundle", str(bundle), "--data", str(data), "--listen", listen, *flags]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE, *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
            )

    def wait_ready(self, timeout_s: float = 60.0) -> str:
        """The address from ``server.json``, once it is written."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"server exited with {self.process.returncode}: {self.log.read_text()}")
            try:
                announcement = json.loads((self.data / "server.json").read_text())
            except FileNotFoundError:
                time.sleep(0.02)
                continue
            if announcement["pid"] == self.process.pid:
                return str(announcement["address"])
        raise AssertionError(f"server not ready: {self.log.read_text()}")

    def end(self, number: int = signal.SIGTERM, timeout_s: float = 30.0) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


class TokenServer:
    """A server on loopback with a token for each role in the tenants ``default`` and ``north``."""

    def __init__(self, bundle: Path, data: Path) -> None:
        file = TokenFile(data)
        self._tokens = {
            (role, tenant): file.create(f"{tenant}-{role.word}", role, tenant=tenant)[0]
            for role in Role
            for tenant in ("default", "north")
        }
        self.server = ServerProcess(bundle, data)

    def client(self, role: Role, tenant: str = "default") -> Client:
        return Client(self.server.wait_ready(), token=self._tokens[role, tenant])
