"""Whole pictures taken through a drawn camera, fast enough for film: what `scene.take_crop` does to one crop.

Letters: H and W of the picture, h and w of the lower resolution at which the camera really sees.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from resight.image import Pixels
from resight.training.scene import Camera

TONES = 1024  # steps of the tone curve: four for each grey level delivered
SIDE_LIGHT = 0.18  # as `scene.take_crop`
SHADE = (0.52, 0.56, 0.68)  # of red, green and blue that reaches the part of a street in the shade; the sky lights it
SHADE_EDGE = 0.06  # of the width: how soft its border is
SHIFTS = 64  # pixels by which the grain may be moved from frame to frame


class Exposure:
    """Resolution, blur, light, colours, contrast and noise of one camera.

    Args:
        camera: drawn for pictures of H x W.
        rng: source of chance, for the grain and how it moves.
    """

    def __init__(self, camera: Camera, rng: np.random.Generator) -> None:
        self._rng = rng
        self.height, self.width = camera.vignette.shape[:2]
        self._seen = max(16, camera.rows * self.width // self.height), camera.rows  # (w, h)
        # A box of radius r has the deviation of ((2 r + 1)^2 - 1) / 12; it takes a third of a Gaussian's time.
        self._blur = (math.sqrt(12 * (camera.blur * camera.rows / self.height) ** 2 + 1) - 1) / 2
        across = np.linspace(-1, 1, self._seen[0], dtype=np.float32)[:, None]
        shade = Image.fromarray(camera.vignette[..., 0]).resize(self._seen)
        light = (1 + SIDE_LIGHT * camera.light * across) * np.asarray(shade)[..., None]  # (h, w, 1)
        border = (across - 0.3 * camera.light) * math.copysign(1 / SHADE_EDGE, camera.light)
        sky = np.array(SHADE, np.float32)
        light = light * (sky + (1 - sky) * np.clip(0.5 + border, 0, 1))  # (h, w, 3)
        self._light = light * (TONES - 1) / 255
        self._matrix = camera.matrix.T
        tone = np.linspace(0, 1, TONES) ** camera.gamma
        tone = (tone - 0.5) * camera.contrast + 0.5 + camera.brightness
        self._tone = np.clip(255 * tone, 0, 255).astype(np.uint8)
        size = self.height + SHIFTS, self.width + SHIFTS, 3
        self._grain = (rng.standard_normal(size, np.float32) * camera.noise).astype(np.int16)

    def __call__(self, canvas: Image.Image) -> Pixels:
        """What the camera delivers of what stands before it.

        Args:
            canvas: RGB, W x H.

        Returns:
            uint8 (H, W, 3).
        """
        seen = canvas.resize(self._seen, Image.Resampling.BOX)
        if self._blur > 0.3:  # below that hardly a pixel changes
            seen = seen.filter(ImageFilter.BoxBlur(self._blur))
        values: NDArray[np.float32] = (np.asarray(seen, np.float32) * self._light) @ self._matrix
        toned = self._tone[np.clip(values, 0, TONES - 1).astype(np.uint16)]
        delivered = Image.fromarray(toned).resize((self.width, self.height), Image.Resampling.BILINEAR)
        down, right = (int(shift) for shift in self._rng.integers(0, SHIFTS + 1, 2))
        grain = self._grain[down : down + self.height, right : right + self.width]
        pixels: Pixels = np.clip(np.asarray(delivered, np.int16) + grain, 0, 255).astype(np.uint8)
        return pixels
