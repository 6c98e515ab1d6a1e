"""Camera-aware proxies: the crops of one cluster seen by one camera (CAP, AAAI 2021; O2CAP, TIP 2022).

Letters: N crops, K clusters, P proxies, C cameras that have any.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resight.training.dbscan import OUTLIER
from resight.training.neighbours import Ints


@dataclass(frozen=True)
class Proxies:
    """Who belongs to which proxy.

    Attributes:
        labels: int64 (N,), 0..P-1, -1 for outliers.
        clusters: int64 (P,), the cluster each proxy is a part of.
        cameras: int64 (P,), the camera each proxy is seen by, 0..C-1 whatever numbers the store has.
    """

    labels: Ints
    clusters: Ints
    cameras: Ints

    def __len__(self) -> int:
        return len(self.clusters)


def split_by_camera(labels: Ints, cameras: Ints) -> Proxies:
    """Part every cluster by camera (O2CAP, section 3.2).

    Args:
        labels: int64 (N,), clusters, -1 for outliers.
        cameras: int64 (N,), any numbers.

    Returns:
        Proxies ordered by cluster, then by camera.
    """
    inliers = np.flatnonzero(labels != OUTLIER)
    pairs = np.stack([labels[inliers], cameras[inliers]], 1)
    kinds, proxy = np.unique(pairs, axis=0, return_inverse=True)
    out = np.full(len(labels), OUTLIER, np.int64)
    out[inliers] = proxy.ravel()
    _, numbered = np.unique(kinds[:, 1], return_inverse=True)
    return Proxies(out, kinds[:, 0].astype(np.int64), numbered.ravel().astype(np.int64))
