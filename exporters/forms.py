"""The runnable forms of one model: fp32 always, fp16 and INT8 where they are asked for and hold what they promise."""

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
    keep_sensitive,
)
from resight.exporters.verify import run_onnx, verify_graph
from resight.machine import cores
from resight.runtime.onnx import CpuSession

TIMED_BATCH = 32  # the service's default max_batch
TIMED_S = 0.5  # and one batch at least; ratios of a few per cent are for benchmarks/bench_runtime.py


@dataclass(frozen=True, eq=False)
class SiteData:
    """What a site lends to an export; nothing of it but figures enters the bundle.

    Attributes:
        crops: uint8 (N, H, W, 3), fitted, unlabelled: INT8 is calibrated and compared on them.
        calibrate: fits similarity to probability with the features of a run; None where the site cannot.
        measure: mAP, 0..1, of a run on a labelled set; None where there is none.
    """

    crops: Pixels | None = None
    calibrate: Callable[[EmbedBatch], Calibration | None] | None = None
    measure: Callable[[EmbedBatch], float] | None = None


@dataclass(frozen=True)
class ExportOptions:
    """Which forms are asked for.

    Attributes:
        precisions: of `resight.bundle.manifest.PRECISIONS`; fp32 is always made.
        tensorrt: whether TensorRT's own INT8 form is made as well.
        keep_slow: keep an INT8 form that is slower than fp32 here.

    Raises:
        RecipeError: an unknown precision.
    """

    precisions: tuple[str, ...] = ("fp32",)
    tensorrt: bool = False
    keep_slow: bool = True

    @classmethod
    def parse(cls, text: str, *, crops: bool, tensorrt: bool = False) -> ExportOptions:
        """Read ``fp32,int8``, or ``auto``: whatever can be made, INT8 only where it is the faster one here.

        Args:
            text: from a command line.
            crops: whether the site lends crops, without which there is no INT8.
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
    """What was made: graphs with their figures by file name, and why a form that was asked for is missing."""

    graphs: list[Graph] = field(default_factory=list)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, graph: Graph, figures: Mapping[str, float]) -> None:
        """Take a form in."""
        self.graphs.append(graph)
        self.figures[graph.file] = dict(figures)

    def evaluation(self) -> dict[str, Any]:
        """As the manifest tells it, with the machine the speeds were measured on."""
        return {"forms": self.figures, "left_out": self.left_out, "measured_on": machine_name()}


def require_crops(wanted: ExportOptions, lent: SiteData) -> None:
    """Refuse INT8 without crops; worth asking before anything is computed.

    Raises:
        BundleError: there are none, or fewer than `MIN_CROPS`.
    """
    found = 0 if lent.crops is None else len(lent.crops)
    if "int8" in wanted.precisions and found < MIN_CROPS:
        raise BundleError(
            f"INT8 is calibrated on at least {MIN_CROPS} crops of the site, found {found}: give a crop store with "
            "--site"
        )


def export_steps(wanted: ExportOptions, lent: SiteData) -> tuple[str, ...]:
    """What an export will tell of, in order."""
    forms = ["fp32", *(precision for precision in ("fp16", "int8") if precision in wanted.precisions)]
    if "int8" in wanted.precisions and wanted.tensorrt:
        forms.append("int8 for TensorRT")
    return ("reference features", "graph", "parity", *forms, *(["calibration"] if lent.calibrate else []), "files")


def make_forms(fp32: Graph, probes: Probes, wanted: ExportOptions, lent: SiteData, tell: Progress) -> ExportedForms:
    """Make and measure every form that is asked for.

    Args:
        fp32: the graph that all others are made of, and compared with.
        probes: golden images with torch's features.
        wanted: which.
        lent: crops and measures of the site.
        tell: told what begins.

    Raises:
        BundleError: fp16 does not reproduce the model.
    """
    forms = ExportedForms()
    tell("fp32")
    forms.add(fp32, _measure_form(fp32.data, probes, lent))
    if "fp16" in wanted.precisions:
        tell("fp16")
        model = to_fp16(fp32.data)
        parity = verify_graph(model, probes, what="the fp16 graph", min_cosine=MIN_COSINE_BY_PRECISION["fp16"])
        forms.add(Graph(model, parity, "fp16"), {})  # its speed on a CPU, which widens every number first, says nothing
    if "int8" in wanted.precisions:
        assert lent.crops is not None, "require_crops comes first"
        tell("int8")
        calibrated = calibrate(fp32.data, lent.crops)
        _add_int8(forms, fp32, probes, wanted, lent, calibrated, "onnx")
        if wanted.tensorrt:
            tell("int8 for TensorRT")
            _add_int8(forms, fp32, probes, wanted, lent, calibrated, "tensorrt")
    return forms


def _add_int8(
    forms: ExportedForms,
    fp32: Graph,
    probes: Probes,
    wanted: ExportOptions,
    lent: SiteData,
    calibrated: CalibratedGraph,
    runtime: str,
) -> None:
    """Quantise, measure, and take the form in if the gate lets it."""
    made = keep_sensitive(calibrated, symmetric=runtime == "tensorrt")
    graph = Graph(made.model, measure_parity(probes, run_onnx(made.model)), "int8", runtime)
    base = forms.figures[fp32.file]
    figures = {"mean_cosine": made.mean_cosine, "min_cosine": made.min_cosine, "blocks_in_float": float(len(made.kept))}
    if runtime == "onnx":
        figures |= _measure_form(made.model, probes, lent)
    elif lent.measure is not None:  # its speed on a CPU says nothing
        figures["mAP"] = lent.measure(run_onnx(made.model))
    reason = check_int8(
        Int8Criteria(),
        mean_cosine=made.mean_cosine,
        map_before=base.get("mAP"),
        map_after=figures.get("mAP"),
        speedup=None if wanted.keep_slow or runtime != "onnx" else figures["images_per_s"] / base["images_per_s"],
    )
    if reason:
        forms.left_out[graph.file] = reason
    else:
        forms.add(graph, figures)


def _measure_form(model: bytes, probes: Probes, lent: SiteData) -> dict[str, float]:
    """Crops a second and, where the site can tell, mAP."""
    run = CpuSession(model).run  # as the service will
    figures = {"images_per_s": images_per_s(run, probes.pixels)}
    if lent.measure is not None:
        figures["mAP"] = lent.measure(run)
    return figures


def images_per_s(run: EmbedBatch, like: Pixels) -> float:
    """Crops a second at the service's batch size: the best run of `TIMED_S` seconds, so other work counts least.

    Args:
        run: of the form.
        like: uint8 (P, H, W, 3), crops to be repeated to a batch.
    """
    batch = np.resize(like, (TIMED_BATCH, *like.shape[1:]))
    run(batch)  # allocates
    best, until = float("inf"), time.perf_counter() + TIMED_S
    while best == float("inf") or time.perf_counter() < until:
        started = time.perf_counter()
        run(batch)
        best = min(best, time.perf_counter() - started)
    return TIMED_BATCH / best


def machine_name() -> str:
    """The processor's name and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {cores()} cores"
