"""The map of a store's features: a projection of crops to the plane by t-SNE, drawn by cluster and by camera.

t-SNE (van der Maaten and Hinton 2008; Barnes-Hut, van der Maaten 2014; scikit-learn) keeps neighbours together;
distances between far groups and the sizes of groups have no meaning. Groups differ by colour and by the shape of their
marks, for readers who cannot distinguish the colours.

Letters: N crops, M crops shown, C cameras, D feature size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from resight.arrays import Floats, Ints
from resight.neighbours.search import nearest_neighbours
from resight.training.report.svg import SERIES_COLOURS, colour, draw_svg, set_title
from resight.training.store.crops import CropStore

SIDE, EDGE = 400, 0.1  # width of the view box; margins on both sides together, in the units of places
MARK_SHAPES = ("dot", "square", "ring")
LABELLED_GROUPS = 20  # groups with their own mark; SERIES_COLOURS x len(MARK_SHAPES) = 24 marks differ
PASSES = 4  # groups are drawn in turns, so that none covers all others
NO_CLUSTER = -1


@dataclass(frozen=True, eq=False)  # arrays have no truth value to compare by
class EmbeddingMap:
    """The positions of crops in the plane.

    Attributes:
        places: float32 (M, 2) in [0, 1].
        clusters: int64 (M,), -1 for outliers.
        cameras: int64 (M,), 0..C-1.
        camera_names: C names.
        total: number of all crops, of which M are shown.
        own_camera: share in [0, 1] of a crop's nearest neighbours from its own camera; None with one camera.
        own_camera_chance: the same with shuffled cameras.
    """

    places: NDArray[np.float32]
    clusters: NDArray[np.int64]
    cameras: NDArray[np.int64]
    camera_names: Sequence[str]
    total: int
    own_camera: float | None = None
    own_camera_chance: float | None = None


@dataclass(frozen=True)
class MapPanel:
    """A drawn map with an explanation; the legend holds (colour class, shape, text)."""

    title: str
    hint: str
    svg: Markup
    legend: Sequence[tuple[str, str, str]]


def map_panels(shown: EmbeddingMap) -> list[MapPanel]:
    """The map coloured by cluster and, with two cameras or more, by camera."""
    sizes = np.bincount(shown.clusters[shown.clusters >= 0], minlength=0)
    biggest = [int(label) for label in np.argsort(-sizes, kind="stable")[:LABELLED_GROUPS] if sizes[label]]
    numbered = [(label, f"cluster {label}", str(label)) for label in biggest]
    marked = "" if len(numbered) == np.count_nonzero(sizes) else f"The {len(numbered)} largest shown are marked. "
    hint = (
        marked + "A good cluster is an island; one colour in two places may be one person that the model takes for two."
    )
    by_cluster = _panel("By cluster", hint, shown, shown.clusters, numbered)
    counts = np.bincount(shown.cameras, minlength=len(shown.camera_names))
    busiest = [int(camera) for camera in np.argsort(-counts, kind="stable")[:LABELLED_GROUPS] if counts[camera]]
    if len(busiest) < 2:
        return [by_cluster]
    cameras = [(camera, shown.camera_names[camera], "") for camera in sorted(busiest)]
    hint = "A good island mixes colours: one of a single camera may be a wall, or a person who did not move on. "
    if shown.own_camera is not None and shown.own_camera_chance is not None:
        hint += (
            f"Of a crop's nearest neighbours {shown.own_camera:.0%} are of its own camera; shuffled cameras would give "
            f"{shown.own_camera_chance:.0%}, and since people give each camera several crops, some more is natural."
        )
    return [by_cluster, _panel("By camera", hint, shown, shown.cameras, cameras)]


def _panel(
    title: str, hint: str, shown: EmbeddingMap, groups: NDArray[np.int64], named: Sequence[tuple[int, str, str]]
) -> MapPanel:
    """Draw crops outside the named groups (number, words, text on the map) in grey, the others above them."""
    rows_of = {number: np.flatnonzero(groups == number) for number, _, _ in named}
    outliers = np.flatnonzero(groups == NO_CLUSTER)
    rest = np.flatnonzero((groups != NO_CLUSTER) & ~np.isin(groups, list(rows_of)))
    unnamed = [
        (rows, name, words)
        for rows, name, words in ((outliers, "none", "outliers"), (rest, "other", "all others"))
        if len(rows)
    ]
    looks = [(f"s{i % SERIES_COLOURS}", MARK_SHAPES[i // SERIES_COLOURS]) for i in range(len(named))]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.set_axis_off()
        low, high = shown.places.min(0) - EDGE / 2, shown.places.max(0) + EDGE / 2
        axes.set(xlim=(low[0], high[0]), ylim=(high[1], low[1]))
        for rows, _, words in unnamed:
            _draw_marks(axes, shown.places[rows], "other", "dot", f"{words}, {len(rows)} crops", size=2.5)
        for turn in range(PASSES):
            for (number, words, _), (series, shape) in zip(named, looks, strict=True):
                rows = rows_of[number]
                if len(rows[turn::PASSES]):
                    _draw_marks(axes, shown.places[rows[turn::PASSES]], series, shape, f"{words}, {len(rows)} crops")
        for number, _, text in named:
            if text:
                place = np.median(shown.places[rows_of[number]], axis=0)
                halo = [patheffects.withStroke(linewidth=2.5, foreground=colour("card"))]
                axes.text(place[0], place[1], text, ha="center", va="center", weight="bold", path_effects=halo)

    span = np.ptp(shown.places, axis=0)
    height = SIDE * (EDGE + float(span[1])) / (EDGE + float(span[0]))
    drawn = draw_svg(f"{title}: {len(groups)} crops; near crops are similar", SIDE, height, paint)
    legend = [
        (series, shape, f"{words} ({len(rows_of[number])})")
        for (number, words, _), (series, shape) in zip(named, looks, strict=True)
    ]
    return MapPanel(
        title, hint, drawn, [*legend, *((name, "dot", f"{words} ({len(rows)})") for rows, name, words in unnamed)]
    )


def _draw_marks(
    axes: Axes, places: NDArray[np.float32], series: str, shape: str, words: str, *, size: float = 4.0
) -> None:
    """Marks of one colour and shape."""
    fill = "none" if shape == "ring" else colour(series)
    marker = "s" if shape == "square" else "o"
    (drawn,) = axes.plot(*places.T, marker, markersize=size, markerfacecolor=fill, markeredgecolor=colour(series))
    set_title(drawn, words)


MAX_CROPS = 2000  # takes 6 s on one core; more marks would overlap
MIN_CROPS = 10  # with fewer points there is no map
COMPONENTS = 50  # PCA before t-SNE, as scikit-learn's manual advises, reduces noise and time
PERPLEXITY = 30.0  # scikit-learn's default; 5 to 50 in the paper
SEED = 0
NEIGHBOURS = 10  # of a crop, whose cameras are compared
MIN_SPREAD = 1e-6  # a smaller spread is rounding: all features are equal


def map_features(store: CropStore, labels: Ints, features: Floats) -> EmbeddingMap | None:
    """Lay out at most `MAX_CROPS` crops.

    Args:
        store: N crops.
        labels: int64 (N,), -1 for outliers.
        features: float32 (N, D), unit rows.

    Returns:
        None with fewer than `MIN_CROPS` crops, or if all features are equal.
    """
    rows = choose_rows(labels)
    chosen = features[rows]
    if len(rows) < MIN_CROPS or float(chosen.std(axis=0).max()) < MIN_SPREAD:
        return None
    cameras = store.cameras[rows]
    shares = camera_affinity(chosen, cameras)
    return EmbeddingMap(
        project(chosen), labels[rows], cameras, store.camera_names, len(store), *(shares or (None, None))
    )


def choose_rows(labels: Ints, at_most: int = MAX_CROPS) -> Ints:
    """Select the rows to show, deterministically: clusters evenly from the largest to the smallest, and outliers.

    Outliers get their share of the rows, evenly over the store. Clusters are kept whole, unless one has more rows than
    can be shown: then it is sampled evenly.

    Args:
        labels: int64 (N,), -1 for outliers.
        at_most: maximum number of rows.

    Returns:
        int64 (M,), ascending, M at most ``at_most``; all rows if N is not larger.
    """
    if len(labels) <= at_most:
        return np.arange(len(labels))
    outliers = _evenly(np.flatnonzero(labels == NO_CLUSTER), round(at_most * float((labels == NO_CLUSTER).mean())))
    left = at_most - len(outliers)
    sizes = np.bincount(labels[labels != NO_CLUSTER])
    order = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    inliers = np.empty(0, np.int64)
    most = 2 * left * len(order) // max(1, int(sizes.sum())) + 1  # an upper bound: as many as fit at half the mean size
    for count in range(min(len(order), most), 0, -1):
        chosen = order[np.linspace(0, len(order) - 1, count).astype(int)]
        if sizes[chosen].sum() <= left:
            inliers = np.flatnonzero(np.isin(labels, chosen))
            break
    if not len(inliers):
        inliers = _evenly(np.flatnonzero(labels != NO_CLUSTER), left)
    return np.sort(np.concatenate([outliers, inliers]))


def _evenly(rows: Ints, count: int) -> Ints:
    """``count`` of the rows, evenly spaced."""
    return rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))] if len(rows) else rows


def project(features: Floats) -> NDArray[np.float32]:
    """Project features to the plane: PCA, then t-SNE with cosine distances, initialised with the first two components.

    Args:
        features: float32 (M, D), M at least 4, not all equal.

    Returns:
        float32 (M, 2) in [0, 1], horizontally from 0 to 1; deterministic on one machine.
    """
    components = min(COMPONENTS, *features.shape)
    reduced = PCA(components, svd_solver="randomized", random_state=SEED).fit_transform(features.astype(np.float64))
    start = np.zeros((len(features), 2))
    start[:, : min(2, components)] = reduced[:, :2] / reduced[:, 0].std() * 1e-4  # scaled as by init="pca"
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)  # t-SNE needs three times as many neighbours
    placed = TSNE(perplexity=perplexity, metric="cosine", init=start, random_state=SEED).fit_transform(reduced)
    spans = np.ptp(placed, axis=0)
    if spans[1] > spans[0]:
        placed = placed[:, ::-1]  # landscape
    return np.asarray((placed - placed.min(0)) / max(float(spans.max()), MIN_SPREAD), np.float32)


def camera_affinity(features: Floats, cameras: Ints) -> tuple[float, float] | None:
    """Share of nearest neighbours from a crop's own camera: measured, and expected with shuffled cameras.

    A passing person gives several crops to one camera, so even a perfect model is above chance.

    Args:
        features: float32 (M, D), unit rows.
        cameras: int64 (M,).

    Returns:
        Two shares in [0, 1]; None with a single camera.
    """
    sizes = np.unique(cameras, return_counts=True)[1]
    if len(sizes) < 2:
        return None
    found = nearest_neighbours(features, NEIGHBOURS + 1)[:, 1:]
    chance = (sizes * (sizes - 1)).sum() / (len(cameras) * (len(cameras) - 1))
    return float((cameras[found] == cameras[:, None]).mean()), float(chance)
