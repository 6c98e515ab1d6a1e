"""Synthetic people: body, hair, clothes and bags as plain data.

`figure.py` draws a `Person`. The two worlds (``source`` and ``site``) prefer different colours, so that a model trained
on one population sees other clothes in the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

World = Literal["source", "site"]
Colour = tuple[int, int, int]
"""Red, green, blue, each 0..255."""

# The palettes and shares below were chosen by eye on contact sheets; they describe no real population.
CLOTH: Mapping[str, Colour] = {
    "black": (28, 28, 32), "charcoal": (62, 64, 70), "grey": (128, 130, 134), "white": (232, 231, 226),
    "navy": (30, 42, 84), "blue": (44, 92, 180), "sky": (136, 180, 222), "denim": (70, 92, 130),
    "red": (190, 38, 42), "maroon": (104, 26, 40), "pink": (226, 144, 164), "orange": (222, 118, 40),
    "yellow": (226, 194, 66), "green": (44, 122, 70), "olive": (98, 100, 58), "teal": (32, 124, 130),
    "beige": (204, 184, 148), "brown": (104, 72, 48), "purple": (108, 66, 140),
}  # fmt: skip
_UPPER: Mapping[World, Mapping[str, float]] = {
    "source": {
        "black": 2, "charcoal": 1, "grey": 2, "white": 2, "navy": 1, "blue": 2, "sky": 2, "red": 2, "pink": 1.5,
        "orange": 1.5, "yellow": 1.5, "green": 2, "teal": 1.5, "purple": 1.5, "beige": 1, "maroon": 1, "brown": 0.5,
    },
    "site": {
        "black": 3, "charcoal": 2.5, "grey": 2, "white": 2, "navy": 2.5, "blue": 1, "sky": 1, "red": 1.5, "pink": 0.7,
        "orange": 0.5, "yellow": 0.7, "green": 0.8, "olive": 2, "teal": 0.8, "purple": 0.5, "beige": 2, "maroon": 1.5,
        "brown": 1.5,
    },
}  # fmt: skip
_LOWER: Mapping[World, Mapping[str, float]] = {
    "source": {"black": 2, "charcoal": 2, "grey": 1.5, "denim": 3, "navy": 1.5, "beige": 1.5, "white": 1, "brown": 1,
               "olive": 1, "red": 0.7, "green": 0.5, "blue": 1},
    "site": {"black": 3, "charcoal": 2, "grey": 1, "denim": 3, "navy": 2, "beige": 1.2, "white": 0.4, "brown": 1,
             "olive": 1, "maroon": 0.5},
}  # fmt: skip
_SHOES: Mapping[str, float] = {"black": 4, "white": 3, "brown": 2, "red": 1, "grey": 1, "blue": 0.7, "beige": 1}
_SKINS: Sequence[Colour] = ((244, 208, 178), (226, 178, 140), (198, 146, 106), (150, 102, 70), (98, 66, 46))
_HAIRS: Sequence[Colour] = (
    (24, 20, 20), (58, 40, 30), (110, 72, 42), (190, 150, 88), (150, 148, 146), (134, 52, 30),
)  # fmt: skip
PATTERNS = ("plain", "stripes", "bars", "checks", "block", "logo", "jacket", "sash")
HAIR_STYLES = ("bald", "short", "bob", "long", "bun", "curly")
BAGS = ("none", "backpack", "shoulder", "tote")
HATS = ("none", "cap", "beanie")
_SAME_CLOTHES_SHARE = 0.3  # people in the colours of an earlier person, so that colour is not sufficient


@dataclass(frozen=True)
class Person:
    """Appearance of a person, the same for all cameras.

    Lengths are fractions: ``height`` of the usual figure, ``build`` of the usual width, ``sleeve`` of
    the arm covered, ``hem`` of the leg covered, ``coat`` of body height that the upper garment
    extends below the hip. ``side`` is +1 or -1: the side of the bag.
    """

    height: float
    build: float
    skin: Colour
    hair: Colour
    hair_style: str
    hat: str
    hat_colour: Colour
    upper: Colour
    accent: Colour
    pattern: str
    pattern_scale: float
    sleeve: float
    coat: float
    lower: Colour
    skirt: bool
    hem: float
    shoes: Colour
    bag: str
    bag_colour: Colour
    side: int


def sample_people(count: int, rng: np.random.Generator, *, world: World) -> tuple[Person, ...]:
    """Sample a population; three in ten wear the colours of an earlier person.

    Such a person differs from the earlier one in pattern, bag, hair style or hat.

    Args:
        count: number of people.
        rng: the only source of randomness.
        world: selects the clothes.

    Returns:
        ``count`` different persons.
    """
    people: list[Person] = []
    while len(people) < count:
        person = _sample_person(rng, world)
        if people and rng.random() < _SAME_CLOTHES_SHARE:
            model = people[int(rng.integers(len(people)))]
            person = dataclasses.replace(person, upper=_jitter(model.upper, 8, rng), lower=_jitter(model.lower, 8, rng))
            if _traits(person) == _traits(model):
                continue
        people.append(person)
    return tuple(people)


def _traits(person: Person) -> tuple[str, str, str, str]:
    return person.pattern, person.bag, person.hair_style, person.hat


def _sample_person(rng: np.random.Generator, world: World) -> Person:
    skirt = rng.random() < 0.18
    upper = _pick(_UPPER[world], rng)
    accent = _pick(CLOTH, rng)
    while _contrast(upper, accent) < 110:  # the pattern must be visible
        accent = _pick(CLOTH, rng)
    return Person(
        height=float(rng.uniform(0.88, 1.04)),
        build=float(rng.uniform(0.85, 1.3)),
        skin=_jitter(_SKINS[int(rng.integers(len(_SKINS)))], 8, rng),
        hair=_jitter(_HAIRS[int(rng.integers(len(_HAIRS)))], 8, rng),
        hair_style=_choice(HAIR_STYLES, (0.07, 0.33, 0.18, 0.2, 0.12, 0.1), rng),
        hat=_choice(HATS, (0.76, 0.14, 0.1), rng),
        hat_colour=_pick(CLOTH, rng),
        upper=upper,
        accent=accent,
        pattern=_choice(PATTERNS, (0.28, 0.13, 0.08, 0.1, 0.11, 0.12, 0.12, 0.06), rng),
        pattern_scale=float(rng.uniform(0.05, 0.1)),
        sleeve=float(rng.choice([0.1, 0.42, 1.0], p=[0.08, 0.37, 0.55])),
        coat=float(rng.choice([0.0, 0.03, 0.16], p=[0.45, 0.35, 0.2])),
        lower=_pick(_LOWER[world], rng),
        skirt=skirt,
        hem=float(rng.uniform(0.3, 0.75)) if skirt else float(rng.choice([0.42, 1.0], p=[0.2, 0.8])),
        shoes=_pick(_SHOES, rng),
        bag=_choice(BAGS, (0.4, 0.26, 0.2, 0.14), rng),
        bag_colour=_pick(CLOTH, rng),
        side=1 if rng.random() < 0.5 else -1,
    )


def _pick(shares: Mapping[str, object], rng: np.random.Generator) -> Colour:
    """A random colour by share (equal shares for a palette without them), slightly varied."""
    weights = np.array([w if isinstance(w, (int, float)) else 1.0 for w in shares.values()])
    name = list(shares)[int(rng.choice(len(weights), p=weights / weights.sum()))]
    return _jitter(CLOTH[name], 14, rng)


def _choice(names: Sequence[str], shares: Sequence[float], rng: np.random.Generator) -> str:
    return names[int(rng.choice(len(names), p=np.asarray(shares) / np.sum(shares)))]


def _jitter(colour: Colour, spread: int, rng: np.random.Generator) -> Colour:
    red, green, blue = (int(v) for v in np.clip(np.asarray(colour) + rng.integers(-spread, spread + 1, 3), 4, 250))
    return red, green, blue


def _contrast(one: Colour, two: Colour) -> int:
    return sum(abs(a - b) for a, b in zip(one, two, strict=True))
