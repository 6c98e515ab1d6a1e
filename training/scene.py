"""Synthetic cameras: where they hang, what they do to colours, and the crop they deliver of a person.

Two worlds: the cameras of ``site`` are worse than those of ``source``: duller, noisier, less sharp, hung
higher, with more standing in the way. Colours differ as much from camera to camera in both.

Letters: H and W of the crop delivered; drawing is done at twice its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from resight.image import Pixels
from resight.training.figure import Placement, Pose, draw_person
from resight.training.people import Person, World, sample_people

Range = tuple[float, float]
DRAWN = 2  # pixels drawn for each delivered: shrinking smooths the edges
BACKDROP = 4  # the wall behind is this many crops wide, so that each crop shows another part of it


@dataclass(frozen=True)
class LookRanges:
    """From what to what a world's cameras look different; chosen by eye on contact sheets and by raw-pixel rank-1."""

    gain: Range  # of each colour channel
    gamma: Range
    contrast: Range
    brightness: Range  # added, shares of full scale
    saturation: Range
    blur: Range  # standard deviation, delivered pixels at 128 rows
    noise: Range  # standard deviation, grey levels
    rows: Range  # resolution at which the person is really seen, shares of H
    tilt: Range  # camera height: see `Pose`
    occlusion: Range  # probability that something stands before the person
    quality: Range  # of the JPEG


