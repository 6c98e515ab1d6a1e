"""What `resight judge` prints: every figure a line, both models beside each other, and the verdict in words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from resight.training.case import Case
    from resight.training.judgement import Judgement
    from resight.training.separation import Separation
    from resight.training.trial import Trial
    from resight.training.verdict import Verdict

COLOURS = {"promote": "green", "refuse": "red", "undecided": "yellow"}


def tell_case(console: Console, case: Case, model: str, against: str | None) -> None:
    """Everything, the verdict last."""
    for words, trial in (("the site", case.site), ("earlier nights", case.reference), ("its adaptation", case.adapted)):
        if trial is not None:
            console.print(_table(trial, f"{model} on {len(trial.store)} crops of {words}", against))
    _tell_missing(console, case.site)
    for which, found in case.hygiene.items():
        for problem in found.told():
            console.print(f"{which}: {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
    if case.latency is not None:
        timed = case.latency
        console.print(
            f"a batch takes {timed.ratio:.2f} [{timed.low:.2f}, {timed.high:.2f}] times as long",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if case.verdict is not None:
        _tell_verdict(console, case.verdict)


def _table(trial: Trial, title: str, against: str | None) -> Table:
    """Every figure a line, the other model's beside it."""
    table = Table("figure", "model", title=escape(title))
    judged = trial.candidate.judgement
    sides = [_lines(judged)]
    if trial.active is not None:
        table.add_column(escape(str(against)))
        sides.append(_lines(trial.active.judgement))
    for name in sides[0]:
        table.add_row(escape(name), *(escape(side.get(name, "")) for side in sides))
    return table


def _tell_missing(console: Console, trial: Trial) -> None:
    """Why figures are missing, a line each."""
    judged = trial.candidate.judgement
    missing = {**judged.separation.missing, **judged.searches.missing}
    if judged.links is not None:
        missing |= {f"links {name}": reason for name, reason in judged.links.missing.items()}
    for name, reason in missing.items():
        console.print(f"no {name}: {reason}", markup=False, highlight=False, soft_wrap=True)


def _tell_verdict(console: Console, verdict: Verdict) -> None:
    """The decision and why."""
    colour = COLOURS[verdict.decision]
    console.print(f"[bold {colour}]{verdict.decision}[/bold {colour}] by {verdict.evidence}")
    for reason in verdict.reasons:
        console.print(f"  {reason}", markup=False, highlight=False, soft_wrap=True)


def _lines(judged: Judgement) -> dict[str, str]:
    """Names and values; a dash where something could not be measured."""
    counts, clusters, agreed = judged.counts, judged.clusters, judged.stability
    lines = {"tracks": f"{counts.tracks}, {counts.overlaps} pairs overlap"}
    lines["crop pairs"] = f"{counts.positives} of one person, {counts.negatives} of two"
    lines |= _estimates(judged.separation) | _estimates(judged.searches)
    for name, found in judged.cameras.items():
        lines[f"auc of {name}"] = _estimates(found)["auc"]
    if judged.links is not None:
        lines |= {f"links {name}": told for name, told in _estimates(judged.links).items()}
    lines["variance"] = _number(judged.variance)
    mix, kept = (None, None) if clusters is None else (clusters.cameras, clusters.tracks)
    lines["clusters"] = "-" if clusters is None else f"{clusters.clusters}"
    lines["outliers"] = _number(None if clusters is None else clusters.outlier_share)
    lines["largest cluster"] = _number(None if clusters is None else clusters.largest_share)
    lines["silhouette"] = _number(None if clusters is None else clusters.silhouette)
    lines["cameras a cluster"] = (
        "-" if mix is None else f"{mix.cameras_per_cluster:.2f} ({mix.chance_cameras_per_cluster:.2f} by chance)"
    )
    lines["tracks in one cluster"] = _number(None if kept is None else kept.whole_share)
    lines["two persons in one cluster"] = _number(None if kept is None else kept.confused_share)
    if agreed is not None:
        lines["agreement of both (ARI)"] = f"{agreed.ari:.4f}"
    return lines


def _estimates(found: Separation) -> dict[str, str]:
    """Each figure with its interval."""
    told = {name: f"{one.value:.4f} [{one.low:.4f}, {one.high:.4f}]" for name, one in found.figures.items()}
    return told | dict.fromkeys(found.missing, "-")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
