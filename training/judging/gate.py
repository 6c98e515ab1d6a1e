"""The verdict on a candidate: whether it may replace the active model, from the judgements of both.

`compare` applies these rules to both judgements of one store, from the strongest evidence to the weakest
(docs/judging.md gives the reasons and measurements):

1. Features: refuse if they are unusable, all alike or nearly so compared with the active model's, or if the clusters
   collapsed.
2. Tracks: AUC and true positive rates at fixed false positive rates, as differences over the same resampled tracks. A
   difference is worse if its interval is below 0, better if it is above 0. Only worse ones: refuse. Only better ones:
   promote. Both: undecided. Neither: promote if the AUC is worse by at most `TRACK_MARGIN` and the clusters improved.
3. Tracks compare only crops of one camera, so a candidate is not promoted if its clusters separated by camera or lost
   crops to outliers.
4. Without tracks, clusters alone: promote if the silhouette or the camera mix rose, refuse if one fell or by rule 3.
   This evidence is weaker, because training tightens its own clusters whether they are right or wrong.

`gate` adds conditions on what `compare` does not see: the candidate must not be worse on crops of earlier nights (the
reference store), in any single camera, in searches, on pairs that operators confirmed or rejected, or in speed. It also
checks for unsound crops, since a model must be neither trained nor judged on them: problems found by `hygiene`, crops
of only one person, or one person in several overlapping tracks. One such loss or problem refuses. If there are too few
tracks to decide, labelled pairs, searches or reference crops may promote instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from resight.training.clustering.health import CameraMix
from resight.training.curation.hygiene import Hygiene
from resight.training.judging.agreement import wilson_interval
from resight.training.judging.judge import ModelJudgement
from resight.training.judging.latency import Latency
from resight.training.judging.separation import CONFIDENCE, Estimate, Separation

Evidence = Literal[
    "features", "tracks", "clusters", "none", "crops", "reference", "searches", "cameras", "links", "latency", "adapted"
]
Decision = Literal["promote", "refuse", "undecided"]
MIN_VARIANCE = 1e-4  # half of it is the resolution of fp16 just below a cosine of 1
VARIANCE_FALL = 0.1  # smallest accepted share of the active model's; encoders in docs/judging.md have 0.61 to 0.86
TRACK_MARGIN = 0.005  # of AUC: a third of the difference between 57.7 and 65.5 mAP in docs/judging.md
SILHOUETTE_STEP = 0.05  # late epochs of one run differ by up to 0.02 (docs/judging.md)
MIX_STEP = 0.1  # of the camera mix; sound encoders in docs/judging.md differ by less
OUTLIER_RISE = 0.1  # share of all crops that may become outliers


@dataclass(frozen=True)
class Verdict:
    """The decision on a candidate.

    Attributes:
        decision: "promote", "refuse" or "undecided"; a cycle keeps the active model unless the decision is promote.
        evidence: the evidence that decided; "none" if there was none.
        reasons: as text, with numbers.
        differences: after minus before of each metric that both models have, with its interval.
    """

    decision: Decision
    evidence: Evidence
    reasons: tuple[str, ...]
    differences: Mapping[str, Estimate]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        differences = {name: asdict(estimate) for name, estimate in self.differences.items()}
        return {**vars(self), "reasons": list(self.reasons), "differences": differences}


def compare(before: ModelJudgement, after: ModelJudgement) -> Verdict:
    """Decide whether a candidate may replace the active model, by the rules in the module's docstring.

    Args:
        before: of the active model.
        after: of the candidate; must be on the same store with the same seed.
    """
    one, other = before.separation, after.separation
    assert (one.digest, one.seed, before.crops) == (other.digest, other.seed, after.crops), "judge one store, one seed"
    changes = differences(one, other)
    unusable = unusable_reason(after) or _variance_loss(before, after)
    if unusable:
        return Verdict("refuse", "features", (f"candidate: {unusable}",), changes)
    if unusable_reason(before):
        return Verdict("promote", "features", (f"active model: {unusable_reason(before)}", "candidate: sound"), changes)
    health, gained, lost = cluster_changes(before, after)
    if changes:
        return _by_tracks(changes, health, gained, lost)
    why = f"no comparison by tracks: {after.separation.missing.get('auc', 'the active model has none')}"
    if not health:
        return Verdict("undecided", "none", (why, "no clusters of both to compare"), {})
    decision: Decision = "refuse" if lost else "promote" if gained else "undecided"
    return Verdict(decision, "clusters", (*health, why), {})


def differences(before: Separation, after: Separation, *, confidence: float = CONFIDENCE) -> dict[str, Estimate]:
    """After minus before of each metric that both have; resample b of both is over the same tracks.

    Args:
        before: of the active model.
        after: of the candidate; must be on the same pairs.
        confidence: of the interval, in (0, 1).
    """
    assert (before.digest, before.seed) == (after.digest, after.seed), "judge one store, one seed"
    one, other, found = before, after, {}
    for name in one.figures.keys() & other.figures.keys():
        low, high = np.nanquantile(
            other.resampled[name] - one.resampled[name], [(1 - confidence) / 2, (1 + confidence) / 2]
        )
        found[name] = Estimate(other.figures[name].value - one.figures[name].value, float(low), float(high))
    return dict(sorted(found.items()))


def unusable_reason(judged: ModelJudgement) -> str:
    """Why a model must not be used, regardless of other metrics; empty for a sound one."""
    if judged.problem or judged.collapse:
        return judged.problem or judged.collapse
    if judged.variance is not None and judged.variance < MIN_VARIANCE:
        return f"its features are nearly all equal: variance {judged.variance:.2g}, expected {MIN_VARIANCE} or more"
    clusters = judged.clusters
    if clusters is not None and clusters.collapsed:
        return (
            f"its clusters collapsed: {clusters.clusters}, the largest with {clusters.largest_share:.0%} of all crops"
        )
    return ""


def _variance_loss(before: ModelJudgement, after: ModelJudgement) -> str:
    """Why a candidate's features separate crops far less than those of a sound active model; empty if they do not."""
    if unusable_reason(before) or before.variance is None or after.variance is None:
        return ""
    if after.variance >= VARIANCE_FALL * before.variance:
        return ""
    change = f"variance {before.variance:.2g} to {after.variance:.2g}"
    return f"its features are far less spread than the active model's: {change}"


