"""Data checks of unlabelled crops before adaptation or judging: dead cameras, noise, one person on all crops.

Such crops would make adaptation learn the fault and the judge measure it. Only pixels, cameras and tracks are used;
docs/judging.md has the measurements behind each limit. The nights of a store are checked separately, so that a bad
night is not averaged out by the others.

Letters: N crops, C cameras, H x W thumbnail size, P pixels of a thumbnail, S crops of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resight.arrays import Floats, Ints, Pixels
from resight.errors import ImageError, StoreError
from resight.image import ImageSpec, decode, fit
from resight.training.store.crops import UNKNOWN, CropStore
from resight.training.store.track_pairs import number_tracks

THUMBNAIL = ImageSpec(32, 16)  # a quarter of a 128 x 64 crop: sensor noise averages out, people remain visible
SAMPLE = 1000  # crops of a camera compared with each other: a million pairs take a few milliseconds
MIN_CROPS = 20  # of a camera; shares of fewer crops are not meaningful
MIN_TRACKS = 10  # as required by the judge (`separation`)
BAD_SHARE = 0.5  # share of crops from which a fault counts
BLANK = 4.0  # standard deviation in grey levels; docs/judging.md has values of real and synthetic crops
CLIPPED = 5  # grey levels from black or white that count as clipped
CORRELATION = 0.5  # of neighbouring pixels; noise has 0 to 0.25 after shrinking
SAME_CORRELATION = 0.95  # of two crops of different tracks; 1 in 1,000 of 400,000 real pairs is above 0.74
SAME_FILE_CORRELATION = 0.9995  # the same if tracks are unknown: a person standing still gives nearly equal crops
LARGEST_TRACK_SHARE = 0.5  # maximum share of all crops in one track, as for a cluster in `Clustering.collapsed`


@dataclass(frozen=True)
class CameraHygiene:
    """Statistics of the crops of one camera.

    Attributes:
        crops: number of crops.
        tracks: number of tracks; 0 if unknown.
        contrast: median over crops of the standard deviation of grey levels, 0..127.5.
        blank_share: share of crops with a contrast below `BLANK`, in [0, 1]; an unreadable crop is blank.
        clipped_share: share of crops with mostly black or white pixels, in [0, 1].
        correlation: median over the other crops of the correlation of neighbouring pixels, in [-1, 1]; None if all are
            blank.
        repeated_share: share of crops that nearly equal a crop of another track, in [0, 1].
    """

    crops: int
    tracks: int
    contrast: float
    blank_share: float
    clipped_share: float
    correlation: float | None
    repeated_share: float


@dataclass(frozen=True)
class Hygiene:
    """Result of `check_hygiene`.

    Attributes:
        problems_by_camera: name -> problem of that camera's crops; valid cameras are omitted.
        problems: problems of the store as a whole without the crops of those cameras.
        figures: name -> statistics, for every camera with crops.
        largest_track_share: share of the largest track among all crops with a track, in [0, 1]; None without tracks.
    """

    problems_by_camera: Mapping[str, str]
    problems: tuple[str, ...]
    figures: Mapping[str, CameraHygiene]
    largest_track_share: float | None

    @property
    def passed(self) -> bool:
        """Whether there are no problems."""
        return not self.problems and not self.problems_by_camera

    def messages(self) -> list[str]:
        """All problems, those of cameras with the camera's name."""
        return [*(f"camera {name}: {problem}" for name, problem in self.problems_by_camera.items()), *self.problems]

    def to_json(self) -> dict[str, Any]:
        """All fields as plain values."""
        return asdict(self) | {"problems": list(self.problems)}


def check_hygiene(store: CropStore, *, thumbnails: Pixels | None = None, min_tracks: int = MIN_TRACKS) -> Hygiene:
    """Check whether crops are suitable for adaptation and judging.

    Args:
        store: N crops; persons are not used.
        thumbnails: from `read_thumbnails`, if the caller has them; otherwise they are read.
        min_tracks: fewer tracks are a problem, if tracks are known; 0 for crops used only for judging.
    """
    images = read_thumbnails(store) if thumbnails is None else thumbnails
    assert images.shape == (len(store), THUMBNAIL.height, THUMBNAIL.width, 3), images.shape
    tracks = number_tracks(store.cameras, store.tracks)
    figures, problems = {}, {}
    for camera in np.unique(store.cameras):
        rows = np.flatnonzero(store.cameras == camera)
        name = store.camera_names[camera]
        figures[name] = _camera_statistics(images[rows], tracks[rows])
        problem = _camera_problem(figures[name])
        if problem:
            problems[name] = problem
    valid = np.array([store.camera_names[camera] not in problems for camera in store.cameras], bool)
    share = _largest_share(tracks[valid])
    return Hygiene(problems, tuple(_problems(store, tracks, valid, share, len(problems), min_tracks)), figures, share)


