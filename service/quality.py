"""How much a crop can tell about a person, 0..1: size, sharpness and exposure. No match score.

quality = (size x sharpness x exposure) ^ 1/3, so that one factor of zero makes it zero:

- size: the crop's pixels over the encoder's, at most 1;
- sharpness: v / (v + 100), v the variance of the 4-neighbour Laplacian of the fitted grey image on
  levels of 0..255; 100 is the customary border between blurred and sharp for that variance;
- exposure: the share of pixels that are neither nearly black (< 8) nor nearly white (> 247).
"""

from __future__ import annotations

import numpy as np

from resight.image import Pixels

SHARP_VARIANCE = 100.0
BLACK, WHITE = 8, 247  # 3 % of the range at each end, where cameras clip


def quality(fitted: Pixels, size: tuple[int, int]) -> float:
    """Judge one crop.

    Args:
        fitted: uint8 (H, W, 3) RGB at the encoder's size.
        size: height and width the crop came with.

    Returns:
        0..1.
    """
    grey = fitted.astype(np.float32).mean(axis=2)  # (H, W)
    area = min(1.0, size[0] * size[1] / grey.size)
    inner = grey[1:-1, 1:-1]
    laplacian = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * inner
    variance = float(laplacian.var())
    exposure = float(((grey >= BLACK) & (grey <= WHITE)).mean())
    product = area * variance / (variance + SHARP_VARIANCE) * exposure
    return float(product ** (1 / 3))