def _by_tracks(changes: Mapping[str, Estimate], health: list[str], gained: bool, lost: bool) -> Verdict:
    """The verdict by rules 2 and 3."""
    words = [f"{name} {change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}]" for name, change in changes.items()]
    worse = [name for name, change in changes.items() if change.high < 0]
    better = [name for name, change in changes.items() if change.low > 0]
    harmless = changes["auc"].low >= -TRACK_MARGIN
    decision: Decision = "undecided"
    if worse and better:
        why = f"better in {', '.join(better)} and worse in {', '.join(worse)}"
    elif worse:
        decision, why = "refuse", f"worse in {', '.join(worse)}"
    elif better and lost:
        why = f"better in {', '.join(better)}, but its clusters are worse across cameras"
    elif better:
        decision, why = "promote", f"better in {', '.join(better)}, worse in none"
    elif harmless and gained and not lost:
        decision, why = "promote", f"on tracks at most {TRACK_MARGIN} worse in AUC, and its clusters improved"
    else:
        why = "no significant difference on tracks"
    return Verdict(decision, "tracks", (why, *words, *health), changes)


def cluster_changes(before: ModelJudgement, after: ModelJudgement) -> tuple[list[str], bool, bool]:
    """Changes of the clusters as text (empty if not comparable), whether they improved, and whether they got worse."""
    one, other = before.clusters, after.clusters
    if one is None or other is None or one.cameras is None or other.cameras is None:
        return [], False, False
    (shrunk, grown), words = _camera_mixes(one.cameras, other.cameras)
    words.append(f"outliers {one.outlier_share:.1%} to {other.outlier_share:.1%}")
    lost = shrunk or other.outlier_share > one.outlier_share + OUTLIER_RISE
    gained = grown
    if one.silhouette is not None and other.silhouette is not None:
        words.append(f"silhouette {one.silhouette:.3f} to {other.silhouette:.3f}")
        gained |= other.silhouette > one.silhouette + SILHOUETTE_STEP
        # Crops of several cameras are less alike than those of one: a fall is not a loss if the camera mix rose.
        lost |= other.silhouette < one.silhouette - SILHOUETTE_STEP and not grown
    return words, gained and not lost, lost


