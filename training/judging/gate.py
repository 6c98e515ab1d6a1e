"""Two judgements of one store become a verdict: may the candidate take the active model's place?

The rule, from the strongest witness to the weakest (docs/judging.md gives the reasons and what was measured):

1. Features that are unusable, all alike or nearly so beside the active model's, or clusters that collapsed: refuse.
2. Tracks: AUC and true positives at fixed false ones, differences over the same resampled tracks. What lies wholly
   below 0 is worse, wholly above it better. Worse alone refuses, better alone promotes, both together decide nothing.
   Neither: no worse than `TRACK_MARGIN` and clusters that gained promote.
3. Tracks see one camera at a time, so nothing is promoted whose clusters came apart by camera or fell into outliers.
4. Without tracks clusters alone: a silhouette or a mix of cameras that rose promotes, one that fell, or 3, refuses.
   It is weaker: training pulls its own clusters together, right or wrong.

Signs that crops are at fault and no model: what hygiene found, one person for all, one person beside himself.

Whoever adapts to such crops learns the fault, and whoever is judged on them is judged by it.

The gate of a cycle: what a candidate must not lose, whatever else it gains.

`compare` of `verdict` says whether a candidate is better on the site. Here it must also be no worse where that cannot
see: on crops of earlier nights (the reference store), in any one camera, in searches with strangers, on pairs that
operators have confirmed or rejected, and in speed; and the crops themselves must be sound (`hygiene`). One such loss
refuses. Where tracks are too few to tell better from worse, labelled pairs or searches may promote instead.
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
MIN_VARIANCE = 1e-4  # half of it is the step of half precision just below a cosine of 1
VARIANCE_FALL = 0.1  # what must be left of the active model's; encoders in docs/judging.md have 0.61 to 0.86
TRACK_MARGIN = 0.005  # of AUC: a third of what separates 57.7 and 65.5 mAP in docs/judging.md
SILHOUETTE_STEP = 0.05  # late epochs of one run differ by up to 0.02 (docs/judging.md)
MIX_STEP = 0.1  # of the camera mix; sound encoders in docs/judging.md differ by less
OUTLIER_RISE = 0.1  # share of all crops that may become outliers


@dataclass(frozen=True)
class Verdict:
    """What to do with a candidate.

    Attributes:
        decision: "promote", "refuse" or "undecided"; a cycle keeps the active model unless told to promote.
        evidence: what decided; "none" where there was nothing to go by.
        reasons: in words, with the figures.
        differences: after minus before of each figure on tracks that both have, with its interval.
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
    """Whether a candidate may take the active model's place, by the rule at the top of this file.

    Args:
        before: of the active model.
        after: of the candidate, on the same store with the same seed: both are checked.
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
    """After minus before of each figure both have; the same tracks stand behind each pair of resamples.

    Args:
        before: of the active model.
        after: of the candidate, on the same pairs: that is checked.
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
    """Why a model must not serve whatever else is said of it; empty for a sound one."""
    if judged.problem or judged.collapse:
        return judged.problem or judged.collapse
    if judged.variance is not None and judged.variance < MIN_VARIANCE:
        return f"all crops look alike to it: variance {judged.variance:.2g}, expected {MIN_VARIANCE} or more"
    clusters = judged.clusters
    if clusters is not None and clusters.collapsed:
        return (
            f"its clusters collapsed: {clusters.clusters}, the largest with {clusters.largest_share:.0%} of all crops"
        )
    return ""


def _variance_loss(before: ModelJudgement, after: ModelJudgement) -> str:
    """Why a candidate's features have lost what told crops apart, against those of a sound active model."""
    if unusable_reason(before) or before.variance is None or after.variance is None:
        return ""
    if after.variance >= VARIANCE_FALL * before.variance:
        return ""
    change = f"variance {before.variance:.2g} to {after.variance:.2g}"
    return f"crops look far more alike to it than to the active model: {change}"