def read_thumbnails(store: CropStore, *, progress: Callable[[int], None] = lambda done: None) -> Pixels:
    """All crops as thumbnails; one that cannot be read or decoded is black.

    Args:
        store: N crops.
        progress: called with 1 for each crop done.

    Returns:
        uint8 (N, 32, 16, 3) RGB.
    """
    thumbnails = np.zeros((len(store), THUMBNAIL.height, THUMBNAIL.width, 3), np.uint8)

    def read(row: int) -> None:
        try:
            thumbnails[row] = fit(decode(store.read(row)), THUMBNAIL)
        except (ImageError, StoreError):
            pass
        progress(1)

    with ThreadPoolExecutor(thread_name_prefix="thumbnails") as pool:
        list(pool.map(read, range(len(store))))
    return thumbnails


def _camera_statistics(thumbnails: Pixels, tracks: Ints) -> CameraHygiene:
    """Statistics of one camera's crops."""
    grey = thumbnails.mean(3, dtype=np.float32)  # (N, H, W)
    contrast = grey.std((1, 2))
    clipped = ((grey < CLIPPED) | (grey > 255 - CLIPPED)).mean((1, 2))
    has_contrast = contrast >= BLANK
    return CameraHygiene(
        len(grey),
        len(np.unique(tracks[tracks != UNKNOWN])),
        float(np.median(contrast)),
        float((~has_contrast).mean()),
        float((clipped > BAD_SHARE).mean()),
        float(np.median(neighbour_correlation(grey[has_contrast]))) if has_contrast.any() else None,
        _repeated_share(thumbnails, tracks),
    )


def neighbour_correlation(grey: Floats) -> Floats:
    """Correlation of neighbouring pixels: the lag-1 autocorrelation of each image, mean of both directions.

    Args:
        grey: float32 (N, H, W), no uniform images.

    Returns:
        float32 (N,) in [-1, 1]: about 0 for noise, close to 1 for real images.
    """
    flat = grey - grey.mean((1, 2), keepdims=True)
    variance = np.square(flat).mean((1, 2))
    horizontal = (flat[:, :, 1:] * flat[:, :, :-1]).mean((1, 2))
    vertical = (flat[:, 1:] * flat[:, :-1]).mean((1, 2))
    found: NDArray[np.float32] = ((horizontal + vertical) / 2 / variance).astype(np.float32)
    return found


def _repeated_share(thumbnails: Pixels, tracks: Ints) -> float:
    """Share of a sample of crops that nearly equal one of another track, up to brightness and contrast."""
    rows = np.unique(np.linspace(0, len(tracks) - 1, min(SAMPLE, len(tracks))).astype(int))
    flat = thumbnails[rows].reshape(len(rows), -1).astype(np.float32)  # (S, 3P)
    flat -= flat.mean(1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True).clip(1e-6)  # a uniform crop equals no other
    similarity = flat @ flat.T  # (S, S)
    own, known = tracks[rows], tracks[rows] != UNKNOWN
    both = known[:, None] & known
    similarity[both & (own[:, None] == own)] = -1
    similarity[np.diag_indices(len(rows))] = -1
    return float((similarity > np.where(both, SAME_CORRELATION, SAME_FILE_CORRELATION)).any(1).mean())


def _camera_problem(figures: CameraHygiene) -> str:
    """The problem of one camera; empty if there is none or too few crops."""
    if figures.crops < MIN_CROPS:
        return ""
    if figures.blank_share > BAD_SHARE:
        return (
            f"{figures.blank_share:.0%} of its {figures.crops} crops have no content (contrast {figures.contrast:.1f} "
            f"grey levels, expected {BLANK:g} or more): check whether the camera is covered, dark or off"
        )
    if figures.clipped_share > BAD_SHARE:
        return (
            f"{figures.clipped_share:.0%} of its {figures.crops} crops are mostly black or white: correct its exposure"
        )
    if figures.correlation is not None and figures.correlation < CORRELATION:
        return (
            f"its crops are noise: neighbouring pixels correlate by {figures.correlation:.2f}, expected "
            f"{CORRELATION} or more: check the camera's image"
        )
    if figures.repeated_share > BAD_SHARE:
        return (
            f"{figures.repeated_share:.0%} of its {figures.crops} crops repeat one of another track: the camera's "
            "image is frozen, or the same crops were added again"
        )
    return ""


