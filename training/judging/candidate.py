"""Judges a candidate against the active model, as `resight judge` does: the crops, both models' results, the verdict.

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
    judgement: ModelJudgement


@dataclass(frozen=True, eq=False)
class ModelComparison:
    """One store and what each model makes of it.

    Attributes:
        store: N crops.
        pairs: certain pairs of them.
        candidate: of the model on trial.
        active: of the model in use; None where there is none to compare with.
    """

    store: CropStore
    pairs: TrackPairs
    candidate: ModelResult
    active: ModelResult | None

    @property
    def rivals(self) -> ModelPair | None:
        """The two judgements."""
        return None if self.active is None else ModelPair(self.active.judgement, self.candidate.judgement)

    def to_json(self) -> dict[str, Any]:
        """Figures of the candidate as `model`, and of the active model, if any, as `against`."""
        told = {"model": self.candidate.judgement.to_json()}
        return told if self.active is None else told | {"against": self.active.judgement.to_json()}


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
        candidate: the model on trial.
        active: the one in use, if any.
        settings: of the clustering, the same for both.
        seed: of pairs and resamples.
        device: where neighbours are searched.

    Raises:
        ImageError: a crop cannot be decoded.
    """
    other = None if active is None else _run_model(store, linked, active, settings, None, seed, device)
    previous = None if other is None else other.clustering
    look = _run_model(store, linked, candidate, settings, previous, seed, device)
    return ModelComparison(store, draw_track_pairs(store, seed=seed), look, other)


def _run_model(
    store: CropStore,
    linked: LinkedCrops | None,
    model: EmbeddingModel,
    settings: ClusterSettings,
    previous: Clustering | TrainingError | None,
    seed: int,
    device: str,
) -> ModelResult:
    """One model on a store."""
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
        linked: those that operators have confirmed or rejected pairs of, of tracks held out where there are such, else
            in any split; None where there are none.
        hygiene: what is wrong with crops, by the words for which crops they are; those judged on come first.
        adapted: crops that a candidate was adapted to, where ``store`` was held out of them.
    """

    store: CropStore
    linked: LinkedCrops | None
    hygiene: Mapping[str, Hygiene]
    adapted: CropStore | None = None


@dataclass(frozen=True, eq=False)
class CandidateResult:
    """All that is known of a candidate.

    Attributes:
        site: both models, or the one alone, on the site's crops.
        reference: likewise on crops of earlier nights; None where none were given.
        adapted: both on the crops adapted to; None where the verdict needs them not, or there are none apart.
        hygiene: as in `EvaluationCrops`, of the site.
        latency: None where it was not asked for.
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
        told: dict[str, Any] = self.site.to_json()
        told["hygiene"] = {which: found.to_json() for which, found in self.hygiene.items()}
        if self.verdict is not None:
            told["verdict"] = self.verdict.to_json()
            told["reference"] = None if self.reference is None else self.reference.to_json()
            told["adapted"] = None if self.adapted is None else self.adapted.to_json()
            told["latency"] = None if self.latency is None else asdict(self.latency)
        return told


def open_evaluation_crops(root: Path, *, every: bool = False, tracks_from_names: bool = False) -> EvaluationCrops:
    """Read a site to judge on: the tracks kept back from adaptation where there are such, else the training crops.

    Args:
        root: of the site.
        every: take all splits.
        tracks_from_names: see `open_site`.

    Raises:
        SiteError: no site, or no crop that can be decoded.
        StoreError: a damaged store, or damaged links.
    """
    site = open_site(root, tracks_from_names=tracks_from_names)
    back = None if every else held_out_crops(site)
    store = usable_crops(join_splits(site) if every else site.train if back is None else back)
    if back is None:
        hygiene, adapted = {"crops judged on": check_hygiene(store)}, None
    else:
        adapted = usable_crops(site.train)
        hygiene = {"crops judged on": check_hygiene(store, min_tracks=0), "crops adapted to": check_hygiene(adapted)}
    told = join_splits(site) if back is None else back  # links between training crops were obeyed, not foreseen
    return EvaluationCrops(store, linked_crops(told), hygiene, adapted)


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
    """Judge a candidate, alone or against the model in use.

    Args:
        site: crops of the site.
        reference: crops of earlier nights.
        candidate: the model on trial.
        active: the one in use, if any.
        settings: of the clustering, the same for both.
        timed: whether the time of a batch is measured; with a limit it always is.
        limit: allowed ratio of the candidate's time.
        seed: of pairs and resamples.
        device: where neighbours are searched.

    Raises:
        ImageError: a crop cannot be decoded.
    """
    trials = [
        None
        if ground is None
        else compare_models(ground.store, ground.linked, candidate, active, settings, seed=seed, device=device)
        for ground in (site, reference)
    ]
    own, earlier = trials
    assert own is not None, "the site is given"
    latency = None
    if active is not None and (timed or limit is not None):
        crops = [decode(site.store.read(row)) for row in range(min(LATENCY_BATCH, len(site.store)))]
        latency = measure_latency(active, candidate, crops, limit=limit)
    if own.rivals is None:
        return CandidateResult(own, earlier, None, site.hygiene, latency, None)
    before = None if earlier is None else earlier.rivals
    verdict, seen = gate(own.rivals, reference=before, hygiene=site.hygiene, latency=latency), None
    if site.adapted is not None and (verdict.decision == "undecided" or verdict.evidence == "clusters"):
        seen = compare_models(site.adapted, None, candidate, active, settings, seed=seed, device=device)
        verdict = gate(own.rivals, reference=before, adapted=seen.rivals, hygiene=site.hygiene, latency=latency)
    return CandidateResult(own, earlier, seen, site.hygiene, latency, verdict)
