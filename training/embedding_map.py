"""Features in the plane: which crops a map shows, and where t-SNE puts them.

t-SNE (van der Maaten and Hinton 2008; Barnes-Hut, van der Maaten 2014) by scikit-learn. It keeps neighbours
together; distances between far groups and their sizes mean nothing.

Letters: N crops, M crops shown, D feature size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from resight.training.crops import CropStore
from resight.training.neighbours import Floats, Ints, nearest
from resight.training.scatter import NOBODY, EmbeddingMap

AT_MOST = 2000  # 6 s on one core, and as many marks as a panel can hold apart
LEAST = 10  # fewer points are no picture
COMPONENTS = 50  # before t-SNE, as scikit-learn's manual advises: it takes noise and time away
PERPLEXITY = 30.0  # scikit-learn's default; 5 to 50 in the paper
SEED = 0
NEIGHBOURS = 10  # of a crop, asked for their camera
STILL = 1e-6  # a spread below this is rounding: all crops look the same


def map_features(store: CropStore, labels: Ints, features: Floats) -> EmbeddingMap | None:
    """Lay out at most `AT_MOST` crops.

    Args:
        store: N crops.
        labels: int64 (N,), -1 for outliers.
        features: float32 (N, D), unit rows.

    Returns:
        None where there is nothing to see: under `LEAST` crops, or all features the same.
    """
    rows = choose_rows(labels)
    chosen = features[rows]
    if len(rows) < LEAST or float(chosen.std(axis=0).max()) < STILL:
        return None
    cameras = store.cameras[rows]
    shares = camera_affinity(chosen, cameras)
    return EmbeddingMap(
        project(chosen), labels[rows], cameras, store.camera_names, len(store), *(shares or (None, None))
    )


def choose_rows(labels: Ints, at_most: int = AT_MOST) -> Ints:
    """Rows to show, the same each time: whole clusters evenly from the largest to the smallest, and outliers.

    Outliers get their share of the places, evenly over the store. Clusters stay whole, so that the map shows them
    as they are; only one too large for all places is thinned, evenly.

    Args:
        labels: int64 (N,), -1 for outliers.
        at_most: places.

    Returns:
        int64 (M,), ascending, M at most ``at_most``; every row where N is no more.
    """
    if len(labels) <= at_most:
        return np.arange(len(labels))
    outliers = _evenly(np.flatnonzero(labels == NOBODY), round(at_most * float((labels == NOBODY).mean())))
    places = at_most - len(outliers)
    sizes = np.bincount(labels[labels != NOBODY])
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    inliers = np.empty(0, np.int64)
    most = 2 * places * len(order) // max(1, int(sizes.sum())) + 1  # as many as fit, were all half the mean size
    for count in range(min(len(order), most), 0, -1):
        chosen = order[np.linspace(0, len(order) - 1, count).astype(int)]
        if sizes[chosen].sum() <= places:
            inliers = np.flatnonzero(np.isin(labels, chosen))
            break
    if not len(inliers):
        inliers = _evenly(np.flatnonzero(labels != NOBODY), places)
    return np.sort(np.concatenate([outliers, inliers]))


def _evenly(rows: Ints, count: int) -> Ints:
    """``count`` of the rows, evenly over them."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))] if len(rows) else rows


def project(features: Floats) -> NDArray[np.float32]:
    """PCA, then t-SNE with cosine distances, started from the first two components.

    Args:
        features: float32 (M, D), M at least 4, not all the same.

    Returns:
        float32 (M, 2) in [0, 1], the horizontal side filling it; equal for equal features on one machine.
    """
    components = min(COMPONENTS, *features.shape)
    reduced = PCA(components, svd_solver="randomized", random_state=SEED).fit_transform(features.astype(np.float64))
    start = np.zeros((len(features), 2))
    start[:, : min(2, components)] = reduced[:, :2] / reduced[:, 0].std() * 1e-4  # as init="pca" scales it
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)  # a point needs three times as many neighbours
    placed = TSNE(perplexity=perplexity, metric="cosine", init=start, random_state=SEED).fit_transform(reduced)
    spans = np.ptp(placed, axis=0)
    if spans[1] > spans[0]:
        placed = placed[:, ::-1]  # wide rather than high
    return np.asarray((placed - placed.min(0)) / max(float(spans.max()), STILL), np.float32)


def camera_affinity(features: Floats, cameras: Ints) -> tuple[float, float] | None:
    """How often nearest neighbours come from one's own camera: found, and were cameras shuffled.

    Somebody passing gives several crops to one camera, so even a perfect model is above chance.

    Args:
        features: float32 (M, D), unit rows.
        cameras: int64 (M,).

    Returns:
        Two shares in [0, 1]; None with a single camera.
    """
    sizes = np.unique(cameras, return_counts=True)[1]
    if len(sizes) < 2:
        return None
    found = nearest(features, NEIGHBOURS + 1)[:, 1:]
    chance = (sizes * (sizes - 1)).sum() / (len(cameras) * (len(cameras) - 1))
    return float((cameras[found] == cameras[:, None]).mean()), float(chance)
