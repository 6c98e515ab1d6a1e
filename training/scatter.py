"""Two scatter plots of one embedding map as inline SVG: coloured by cluster, and by camera.

A mark is a zero-length stroke with a round or square cap, so that two thousand cost some ten bytes each and take
their colour, in light and dark, from the page's style sheet. Colour alone tells nothing: shapes differ too.

Letters: M crops shown, C cameras.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from resight.training.curves import SERIES_COLOURS

SIDE, EDGE = 1000, 20  # viewBox units: whole numbers place a mark within half a pixel
SHAPES = ("dot", "square", "ring")
NAMED = 20  # groups with a mark of their own; SERIES_COLOURS x len(SHAPES) = 24 marks can be told apart
PASSES = 4  # every group is drawn in turns, so that none lies on top of all others
NOBODY = -1


@dataclass(frozen=True, eq=False)  # arrays have no truth value to compare by
class EmbeddingMap:
    """Where crops lie to one another.

    Attributes:
        places: float32 (M, 2) in [0, 1].
        clusters: int64 (M,), -1 for outliers.
        cameras: int64 (M,), 0..C-1.
        camera_names: C names.
        total: how many crops there are, M of which are shown.
        own_camera: share in [0, 1] of a crop's nearest neighbours that its own camera saw; None with one camera.
        own_camera_chance: the same, were cameras shuffled.
    """

    places: NDArray[np.float32]
    clusters: NDArray[np.int64]
    cameras: NDArray[np.int64]
    camera_names: Sequence[str]
    total: int
    own_camera: float | None = None
    own_camera_chance: float | None = None


@dataclass(frozen=True)
class Panel:
    """A drawn map and how to read it; the legend holds (colour class, shape, words)."""

    title: str
    hint: str
    svg: Markup
    legend: Sequence[tuple[str, str, str]]


def panels(shown: EmbeddingMap) -> list[Panel]:
    """The map by cluster, and by camera where there are two or more."""
    sizes = np.bincount(shown.clusters[shown.clusters >= 0], minlength=0)
    biggest = [int(label) for label in np.argsort(-sizes, kind="stable")[:NAMED] if sizes[label]]
    numbered = [(label, f"cluster {label}", str(label)) for label in biggest]
    marked = "" if len(numbered) == np.count_nonzero(sizes) else f"The {len(numbered)} largest shown are marked. "
    hint = (
        marked + "A good cluster is an island; one colour in two places may be one person whom the model sees as two."
    )
    by_cluster = _panel("By cluster", hint, shown, shown.clusters, numbered)
    counts = np.bincount(shown.cameras, minlength=len(shown.camera_names))
    busiest = [int(camera) for camera in np.argsort(-counts, kind="stable")[:NAMED] if counts[camera]]
    if len(busiest) < 2:
        return [by_cluster]
    cameras = [(camera, shown.camera_names[camera], "") for camera in sorted(busiest)]
    hint = "A good island mixes colours: one of a single camera may be a wall, or somebody who never went on. "
    if shown.own_camera is not None and shown.own_camera_chance is not None:
        hint += (
            f"Of a crop's nearest neighbours {shown.own_camera:.0%} are of its own camera; shuffled cameras would give "
            f"{shown.own_camera_chance:.0%}, and since people give each camera several crops, some more is natural."
        )
    return [by_cluster, _panel("By camera", hint, shown, shown.cameras, cameras)]


def _panel(
    title: str, hint: str, shown: EmbeddingMap, groups: NDArray[np.int64], named: Sequence[tuple[int, str, str]]
) -> Panel:
    """Draw crops outside the named groups (number, words, text on the map) in grey, the others above them."""
    places = np.rint(EDGE + (SIDE - 2 * EDGE) * (shown.places - shown.places.min(0))).astype(int)
    at = {number: np.flatnonzero(groups == number) for number, _, _ in named}
    nobody = groups == NOBODY
    rest = np.flatnonzero(~nobody & ~np.isin(groups, list(at)))
    head = Markup('<svg class="map" viewBox="0 0 {} {}" role="img" aria-label="{}">')
    parts = [head.format(SIDE, places[:, 1].max() + EDGE, f"{title}: {len(places)} crops, the nearer the more alike")]
    legend = []
    for rows, colour, words in ((np.flatnonzero(nobody), "none", "outliers"), (rest, "other", "all others")):
        if len(rows):
            parts.append(_marks(places[rows], colour, "dot", f"{words}, {len(rows)} crops"))
            legend.append((colour, "dot", f"{words} ({len(rows)})"))
    looks = [(f"s{i % SERIES_COLOURS}", SHAPES[i // SERIES_COLOURS]) for i in range(len(named))]
    for turn in range(PASSES):
        for (number, words, _), (colour, shape) in zip(named, looks, strict=True):
            rows = at[number]
            if len(rows[turn::PASSES]):
                parts.append(_marks(places[rows[turn::PASSES]], colour, shape, f"{words}, {len(rows)} crops"))
    for number, _, text in named:
        if text:
            x, y = np.median(places[at[number]], axis=0).astype(int)
            parts.append(Markup('<text x="{}" y="{}">{}</text>').format(x, y, text))
    named_legend = [
        (colour, shape, f"{words} ({len(at[number])})")
        for (number, words, _), (colour, shape) in zip(named, looks, strict=True)
    ]
    return Panel(title, hint, Markup("").join([*parts, Markup("</svg>")]), [*named_legend, *legend])


def _marks(places: NDArray[np.int_], colour: str, shape: str, words: str) -> Markup:
    """All marks of one look as one path; a ring is a dot with the card's colour laid over its middle."""
    path = "".join(f"M{x} {y}h0" for x, y in places)
    drawn = Markup('<path class="mark {} {}" d="{}"><title>{}</title></path>').format(colour, shape, path, words)
    return drawn + Markup('<path class="mark hole" d="{}"/>').format(path) if shape == "ring" else drawn
