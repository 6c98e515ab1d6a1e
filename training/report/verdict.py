"""The page of a verdict: decision, metrics of both models and example crops, as one self-contained HTML file.

The forest plot shows each metric's difference with its interval; the histograms show the similarities of certain pairs
by each model, in which one person is s0 and two persons are s1 of the page's style sheet.

Letters: F metrics, N crops, P positive and M negative pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from resight.arrays import Floats, Ints
from resight.files import write_atomic
from resight.training.clustering.cluster import Clustering
from resight.training.curation.hygiene import CameraHygiene, Hygiene
from resight.training.judging.candidate import CandidateResult, ModelComparison, ModelResult
from resight.training.judging.judge import ModelJudgement
from resight.training.judging.separation import Estimate, Separation, pair_similarities
from resight.training.report.montage import cluster_groups
from resight.training.report.page import CropImage, Thumbnails, data_uri, templates
from resight.training.report.svg import colour, draw_svg, number_axes, set_title

WIDTH = 680  # of a drawing's view box
LINE_HEIGHT, AXIS_HEIGHT, PANEL_HEIGHT = 22, 45, 165  # of a figure's line, of the axis below, of a histogram
BINS = 40  # between the least and the most similar pair


def draw_forest(changes: Mapping[str, Estimate]) -> Markup:
    """A row for each metric: candidate minus active model with its interval, and a line at no change.

    Args:
        changes: F differences, one or more.
    """

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axvline(0, color=colour("junk"), linestyle=":")
        for line, (name, change) in enumerate(changes.items()):
            shown = colour("wrong" if change.high < 0 else "right" if change.low > 0 else "other")
            axes.plot([change.low, change.high], [line, line], color=shown)
            (dot,) = axes.plot(change.value, line, "o", color=shown, markersize=7)
            set_title(dot, f"{name}: {change.value:+.4f}, {change.low:+.4f} to {change.high:+.4f}")
        axes.set_yticks(range(len(changes)), list(changes))
        axes.set_ylim(len(changes) - 0.5, -0.5)
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("candidate minus active model")
        number_axes(axes, "x")

    height = LINE_HEIGHT * len(changes) + AXIS_HEIGHT
    return draw_svg(f"Differences of {len(changes)} figures with their intervals", WIDTH, height, paint)


def draw_similarities(models: Mapping[str, tuple[Floats, Floats]]) -> Markup:
    """A panel for each model: how similar pairs of one person and pairs of two are, on one axis for all.

    Args:
        models: name -> float32 (P,) of pairs of one track and (M,) of pairs that are certainly two persons, both of
            one or more.
    """
    every = np.concatenate([values for pair in models.values() for values in pair])
    edges = np.linspace(float(every.min()), max(float(every.max()), float(every.min()) + 1e-6), BINS + 1)

    def paint(figure: Figure) -> None:
        panels = figure.subplots(len(models), sharex=True, squeeze=False)[:, 0]
        for axes, (name, pair) in zip(panels, models.items(), strict=True):
            for values, series, kind in zip(pair, ("s0", "s1"), ("one track", "certainly two persons"), strict=True):
                shares = np.histogram(values, edges)[0] / len(values)
                drawn = axes.stairs(shares, edges, color=colour(series), linewidth=1.8)
                set_title(drawn, f"{name}, pairs of {kind}")
            axes.set(xlabel=f"{name}: cosine similarity", yticks=[])
            axes.tick_params(axis="x", labelbottom=True)
            number_axes(axes, "x")

    return draw_svg(
        f"Similarities of certain pairs for {' and '.join(models)}", WIDTH, PANEL_HEIGHT * len(models), paint
    )


WORST_PAIRS = 8  # pairs shown of each kind
CROPS_SHOWN = 8  # crops per camera


@dataclass(frozen=True)
class ShownPair:
    """Two crops and their similarity by each model."""

    one: CropImage
    other: CropImage
    before: float
    after: float


@dataclass(frozen=True)
class ShownCamera:
    """A camera's crops, its statistics as text, and the problem with them, if any."""

    name: str
    words: str
    problem: str
    crops: Sequence[CropImage]


def write_verdict_page(path: Path, case: CandidateResult, *, names: tuple[str, str]) -> None:
    """Write the page atomically.

    Args:
        path: of the page.
        case: result with two models.
        names: of the candidate and of the active model.

    Raises:
        OSError: the folder cannot be created or written.
    """
    site, active, verdict, thumbnails = case.site, case.site.active, case.verdict, Thumbnails()
    assert active is not None and verdict is not None, "a verdict needs two models"
    clustering = site.candidate.clustering
    labels = clustering.labels if isinstance(clustering, Clustering) else None
    environment = templates()
    environment.filters["uri"] = data_uri
    page = environment.get_template("verdict.html.j2").render(
        title=f"{Path(names[0]).name} instead of {Path(names[1]).name}?",
        summary=f"Candidate {names[0]}, active model {names[1]}.",
        verdict=verdict,
        forest=draw_forest(verdict.differences) if verdict.differences else "",
        tables=_tables(case),
        similarities=_histograms(site, active),
        mistakes=_mistakes(site, active, thumbnails),
        groups=[] if labels is None else cluster_groups(site.store, labels, site.candidate.features, thumbnails),
        cameras=_cameras(site, next(iter(case.hygiene.values())), thumbnails),
        notes=thumbnails.notes,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, page.encode())


