"""Array types that several modules use, and cosine similarity.

Letters: N rows, D feature dimensions, H and W of an image.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from resight.errors import InputError

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
Pixels = NDArray[np.uint8]
"""uint8 (H, W, 3) or (N, H, W, 3), RGB."""
Feature = NDArray[np.float32]
"""float32 (D,), unit length."""
Features = NDArray[np.float32]
"""float32 (N, D), unit rows."""


def cosine_similarity(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float32]:
    """Cosine similarity of each row of one array with each row of another.

    Args:
        a: float (N, D); rows need not be of unit length.
        b: float (M, D).

    Returns:
        float32 (N, M), within -1..1.

    Raises:
        InputError: not two-dimensional, of different D, or a row that is zero or not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise InputError(
            f"expected features (N, D) and (M, D) of one D, found {a.shape} and {b.shape}: pass rows of one model"
        )
    similarity = _unit(a) @ _unit(b).T
    np.clip(similarity, -1.0, 1.0, out=similarity)  # rounding can exceed 1 by an ulp
    return similarity.astype(np.float32)


def _unit(rows: NDArray[np.floating]) -> NDArray[np.float64]:
    """Rows of unit length, computed in float64 to avoid overflow and underflow."""
    wide = rows.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(lengths[:, 0]) | (lengths[:, 0] == 0))
    if len(bad):
        raise InputError(
            f"a feature needs finite numbers and a length above 0; row {bad[0]} has length {lengths[bad[0], 0]} "
            f"({len(bad)} such rows): leave it out"
        )
    unit: NDArray[np.float64] = wide / lengths
    return unit