WORLDS: Mapping[World, LookRanges] = {
    "source": LookRanges(
        (0.8, 1.2), (0.75, 1.35), (0.8, 1.1), (-0.06, 0.06), (0.7, 1.2), (0.2, 1.0), (1, 5), (0.5, 1.0),
        (0.0, 0.15), (0.05, 0.25), (80, 95),
    ),
    "site": LookRanges(
        (0.8, 1.2), (0.75, 1.35), (0.75, 1.05), (-0.06, 0.08), (0.6, 1.0), (0.5, 1.3), (3, 7), (0.45, 0.85),
        (0.05, 0.22), (0.15, 0.35), (60, 85),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Camera:
    """One camera: a draw from `LookRanges`. ``backdrop`` is (2H, 8W) RGB, ``matrix`` (3, 3) mixes its colours."""

    matrix: NDArray[np.float32]
    gamma: float
    contrast: float
    brightness: float
    vignette: NDArray[np.float32]  # (H, W, 1), factors
    blur: float
    noise: float
    rows: int
    tilt: float
    turns: tuple[float, ...]  # usual view angles, radians
    light: float  # -1..1: from which side
    occlusion: float
    quality: int
    backdrop: Image.Image
    strangers: tuple[Person, ...]  # who may walk through


def make_cameras(count: int, rng: np.random.Generator, *, world: World, height: int, width: int) -> tuple[Camera, ...]:
    """Draw the cameras of one site.

    Args:
        count: how many.
        rng: source of chance.
        world: whose ranges.
        height: of the crops, in pixels.
        width: of the crops, in pixels.
    """
    strangers = sample_people(40, rng, world=world)
    return tuple(_make_camera(rng, WORLDS[world], height, width, strangers) for _ in range(count))


def _make_camera(
    rng: np.random.Generator, ranges: LookRanges, height: int, width: int, strangers: tuple[Person, ...]
) -> Camera:
    grey = np.full((3, 3), 1 / 3)
    saturation = rng.uniform(*ranges.saturation)
    matrix = np.diag(rng.uniform(*ranges.gain, 3)) @ (saturation * np.eye(3) + (1 - saturation) * grey)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    vignette = 1 - rng.uniform(0, 0.35) * (x**2 + y**2) / 2
    first = rng.uniform(0, 2 * math.pi)
    return Camera(
        matrix=matrix.astype(np.float32),
        gamma=float(rng.uniform(*ranges.gamma)),
        contrast=float(rng.uniform(*ranges.contrast)),
        brightness=float(rng.uniform(*ranges.brightness)),
        vignette=vignette[..., None].astype(np.float32),
        blur=float(rng.uniform(*ranges.blur)) * height / 128,
        noise=float(rng.uniform(*ranges.noise)),
        rows=round(float(rng.uniform(*ranges.rows)) * height),
        tilt=float(rng.uniform(*ranges.tilt)),
        turns=(first, first + math.pi),  # a passage is walked both ways
        light=float(rng.uniform(-1, 1)),
        occlusion=float(rng.uniform(*ranges.occlusion)),
        quality=round(rng.uniform(*ranges.quality)),
        backdrop=_draw_backdrop(rng, DRAWN * height, BACKDROP * DRAWN * width),
        strangers=strangers,
    )


def _draw_backdrop(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """A wall over a floor, with doors, windows, signs and floor lines."""
    tone = rng.uniform(70, 210, 3) * 0.4 + rng.uniform(70, 210) * 0.6  # walls and floors are nearly grey
    floor = np.clip(tone * rng.uniform(0.5, 1.2) + rng.uniform(-20, 20, 3), 20, 235)
    image = Image.new("RGB", (width, height), _rgb(tone))
    draw = ImageDraw.Draw(image)
    horizon = round(height * rng.uniform(0.55, 0.85))
    for _ in range(int(rng.integers(6, 14))):
        left, wide = rng.uniform(0, width), rng.uniform(0.02, 0.15) * width
        top = rng.uniform(0, 0.5) * height
        low = horizon if rng.random() < 0.5 else top + rng.uniform(0.1, 0.4) * height
        draw.rectangle((left, top, left + wide, low), fill=_rgb(tone * rng.uniform(0.4, 1.4) + rng.uniform(-45, 45, 3)))
    draw.rectangle((0, horizon, width, height), fill=_rgb(floor))
    for _ in range(int(rng.integers(3, 10))):
        x, slope = rng.uniform(-0.2, 1.2) * width, rng.uniform(-1, 1) * width * 0.2
        draw.line(
            (x, horizon, x + slope, height), fill=_rgb(floor * rng.uniform(0.7, 1.3)), width=int(rng.integers(2, 8))
        )
    return image.filter(ImageFilter.GaussianBlur(2))


def _rgb(colour: NDArray[np.float64]) -> tuple[int, int, int]:
    red, green, blue = (int(channel) for channel in np.clip(colour, 0, 255))
    return red, green, blue


def take_crop(person: Person, camera: Camera, heading: float, rng: np.random.Generator) -> Pixels:
    """What a camera delivers of a person.

    Args:
        person: who passes.
        camera: who looks.
        heading: view angle of this visit, radians; crops of one visit differ from it a little.
        rng: source of chance.

    Returns:
        uint8 (H, W, 3).
    """
    height, width = camera.vignette.shape[:2]
    canvas = _window(camera.backdrop, DRAWN * height, DRAWN * width, rng)
    pose = Pose(
        turn=heading + rng.normal(0, 0.25),
        phase=rng.uniform(0, 2 * math.pi),
        stride=rng.uniform(0.15, 0.55),
        tilt=camera.tilt,
        raised=bool(rng.random() < 0.1),
    )
    _paint(canvas, person, pose, rng)
    if rng.random() < camera.occlusion:
        _occlude(canvas, camera, pose, rng)
    return _expose(canvas, camera, rng)


def _window(backdrop: Image.Image, height: int, width: int, rng: np.random.Generator) -> Image.Image:
    """A random part of the wall."""
    left = int(rng.integers(0, backdrop.width - width + 1))
    return backdrop.crop((left, 0, left + width, height))


def _paint(canvas: Image.Image, person: Person, pose: Pose, rng: np.random.Generator, *, shift: float = 0.0) -> None:
    """Put a person before the canvas as a detector would frame them: now and then too wide or cut off."""
    height = canvas.height
    scale = height * rng.uniform(0.86, 1.05)
    layer = Image.new("RGBA", canvas.size)
    place = Placement(
        x=canvas.width * (0.5 + rng.normal(0, 0.04) + shift), y=height * rng.uniform(-0.04, 0.06), scale=scale
    )
    draw_person(layer, person, pose, place)
    canvas.paste(layer, (0, 0), layer)


def _occlude(canvas: Image.Image, camera: Camera, pose: Pose, rng: np.random.Generator) -> None:
    """A post, a low barrier, or somebody else half in the way."""
    draw = ImageDraw.Draw(canvas)
    colour = _rgb(np.full(3, rng.uniform(20, 220)) + rng.uniform(-25, 25, 3))
    width, height = canvas.size
    match int(rng.integers(3)):
        case 0:
            x = rng.uniform(0.1, 0.9) * width
            draw.rectangle((x, 0, x + rng.uniform(0.06, 0.14) * width, height), fill=colour)
        case 1:
            draw.rectangle((0, rng.uniform(0.62, 0.85) * height, width, height), fill=colour)
        case _:
            other = camera.strangers[int(rng.integers(len(camera.strangers)))]
            _paint(canvas, other, pose, rng, shift=float(rng.choice([-1, 1]) * rng.uniform(0.36, 0.5)))


def _expose(canvas: Image.Image, camera: Camera, rng: np.random.Generator) -> Pixels:
    """Optics and electronics: resolution, blur, light, colour, contrast, noise."""
    height, width = camera.vignette.shape[:2]
    seen = canvas.resize((max(16, camera.rows * width // height), camera.rows), Image.Resampling.BOX)
    sharp = seen.resize((width, height), Image.Resampling.BILINEAR)
    if camera.blur > 0.3:  # below that no pixel changes by a grey level
        sharp = sharp.filter(ImageFilter.GaussianBlur(camera.blur))
    values: NDArray[np.floating[Any]] = np.asarray(sharp, np.float32) / 255
    across = np.linspace(-1, 1, width, dtype=np.float32)[:, None]
    flicker = rng.uniform(0.92, 1.08)
    values = values * (1 + 0.18 * camera.light * across) * camera.vignette * flicker
    values = values @ camera.matrix.T
    values = np.clip(values, 0, 1) ** camera.gamma
    values = (values - 0.5) * camera.contrast + 0.5 + camera.brightness
    values = 255 * values + rng.standard_normal(values.shape, np.float32) * camera.noise
    pixels: Pixels = np.clip(values, 0, 255).astype(np.uint8)
    return pixels
