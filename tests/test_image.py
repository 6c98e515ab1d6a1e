"""Decoding and resizing: golden bytes, accepted and rejected kinds of images."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resight.arrays import Pixels
from resight.errors import ImageError, ImageTooLargeError, ImageTooSmallError, ImageUndecodableError
from resight.image import MAX_BYTES, MAX_SIDE, MIN_SIDE, ImageSpec, decode, fit


def pattern(height: int = 48, width: int = 32) -> Pixels:
    """A deterministic image drawn by arithmetic."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([(x * 7) % 256, (y * 5) % 256, ((x * y) // 3) % 256], axis=2).astype(np.uint8)


def encode(image: Image.Image | Pixels, kind: str = "PNG", **options: object) -> bytes:
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def digest(pixels: Pixels) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("spec", "golden"),
    [
        (ImageSpec(96, 64, "bicubic"), "856216e35cc5a0de"),
        (ImageSpec(24, 16, "bicubic"), "71348a96959be387"),
        (ImageSpec(31, 57, "bicubic"), "9d029c77eaaf06d1"),
        (ImageSpec(96, 64, "bilinear"), "1f7593ce125b2e17"),
        (ImageSpec(24, 16, "bilinear"), "047b6c7d6e4af617"),
        (ImageSpec(31, 57, "bilinear"), "df625a4fbe833b00"),
    ],
)
def test_resize_gives_golden_bytes(spec: ImageSpec, golden: str) -> None:
    """Features of old galleries are comparable only if these bytes never change."""
    pixels = fit(pattern(), spec)
    assert pixels.shape == (spec.height, spec.width, 3)
    assert pixels.dtype == np.uint8
    assert digest(pixels) == golden


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # one pixel wide: sampling without a filter would give only black or only white
    pixels = fit(stripes, ImageSpec(16, 16))
    assert 100 < pixels.min() <= pixels.max() < 155


def test_fitting_twice_changes_nothing() -> None:
    spec = ImageSpec(96, 64)
    once = fit(pattern(), spec)
    assert np.array_equal(fit(once, spec), once)


def test_png_decodes_to_the_encoded_pixels() -> None:
    pixels = decode(encode(pattern()))
    assert np.array_equal(pixels, pattern())
    assert pixels.flags.writeable and pixels.flags.c_contiguous


def test_jpeg_decodes_close_to_the_encoded_pixels() -> None:
    smooth = np.array(Image.fromarray(pattern(4, 3)).resize((64, 128), Image.Resampling.BICUBIC))
    difference = decode(encode(smooth, "JPEG", quality=95)).astype(int) - smooth
    assert np.abs(difference).mean() < 2.0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_eight_bit_mode_becomes_rgb(mode: str) -> None:
    kind = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    assert decode(encode(Image.fromarray(pattern()).convert(mode), kind)).shape == (48, 32, 3)


def test_grey_becomes_three_equal_channels() -> None:
    grey = pattern()[:, :, 0]
    assert np.array_equal(decode(encode(grey)), np.repeat(grey[:, :, None], 3, axis=2))


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_alpha_is_dropped(mode: str) -> None:
    transparent = Image.fromarray(pattern()).quantize(16) if mode == "P" else Image.fromarray(pattern()).convert("RGBA")
    opaque = decode(encode(transparent))
    if mode == "P":
        data = encode(transparent, transparency=bytes(range(16)))
    else:
        transparent.putalpha(7)
        data = encode(transparent)
    assert np.array_equal(decode(data), opaque)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = decode(encode(pattern()))
    turned = decode(encode(pattern(), exif=exif.tobytes()))
    inverse = [  # EXIF 2.3, table of the tag Orientation
        upright,
        upright[:, ::-1],
        upright[::-1, ::-1],
        upright[::-1],
        upright.transpose(1, 0, 2),
        np.rot90(upright, -1),
        upright[::-1, ::-1].transpose(1, 0, 2),
        np.rot90(upright),
    ]
    assert np.array_equal(turned, inverse[orientation - 1])


def test_a_phone_jpeg_with_a_second_picture_decodes_to_its_first() -> None:
    first, second = Image.fromarray(pattern()), Image.fromarray(pattern()[::-1].copy())
    data = encode(first, "MPO", save_all=True, append_images=[second])
    difference = decode(data).astype(int) - decode(encode(first, "JPEG"))
    assert np.abs(difference).max() <= 2


