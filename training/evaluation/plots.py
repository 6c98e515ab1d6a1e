"""The plot of `resight evaluate --plot`: CMC, FNIR against FPIR, and a matrix of the camera pairs."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resight.errors import InputError
from resight.files import write_atomic
from resight.training.evaluation.evaluate import FPIR_TARGETS, OPEN_SET_RANKS, SiteScore

logging.getLogger("matplotlib").setLevel(logging.WARNING)  # silences messages about its font cache

PLOT_FORMATS = (".png", ".svg", ".pdf")
DPI = 120
LABELLED_CELLS = 12  # largest number of cameras per side at which cells are labelled


def check_plot_path(path: Path) -> None:
    """Check the file name's suffix before anything is computed.

    Raises:
        InputError: its suffix is not in `PLOT_FORMATS`.
    """
    if path.suffix.lower() not in PLOT_FORMATS:
        raise InputError(f"{path} has no image suffix: use a name that ends with {', '.join(PLOT_FORMATS)}")


def draw_evaluation(path: Path, score: SiteScore, title: str) -> None:
    """Write one image with three panels; missing folders are created.

    Args:
        path: checked by `check_plot_path`.
        score: what to draw.
        title: of the image.
    """
    figure = Figure(figsize=(17, 5), layout="constrained")
    figure.suptitle(title)
    cmc, open_set, pairs = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
    _draw_cmc(cmc, score)
    _draw_open_set(open_set, score)
    _draw_pairs(figure, pairs, score)
    written = io.BytesIO()
    figure.savefig(written, format=path.suffix[1:].lower(), dpi=DPI)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, written.getvalue())


def _draw_cmc(axes: Axes, score: SiteScore) -> None:
    """Share of queries with a match among the first r rows."""
    cmc = 100 * score.ranking.cmc
    axes.plot(np.arange(1, len(cmc) + 1), cmc, marker="." if len(cmc) < 60 else "")
    axes.set(title=f"CMC of {score.ranking.valid_queries} queries", xlabel="rank", ylabel="queries with a match, %")
    axes.set_ylim(min(50.0, float(cmc[0]) - 5), 101)
    axes.grid(alpha=0.3)


def _draw_open_set(axes: Axes, score: SiteScore) -> None:
    """FNIR against FPIR, one line per rank, with the operating points."""
    found = score.open_set
    axes.set(title="Open set: two watch lists", xlabel="FPIR, %", ylabel="FNIR, %")
    if found is None:
        axes.text(0.5, 0.5, score.reservation, ha="center", va="center", wrap=True, transform=axes.transAxes)
        return
    thresholds = found.curve()
    fpir = np.array([100 * found.fpir(threshold) for threshold in thresholds])
    for rank in OPEN_SET_RANKS:
        fnir = [100 * found.fnir(threshold, rank) for threshold in thresholds]
        # A rate of 0 cannot be shown on a logarithmic axis.
        axes.plot(fpir[fpir > 0], np.array(fnir)[fpir > 0], drawstyle="steps-post", label=f"within rank {rank}")
    for target in FPIR_TARGETS:
        axes.axvline(100 * target, color="0.6", linestyle=":")
    axes.set_xscale("log")
    axes.set_ylim(0, 101)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_pairs(figure: Figure, axes: Axes, score: SiteScore) -> None:
    """MAP of each pair of cameras; pairs without a value are blank."""
    pairs = score.pairs
    image = axes.imshow(100 * pairs.mAP, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    figure.colorbar(image, ax=axes, label="mAP, %")
    axes.set(title="mAP by cameras", xlabel="gallery limited to camera", ylabel="query of camera")
    queries, galleries = (
        [score.camera_names[c] for c in side] for side in (pairs.query_cameras, pairs.gallery_cameras)
    )
    axes.set_xticks(range(len(galleries)), galleries, rotation=45 if len(galleries) > 6 else 0)
    axes.set_yticks(range(len(queries)), queries)
    if max(pairs.mAP.shape) > LABELLED_CELLS:
        return
    for (row, column), value in np.ndenumerate(100 * pairs.mAP):
        if not np.isnan(value):
            colour = "black" if value > 60 else "white"  # viridis is bright above
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour)