def _by_tracks(changes: Mapping[str, Estimate], health: list[str], gained: bool, lost: bool) -> Verdict:
    """Rules 2 and 3."""
    told = [f"{name} {change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}]" for name, change in changes.items()]
    worse = [name for name, change in changes.items() if change.high < 0]
    better = [name for name, change in changes.items() if change.low > 0]
    harmless = changes["auc"].low >= -TRACK_MARGIN
    decision: Decision = "undecided"
    if worse and better:
        why = f"better in {', '.join(better)} and worse in {', '.join(worse)}"
    elif worse:
        decision, why = "refuse", f"worse in {', '.join(worse)}"
    elif better and lost:
        why = f"better in {', '.join(better)}, but its clusters lost what tracks of single cameras cannot show"
    elif better:
        decision, why = "promote", f"better in {', '.join(better)}, worse in none"
    elif harmless and gained and not lost:
        decision, why = "promote", f"on tracks no worse than {TRACK_MARGIN} in AUC, and its clusters gained"
    else:
        why = "neither better nor worse on tracks beyond chance"
    return Verdict(decision, "tracks", (why, *told, *health), changes)


def cluster_changes(before: ModelJudgement, after: ModelJudgement) -> tuple[list[str], bool, bool]:
    """Changes in words, whether clusters gained, whether they lost; no words where there is nothing to compare."""
    one, other = before.clusters, after.clusters
    if one is None or other is None or one.cameras is None or other.cameras is None:
        return [], False, False
    (shrunk, grown), told = _camera_mixes(one.cameras, other.cameras)
    told.append(f"outliers {one.outlier_share:.1%} to {other.outlier_share:.1%}")
    lost = shrunk or other.outlier_share > one.outlier_share + OUTLIER_RISE
    gained = grown
    if one.silhouette is not None and other.silhouette is not None:
        told.append(f"silhouette {one.silhouette:.3f} to {other.silhouette:.3f}")
        gained |= other.silhouette > one.silhouette + SILHOUETTE_STEP
        # Crops of several cameras are less alike than those of one: a fall is no loss where cameras now mix.
        lost |= other.silhouette < one.silhouette - SILHOUETTE_STEP and not grown
    return told, gained and not lost, lost


def _camera_mixes(before: CameraMix, after: CameraMix) -> tuple[tuple[bool, bool], list[str]]:
    """Whether clusters mix cameras less or more than they did, and that in words.

    A change counts where it is a step and twice its standard error: a dozen clusters differ by a step by chance.
    """
    was, now = (mix.cameras_per_cluster / mix.chance_cameras_per_cluster for mix in (before, after))
    errors = (mix.cameras_per_cluster_error / mix.chance_cameras_per_cluster for mix in (before, after))
    step = max(MIX_STEP * was, 2 * math.hypot(*errors))
    told = [f"cameras a cluster, of what chance gives, {was:.2f} to {now:.2f}"]
    return (now < was - step, now > was + step), told


SINGLE_PERSON_VARIANCE = (
    0.6  # of the variance elsewhere: one real person has 0.3-0.5, five have 0.83 (medians, docs/judging.md)
)
WHOLE_TRACK_SHARE = 0.5  # of tracks in one cluster: a model that parts tracks says nothing of persons (docs/judging.md)
CONFUSED_SHARE = 0.1  # share of such pairs in one cluster, surely exceeded; models above WHOLE have up to 0.08


def hygiene_problems(hygiene: Mapping[str, Hygiene]) -> Iterator[str]:
    """What is wrong with crops by their pixels.

    Args:
        hygiene: by the words for which crops they are.
    """
    for which, found in hygiene.items():
        for words in found.messages():
            yield f"{which}: {words}"


