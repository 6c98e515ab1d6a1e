"""The gate of a cycle: what a candidate must not lose, whatever else it gains.

`compare` of `verdict` says whether a candidate is better on the site. Here it must also be no worse where that cannot
see: on crops of earlier nights (the reference store), in any one camera, in searches with strangers, on pairs that
operators have confirmed or rejected, and in speed; and the crops themselves must be sound (`hygiene`). One such loss
refuses. Where tracks are too few to tell better from worse, labelled pairs or searches may promote instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from resight.training.faults import doubles, one_person, unsound
from resight.training.hygiene import Hygiene
from resight.training.judgement import Judgement
from resight.training.latency import Latency
from resight.training.separation import CONFIDENCE, Estimate, Separation
from resight.training.verdict import TRACK_MARGIN, Evidence, Verdict, cluster_changes, compare, differences

RATE_MARGIN = 0.02  # of a share: what goes with TRACK_MARGIN of AUC among the encoders in docs/judging.md

Loss = tuple[Evidence, str]


@dataclass(frozen=True, eq=False)
class Rivals:
    """Both models on one store.

    Attributes:
        before: of the active model.
        after: of the candidate.
    """

    before: Judgement
    after: Judgement


def gate(
    site: Rivals,
    *,
    reference: Rivals | None = None,
    adapted: Rivals | None = None,
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
    spoilt = [*unsound(hygiene or {}), *one_person(site.before, None if reference is None else reference.before)]
    losses: list[Loss] = [("crops", words) for words in spoilt]
    losses += _losses(site, "", told)
    if reference is not None:
        losses += _worse_before(reference, told)
        losses += _losses(reference, "reference.", told)
    if latency is not None and latency.exceeded:
        words = f"a batch takes {latency.ratio:.2f} times as long as with the active model, allowed {latency.limit:g}"
        losses.append(("latency", words))
    if losses:
        reasons = (*(words for _, words in losses), *verdict.reasons)
        evidence = verdict.evidence if verdict.evidence == "features" and losses[0][0] != "crops" else losses[0][0]
        return Verdict("refuse", evidence, reasons, told)
    found = _gained(replace(verdict, differences=told), site, adapted)
    parts = {"these crops": site, "the crops adapted to": adapted}
    words = next((words for which, part in parts.items() if part and (words := doubles(which, part.before))), "")
    if found.decision == "undecided" and words:
        return replace(found, decision="refuse", evidence="crops", reasons=(words, *found.reasons))
    return found


def _losses(rivals: Rivals, where: str, told: dict[str, Estimate]) -> Iterator[Loss]:
    """Searches, labelled pairs and single cameras that the candidate is surely worse in; writes what it measured."""
    before, after = rivals.before, rivals.after
    if not after.problem and not before.problem:
        yield from _compared(before.searches, after.searches, "searches", f"{where}searches.", told)
    if before.links is not None and after.links is not None:
        yield from _compared(before.links, after.links, "links", f"{where}links.", told)
    both = before.cameras.keys() & after.cameras.keys()
    for name in sorted(both):
        # One of many cameras falls by chance where each may with 5 %: Bonferroni's correction.
        confidence = 1 - (1 - CONFIDENCE) / len(both)
        one, other = (_auc_alone(side.cameras[name]) for side in (before, after))
        yield from _compared(one, other, "cameras", f"{where}cameras.{name}.", told, confidence=confidence)


def _compared(
    before: Separation,
    after: Separation,
    evidence: Evidence,
    prefix: str,
    told: dict[str, Estimate],
    *,
    confidence: float = CONFIDENCE,
) -> Iterator[Loss]:
    """Differences of two models under a prefix, and those that are losses."""
    for name, change in differences(before, after, confidence=confidence).items():
        told[prefix + name] = change
        if _lost(name, change):
            yield evidence, f"worse in {prefix}{name}: {words_of(change)}"


def _worse_before(reference: Rivals, told: dict[str, Estimate]) -> Iterator[Loss]:
    """What the candidate forgot of earlier nights."""
    verdict = compare(reference.before, reference.after)
    told |= {f"reference.{name}": change for name, change in verdict.differences.items()}
    if verdict.decision == "refuse" and not verdict.differences:
        yield "reference", f"on the reference crops: {'; '.join(verdict.reasons)}"
    elif verdict.evidence == "features" and verdict.decision == "refuse":
        yield "reference", f"on the reference crops: {verdict.reasons[0]}"
    for name, change in verdict.differences.items():
        if _lost(name, change):
            yield "reference", f"worse in reference.{name}: {words_of(change)}"


def _lost(name: str, change: Estimate) -> bool:
    """Whether a figure surely fell, and by more than may be left to take."""
    margin = TRACK_MARGIN if name == "auc" else RATE_MARGIN
    return change.high < 0 and change.value < -margin


def _gained(verdict: Verdict, site: Rivals, adapted: Rivals | None) -> Verdict:
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
        better = _better({n: change for n, change in verdict.differences.items() if n.rpartition(".")[0] == evidence})
        if better:
            reason = f"better in {', '.join(better)}, worse in none"
            return replace(verdict, decision="promote", evidence=evidence, reasons=(reason, *verdict.reasons))
    fell = "auc" in own and own["auc"].value < -TRACK_MARGIN
    return verdict if adapted is None or fell else _by_adapted(verdict, adapted)


def _by_adapted(verdict: Verdict, adapted: Rivals) -> Verdict:
    """The candidate has seen these crops, but never who is on them: on tracks it can still fail."""
    found = compare(adapted.before, adapted.after)
    told = {**verdict.differences, **{f"adapted.{name}": change for name, change in found.differences.items()}}
    verdict = replace(verdict, differences=told)
    if not found.differences or found.decision == "undecided":
        return verdict
    better = _better({f"adapted.{name}": change for name, change in found.differences.items()})
    if found.decision == "promote" and not better:  # by clusters, which adaptation itself made tight
        return verdict
    words = (
        f"better in {', '.join(better)}, worse in none" if better else f"on the crops adapted to: {found.reasons[0]}"
    )
    return replace(verdict, decision=found.decision, evidence="adapted", reasons=(words, *verdict.reasons))


def _better(changes: Mapping[str, Estimate]) -> list[str]:
    """Which figures surely rose, in words."""
    return [f"{name} {words_of(change)}" for name, change in changes.items() if change.low > 0]


def _auc_alone(found: Separation) -> Separation:
    """A camera's AUC: of one camera there are too few negatives for a share of 1 in 100."""
    return replace(found, figures={"auc": found.figures["auc"]})


def words_of(change: Estimate) -> str:
    """A difference and its interval."""
    return f"{change.value:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"
