"""Training-time augmentation, on whole batches (SpCL, Cluster Contrast, LP, O2CAP use these values).

Flip, pad and crop act on uint8 pixels; random erasing (Zhong et al., AAAI 2020) acts after
normalisation and fills with the ImageNet mean, as the released codes do. Chance is drawn for a whole batch
even where only a part of it is at hand, so that a crop gets the same pixels in whichever process it lands.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from resight.image import Pixels
from resight.model import IMAGENET_MEAN


@dataclass(frozen=True)
class AugmentSettings:
    """Probabilities and sizes; the defaults are those of LP and O2CAP.

    Attributes:
        flip: probability of a horizontal flip.
        pad: zero pixels added on each side before a random crop back to size, at 256 x 128; scaled with the height.
        erase: probability that a rectangle is erased.
        erase_area: smallest and largest share of the image erased.
        erase_aspect: smallest height / width of the rectangle; the largest is its inverse.
    """

    flip: float = 0.5
    pad: int = 10
    erase: float = 0.5
    erase_area: tuple[float, float] = (0.02, 0.40)
    erase_aspect: float = 0.3


def shift_and_flip(
    images: Pixels, settings: AugmentSettings, rng: np.random.Generator, *, batch: int | None = None, start: int = 0
) -> Pixels:
    """Flip and pad-crop a batch, or a part of one.

    Args:
        images: uint8 (B, H, W, 3).
        settings: see `AugmentSettings`.
        rng: the only source of chance.
        batch: crops of the whole batch; these are all of it by default.
        start: position of the first of these in the batch.

    Returns:
        uint8 (B, H, W, 3), a new array.
    """
    count, height, width, _ = images.shape
    batch = count if batch is None else batch
    pad = round(settings.pad * height / 256)
    flips = np.less(rng.random(batch), settings.flip)[start:]
    offsets = rng.integers(0, 2 * pad + 1, (batch, 2))[start:]
    padded = np.zeros((count, height + 2 * pad, width + 2 * pad, 3), np.uint8)
    padded[:, pad : pad + height, pad : pad + width] = images
    out = np.empty_like(images)
    for row, (top, left) in enumerate(offsets[:count]):
        crop = padded[row, top : top + height, left : left + width]
        out[row] = crop[:, ::-1] if flips[row] else crop
    return out


def erase(
    images: Tensor, settings: AugmentSettings, rng: np.random.Generator, *, batch: int | None = None, start: int = 0
) -> Tensor:
    """Erase one rectangle in some images of a normalised batch, or of a part of one, in place.

    Args:
        images: float32 (B, 3, H, W), normalised.
        settings: see `AugmentSettings`.
        rng: the only source of chance.
        batch: crops of the whole batch; these are all of it by default.
        start: position of the first of these in the batch.

    Returns:
        The same tensor.
    """
    height, width = images.shape[2:]
    fill = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    for row in np.flatnonzero(rng.random(len(images) if batch is None else batch) < settings.erase) - start:
        for _ in range(100):  # the released codes' number of attempts to find a rectangle that fits
            area = rng.uniform(*settings.erase_area) * height * width
            aspect = rng.uniform(settings.erase_aspect, 1 / settings.erase_aspect)
            tall, wide = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if 0 < tall < height and 0 < wide < width:
                top, left = rng.integers(0, height - tall + 1), rng.integers(0, width - wide + 1)
                if 0 <= row < len(images):
                    images[row, :, top : top + tall, left : left + wide] = fill
                break
    return images
