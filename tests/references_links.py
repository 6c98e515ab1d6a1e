"""Loop implementations of links as constraints on labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Link = tuple[int, int, bool]


def link_groups(links: Sequence[Link], count: int) -> list[int]:
    """Group of each crop by its must-links, numbered by first crop."""
    group = list(range(count))
    changed = True
    while changed:
        changed = False
        for one, other, same in links:
            if same and group[one] != group[other]:
                group[one] = group[other] = min(group[one], group[other])
                changed = True
    return renumber(group)


def renumber(labels: Sequence[int]) -> list[int]:
    """Labels 0, 1, ... in the order of first appearance; -1 is unchanged."""
    numbers: dict[int, int] = {}
    return [-1 if label == -1 else numbers.setdefault(label, len(numbers)) for label in labels]


def contradicted(links: Sequence[Link], count: int) -> set[int]:
    """Groups whose must-links join two crops with a cannot-link."""
    group = link_groups(links, count)
    return {group[one] for one, other, same in links if not same and group[one] == group[other]}


def adjusted_distances(distance: np.ndarray, links: Sequence[Link]) -> np.ndarray:
    """Distances with 0 for must-links and 1 between all crops of cannot-linked groups."""
    out, group = distance.copy(), link_groups(links, len(distance))
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


def repaired_labels(labels: Sequence[int], links: Sequence[Link], distance: np.ndarray) -> list[int]:
    """Labels that satisfy the links: must-linked crops merged, clusters with a cannot-link rebuilt.

    Distances are those of `adjusted_distances`; a distance of 1 is no edge.
    """
    found, n = list(labels), len(labels)
    group = link_groups(links, n)
    fresh = max([*found, -1]) + 1
    for i in range(n):  # linked outliers become separate clusters that are merged below
        if found[i] == -1 and group.count(group[i]) > 1:
            found[i], fresh = fresh, fresh + 1
    for one, other, same in links:
        if same:
            old, new = found[other], found[one]
            found = [new if label == old else label for label in found]
    for label in sorted(set(found) - {-1}):
        cannot = {frozenset((group[a], group[b])) for a, b, same in links if not same and found[a] == found[b] == label}
        if cannot:
            members = [i for i in range(n) if found[i] == label]
            for part in agglomerated(members, group, cannot, distance):
                for i in part:
                    found[i] = fresh if len(part) > 1 else -1
                fresh += 1
    return renumber(found)


def agglomerated(
    members: Sequence[int], group: Sequence[int], cannot: set[frozenset[int]], distance: np.ndarray
) -> list[list[int]]:
    """Single linkage of groups, nearest parts first, without joining cannot-linked groups."""
    parts = [[i for i in members if group[i] == g] for g in sorted({group[i] for i in members})]
    while True:
        tried = []
        for a in range(len(parts)):
            for b in range(a + 1, len(parts)):
                if not any(frozenset((group[i], group[j])) in cannot for i in parts[a] for j in parts[b]):
                    tried.append((min(distance[i, j] for i in parts[a] for j in parts[b]), a, b))
        if not tried or min(tried)[0] >= 1:
            return parts
        _, a, b = min(tried)
        parts[a] += parts.pop(b)
