"""One self-contained HTML page of an export: every form with its figures, and what a similarity means at this site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from resight.atomic import write_atomic
from resight.bundle import Bundle
from resight.calibration import Calibration
from resight.training.calibrate import Reliability
from resight.training.calibration_plot import draw_reliability
from resight.training.report import flatten, templates


def write_export_report(
    path: Path,
    bundle: Bundle,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    reliability: Reliability | None,
) -> None:
    """Write the page, replacing it in one step.

    Args:
        path: of the page.
        bundle: that was exported.
        columns: names of the forms' figures.
        rows: one for each form, as words.
        reliability: of the calibration, or why there is none; None where no site was given.

    Raises:
        OSError: the folder cannot be made or written.
    """
    manifest = bundle.manifest
    drawn = ""
    if reliability is not None and manifest.calibration is not None:
        drawn = Markup(draw_reliability(reliability, manifest.calibration))
    page = (
        templates()
        .get_template("export_report.html.j2")
        .render(
            title=f"Export of {manifest.name}",
            summary=f"Space {manifest.space_id}, {manifest.feature_dim} numbers a person, {manifest.created}.",
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
    """The calibration in sentences, and what its reader must mind."""
    if calibration is None:
        why = reliability.problem if reliability is not None else "no crops of the site were given"
        return [f"Not calibrated: {why}. Searches answer cosine similarities only."]
    minded = [] if reliability is None else list(reliability.notes)
    accept, reject = (float(calibration.similarity(p)) for p in (calibration.accept, calibration.reject))
    return [
        f"A pair is called a match from probability {calibration.accept:.3f} on (similarity {accept:.3f}) and unknown "
        f"below {calibration.reject:.3f} (similarity {reject:.3f}); between them a human should look.",
        f"Fitted without labels to {calibration.positives:,} pairs of one person ({calibration.positive_source}) and "
        f"{calibration.negatives:,} pairs of two ({calibration.negative_source}); expected calibration error "
        f"{calibration.error:.3f} on pairs held out. Probabilities are at even odds, "
        "as of two crops of which nothing else is known.",
        *minded,
    ]


def _facts(bundle: Bundle) -> Mapping[str, str]:
    """What else the manifest says."""
    manifest = bundle.manifest
    facts: dict[str, object] = {
        "licence of the initial weights": manifest.weights_licence,
        "signed by": manifest.signer or "nobody",
        **{key: value for key, value in manifest.training.items() if key != "recipe"},
        "versions": manifest.versions,
    }
    recipe = manifest.training.get("recipe")
    if isinstance(recipe, Mapping) and recipe:
        facts["recipe"] = recipe.get("name", "unnamed")
    return dict(flatten(facts))
