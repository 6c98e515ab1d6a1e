"""Crops as a page shows them: checked, small, each with its camera's name. One that is damaged is left out and told."""

from __future__ import annotations

import io
from collections.abc import Iterable

from PIL import Image

from resight.errors import ImageError, StoreError
from resight.image import ImageSpec, decode, fit
from resight.training.crops import CropStore
from resight.training.report import Crop

HEIGHT = 272  # pixels: twice what the page gives a crop, for screens of twice the density
LARGE = 16 * 1024  # bytes: a 128 x 64 crop of Market-1501 has 2-3 KiB; what is larger is made smaller
QUALITY = 80  # of JPEG


class Album:
    """Reads crops and remembers the paths of those it could not."""

    def __init__(self) -> None:
        self.missing: dict[str, None] = {}

    def crop(self, store: CropStore, row: int) -> Crop | None:
        """One crop, or None where its file is gone or damaged."""
        try:
            return Crop(_shrink(store.read(row)), store.camera_names[store.cameras[row]])
        except (ImageError, StoreError):
            self.missing[store.paths[row]] = None
            return None

    def crops(self, store: CropStore, rows: Iterable[int]) -> list[Crop]:
        """Those of the rows that can be read, in their order."""
        return [crop for row in rows if (crop := self.crop(store, int(row))) is not None]

    @property
    def notes(self) -> list[str]:
        """What the reader of a page has to know."""
        if not self.missing:
            return []
        first = ", ".join(list(self.missing)[:3])
        return [f"{len(self.missing)} chosen crops cannot be read and are left out, among them {first}."]


def _shrink(data: bytes) -> bytes:
    """The file as it is where it is small, else a JPEG of at most `HEIGHT` rows, its aspect ratio kept.

    Raises:
        ImageError: no image.
    """
    pixels = decode(data)
    if len(data) <= LARGE:
        return data
    scale = min(1.0, HEIGHT / pixels.shape[0])
    height, width = (max(16, round(scale * side)) for side in pixels.shape[:2])
    buffer = io.BytesIO()
    Image.fromarray(fit(pixels, ImageSpec(height, width))).save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()