def solid_png(width: int, height: int) -> bytes:
    """A tiny file with the header of a huge grey image."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [9_000, 10_000, 20_000, 2**31 - 1])
def test_a_png_bomb_is_too_large(side: int) -> None:
    with pytest.raises(ImageTooLargeError, match="send the crop of one person"):
        decode(solid_png(side, side))


def test_a_nine_thousand_pixel_jpeg_is_too_large() -> None:
    data = encode(Image.new("L", (9000, 9000)), "JPEG", quality=5)
    with pytest.raises(ImageTooLargeError, match="9000x9000") as caught:
        decode(data)
    assert caught.value.facts == {"found_pixels": "81000000", "max_pixels": "4000000"}


def test_bounds_are_inclusive() -> None:
    assert decode(encode(pattern(MIN_SIDE, MIN_SIDE))).shape == (MIN_SIDE, MIN_SIDE, 3)
    assert decode(encode(pattern(MIN_SIDE, MAX_SIDE))).shape == (MIN_SIDE, MAX_SIDE, 3)
    with pytest.raises(ImageTooLargeError):
        decode(encode(pattern(MIN_SIDE, MAX_SIDE + 1)))
    data = encode(pattern())
    assert decode(data, max_bytes=len(data), max_pixels=48 * 32).shape == (48, 32, 3)
    with pytest.raises(ImageTooLargeError, match=f"{len(data)} bytes, at most {len(data) - 1}"):
        decode(data, max_bytes=len(data) - 1)
    with pytest.raises(ImageTooLargeError, match="32x48"):
        decode(data, max_pixels=48 * 32 - 1)


def test_too_many_bytes_are_rejected_before_decoding() -> None:
    with pytest.raises(ImageTooLargeError, match=str(MAX_BYTES + 1)):
        decode(bytes(MAX_BYTES + 1))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 400), (400, 1), (15, 64), (64, 15)])
def test_a_side_below_the_minimum_is_rejected(height: int, width: int) -> None:
    with pytest.raises(ImageTooSmallError, match=f"{width}x{height}"):
        decode(encode(pattern(height, width)))


def animated(kind: str) -> bytes:
    frames = [Image.fromarray(np.roll(pattern(), shift, axis=0)) for shift in (0, 9)]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:])


REFUSED = {
    "empty": lambda: b"",
    "text named .jpg": lambda: b"this is no picture, whatever its name says\n" * 20,
    "truncated JPEG": lambda: encode(pattern(), "JPEG")[:-200],
    "JPEG header alone": lambda: encode(pattern(), "JPEG")[:40],
    "truncated PNG": lambda: encode(pattern())[:-400],
    "truncated WebP": lambda: encode(pattern(), "WEBP")[:-100],
    "PNG without its data": lambda: solid_png(64, 64),
    "GIF": lambda: encode(pattern(), "GIF"),
    "TIFF": lambda: encode(pattern(), "TIFF"),
    "BMP": lambda: encode(pattern(), "BMP"),
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="128"></svg>',
    "animated PNG": lambda: animated("PNG"),
    "animated WebP": lambda: animated("WEBP"),
    "16-bit PNG": lambda: encode(Image.fromarray(pattern()[:, :, 0].astype(np.uint16) * 257)),
    "zeros": lambda: bytes(4096),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_files_are_rejected(kind: str) -> None:
    with pytest.raises(ImageUndecodableError, match=r"expected a .* image"):
        decode(REFUSED[kind]())


@pytest.mark.filterwarnings("ignore")  # Pillow warns about damaged EXIF and continues, as does the decoder
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "MPO"])
def test_mutated_files_decode_or_are_rejected(kind: str) -> None:
    """For any input, the decoder returns pixels or raises an ImageError."""
    rng = np.random.default_rng(7)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    more = {"save_all": True, "append_images": [Image.fromarray(pattern())]} if kind == "MPO" else {}
    whole = np.frombuffer(encode(pattern(), kind, exif=exif.tobytes(), **more), np.uint8)
    refused = 0
    for _ in range(600):
        data = whole.copy()
        places = rng.integers(0, min(len(data), 400), rng.integers(1, 6))  # most parser errors are in headers
        data[places] = rng.integers(0, 256, len(places))
        end = len(data) if rng.random() < 0.7 else rng.integers(0, len(data))
        try:
            pixels = decode(data[:end].tobytes())
        except ImageError:
            refused += 1
        else:
            assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert 0 < refused


def by_pillow(data: bytes) -> Pixels:
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return np.array(image.convert("RGB"))


def natural(height: int, width: int, rng: np.random.Generator) -> Image.Image:
    """Smooth shapes with some noise, so that a JPEG has coefficients of all kinds."""
    small = Image.fromarray(rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), np.uint8))
    large = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return Image.fromarray(np.clip(large + rng.integers(-9, 10, large.shape), 0, 255).astype(np.uint8))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 3}])
def test_every_jpeg_has_exactly_pillows_pixels(how: dict[str, object], subsampling: str) -> None:
    rng = np.random.default_rng(5)
    for height, width in ((16, 16), (17, 31), (128, 64), (255, 127)):
        for quality in (30, 75, 95):
            image = natural(height, width, rng)
            data = encode(image, "JPEG", quality=quality, subsampling=subsampling, **how)
            assert np.array_equal(decode(data), by_pillow(data))
            grey = encode(image.convert("L"), "JPEG", quality=quality, **how)
            assert np.array_equal(decode(grey), by_pillow(grey))


@pytest.mark.parametrize("mode", ["CMYK", "RGB"])
def test_a_jpeg_in_other_colour_spaces_is_decoded_by_pillow(mode: str) -> None:
    image = natural(64, 32, np.random.default_rng(6)).convert(mode)
    data = encode(image, "JPEG", quality=90, keep_rgb=mode == "RGB")
    assert np.array_equal(decode(data), by_pillow(data))


def test_a_damaged_jpeg_is_handled_like_by_pillow() -> None:
    rng = np.random.default_rng(8)
    whole = np.frombuffer(encode(natural(96, 48, rng), "JPEG", quality=80), np.uint8)
    same = refused = 0
    for _ in range(400):
        data = whole.copy()
        places = rng.integers(0, len(data), rng.integers(1, 4))
        data[places] = rng.integers(0, 256, len(places))
        try:
            pixels = decode(data.tobytes())
        except ImageError:
            refused += 1
        else:
            assert np.array_equal(pixels, by_pillow(data.tobytes()))
            same += 1
    assert same > 50 and refused > 5


@pytest.mark.real
def test_real_crops_have_exactly_pillows_pixels(shared_data: Path) -> None:
    files = sorted(shared_data.rglob("*.jpg"))[::10]
    assert files
    for file in files:
        data = file.read_bytes()
        assert np.array_equal(decode(data), by_pillow(data)), file


@pytest.mark.parametrize("sides", [(15, 128), (256, 0), (4097, 128), (256, -1)])
def test_invalid_image_sides_are_rejected(sides: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"16\.\.4096, found"):
        ImageSpec(*sides)


def test_unknown_filters_are_rejected() -> None:
    with pytest.raises(ValueError, match="bilinear, bicubic, found 'nearest'"):
        ImageSpec(256, 128, "nearest")  # type: ignore[arg-type]


def jpeg_segments(data: bytes) -> list[tuple[int, int, int]]:
    """Marker, start and end of every segment; a scan's includes its data."""
    found, at = [], 2
    while data[at + 1] != 0xD9:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 1] == 0xDA:
            while data[end] != 0xFF or data[end + 1] == 0 or 0xD0 <= data[end + 1] <= 0xD7:
                end += 1
        found.append((data[at + 1], at, end))
        at = end
    return found


