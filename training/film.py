"""Draw what a camera over a simulated street sees: people walk through, cover one another and leave.

A figure is drawn in a few poses for each walk and pasted smaller or larger as its walker goes; `exposure.py`
then takes the picture through the camera.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resight.image import Pixels
from resight.training.exposure import Exposure
from resight.training.figure import Placement, Pose, draw_person
from resight.training.people import Person
from resight.training.scene import BACKDROP, Camera
from resight.training.street import FPS, HEIGHT, NEAR_SCALE, WIDTH, Spot, Walk

POSES = 8  # of a stride: at 5 frames a second one of 1.1 s shows 5 or 6
WIGGLE = 0.12  # radians that the view angle changes from pose to pose, as one deviation
DRAWN = 1.5  # pixels drawn for each of the largest a figure is shown at
ABOVE, BELOW, ASIDE = 0.1, 0.1, 0.45  # room around the body for hats, shoes, arms and bags, in body heights
MIN_PIXELS = 60  # of somebody visible: below it nobody would say that somebody is there

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels of the picture; right and bottom are outside."""


@dataclass(frozen=True)
class Sighting:
    """One person in one frame.

    Attributes:
        walk: number of the walk in this film.
        person: number in the cast.
        box: of the part within the picture, covered or not.
        visible: share of that part which nobody covers, 0..1.
    """

    walk: int
    person: int
    box: Box
    visible: float


@dataclass(frozen=True, eq=False)  # arrays have no truth value to compare by
class Shot:
    """A frame, uint8 (HEIGHT, WIDTH, 3), and who is in it."""

    pixels: Pixels
    sightings: tuple[Sighting, ...]


@dataclass(frozen=True, eq=False)
class Figure:
    """A person in one pose, cut to what is painted; ``left`` and ``top`` are from the feet, all in body heights."""

    image: Image.Image
    left: float
    top: float
    width: float
    height: float


class View:
    """What one camera sees for one night; any moment of it can be taken.

    Args:
        camera: from `street.hang_cameras`.
        cast: everybody there is.
        walks: who walks when; their persons are numbers in ``cast``.
        seed: of poses and noise. Where the camera points does not hang on it.
    """

    def __init__(self, camera: Camera, cast: Sequence[Person], walks: Sequence[Walk], *, seed: int) -> None:
        self.camera, self.cast, self.walks = camera, cast, tuple(walks)
        self._seed = seed
        self._figures: dict[tuple[int, int], list[Figure]] = {}  # by walk and leg
        self._expose = Exposure(camera, np.random.default_rng(seed))
        wide = camera.backdrop.width // BACKDROP
        self._wall = camera.backdrop.crop((0, 0, wide, camera.backdrop.height)).resize((WIDTH, HEIGHT))

    @property
    def seconds(self) -> float:
        """When the last has left."""
        return max((walk.end_s for walk in self.walks), default=0.0)

    def shots(self) -> Iterator[Shot]:
        """Every frame of the film, `FPS` a second."""
        for number in range(math.ceil(self.seconds * FPS)):
            yield self.shot(number / FPS)

    def shot(self, time_s: float) -> Shot:
        """The frame of one moment, in seconds of the film; moments are best taken in their order."""
        for key in [key for key in self._figures if self.walks[key[0]].end_s <= time_s]:
            del self._figures[key]
        there = [(number, p.at(time_s)) for number, p in enumerate(self.walks) if p.start_s <= time_s < p.end_s]
        there.sort(key=lambda walker: walker[1].feet)  # the far ones first: the near ones cover them
        canvas, owner = self._wall.copy(), np.full((HEIGHT, WIDTH), -1, np.int32)
        painted = [self._paint(canvas, owner, number, spot) for number, spot in there]
        shown = [
            Sighting(number, self.walks[number].person, box, seen / pixels)
            for (number, _), (box, pixels) in zip(there, painted, strict=True)
            if (seen := int((owner[box[1] : box[3], box[0] : box[2]] == number).sum())) >= MIN_PIXELS
        ]
        return Shot(self._expose(canvas), tuple(shown))

    def _paint(self, canvas: Image.Image, owner: NDArray[np.int32], number: int, spot: Spot) -> tuple[Box, int]:
        """Put a walker into the picture; the box within it and how many pixels were painted there."""
        poses = self._poses(number, spot.leg)
        figure = poses[int(spot.phase / (2 * math.pi) * POSES) % POSES]
        wide, tall = (max(2, round(side * spot.scale)) for side in (figure.width, figure.height))
        left, top = round(spot.x + figure.left * spot.scale), round(spot.feet + figure.top * spot.scale)
        box = max(0, left), max(0, top), max(0, min(WIDTH, left + wide)), max(0, min(HEIGHT, top + tall))
        if box[0] >= box[2] or box[1] >= box[3]:
            return (0, 0, 0, 0), 0
        small = figure.image.resize((wide, tall), Image.Resampling.BILINEAR, reducing_gap=1.5)
        canvas.paste(small, (left, top), small)
        inside = np.asarray(small.getchannel("A"))[box[1] - top : box[3] - top, box[0] - left : box[2] - left] > 127
        owner[box[1] : box[3], box[0] : box[2]][inside] = number
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if not len(rows):
            return (0, 0, 0, 0), 0
        first, last = (int(columns[0]), int(rows[0])), (int(columns[-1]) + 1, int(rows[-1]) + 1)
        return (box[0] + first[0], box[1] + first[1], box[0] + last[0], box[1] + last[1]), int(inside.sum())

    def _poses(self, number: int, leg: int) -> list[Figure]:
        """The figures of one part of a walk, drawn when first needed."""
        if (number, leg) not in self._figures:
            walk, rng = self.walks[number], np.random.default_rng([self._seed, number, leg])
            raised = bool(rng.random() < 0.1)  # as `scene.take_crop`
            turns = walk.legs[leg].turn + rng.normal(0, WIGGLE, POSES)
            phases = np.arange(POSES) * 2 * math.pi / POSES
            self._figures[number, leg] = [
                draw_figure(self.cast[walk.person], Pose(turn, phase, walk.stride, self.camera.tilt, raised))
                for turn, phase in zip(turns.tolist(), phases.tolist(), strict=True)
            ]
        return self._figures[number, leg]


def draw_figure(person: Person, pose: Pose) -> Figure:
    """Draw somebody once, large enough for every place in the picture."""
    scale = NEAR_SCALE * DRAWN
    layer = Image.new("RGBA", (round(2 * ASIDE * scale), round((ABOVE + 1 + BELOW) * scale)))
    feet = (ABOVE + 1 - pose.tilt) * scale
    draw_person(layer, person, pose, Placement(layer.width / 2, ABOVE * scale, scale))
    painted = layer.getbbox()
    assert painted is not None, "a figure paints something"
    left, top, right, bottom = painted
    return Figure(
        layer.crop(painted),
        (left - layer.width / 2) / scale,
        (top - feet) / scale,
        (right - left) / scale,
        (bottom - top) / scale,
    )