def _camera_mixes(before: CameraMix, after: CameraMix) -> tuple[tuple[bool, bool], list[str]]:
    """Whether the camera mix of the clusters fell or rose, and the change as text.

    A change counts if it exceeds `MIX_STEP` and twice its standard error, since a dozen clusters vary by chance.
    """
    was, now = (mix.cameras_per_cluster / mix.chance_cameras_per_cluster for mix in (before, after))
    errors = (mix.cameras_per_cluster_error / mix.chance_cameras_per_cluster for mix in (before, after))
    step = max(MIX_STEP * was, 2 * math.hypot(*errors))
    words = [f"cameras per cluster, relative to chance, {was:.2f} to {now:.2f}"]
    return (now < was - step, now > was + step), words


# Share of the variance on the reference crops: one real person has 0.3-0.5, five have 0.83 (medians, docs/judging.md).
SINGLE_PERSON_VARIANCE = 0.6
# Share of tracks that lie in one cluster, below which the clusters say nothing about persons (docs/judging.md).
WHOLE_TRACK_SHARE = 0.5
# Share of pairs of overlapping tracks in one cluster; sound models above WHOLE_TRACK_SHARE have up to 0.08.
CONFUSED_SHARE = 0.1


def hygiene_problems(hygiene: Mapping[str, Hygiene]) -> Iterator[str]:
    """Problems with crops that are visible in their pixels.

    Args:
        hygiene: by the description of the crops.
    """
    for which, found in hygiene.items():
        for words in found.messages():
            yield f"{which}: {words}"


def single_person_signs(active: ModelJudgement, elsewhere: ModelJudgement | None) -> Iterator[str]:
    """Signs that the crops show only one person: a sound active model finds nearly all of them alike.

    Args:
        active: judgement of the active model on the crops.
        elsewhere: its judgement on crops of earlier nights.
    """
    if active.problem:
        return
    seen = None if elsewhere is None or unusable_reason(elsewhere) else elsewhere.variance
    collapsed = active.collapse or (active.clusters is not None and active.clusters.collapsed)
    if seen is not None and active.variance is not None and active.variance < SINGLE_PERSON_VARIANCE * seen:
        change = f"variance {active.variance:.2g}, on the reference crops {seen:.2g}"
        yield f"for the active model these crops are as alike as crops of one person: {change}"
    elif collapsed and seen is not None:
        yield "the active model finds one person on most crops, but many on the reference crops"
    elif collapsed and not active.separation.figures:
        yield "the active model finds one person on most crops, and too few tracks overlap to disprove it"


def duplicate_person_sign(which: str, active: ModelJudgement) -> str:
    """Sign that one person appears in several tracks at once: overlapping tracks share a cluster, tracks stay whole.

    It is only used if nothing else decides: people in uniforms look alike too.

    Args:
        which: description of the crops.
        active: judgement of the active model on them.

    Returns:
        A reason; empty if there is no such sign.
    """
    kept = None if active.clusters is None else active.clusters.tracks
    if kept is None or kept.whole_share is None or kept.confused_share is None or kept.whole_share < WHOLE_TRACK_SHARE:
        return ""
    confused = round(kept.confused_share * kept.compared_pairs)
    if wilson_interval(confused, kept.compared_pairs).low <= CONFUSED_SHARE:
        return ""
    return (
        f"of {kept.compared_pairs} pairs of tracks visible at the same time in {which} {confused} look like one person "
        "to the active model: the same person repeatedly, or a tracker that splits people"
    )