def _problems(
    store: CropStore, tracks: Ints, valid: NDArray[np.bool_], largest_share: float | None, faulty: int, min_tracks: int
) -> list[str]:
    """Problems of the crops of all valid cameras together."""
    found = []
    seen = np.unique(store.cameras[valid])
    total = len(np.unique(store.cameras))
    if not len(seen):
        return [f"none of {total} cameras has valid crops: expected at least one"]
    if faulty and len(seen) < 2:
        found.append(f"only one of {total} cameras has valid crops: expected at least two, as the site has")
    known = tracks[valid]
    if largest_share is None:
        return found
    count = len(np.unique(known[known != UNKNOWN]))
    if count < min_tracks:
        found.append(f"{count} tracks: expected at least {min_tracks}")
    elif largest_share > LARGEST_TRACK_SHARE and count >= MIN_TRACKS:
        found.append(f"one track has {largest_share:.0%} of all crops: expected no more than {LARGEST_TRACK_SHARE:.0%}")
    return found


def _largest_share(tracks: Ints) -> float | None:
    """Share of the largest track among the crops with a track."""
    known = tracks[tracks != UNKNOWN]
    return float(np.bincount(known).max() / len(known)) if len(known) else None


DAY_S = 86_400.0
CHECKED_CROPS = 1000  # crops checked per camera and night, as many as are compared with each other
RECHECKED_CROPS = 200  # the same for earlier nights, which may be many; ten times `MIN_CROPS`


@dataclass(frozen=True)
class NightFilter:
    """Result of `filter_nights`.

    Attributes:
        kept: bool (N,), crops that may be used.
        refused: whether the latest night as a whole is unsuitable.
        reasons: messages about the problems.
    """

    kept: NDArray[np.bool_]
    refused: bool
    reasons: tuple[str, ...]


def filter_nights(
    store: CropStore, times_s: NDArray[np.float64], *, group: int, sample_limit: int = CHECKED_CROPS
) -> NightFilter:
    """Exclude crops that fail the checks: cameras of a night, or whole nights.

    Nights are periods of 24 hours back from the last crop; those with few crops are checked together with the next
    later one.

    Args:
        store: N crops, at least one.
        times_s: float64 (N,), capture time of each crop.
        group: minimum number of crops of a night to be checked separately.
        sample_limit: maximum number of crops read per camera and night, evenly spaced.
    """
    kept, reasons = np.ones(len(store), bool), []
    refused = False
    for index, rows in enumerate(_nights(times_s, group)):
        found = check_hygiene(store.subset(_evenly_spaced(rows, store.cameras, sample_limit)))
        unsuitable = [number for number, name in enumerate(store.camera_names) if name in found.problems_by_camera]
        kept[rows[np.isin(store.cameras[rows], unsuitable)]] = False
        if found.problems:
            kept[rows] = False
            refused |= index == 0
        when = "" if index == 0 else f"{(times_s.max() - times_s[rows].max()) / DAY_S:.0f} days before: "
        reasons += [when + message for message in found.messages()]
    return NightFilter(kept, refused, tuple(reasons))


def _nights(times_s: NDArray[np.float64], group: int) -> list[Ints]:
    """Rows of each night, the latest first."""
    age = np.floor((times_s.max() - times_s) / DAY_S).astype(np.int64)
    nights: list[list[int]] = []
    for day in np.unique(age):
        rows = np.flatnonzero(age == day).tolist()
        if nights and len(nights[-1]) < group:
            nights[-1] += rows
        else:
            nights.append(rows)
    if len(nights) > 1 and len(nights[-1]) < group:
        last = nights.pop()
        nights[-1] += last
    return [np.array(sorted(rows), np.int64) for rows in nights]


def _evenly_spaced(rows: Ints, cameras: Ints, most: int) -> Ints:
    """At most `most` of each camera's rows, evenly spaced."""
    parts = []
    for camera in np.unique(cameras[rows]):
        own = rows[cameras[rows] == camera]
        parts.append(own[np.linspace(0, len(own) - 1, min(most, len(own))).astype(np.int64)])
    return np.sort(np.concatenate(parts))