def repeated_scans(height: int, width: int, count: int) -> bytes:
    """A progressive JPEG whose last scan stands there ``count`` times more."""
    data = encode(np.full((height, width, 3), 128, np.uint8), "JPEG", progressive=True)
    _, start, end = jpeg_segments(data)[-1]
    return data[:end] + data[start:end] * count + b"\xff\xd9"


@pytest.mark.parametrize(("side", "count"), [(16, 20_000), (128, 1000), (2000, 1000), (2000, 40_000)])
def test_a_jpeg_of_thousands_of_scans_is_rejected_before_it_is_decoded(side: int, count: int) -> None:
    data = repeated_scans(side, side, count)
    assert len(data) < MAX_BYTES
    read: list[int] = []
    with pytest.raises(ImageTooLargeError, match=r"JPEG has \d+ scans of \d+ pixels, at most \d+ are accepted"):
        decode(data, on_header=read.append)
    assert read == []  # no pixel was decoded


@pytest.mark.parametrize("pixels", [(64, 32), (2000, 2000)])
def test_what_encoders_write_is_accepted(pixels: tuple[int, int]) -> None:
    image = Image.fromarray(pattern(*pixels))
    thumbnail = encode(image.resize((160, 120)), "JPEG")
    for options in ({}, {"progressive": True}, {"progressive": True, "exif": b"Exif\0\0" + thumbnail}):
        data = encode(image, "JPEG", quality=30, **options)
        assert len(data) < MAX_BYTES and decode(data).shape == (*pixels, 3)


@pytest.mark.parametrize("oriented", [b"", b"\xff\xe1\x00\x08Exif\0\0"])
@pytest.mark.parametrize("segment", [b"\xff\xef\x00\x02", b"\xff\xfe\x00\x02", b"\xff\xdb\x00\x02", b"\xff"])
def test_a_jpeg_of_hundreds_of_thousands_of_segments_is_rejected(oriented: bytes, segment: bytes) -> None:
    data = encode(pattern(), "JPEG")
    flood = segment * (1_900_000 // len(segment))
    with pytest.raises(ImageTooLargeError, match="segments in its header"):
        decode(data[:2] + oriented + flood + data[2:])


@pytest.mark.parametrize("kind", [b"tEXt", b"abCd", b"IDAT"])
def test_a_png_of_a_hundred_thousand_chunks_is_rejected(kind: bytes) -> None:
    data, body = encode(pattern(), "PNG"), b"a\0b" if kind == b"tEXt" else b""
    chunk = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    with pytest.raises(ImageTooLargeError, match="segments in its header"):
        decode(data[:33] + chunk * 100_000 + data[33:])