RATE_MARGIN = 0.02  # of a rate: corresponds to TRACK_MARGIN of AUC among the encoders in docs/judging.md

Loss = tuple[Evidence, str]


@dataclass(frozen=True, eq=False)
class ModelPair:
    """The judgements of both models on one store.

    Attributes:
        before: of the active model.
        after: of the candidate.
    """

    before: ModelJudgement
    after: ModelJudgement


def gate(
    site: ModelPair,
    *,
    reference: ModelPair | None = None,
    adapted: ModelPair | None = None,
    hygiene: Mapping[str, Hygiene] | None = None,
    latency: Latency | None = None,
) -> Verdict:
    """Decide whether a candidate may replace the active model; see the module's docstring.

    Args:
        site: both models on crops of the site, held out from the candidate's training if possible.
        reference: both on the frozen crops of earlier nights.
        adapted: both on the crops that the candidate was adapted to; only used if nothing else decides.
        hygiene: results of the crop checks, by the description of the crops ("crops adapted to").
        latency: of both models, with the allowed ratio.

    Returns:
        The verdict with all measured differences; those not on tracks of the site have dotted names such as
        `reference.auc`, `cameras.entrance.auc` or `links.accuracy`.
    """
    verdict = compare(site.before, site.after)
    measured: dict[str, Estimate] = dict(verdict.differences)
    spoilt = [
        *hygiene_problems(hygiene or {}),
        *single_person_signs(site.before, None if reference is None else reference.before),
    ]
    losses: list[Loss] = [("crops", words) for words in spoilt]
    losses += _metric_losses(site, "", measured)
    if reference is not None:
        losses += _worse_on_reference(reference, measured)
        losses += _metric_losses(reference, "reference.", measured)
    if latency is not None and latency.exceeded:
        words = f"a batch takes {latency.ratio:.2f} times as long as with the active model, allowed {latency.limit:g}"
        losses.append(("latency", words))
    if losses:
        reasons = (*(words for _, words in losses), *verdict.reasons)
        evidence = verdict.evidence if verdict.evidence == "features" and losses[0][0] != "crops" else losses[0][0]
        return Verdict("refuse", evidence, reasons, measured)
    found = _gain_elsewhere(replace(verdict, differences=measured), site, adapted)
    parts = {"these crops": site, "the crops adapted to": adapted}
    words = next(
        (words for which, part in parts.items() if part and (words := duplicate_person_sign(which, part.before))), ""
    )
    if found.decision == "undecided" and words:
        return replace(found, decision="refuse", evidence="crops", reasons=(words, *found.reasons))
    return found


def _metric_losses(pair: ModelPair, where: str, measured: dict[str, Estimate]) -> Iterator[Loss]:
    """Significant losses in searches, on labelled pairs and in single cameras; adds differences to ``measured``."""
    before, after = pair.before, pair.after
    if not after.problem and not before.problem:
        yield from _compare_metrics(before.searches, after.searches, "searches", f"{where}searches.", measured)
    if before.links is not None and after.links is not None:
        yield from _compare_metrics(before.links, after.links, "links", f"{where}links.", measured)
    both = before.cameras.keys() & after.cameras.keys()
    for name in sorted(both):
        # With many cameras one falls by chance: Bonferroni's correction.
        confidence = 1 - (1 - CONFIDENCE) / len(both)
        one, other = (_auc_alone(side.cameras[name]) for side in (before, after))
        yield from _compare_metrics(one, other, "cameras", f"{where}cameras.{name}.", measured, confidence=confidence)


