"""What a site's query and gallery say of an adaptation, for its report. Nothing here is seen by training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resight.errors import InputError, SiteError
from resight.model import Encoder
from resight.training.album import Album
from resight.training.crops import CropStore
from resight.training.datasets import Site
from resight.training.evaluate import evaluation_splits, percentages
from resight.training.features import extract
from resight.training.ranked import Ranking, rank, ranked_lists
from resight.training.report import RankedList


@dataclass(frozen=True)
class Measured:
    """Figures in percent, under the keys of `percentages`, and example queries."""

    before: dict[str, float]
    after: dict[str, float]
    ranked: Sequence[RankedList]


def measure_both(site: Site, initial: Encoder, adapted: Encoder, *, device: str) -> Measured | None:
    """Score a model before and after on people it was not adapted to.

    Returns:
        None where the site cannot be measured: nobody is known on its crops, or one camera saw everybody.
    """
    try:
        query, gallery = evaluation_splits(site)
        before, after = (_rank(query, gallery, encoder, device) for encoder in (initial, adapted))
    except (SiteError, InputError):
        return None
    return Measured(
        percentages(before.score), percentages(after.score), ranked_lists(query, gallery, before, after, Album())
    )


def _rank(query: CropStore, gallery: CropStore, encoder: Encoder, device: str) -> Ranking:
    encoder = encoder.to(device)
    features = [extract(encoder, store, device=device, local=False)[0] for store in (query, gallery)]
    return rank(query, gallery, *features)
