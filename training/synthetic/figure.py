"""Drawing a synthetic person: a small 3-D skeleton, rotated to the view angle and painted from far to near.

Body coordinates are fractions of the body height: x to the person's left, y down from the top of the head, z forward.
``turn`` 0 shows the face, pi the back, pi/2 the side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from resight.training.synthetic.people import Colour, Person

Point = tuple[float, float]
"""x and y in pixels."""

MARGIN = 96  # pixels of texture beyond the canvas, so that it can be shifted with the torso


def shade_colour(colour: Colour, shade: float) -> Colour:
    """A colour made darker (shade < 1) or brighter, clipped to 0..255."""
    red, green, blue = (min(255, int(channel * shade)) for channel in colour)
    return red, green, blue


def capsule(draw: ImageDraw.ImageDraw, a: Point, b: Point, radius: float, ink: Colour | int) -> None:
    """A thick line with round ends, from a to b in pixels."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    length = math.hypot(dx, dy) or 1.0
    nx, ny = -dy / length * radius, dx / length * radius
    draw.polygon([(a[0] + nx, a[1] + ny), (b[0] + nx, b[1] + ny), (b[0] - nx, b[1] - ny), (a[0] - nx, a[1] - ny)], ink)
    for x, y in (a, b):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)


def cut_limb(joints: list[Point], share: float) -> list[Point]:
    """The joints of the first ``share`` of a two-part limb."""
    a, b, c = joints
    if share >= 0.5:
        t = (share - 0.5) * 2
        return [a, b, (b[0] + (c[0] - b[0]) * t, b[1] + (c[1] - b[1]) * t)]
    t = share * 2
    return [a, (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t)]


@lru_cache(maxsize=64)
def garment_texture(person: Person, size: tuple[int, int], scale: int, shade: float) -> Image.Image:
    """Texture of a patterned garment, larger than the canvas by a margin; the shoulder line is at the margin."""
    wide, tall = size[0] + 2 * MARGIN, size[1] + 2 * MARGIN
    y, x = np.mgrid[0:tall, 0:wide]
    down, across = (y - MARGIN) / scale, (x - wide / 2) / scale
    period = person.pattern_scale
    rows, columns = (down / period) % 1.0 < 0.42, (across / period) % 1.0 < 0.42
    match person.pattern:
        case "stripes":
            share = rows.astype(np.float32)
        case "bars":
            share = columns.astype(np.float32)
        case "checks":
            share = (rows.astype(np.float32) + columns) / 2
        case _:
            share = (down > 0.11 + person.pattern_scale).astype(np.float32)
    upper, accent = np.array(person.upper, np.float32), np.array(person.accent, np.float32)
    cloth = (upper + share[..., None] * (accent - upper)) * shade
    return Image.fromarray(cloth.astype(np.uint8)).convert("RGBA")


Paint = Callable[[ImageDraw.ImageDraw, Colour | int], None]
# Heights and lengths as fractions of the body height, after the body proportions of Drillis & Contini (1966), rounded.
_CHIN_Y, _SHOULDER_Y, _HIP_Y = 0.135, 0.185, 0.50
_THIGH, _SHIN, _UPPER_ARM, _FOREARM = 0.235, 0.225, 0.17, 0.15
_FAR = 0.8  # brightness of limbs on the far side, to separate them from the torso


@dataclass(frozen=True)
class Pose:
    """Pose of a person in one crop.

    ``turn`` is the view angle in radians, ``phase`` the phase of the stride (radians), ``stride``
    the swing of the thigh (radians), ``tilt`` how much a camera from above shortens the legs
    (0..0.25), ``raised`` whether one forearm is lifted as if holding a telephone.
    """

    turn: float
    phase: float
    stride: float
    tilt: float = 0.0
    raised: bool = False


@dataclass(frozen=True)
class Placement:
    """Position of the person: centre x and crown y in pixels, pixels per standard body height."""

    x: float
    y: float
    scale: float


