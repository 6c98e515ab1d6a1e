"""Probes: the golden images of a bundle, as JPEG bytes, decoded and fitted pixels, and expected features.

They are drawn by code, because a bundle is passed on and crops of people are personal data. `MIN_COSINE_BY_PRECISION`
and `min_cosine_for` define how closely a runtime must reproduce the exported features.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resight.arrays import Pixels
from resight.bundle.manifest import Artefact
from resight.errors import BundleError, ImageError
from resight.image import ImageSpec, decode, fit

PROBES_FILE = "probes.npz"
MAX_PROBES = 64
MAX_PROBES_BYTES = 64 * 1024 * 1024  # 16 probes of 256x128 take 1.6 MiB
MIN_COSINE = 0.9999  # acceptance of the exported fp32 graph against torch
BATCH_SIZES = (1, 7)  # a single request, and a size that no kernel is tuned for
MAX_PIXEL_DIFF = 1.0  # mean, in levels of 255; other JPEG decoders differ by under 0.5, other filters by more
_SIZES = ((256, 128), (64, 32), (40, 90), (512, 256), (333, 111), (128, 64), (200, 201), (768, 300))

EmbedBatch = Callable[[Pixels], NDArray[np.float32]]
"""uint8 (N, H, W, 3) RGB -> float32 (N, D), unit rows."""


@dataclass(frozen=True)
class Probes:
    """P golden images.

    Attributes:
        jpegs: P image files.
        pixels: uint8 (P, H, W, 3) RGB, decoded and fitted.
        features: float32 (P, D), unit rows, computed by torch in fp32.

    Raises:
        BundleError: lengths, shapes, types or norms are wrong.
    """

    jpegs: tuple[bytes, ...]
    pixels: Pixels
    features: NDArray[np.float32]

    def __post_init__(self) -> None:
        count = len(self.jpegs)
        good = (
            1 <= count <= MAX_PROBES
            and self.pixels.dtype == np.uint8
            and self.pixels.ndim == 4
            and self.pixels.shape[::3] == (count, 3)
            and self.features.dtype == np.float32
            and self.features.ndim == 2
            and len(self.features) == count
            and bool(np.allclose(np.linalg.norm(self.features, axis=1), 1.0, atol=1e-3))  # NaN fails it too
        )
        if not good:
            raise BundleError(
                f"{PROBES_FILE}: expected 1..{MAX_PROBES} JPEGs, uint8 pixels (P, H, W, 3) and float32 unit features "
                f"(P, D), found {count} JPEGs, {self.pixels.dtype} {self.pixels.shape} and {self.features.dtype} "
                f"{self.features.shape}: export the bundle again"
            )


@dataclass(frozen=True)
class Parity:
    """Difference between a runtime's features of the probes and the stored ones, worst over `BATCH_SIZES`."""

    max_abs_diff: float
    min_cosine: float


