"""What makes unlabelled crops unfit before any model sees them: dead cameras, noise, one person on all crops.

A model adapted to such crops learns the fault, and a model judged on them is judged by it. Only pixels, cameras and
tracks are read; each limit has its measured source in docs/judging.md. Nights of a store are examined one by one, so
that a bad one is not diluted by the others.

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

THUMBNAIL = ImageSpec(32, 16)  # a 128 x 64 crop made four times smaller: sensor noise averages out, people do not
SAMPLE = 1000  # crops of a camera compared with one another: a million pairs are a few milliseconds
MIN_CROPS = 20  # of a camera: below it a share says nothing
MIN_TRACKS = 10  # as the judge asks for (`separation`)
BAD_SHARE = 0.5  # a fault counts where most crops have it
BLANK = 4.0  # grey levels of standard deviation; see docs/judging.md for what real and drawn crops have
CLIPPED = 5  # grey levels from black or white at which nothing is told apart any more
CORRELATION = 0.5  # of neighbouring pixels; noise has 0 to 0.25 after shrinking
SAME_CORRELATION = (
    0.95  # correlation of two pictures of different tracks; of 400,000 real pairs 1 in 1,000 has over 0.74
)
SAME_FILE_CORRELATION = 0.9995  # the same where tracks are unknown: who stands still is nearly the same twice
LARGEST_TRACK_SHARE = 0.5  # share of all crops one track may hold, as of one cluster in `Clustering.collapsed`


@dataclass(frozen=True)
class CameraHygiene:
    """What the crops of one camera look like.

    Attributes:
        crops: how many.
        tracks: how many passages they belong to; 0 where unknown.
        contrast: median over crops of the standard deviation of grey levels, 0..127.5.
        blank_share: share of crops with a contrast under `BLANK`, in [0, 1]; an unreadable crop is blank.
        clipped_share: share of crops of which most pixels are black or white, in [0, 1].
        correlation: median over crops with contrast of the correlation of neighbouring pixels, in [-1, 1]; None where
            all are blank.
        repeated_share: share of crops that nearly equal one of another track, in [0, 1].
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
    """What was found.

    Attributes:
        problems_by_camera: name -> what is wrong with that camera's crops; sound cameras are not in it.
        problems: what is wrong with the store as a whole once the crops of those cameras are left out.
        figures: name -> figures, for every camera that has crops.
        largest_track_share: share of all crops with a track that the largest holds, in [0, 1]; None without tracks.
    """

    problems_by_camera: Mapping[str, str]
    problems: tuple[str, ...]
    figures: Mapping[str, CameraHygiene]
    largest_track_share: float | None

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems and not self.problems_by_camera

    def all_problems(self) -> list[str]:
        """All problems as sentences; those of a camera start with its name."""
        return [*(f"camera {name}: {problem}" for name, problem in self.problems_by_camera.items()), *self.problems]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"problems": list(self.problems)}


def check_hygiene(store: CropStore, *, thumbnails: Pixels | None = None, min_tracks: int = MIN_TRACKS) -> Hygiene:
    """Look for what makes crops unfit to adapt to and to judge on.

    Args:
        store: N crops; persons are not read.
        thumbnails: from `read_thumbnails`, where the caller has them already; else they are read.
        min_tracks: fewer different passages are a problem, where tracks are known; 0 for crops only judged on.
    """
    small = read_thumbnails(store) if thumbnails is None else thumbnails
    assert small.shape == (len(store), THUMBNAIL.height, THUMBNAIL.width, 3), small.shape
    tracks = number_tracks(store.cameras, store.tracks)
    figures, problems = {}, {}
    for camera in np.unique(store.cameras):
        rows = np.flatnonzero(store.cameras == camera)
        name = store.camera_names[camera]
        figures[name] = _camera_figures(small[rows], tracks[rows])
        wrong = _camera_problem(figures[name])
        if wrong:
            problems[name] = wrong
    sound = np.array([store.camera_names[camera] not in problems for camera in store.cameras], bool)
    share = _largest_share(tracks[sound])
    return Hygiene(problems, tuple(_problems(store, tracks, sound, share, len(problems), min_tracks)), figures, share)