def _tables(case: CandidateResult) -> list[tuple[str, list[str], list[list[str]]]]:
    """Tables of all metrics of both models, with headings."""
    columns = ["", "candidate", "active model"]
    found, latency = [], case.latency
    parts = {
        "the site's crops": case.site,
        "crops of earlier nights": case.reference,
        "the crops adapted to": case.adapted,
    }
    for words, comparison in parts.items():
        if comparison is not None and comparison.active is not None:
            after, before = (_figures(one.judgement) for one in (comparison.candidate, comparison.active))
            rows = [[name, after.get(name, "–"), before.get(name, "–")] for name in {**after, **before}]
            found.append((f"Figures on {words} ({len(comparison.store):,})", columns, rows))
    if latency is not None:
        timed = [f"{1000 * seconds:.1f} ms" for seconds in (latency.after_s, latency.before_s)]
        ratio = f"{latency.ratio:.2f} [{latency.low:.2f}, {latency.high:.2f}]"
        found.append(("Time for a batch", columns, [["median", *timed], ["candidate by active model", ratio, ""]]))
    return found


def _figures(judged: ModelJudgement) -> dict[str, str]:
    """All measured metrics as text."""
    values = _estimates("", judged.separation) | _estimates("searches.", judged.searches)
    for name, found in judged.cameras.items():
        values |= _estimates(f"cameras.{name}.", found)
    if judged.links is not None:
        values |= _estimates("links.", judged.links)
    plain: dict[str, float | None] = {"variance": judged.variance}
    if judged.clusters is not None:
        clusters = judged.clusters
        plain |= {"clusters": clusters.clusters, "outliers": clusters.outlier_share, "silhouette": clusters.silhouette}
        plain["largest cluster"] = clusters.largest_share
        if clusters.cameras is not None:
            plain["cameras per cluster"] = clusters.cameras.cameras_per_cluster
            plain["the same by chance"] = clusters.cameras.chance_cameras_per_cluster
        plain["tracks in one cluster"] = clusters.tracks.whole_share
        plain["two persons in one cluster"] = clusters.tracks.confused_share
    return values | {name: f"{value:.4g}" for name, value in plain.items() if value is not None}


def _estimates(prefix: str, found: Separation) -> dict[str, str]:
    return {prefix + name: f"{one.value:.4f} [{one.low:.4f}, {one.high:.4f}]" for name, one in found.figures.items()}


def _histograms(site: ModelComparison, active: ModelResult) -> Markup | str:
    """Histograms of the similarities of certain pairs by both models; empty without features or pairs."""
    if site.candidate.judgement.problem or active.judgement.problem:
        return ""
    if not len(site.pairs.positives) or not len(site.pairs.negatives):
        return ""
    sides = {"candidate": site.candidate, "active model": active}
    rows = (site.pairs.positives, site.pairs.negatives)
    drawn = {name: tuple(pair_similarities(side.features, pairs) for pairs in rows) for name, side in sides.items()}
    return draw_similarities({name: (pair[0], pair[1]) for name, pair in drawn.items()})


def _mistakes(
    site: ModelComparison, active: ModelResult, thumbnails: Thumbnails
) -> list[tuple[str, str, list[ShownPair]]]:
    """The candidate's worst errors on certain pairs, at most one per track or pair of tracks."""
    if site.candidate.judgement.problem:
        return []
    pairs = site.pairs
    similar = "Two persons it finds most similar", "Certainly two: both were in one camera's image at the same time."
    dissimilar = "One track it finds least similar", "One person, unless the tracker switched to another."
    kinds = (
        (*similar, pairs.negatives, np.unique(pairs.negative_tracks, axis=0, return_inverse=True)[1].reshape(-1), -1),
        (*dissimilar, pairs.positives, pairs.positive_tracks, 1),
    )
    shown = []
    for heading, hint, rows, owners, sign in kinds:
        found = pair_similarities(site.candidate.features, rows)
        order = np.argsort(sign * found, kind="stable")
        first = np.sort(np.unique(owners[order], return_index=True)[1])[:WORST_PAIRS]
        chosen = _shown(site, active, rows[order[first]], thumbnails)
        if chosen:
            shown.append((heading, hint, chosen))
    return shown


def _shown(site: ModelComparison, active: ModelResult, rows: Ints, thumbnails: Thumbnails) -> list[ShownPair]:
    """Pairs with their crops; pairs with an unreadable crop are omitted."""
    after, before = (pair_similarities(side.features, rows) for side in (site.candidate, active))
    found = []
    for (one, other), new, old in zip(rows, after, before, strict=True):
        first, second = (thumbnails.crop(site.store, int(row)) for row in (one, other))
        if first is not None and second is not None:
            found.append(ShownPair(first, second, before=float(old), after=float(new)))
    return found


def _cameras(site: ModelComparison, hygiene: Hygiene, thumbnails: Thumbnails) -> list[ShownCamera]:
    """All cameras of the crops judged on."""
    shown = []
    for name, figures in hygiene.figures.items():
        rows = np.flatnonzero(site.store.cameras == site.store.camera_names.index(name))
        chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(CROPS_SHOWN, len(rows))).astype(int))]
        problem = hygiene.problems_by_camera.get(name, "")
        shown.append(ShownCamera(name, _camera_words(figures), problem, thumbnails.crops(site.store, chosen)))
    return shown


def _camera_words(figures: CameraHygiene) -> str:
    correlation = "none" if figures.correlation is None else f"{figures.correlation:.2f}"
    return (
        f"{figures.crops:,} crops, {figures.tracks:,} tracks; contrast {figures.contrast:.0f} grey levels, "
        f"neighbouring pixels correlate by {correlation}; {figures.blank_share:.0%} blank, "
        f"{figures.clipped_share:.0%} black or white, {figures.repeated_share:.0%} repeated"
    )
