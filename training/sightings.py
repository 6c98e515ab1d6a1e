"""A simulated person detector: what it would tell of frames whose truth is known.

Boxes are a little off, people behind others are often missed, and now and then there is nobody in a box. It says
nothing about who is who: that is the tracker's and the model's work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resight.training.film import Sighting
from resight.training.street import HEIGHT, WIDTH

# Chosen so that ByteTrack has its usual work: most people found in most frames, low scores behind others.
JITTER = 0.025  # deviation of each side of a box, shares of its width or height
MISSED = 0.03  # share of visible people no box is told for
HIDDEN = 0.35  # below this visible share four in five are missed
HIDDEN_MISSED = 0.8
FALSE_RATE = 0.03  # boxes without anybody, for each frame


@dataclass(frozen=True)
class Detection:
    """A box and how sure the detector is, 0..1."""

    box: tuple[float, float, float, float]
    score: float


def detect(sightings: Sequence[Sighting], rng: np.random.Generator) -> list[Detection]:
    """What a detector tells of one frame.

    Args:
        sightings: the truth.
        rng: source of chance.
    """
    told = []
    for sighting in sightings:
        if rng.random() < (HIDDEN_MISSED if sighting.visible < HIDDEN else MISSED):
            continue
        score = 0.92 - 0.5 * (1 - sighting.visible) + rng.normal(0, 0.04)
        told.append(Detection(jitter(sighting.box, rng), round(float(np.clip(score, 0.3, 0.99)), 3)))
    for _ in range(int(rng.poisson(FALSE_RATE))):
        told.append(Detection(nobody(rng), round(float(rng.uniform(0.3, 0.6)), 3)))
    return told


def jitter(box: tuple[int, int, int, int], rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A box as a detector draws it: each side a little off, within the picture."""
    left, top, right, bottom = box
    off = rng.normal(0, JITTER, 4) * np.array([right - left, bottom - top] * 2)
    sides = np.clip(np.array(box) + off, 0, [WIDTH, HEIGHT, WIDTH, HEIGHT]).round(1)
    return float(sides[0]), float(sides[1]), float(sides[2]), float(sides[3])


def nobody(rng: np.random.Generator) -> tuple[float, float, float, float]:
    """A box as large as a person, where nobody stands."""
    tall = rng.uniform(0.3, 0.6) * HEIGHT
    wide = tall * rng.uniform(0.35, 0.5)
    left, top = rng.uniform(0, WIDTH - wide), rng.uniform(0, HEIGHT - tall)
    sides = np.array([left, top, left + wide, top + tall]).round(1)
    return float(sides[0]), float(sides[1]), float(sides[2]), float(sides[3])
