"""Decoding, resizing and quality of crops: the only decoder and the only resize in training, export and serving.

Programs that resize differently compute different features (a different resize alone has cost 20 points of rank-1 in
this field), so no other code may decode or resize a crop.

A plain JPEG is decoded by libjpeg-turbo, in a third of Pillow's time; other and damaged files by Pillow. Both use the
same algorithms (slow integer DCT, smooth upsampling), and their pixels are equal (tests/test_image.py).

Quality, 0..1, measures how recognisable a person is in a crop; it is not a match score. It is the geometric mean of
three factors, quality = (size x sharpness x exposure) ^ 1/3:

- size: the crop's pixels over the encoder's, at most 1;
- sharpness: v / (v + 100), v the variance of the 4-neighbour Laplacian of the fitted grey image on
  levels of 0..255; 100 is the customary threshold between blurred and sharp;
- exposure: the share of pixels that are neither nearly black (< 8) nor nearly white (> 247).

Grey is the sum of the three channels, so that all arithmetic is in integers: 0.1 ms, where float32 took 0.65 ms, more
than decoding.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from resight.arrays import Pixels
from resight.errors import ImageError, ImageTooLargeError, ImageTooSmallError, ImageUndecodableError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 2 * 1024 * 1024  # a person crop has 5-50 KB; comparable servers accept 2 MiB
MAX_PIXELS = 4_000_000  # Pillow decodes even an 81-megapixel JPEG (243 MB of RGB) without a warning
MAX_SIDE = 4096
MIN_SIDE = 16  # persons are not distinguishable in smaller crops
MAX_SCANS = 100  # of a JPEG; encoders write 1 to 10 of a picture, which may hold a thumbnail and a second picture
SCANS_AT_MAX_PIXELS = 32  # a scan costs 0.6 ns a pixel however few bytes it has, and a damaged file is decoded twice
MAX_SEGMENTS = 1000  # before the pixels; Pillow takes 1 to 2 us of each with the interpreter lock held
SEGMENT_BYTES = 4096  # a PNG of many bytes may have more segments: libpng writes 8 KiB in each
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_JPEG, _SCAN = b"\xff\xd8\xff", b"\xff\xda"
_PNG = b"\x89PNG\r\n\x1a\n"
_ORIENTED = (b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/")  # marks of EXIF and XMP, which may hold an orientation
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


@dataclass(frozen=True)
class ImageSpec:
    """The encoder's input: height and width in pixels, and the resize filter.

    Raises:
        ValueError: a side outside 16..4096 or an unknown filter.
    """

    height: int = 256
    width: int = 128
    filter: Literal["bilinear", "bicubic"] = "bicubic"

    def __post_init__(self) -> None:
        if not (MIN_SIDE <= self.height <= MAX_SIDE and MIN_SIDE <= self.width <= MAX_SIDE):
            raise ValueError(f"image sides must be {MIN_SIDE}..{MAX_SIDE}, found {self.height}x{self.width}")
        if self.filter not in _FILTERS:
            raise ValueError(f"image filter must be one of {', '.join(_FILTERS)}, found {self.filter!r}")


def decode(
    data: bytes,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    on_header: Callable[[int], None] | None = None,
) -> Pixels:
    """Decode one still image to RGB after checking its header against the limits.

    EXIF orientation is applied, alpha is dropped, grey, palette and CMYK are converted to RGB; animations and more than
    8 bits per channel are rejected.

    Args:
        data: the file.
        max_bytes: limit on the file's size.
        max_pixels: limit on height times width.
        on_header: called with the number of pixels before they are decoded; may wait for memory.

    Returns:
        uint8 (H, W, 3), H and W in 16..4096.

    Raises:
        ImageUndecodableError: not a JPEG, PNG or WebP, or truncated, damaged, animated, over 8 bits.
        ImageTooLargeError: more than ``max_bytes``, ``max_pixels`` or a side over 4096, or more segments or scans than
            an encoder writes, which would take seconds to decode.
        ImageTooSmallError: a side under 16.
    """
    if len(data) > max_bytes:
        raise ImageTooLargeError(
            f"image has {len(data)} bytes, at most {max_bytes} are accepted: send the crop of one person",
            found_bytes=len(data),
            max_bytes=max_bytes,
        )
    check_structure(data)
    on_size = on_header or _ignore_size
    if (size := _plain_jpeg(data)) is not None:
        _check_size(*size, max_pixels)
        _check_scans(data, size[0] * size[1], max_pixels)
        on_size(size[0] * size[1])
        with contextlib.suppress(ValueError):  # damaged, or slightly: Pillow decides
            pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace="RGB")
            return pixels
        on_size = _ignore_size  # already called
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as header:
            _check_header(header, max_pixels)
            _check_scans(data, header.width * header.height, max_pixels)
            on_size(header.width * header.height)
            image = ImageOps.exif_transpose(header)
            if "transparency" in image.info:
                image = image.convert("RGBA")  # converting palette transparency directly to RGB causes a warning
            return np.array(image.convert("RGB"))  # a copy: Pillow's buffer is read-only, about which torch warns
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(
            f"image claims far over {max_pixels} pixels ({error}): send the crop of one person", max_pixels=max_pixels
        ) from error
    except Exception as error:  # on invalid files Pillow raises struct.error, KeyError, ...
        kind = "empty" if not data else f"{len(data)} bytes beginning {data[:4].hex()}"
        raise ImageUndecodableError(
            f"expected a complete JPEG, PNG or WebP image, found {kind} that cannot be decoded: send the file again",
        ) from error


def check_structure(data: bytes) -> None:
    """Reject a JPEG or PNG with so many segments that reading its header alone would take long.

    Raises:
        ImageTooLargeError: it has more than `MAX_SEGMENTS`, plus one for each `SEGMENT_BYTES`.
    """
    limit = MAX_SEGMENTS + len(data) // SEGMENT_BYTES
    walk = _jpeg_segments if data.startswith(_JPEG) else _png_chunks if data.startswith(_PNG) else None
    if walk is not None and next(itertools.islice(walk(data), limit, None), None) is not None:
        raise ImageTooLargeError(
            f"image has more than {limit} segments in its header, as no encoder writes: save it again",
            max_segments=limit,
        )


def _jpeg_segments(data: bytes) -> Iterator[int]:
    """Positions of the segments up to the first scan, and of the fill bytes between them."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        yield at
        at += 1 if data[at + 1] == 0xFF else 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))