def single_person_signs(active: ModelJudgement, elsewhere: ModelJudgement | None) -> Iterator[str]:
    """Crops that a sound active model finds nearly all alike show one person, whatever a candidate makes of them.

    Args:
        active: the model in use, on the crops.
        elsewhere: the same on crops of earlier nights.
    """
    if active.problem:
        return
    seen = None if elsewhere is None or unusable_reason(elsewhere) else elsewhere.variance
    collapsed = active.collapse or (active.clusters is not None and active.clusters.collapsed)
    if seen is not None and active.variance is not None and active.variance < SINGLE_PERSON_VARIANCE * seen:
        change = f"variance {active.variance:.2g}, on the reference crops {seen:.2g}"
        yield f"to the active model these crops are as alike as those of one person: {change}"
    elif collapsed and seen is not None:
        yield "the active model sees one person on most crops, and many on the reference crops"
    elif collapsed and not active.separation.figures:
        yield "the active model sees one person on most crops, and too few tracks overlap to show it wrong"


def duplicate_person_sign(which: str, active: ModelJudgement) -> str:
    """Why a model that keeps tracks whole finds people alike who were there at once: the same person fed many times.

    It speaks against nobody who gained: where all wear one uniform people are alike too.

    Args:
        which: words for the crops.
        active: the model in use, on them.

    Returns:
        Empty where there is no such sign.
    """
    kept = None if active.clusters is None else active.clusters.tracks
    if kept is None or kept.whole_share is None or kept.confused_share is None or kept.whole_share < WHOLE_TRACK_SHARE:
        return ""
    confused = round(kept.confused_share * kept.compared_pairs)
    if wilson_interval(confused, kept.compared_pairs).low <= CONFUSED_SHARE:
        return ""
    return (
        f"of {kept.compared_pairs} pairs of tracks that were in one picture of {which} at once {confused} look like "
        "one person to the active model: the same person again and again, or a tracker that parts people"
    )


RATE_MARGIN = 0.02  # of a share: what goes with TRACK_MARGIN of AUC among the encoders in docs/judging.md

FigureLoss = tuple[Evidence, str]


