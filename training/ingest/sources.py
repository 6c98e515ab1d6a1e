"""A folder of images as footage: one frame a file, in the order of time or of names."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from PIL import ExifTags, Image

from resight.errors import FootageError, ImageError
from resight.image import FORMATS, decode
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

MAX_IMAGE_BYTES = 64 * 1024 * 1024  # of a file: an uncompressed frame of 16 million pixels as PNG


class ImageFolder:
    """The JPEG, PNG and WebP files of a folder, not of those below it.

    With ``start_s`` the files follow one another ``fps`` a second in the natural order of their names. Without, each
    must carry its moment (EXIF DateTimeOriginal, with OffsetTimeOriginal), and they follow one another by it.

    Args:
        path: of the folder.
        camera: whose they are.
        fps: frames a second to hand out at most.
        start_s: Unix seconds of the first one.

    Raises:
        FootageError: no image in it, or no clock.
    """

    live = False

    def __init__(self, path: Path, camera: str, fps: float, start_s: float | None) -> None:
        self.path, self.name, self.camera, self.fps = path, str(path), camera, fps
        self.unreadable = self.left_out = 0
        files = [file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]
        self._files = sorted((file for file in files if file.is_file()), key=lambda file: camera_order(file.name))
        if not self._files:
            raise FootageError(f"{path} holds no image: expected {', '.join(SUFFIXES)} files in it, a frame each")
        if start_s is None:
            taken = {file: _exif_time(file) for file in self._files}
            self._files.sort(key=lambda file: taken[file])
            self._times_s = [taken[file] for file in self._files]
        else:
            self._times_s = [start_s + number / fps for number in range(len(self._files))]
        self.start_s: float | None = self._times_s[0]
        self.total: int | None = len(self._files)

    def fingerprint(self) -> str:
        """sha256 over the names and the sha256 of the files."""
        digest = hashlib.sha256()
        for file in self._files:
            with file.open("rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
            digest.update(f"{file.name}\0{content}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def frames(self, start: FramePosition = START) -> Iterator[Frame]:
        """Frames on the grid, from a place on; see `Footage.frames`.

        Raises:
            FootageError: not one image could be decoded.
        """
        last, seen = -1, 0
        for number in range(start.mark, len(self._files)):
            moment = grid_index(self._times_s[number] - self._times_s[0], self.fps)
            if moment <= last:
                continue
            try:
                with self._files[number].open("rb") as file:
                    image = decode(file.read(MAX_IMAGE_BYTES + 1), max_bytes=MAX_IMAGE_BYTES, max_pixels=MAX_PIXELS)
            except (ImageError, OSError) as error:
                self.unreadable += 1
                log.warning("passed over %s: %s", self._files[number], error)
                continue
            last, seen = moment, seen + 1
            yield Frame(image, FramePosition(number, number), self._times_s[number])
        if not seen and start == START:
            raise FootageError(f"{self.name}: none of its {len(self._files)} images could be decoded")


def _exif_time(file: Path) -> float:
    """Unix seconds at which a camera says that it took an image.

    Raises:
        FootageError: it does not say, or not in which time zone.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            said = image.getexif().get_ifd(ExifTags.IFD.Exif)
        written = str(said.get(ExifTags.Base.DateTimeOriginal, ""))
        zone, fraction = (
            str(said.get(tag, "")).strip(" \0")
            for tag in (ExifTags.Base.OffsetTimeOriginal, ExifTags.Base.SubsecTimeOriginal)
        )
        day, _, time = written.strip(" \0").partition(" ")
        moment = datetime.fromisoformat(f"{day.replace(':', '-')}T{time}{zone}")
        if moment.tzinfo is None:
            raise ValueError("no time zone")
        return moment.timestamp() + (float(f"0.{fraction}") if fraction.isdigit() else 0.0)
    except Exception as error:  # on hostile bytes Pillow raises whatever its parsers meet
        raise FootageError(
            f"{file} does not say when it was taken (EXIF DateTimeOriginal with OffsetTimeOriginal): {CLOCK_HELP}; "
            "the images then follow one another --fps a second in the order of their names",
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
    """Recognise a source and look at its beginning.

    Args:
        source: a video file, a folder of images, or an RTSP URL.
        camera: its name at the site.
        fps: frames a second to hand out at most.
        start_s: Unix seconds of its first frame; None = what the file says.
        duration_s: of a live stream, how long it is watched; None = until it is stopped.
        hwaccel: "auto", "none", or a device FFmpeg knows, such as cuda or vaapi.

    Raises:
        FootageError: it is missing, empty, of another kind, too large a picture, or nobody knows when it was taken.
    """
    check_camera(camera)
    scheme, separator, _ = source.partition("://")
    if separator:
        if scheme.lower() not in LIVE_SCHEMES:
            raise FootageError(
                f"{scheme}:// is no source: expected a video file, a folder of images, or an rtsp:// URL"
            )
        if start_s is not None:
            raise FootageError("a live stream runs by this machine's clock: leave --start away", field="start")
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
