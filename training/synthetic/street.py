"""A simulated street: the cameras above it and the walks of people through their images.

This module only computes geometry; `film.py` draws it. An image is `WIDTH` x `HEIGHT` pixels. People farther away are
higher in the image and smaller; depth is 0 at the far edge of the street and 1 at the near one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resight.training.synthetic.camera import SimulatedCamera, make_cameras

WIDTH, HEIGHT = 480, 270  # pixels: people are about as high as the crops the built-in weights were trained on
FPS = 5.0  # frames per second, the default of `resight ingest`
FAR_SCALE, NEAR_SCALE = 80.0, 155.0  # pixels of the usual body height at depth 0 and 1
FAR_FEET, NEAR_FEET = 150.0, 255.0  # row of the feet at depth 0 and 1
BODY_M = 1.7  # metres of the usual body height
SPEED_M_S = (1.1, 1.6)  # walking speed; Weidmann (1993) reports a mean of 1.34 with a standard deviation of 0.26
STRIDE_S = 1.1  # duration of two steps
OUTSIDE = 0.12  # distance beyond the image edge where walks start and end, fraction of the width
BACK = 0.4  # share of people who turn around and walk back, so that a track shows both sides of them
BEND = 0.4  # standard deviation of the change of direction of the others, in radians
DEPTH_TURN = 0.4  # depth covered while crossing the image width at 45 degrees: the street is narrow
SLANT = 0.9  # maximum angle between a walk and the image plane in radians: everyone leaves at a side of the image
STEEPEST = 1.2  # the same after a bend


@dataclass(frozen=True)
class Leg:
    """A straight part of a walk.

    Attributes:
        seconds: duration.
        x: start and end, centre of the body as a fraction of the width.
        depth: start and end, 0..1.
        turn: view angle, see `figure.Pose`.
    """

    seconds: float
    x: tuple[float, float]
    depth: tuple[float, float]
    turn: float


@dataclass(frozen=True)
class Walk:
    """One walk through one camera's image.

    Attributes:
        person: number of the person in the cast.
        start_s: start in seconds of the video.
        legs: straight parts, between which the walker turns.
        phase: phase of the stride at the start, radians.
        stride: swing of the thigh, radians.
    """

    person: int
    start_s: float
    legs: tuple[Leg, ...]
    phase: float
    stride: float

    @property
    def seconds(self) -> float:
        """Duration of the walk."""
        return sum(leg.seconds for leg in self.legs)

    @property
    def end_s(self) -> float:
        """End in seconds of the video."""
        return self.start_s + self.seconds

    def at(self, time_s: float) -> WalkPosition:
        """Position of the walker at a time of the video within the walk."""
        number, since_s = 0, time_s - self.start_s
        while number < len(self.legs) - 1 and since_s >= self.legs[number].seconds:
            since_s -= self.legs[number].seconds
            number += 1
        leg = self.legs[number]
        share = since_s / leg.seconds
        x, depth = (low + (high - low) * share for low, high in (leg.x, leg.depth))
        scale = FAR_SCALE + (NEAR_SCALE - FAR_SCALE) * depth
        feet = FAR_FEET + (NEAR_FEET - FAR_FEET) * depth
        return WalkPosition(
            x * WIDTH, feet, scale, self.phase + 2 * math.pi * (time_s - self.start_s) / STRIDE_S, number
        )


@dataclass(frozen=True)
class WalkPosition:
    """Position of a person in an image.

    Attributes:
        x: centre of the body, pixels.
        feet: row of the feet, pixels.
        scale: pixels of the usual body height.
        phase: phase of the stride, radians.
        leg: index of the leg.
    """

    x: float
    feet: float
    scale: float
    phase: float
    leg: int


def place_cameras(count: int, rng: np.random.Generator) -> tuple[SimulatedCamera, ...]:
    """Cameras of the world "site" above a street where people walk in both directions.

    Args:
        count: number of cameras.
        rng: the only source of randomness.
    """
    cameras = make_cameras(count, rng, world="site", height=HEIGHT, width=WIDTH)
    return tuple(_placed_over_street(camera, rng) for camera in cameras)


def _placed_over_street(camera: SimulatedCamera, rng: np.random.Generator) -> SimulatedCamera:
    """Adapt a crop camera: people fill half of the image height, and nobody walks straight towards the camera."""
    axis = math.pi / 2 + float(rng.uniform(-SLANT, SLANT))
    body = (FAR_SCALE + NEAR_SCALE) / 2
    return dataclasses.replace(camera, turns=(axis, axis + math.pi), blur=camera.blur * body / HEIGHT)


def at_dusk(camera: SimulatedCamera) -> SimulatedCamera:
    """The same camera without daylight: dark, bluish, noisy and soft. Chosen by eye on contact sheets."""
    blue = np.diag([0.8, 0.88, 1.05]).astype(np.float32)
    return dataclasses.replace(
        camera,
        matrix=blue @ camera.matrix,
        gamma=camera.gamma * 1.3,
        contrast=camera.contrast * 0.95,
        noise=camera.noise * 2,
        blur=camera.blur + 0.3,
        light=-camera.light,
    )


def simulate_walks(
    people: Sequence[int], camera: SimulatedCamera, together: float, rng: np.random.Generator
) -> tuple[Walk, ...]:
    """Simulate successive walks past a camera that overlap and cross.

    Args:
        people: numbers in the cast, in order of appearance.
        camera: the camera.
        together: mean number of people in the image.
        rng: the only source of randomness.
    """
    walks = [_random_walk(person, camera, rng) for person in people]
    start_s, scheduled = 0.0, []
    for walk in walks:
        scheduled.append(dataclasses.replace(walk, start_s=start_s))
        start_s += walk.seconds / together * float(rng.uniform(0.3, 1.7))
    return tuple(scheduled)


def _random_walk(person: int, camera: SimulatedCamera, rng: np.random.Generator) -> Walk:
    """A walk through the image with a bend, or to a point in it and back."""
    turn = float(rng.choice(camera.turns)) + float(rng.normal(0, 0.15))
    rightwards, back = math.sin(turn) > 0, bool(rng.random() < BACK)
    near, far = (-OUTSIDE, 1 + OUTSIDE) if rightwards else (1 + OUTSIDE, -OUTSIDE)
    middle, depth = float(rng.uniform(0.3, 0.7)), float(rng.uniform(0.2, 0.8))
    speed = float(rng.uniform(*SPEED_M_S))
    straight = math.pi / 2 if rightwards else 3 * math.pi / 2
    new_turn = straight + float(np.clip(turn - straight + rng.normal(0, BEND), -STEEPEST, STEEPEST))
    second_turn = turn + math.pi if back else new_turn
    first = _leg(turn, (near, middle), depth, speed, ends=True)
    second = _leg(second_turn, (middle, near if back else far), depth, speed, ends=False)
    return Walk(person, 0.0, (first, second), float(rng.uniform(0, 2 * math.pi)), float(rng.uniform(0.25, 0.5)))


def _leg(turn: float, x: tuple[float, float], depth: float, speed: float, *, ends: bool) -> Leg:
    """A part of a walk that ends (or starts) at the given depth."""
    wide = abs(x[1] - x[0])
    across = max(abs(math.sin(turn)), 0.5)  # bounded, so that every walk leaves the image
    other = float(np.clip(depth + (-1 if ends else 1) * DEPTH_TURN * wide * math.cos(turn) / across, 0, 1))
    metres = wide * WIDTH / (FAR_SCALE + (NEAR_SCALE - FAR_SCALE) * depth) * BODY_M / across
    return Leg(metres / speed, x, (other, depth) if ends else (depth, other), turn)