@dataclass(frozen=True, eq=False)
class ModelPair:
    """Both models on one store.

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
    """Decide whether a candidate may take the active model's place.

    Args:
        site: both models on crops of the site that the candidate has not seen, where there are such.
        reference: both on the frozen crops of earlier nights.
        adapted: both on the crops that the candidate was adapted to: heard where nothing else decides.
        hygiene: what is wrong with crops, by the words for which crops they are ("crops it was adapted to").
        latency: of both, with the limit allowed.

    Returns:
        With every difference measured, those beyond the tracks of the site under dotted names such as
        `reference.auc`, `cameras.entrance.auc` or `links.accuracy`.
    """
    verdict = compare(site.before, site.after)
    told: dict[str, Estimate] = dict(verdict.differences)
    spoilt = [
        *hygiene_problems(hygiene or {}),
        *single_person_signs(site.before, None if reference is None else reference.before),
    ]
    losses: list[FigureLoss] = [("crops", words) for words in spoilt]
    losses += _figure_losses(site, "", told)
    if reference is not None:
        losses += _worse_on_reference(reference, told)
        losses += _figure_losses(reference, "reference.", told)
    if latency is not None and latency.exceeded:
        words = f"a batch takes {latency.ratio:.2f} times as long as with the active model, allowed {latency.limit:g}"
        losses.append(("latency", words))
    if losses:
        reasons = (*(words for _, words in losses), *verdict.reasons)
        evidence = verdict.evidence if verdict.evidence == "features" and losses[0][0] != "crops" else losses[0][0]
        return Verdict("refuse", evidence, reasons, told)
    found = _gain_elsewhere(replace(verdict, differences=told), site, adapted)
    parts = {"these crops": site, "the crops adapted to": adapted}
    words = next(
        (words for which, part in parts.items() if part and (words := duplicate_person_sign(which, part.before))), ""
    )
    if found.decision == "undecided" and words:
        return replace(found, decision="refuse", evidence="crops", reasons=(words, *found.reasons))
    return found


def _figure_losses(rivals: ModelPair, where: str, told: dict[str, Estimate]) -> Iterator[FigureLoss]:
    """Searches, labelled pairs and single cameras that the candidate is surely worse in; writes what it measured."""
    before, after = rivals.before, rivals.after
    if not after.problem and not before.problem:
        yield from _compare_figures(before.searches, after.searches, "searches", f"{where}searches.", told)
    if before.links is not None and after.links is not None:
        yield from _compare_figures(before.links, after.links, "links", f"{where}links.", told)
    both = before.cameras.keys() & after.cameras.keys()
    for name in sorted(both):
        # One of many cameras falls by chance where each may with 5 %: Bonferroni's correction.
        confidence = 1 - (1 - CONFIDENCE) / len(both)
        one, other = (_auc_alone(side.cameras[name]) for side in (before, after))
        yield from _compare_figures(one, other, "cameras", f"{where}cameras.{name}.", told, confidence=confidence)


def _compare_figures(
    before: Separation,
    after: Separation,
    evidence: Evidence,
    prefix: str,
    told: dict[str, Estimate],
    *,
    confidence: float = CONFIDENCE,
) -> Iterator[FigureLoss]:
    """Differences of two models under a prefix, and those that are losses."""
    for name, change in differences(before, after, confidence=confidence).items():
        told[prefix + name] = change
        if _is_loss(name, change):
            yield evidence, f"worse in {prefix}{name}: {format_difference(change)}"


def _worse_on_reference(reference: ModelPair, told: dict[str, Estimate]) -> Iterator[FigureLoss]:
    """What the candidate forgot of earlier nights."""
    verdict = compare(reference.before, reference.after)
    told |= {f"reference.{name}": change for name, change in verdict.differences.items()}
    if verdict.decision == "refuse" and not verdict.differences:
        yield "reference", f"on the reference crops: {'; '.join(verdict.reasons)}"
    elif verdict.evidence == "features" and verdict.decision == "refuse":
        yield "reference", f"on the reference crops: {verdict.reasons[0]}"
    for name, change in verdict.differences.items():
        if _is_loss(name, change):
            yield "reference", f"worse in reference.{name}: {format_difference(change)}"


def _is_loss(name: str, change: Estimate) -> bool:
    """Whether a figure surely fell, and by more than may be left to take."""
    margin = TRACK_MARGIN if name == "auc" else RATE_MARGIN
    return change.high < 0 and change.value < -margin


def _gain_elsewhere(verdict: Verdict, site: ModelPair, adapted: ModelPair | None) -> Verdict:
    """What decides where the site's tracks are too few to: a sure gain elsewhere, nothing being worse."""
    if verdict.evidence == "clusters" and adapted is not None and adapted.after.separation.figures:
        # Clusters of a few held out tracks are each a track: tracks of more crops say more.
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
    """The candidate has seen these crops, but never who is on them: on tracks it can still fail."""
    found = compare(adapted.before, adapted.after)
    told = {**verdict.differences, **{f"adapted.{name}": change for name, change in found.differences.items()}}
    verdict = replace(verdict, differences=told)
    if not found.differences or found.decision == "undecided":
        return verdict
    better = _sure_gains({f"adapted.{name}": change for name, change in found.differences.items()})
    if found.decision == "promote" and not better:  # by clusters, which adaptation itself made tight
        return verdict
    words = (
        f"better in {', '.join(better)}, worse in none" if better else f"on the crops adapted to: {found.reasons[0]}"
    )
    return replace(verdict, decision=found.decision, evidence="adapted", reasons=(words, *verdict.reasons))


def _sure_gains(changes: Mapping[str, Estimate]) -> list[str]:
    """Which figures surely rose, in words."""
    return [f"{name} {format_difference(change)}" for name, change in changes.items() if change.low > 0]


def _auc_alone(found: Separation) -> Separation:
    """A camera's AUC: of one camera there are too few negatives for a share of 1 in 100."""
    return replace(found, figures={"auc": found.figures["auc"]})


def format_difference(change: Estimate) -> str:
    """A difference and its interval."""
    return f"{change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"
