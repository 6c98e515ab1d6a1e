"""The service's Embed against a bare onnxruntime loop: the same bundle, crops and cores, in one run.

The bare loop runs batches of ready pixels; the service also receives, decodes, queues and answers. A third
figure, batches of one, shows what dynamic batching is worth.

    python benchmarks/bench_embed.py [--seconds 8]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from resight.bundle import open_bundle
from resight.client import Client
from resight.exporters.export import export_encoder
from resight.image import Pixels, decode, fit
from resight.probes import draw_jpegs
from resight.served import server
from resight.service.onnx_runtime import OnnxRuntime
from resight.weights import load_weights

IN_FLIGHT = 32
BATCHES = (1, 8, 16, 32)


def bare_rate(runtime: OnnxRuntime, pixels: Pixels, batch: int, seconds: float) -> float:
    """Crops a second of a loop over one ready batch."""
    crops = np.resize(pixels, (batch, *pixels.shape[1:]))
    runtime.embed(crops)
    done, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        runtime.embed(crops)
        done += batch
    return done / passed


def served_rate(address: str, jpegs: tuple[bytes, ...], seconds: float) -> float:
    """Crops a second through Embed with `IN_FLIGHT` callers."""
    until = time.perf_counter() + seconds

    def call(number: int) -> int:
        done = 0
        while time.perf_counter() < until:
            client.embed(jpegs[(number + done) % len(jpegs)])
            done += 1
        return done

    with Client(address, timeout_s=60) as client, ThreadPoolExecutor(IN_FLIGHT) as pool:
        started = time.perf_counter()
        return sum(pool.map(call, range(IN_FLIGHT))) / (time.perf_counter() - started)


def main() -> None:
    """Print the rates and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0, help="for each measurement")
    seconds = parser.parse_args().seconds
    initial = load_weights("builtin")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle"
        export_encoder(initial.encoder, path, name="bench", training={}, weights_licence=initial.source["licence"])
        bundle = open_bundle(path)
        jpegs = draw_jpegs()
        pixels = np.stack([fit(decode(jpeg), bundle.manifest.image) for jpeg in jpegs])
        runtime = OnnxRuntime(bundle)
        bare = {batch: bare_rate(runtime, pixels, batch, seconds / len(BATCHES)) for batch in BATCHES}
        with server(path, Path(folder) / "data", max_top_k=10) as address:
            served = served_rate(address, jpegs, seconds)
    best = max(bare, key=lambda batch: bare[batch])
    print("bare onnxruntime, crops/s: " + ", ".join(f"batch {batch}: {rate:.0f}" for batch, rate in bare.items()))
    print(
        f"Embed with {IN_FLIGHT} in flight: {served:.0f} crops/s, {served / bare[best]:.2f} of the bare loop at {best}"
    )


if __name__ == "__main__":
    main()
