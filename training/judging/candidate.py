"""`resight judge`: reads the crops, computes the results of the candidate and the active model, and the verdict.

Letters: N crops, D feature size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resight.arrays import Floats
from resight.errors import TrainingError
from resight.image import decode
from resight.training.clustering.cluster import Clustering, ClusterSettings, try_cluster
from resight.training.curation.hygiene import Hygiene, check_hygiene
from resight.training.features.extract import embed_store
from resight.training.judging.agreement import LinkedCrops, linked_crops
from resight.training.judging.gate import ModelPair, Verdict, gate
from resight.training.judging.judge import ModelJudgement, judge
from resight.training.judging.latency import LATENCY_BATCH, EmbeddingModel, Latency, measure_latency
from resight.training.store.crops import CropStore, usable_crops
from resight.training.store.datasets import held_out_crops, join_splits, open_site
from resight.training.store.track_pairs import TrackPairs, draw_track_pairs


@dataclass(frozen=True, eq=False)
class ModelResult:
    """The results of one model on a store.

    Attributes:
        features: float32 (N, D).
        clustering: of the features, or the error why there is none.
        linked: features of the crops in confirmed or rejected pairs; None without such pairs.
        judgement: metrics of the model.
    """

    features: Floats
    clustering: Clustering | TrainingError
    linked: Floats | None
    judgement: ModelJudgement


@dataclass(frozen=True, eq=False)
class ModelComparison:
    """The results of both models on one store.

    Attributes:
        store: N crops.
        pairs: pairs of crops that tracks prove to show one person or two.
        candidate: results of the candidate.
        active: results of the active model; None without one.
    """

    store: CropStore
    pairs: TrackPairs
    candidate: ModelResult
    active: ModelResult | None

    @property
    def pair(self) -> ModelPair | None:
        """The judgements of both models; None without an active model."""
        return None if self.active is None else ModelPair(self.active.judgement, self.candidate.judgement)

    def to_json(self) -> dict[str, Any]:
        """Metrics of the candidate as `model`, and of the active model, if any, as `against`."""
        values = {"model": self.candidate.judgement.to_json()}
        return values if self.active is None else values | {"against": self.active.judgement.to_json()}


def compare_models(
    store: CropStore,
    linked: LinkedCrops | None,
    candidate: EmbeddingModel,
    active: EmbeddingModel | None,
    settings: ClusterSettings,
    *,
    seed: int = 0,
    device: str = "cpu",
) -> ModelComparison:
    """Embed, cluster and judge a store with one model or two.

    Args:
        store: N crops, all of which can be decoded.
        linked: crops of confirmed and rejected pairs, likewise.
        candidate: the candidate model.
        active: the active model, if any.
        settings: of the clustering, the same for both.
        seed: of pairs and resamples.
        device: for the neighbour search.

    Raises:
        ImageError: a crop cannot be decoded.
    """
    other = None if active is None else _run_model(store, linked, active, settings, None, seed, device)
    previous = None if other is None else other.clustering
    result = _run_model(store, linked, candidate, settings, previous, seed, device)
    return ModelComparison(store, draw_track_pairs(store, seed=seed), result, other)


def _run_model(
    store: CropStore,
    linked: LinkedCrops | None,
    model: EmbeddingModel,
    settings: ClusterSettings,
    previous: Clustering | TrainingError | None,
    seed: int,
    device: str,
) -> ModelResult:
    """Embed, cluster and judge a store with one model."""
    features = embed_store(store, *model)
    clustering = try_cluster(features, store, settings, device=device)
    own = None if linked is None else embed_store(linked.store, *model)
    pair = None if linked is None or own is None else (linked, own)
    judgement = judge(features, store, clustering=clustering, previous=previous, linked=pair, seed=seed)
    return ModelResult(features, clustering, own, judgement)


@dataclass(frozen=True, eq=False)
class EvaluationCrops:
    """Crops to judge on.

    Attributes:
        store: N crops that can be decoded.
        linked: crops in pairs that operators confirmed or rejected, only of held-out tracks if there are any; None
            without such pairs.
        hygiene: results of the crop checks, by the description of the crops; the crops judged on come first.
        adapted: crops that the candidate was adapted to, if ``store`` was held out from them.
    """

    store: CropStore
    linked: LinkedCrops | None
    hygiene: Mapping[str, Hygiene]
    adapted: CropStore | None = None


@dataclass(frozen=True, eq=False)
class CandidateResult:
    """The results and the verdict on a candidate.

    Attributes:
        site: both models, or the candidate alone, on the site's crops.
        reference: likewise on crops of earlier nights; None if none were given.
        adapted: both on the crops adapted to; None if the verdict does not need them, or there are no separate ones.
        hygiene: see `EvaluationCrops`, of the site.
        latency: None if not requested.
        verdict: None without an active model.
    """

    site: ModelComparison
    reference: ModelComparison | None
    adapted: ModelComparison | None
    hygiene: Mapping[str, Hygiene]
    latency: Latency | None
    verdict: Verdict | None

    def to_json(self) -> dict[str, Any]:
        """Plain values: `model`, `against`, `hygiene`; with two models `verdict`, `reference`, `adapted`, `latency`."""
        values: dict[str, Any] = self.site.to_json()
        values["hygiene"] = {which: found.to_json() for which, found in self.hygiene.items()}
        if self.verdict is not None:
            values["verdict"] = self.verdict.to_json()
            values["reference"] = None if self.reference is None else self.reference.to_json()
            values["adapted"] = None if self.adapted is None else self.adapted.to_json()
            values["latency"] = None if self.latency is None else asdict(self.latency)
        return values


def open_evaluation_crops(root: Path, *, every: bool = False, tracks_from_names: bool = False) -> EvaluationCrops:
    """Read a site to judge on: the tracks held out from adaptation if there are any, else the training crops.

    Args:
        root: of the site.
        every: use all splits.
        tracks_from_names: see `open_site`.

    Raises:
        SiteError: no site, or no crop that can be decoded.
        StoreError: a damaged store, or damaged links.
    """
    site = open_site(root, tracks_from_names=tracks_from_names)
    held_out = None if every else held_out_crops(site)
    store = usable_crops(join_splits(site) if every else site.train if held_out is None else held_out)
    if held_out is None:
        hygiene, adapted = {"crops judged on": check_hygiene(store)}, None
    else:
        adapted = usable_crops(site.train)
        hygiene = {"crops judged on": check_hygiene(store, min_tracks=0), "crops adapted to": check_hygiene(adapted)}
    # Links between training crops were used by the training and are no evidence.
    linked = linked_crops(join_splits(site) if held_out is None else held_out)
    return EvaluationCrops(store, linked, hygiene, adapted)


def judge_candidate(
    site: EvaluationCrops,
    reference: EvaluationCrops | None,
    candidate: EmbeddingModel,
    active: EmbeddingModel | None,
    settings: ClusterSettings,
    *,
    timed: bool = False,
    limit: float | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> CandidateResult:
    """Judge a candidate, alone or against the active model.

    Args:
        site: crops of the site.
        reference: crops of earlier nights.
        candidate: the candidate model.
        active: the active model, if any.
        settings: of the clustering, the same for both.
        timed: measure the time of a batch; always done with a limit.
        limit: allowed ratio of the candidate's time to the active model's.
        seed: of pairs and resamples.
        device: for the neighbour search.

    Raises:
        ImageError: a crop cannot be decoded.
    """
    own, earlier = (
        None
        if crops is None
        else compare_models(crops.store, crops.linked, candidate, active, settings, seed=seed, device=device)
        for crops in (site, reference)
    )
    assert own is not None, "the site is given"
    latency = None
    if active is not None and (timed or limit is not None):
        images = [decode(site.store.read(row)) for row in range(min(LATENCY_BATCH, len(site.store)))]
        latency = measure_latency(active, candidate, images, limit=limit)
    if own.pair is None:
        return CandidateResult(own, earlier, None, site.hygiene, latency, None)
    before = None if earlier is None else earlier.pair
    verdict, adapted = gate(own.pair, reference=before, hygiene=site.hygiene, latency=latency), None
    if site.adapted is not None and (verdict.decision == "undecided" or verdict.evidence == "clusters"):
        adapted = compare_models(site.adapted, None, candidate, active, settings, seed=seed, device=device)
        verdict = gate(own.pair, reference=before, adapted=adapted.pair, hygiene=site.hygiene, latency=latency)
    return CandidateResult(own, earlier, adapted, site.hygiene, latency, verdict)
