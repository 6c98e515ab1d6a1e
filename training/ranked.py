"""Example queries with their hits before and after, for the report of a site whose persons are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from resight.ranking import RankingScore, evaluate_ranking
from resight.training.album import Album
from resight.training.crops import UNKNOWN, CropStore
from resight.training.neighbours import Floats
from resight.training.report import Hit, RankedList

EXAMPLES = 9  # queries shown: the most helped, some in the middle, the most harmed
HITS = 10


class Answers(Protocol):
    """What a model answers to every query; `resight.served.Served` is one."""

    @property
    def score(self) -> RankingScore:
        """Figures of the answers."""

    @property
    def rankings(self) -> Sequence[Sequence[int]]:
        """Gallery rows per query, best first."""

    @property
    def similarities(self) -> Sequence[Sequence[float]]:
        """Cosines of those rows, in [-1, 1]."""


@dataclass(frozen=True)
class Ranking:
    """Answers computed from features, as deep as the report shows them; see `Answers`."""

    score: RankingScore
    rankings: Sequence[Sequence[int]]
    similarities: Sequence[Sequence[float]]


def rank(query: CropStore, gallery: CropStore, query_features: Floats, gallery_features: Floats) -> Ranking:
    """Answer every query by cosine similarity.

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
    for feature in query_features:  # one at a time: Q x G may not fit
        similarity = gallery_features @ feature
        best = np.argsort(-similarity, kind="stable")[:HITS]
        rows.append(best.tolist())
        cosines.append(similarity[best].tolist())
    return Ranking(score, rows, cosines)


def ranked_lists(
    query: CropStore, gallery: CropStore, before: Answers, after: Answers, album: Album
) -> list[RankedList]:
    """Queries whose answers changed most for the better, that changed in between, and most for the worse."""
    gains = after.score.average_precision - before.score.average_precision
    valid = np.flatnonzero(np.isfinite(gains))
    order = valid[np.argsort(-gains[valid], kind="stable")]
    third = EXAMPLES // 3
    middle = len(order) // 2
    lists = []
    for row in dict.fromkeys(map(int, [*order[:third], *order[middle : middle + third], *order[-third:]])):
        crop = album.crop(query, row)
        if crop is not None:
            hits = [_hits(query, gallery, answers, row, album) for answers in (before, after)]
            lists.append(RankedList(crop, *hits))
    return lists


def _hits(query: CropStore, gallery: CropStore, answers: Answers, row: int, album: Album) -> list[Hit]:
    """The first hits of one answer, judged as `resight.ranking` does."""
    hits = []
    for found, similarity in zip(answers.rankings[row][:HITS], answers.similarities[row][:HITS], strict=True):
        crop = album.crop(gallery, found)
        same = gallery.persons[found] == query.persons[row]
        junk = gallery.persons[found] == UNKNOWN or (same and gallery.cameras[found] == query.cameras[row])
        if crop is not None:
            hits.append(Hit(crop.image, crop.camera, similarity, "junk" if junk else "right" if same else "wrong"))
    return hits
