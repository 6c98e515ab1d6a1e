"""Which crops form a batch. Letters: B batch, P clusters a batch, K crops a cluster."""

from __future__ import annotations

from collections.abc import Iterator

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
    members = _members(labels)
    if not members:
        raise TrainingError("no crop has a label: expected clusters to draw batches from")
    waiting: list[int] = []
    while True:
        for cluster in rng.permutation(len(members)):
            waiting.extend(_instances(members[cluster], cameras, instances, rng))
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
