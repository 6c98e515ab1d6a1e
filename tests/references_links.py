"""Slow, loop-written versions of what links between crops mean for labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Link = tuple[int, int, bool]


def closed(links: Sequence[Link], count: int) -> list[int]:
    """Group of each crop by its must-links, numbered by first crop."""
    group = list(range(count))
    changed = True
    while changed:
        changed = False
        for one, other, same in links:
            if same and group[one] != group[other]:
                group[one] = group[other] = min(group[one], group[other])
                changed = True
    return renumbered(group)


def renumbered(labels: Sequence[int]) -> list[int]:
    """0, 1, ... in the order of first appearance; -1 stays."""
    numbers: dict[int, int] = {}
    return [-1 if label == -1 else numbers.setdefault(label, len(numbers)) for label in labels]


def contradicted(links: Sequence[Link], count: int) -> set[int]:
    """Groups whose must-links join two crops with a cannot-link."""
    group = closed(links, count)
    return {group[one] for one, other, same in links if not same and group[one] == group[other]}


def bent(distance: np.ndarray, links: Sequence[Link]) -> np.ndarray:
    """Must-linked pairs 0 apart; cannot-linked groups 1, every crop of one from every crop of the other."""
    out, group = distance.copy(), closed(links, len(distance))
    for one, other, same in links:
        if same:
            out[one, other] = out[other, one] = 0
    for one, other, same in links:
        if not same:
            for i in range(len(out)):
                for j in range(len(out)):
                    if {group[i], group[j]} == {group[one], group[other]}:
                        out[i, j] = 1
    return out


def forced(labels: Sequence[int], links: Sequence[Link], features: np.ndarray) -> list[int]:
    """Labels that obey the links: must-linked crops united, clusters with a cannot-link parted."""
    found, n = list(labels), len(labels)
    group = closed(links, n)
    fresh = max([*found, -1]) + 1
    for i in range(n):  # linked outliers become clusters of their own, to be united
        if found[i] == -1 and group.count(group[i]) > 1:
            found[i], fresh = fresh, fresh + 1
    for one, other, same in links:
        if same:
            lost, kept = found[other], found[one]
            found = [kept if label == lost else label for label in found]
    for label in sorted(set(found) - {-1}):
        members = [i for i in range(n) if found[i] == label]
        foes = {frozenset((group[a], group[b])) for a, b, same in links if not same and found[a] == found[b] == label}
        if foes:
            for i, part in parted(members, group, foes, features).items():
                found[i] = fresh + part
            fresh += n
    for label in set(found) - {-1}:
        if found.count(label) == 1 and label >= max([*labels, -1]) + 1:
            found[found.index(label)] = -1
    return renumbered(found)


def parted(
    members: Sequence[int], group: Sequence[int], foes: set[frozenset[int]], features: np.ndarray
) -> dict[int, int]:
    """Which part each crop of a cluster goes to: anchors agglomerated, the rest to the nearest anchor."""
    anchors = sorted({g for pair in foes for g in pair})
    crops = {g: [i for i in members if group[i] == g] for g in anchors}

    def far(g: int, h: int) -> float:
        if frozenset((g, h)) in foes:
            return np.inf
        return 1 - float(np.mean([features[i] @ features[j] for i in crops[g] for j in crops[h]]))

    parts = [[g] for g in anchors]
    while True:
        tried = [
            (max(far(g, h) for g in parts[a] for h in parts[b]), a, b)
            for a in range(len(parts))
            for b in range(a + 1, len(parts))
        ]
        distance, a, b = min(tried)
        if distance == np.inf:
            break
        parts[a] += parts.pop(b)
    parts.sort(key=min)
    out: dict[int, int] = {}
    for g in sorted({group[i] for i in members}):
        unit = [i for i in members if group[i] == g]
        nearness = [
            float(np.mean([max(features[i] @ features[j] for h in part for j in crops[h]) for i in unit]))
            for part in parts
        ]
        home = [index for index, part in enumerate(parts) if g in part]
        out |= dict.fromkeys(unit, home[0] if home else int(np.argmax(nearness)))
    return out
