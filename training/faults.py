"""Signs that crops are at fault and no model: what hygiene found, one person for all, one person beside himself.

Whoever adapts to such crops learns the fault, and whoever is judged on them is judged by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from resight.training.agreement import wilson
from resight.training.hygiene import Hygiene
from resight.training.judgement import Judgement
from resight.training.verdict import broken

ONE_PERSON = 0.6  # of the variance elsewhere: one real person has 0.3-0.5, five have 0.83 (medians, docs/judging.md)
WHOLE = 0.5  # of tracks in one cluster: a model that parts tracks says nothing of persons (docs/judging.md)
CONFUSED = 0.1  # share of such pairs in one cluster, surely exceeded; models above WHOLE have up to 0.08


def unsound(hygiene: Mapping[str, Hygiene]) -> Iterator[str]:
    """What is wrong with crops by their pixels.

    Args:
        hygiene: by the words for which crops they are.
    """
    for which, found in hygiene.items():
        for words in found.told():
            yield f"{which}: {words}"


def one_person(active: Judgement, elsewhere: Judgement | None) -> Iterator[str]:
    """Crops that a sound active model finds nearly all alike show one person, whatever a candidate makes of them.

    Args:
        active: the model in use, on the crops.
        elsewhere: the same on crops of earlier nights.
    """
    if active.problem:
        return
    seen = None if elsewhere is None or broken(elsewhere) else elsewhere.variance
    collapsed = active.collapse or (active.clusters is not None and active.clusters.collapsed)
    if seen is not None and active.variance is not None and active.variance < ONE_PERSON * seen:
        change = f"variance {active.variance:.2g}, on the reference crops {seen:.2g}"
        yield f"to the active model these crops are as alike as those of one person: {change}"
    elif collapsed and seen is not None:
        yield "the active model sees one person on most crops, and many on the reference crops"
    elif collapsed and not active.separation.figures:
        yield "the active model sees one person on most crops, and too few tracks overlap to show it wrong"


def doubles(which: str, active: Judgement) -> str:
    """Why a model that keeps tracks whole finds people alike who were there at once: the same person fed many times.

    It speaks against nobody who gained: where all wear one uniform people are alike too.

    Args:
        which: words for the crops.
        active: the model in use, on them.

    Returns:
        Empty where there is no such sign.
    """
    kept = None if active.clusters is None else active.clusters.tracks
    if kept is None or kept.whole_share is None or kept.confused_share is None or kept.whole_share < WHOLE:
        return ""
    confused = round(kept.confused_share * kept.compared_pairs)
    if wilson(confused, kept.compared_pairs).low <= CONFUSED:
        return ""
    return (
        f"of {kept.compared_pairs} pairs of tracks that were in one picture of {which} at once {confused} look like "
        "one person to the active model: the same person again and again, or a tracker that parts people"
    )
