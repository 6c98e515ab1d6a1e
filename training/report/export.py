"""The page of an export: the table of forms, the calibration and its reliability, as one self-contained HTML file.

The drawing of a calibration has two panels: above, the reliability curve of held-out pairs with its intervals; below,
the similarities of pairs of one person and of two, with the thresholds. One person is s0 and two persons are s1 of the
page's style sheet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resight.bundle.bundle import Bundle
from resight.calibration import Calibration
from resight.files import write_atomic
from resight.training.calibration.reliability import Reliability, ReliabilityCurve
from resight.training.report.page import flatten, templates
from resight.training.report.svg import colour, draw_svg, format_number, number_axes, set_title

WIDTH, HEIGHT = 340, 400  # of the drawing's view box


def draw_reliability(reliability: Reliability, calibration: Calibration) -> Markup:
    """Draw the reliability curve, and below it the similarities with the thresholds.

    Args:
        reliability: with a curve.
        calibration: the calibration that was measured.
    """
    curve = reliability.curve
    assert curve is not None, f"no curve to draw: {reliability.problem}"
    accept, reject = (float(calibration.similarity(p)) for p in (calibration.accept, calibration.reject))

    def paint(figure: Figure) -> None:
        above, below = figure.subplots(2)
        _draw_curve(above, curve)
        _draw_histograms(below, curve, accept, reject)

    words = (
        f"Reliability of the calibration: error {format_number(curve.error)}; match from a similarity of "
        f"{format_number(accept)}, unknown below {format_number(reject)}"
    )
    return draw_svg(words, WIDTH, HEIGHT, paint)


def _draw_curve(axes: Axes, curve: ReliabilityCurve) -> None:
    """Observed over predicted shares, with their intervals, over the diagonal of a perfect calibration."""
    axes.plot([0, 1], [0, 1], color=colour("junk"), linestyle=":", linewidth=1)
    shown = np.flatnonzero(np.isfinite(curve.observed) & np.isfinite(curve.low))
    x, y, one = curve.predicted[shown], curve.observed[shown], colour("s0")
    axes.vlines(x, curve.low[shown], curve.high[shown], color=one, alpha=0.5)
    axes.plot(x, y, color=one)
    for b in shown:
        (dot,) = axes.plot(curve.predicted[b], curve.observed[b], "o", color=one)
        set_title(
            dot,
            f"predicted {format_number(curve.predicted[b])}, observed {format_number(curve.observed[b])} "
            f"({format_number(curve.low[b])} to {format_number(curve.high[b])}) among {curve.positives[b]} pairs of "
            f"one person and {curve.negatives[b]} of two, both kinds weighted equally",
        )
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted probability", ylabel="observed share")
    number_axes(axes, "x", "y")


def _draw_histograms(axes: Axes, curve: ReliabilityCurve, accept: float, reject: float) -> None:
    """Both kinds of pairs over similarity, each scaled to its own highest bar, with the thresholds."""
    kinds = ((curve.negative_shares, "s1", "two persons"), (curve.positive_shares, "s0", "one person"))
    for line, (shares, series, words) in enumerate(kinds):
        set_title(
            axes.stairs(shares / shares.max(), curve.edges, color=colour(series), linewidth=1.8), f"pairs of {words}"
        )
        peak = curve.edges[:-1][shares.argmax()]
        axes.annotate(words, (peak, 0.4 - 0.1 * line), ha="center", color=colour(series))
    low, high = float(curve.edges[0]), float(curve.edges[-1])
    for line, (similarity, words) in enumerate([(reject, "unknown below"), (accept, "match from")]):
        at = min(max(similarity, low), high)
        axes.axvline(at, color=colour("junk"), linestyle=":", linewidth=1)
        side = "left" if at < (low + high) / 2 else "right"  # there is room on that side
        axes.annotate(f" {words} {similarity:.3f} ", (at, 1.2 - 0.12 * line), ha=side, color=colour("soft"))
    axes.set(ylim=(0, 1.3), yticks=[], xlabel="cosine similarity of crops of two cameras")
    number_axes(axes, "x")


def write_export_report(
    path: Path,
    bundle: Bundle,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    reliability: Reliability | None,
) -> None:
    """Write the page atomically.

    Args:
        path: of the page.
        bundle: the exported bundle.
        columns: headings of the table of forms.
        rows: cells of each form.
        reliability: of the calibration, or why there is none; None if no site was given.

    Raises:
        OSError: the folder cannot be created or written.
    """
    manifest = bundle.manifest
    drawn = Markup("")
    if reliability is not None and manifest.calibration is not None:
        drawn = draw_reliability(reliability, manifest.calibration)
    page = (
        templates()
        .get_template("export.html.j2")
        .render(
            title=f"Export of {manifest.name}",
            summary=f"Space {manifest.space_id}, {manifest.feature_dim} values per feature, {manifest.created}.",
            measured_on=manifest.evaluation.get("measured_on", "an unknown machine"),
            columns=columns,
            rows=rows,
            left_out=manifest.evaluation.get("left_out", {}),
            meaning=_meaning(manifest.calibration, reliability),
            reliability=drawn,
            facts=_facts(bundle),
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page.encode())


def _meaning(calibration: Calibration | None, reliability: Reliability | None) -> list[str]:
    """The calibration in sentences, with its limits."""
    if calibration is None:
        why = reliability.problem if reliability is not None else "no crops of the site were given"
        return [f"Not calibrated: {why}. Searches return only cosine similarities."]
    notes = [] if reliability is None else list(reliability.notes)
    accept, reject = (float(calibration.similarity(p)) for p in (calibration.accept, calibration.reject))
    return [
        f"A pair is a match from probability {calibration.accept:.3f} (similarity {accept:.3f}) and unknown "
        f"below {calibration.reject:.3f} (similarity {reject:.3f}); pairs in between need review.",
        f"Fitted without labels to {calibration.positives:,} pairs of one person ({calibration.positive_source}) and "
        f"{calibration.negatives:,} pairs of two ({calibration.negative_source}); expected calibration error "
        f"{calibration.error:.3f} on held-out pairs. Probabilities are at even prior odds, "
        "as for two crops of which nothing else is known.",
        *notes,
    ]


def _facts(bundle: Bundle) -> Mapping[str, str]:
    """Other entries of the manifest."""
    manifest = bundle.manifest
    facts: dict[str, object] = {
        "licence of the initial weights": manifest.weights_licence,
        "signed by": manifest.signer or "not signed",
        **{key: value for key, value in manifest.training.items() if key != "recipe"},
        "versions": manifest.versions,
    }
    recipe = manifest.training.get("recipe")
    if isinstance(recipe, Mapping) and recipe:
        facts["recipe"] = recipe.get("name", "unnamed")
    return dict(flatten(facts))
