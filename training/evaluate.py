"""A labelled site's query and gallery through a model: the figures of the Market-1501 protocol."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from resight.errors import SiteError
from resight.ranking import RankingScore, evaluate_ranking
from resight.training.crops import CropStore
from resight.training.datasets import Site
from resight.training.neighbours import Floats


def evaluate_site(site: Site, embed: Callable[[CropStore], Floats]) -> RankingScore:
    """Rank a site's gallery for each of its queries.

    Args:
        site: with a query and a gallery split.
        embed: crops of a store -> float32 (N, D), unit rows.

    Raises:
        SiteError: the site has no query and gallery.
        InputError: no query has a match in another camera.
    """
    query, gallery = evaluation_splits(site)
    return evaluate_ranking(
        embed(query), embed(gallery), query.persons, gallery.persons, query.cameras, gallery.cameras
    )


def evaluation_splits(site: Site) -> tuple[CropStore, CropStore]:
    """Query and gallery of a site.

    Raises:
        SiteError: it has none, because nobody said who is on its crops, or one camera saw everybody.
    """
    if site.query is None or site.gallery is None:
        raise SiteError(
            f"{site.root} has no query and gallery: measuring needs known persons seen by two cameras or more, in a "
            "Market-1501 folder, a crop store with splits, or folders <camera>/<person>/; to adapt without them "
            "use `resight adapt`"
        )
    if len(np.unique(np.concatenate([site.query.cameras, site.gallery.cameras]))) < 2:
        raise SiteError(
            f"all query and gallery crops of {site.root} are from one camera: measuring counts matches seen by another "
            "camera and needs two or more; to adapt to one camera use `resight adapt`"
        )
    return site.query, site.gallery


def percentages(score: RankingScore) -> dict[str, float]:
    """The figures papers print, in percent, rounded to hundredths."""
    ranks = {f"rank{r}": score.rank(r) for r in (1, 5, 10)}
    return {name: round(100 * value, 2) for name, value in {"mAP": score.mAP, **ranks, "mINP": score.mINP}.items()}
