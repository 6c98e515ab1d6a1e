"""Common parts of the HTML pages: templates, number formats, and crops as thumbnails."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from resight.errors import ImageError, StoreError
from resight.image import ImageSpec, decode, fit
from resight.training.report.svg import format_number
from resight.training.store.crops import CropStore


@dataclass(frozen=True)
class CropImage:
    """An image of one person: encoded bytes (JPEG, PNG or WebP) and the name of its camera."""

    image: bytes = field(repr=False)
    camera: str


def templates(*folders: Path) -> Environment:
    """The templates in this folder and in other folders; strings are escaped."""
    return Environment(
        loader=FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def flatten(tree: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Return (dotted name, value as text) for every leaf of a nested mapping."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rows += flatten(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            rows.append((f"{prefix}{key}", format_number(value)))
        elif isinstance(value, list | tuple):
            rows.append((f"{prefix}{key}", ", ".join(map(str, value))))
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows


def data_uri(image: bytes) -> str:
    """Return encoded image bytes as a ``data:`` URI; the type is read from the first bytes."""
    kind = "png" if image.startswith(b"\x89PNG") else "webp" if image[8:12] == b"WEBP" else "jpeg"
    return f"data:image/{kind};base64,{b64encode(image).decode()}"


def format_duration(seconds: float) -> str:
    """Format seconds: 0.4 s, 12 s, 3 min 05 s, 1 h 02 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


THUMBNAIL_HEIGHT = 272  # pixels: twice the size on the page, for high-density screens
SHRINK_ABOVE_BYTES = 16 * 1024  # larger files are shrunk; a 128 x 64 crop of Market-1501 has 2-3 KiB
THUMBNAIL_QUALITY = 80  # of JPEG


class Thumbnails:
    """Reads crops as thumbnails and collects the paths of those that cannot be read."""

    def __init__(self) -> None:
        self.missing: dict[str, None] = {}

    def crop(self, store: CropStore, row: int) -> CropImage | None:
        """One crop; None if its file is missing or damaged."""
        try:
            return CropImage(_shrink(store.read(row)), store.camera_names[store.cameras[row]])
        except (ImageError, StoreError):
            self.missing[store.paths[row]] = None
            return None

    def crops(self, store: CropStore, rows: Iterable[int]) -> list[CropImage]:
        """The crops of the rows that can be read, in order."""
        return [crop for row in rows if (crop := self.crop(store, int(row))) is not None]

    @property
    def notes(self) -> list[str]:
        """Notes for the page on crops that could not be read."""
        if not self.missing:
            return []
        first = ", ".join(list(self.missing)[:3])
        return [f"{len(self.missing)} selected crops cannot be read and are not shown, including {first}."]


def _shrink(data: bytes) -> bytes:
    """A small file unchanged, else a JPEG of at most `THUMBNAIL_HEIGHT` rows with the same aspect ratio.

    Raises:
        ImageError: the file is not an image.
    """
    pixels = decode(data)
    if len(data) <= SHRINK_ABOVE_BYTES:
        return data
    scale = min(1.0, THUMBNAIL_HEIGHT / pixels.shape[0])
    height, width = (max(16, round(scale * side)) for side in pixels.shape[:2])
    buffer = io.BytesIO()
    Image.fromarray(fit(pixels, ImageSpec(height, width))).save(buffer, "JPEG", quality=THUMBNAIL_QUALITY)
    return buffer.getvalue()
