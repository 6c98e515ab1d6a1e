"""One candidate's case: the crops it is judged on, both models' trials, and the verdict. What `resight judge` does.

Letters: N crops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resight.image import decode
from resight.training.agreement import LinkedCrops, linked_crops
from resight.training.cluster import ClusterSettings
from resight.training.crops import CropStore, usable_crops
from resight.training.datasets import open_site
from resight.training.gate import gate
from resight.training.hygiene import Hygiene, examine
from resight.training.judge import held_out, join_splits
from resight.training.latency import BATCH, Latency, Model, measure_latency
from resight.training.trial import Trial, hold_trial
from resight.training.verdict import Verdict


@dataclass(frozen=True, eq=False)
class Ground:
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
class Case:
    """All that is known of a candidate.

    Attributes:
        site: both models, or the one alone, on the site's crops.
        reference: likewise on crops of earlier nights; None where none were given.
        adapted: both on the crops adapted to; None where the verdict needs them not, or there are none apart.
        hygiene: as in `Ground`, of the site.
        latency: None where it was not asked for.
        verdict: None without an active model.
    """

    site: Trial
    reference: Trial | None
    adapted: Trial | None
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


def open_ground(root: Path, *, every: bool = False, tracks_from_names: bool = False) -> Ground:
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
    back = None if every else held_out(site)
    store = usable_crops(join_splits(site) if every else site.train if back is None else back)
    if back is None:
        hygiene, adapted = {"crops judged on": examine(store)}, None
    else:
        adapted = usable_crops(site.train)
        hygiene = {"crops judged on": examine(store, min_tracks=0), "crops adapted to": examine(adapted)}
    told = join_splits(site) if back is None else back  # links between training crops were obeyed, not foreseen
    return Ground(store, linked_crops(told), hygiene, adapted)


def hear(
    site: Ground,
    reference: Ground | None,
    candidate: Model,
    active: Model | None,
    settings: ClusterSettings,
    *,
    timed: bool = False,
    limit: float | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Case:
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
        else hold_trial(ground.store, ground.linked, candidate, active, settings, seed=seed, device=device)
        for ground in (site, reference)
    ]
    own, earlier = trials
    assert own is not None, "the site is given"
    latency = None
    if active is not None and (timed or limit is not None):
        crops = [decode(site.store.read(row)) for row in range(min(BATCH, len(site.store)))]
        latency = measure_latency(active, candidate, crops, limit=limit)
    if own.rivals is None:
        return Case(own, earlier, None, site.hygiene, latency, None)
    before = None if earlier is None else earlier.rivals
    verdict, seen = gate(own.rivals, reference=before, hygiene=site.hygiene, latency=latency), None
    if site.adapted is not None and (verdict.decision == "undecided" or verdict.evidence == "clusters"):
        seen = hold_trial(site.adapted, None, candidate, active, settings, seed=seed, device=device)
        verdict = gate(own.rivals, reference=before, adapted=seen.rivals, hygiene=site.hygiene, latency=latency)
    return Case(own, earlier, seen, site.hygiene, latency, verdict)
