"""Example queries with their hits before and after adaptation, for sites with known persons (not used by training)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from resight.arrays import Floats
from resight.encoder.model import Encoder
from resight.errors import InputError, SiteError
from resight.files import write_atomic
from resight.image import decode
from resight.metrics.ranking import RankingScore, evaluate_ranking
from resight.training.evaluation.evaluate import evaluation_splits, percentages
from resight.training.features.extract import extract_features
from resight.training.report.page import CropImage, Thumbnails
from resight.training.store.crops import UNKNOWN, CropStore
from resight.training.store.datasets import Site

HitLabel = Literal["right", "wrong", "junk"]


@dataclass(frozen=True)
class RankedHit:
    """One hit of a search. ``junk`` is the same person seen by the query's own camera: neither right nor wrong."""

    image: bytes = field(repr=False)
    camera: str
    similarity: float
    verdict: HitLabel


@dataclass(frozen=True)
class RankedList:
    """One query and its best hits, best first, by the initial and by the adapted model."""

    query: CropImage
    before: Sequence[RankedHit] = ()
    after: Sequence[RankedHit] = ()


PICTURE_DPI = 80
PICTURE_HITS = 5  # of each model in a row of the picture
BORDERS = {"right": "#128a45", "wrong": "#d03b3b"}  # as in page.css.j2
EXAMPLES = 9  # queries shown: the most improved, some in the middle, the most degraded
HITS = 10


class SearchResults(Protocol):
    """Ranked hits of a model for every query, from a service or computed from features."""

    @property
    def score(self) -> RankingScore:
        """Metrics of the rankings."""

    @property
    def rankings(self) -> Sequence[Sequence[int]]:
        """Gallery rows per query, best first."""

    @property
    def similarities(self) -> Sequence[Sequence[float]]:
        """Cosines of those rows, in [-1, 1]."""


@dataclass(frozen=True)
class GalleryRanking:
    """Rankings computed from features, as long as the report shows; see `SearchResults`."""

    score: RankingScore
    rankings: Sequence[Sequence[int]]
    similarities: Sequence[Sequence[float]]


def rank_gallery(
    query: CropStore, gallery: CropStore, query_features: Floats, gallery_features: Floats
) -> GalleryRanking:
    """Rank the gallery for every query by cosine similarity.

    Args:
        query: Q crops of known persons.
        gallery: G crops of known persons.
        query_features: float32 (Q, D), unit rows.
        gallery_features: float32 (G, D), unit rows.

    Raises:
        InputError: no query has a match in another camera.
    """
    score = evaluate_ranking(
        query_features, gallery_features, query.persons, gallery.persons, query.cameras, gallery.cameras
    )
    rows, cosines = [], []
    for feature in query_features:  # one at a time: Q x G may not fit in memory
        similarity = gallery_features @ feature
        best = np.argsort(-similarity, kind="stable")[:HITS]
        rows.append(best.tolist())
        cosines.append(similarity[best].tolist())
    return GalleryRanking(score, rows, cosines)


def ranked_lists(
    query: CropStore, gallery: CropStore, before: SearchResults, after: SearchResults, thumbnails: Thumbnails
) -> list[RankedList]:
    """Example queries: those that improved most, some in the middle, and those that degraded most."""
    gains = after.score.average_precision - before.score.average_precision
    valid = np.flatnonzero(np.isfinite(gains))
    order = valid[np.argsort(-gains[valid], kind="stable")]
    third = EXAMPLES // 3
    middle = len(order) // 2
    lists = []
    for row in dict.fromkeys(map(int, [*order[:third], *order[middle : middle + third], *order[-third:]])):
        crop = thumbnails.crop(query, row)
        if crop is not None:
            hits = [_shown_hits(query, gallery, results, row, thumbnails) for results in (before, after)]
            lists.append(RankedList(crop, *hits))
    return lists


