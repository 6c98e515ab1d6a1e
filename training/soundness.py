"""Which crops of several nights are fit to use: each night is looked at alone, so that a bad one is not diluted.

Letters: N crops, C cameras.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resight.training.crops import CropStore
from resight.training.hygiene import examine
from resight.training.neighbours import Ints

DAY_S = 86_400.0
LOOKED_AT = 1000  # crops of a camera and night: of as many hygiene compares pictures
LOOKED_AT_AGAIN = 200  # of nights gone by, of which there may be many; ten times what hygiene needs to speak


@dataclass(frozen=True)
class Soundness:
    """What may be used.

    Attributes:
        kept: bool (N,).
        refused: whether the latest night as a whole is unfit.
        reasons: what was found, in words.
    """

    kept: NDArray[np.bool_]
    refused: bool
    reasons: tuple[str, ...]


def sound_crops(store: CropStore, times_s: NDArray[np.float64], *, group: int, looked_at: int = LOOKED_AT) -> Soundness:
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
        found = examine(store.subset(_spread(rows, store.cameras, looked_at)))
        unfit = [number for number, name in enumerate(store.camera_names) if name in found.problems_by_camera]
        kept[rows[np.isin(store.cameras[rows], unfit)]] = False
        if found.problems:
            kept[rows] = False
            refused |= index == 0
        when = "" if index == 0 else f"{(times_s.max() - times_s[rows].max()) / DAY_S:.0f} days before: "
        reasons += [when + words for words in found.told()]
    return Soundness(kept, refused, tuple(reasons))


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


def _spread(rows: Ints, cameras: Ints, most: int) -> Ints:
    """At most so many of each camera's rows, evenly spaced."""
    parts = []
    for camera in np.unique(cameras[rows]):
        own = rows[cameras[rows] == camera]
        parts.append(own[np.linspace(0, len(own) - 1, min(most, len(own))).astype(np.int64)])
    return np.sort(np.concatenate(parts))
