"""A simulated street: cameras that hang over it, and who walks through their pictures when.

Everything here is geometry and chance; `film.py` draws it. A picture is `WIDTH` x `HEIGHT` pixels. Somebody far
away stands higher in it and is smaller; depth is 0 at the far edge of the street and 1 at the near one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resight.training.synthetic.camera import SimulatedCamera, make_cameras

WIDTH, HEIGHT = 480, 270  # pixels: people are about as high in it as the crops the built-in weights were trained on
FPS = 5.0  # frames a second, as `resight ingest` reads footage by default
FAR_SCALE, NEAR_SCALE = 80.0, 155.0  # pixels of the usual body height at depth 0 and 1
FAR_FEET, NEAR_FEET = 150.0, 255.0  # row of the feet at depth 0 and 1
BODY_M = 1.7  # metres of the usual body height
SPEED_M_S = (1.1, 1.6)  # of walking; Weidmann (1993) gives 1.34 in the mean, with a deviation of 0.26
STRIDE_S = 1.1  # seconds of two steps
OUTSIDE = 0.12  # of the width: how far beyond the edge people come from and leave to
BACK = 0.4  # share of people who look round and go back to where they came from: one track shows both their sides
BEND = 0.4  # radians by which the others change direction, as one deviation
DEPTH_TURN = 0.4  # depth walked while the picture's width is crossed at 45 degrees: the street is narrow
SLANT = 0.9  # radians at most between a walk and the picture's plane: everybody leaves at one of its sides
STEEPEST = 1.2  # radians likewise after a bend


@dataclass(frozen=True)
class Leg:
    """A straight part of a walk.

    Attributes:
        seconds: how long it takes.
        x: from and to, centre of the body in shares of the width.
        depth: from and to, 0..1.
        turn: view angle, see `figure.Pose`.
    """

    seconds: float
    x: tuple[float, float]
    depth: tuple[float, float]
    turn: float


@dataclass(frozen=True)
class Walk:
    """One walk through one camera's picture.

    Attributes:
        person: number in the cast.
        start_s: when it begins, on the clock of the film.
        legs: its parts; between two of them the walker turns.
        phase: moment of the stride at the start, radians.
        stride: swing of the thigh, radians.
    """

    person: int
    start_s: float
    legs: tuple[Leg, ...]
    phase: float
    stride: float

    @property
    def seconds(self) -> float:
        """How long it takes."""
        return sum(leg.seconds for leg in self.legs)

    @property
    def end_s(self) -> float:
        """When it ends."""
        return self.start_s + self.seconds

    def at(self, time_s: float) -> WalkPosition:
        """Where the walker is, a time of the film within the walk given."""
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
    """Where somebody stands in a picture.

    Attributes:
        x: centre of the body, pixels.
        feet: row of the feet, pixels.
        scale: pixels of the usual body height.
        phase: moment of the stride, radians.
        leg: number of the walk's part.
    """

    x: float
    feet: float
    scale: float
    phase: float
    leg: int


def place_cameras(count: int, rng: np.random.Generator) -> tuple[SimulatedCamera, ...]:
    """Cameras of the world "site" over a street; each looks at a passage that is walked both ways.

    Args:
        count: how many.
        rng: source of chance.
    """
    cameras = make_cameras(count, rng, world="site", height=HEIGHT, width=WIDTH)
    return tuple(_placed_over_street(camera, rng) for camera in cameras)


def _placed_over_street(camera: SimulatedCamera, rng: np.random.Generator) -> SimulatedCamera:
    """People fill half the picture here, not all of it as in a crop; nobody walks straight at the camera."""
    axis = math.pi / 2 + float(rng.uniform(-SLANT, SLANT))
    body = (FAR_SCALE + NEAR_SCALE) / 2
    return dataclasses.replace(camera, turns=(axis, axis + math.pi), blur=camera.blur * body / HEIGHT)


def at_dusk(camera: SimulatedCamera) -> SimulatedCamera:
    """The same camera when daylight has gone: dark, bluish, grainy and soft. Chosen by eye on contact sheets."""
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
    """Let people pass a camera one after another, so that their walks overlap and cross.

    Args:
        people: numbers in the cast, in the order they come.
        camera: whose passage they walk.
        together: how many are in the picture at a time, in the mean.
        rng: source of chance.
    """
    walks = [_walk(person, camera, rng) for person in people]
    start_s, begun = 0.0, []
    for walk in walks:
        begun.append(dataclasses.replace(walk, start_s=start_s))
        start_s += walk.seconds / together * float(rng.uniform(0.3, 1.7))
    return tuple(begun)


def _walk(person: int, camera: SimulatedCamera, rng: np.random.Generator) -> Walk:
    """Through the picture with a bend, or to somewhere in it and back."""
    turn = float(rng.choice(camera.turns)) + float(rng.normal(0, 0.15))
    rightwards, back = math.sin(turn) > 0, bool(rng.random() < BACK)
    near, far = (-OUTSIDE, 1 + OUTSIDE) if rightwards else (1 + OUTSIDE, -OUTSIDE)
    middle, depth = float(rng.uniform(0.3, 0.7)), float(rng.uniform(0.2, 0.8))
    speed = float(rng.uniform(*SPEED_M_S))
    straight = math.pi / 2 if rightwards else 3 * math.pi / 2
    bent = straight + float(np.clip(turn - straight + rng.normal(0, BEND), -STEEPEST, STEEPEST))
    turned = turn + math.pi if back else bent
    coming = _leg(turn, (near, middle), depth, speed, ends=True)
    leaving = _leg(turned, (middle, near if back else far), depth, speed, ends=False)
    return Walk(person, 0.0, (coming, leaving), float(rng.uniform(0, 2 * math.pi)), float(rng.uniform(0.25, 0.5)))


def _leg(turn: float, x: tuple[float, float], depth: float, speed: float, *, ends: bool) -> Leg:
    """A part of a walk that ends, or begins, in the depth given."""
    wide = abs(x[1] - x[0])
    across = max(abs(math.sin(turn)), 0.5)  # nobody walks so straight at the camera that they never leave
    other = float(np.clip(depth + (-1 if ends else 1) * DEPTH_TURN * wide * math.cos(turn) / across, 0, 1))
    metres = wide * WIDTH / (FAR_SCALE + (NEAR_SCALE - FAR_SCALE) * depth) * BODY_M / across
    return Leg(metres / speed, x, (other, depth) if ends else (depth, other), turn)
