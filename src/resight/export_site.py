"""What a site lends to an export: crops for INT8, the meaning of a similarity, and mAP where persons are known."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from resight.calibration import Calibration
from resight.image import ImageSpec, Pixels
from resight.probes import Run

if TYPE_CHECKING:
    from resight.exporters.forms import Lent
    from resight.training.calibrate import Reliability
    from resight.training.crops import CropStore
    from resight.training.datasets import Site

log = logging.getLogger(__name__)

INT8_CROPS = 256  # as many as `resight.exporters.qdq` takes: one in four to compare, of the others 128 to calibrate
PAIR_CROPS = 6000  # whole tracks up to this many: pairs enough for 1 in 1,000 (resight.training.pairs)


@dataclass
class Lender:
    """A site as `resight.exporters.export` wants it.

    Attributes:
        store: unlabelled crops of the site.
        spec: the encoder's image size.
        evaluation: a site whose persons are known; None = none.
        reliability: of the calibration, once it was fitted, for the report.
    """

    store: CropStore | None
    spec: ImageSpec
    evaluation: Site | None = None
    reliability: Reliability | None = field(default=None, init=False)

    def lend(self, *, crops: bool) -> Lent:
        """What can be lent; ``crops`` decodes those that INT8 needs.

        Raises:
            ImageError: a crop cannot be decoded.
            SiteError: the evaluation set knows no persons.
        """
        from resight.exporters.forms import Lent

        if self.evaluation is not None:
            from resight.training.evaluate import evaluation_splits

            evaluation_splits(self.evaluation)  # refused before anything is computed
        return Lent(
            fitted(sample(self.store, INT8_CROPS), self.spec) if crops and self.store is not None else None,
            self.calibrate if self.store is not None else None,
            self.measure if self.evaluation is not None else None,
        )

    def calibrate(self, run: Run) -> Calibration | None:
        """Fit similarity to probability; None, with a warning that says why, where the site cannot."""
        from resight.training.calibrate import calibrate
        from resight.training.evaluate import embed_store

        assert self.store is not None
        store = whole_tracks(self.store, PAIR_CROPS)
        calibration, self.reliability = calibrate(embed_store(store, self.spec, run), store)
        return calibration

    def measure(self, run: Run) -> float:
        """MAP, 0..1, on the evaluation set."""
        from resight.training.evaluate import embed_store, evaluate_site

        assert self.evaluation is not None
        return float(evaluate_site(self.evaluation, lambda store: embed_store(store, self.spec, run)).mAP)


def sample(store: CropStore, limit: int) -> CropStore:
    """At most ``limit`` crops, as evenly over the cameras as they have them; always the same ones."""
    from resight.training.pairs import spread

    order = np.argsort(store.cameras, kind="stable")
    sizes = np.bincount(store.cameras, minlength=len(store.camera_names))
    camera, number = spread(sizes, limit, np.random.default_rng(0))
    return store.subset(np.sort(order[(np.cumsum(sizes) - sizes)[camera] + number]))


def whole_tracks(store: CropStore, limit: int) -> CropStore:
    """Tracks, drawn one by one until ``limit`` crops are reached; all crops where there are no more, or no tracks."""
    from resight.training.pairs import number_tracks

    tracks = number_tracks(store.cameras, store.tracks)
    if len(store) <= limit:
        return store
    if tracks.max(initial=-1) < 0:
        return sample(store, limit)
    place = np.random.default_rng(0).permutation(int(tracks.max()) + 1)  # of each track in the draw
    known = np.flatnonzero(tracks >= 0)
    drawn = known[np.argsort(place[tracks[known]], kind="stable")][:limit]
    return store.subset(np.sort(drawn))


def fitted(store: CropStore, spec: ImageSpec) -> Pixels:
    """Crops as the graph takes them, uint8 (N, H, W, 3)."""
    from resight.training.features import read_batches

    return np.concatenate([pixels for _, pixels in read_batches(store, [np.arange(len(store))], spec)])
