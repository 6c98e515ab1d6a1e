"""Probes: drawn by code, packed without objects, and sensitive to differences between machines."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from resight.arrays import Pixels
from resight.bundle.probes import (
    Probes,
    check_probes,
    draw_jpegs,
    from_npz,
    make_probes,
    measure_parity,
    to_npz,
)
from resight.errors import BundleError
from resight.image import ImageSpec, decode, fit

SPEC = ImageSpec(32, 16)
DIM = 12


def embed(pixels: Pixels) -> NDArray[np.float32]:
    """A fake encoder: twelve pixel values, centred, as a unit vector."""
    flat = pixels.reshape(len(pixels), -1)[:, :: pixels[0].size // DIM][:, :DIM].astype(np.float32) - 127.5
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def test_packed_probes_are_unpacked() -> None:
    probes = make_probes(SPEC, embed, count=5)
    again = from_npz(to_npz(probes))
    assert again.jpegs == probes.jpegs == draw_jpegs(count=5)
    assert np.array_equal(again.pixels, np.stack([fit(decode(jpeg), SPEC) for jpeg in probes.jpegs]))
    assert np.array_equal(again.features, embed(probes.pixels))
    assert to_npz(again) == to_npz(probes)


def test_the_exporting_machine_passes() -> None:
    probes = make_probes(SPEC, embed)
    parity = check_probes(probes, SPEC, embed, what="stand-in")
    assert parity == measure_parity(probes, embed)
    assert parity.max_abs_diff == 0.0 and parity.min_cosine == pytest.approx(1.0, abs=1e-6)


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def compressed() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, pixels=np.zeros((1, 999, 999, 3), np.uint8), features=np.eye(1, dtype=np.float32))
    return buffer.getvalue()


BYTES = np.zeros(4, np.uint8)
PIXELS = np.zeros((1, 32, 16, 3), np.uint8)
FEATURES = np.eye(1, DIM, dtype=np.float32)
BAD_PROBES = {
    "no archive": lambda: b"PK\x03\x04 and nothing more",
    "Python objects": lambda: npz(pixels=PIXELS, features=FEATURES, jpeg_0=np.array([{}], dtype=object)),
    "compressed": compressed,
    "missing jpeg": lambda: npz(pixels=PIXELS, features=FEATURES),
    "other names": lambda: npz(pixels=PIXELS, features=FEATURES, jpeg_1=BYTES),
    "jpeg of floats": lambda: npz(pixels=PIXELS, features=FEATURES, jpeg_0=np.zeros(4)),
    "float pixels": lambda: npz(pixels=PIXELS.astype(np.float32), features=FEATURES, jpeg_0=BYTES),
    "channels first": lambda: npz(pixels=PIXELS.transpose(0, 3, 1, 2), features=FEATURES, jpeg_0=BYTES),
    "double features": lambda: npz(pixels=PIXELS, features=FEATURES.astype(np.float64), jpeg_0=BYTES),
    "features not unit": lambda: npz(pixels=PIXELS, features=FEATURES * 2, jpeg_0=BYTES),
    "NaN features": lambda: npz(pixels=PIXELS, features=FEATURES * np.nan, jpeg_0=BYTES),
    "too few features": lambda: npz(pixels=PIXELS, features=FEATURES[:0], jpeg_0=BYTES),
}


@pytest.mark.parametrize("kind", BAD_PROBES)
def test_invalid_probes_are_rejected(kind: str) -> None:
    with pytest.raises(BundleError, match=r"probes\.npz"):
        from_npz(BAD_PROBES[kind]())


def test_probes_catch_a_runtime_that_differs() -> None:
    probes = make_probes(SPEC, embed, count=8)
    wrong = {
        "min cosine": lambda pixels: embed(255 - pixels),
        "other features": lambda pixels: embed(pixels) * np.float32(0.5),  # does not normalise
        "at batch size 7": lambda pixels: embed(pixels)[:1],  # ignores all but the first of a batch
        "expected finite": lambda pixels: embed(pixels) * np.float32(np.nan),
    }
    for message, run in wrong.items():
        with pytest.raises(BundleError, match=message):
            check_probes(probes, SPEC, run, what="model.onnx")


def test_probes_catch_another_resize() -> None:
    probes = make_probes(SPEC, embed, count=5)
    other = np.stack([fit(decode(jpeg), ImageSpec(32, 16, "bilinear")) for jpeg in probes.jpegs])
    swapped = Probes(probes.jpegs, other, embed(other))
    with pytest.raises(BundleError, match="is decoded to other pixels here"):
        check_probes(swapped, SPEC, embed, what="model.onnx")


def test_probes_exercise_the_resize_both_ways() -> None:
    """At the standard size every filter difference must be visible, so that the check above is meaningful."""
    sizes = {decode(jpeg).shape[:2] for jpeg in draw_jpegs()}
    assert any(height < 256 and width < 128 for height, width in sizes)
    assert any(height > 256 and width > 128 for height, width in sizes)
    differences = [
        np.abs(fit(decode(jpeg), ImageSpec()).astype(int) - fit(decode(jpeg), ImageSpec(filter="bilinear"))).mean()
        for jpeg in draw_jpegs()
    ]
    assert max(differences) > 2.0
