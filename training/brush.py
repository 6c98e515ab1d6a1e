"""What a figure is painted with: round strokes, cut limbs, shades, and the cloth of patterned garments.

`figure.py` says where the strokes go; nothing here knows of bodies or cameras.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from resight.training.people import Colour, Person

Point = tuple[float, float]
"""x and y in pixels."""

MARGIN = 96  # pixels of texture beyond the canvas, so that it can follow the torso


def dim(colour: Colour, shade: float) -> Colour:
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


def cut(joints: list[Point], share: float) -> list[Point]:
    """The first ``share`` of a two-part limb, as its joints."""
    a, b, c = joints
    if share >= 0.5:
        t = (share - 0.5) * 2
        return [a, b, (b[0] + (c[0] - b[0]) * t, b[1] + (c[1] - b[1]) * t)]
    t = share * 2
    return [a, (a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t)]


@lru_cache(maxsize=64)
def texture(person: Person, size: tuple[int, int], scale: int, shade: float) -> Image.Image:
    """The cloth of a patterned garment, larger than the canvas by a margin; the shoulder line is at its margin."""
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
