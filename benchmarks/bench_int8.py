"""INT8 forms for CPUs: what each costs in accuracy, and how fast it is, on the CPU this runs on.

    python benchmarks/bench_int8.py
    python benchmarks/bench_int8.py --backbones osnet_x0_25

Three ways to spell the same graph: weights in 8 bits (fast, but CPUs without VNNI saturate), in 7 bits with corrected
biases (what `resight export` writes), and unsigned weights (exact everywhere, without fast kernels). Compare the lines
of a CPU with VNNI and one without: only the first form may differ in accuracy. The label says which kind this CPU is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
from bench_runtime import BACKBONES, SUBSET, make_encoder
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import QuantType

from resight.arrays import Pixels
from resight.cli.export import SiteDataLoader, fitted_pixels, sample_crops
from resight.exporters import int8
from resight.exporters.forms import machine_name
from resight.exporters.onnx_graph import ServingGraph, to_onnx
from resight.exporters.verify import run_onnx
from resight.runtime.onnx import CpuSession
from resight.training.store.datasets import open_site

BATCH = 32
FORMS: dict[str, dict[str, Any]] = {
    "8 bits": {"reduce_range": False},
    "7 bits, corrected": {},
    "unsigned": {"reduce_range": False, "weight_qType": QuantType.QUInt8},
}


def has_vnni() -> bool:
    """Whether the kernel reports a kind of VNNI; a masked CPU still says yes, so that the caller labels its run."""
    flags = Path("/proc/cpuinfo").read_text()
    return any(name in flags.split() for name in ("avx512_vnni", "avx_vnni"))


def make_form(calibrated: int8.CalibratedGraph, changes: dict[str, Any]) -> bytes:
    """An INT8 form with other settings of the quantiser; corrected biases only where ours has them."""
    spell: Callable[..., QDQQuantizer] = partial(_quantizer, changes)
    with mock.patch.object(int8, "QDQQuantizer", spell):
        if not changes:
            return int8.quantize_graph(calibrated)
        with mock.patch.object(int8, "_correct_biases", lambda model, calibrated: None):
            return int8.quantize_graph(calibrated)


def _quantizer(changes: dict[str, Any], model: object, **settings: Any) -> QDQQuantizer:
    return QDQQuantizer(model, **settings | changes)


def rate(model: bytes, crops: Pixels, seconds: float) -> float:
    """Crops a second as the service runs them, the best batch of so many seconds."""
    run, batch, best = CpuSession(model).run, np.resize(crops, (BATCH, *crops.shape[1:])), float("inf")
    run(batch)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        started = time.perf_counter()
        run(batch)
        best = min(best, time.perf_counter() - started)
    return BATCH / best


def compare(backbone: str, label: str, seconds: float) -> None:
    """Print a row a form."""
    site = open_site(SUBSET)
    store = sample_crops(site.train, 256)
    encoder = make_encoder(backbone, lambda spec: fitted_pixels(store, spec))
    spec = encoder.config.image
    fp32 = to_onnx(ServingGraph(encoder), spec)
    calibrated = int8.calibrate(fp32, fitted_pixels(store, spec))
    crops, trained = calibrated.held_back, backbone == "osnet_x0_25"
    base = rate(fp32, crops, seconds)
    before = f"{100 * SiteDataLoader(None, spec, site).measure(run_onnx(fp32)):.2f}" if trained else "-"
    print(f"| {backbone} | {label} | fp32 | 1 | 1 | {before} | {base:.0f} | 1 |", flush=True)
    for name, changes in FORMS.items():
        model = make_form(calibrated, changes)
        cosines = (int8.run_graph(model, crops).astype(np.float64) * calibrated.features).sum(1)
        speed = rate(model, crops, seconds)
        after = f"{100 * SiteDataLoader(None, spec, site).measure(run_onnx(model)):.2f}" if trained else "-"
        print(
            f"| {backbone} | {label} | {name} | {cosines.mean():.4f} | {cosines.min():.4f} | {after} | {speed:.0f} | "
            f"{speed / base:.2f} |",
            flush=True,
        )


def main() -> None:
    """Compare the backbones asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", default=",".join(BACKBONES), help="some of them, with commas")
    parser.add_argument("--seconds", type=float, default=3.0, help="of measuring, for each form")
    parser.add_argument("--label", default="VNNI" if has_vnni() else "no VNNI", help="of the kernels in this run")
    arguments = parser.parse_args()
    if not SUBSET.exists():
        raise SystemExit(f"bench_int8: no {SUBSET}: it needs real crops beside the checkout")
    print(f"{machine_name()}, onnxruntime {onnxruntime.__version__}")
    print("| backbone | kernels | form | mean cosine | worst | mAP | crops/s | x fp32 |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for backbone in arguments.backbones.split(","):
        compare(backbone, arguments.label, arguments.seconds)


if __name__ == "__main__":
    main()