def draw_person(layer: Image.Image, person: Person, pose: Pose, placement: Placement) -> None:
    """Paint a person onto a transparent layer.

    Args:
        layer: RGBA image, changed in place; parts outside of it are clipped.
        person: the person.
        pose: pose and view angle.
        placement: position on the layer.
    """
    figure = _Figure(person, pose, placement, layer)
    parts: list[tuple[float, Callable[[], None]]] = [(0.0, figure.trunk), (0.01, figure.head)]
    for side in (-1, 1):
        near = figure.depth(side * 0.12, 0.0)
        parts.append((near - 0.02 if abs(near) > 0.05 else -0.02, _bound(figure.leg, side)))
        parts.append((near if abs(near) > 0.05 else 0.02, _bound(figure.arm, side)))
    if person.bag == "backpack":
        parts.append((figure.depth(0.0, -0.13) * 1.5, figure.backpack))
    elif person.bag == "shoulder":
        parts.append((max(0.015, figure.depth(person.side * 0.14, 0.0) + 0.03), figure.strap))
        parts.append((figure.depth(person.side * 0.14, 0.0) + 0.05, figure.shoulder_bag))
    for _, paint in sorted(parts, key=lambda part: part[0]):
        paint()


def _bound(method: Callable[[int], None], side: int) -> Callable[[], None]:
    return lambda: method(side)


