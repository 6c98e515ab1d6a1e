"""Opening sources of footage by kind, and folders of images as footage."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from PIL import ExifTags, Image

from resight.errors import FootageError, ImageError
from resight.image import FORMATS, check_structure, decode
from resight.training.ingest.footage import (
    CLOCK_HELP,
    MAX_PIXELS,
    START,
    VIDEO_FORMATS,
    Footage,
    Frame,
    FramePosition,
    check_camera,
    grid_index,
)
from resight.training.store.crops import camera_order
from resight.training.store.datasets import SUFFIXES

log = logging.getLogger(__name__)

MAX_IMAGE_BYTES = 64 * 1024 * 1024  # an uncompressed frame of 16 million pixels as PNG


class ImageFolder:
    """The JPEG, PNG and WebP files of a folder, without sub-folders.

    With ``start_s`` the files are ``fps`` frames per second in the natural order of their names. Otherwise each file
    must have a capture time (EXIF DateTimeOriginal with OffsetTimeOriginal), which defines the order.

    Args:
        path: the folder.
        camera: name of the camera.
        fps: maximum number of frames per second.
        start_s: Unix seconds of the first frame.

    Raises:
        FootageError: no image in the folder, or a file without capture time.
    """

    live = False

    def __init__(self, path: Path, camera: str, fps: float, start_s: float | None) -> None:
        self.path, self.name, self.camera, self.fps = path, str(path), camera, fps
        self.unreadable = self.left_out = 0
        files = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
        self._files = sorted((file for file in files if file.is_file()), key=lambda file: camera_order(file.name))
        if not self._files:
            raise FootageError(f"{path} has no image: expected {', '.join(SUFFIXES)} files, one per frame")
        if start_s is None:
            capture_times = {file: _exif_time(file) for file in self._files}
            self._files.sort(key=lambda file: capture_times[file])
            self._times_s = [capture_times[file] for file in self._files]
        else:
            self._times_s = [start_s + number / fps for number in range(len(self._files))]
        self.start_s: float | None = self._times_s[0]
        self.total: int | None = len(self._files)

    def fingerprint(self) -> str:
        """sha256 of the names and the contents of the files."""
        digest = hashlib.sha256()
        for file in self._files:
            with file.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
            digest.update(f"{file.name}\0{content}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def frames(self, start: FramePosition = START) -> Iterator[Frame]:
        """Frames on the grid from a position on; see `Footage.frames`.

        Raises:
            FootageError: no image could be decoded.
        """
        last, decoded = -1, 0
        for number in range(start.mark, len(self._files)):
            tick = grid_index(self._times_s[number] - self._times_s[0], self.fps)
            if tick <= last:
                continue
            try:
                with self._files[number].open("rb") as file:
                    image = decode(file.read(MAX_IMAGE_BYTES + 1), max_bytes=MAX_IMAGE_BYTES, max_pixels=MAX_PIXELS)
            except (ImageError, OSError) as error:
                self.unreadable += 1
                log.warning("skipped %s: %s", self._files[number], error)
                continue
            last, decoded = tick, decoded + 1
            yield Frame(image, FramePosition(number, number), self._times_s[number])
        if not decoded and start == START:
            raise FootageError(f"{self.name}: none of its {len(self._files)} images could be decoded")


def _exif_time(file: Path) -> float:
    """Capture time of an image from its EXIF data, in Unix seconds.

    Raises:
        FootageError: it has no capture time, or no time zone.
    """
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_IMAGE_BYTES)
        check_structure(data)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            exif = image.getexif().get_ifd(ExifTags.IFD.Exif)
        written = str(exif.get(ExifTags.Base.DateTimeOriginal, ""))
        zone, fraction = (
            str(exif.get(tag, "")).strip(" \0")
            for tag in (ExifTags.Base.OffsetTimeOriginal, ExifTags.Base.SubsecTimeOriginal)
        )
        day, _, time = written.strip(" \0").partition(" ")
        captured = datetime.fromisoformat(f"{day.replace(':', '-')}T{time}{zone}")
        if captured.tzinfo is None:
            raise ValueError("no time zone")
        return captured.timestamp() + (float(f"0.{fraction}") if fraction.isdigit() else 0.0)
    except Exception as error:  # on malformed files Pillow raises errors of many kinds
        raise FootageError(
            f"{file} has no capture time (EXIF DateTimeOriginal with OffsetTimeOriginal): {CLOCK_HELP}; "
            "the images are then --fps frames per second in the order of their names",
            field="start",
        ) from error


LIVE_SCHEMES = ("rtsp", "rtsps")


def open_footage(
    source: str,
    *,
    camera: str,
    fps: float,
    start_s: float | None = None,
    duration_s: float | None = None,
    hwaccel: str = "auto",
) -> Footage:
    """Open a source of footage by its kind.

    Args:
        source: a video file, a folder of images, or an RTSP URL.
        camera: name of the camera at the site.
        fps: maximum number of frames per second.
        start_s: Unix seconds of its first frame; None to read it from the file.
        duration_s: how long a live stream is read; None until it is stopped.
        hwaccel: "auto", "none", or a device of FFmpeg such as cuda or vaapi.

    Raises:
        FootageError: the source is missing, empty, of another kind or too large, or its start time is unknown.
    """
    check_camera(camera)
    scheme, separator, _ = source.partition("://")
    if separator:
        if scheme.lower() not in LIVE_SCHEMES:
            raise FootageError(
                f"{scheme}:// is not supported: expected a video file, a folder of images, or an rtsp:// URL"
            )
        if start_s is not None:
            raise FootageError("a live stream uses this machine's clock: omit --start", field="start")
        from resight.training.ingest.video import RtspStream

        return RtspStream(source, camera, fps, duration_s=duration_s, hwaccel=hwaccel)
    path = Path(source)
    if path.is_dir():
        return ImageFolder(path, camera, fps, start_s)
    if not path.is_file():
        raise FootageError(
            f"no footage at {path}: expected a video ({VIDEO_FORMATS}), a folder of images, or an rtsp:// URL"
        )
    from resight.training.ingest.video import VideoFile

    return VideoFile(path, camera, fps, start_s, hwaccel=hwaccel)