def read_thumbnails(store: CropStore, *, progress: Callable[[int], None] = lambda done: None) -> Pixels:
    """Every crop made small; one that cannot be read or decoded is black.

    Args:
        store: N crops.
        progress: called with 1 for each crop done.

    Returns:
        uint8 (N, 32, 16, 3) RGB.
    """
    made = np.zeros((len(store), THUMBNAIL.height, THUMBNAIL.width, 3), np.uint8)

    def read(row: int) -> None:
        try:
            made[row] = fit(decode(store.read(row)), THUMBNAIL)
        except (ImageError, StoreError):
            pass
        progress(1)

    with ThreadPoolExecutor(thread_name_prefix="thumbnails") as pool:
        list(pool.map(read, range(len(store))))
    return made


def _camera_figures(thumbnails: Pixels, tracks: Ints) -> CameraHygiene:
    """Figures of one camera's crops."""
    grey = thumbnails.mean(3, dtype=np.float32)  # (N, H, W)
    contrast = grey.std((1, 2))
    clipped = ((grey < CLIPPED) | (grey > 255 - CLIPPED)).mean((1, 2))
    told = contrast >= BLANK
    return CameraHygiene(
        len(grey),
        len(np.unique(tracks[tracks != UNKNOWN])),
        float(np.median(contrast)),
        float((~told).mean()),
        float((clipped > BAD_SHARE).mean()),
        float(np.median(neighbour_correlation(grey[told]))) if told.any() else None,
        _repeated_share(thumbnails, tracks),
    )


def neighbour_correlation(grey: Floats) -> Floats:
    """How alike neighbouring pixels are: the lag-1 autocorrelation of each picture, mean of both directions.

    Args:
        grey: float32 (N, H, W), none of one colour throughout.

    Returns:
        float32 (N,) in [-1, 1]: about 0 for noise, towards 1 for what a lens has seen.
    """
    flat = grey - grey.mean((1, 2), keepdims=True)
    variance = np.square(flat).mean((1, 2))
    beside = (flat[:, :, 1:] * flat[:, :, :-1]).mean((1, 2))
    below = (flat[:, 1:] * flat[:, :-1]).mean((1, 2))
    found: NDArray[np.float32] = ((beside + below) / 2 / variance).astype(np.float32)
    return found


def _repeated_share(thumbnails: Pixels, tracks: Ints) -> float:
    """Share of a sample of crops that nearly equal one of another track, whatever their brightness and contrast."""
    rows = np.unique(np.linspace(0, len(tracks) - 1, min(SAMPLE, len(tracks))).astype(int))
    flat = thumbnails[rows].reshape(len(rows), -1).astype(np.float32)  # (S, 3P)
    flat -= flat.mean(1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True).clip(1e-6)  # one of one colour equals nothing
    alike = flat @ flat.T  # (S, S)
    own, known = tracks[rows], tracks[rows] != UNKNOWN
    both = known[:, None] & known
    alike[both & (own[:, None] == own)] = -1
    alike[np.diag_indices(len(rows))] = -1
    return float((alike > np.where(both, SAME_CORRELATION, SAME_FILE_CORRELATION)).any(1).mean())


def _camera_problem(figures: CameraHygiene) -> str:
    """What is wrong with one camera, empty if nothing or if it has too few crops to say."""
    if figures.crops < MIN_CROPS:
        return ""
    if figures.blank_share > BAD_SHARE:
        return (
            f"{figures.blank_share:.0%} of its {figures.crops} crops carry no picture (contrast {figures.contrast:.1f} "
            f"grey levels, expected {BLANK:g} or more): look whether it is covered, dark or off"
        )
    if figures.clipped_share > BAD_SHARE:
        return f"{figures.clipped_share:.0%} of its {figures.crops} crops are mostly black or white: mend its exposure"
    if figures.correlation is not None and figures.correlation < CORRELATION:
        return (
            f"its crops are noise: neighbouring pixels correlate by {figures.correlation:.2f}, expected "
            f"{CORRELATION} or more: look at its picture"
        )
    if figures.repeated_share > BAD_SHARE:
        return (
            f"{figures.repeated_share:.0%} of its {figures.crops} crops repeat one of another passage: its picture "
            "stands still, or the same crops were fed again"
        )
    return ""