class _Figure:
    """Paints one person: the projection, and a method for each body part."""

    def __init__(self, person: Person, pose: Pose, placement: Placement, layer: Image.Image) -> None:
        self.person, self.pose, self.placement, self.layer = person, pose, placement, layer
        self.draw = ImageDraw.Draw(layer)
        self.cos, self.sin = math.cos(pose.turn), math.sin(pose.turn)
        self.scale = placement.scale * person.height
        self.front, self.side_on = self.cos > 0.2, abs(self.sin)

    def at(self, x: float, y: float, z: float = 0.0) -> Point:
        """Body coordinates to pixels; the feet are on the ground for any height."""
        y *= 1.0 - self.pose.tilt * y
        ground = self.placement.y + self.placement.scale * (1.0 - self.pose.tilt)
        top = ground - self.scale * (1.0 - self.pose.tilt)
        return self.placement.x + (x * self.cos + z * self.sin) * self.scale, top + y * self.scale

    def depth(self, x: float, z: float) -> float:
        """How near to the camera a body point is (larger is nearer)."""
        return -x * self.sin + z * self.cos

    def half(self, width: float, deep: float) -> float:
        """Half the visible width of an elliptic trunk at this angle, as a fraction of the body height."""
        return math.hypot(width * self.cos, deep * self.sin)

    def ellipse(self, centre: Point, rx: float, ry: float, fill: Colour) -> None:
        """An upright ellipse, radii as fractions of the body height."""
        rx, ry = rx * self.scale, ry * self.scale
        self.draw.ellipse((centre[0] - rx, centre[1] - ry, centre[0] + rx, centre[1] + ry), fill=fill)

    def cloth(self, paint: Paint, shade: float) -> None:
        """Fill the shape drawn by ``paint`` with the upper garment and its pattern."""
        if self.person.pattern not in ("stripes", "bars", "checks", "block"):
            return paint(self.draw, shade_colour(self.person.upper, shade))
        mask = Image.new("L", self.layer.size)
        paint(ImageDraw.Draw(mask), 255)
        cloth = garment_texture(self.person, self.layer.size, round(self.scale / 24) * 24, shade)
        x, y = self.at(0.0, _SHOULDER_Y)
        left = min(max(round(MARGIN + self.layer.width / 2 - x), 0), 2 * MARGIN)
        top = min(max(round(MARGIN - y), 0), 2 * MARGIN)
        window = cloth.crop((left, top, left + self.layer.width, top + self.layer.height))
        self.layer.paste(window, (0, 0), mask)

    def trunk(self) -> None:
        """Neck, upper garment with its front or back, and the skirt or the seat of the trousers."""
        person, build = self.person, self.person.build
        shoulder, hip = self.half(0.115 * build, 0.068 * build), self.half(0.082 * build, 0.07 * build)
        hem = _HIP_Y + 0.02 + person.coat
        capsule(
            self.draw,
            self.at(0, _CHIN_Y - 0.02),
            self.at(0, _SHOULDER_Y),
            0.032 * self.scale,
            shade_colour(person.skin, 0.85),
        )
        if not person.skirt:
            seat = [self.at(0, _HIP_Y - 0.03), self.at(0, _HIP_Y + 0.05)]
            capsule(self.draw, seat[0], seat[1], hip * 0.95 * self.scale, person.lower)
        else:
            self._band(_HIP_Y - 0.05, _HIP_Y + person.hem * (_THIGH + _SHIN), hip, hip * 1.35, person.lower)
        flare = hip * (1.0 + 1.2 * person.coat)
        self.cloth(lambda draw, ink: self._torso(draw, ink, shoulder, flare, hem), 1.0)
        if person.pattern == "jacket" and self.front:
            self._band(_SHOULDER_Y - 0.02, hem, shoulder * 0.3, flare * 0.38, person.accent)
        elif person.pattern == "sash":
            tops = (self.at(-0.09 * build, 0.2), self.at(0.07 * build, 0.5))
            self.draw.line(tops, fill=person.accent, width=round(0.05 * self.scale))
        elif person.pattern == "logo" and abs(self.cos) > 0.4:
            x, y = self.at(0.0, 0.29)
            wide, tall = 0.065 * abs(self.cos) * self.scale, (0.045 if self.front else 0.07) * self.scale
            self.draw.rectangle((x - wide, y - tall, x + wide, y + tall), fill=person.accent)
        if person.bag == "backpack" and self.front:
            for side in (-1, 1):
                ends = self.at(side * 0.065 * build, _SHOULDER_Y - 0.01, 0.05), self.at(side * 0.07 * build, 0.37, 0.05)
                self.draw.line(ends, fill=person.bag_colour, width=max(2, round(0.026 * self.scale)))

    def _torso(self, draw: ImageDraw.ImageDraw, ink: Colour | int, shoulder: float, hip: float, hem: float) -> None:
        left, right = self.at(0, _SHOULDER_Y), self.at(0, hem)
        wide, low = shoulder * self.scale, hip * self.scale
        waist = (left[0], (left[1] + right[1]) / 2)
        draw.polygon(
            [
                (left[0] - 0.4 * wide, left[1] - 0.035 * self.scale),
                (left[0] + 0.4 * wide, left[1] - 0.035 * self.scale),
                (left[0] + wide, left[1] + 0.01 * self.scale),
                (waist[0] + 0.5 * (wide + low) * 0.93, waist[1]),
                (right[0] + low, right[1]),
                (right[0] - low, right[1]),
                (waist[0] - 0.5 * (wide + low) * 0.93, waist[1]),
                (left[0] - wide, left[1] + 0.01 * self.scale),
            ],
            fill=ink,
        )

    def _band(self, top: float, bottom: float, half_top: float, half_bottom: float, fill: Colour) -> None:
        """An upright trapezium around the body's axis, in fractions of the body height."""
        a, b = self.at(0, top), self.at(0, bottom)
        one, two = half_top * self.scale, half_bottom * self.scale
        corners = [(a[0] - one, a[1]), (a[0] + one, a[1]), (b[0] + two, b[1]), (b[0] - two, b[1])]
        self.draw.polygon(corners, fill=fill)

    def leg(self, side: int) -> None:
        """One leg: bare, then the trouser leg down to its hem, then the shoe."""
        person, build = self.person, self.person.build
        swing = side * self.pose.stride * math.sin(self.pose.phase)
        bend = 0.9 * self.pose.stride * max(0.0, side * math.cos(self.pose.phase))
        x = side * 0.048 * build
        hip = (x, _HIP_Y + 0.02, 0.0)
        knee = (x, hip[1] + _THIGH * math.cos(swing), _THIGH * math.sin(swing))
        ankle = (x, knee[1] + _SHIN * math.cos(swing - bend), knee[2] + _SHIN * math.sin(swing - bend))
        shade = _FAR if self.depth(side * 0.05, knee[2]) < -0.01 else 1.0
        joints = [self.at(*hip), self.at(*knee), self.at(*ankle)]
        self.ellipse(self.at(x, ankle[1] + 0.022, ankle[2] + 0.035), 0.03 + 0.022 * self.side_on, 0.02, person.shoes)
        self._limb(self.draw, joints, (0.042, 0.032, 0.02), shade_colour(person.skin, shade))
        if person.skirt:
            return
        wide = (0.056 * build, 0.044 * build, 0.038 * build)
        self._limb(self.draw, cut_limb(joints, person.hem), wide, shade_colour(person.lower, shade))

    def arm(self, side: int) -> None:
        """One arm: bare, then the sleeve, with a tote bag if the person has one."""
        person, build = self.person, self.person.build
        swing = -side * 0.8 * self.pose.stride * math.sin(self.pose.phase)
        lift = 2.1 if self.pose.raised and side == person.side else 0.35
        shoulder = (side * 0.118 * build, _SHOULDER_Y + 0.025, 0.0)
        elbow = (
            shoulder[0] + side * 0.022,
            shoulder[1] + _UPPER_ARM * math.cos(swing),
            _UPPER_ARM * math.sin(swing),
        )
        hand = (
            elbow[0] - side * 0.005,
            elbow[1] + _FOREARM * math.cos(swing + lift),
            elbow[2] + _FOREARM * math.sin(swing + lift),
        )
        shade = _FAR if self.depth(side * 0.12, elbow[2]) < -0.02 else 0.9
        joints = [self.at(*shoulder), self.at(*elbow), self.at(*hand)]
        if person.bag == "tote" and side == person.side:
            x, y = joints[2]
            wide, tall = (0.035 + 0.045 * self.side_on) * self.scale, 0.13 * self.scale
            self.draw.rectangle(
                (x - wide, y + 0.03 * self.scale, x + wide, y + tall), fill=shade_colour(person.bag_colour, shade)
            )
            self.draw.line((x, y, x, y + 0.04 * self.scale), fill=person.bag_colour, width=2)
        self._limb(self.draw, joints, (0.032, 0.026, 0.024), shade_colour(person.skin, shade))
        wide_arm = (0.038 * build, 0.034 * build, 0.031 * build)
        sleeve = cut_limb(joints, person.sleeve * 0.94)
        self.cloth(lambda draw, ink: self._limb(draw, sleeve, wide_arm, ink), shade)

    def _limb(
        self, draw: ImageDraw.ImageDraw, joints: list[Point], radii: tuple[float, float, float], ink: Colour | int
    ) -> None:
        for start, (a, b) in enumerate(itertools.pairwise(joints)):
            capsule(draw, a, b, (radii[start] + radii[start + 1]) / 2 * self.scale, ink)

    def head(self) -> None:
        """Face, hair and hat; the face is drawn only if it is visible."""
        person, r = self.person, 0.062
        x, y = self.at(0.0, 0.072, 0.012)
        wide = r * (0.82 + 0.12 * self.side_on)
        hair, long = person.hair, person.hair_style in ("bob", "long")
        if (long and self.cos < 0.5) or person.hair_style == "bun":
            self.ellipse(self.at(0.0, 0.05, -0.05), r * 0.8, r * 0.8, hair)
        if long:
            tail = 0.15 if person.hair_style == "bob" else 0.24
            capsule(self.draw, self.at(0, 0.06, -0.02), self.at(0, tail, -0.035), wide * 1.12 * self.scale, hair)
        self.ellipse((x, y), wide, r * 1.12, person.skin)
        if person.hair_style != "bald":
            self._scalp(x, y, wide, r, hair)
        if self.cos > 0.25:
            eye = round(self.scale * 0.008)
            for side in (-1, 1):
                ex, ey = self.at(side * 0.024, 0.07, 0.055)
                self.draw.ellipse((ex - eye, ey - eye, ex + eye, ey + eye), fill=(40, 30, 30))
        if person.hair_style == "bun":
            self.ellipse(self.at(0.0, 0.012, -0.055), 0.032, 0.03, hair)
        if person.hat != "none":
            self._hat(x, y, wide, r)

    def _scalp(self, x: float, y: float, wide: float, r: float, hair: Colour) -> None:
        puff = 1.3 if self.person.hair_style == "curly" else 1.08
        rx, ry = wide * puff * self.scale, r * 1.12 * puff * self.scale
        open_face = 90 * max(0.0, self.cos) + 45 * self.side_on  # degrees of the head's outline that show the face
        lean = 90 - 70 * self.sin if self.cos > -0.6 else 90
        if self.cos < -0.5:
            self.draw.ellipse((x - rx, y - ry, x + rx, y + ry * 0.85), fill=hair)
        else:
            start, end = lean + open_face, lean + 360 - open_face
            self.draw.chord((x - rx, y - ry, x + rx, y + ry), start, end, fill=hair)

    def _hat(self, x: float, y: float, wide: float, r: float) -> None:
        rx, ry, colour = wide * 1.15 * self.scale, r * 1.3 * self.scale, self.person.hat_colour
        self.draw.chord((x - rx, y - ry, x + rx, y + ry * 0.8), 185, 355, fill=colour)
        if self.person.hat == "cap" and self.cos > -0.5:
            brim, by = self.at(0.0, 0.045, 0.1)
            self.draw.rectangle(
                (min(x - rx, brim), by - 2, max(x + rx * max(0.2, self.cos), brim), by + 2),
                fill=shade_colour(colour, 0.7),
            )
        elif self.person.hat == "beanie":
            self.draw.rectangle((x - rx, y - ry * 0.3, x + rx, y - ry * 0.05), fill=shade_colour(colour, 0.75))

    def backpack(self) -> None:
        """Backpack: complete from behind, partly visible from the side, hidden from the front."""
        half = self.half(0.095, 0.055) * self.scale
        x, top = self.at(0.0, 0.2, -0.105)
        bottom = self.at(0.0, 0.46, -0.105)[1]
        colour = self.person.bag_colour
        self.draw.rounded_rectangle((x - half, top, x + half, bottom), radius=half * 0.45, fill=colour)
        if self.cos < -0.3:
            low = top + 0.58 * (bottom - top)
            box = (x - half * 0.7, low, x + half * 0.7, bottom - 0.02 * self.scale)
            self.draw.rounded_rectangle(box, radius=half * 0.25, fill=shade_colour(colour, 0.72))

    def strap(self) -> None:
        """The strap of a shoulder bag, across the chest or the back."""
        side, build = self.person.side, self.person.build
        near = 0.06 if self.cos > 0 else -0.06
        ends = self.at(-side * 0.075 * build, _SHOULDER_Y - 0.02, near), self.at(side * 0.11 * build, 0.47, near)
        self.draw.line(ends, fill=self.person.bag_colour, width=max(2, round(0.018 * self.scale)))

    def shoulder_bag(self) -> None:
        """Shoulder bag at the hip."""
        x, y = self.at(self.person.side * 0.13 * self.person.build, 0.46)
        wide, tall = (0.035 + 0.05 * self.side_on) * self.scale, 0.11 * self.scale
        colour = self.person.bag_colour
        self.draw.rounded_rectangle((x - wide, y, x + wide, y + tall), radius=4, fill=colour)
        self.draw.rectangle((x - wide, y, x + wide, y + tall * 0.35), fill=shade_colour(colour, 0.75))
