"""The page of an export: the table of forms, the calibration and its reliability, as one self-contained HTML file.

The drawing of a calibration has two panels: above, the reliability curve of held-out pairs with its intervals; below,
the similarities of pairs of one person and of two, with the thresholds. Its colours are classes of the page's style
sheet: s0 is one person, s1 two persons.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from resight.bundle.bundle import Bundle
from resight.calibration import Calibration
from resight.files import write_atomic
from resight.training.calibration.reliability import Reliability, ReliabilityCurve
from resight.training.report.charts import HEIGHT, LEFT, RIGHT, TOP, WIDTH, format_number, ticks
from resight.training.report.page import flatten, templates

GAP = 64  # viewBox units between the panels: axis labels of the upper one, and two lines of thresholds' names
PANEL = HEIGHT - TOP
FOOT = 34  # axis labels of the lower panel
ONE_PERSON, TWO_PERSONS = "s0", "s1"


def draw_reliability(reliability: Reliability, calibration: Calibration) -> str:
    """Draw both panels as one ``<svg>`` element without external resources.

    Args:
        reliability: with a curve.
        calibration: the calibration that was measured.
    """
    curve = reliability.curve
    assert curve is not None, f"no curve to draw: {reliability.problem}"
    height = TOP + PANEL + GAP + PANEL + FOOT
    words = (
        f"Reliability of the calibration: error {format_number(curve.error)}; match from a similarity of "
        f"{format_number(float(calibration.similarity(calibration.accept)))}, unknown below "
        f"{format_number(float(calibration.similarity(calibration.reject)))}"
    )
    head = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, height, words)
    lower = TOP + PANEL + GAP
    parts = [head, *_promise(curve, TOP), *_histograms(curve, calibration, lower), Markup("</svg>")]
    return str(Markup("").join(parts))


def _x(value: float, low: float, high: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)


def _y(share: float, top: float) -> float:
    """Vertical position of a value in 0..1 in the panel that begins at ``top``."""
    return top + PANEL * (1 - share)


def _promise(curve: ReliabilityCurve, top: float) -> list[Markup]:
    """Observed over predicted shares."""
    parts = _axes([0.0, 0.25, 0.5, 0.75, 1.0], 0.0, 1.0, top, "predicted probability; vertically, observed share")
    even = Markup('<line class="stage" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>')
    parts.append(even.format(_x(0, 0, 1), _y(0, top), _x(1, 0, 1), _y(1, top)))
    shown = np.flatnonzero(np.isfinite(curve.observed) & np.isfinite(curve.low))
    points = [(_x(curve.predicted[b], 0, 1), _y(curve.observed[b], top)) for b in shown]
    for b, (x, _) in zip(shown, points, strict=True):
        bar = f"{x:.1f},{_y(curve.low[b], top):.1f} {x:.1f},{_y(curve.high[b], top):.1f}"
        parts.append(Markup('<polyline class="{}" opacity=".5" points="{}"/>').format(ONE_PERSON, bar))
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts.append(Markup('<polyline class="{}" points="{}"/>').format(ONE_PERSON, line))
    dot = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="2.6"><title>{}</title></circle>')
    for b, (x, y) in zip(shown, points, strict=True):
        words = (
            f"predicted {format_number(curve.predicted[b])}, observed {format_number(curve.observed[b])} "
            f"({format_number(curve.low[b])} to {format_number(curve.high[b])}) among {curve.positives[b]} pairs of "
            f"one person and {curve.negatives[b]} of two, both kinds weighted equally"
        )
        parts.append(dot.format(ONE_PERSON, x, y, words))
    return parts


def _histograms(curve: ReliabilityCurve, calibration: Calibration, top: float) -> list[Markup]:
    """Both kinds of pairs over similarity, each scaled to its own highest bar, with the thresholds."""
    marks = ticks(float(curve.edges[0]), float(curve.edges[-1]))
    low, high = marks[0], marks[-1]
    parts = _axes([], low, high, top, "cosine similarity of crops of two cameras")
    for mark in marks:
        label = Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>')
        parts.append(label.format(_x(mark, low, high), top + PANEL + 13, format_number(mark)))
    kinds = (
        (curve.negative_shares, TWO_PERSONS, "pairs of two persons"),
        (curve.positive_shares, ONE_PERSON, "pairs of one person"),
    )
    for shares, colour, words in kinds:
        heights = np.repeat(shares / shares.max(), 2)
        xs = np.repeat(curve.edges, 2)[1:-1]
        outline = " ".join(f"{_x(x, low, high):.1f},{_y(y, top):.1f}" for x, y in zip(xs, heights, strict=True))
        steps = Markup('<polyline class="{}" points="{}"><title>{}</title></polyline>')
        parts.append(steps.format(colour, outline, words))
        peak = _x(float(curve.edges[:-1][shares.argmax()]), low, high)
        name = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>')
        parts.append(
            name.format(peak, top + PANEL * (0.6 if colour == TWO_PERSONS else 0.5), words.removeprefix("pairs of "))
        )
    reject, accept = (float(calibration.similarity(p)) for p in (calibration.reject, calibration.accept))
    for line, (similarity, words) in enumerate([(reject, "unknown below"), (accept, "match from")]):
        at = _x(min(max(similarity, low), high), low, high)
        rule = Markup('<line class="stage" x1="{0:.1f}" x2="{0:.1f}" y1="{1:.1f}" y2="{2:.1f}"/>')
        parts.append(rule.format(at, top - 14 + 12 * line, top + PANEL))
        right = at < (LEFT + WIDTH - RIGHT) / 2  # there is room on that side
        text = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
        label = f"{words} {similarity:.3f}"
        parts.append(text.format(at + (4 if right else -4), top - 16 + 12 * line, "start" if right else "end", label))
    return parts


def _axes(marks: list[float], low: float, high: float, top: float, words: str) -> list[Markup]:
    """Base line, marks in 0..1 on both axes, and their label."""
    parts = []
    for mark in marks or [0.0]:
        rule = Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>')
        parts.append(rule.format(LEFT, WIDTH - RIGHT, _y(mark, top), _y(mark, top)))
    for mark in marks:
        label = Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>')
        parts.append(label.format(LEFT - 6, _y(mark, top) + 3.5, "end", format_number(mark)))
        parts.append(label.format(_x(mark, low, high), top + PANEL + 13, "middle", format_number(mark)))
    text = Markup('<text class="tick" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>')
    parts.append(text.format((LEFT + WIDTH - RIGHT) / 2, top + PANEL + 26, words))
    return parts


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
    drawn = ""
    if reliability is not None and manifest.calibration is not None:
        drawn = Markup(draw_reliability(reliability, manifest.calibration))
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
