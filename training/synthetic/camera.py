"""Synthetic cameras: their position, colours and optics, and the crops and video frames they produce.

There are two worlds: the cameras of ``site`` are worse than those of ``source``: duller, noisier, less sharp, mounted
higher, with more occlusion. Colours vary equally between cameras in both. `take_crop` renders a single crop;
`FrameOptics` applies the same effects to whole video frames and is fast enough for many of them.

Letters: H and W of the output (crops are drawn at twice this size), h and w of the camera's real, lower resolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from resight.arrays import Pixels
from resight.training.synthetic.figure import Placement, Pose, draw_person
from resight.training.synthetic.people import Person, World, sample_people

Range = tuple[float, float]
SUPERSAMPLING = 2  # drawn pixels per output pixel: shrinking smooths the edges
BACKDROP_WIDTHS = 4  # width of the background in crops, so that each crop shows another part of it


@dataclass(frozen=True)
class CameraRanges:
    """Ranges of the camera parameters of a world; chosen by eye on contact sheets and by raw-pixel rank-1."""

    gain: Range  # of each colour channel
    gamma: Range
    contrast: Range
    brightness: Range  # added, fraction of full scale
    saturation: Range
    blur: Range  # standard deviation in output pixels at 128 rows
    noise: Range  # standard deviation, grey levels
    rows: Range  # real resolution, fraction of H
    tilt: Range  # camera height: see `Pose`
    occlusion: Range  # probability that something occludes the person
    quality: Range  # of the JPEG


WORLDS: Mapping[World, CameraRanges] = {
    "source": CameraRanges(
        (0.8, 1.2), (0.75, 1.35), (0.8, 1.1), (-0.06, 0.06), (0.7, 1.2), (0.2, 1.0), (1, 5), (0.5, 1.0),
        (0.0, 0.15), (0.05, 0.25), (80, 95),
    ),
    "site": CameraRanges(
        (0.8, 1.2), (0.75, 1.35), (0.75, 1.05), (-0.06, 0.08), (0.6, 1.0), (0.5, 1.3), (3, 7), (0.45, 0.85),
        (0.05, 0.22), (0.15, 0.35), (60, 85),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class SimulatedCamera:
    """One camera, sampled from `CameraRanges`. ``backdrop`` is (2H, 8W) RGB, ``matrix`` (3, 3) mixes the colours."""

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
    light: float  # -1..1: side of the light
    occlusion: float
    quality: int
    backdrop: Image.Image
    strangers: tuple[Person, ...]  # people who may occlude others


def make_cameras(
    count: int, rng: np.random.Generator, *, world: World, height: int, width: int
) -> tuple[SimulatedCamera, ...]:
    """Sample the cameras of one site.

    Args:
        count: number of cameras.
        rng: the only source of randomness.
        world: selects the ranges.
        height: height of the crops in pixels.
        width: width of the crops in pixels.
    """
    strangers = sample_people(40, rng, world=world)
    return tuple(_make_camera(rng, WORLDS[world], height, width, strangers) for _ in range(count))


def _make_camera(
    rng: np.random.Generator, ranges: CameraRanges, height: int, width: int, strangers: tuple[Person, ...]
) -> SimulatedCamera:
    grey = np.full((3, 3), 1 / 3)
    saturation = rng.uniform(*ranges.saturation)
    matrix = np.diag(rng.uniform(*ranges.gain, 3)) @ (saturation * np.eye(3) + (1 - saturation) * grey)
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    vignette = 1 - rng.uniform(0, 0.35) * (x**2 + y**2) / 2
    first = rng.uniform(0, 2 * math.pi)
    return SimulatedCamera(
        matrix=matrix.astype(np.float32),
        gamma=float(rng.uniform(*ranges.gamma)),
        contrast=float(rng.uniform(*ranges.contrast)),
        brightness=float(rng.uniform(*ranges.brightness)),
        vignette=vignette[..., None].astype(np.float32),
        blur=float(rng.uniform(*ranges.blur)) * height / 128,
        noise=float(rng.uniform(*ranges.noise)),
        rows=round(float(rng.uniform(*ranges.rows)) * height),
        tilt=float(rng.uniform(*ranges.tilt)),
        turns=(first, first + math.pi),  # people walk in both directions
        light=float(rng.uniform(-1, 1)),
        occlusion=float(rng.uniform(*ranges.occlusion)),
        quality=round(rng.uniform(*ranges.quality)),
        backdrop=_draw_backdrop(rng, SUPERSAMPLING * height, BACKDROP_WIDTHS * SUPERSAMPLING * width),
        strangers=strangers,
    )


def _draw_backdrop(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """A wall and a floor, with doors, windows, signs and floor lines."""
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


def take_crop(person: Person, camera: SimulatedCamera, heading: float, rng: np.random.Generator) -> Pixels:
    """Render a crop of a person.

    Args:
        person: the person.
        camera: the camera.
        heading: view angle of this visit in radians; crops of one visit vary slightly around it.
        rng: the only source of randomness.

    Returns:
        uint8 (H, W, 3).
    """
    height, width = camera.vignette.shape[:2]
    canvas = _window(camera.backdrop, SUPERSAMPLING * height, SUPERSAMPLING * width, rng)
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
    return _apply_optics(canvas, camera, rng)


def _window(backdrop: Image.Image, height: int, width: int, rng: np.random.Generator) -> Image.Image:
    """A random part of the background."""
    left = int(rng.integers(0, backdrop.width - width + 1))
    return backdrop.crop((left, 0, left + width, height))


def _paint(canvas: Image.Image, person: Person, pose: Pose, rng: np.random.Generator, *, shift: float = 0.0) -> None:
    """Paint a person onto the canvas, framed like a detector's box: sometimes too wide or truncated."""
    height = canvas.height
    scale = height * rng.uniform(0.86, 1.05)
    layer = Image.new("RGBA", canvas.size)
    place = Placement(
        x=canvas.width * (0.5 + rng.normal(0, 0.04) + shift), y=height * rng.uniform(-0.04, 0.06), scale=scale
    )
    draw_person(layer, person, pose, place)
    canvas.paste(layer, (0, 0), layer)


