"""Two judgements of one store become a verdict: may the candidate take the active model's place?

The rule, from the strongest witness to the weakest (docs/judging.md gives the reasons and what was measured):

1. Features that are unusable, all alike or nearly so beside the active model's, or clusters that collapsed: refuse.
2. Tracks: AUC and true positives at fixed false ones, differences over the same resampled tracks. What lies wholly
   below 0 is worse, wholly above it better. Worse alone refuses, better alone promotes, both together decide nothing.
   Neither: no worse than `TRACK_MARGIN` and clusters that gained promote.
3. Tracks see one camera at a time, so nothing is promoted whose clusters came apart by camera or fell into outliers.
4. Without tracks clusters alone: a silhouette or a mix of cameras that rose promotes, one that fell, or 3, refuses.
   It is weaker: training pulls its own clusters together, right or wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from resight.training.health import CameraMix
from resight.training.judgement import Judgement
from resight.training.separation import CONFIDENCE, Estimate, Separation

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


def compare(before: Judgement, after: Judgement) -> Verdict:
    """Whether a candidate may take the active model's place, by the rule at the top of this file.

    Args:
        before: of the active model.
        after: of the candidate, on the same store with the same seed: both are checked.
    """
    one, other = before.separation, after.separation
    assert (one.digest, one.seed, before.crops) == (other.digest, other.seed, after.crops), "judge one store, one seed"
    changes = differences(one, other)
    unusable = broken(after) or _paled(before, after)
    if unusable:
        return Verdict("refuse", "features", (f"candidate: {unusable}",), changes)
    if broken(before):
        return Verdict("promote", "features", (f"active model: {broken(before)}", "candidate: sound"), changes)
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


def broken(judged: Judgement) -> str:
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


def _paled(before: Judgement, after: Judgement) -> str:
    """Why a candidate's features have lost what told crops apart, against those of a sound active model."""
    if broken(before) or before.variance is None or after.variance is None:
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


def cluster_changes(before: Judgement, after: Judgement) -> tuple[list[str], bool, bool]:
    """Changes in words, whether clusters gained, whether they lost; no words where there is nothing to compare."""
    one, other = before.clusters, after.clusters
    if one is None or other is None or one.cameras is None or other.cameras is None:
        return [], False, False
    (shrunk, grown), told = _mixes(one.cameras, other.cameras)
    told.append(f"outliers {one.outlier_share:.1%} to {other.outlier_share:.1%}")
    lost = shrunk or other.outlier_share > one.outlier_share + OUTLIER_RISE
    gained = grown
    if one.silhouette is not None and other.silhouette is not None:
        told.append(f"silhouette {one.silhouette:.3f} to {other.silhouette:.3f}")
        gained |= other.silhouette > one.silhouette + SILHOUETTE_STEP
        # Crops of several cameras are less alike than those of one: a fall is no loss where cameras now mix.
        lost |= other.silhouette < one.silhouette - SILHOUETTE_STEP and not grown
    return told, gained and not lost, lost


def _mixes(before: CameraMix, after: CameraMix) -> tuple[tuple[bool, bool], list[str]]:
    """Whether clusters mix cameras less or more than they did, and that in words.

    A change counts where it is a step and twice its standard error: a dozen clusters differ by a step by chance.
    """
    was, now = (mix.cameras_per_cluster / mix.chance_cameras_per_cluster for mix in (before, after))
    errors = (mix.cameras_per_cluster_error / mix.chance_cameras_per_cluster for mix in (before, after))
    step = max(MIX_STEP * was, 2 * math.hypot(*errors))
    told = [f"cameras a cluster, of what chance gives, {was:.2f} to {now:.2f}"]
    return (now < was - step, now > was + step), told