def _shown_hits(
    query: CropStore, gallery: CropStore, results: SearchResults, row: int, thumbnails: Thumbnails
) -> list[RankedHit]:
    """The first hits of one query, labelled by the rules of `resight.metrics.ranking`."""
    hits = []
    for found, similarity in zip(results.rankings[row][:HITS], results.similarities[row][:HITS], strict=True):
        crop = thumbnails.crop(gallery, found)
        same = gallery.persons[found] == query.persons[row]
        junk = gallery.persons[found] == UNKNOWN or (same and gallery.cameras[found] == query.cameras[row])
        if crop is not None:
            hits.append(
                RankedHit(crop.image, crop.camera, similarity, "junk" if junk else "right" if same else "wrong")
            )
    return hits


@dataclass(frozen=True)
class BeforeAfter:
    """Scores in percent, under the keys of `percentages`, and example queries."""

    before: dict[str, float]
    after: dict[str, float]
    ranked: Sequence[RankedList]


def measure_before_after(site: Site, initial: Encoder, adapted: Encoder, *, device: str) -> BeforeAfter | None:
    """Score the initial and the adapted model on people that were not adapted to.

    Returns:
        None if the site cannot be evaluated: its persons are not labelled, or all crops are from one camera.
    """
    try:
        query, gallery = evaluation_splits(site)
        before, after = (_rank_with(query, gallery, encoder, device) for encoder in (initial, adapted))
    except (SiteError, InputError):
        return None
    return BeforeAfter(
        percentages(before.score), percentages(after.score), ranked_lists(query, gallery, before, after, Thumbnails())
    )


def _rank_with(query: CropStore, gallery: CropStore, encoder: Encoder, device: str) -> GalleryRanking:
    encoder = encoder.to(device)
    features = [extract_features(encoder, store, device=device, local=False)[0] for store in (query, gallery)]
    return rank_gallery(query, gallery, *features)


def draw_ranked_lists(path: Path, lists: Sequence[RankedList]) -> None:
    """Write a JPEG of three queries with their best hits before and after adaptation; green borders are right.

    Args:
        path: of the picture, replaced in one step.
        lists: one or more as `ranked_lists` orders them; the most improved, a middle and the most degraded are shown.

    Raises:
        OSError: it cannot be written.
    """
    shown = [lists[at] for at in sorted({0, len(lists) // 2, len(lists) - 1})]
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 0.95))  # room for the titles
    figure = Figure(figsize=(1.0 * (2 * PICTURE_HITS + 2), 2.1 * len(shown) + 0.4), layout=layout)
    grid = figure.subplots(len(shown), 2 * PICTURE_HITS + 2, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for row, one in zip(grid, shown, strict=True):
        _draw_crop(row[0], one.query.image, "#000000", "query")
        for first, hits in ((1, one.before), (PICTURE_HITS + 2, one.after)):
            counted = [hit for hit in hits if hit.verdict != "junk"]
            for axes, hit in zip(row[first:], counted[:PICTURE_HITS], strict=False):
                _draw_crop(axes, hit.image, BORDERS[hit.verdict], f"{hit.similarity:.2f}")
    for column, title in (
        (PICTURE_HITS // 2 + 1, "before adaptation"),
        (PICTURE_HITS + 2 + PICTURE_HITS // 2, "after"),
    ):
        words = grid[0, column].annotate(title, (0.5, 1.2), xycoords="axes fraction", ha="center", weight="bold")
        words.set_in_layout(False)  # it is wider than its crop
    written = io.BytesIO()
    figure.savefig(written, format="jpeg", dpi=PICTURE_DPI, pil_kwargs={"quality": 85})
    write_atomic(path, written.getvalue())


def _draw_crop(axes: Axes, image: bytes, border: str, words: str) -> None:
    """One crop with a border, and words above it."""
    axes.imshow(decode(image))
    axes.set_title(words, fontsize=8, color=border)
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=border, linewidth=2.5)