def _compare_metrics(
    before: Separation,
    after: Separation,
    evidence: Evidence,
    prefix: str,
    measured: dict[str, Estimate],
    *,
    confidence: float = CONFIDENCE,
) -> Iterator[Loss]:
    """Losses among the differences of two models; adds the differences to ``measured`` under a prefix."""
    for name, change in differences(before, after, confidence=confidence).items():
        measured[prefix + name] = change
        if _is_loss(name, change):
            yield evidence, f"worse in {prefix}{name}: {format_difference(change)}"


def _worse_on_reference(reference: ModelPair, measured: dict[str, Estimate]) -> Iterator[Loss]:
    """Losses of the candidate on crops of earlier nights."""
    verdict = compare(reference.before, reference.after)
    measured |= {f"reference.{name}": change for name, change in verdict.differences.items()}
    if verdict.decision == "refuse" and not verdict.differences:
        yield "reference", f"on the reference crops: {'; '.join(verdict.reasons)}"
    elif verdict.evidence == "features" and verdict.decision == "refuse":
        yield "reference", f"on the reference crops: {verdict.reasons[0]}"
    for name, change in verdict.differences.items():
        if _is_loss(name, change):
            yield "reference", f"worse in reference.{name}: {format_difference(change)}"


def _is_loss(name: str, change: Estimate) -> bool:
    """Whether a metric fell significantly, and by more than the accepted margin."""
    margin = TRACK_MARGIN if name == "auc" else RATE_MARGIN
    return change.high < 0 and change.value < -margin


def _gain_elsewhere(verdict: Verdict, site: ModelPair, adapted: ModelPair | None) -> Verdict:
    """If the site's tracks do not decide, promote for a significant gain elsewhere, provided nothing is worse."""
    if verdict.evidence == "clusters" and adapted is not None and adapted.after.separation.figures:
        # With few held-out tracks each cluster is just a track: prefer tracks of the crops adapted to.
        verdict = replace(verdict, decision="undecided")
    elif verdict.decision != "undecided" or cluster_changes(site.before, site.after)[2]:
        return verdict
    own = {name: change for name, change in verdict.differences.items() if "." not in name}
    if any(change.high < 0 for change in own.values()):
        return verdict
    promoting: tuple[Evidence, ...] = ("links", "searches", "reference")
    for evidence in promoting:
        better = _sure_gains(
            {n: change for n, change in verdict.differences.items() if n.rpartition(".")[0] == evidence}
        )
        if better:
            reason = f"better in {', '.join(better)}, worse in none"
            return replace(verdict, decision="promote", evidence=evidence, reasons=(reason, *verdict.reasons))
    fell = "auc" in own and own["auc"].value < -TRACK_MARGIN
    return verdict if adapted is None or fell else _by_adapted(verdict, adapted)


def _by_adapted(verdict: Verdict, adapted: ModelPair) -> Verdict:
    """Decide by the crops that the candidate was adapted to: without labels it can still fail on their tracks."""
    found = compare(adapted.before, adapted.after)
    measured = {**verdict.differences, **{f"adapted.{name}": change for name, change in found.differences.items()}}
    verdict = replace(verdict, differences=measured)
    if not found.differences or found.decision == "undecided":
        return verdict
    better = _sure_gains({f"adapted.{name}": change for name, change in found.differences.items()})
    if found.decision == "promote" and not better:  # by clusters, which training itself tightens
        return verdict
    words = (
        f"better in {', '.join(better)}, worse in none" if better else f"on the crops adapted to: {found.reasons[0]}"
    )
    return replace(verdict, decision=found.decision, evidence="adapted", reasons=(words, *verdict.reasons))


def _sure_gains(changes: Mapping[str, Estimate]) -> list[str]:
    """The metrics that rose significantly, as text."""
    return [f"{name} {format_difference(change)}" for name, change in changes.items() if change.low > 0]


def _auc_alone(found: Separation) -> Separation:
    """Only the AUC of a camera: it has too few negatives for a false positive rate of 1 %."""
    return replace(found, figures={"auc": found.figures["auc"]})


def format_difference(change: Estimate) -> str:
    """A difference and its interval."""
    return f"{change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"
