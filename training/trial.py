"""Both models on one store, side by side: features, clusters and judgements, for the gate and for its page.

Letters: N crops, D feature size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from resight.errors import TrainingError
from resight.training.agreement import LinkedCrops
from resight.training.cluster import Clustering, ClusterSettings
from resight.training.crops import CropStore
from resight.training.evaluate import embed_store
from resight.training.gate import Rivals
from resight.training.judge import judge, try_cluster
from resight.training.judgement import Judgement
from resight.training.latency import Model
from resight.training.neighbours import Floats
from resight.training.pairs import TrackPairs, draw_pairs


@dataclass(frozen=True, eq=False)
class Look:
    """What one model makes of a store.

    Attributes:
        features: float32 (N, D).
        clustering: of them, or why there is none.
        linked: features of the crops that links name; None where there are none.
        judgement: its figures.
    """

    features: Floats
    clustering: Clustering | TrainingError
    linked: Floats | None
    judgement: Judgement


@dataclass(frozen=True, eq=False)
class Trial:
    """One store and what each model makes of it.

    Attributes:
        store: N crops.
        pairs: certain pairs of them.
        candidate: of the model on trial.
        active: of the model in use; None where there is none to compare with.
    """

    store: CropStore
    pairs: TrackPairs
    candidate: Look
    active: Look | None

    @property
    def rivals(self) -> Rivals | None:
        """The two judgements."""
        return None if self.active is None else Rivals(self.active.judgement, self.candidate.judgement)

    def to_json(self) -> dict[str, Any]:
        """Figures of the candidate as `model`, and of the active model, if any, as `against`."""
        told = {"model": self.candidate.judgement.to_json()}
        return told if self.active is None else told | {"against": self.active.judgement.to_json()}


def hold_trial(
    store: CropStore,
    linked: LinkedCrops | None,
    candidate: Model,
    active: Model | None,
    settings: ClusterSettings,
    *,
    seed: int = 0,
    device: str = "cpu",
) -> Trial:
    """Embed, cluster and judge a store with one model or two.

    Args:
        store: N crops, all of which can be decoded.
        linked: crops of confirmed and rejected pairs, likewise.
        candidate: the model on trial.
        active: the one in use, if any.
        settings: of the clustering, the same for both.
        seed: of pairs and resamples.
        device: where neighbours are searched.

    Raises:
        ImageError: a crop cannot be decoded.
    """
    other = None if active is None else _look(store, linked, active, settings, None, seed, device)
    previous = None if other is None else other.clustering
    look = _look(store, linked, candidate, settings, previous, seed, device)
    return Trial(store, draw_pairs(store, seed=seed), look, other)


def _look(
    store: CropStore,
    linked: LinkedCrops | None,
    model: Model,
    settings: ClusterSettings,
    previous: Clustering | TrainingError | None,
    seed: int,
    device: str,
) -> Look:
    """One model on a store."""
    features = embed_store(store, *model)
    clustering = try_cluster(features, store, settings, device=device)
    own = None if linked is None else embed_store(linked.store, *model)
    pair = None if linked is None or own is None else (linked, own)
    judgement = judge(features, store, clustering=clustering, previous=previous, linked=pair, seed=seed)
    return Look(features, clustering, own, judgement)
