"""Which crops form a batch: four samplers. Letters: B batch, P clusters a batch, K crops a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from resight.errors import TrainingError
from resight.training.neighbours import Ints


def camera_batches(
    labels: Ints, cameras: Ints, *, batch: int, instances: int, rng: np.random.Generator
) -> Iterator[Ints]:
    """Endless batches of `instances` crops of each cluster, partners from other cameras where there are any.

    The multiple-gallery sampler of SpCL, Cluster Contrast and LP: each pass visits every cluster once in random
    order and takes a random anchor, then instances - 1 crops of the cluster's other cameras, or of the same
    camera where it has no other (with replacement only where there are too few). A cluster of one crop gives
    that crop alone. Passes follow each other without a gap, so that few clusters still fill a batch; crops of
    one cluster stay together, which grouped batch norm relies on.

    Args:
        labels: int64 (N,), -1 for outliers, which are never drawn.
        cameras: int64 (N,), any values.
        batch: B, crops a batch.
        instances: K.
        rng: the only source of chance.

    Yields:
        int64 (B,), rows of the store.

    Raises:
        TrainingError: no crop has a label.
    """
    return _fill(labels, batch, rng, lambda rows: _instances(rows, cameras, instances, rng))


def balanced_batches(
    labels: Ints, cameras: Ints, *, batch: int, instances: int, rng: np.random.Generator
) -> Iterator[Ints]:
    """Endless batches of `instances` crops of each cluster, as evenly over the cluster's cameras as can be.

    Cameras take turns in random order; a camera that has no crop left begins again only when all have none.
    Arguments, errors and passes as `camera_batches`.
    """
    return _fill(labels, batch, rng, lambda rows: _spread(rows, cameras, instances, rng))


def proxy_batches(labels: Ints, *, batch: int, instances: int, rng: np.random.Generator) -> Iterator[Ints]:
    """Endless batches of `instances` crops of each proxy (O2CAP's proxy-uniform sampler).

    A proxy with fewer crops gives its list repeated `instances` times, shuffled and cut, as the released code
    does, so that it may repeat a crop and leave another out. Arguments, errors and passes as `camera_batches`.
    """

    def draw(rows: Ints) -> list[int]:
        if len(rows) >= instances:
            return list(rng.choice(rows, instances, replace=False))
        return list(rng.permutation(np.tile(rows, instances))[:instances])

    return _fill(labels, batch, rng, draw)


def shuffled_batches(count: int, *, batch: int, rng: np.random.Generator) -> Iterator[Ints]:
    """Endless batches of all `count` crops in passes of random order, no crop twice in a batch.

    Raises:
        TrainingError: fewer crops than a batch needs.
    """
    if count < batch:
        raise TrainingError(f"{count} crops do not fill a batch of {batch}: lower `batch` in the recipe")
    while True:
        order = rng.permutation(count)
        for start in range(0, count - batch + 1, batch):  # the released loader drops the rest of a pass
            yield order[start : start + batch]


def _fill(labels: Ints, batch: int, rng: np.random.Generator, draw: Callable[[Ints], list[int]]) -> Iterator[Ints]:
    """Visit every label in random order, again and again, and cut what is drawn into batches."""
    members = _members(labels)
    if not members:
        raise TrainingError("no crop has a label: expected clusters to draw batches from")
    return _cut((draw(members[label]) for label in _endless(len(members), rng)), batch)


def _endless(count: int, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(count)


def _cut(drawn: Iterable[list[int]], batch: int) -> Iterator[Ints]:
    waiting: list[int] = []
    for rows in drawn:
        waiting.extend(rows)
        while len(waiting) >= batch:
            yield np.asarray(waiting[:batch])
            waiting = waiting[batch:]


def _members(labels: Ints) -> list[Ints]:
    """Rows of each label, in ascending order of label."""
    inliers = np.flatnonzero(labels >= 0)
    order = inliers[np.argsort(labels[inliers], kind="stable")]
    _, starts = np.unique(labels[order], return_index=True)
    return np.split(order, starts[1:]) if len(order) else []


def _instances(rows: Ints, cameras: Ints, count: int, rng: np.random.Generator) -> list[int]:
    """An anchor and its partners; one row where there is no partner."""
    anchor = rng.choice(rows)
    others = rows[rows != anchor]
    elsewhere = others[cameras[others] != cameras[anchor]]
    partners = elsewhere if len(elsewhere) else others
    if not len(partners) or count == 1:
        return [int(anchor)]
    chosen = rng.choice(partners, count - 1, replace=len(partners) < count - 1)
    return [int(anchor), *chosen.tolist()]


def _spread(rows: Ints, cameras: Ints, count: int, rng: np.random.Generator) -> list[int]:
    """`count` rows in rounds over the cameras; rows repeat only where there are too few."""
    shuffled = rng.permutation(rows)
    _, number = np.unique(cameras[shuffled], return_inverse=True)
    turn = _turns(number) + rng.permutation(number.max() + 1)[number] / (number.max() + 1.0)
    order = shuffled[np.argsort(turn, kind="stable")]
    return list(np.resize(order, count))


def _turns(number: Ints) -> Ints:
    """How many equal numbers stand before each position: [5, 7, 5, 5] -> [0, 0, 1, 2]."""
    order = np.argsort(number, kind="stable")
    first = np.searchsorted(number[order], number[order], side="left")
    turn = np.empty_like(order)
    turn[order] = np.arange(len(number)) - first
    return turn
