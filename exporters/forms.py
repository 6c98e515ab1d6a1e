"""The forms of one model: fp32 always, fp16 and INT8 if requested and accurate enough."""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from resight.arrays import Pixels
from resight.bundle.bundle import Graph
from resight.bundle.manifest import PRECISIONS
from resight.bundle.probes import MIN_COSINE_BY_PRECISION, EmbedBatch, Probes, measure_parity
from resight.calibration import Calibration
from resight.errors import BundleError, RecipeError
from resight.exporters.fp16 import to_fp16
from resight.exporters.int8 import (
    MIN_CROPS,
    CalibratedGraph,
    Int8Criteria,
    Progress,
    calibrate,
    check_int8,
    keep_sensitive_blocks,
)
from resight.exporters.verify import run_onnx, verify_graph
from resight.machine import cores
from resight.runtime.onnx import CpuSession

TIMED_BATCH = 32  # the service's default max_batch
TIMED_S = 0.5  # and at least one batch; benchmarks/bench_runtime.py resolves differences of a few per cent


@dataclass(frozen=True, eq=False)
class SiteData:
    """A site's data for an export; only measurements of it are written to the bundle.

    Attributes:
        crops: uint8 (N, H, W, 3), fitted, unlabelled: INT8 is calibrated and compared on them.
        calibrate: given an embedding function, fits the calibration of similarity to probability; None without
            crops of the site.
        measure: given an embedding function, its mAP in 0..1 on a labelled set; None without a labelled set.
    """

    crops: Pixels | None = None
    calibrate: Callable[[EmbedBatch], Calibration | None] | None = None
    measure: Callable[[EmbedBatch], float] | None = None


@dataclass(frozen=True)
class ExportOptions:
    """The forms to export.

    Attributes:
        precisions: from `resight.bundle.manifest.PRECISIONS`; fp32 is always exported.
        tensorrt: also export an INT8 form for TensorRT.
        keep_slow: keep an INT8 form even if it is slower than fp32 on this machine.

    Raises:
        RecipeError: an unknown precision.
    """

    precisions: tuple[str, ...] = ("fp32",)
    tensorrt: bool = False
    keep_slow: bool = True

    @classmethod
    def parse(cls, text: str, *, crops: bool, tensorrt: bool = False) -> ExportOptions:
        """Parse ``fp32,int8``, or ``auto``: every form that can be made, INT8 only if it is faster on this machine.

        Args:
            text: value of the command line option.
            crops: whether there are crops of the site, which INT8 requires.
            tensorrt: see `ExportOptions`.
        """
        if text.strip() == "auto":
            return cls(PRECISIONS if crops else ("fp32", "fp16"), tensorrt, keep_slow=False)
        return cls(tuple(part.strip() for part in text.split(",")), tensorrt)

    def __post_init__(self) -> None:
        unknown = [precision for precision in self.precisions if precision not in PRECISIONS]
        if unknown:
            raise RecipeError(f"unknown precision {unknown[0]!r}: choose among {', '.join(PRECISIONS)}, or auto")


@dataclass(frozen=True)
class ExportedForms:
    """The exported graphs and, by file name, their measurements and the reasons for skipped forms."""

    graphs: list[Graph] = field(default_factory=list)
    measurements: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def add(self, graph: Graph, measurements: Mapping[str, float]) -> None:
        """Add an exported form."""
        self.graphs.append(graph)
        self.measurements[graph.file] = dict(measurements)

    def evaluation(self) -> dict[str, Any]:
        """The manifest's ``evaluation``, with the name of the machine the speeds were measured on."""
        return {"forms": self.measurements, "left_out": self.skipped, "measured_on": machine_name()}


def require_crops(options: ExportOptions, site: SiteData) -> None:
    """Check that there are enough crops for INT8, before anything is computed.

    Raises:
        BundleError: there are fewer than `MIN_CROPS`.
    """
    found = 0 if site.crops is None else len(site.crops)
    if "int8" in options.precisions and found < MIN_CROPS:
        raise BundleError(
            f"INT8 is calibrated on at least {MIN_CROPS} crops of the site, found {found}: give a crop store with "
            "--site"
        )


