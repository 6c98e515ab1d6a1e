"""The exported forms against torch and a plain onnxruntime: speed as ratios, and how near the features stay.

Peers, in turns with ours in one process, all on the same crops, threads and batch:
- torch eager: the encoder's own embed, on the better of two batch sizes;
- plain onnxruntime: `torch.onnx.export` of the encoder as it stands, float NCHW in, ready-made normalised input.
Ours take bytes and normalise them themselves. Rates are the best round's, so other work on the machine counts least.

The crops are those of ../shared/data/market-subset where it lies there, else drawn ones. OSNet x0.25 has its real
weights where they lie there. Other backbones are random, with batch norms of real crops: their speed is the real one,
but their INT8 cosines show only that the arithmetic holds, not what a trained model loses. (Random features are nearly
all alike; centred wholly, their small differences drown: OSNet x1.0 then has a mean of 0.97 with four blocks in float.)

    python benchmarks/bench_runtime.py [--backbones osnet_x0_25,resnet50] [--seconds 8]
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from resight.arrays import Pixels
from resight.bundle.probes import EmbedBatch
from resight.encoder.model import Encoder, EncoderConfig
from resight.encoder.weights import load_weights
from resight.exporters.fp16 import to_fp16
from resight.exporters.int8 import Int8Criteria, calibrate, check_int8, keep_sensitive_blocks
from resight.exporters.onnx_graph import ServingGraph, to_onnx
from resight.exporters.verify import run_onnx, run_torch
from resight.image import ImageSpec, decode, fit
from resight.runtime.onnx import CpuSession
from resight.training.evaluation.evaluate import evaluate_site
from resight.training.features.extract import embed_store
from resight.training.store.datasets import Site, open_site
from resight.training.synthetic.site import SiteSettings, render_site

SHARED = Path(__file__).parents[2] / "shared"
SUBSET, WEIGHTS = SHARED / "data" / "market-subset", SHARED / "weights" / "osnet_x0_25_msmt17.pth"
DRAWN = SiteSettings(train_persons=32, test_persons=24, strangers=0)
CROPS, COMPARED = 256, 64
BATCH = 32  # the service's default
REST_S = 0.05  # the plain session's threads spin on after a run and would take the cores of the next
BATCHES = (1, 7, 64)  # for which cosines are printed
BACKBONES = {"osnet_x0_25": 512, "osnet_x1_0": 512, "resnet18": 0, "resnet50": 0}  # and their embedding's length
Features = NDArray[np.float32]


def make_encoder(backbone: str, crops: Callable[[ImageSpec], Pixels]) -> Encoder:
    """Real weights where they are at hand; else random ones whose batch norms have seen real crops."""
    if backbone == "osnet_x0_25" and WEIGHTS.exists():
        return load_weights(str(WEIGHTS)).encoder.eval()
    torch.manual_seed(0)
    dim = BACKBONES[backbone]
    encoder = Encoder(EncoderConfig(backbone, "avg" if dim else "gem", dim))
    pixels = torch.from_numpy(crops(encoder.config.image))
    encoder.train()
    with torch.no_grad():
        for batch in pixels[: 2 * COMPARED].split(COMPARED):
            encoder(encoder.normalise(batch))
    return encoder.eval()


def plain_export(encoder: Encoder) -> EmbedBatch:
    """The peer: exported as it stands, fed with input that was normalised beforehand."""

    class Plain(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return encoder.embed(images)

    image, file = encoder.config.image, io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            Plain(),
            (torch.zeros(2, 3, image.height, image.width),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    program.save(file)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    ready: dict[int, Features] = {}

    def run(pixels: Pixels) -> Features:
        images = ready.get(len(pixels))
        if images is None:
            images = ready[len(pixels)] = encoder.normalise(torch.from_numpy(pixels)).contiguous().numpy()
        features: Features = session.run(None, {name: images})[0]
        return features

    return run


def rates(runs: dict[str, tuple[EmbedBatch, int]], pixels: Pixels, seconds: float) -> dict[str, float]:
    """Crops a second of each, in turns: the best of at least 3 rounds, and of ``seconds`` in all."""
    best = dict.fromkeys(runs, 0.0)
    for run, batch in runs.values():
        run(pixels[:batch])
    rounds, until = 0, time.perf_counter() + seconds
    while rounds < 3 or time.perf_counter() < until:
        for name, (run, batch) in runs.items():
            time.sleep(REST_S)
            started = time.perf_counter()
            run(pixels[:batch])
            best[name] = max(best[name], batch / (time.perf_counter() - started))
        rounds += 1
    return best


def in_batches(run: EmbedBatch, pixels: Pixels, batch: int) -> Features:
    """Features of all pixels, ``batch`` at a time."""
    return np.concatenate([run(pixels[start : start + batch]) for start in range(0, len(pixels), batch)])


def min_cosine(found: Features, wanted: Features) -> float:
    """Of the worst row; both of unit length."""
    return float((found.astype(np.float64) * wanted).sum(1).min())


def compare(backbone: str, site: Site, seconds: float) -> None:
    """Print one backbone's figures."""
    store = site.train

    def crops(spec: ImageSpec) -> Pixels:
        rows = np.unique(np.linspace(0, len(store) - 1, CROPS).astype(int))
        return np.stack([fit(decode(store.read(int(row))), spec) for row in rows])

    encoder = make_encoder(backbone, crops)
    pixels = crops(encoder.config.image)
    started = time.perf_counter()
    fp32 = to_onnx(ServingGraph(encoder), encoder.config.image)
    exported, started = time.perf_counter() - started, time.perf_counter()
    made = keep_sensitive_blocks(calibrate(fp32, pixels))
    quantised = time.perf_counter() - started
    ours, int8 = (CpuSession(model).run for model in (fp32, made.model))
    eager = run_torch(encoder)
    rate = rates(
        {
            "torch, batch 8": (eager, 8),
            f"torch, batch {BATCH}": (eager, BATCH),
            "plain onnxruntime": (plain_export(encoder), BATCH),
            "fp32": (ours, BATCH),
            "int8": (int8, BATCH),
        },
        pixels,
        seconds,
    )
    eager_rate = max(speed for name, speed in rate.items() if name.startswith("torch"))
    print(
        f"{backbone}: fp32 {rate['fp32']:.0f} crops/s = {rate['fp32'] / eager_rate:.2f} x torch eager = "
        f"{rate['fp32'] / rate['plain onnxruntime']:.2f} x plain onnxruntime; int8 {rate['int8']:.0f} crops/s = "
        f"{rate['int8'] / rate['fp32']:.2f} x fp32 = {rate['int8'] / eager_rate:.2f} x torch eager"
    )
    compared = pixels[:COMPARED]
    wanted = in_batches(eager, compared, BATCH)
    near = ", ".join(f"{size}: {min_cosine(in_batches(ours, compared, size), wanted):.7f}" for size in BATCHES)
    half = min_cosine(in_batches(run_onnx(to_fp16(fp32)), compared, BATCH), wanted)
    print(f"  min cosine to torch: fp32 at batch {near}; fp16 {half:.6f}")
    kept = f", {', '.join(made.kept)} in float" if made.kept else ""
    print(
        f"  int8 to fp32 on {made.crops} crops not calibrated on: mean cosine {made.mean_cosine:.4f}, worst "
        f"{made.min_cosine:.4f}{kept}; exported in {exported:.1f} s, quantised in {quantised:.1f} s, "
        f"{len(made.model) / len(fp32):.2f} of the size"
    )
    before = after = None
    if backbone == "osnet_x0_25":  # the only one with weights that know persons
        spec = encoder.config.image
        before, after = (
            float(evaluate_site(site, lambda part, run=run: embed_store(part, spec, run)).mAP) for run in (ours, int8)
        )
        print(f"  mAP on {site.name}: fp32 {100 * before:.2f}, int8 {100 * after:.2f}")
    verdict = check_int8(
        Int8Criteria(),
        mean_cosine=made.mean_cosine,
        map_before=before,
        map_after=after,
        speedup=rate["int8"] / rate["fp32"],
    )
    print(f"  gate: {verdict or 'may enter the bundle'}", flush=True)


def main() -> None:
    """Compare the backbones asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", default=",".join(BACKBONES), help="some of them, with commas")
    parser.add_argument("--seconds", type=float, default=8.0, help="of measuring, for each backbone")
    arguments = parser.parse_args()
    backbones = arguments.backbones.split(",")
    if unknown := set(backbones) - set(BACKBONES):
        parser.error(f"unknown backbones {', '.join(sorted(unknown))}: choose among {', '.join(BACKBONES)}")
    print(f"{torch.get_num_threads()} threads, onnxruntime {onnxruntime.__version__}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        site = open_site(SUBSET) if SUBSET.exists() else render_site(Path(folder) / "site", DRAWN, seed=1)
        for backbone in backbones:
            compare(backbone, site, arguments.seconds)


if __name__ == "__main__":
    main()
