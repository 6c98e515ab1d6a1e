"""Taking away what all crops of one camera share: walls, light and colour casts.

Letters: N crops, D feature size, C cameras.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from resight.training.neighbours import Floats, Ints


def centre_cameras(features: Floats, cameras: Ints) -> Floats:
    """Take each camera's mean feature away, so that people are compared and not walls and colour casts.

    Cameras see much the same people over time; what all crops of one camera share is therefore the camera's.
    The mean of a few crops is rather that of a few people: it is drawn towards the mean of all crops as far as
    chance explains its distance (see `_trust`). Rows that are nothing but their camera's mean stay as they are.

    Args:
        features: float32 (N, D), unit rows.
        cameras: int64 (N,), any numbers.

    Returns:
        float32 (N, D), unit rows.
    """
    _, number, counts = np.unique(cameras, return_inverse=True, return_counts=True)
    members = sparse.csr_matrix((np.ones(len(number), np.float32), (number, np.arange(len(number)))))  # (C, N)
    offsets = (members @ features) / counts[:, None] - features.mean(0)  # (C, D)
    offsets *= _trust(features, offsets, counts)[:, None]
    centred = features - (features.mean(0) + offsets)[number]
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.where(length > 1e-6, centred / np.maximum(length, 1e-6), features).astype(np.float32)


def _trust(features: Floats, offsets: NDArray[np.float64], counts: Ints) -> NDArray[np.float64]:
    """Share of each camera's offset that is the camera's, in [0, 1]: (C,).

    The empirical-Bayes estimate n / (n + s / t) for n crops (Efron and Morris 1973): s, the variance of crops
    within cameras, and t, that of cameras beyond it, follow from the analysis of variance of unbalanced groups.
    """
    total, groups = len(features), len(counts)
    between = float((counts * (offsets**2).sum(1)).sum())
    within = float(((features - features.mean(0)) ** 2).sum()) - between
    noise = within / max(total - groups, 1)
    spread = (between - (groups - 1) * noise) / max(total - float((counts**2).sum()) / total, 1.0)
    if total == groups or spread <= 0:  # nothing tells a camera from chance
        return np.zeros(groups)
    return np.asarray(counts * spread / (counts * spread + noise))