def _occlude(canvas: Image.Image, camera: SimulatedCamera, pose: Pose, rng: np.random.Generator) -> None:
    """Occlude the person by a post, a low barrier or another person."""
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


def _apply_optics(canvas: Image.Image, camera: SimulatedCamera, rng: np.random.Generator) -> Pixels:
    """Apply optics and electronics: resolution, blur, light, colour, contrast, noise."""
    height, width = camera.vignette.shape[:2]
    small = canvas.resize((max(16, camera.rows * width // height), camera.rows), Image.Resampling.BOX)
    sharp = small.resize((width, height), Image.Resampling.BILINEAR)
    if camera.blur > 0.3:  # smaller values do not change any grey level
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


TONES = 1024  # steps of the tone curve: four per output grey level
SIDE_LIGHT = 0.18  # as in `take_crop`
SHADE_COLOUR = (0.52, 0.56, 0.68)  # share of red, green and blue light in the shaded part of a street, lit by the sky
SHADE_EDGE = 0.06  # softness of the shade's border, fraction of the width
SHIFTS = 64  # maximum shift of the noise pattern between frames, in pixels


class FrameOptics:
    """Applies resolution, blur, light, colours, contrast and noise of one camera to frames.

    Args:
        camera: sampled for frames of H x W.
        rng: the only source of randomness, for the noise pattern and its shifts.
    """

    def __init__(self, camera: SimulatedCamera, rng: np.random.Generator) -> None:
        self._rng = rng
        self.height, self.width = camera.vignette.shape[:2]
        self._resolution = max(16, camera.rows * self.width // self.height), camera.rows  # (w, h)
        # A box blur of radius r has the variance ((2 r + 1)^2 - 1) / 12 and takes a third of the time of a Gaussian.
        self._blur = (math.sqrt(12 * (camera.blur * camera.rows / self.height) ** 2 + 1) - 1) / 2
        across = np.linspace(-1, 1, self._resolution[0], dtype=np.float32)[:, None]
        shade = Image.fromarray(camera.vignette[..., 0]).resize(self._resolution)
        light = (1 + SIDE_LIGHT * camera.light * across) * np.asarray(shade)[..., None]  # (h, w, 1)
        border = (across - 0.3 * camera.light) * math.copysign(1 / SHADE_EDGE, camera.light)
        sky = np.array(SHADE_COLOUR, np.float32)
        light = light * (sky + (1 - sky) * np.clip(0.5 + border, 0, 1))  # (h, w, 3)
        self._light = light * (TONES - 1) / 255
        self._matrix = camera.matrix.T
        tone = np.linspace(0, 1, TONES) ** camera.gamma
        tone = (tone - 0.5) * camera.contrast + 0.5 + camera.brightness
        self._tone = np.clip(255 * tone, 0, 255).astype(np.uint8)
        size = self.height + SHIFTS, self.width + SHIFTS, 3
        self._grain = (rng.standard_normal(size, np.float32) * camera.noise).astype(np.int16)

    def __call__(self, canvas: Image.Image) -> Pixels:
        """The camera's image of a scene.

        Args:
            canvas: RGB, W x H.

        Returns:
            uint8 (H, W, 3).
        """
        small = canvas.resize(self._resolution, Image.Resampling.BOX)
        if self._blur > 0.3:  # smaller values change hardly any pixel
            small = small.filter(ImageFilter.BoxBlur(self._blur))
        values: NDArray[np.float32] = (np.asarray(small, np.float32) * self._light) @ self._matrix
        toned = self._tone[np.clip(values, 0, TONES - 1).astype(np.uint16)]
        output = Image.fromarray(toned).resize((self.width, self.height), Image.Resampling.BILINEAR)
        down, right = (int(shift) for shift in self._rng.integers(0, SHIFTS + 1, 2))
        grain = self._grain[down : down + self.height, right : right + self.width]
        pixels: Pixels = np.clip(np.asarray(output, np.int16) + grain, 0, 255).astype(np.uint8)
        return pixels