def draw_jpegs(*, seed: int = 0, count: int = 16) -> tuple[bytes, ...]:
    """Draw images for probes: smooth colour fields, hard edges and noise, of sizes that shrink and grow.

    Deterministic for a seed and one version of Pillow's JPEG encoder.

    Returns:
        ``count`` JPEG files of 40 to 768 pixels a side.
    """
    rng = np.random.default_rng(seed)
    jpegs = []
    for index in range(count):
        height, width = _SIZES[index % len(_SIZES)]
        coarse = Image.fromarray(rng.integers(0, 256, (6, 3, 3), dtype=np.uint8))
        field = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
        if index % 3 >= 1:  # rectangles: the hard edges on which resize filters differ most
            for _ in range(8):
                y, x = int(rng.integers(0, height)), int(rng.integers(0, width))
                field[y : y + height // 5, x : x + width // 4] = rng.integers(0, 256, 3)
        if index % 3 == 2:
            field += rng.normal(0.0, 40.0, field.shape)
        buffer = io.BytesIO()
        Image.fromarray(np.clip(field, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        jpegs.append(buffer.getvalue())
    return tuple(jpegs)


def make_probes(image: ImageSpec, run: EmbedBatch, *, seed: int = 0, count: int = 16) -> Probes:
    """Draw probes and compute their features with the reference ``run``, one image at a time."""
    jpegs = draw_jpegs(seed=seed, count=count)
    pixels = np.stack([fit(decode(jpeg), image) for jpeg in jpegs])  # (P, H, W, 3)
    features = np.concatenate([run(pixels[i : i + 1]) for i in range(count)])  # (P, D)
    return Probes(jpegs, pixels, features)


def to_npz(probes: Probes) -> bytes:
    """Pack probes as an uncompressed ``.npz`` without Python objects."""
    arrays = {f"jpeg_{i}": np.frombuffer(jpeg, dtype=np.uint8) for i, jpeg in enumerate(probes.jpegs)}
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, pixels=probes.pixels, features=probes.features, **arrays)
    return buffer.getvalue()


def from_npz(data: bytes) -> Probes:
    """Unpack what `to_npz` packed.

    Raises:
        BundleError: not such a file: compressed or oversized members, Python objects, wrong names or shapes.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED or member.file_size > len(data) for member in members):
            raise ValueError("compressed members")  # a few KB could decompress to more than the memory
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            count = len(arrays.files) - 2
            expected = {"pixels", "features", *(f"jpeg_{i}" for i in range(count))}
            if set(arrays.files) != expected or not all(arrays[f"jpeg_{i}"].dtype == np.uint8 for i in range(count)):
                raise ValueError(f"arrays {sorted(arrays.files)[:8]}")
            jpegs = tuple(arrays[f"jpeg_{i}"].tobytes() for i in range(count))
            return Probes(jpegs, arrays["pixels"], arrays["features"])
    except (ValueError, OSError, KeyError, EOFError, MemoryError, zipfile.BadZipFile, NotImplementedError) as error:
        raise BundleError(
            f"{PROBES_FILE}: expected arrays pixels, features and jpeg_0.. in an uncompressed .npz, found {error}: "
            "export the bundle again"
        ) from error


def measure_parity(probes: Probes, run: EmbedBatch) -> Parity:
    """Run the probes' pixels at each of `BATCH_SIZES` and compare with the stored features.

    Raises:
        BundleError: the runtime returns another shape or type, or numbers that are not finite.
    """
    max_abs_diff, min_cosine = 0.0, 1.0
    for size in BATCH_SIZES:
        starts = range(0, len(probes.pixels), size)
        features = np.concatenate([run(probes.pixels[start : start + size]) for start in starts])  # (P, D)
        if features.shape != probes.features.shape or features.dtype != np.float32 or not np.isfinite(features).all():
            raise BundleError(
                f"at batch size {size} the graph returns {features.dtype} {features.shape}, expected finite float32 "
                f"{probes.features.shape}: export the bundle again"
            )
        mine, theirs = features.astype(np.float64), probes.features.astype(np.float64)
        # Not renormalised: a graph without normalisation must not pass.
        cosine = (mine * theirs).sum(1) / np.maximum(np.linalg.norm(theirs, axis=1), 1e-12)
        min_cosine = min(min_cosine, float(np.minimum(cosine, 2.0 - cosine).min()))
        max_abs_diff = max(max_abs_diff, float(np.abs(mine - theirs).max()))
    return Parity(max_abs_diff, min_cosine)


def check_probes(
    probes: Probes, image: ImageSpec, run: EmbedBatch, *, what: str, min_cosine: float = MIN_COSINE
) -> Parity:
    """Check that this machine's decoder, resize and runtime reproduce the probes.

    Args:
        probes: from the bundle.
        image: the bundle's image spec.
        run: the runtime under test.
        what: name of the runtime in an error, such as ``model.onnx in onnxruntime``.
        min_cosine: the smallest similarity accepted; lower for quantised graphs.

    Raises:
        BundleError: a probe's pixels or features differ.
    """
    for index, jpeg in enumerate(probes.jpegs):
        try:
            pixels = fit(decode(jpeg), image)
        except ImageError as error:
            raise BundleError(f"{PROBES_FILE}: jpeg_{index} cannot be decoded: {error}") from error
        stored = probes.pixels[index]
        difference = np.abs(pixels.astype(np.int16) - stored).mean() if pixels.shape == stored.shape else np.inf
        if difference > MAX_PIXEL_DIFF:
            raise BundleError(
                f"{PROBES_FILE}: jpeg_{index} is decoded to other pixels here (mean difference {difference:.2f} levels,"
                f" at most {MAX_PIXEL_DIFF} accepted): this machine decodes or resizes images differently; use the "
                "locked version of Pillow"
            )
    parity = measure_parity(probes, run)
    if parity.min_cosine < min_cosine:
        raise BundleError(
            f"{what} gives other features than the exported model: min cosine {parity.min_cosine:.6f} over "
            f"{len(probes.jpegs)} probes, expected at least {min_cosine}: export the bundle again"
        )
    return parity


# The smallest accepted cosine of a probe's feature to torch's in fp32.
MIN_COSINE_BY_PRECISION = {
    "fp32": MIN_COSINE,
    "fp16": 0.999,  # fp16 has 11 bits, 5e-4 of a value; trunks of 50 layers reach it
}
# INT8 must reach the parity of its own export minus this: machines sum and round INT8 differently. The same graphs
# (OSNet x0.25 and the built-in encoder, per-channel, symmetric or not) in onnxruntime 1.31 with its VNNI kernels and
# with its float emulation moved the cosine of a probe by at most 0.0086, and the smallest of 16 by 0.0055.
INT8_SLACK = 0.01


def min_cosine_for(artefact: Artefact) -> float:
    """The smallest accepted cosine similarity of a form's features to the stored ones.

    Args:
        artefact: the manifest's entry of the form, with its precision and its parity at export.

    Returns:
        A cosine, at most 1.
    """
    fixed = MIN_COSINE_BY_PRECISION.get(artefact.precision)
    return artefact.min_cosine - INT8_SLACK if fixed is None else fixed
