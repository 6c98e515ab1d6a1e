"""Training batches: four samplers that draw the rows, and the augmentation of the pixels.

Flip, pad and crop work on uint8 pixels; random erasing (Zhong et al., AAAI 2020) follows normalisation and fills with
the ImageNet mean, as in the released code of SpCL, Cluster Contrast, LP and O2CAP, whose values are the defaults.
Random numbers are always drawn for the whole batch, even if a process holds only a part of it, so that a crop gets
the same pixels in any process.

Letters: B batch, K crops per cluster, N crops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as validated
from torch import Tensor

from resight.arrays import Ints, Pixels
from resight.encoder.model import IMAGENET_MEAN
from resight.errors import TrainingError
from resight.validation import STRICT


def camera_batches(
    labels: Ints, cameras: Ints, *, batch: int, instances: int, rng: np.random.Generator
) -> Iterator[Ints]:
    """Endless batches of `instances` crops per cluster, partners from other cameras if there are any.

    The multiple-gallery sampler of SpCL, Cluster Contrast and LP: each pass visits every cluster once in random
    order and draws a random anchor, then instances - 1 crops from the cluster's other cameras, or from the same
    camera if there is no other (with replacement only if there are too few). A cluster of one crop yields
    that crop alone. Passes are concatenated, so that few clusters still fill a batch; crops of one cluster are
    adjacent, which grouped batch norm relies on.

    Args:
        labels: int64 (N,), -1 for outliers, which are never drawn.
        cameras: int64 (N,), any values.
        batch: B, crops per batch.
        instances: K.
        rng: the only source of randomness.

    Yields:
        int64 (B,), rows of the store.

    Raises:
        TrainingError: no crop has a label.
    """
    return _batches_by_label(labels, batch, rng, lambda rows: _instances(rows, cameras, instances, rng))


def balanced_batches(
    labels: Ints, cameras: Ints, *, batch: int, instances: int, rng: np.random.Generator
) -> Iterator[Ints]:
    """Endless batches of `instances` crops per cluster, spread over the cluster's cameras as evenly as possible.

    Cameras alternate in random order; crops are repeated only after all crops of the cluster have been drawn.
    Arguments, errors and passes as in `camera_batches`.
    """
    return _batches_by_label(labels, batch, rng, lambda rows: _spread(rows, cameras, instances, rng))


def proxy_batches(labels: Ints, *, batch: int, instances: int, rng: np.random.Generator) -> Iterator[Ints]:
    """Endless batches of `instances` crops per proxy (O2CAP's proxy-uniform sampler).

    For a proxy with fewer crops the list is repeated `instances` times, shuffled and truncated, as in the released
    code, so it may repeat one crop and omit another. Arguments, errors and passes as in `camera_batches`.
    """

    def draw(rows: Ints) -> list[int]:
        if len(rows) >= instances:
            return list(rng.choice(rows, instances, replace=False))
        return list(rng.permutation(np.tile(rows, instances))[:instances])

    return _batches_by_label(labels, batch, rng, draw)


def shuffled_batches(count: int, *, batch: int, rng: np.random.Generator) -> Iterator[Ints]:
    """Endless batches of all `count` crops in passes of random order, no crop twice in a batch.

    Raises:
        TrainingError: fewer crops than a batch needs.
    """
    if count < batch:
        raise TrainingError(f"{count} crops do not fill a batch of {batch}: lower `batch` in the recipe")
    while True:
        order = rng.permutation(count)
        for start in range(0, count - batch + 1, batch):  # the released loader drops the rest of a pass
            yield order[start : start + batch]


def _batches_by_label(
    labels: Ints, batch: int, rng: np.random.Generator, draw: Callable[[Ints], list[int]]
) -> Iterator[Ints]:
    """Visit every label in random order, pass after pass, and cut the drawn rows into batches."""
    members = _members(labels)
    if not members:
        raise TrainingError("no crop has a label: expected clusters to draw batches from")
    return _cut_batches((draw(members[label]) for label in _endless(len(members), rng)), batch)


def _endless(count: int, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(count)


def _cut_batches(drawn: Iterable[list[int]], batch: int) -> Iterator[Ints]:
    pending: list[int] = []
    for rows in drawn:
        pending.extend(rows)
        while len(pending) >= batch:
            yield np.asarray(pending[:batch])
            pending = pending[batch:]


def _members(labels: Ints) -> list[Ints]:
    """Rows of each label, in ascending order of label."""
    inliers = np.flatnonzero(labels >= 0)
    order = inliers[np.argsort(labels[inliers], kind="stable")]
    _, starts = np.unique(labels[order], return_index=True)
    return np.split(order, starts[1:]) if len(order) else []


def _instances(rows: Ints, cameras: Ints, count: int, rng: np.random.Generator) -> list[int]:
    """An anchor and its partners, or the anchor alone."""
    anchor = rng.choice(rows)
    others = rows[rows != anchor]
    other_cameras = others[cameras[others] != cameras[anchor]]
    partners = other_cameras if len(other_cameras) else others
    if not len(partners) or count == 1:
        return [int(anchor)]
    chosen = rng.choice(partners, count - 1, replace=len(partners) < count - 1)
    return [int(anchor), *chosen.tolist()]


def _spread(rows: Ints, cameras: Ints, count: int, rng: np.random.Generator) -> list[int]:
    """`count` rows, one camera after the other in round_; rows repeat only if there are too few."""
    shuffled = rng.permutation(rows)
    _, number = np.unique(cameras[shuffled], return_inverse=True)
    round_ = _occurrence(number) + rng.permutation(number.max() + 1)[number] / (number.max() + 1.0)
    order = shuffled[np.argsort(round_, kind="stable")]
    return list(np.resize(order, count))


def _occurrence(number: Ints) -> Ints:
    """The number of equal values before each position: [5, 7, 5, 5] -> [0, 0, 1, 2]."""
    order = np.argsort(number, kind="stable")
    first = np.searchsorted(number[order], number[order], side="left")
    round_ = np.empty_like(order)
    round_[order] = np.arange(len(number)) - first
    return round_


Probability = Annotated[float, Field(ge=0, le=1)]


@validated(frozen=True, config=STRICT)
class AugmentSettings:
    """Probabilities and sizes; the defaults are those of LP and O2CAP.

    Attributes:
        flip: probability of a horizontal flip.
        pad: zero pixels added on each side before a random crop back to size, at 256 x 128; scaled with the height.
        erase: probability that a rectangle is erased.
        erase_area: smallest and largest share of the image erased.
        erase_aspect: smallest height / width of the rectangle; the largest is its inverse.
    """

    flip: Probability = 0.5
    pad: Annotated[int, Field(ge=0)] = 10
    erase: Probability = 0.5
    erase_area: tuple[Probability, Probability] = (0.02, 0.40)
    erase_aspect: Annotated[float, Field(gt=0, le=1)] = 0.3


def shift_and_flip(
    images: Pixels, settings: AugmentSettings, rng: np.random.Generator, *, batch: int | None = None, start: int = 0
) -> Pixels:
    """Flip and pad-crop a batch, or a part of one.

    Args:
        images: uint8 (B, H, W, 3).
        settings: see `AugmentSettings`.
        rng: the only source of randomness.
        batch: size of the whole batch if ``images`` is a part of it.
        start: position of the part in the batch.

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
        rng: the only source of randomness.
        batch: size of the whole batch if ``images`` is a part of it.
        start: position of the part in the batch.

    Returns:
        The same tensor.
    """
    height, width = images.shape[2:]
    fill = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    for row in np.flatnonzero(rng.random(len(images) if batch is None else batch) < settings.erase) - start:
        for _ in range(100):  # the released codes' number of attempts to find a rectangle that fits
            area = rng.uniform(*settings.erase_area) * height * width
            aspect = rng.uniform(settings.erase_aspect, 1 / settings.erase_aspect)
            rect_height, rect_width = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if 0 < rect_height < height and 0 < rect_width < width:
                top, left = rng.integers(0, height - rect_height + 1), rng.integers(0, width - rect_width + 1)
                if 0 <= row < len(images):
                    images[row, :, top : top + rect_height, left : left + rect_width] = fill
                break
    return images