def _problems(
    store: CropStore, tracks: Ints, sound: NDArray[np.bool_], largest_share: float | None, faulty: int, min_tracks: int
) -> list[str]:
    """What is wrong with the crops of the sound cameras together."""
    found = []
    seen = np.unique(store.cameras[sound])
    total = len(np.unique(store.cameras))
    if not len(seen):
        return [f"none of {total} cameras gives sound crops: expected one or more"]
    if faulty and len(seen) < 2:
        found.append(f"only one of {total} cameras gives sound crops: expected two or more, as the site has")
    known = tracks[sound]
    if largest_share is None:
        return found
    passages = len(np.unique(known[known != UNKNOWN]))
    if passages < min_tracks:
        found.append(f"{passages} tracks: expected {min_tracks} or more different passages")
    elif largest_share > LARGEST_TRACK_SHARE and passages >= MIN_TRACKS:
        found.append(
            f"one track holds {largest_share:.0%} of all crops: expected no more than {LARGEST_TRACK_SHARE:.0%}"
        )
    return found


def _largest_share(tracks: Ints) -> float | None:
    """Share of the crops with a track that the largest one holds."""
    known = tracks[tracks != UNKNOWN]
    return float(np.bincount(known).max() / len(known)) if len(known) else None


DAY_S = 86_400.0
CHECKED_CROPS = 1000  # crops of a camera and night: of as many hygiene compares pictures
RECHECKED_CROPS = 200  # of nights gone by, of which there may be many; ten times what hygiene needs to speak


@dataclass(frozen=True)
class NightFilter:
    """What may be used.

    Attributes:
        kept: bool (N,).
        refused: whether the latest night as a whole is unfit.
        reasons: what was found, in words.
    """

    kept: NDArray[np.bool_]
    refused: bool
    reasons: tuple[str, ...]


def filter_nights(
    store: CropStore, times_s: NDArray[np.float64], *, group: int, looked_at: int = CHECKED_CROPS
) -> NightFilter:
    """Leave out what hygiene finds unfit: cameras of a night, or whole nights.

    Nights are stretches of 24 hours back from the last crop; those with few crops are looked at together with the
    one before.

    Args:
        store: N crops, one or more.
        times_s: float64 (N,), when each was taken.
        group: fewest crops of a night to be looked at alone.
        looked_at: most crops of a camera and night that are read, evenly spaced.
    """
    kept, reasons = np.ones(len(store), bool), []
    refused = False
    for index, rows in enumerate(_nights(times_s, group)):
        found = check_hygiene(store.subset(_evenly_spaced(rows, store.cameras, looked_at)))
        unfit = [number for number, name in enumerate(store.camera_names) if name in found.problems_by_camera]
        kept[rows[np.isin(store.cameras[rows], unfit)]] = False
        if found.problems:
            kept[rows] = False
            refused |= index == 0
        when = "" if index == 0 else f"{(times_s.max() - times_s[rows].max()) / DAY_S:.0f} days before: "
        reasons += [when + words for words in found.all_problems()]
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
        few = nights.pop()
        nights[-1] += few
    return [np.array(sorted(rows), np.int64) for rows in nights]


def _evenly_spaced(rows: Ints, cameras: Ints, most: int) -> Ints:
    """At most so many of each camera's rows, evenly spaced."""
    parts = []
    for camera in np.unique(cameras[rows]):
        own = rows[cameras[rows] == camera]
        parts.append(own[np.linspace(0, len(own) - 1, min(most, len(own))).astype(np.int64)])
    return np.sort(np.concatenate(parts))