def _png_chunks(data: bytes) -> Iterator[int]:
    """Positions of the chunks."""
    at = len(_PNG)
    while at + 8 <= len(data):
        yield at
        at += 12 + int.from_bytes(data[at : at + 4], "big")


def _check_scans(data: bytes, pixels: int, max_pixels: int) -> None:
    """Reject a JPEG of too many scans: each one visits all pixels, even if it has ten bytes.

    The count includes scans of an embedded thumbnail or a second picture.

    Raises:
        ImageTooLargeError: more than `MAX_SCANS`, or scans times pixels over `SCANS_AT_MAX_PIXELS` times the limit.
    """
    if not data.startswith(_JPEG):
        return
    scans, limit = data.count(_SCAN), min(MAX_SCANS, SCANS_AT_MAX_PIXELS * max_pixels // max(1, pixels))
    if scans > limit:
        raise ImageTooLargeError(
            f"JPEG has {scans} scans of {pixels} pixels, at most {limit} are accepted at this size: save it as a "
            "baseline JPEG",
            found_scans=scans,
            max_scans=limit,
        )


def _ignore_size(pixels: int) -> None:
    """Default of ``on_header``."""


def _plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Width and height of a grey or YCbCr JPEG without orientation data; None for anything else."""
    if not data.startswith(_JPEG) or any(mark in data for mark in _ORIENTED):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (width, height) if colours in ("YCbCr", "Gray") else None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    """Check the size before any pixel is decoded."""
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise ImageTooLargeError(
            f"image is {width}x{height} pixels, at most {max_pixels} in total and {MAX_SIDE} per side are accepted: "
            "send the crop of one person",
            found_pixels=width * height,
            max_pixels=max_pixels,
        )
    if min(width, height) < MIN_SIDE:
        raise ImageTooSmallError(
            f"image is {width}x{height} pixels, a side needs at least {MIN_SIDE}: send a larger crop",
            found_width=width,
            found_height=height,
            min_side=MIN_SIDE,
        )


def _check_header(header: Image.Image, max_pixels: int) -> None:
    """Check size and kind before any pixel is decoded."""
    _check_size(*header.size, max_pixels)
    # "MPO", a JPEG with a second picture (a phone's gain map or depth map), is a still image: its first is used.
    frames = 1 if header.format == "MPO" else getattr(header, "n_frames", 1)
    if frames > 1 or header.mode not in _EIGHT_BIT_MODES:
        raise ImageUndecodableError(
            f"expected a still image of 8 bits per channel, found mode {header.mode} with {frames} frames: "
            "convert it to JPEG"
        )


def fit(image: Pixels, spec: ImageSpec) -> Pixels:
    """Resize an image to the encoder's size, without keeping the aspect ratio (as usual in re-ID).

    Args:
        image: uint8 (H, W, 3) RGB.
        spec: target size and filter.

    Returns:
        uint8 (spec.height, spec.width, 3) RGB, antialiased when shrinking.
    """
    if image.shape[:2] == (spec.height, spec.width):
        return image
    resized = Image.fromarray(image).resize((spec.width, spec.height), _FILTERS[spec.filter])
    return np.array(resized)


SHARP_VARIANCE = 100.0
BLACK, WHITE = 8, 247  # 3 % of the range at each end, where cameras clip


def quality(fitted: Pixels, size: tuple[int, int]) -> float:
    """Quality of one crop.

    Args:
        fitted: uint8 (H, W, 3) RGB at the encoder's size.
        size: height and width of the original crop.

    Returns:
        0..1.
    """
    total = fitted[:, :, 0].astype(np.int16)  # (H, W): three times the grey level, at most 765
    total += fitted[:, :, 1]
    total += fitted[:, :, 2]
    area = min(1.0, size[0] * size[1] / total.size)
    laplacian = total[1:-1, 1:-1] * np.int16(-4)  # within +-4 x 765, which fits int16
    for neighbour in (total[:-2, 1:-1], total[2:, 1:-1], total[1:-1, :-2], total[1:-1, 2:]):
        laplacian += neighbour
    variance = float(laplacian.var(dtype=np.float32)) / 9  # of the grey levels themselves
    exposed = np.count_nonzero((total >= 3 * BLACK) & (total <= 3 * WHITE))
    product = area * variance / (variance + SHARP_VARIANCE) * exposed / total.size
    return float(product ** (1 / 3))