def export_steps(options: ExportOptions, site: SiteData) -> tuple[str, ...]:
    """The names of an export's steps as passed to ``progress``, in order."""
    forms = ["fp32", *(precision for precision in ("fp16", "int8") if precision in options.precisions)]
    if "int8" in options.precisions and options.tensorrt:
        forms.append("int8 for TensorRT")
    return ("reference features", "graph", "parity", *forms, *(["calibration"] if site.calibrate else []), "files")


def make_forms(fp32: Graph, probes: Probes, options: ExportOptions, site: SiteData, report: Progress) -> ExportedForms:
    """Make and measure every requested form.

    Args:
        fp32: the graph that all other forms are made from and compared with.
        probes: golden images with torch's features.
        options: the requested forms.
        site: the site's crops and evaluation functions.
        report: called with the name of each step when it begins.

    Raises:
        BundleError: fp16 does not reproduce the model.
    """
    forms = ExportedForms()
    report("fp32")
    forms.add(fp32, _measure_form(fp32.data, probes, site))
    if "fp16" in options.precisions:
        report("fp16")
        model = to_fp16(fp32.data)
        parity = verify_graph(model, probes, what="the fp16 graph", min_cosine=MIN_COSINE_BY_PRECISION["fp16"])
        forms.add(Graph(model, parity, "fp16"), {})  # not timed: a CPU converts fp16 to fp32 first
    if "int8" in options.precisions:
        assert site.crops is not None, "call require_crops first"
        report("int8")
        calibrated = calibrate(fp32.data, site.crops)
        _add_int8(forms, fp32, probes, options, site, calibrated, "onnx")
        if options.tensorrt:
            report("int8 for TensorRT")
            _add_int8(forms, fp32, probes, options, site, calibrated, "tensorrt")
    return forms


def _add_int8(
    forms: ExportedForms,
    fp32: Graph,
    probes: Probes,
    options: ExportOptions,
    site: SiteData,
    calibrated: CalibratedGraph,
    runtime: str,
) -> None:
    """Quantise and measure a form; add it if it meets `Int8Criteria`, else record why it was skipped."""
    made = keep_sensitive_blocks(calibrated, symmetric=runtime == "tensorrt")
    graph = Graph(made.model, measure_parity(probes, run_onnx(made.model)), "int8", runtime)
    base = forms.measurements[fp32.file]
    measurements = {
        "mean_cosine": made.mean_cosine,
        "min_cosine": made.min_cosine,
        "blocks_in_float": float(len(made.kept)),
    }
    if runtime == "onnx":
        measurements |= _measure_form(made.model, probes, site)
    elif site.measure is not None:  # not timed: it runs on a GPU only
        measurements["mAP"] = site.measure(run_onnx(made.model))
    reason = check_int8(
        Int8Criteria(),
        mean_cosine=made.mean_cosine,
        map_before=base.get("mAP"),
        map_after=measurements.get("mAP"),
        speedup=None if options.keep_slow or runtime != "onnx" else measurements["images_per_s"] / base["images_per_s"],
    )
    if reason:
        forms.skipped[graph.file] = reason
    else:
        forms.add(graph, measurements)


def _measure_form(model: bytes, probes: Probes, site: SiteData) -> dict[str, float]:
    """Images per second and, if the site has a labelled set, mAP."""
    run = CpuSession(model).run  # the session class that the service uses
    measurements = {"images_per_s": images_per_s(run, probes.pixels)}
    if site.measure is not None:
        measurements["mAP"] = site.measure(run)
    return measurements


def images_per_s(run: EmbedBatch, like: Pixels) -> float:
    """Images per second at the service's batch size, of the fastest run within `TIMED_S` seconds.

    Args:
        run: embeds a batch with the form.
        like: uint8 (P, H, W, 3), crops that are repeated to fill a batch.
    """
    batch = np.resize(like, (TIMED_BATCH, *like.shape[1:]))
    run(batch)  # warm-up
    best, until = float("inf"), time.perf_counter() + TIMED_S
    while best == float("inf") or time.perf_counter() < until:
        started = time.perf_counter()
        run(batch)
        best = min(best, time.perf_counter() - started)
    return TIMED_BATCH / best


def machine_name() -> str:
    """The processor's name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {cores()} cores"
