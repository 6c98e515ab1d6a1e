"""Tracks as a perfect tracker would give them, from crops whose names tell person, camera, sequence and frame.

Only for measuring how well the judge judges: it reads who is on the crops, which nobody knows of a real site.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from resight.training.crops import UNKNOWN
from resight.training.neighbours import Ints

GAP_S = 10.0  # crops of one person and camera further apart are two passages; a tracker keeps nobody for longer


def number_passages(persons: Ints, cameras: Ints, times_s: NDArray[np.float64]) -> Ints:
    """Number the passages: crops of one person and camera of which each is `GAP_S` or less from the next.

    Args:
        persons: int64 (N,); 0 and less are no person.
        cameras: int64 (N,).
        times_s: float64 (N,), NaN where unknown; sequences are far apart (`datasets.SEQUENCE_S`).

    Returns:
        int64 (N,), 0.., -1 where person or time is unknown.
    """
    known = np.flatnonzero((persons > 0) & np.isfinite(times_s))
    order = known[np.lexsort((times_s[known], cameras[known], persons[known]))]
    new = (np.diff(persons[order]) != 0) | (np.diff(cameras[order]) != 0) | (np.diff(times_s[order]) > GAP_S)
    numbers = np.full(len(persons), UNKNOWN, np.int64)
    numbers[order] = np.concatenate([[0], np.cumsum(new)])[: len(order)]
    return numbers
