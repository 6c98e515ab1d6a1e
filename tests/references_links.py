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


def forced(labels: Sequence[int], links: Sequence[Link], distance: np.ndarray) -> list[int]:
    """Labels that obey the links: must-linked crops united, clusters with a cannot-link built up again.

    Distances are `bent` already; those of 1 are no edges.
    """
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
        foes = {frozenset((group[a], group[b])) for a, b, same in links if not same and found[a] == found[b] == label}
        if foes:
            members = [i for i in range(n) if found[i] == label]
            for part in agglomerated(members, group, foes, distance):
                for i in part:
                    found[i] = fresh if len(part) > 1 else -1
                fresh += 1
    return renumbered(found)


def agglomerated(
    members: Sequence[int], group: Sequence[int], foes: set[frozenset[int]], distance: np.ndarray
) -> list[list[int]]:
    """Single linkage from groups on, the nearest two parts first that are not two persons."""
    parts = [[i for i in members if group[i] == g] for g in sorted({group[i] for i in members})]
    while True:
        tried = []
        for a in range(len(parts)):
            for b in range(a + 1, len(parts)):
                if not any(frozenset((group[i], group[j])) in foes for i in parts[a] for j in parts[b]):
                    tried.append((min(distance[i, j] for i in parts[a] for j in parts[b]), a, b))
        if not tried or min(tried)[0] >= 1:
            return parts
        _, a, b = min(tried)
        parts[a] += parts.pop(b)
