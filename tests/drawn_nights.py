"""A growing crop store of several synthetic nights, in which every track has its own colour field."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from resight.training.store.growing import GrowingStore, NewCrop, NewTrack

NIGHT_S = 86_400.0
FIRST_S = 1_772_488_800.0  # 2026-03-02, 22:00 UTC


def jpeg(rng: np.random.Generator, field: np.ndarray, *, noise: float = 6.0) -> bytes:
    small = (field + rng.normal(0, noise, field.shape)).clip(0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((32, 64), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()


def black() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 64), (3, 3, 3)).save(out, "JPEG")
    return out.getvalue()


def add_night(
    root: Path, number: int, tracks: Mapping[str, int], *, each: int = 4, dead: tuple[str, ...] = (), one: bool = False
) -> None:
    """Tracks of one night, each 8 s long and starting 5 s after the previous one, so two of a camera overlap.

    Args:
        root: folder of the store.
        number: number of the night, from 0.
        tracks: number of tracks of each camera.
        each: crops per track.
        dead: cameras whose crops are black.
        one: whether all crops are the same.
    """
    rng = np.random.default_rng(number)
    again = jpeg(rng, rng.integers(30, 226, (8, 4, 3)).astype(float))
    made = []
    for camera, count in tracks.items():
        for track in range(count):
            field = rng.integers(30, 226, (8, 4, 3)).astype(float)
            start = FIRST_S + number * NIGHT_S + track * 5
            crops = []
            for shot in range(each):
                data = black() if camera in dead else again if one else jpeg(rng, field)
                path = f"crops/{camera}/{number}/{track:03d}-{shot}.jpg"
                crops.append(NewCrop(path, data, start + shot * 8 / max(each - 1, 1)))
            made.append(NewTrack(camera, crops))
    GrowingStore(root).add(made)


def end_of(number: int) -> float:
    """A time after a night and before the next."""
    return FIRST_S + number * NIGHT_S + NIGHT_S / 2
