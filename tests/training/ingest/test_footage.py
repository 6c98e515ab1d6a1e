"""Files, folders and live streams as frames with times: order, grid, resuming, damaged and malicious input."""

from __future__ import annotations

import io
import logging
import struct
from datetime import UTC, datetime
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import ExifTags, Image
from walkers import HEIGHT, START, START_S, WIDTH, Walker, shots, write_film

from resight.errors import FootageError
from resight.training.ingest import video
from resight.training.ingest.footage import Frame, check_camera, grid_index, parse_time
from resight.training.ingest.sources import open_footage

WALKERS = (Walker(0, 30, 10, 250),)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 frames at 10 per second, with a key frame every 10."""
    return write_film(tmp_path_factory.mktemp("film") / "a.mp4", WALKERS, 30, fps=10)


def read(path: Path | str, fps: float = 5, **more) -> list[Frame]:
    return list(open_footage(str(path), camera="door", fps=fps, **more).frames())


def test_frames_of_a_video_are_on_the_grid_with_correct_times(film: Path) -> None:
    frames = read(film)
    assert [frame.position.number for frame in frames] == list(range(0, 30, 2))
    np.testing.assert_allclose([frame.time_s for frame in frames], START_S + np.arange(15) / 5, atol=1e-6)
    for frame, drawn in zip(frames, list(shots(WALKERS, 30))[::2], strict=True):
        assert frame.image.shape == (HEIGHT, WIDTH, 3) and frame.image.dtype == np.uint8
        assert np.abs(frame.image.astype(int) - drawn).mean() < 8  # only compression loss


@pytest.mark.parametrize("fps, count", [(10, 30), (60, 30), (3, 9), (0.5, 2)])
def test_no_more_than_fps_frames_per_second(film: Path, fps: float, count: int) -> None:
    frames = read(film, fps)
    assert len(frames) == count
    footage = open_footage(str(film), camera="door", fps=fps)
    assert footage.total is not None and abs(footage.total - count) <= 1
    ticks = [grid_index(frame.time_s - START_S, fps) for frame in frames]
    assert ticks == sorted(set(ticks))


@pytest.mark.parametrize(
    "name, codec", [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("a.ts", "libx264"), ("a.avi", "mpeg4")]
)
@pytest.mark.parametrize("start", [1, 7, 14])
def test_reading_can_resume_at_any_frame(tmp_path: Path, name: str, codec: str, start: int) -> None:
    path = write_film(tmp_path / name, WALKERS, 30, fps=10, codec=codec)
    footage = open_footage(str(path), camera="door", fps=5, start_s=0.0)
    whole = list(footage.frames())
    assert len(whole) >= 14
    rest = list(footage.frames(whole[start - 1].position))
    assert [frame.position for frame in rest] == [frame.position for frame in whole[start - 1 :]]
    for one, two in zip(rest, whole[start - 1 :], strict=True):
        assert one.time_s == two.time_s and (one.image == two.image).all()


def test_frames_are_rotated_according_to_the_metadata(film: Path, tmp_path: Path) -> None:
    """The matrix of ISO 14496-12 8.3.2 in the track's header: a quarter to the right."""
    data = bytearray(film.read_bytes())
    matrix = data.index(b"tkhd") + 44
    one = 0x00010000
    data[matrix : matrix + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, HEIGHT * one, 0, 1 << 30)
    (tmp_path / "turned.mp4").write_bytes(data)
    turned, plain = read(tmp_path / "turned.mp4")[3], read(film)[3]
    assert turned.image.shape == (WIDTH, HEIGHT, 3) and (turned.image == np.rot90(plain.image, -1)).all()


def test_truncated_and_damaged_videos_are_read_as_far_as_possible(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_film(tmp_path / "a.ts", WALKERS, 30, fps=10)
    data = bytearray(path.read_bytes())
    path.write_bytes(data[: len(data) * 2 // 3])
    assert 5 <= len(read(path, start_s=0)) < 15
    for offset in range(len(data) // 2, len(data) * 2 // 3, 200):
        data[offset] ^= 0x55
    path.write_bytes(data)
    footage = open_footage(str(path), camera="door", fps=5, start_s=0.0)
    frames = list(footage.frames())
    assert 5 <= len(frames) < 15 and footage.unreadable > 0


def test_a_broken_container_is_an_error(tmp_path: Path, film: Path) -> None:
    (tmp_path / "cut.mp4").write_bytes(film.read_bytes()[:2000])  # its index is at its end
    with pytest.raises(FootageError, match=r"cannot be read as video .*: expected MP4, MKV"):
        read(tmp_path / "cut.mp4", start_s=0)


def test_a_video_without_a_valid_frame_is_an_error(tmp_path: Path) -> None:
    path = write_film(tmp_path / "a.ts", WALKERS, 10)
    data = bytearray(path.read_bytes())
    for offset in range(564, len(data)):  # keep the first packets, which describe the streams
        if offset % 188 > 20:
            data[offset] = 0
    path.write_bytes(data)
    with pytest.raises(FootageError):
        read(path, start_s=0)


@pytest.mark.parametrize(
    "name, text",
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{film}\n#EXT-X-ENDLIST\n"),
        ("list.ffconcat", "ffconcat version 1.0\nfile {film}\n"),
        ("list.mp4", "ffconcat version 1.0\nfile {film}\n"),
        ("noise.mp4", "no video at all"),
        ("empty.mp4", ""),
    ],
)
def test_files_that_refer_to_other_files_are_refused(tmp_path: Path, film: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text.format(film=film))
    with pytest.raises(FootageError, match="cannot be read as video"):
        read(tmp_path / name, start_s=0)


def test_raw_video_without_time_stamps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FootageError, match="cannot be read as video"):
        read(write_film(tmp_path / "a.h264", WALKERS, 10), start_s=0)


def test_frame_sizes_are_checked_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, film: Path) -> None:
    monkeypatch.setattr(video, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    with pytest.raises(FootageError, match=f"{WIDTH}x{HEIGHT}, at most"):
        read(film)
    with av.open(str(tmp_path / "tone.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(FootageError, match="has no video"):
        read(tmp_path / "tone.mp4", start_s=0)


@pytest.mark.parametrize("text, seconds", [(START, START_S), ("2026-03-01T23:00:00+01:00", START_S), ("12.5", 12.5)])
def test_times_need_a_zone_or_unix_seconds(text: str, seconds: float) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    "text, message", [("2026-03-01T22:00:00", "no time zone: add one"), ("yesterday", "is not a time")]
)
def test_other_times_are_refused(text: str, message: str) -> None:
    with pytest.raises(FootageError, match=message):
        parse_time(text)


@pytest.mark.parametrize(
    "metadata, message",
    [({"creation_time": ""}, "has no creation_time: give .*--start"),
     ({"creation_time": "1970-01-01T00:00:00Z"}, "a clock that was never set")],
)  # fmt: skip
def test_a_missing_start_time_is_an_error(tmp_path: Path, metadata: dict[str, str], message: str) -> None:
    path = write_film(tmp_path / "a.mkv", WALKERS, 4, **metadata)
    with pytest.raises(FootageError, match=message):
        read(path)
    assert read(path, start_s=5.0)[0].time_s == 5.0


def test_hardware_decoders_are_tried_and_missing_ones_are_reported(
    film: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = read(film, hwaccel="none")
    with caplog.at_level(logging.INFO):
        found = read(film, hwaccel="auto")
    assert [frame.position for frame in found] == [frame.position for frame in expected]
    with pytest.raises(FootageError, match="--hwaccel steam: expected auto, none"):
        read(film, hwaccel="steam")
    named = av.codec.hwaccel.hwdevices_available()[0]
    with caplog.at_level(logging.INFO):
        assert len(read(film, hwaccel=named)) == len(expected)
    assert f"decoded by {named}" in caplog.text or f"{named} cannot decode it, using software decoding" in caplog.text


@pytest.mark.parametrize("name", ["door", "Süd 2", "a.b_c-9"])
def test_camera_names(name: str) -> None:
    assert check_camera(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", "a\nb", " a", "a ", "a.", "-a", "_", "x" * 64])
def test_other_camera_names_are_refused(name: str) -> None:
    with pytest.raises(FootageError, match="expected 1 to 63 letters"):
        check_camera(name)


@pytest.mark.parametrize("source", ["http://10.0.0.7/live", "file:///etc/passwd", "rtsp://", "rtsp://[::1"])
def test_other_addresses_are_refused(source: str) -> None:
    with pytest.raises(FootageError, match="expected"):
        read(source)


def write_images(
    folder: Path, names: list[str], *, taken: list[str] | None = None, zone: str = "+01:00"
) -> list[np.ndarray]:
    folder.mkdir(exist_ok=True)
    images = list(shots(WALKERS, len(names)))
    for number, (name, image) in enumerate(zip(names, images, strict=True)):
        exif = Image.Exif()
        if taken is not None:
            tags = exif.get_ifd(ExifTags.IFD.Exif)
            tags[ExifTags.Base.DateTimeOriginal] = taken[number]
            tags[ExifTags.Base.SubsecTimeOriginal] = "50"
            if zone:
                tags[ExifTags.Base.OffsetTimeOriginal] = zone
        Image.fromarray(image).save(folder / name, quality=95, exif=exif)
    return images


def test_images_are_ordered_by_name(tmp_path: Path) -> None:
    images = write_images(tmp_path / "in", ["f1.jpg", "f2.jpg", "f10.jpg"])
    (tmp_path / "in" / ".hidden.jpg").write_bytes(b"no image")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    footage = open_footage(str(tmp_path / "in"), camera="door", fps=4, start_s=100.0)
    frames = list(footage.frames())
    assert [frame.time_s for frame in frames] == [100.0, 100.25, 100.5] and footage.total == 3
    for frame, image in zip(frames, images, strict=True):
        assert np.abs(frame.image.astype(int) - image).mean() < 4
    assert [frame.position for frame in footage.frames(frames[1].position)] == [frame.position for frame in frames[1:]]


def test_images_with_capture_times_are_ordered_by_time(tmp_path: Path) -> None:
    taken = ["2026:03:01 23:00:02", "2026:03:01 23:00:00", "2026:03:01 23:00:01"]
    write_images(tmp_path / "in", ["a.jpg", "b.jpg", "c.jpg"], taken=taken)
    frames = read(tmp_path / "in")
    assert [frame.time_s - START_S for frame in frames] == [0.5, 1.5, 2.5]
    assert datetime.fromtimestamp(frames[0].time_s, UTC).hour == 22
    assert len(read(tmp_path / "in", fps=0.5)) == 2


@pytest.mark.parametrize("taken, zone", [(None, ""), (["2026:03:01 23:00:00"], ""), (["yesterday"], "+01:00")])
def test_images_without_a_time_are_refused(tmp_path: Path, taken: list[str] | None, zone: str) -> None:
    write_images(tmp_path / "in", ["a.jpg"], taken=taken, zone=zone)
    with pytest.raises(FootageError, match=r"has no capture time .*--start"):
        read(tmp_path / "in")


def test_damaged_images_are_counted_and_a_folder_without_one_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "in", ["a.jpg", "b.jpg", "c.jpg"])
    (tmp_path / "in" / "b.jpg").write_bytes((tmp_path / "in" / "b.jpg").read_bytes()[:500])
    huge = io.BytesIO()
    Image.new("1", (4097, 4097)).save(huge, "PNG")
    (tmp_path / "in" / "d.png").write_bytes(huge.getvalue())
    footage = open_footage(str(tmp_path / "in"), camera="door", fps=5, start_s=0.0)
    assert [frame.position.number for frame in footage.frames()] == [0, 2] and footage.unreadable == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(FootageError, match="has no image"):
        read(tmp_path / "empty", start_s=0)
    (tmp_path / "empty" / "a.jpg").write_bytes(b"nothing")
    with pytest.raises(FootageError, match="none of its 1 images"):
        read(tmp_path / "empty", start_s=0)


def test_fingerprints_depend_on_content_and_not_on_names(tmp_path: Path, film: Path) -> None:
    def fingerprint(path: Path) -> str:
        return open_footage(str(path), camera="door", fps=5, start_s=0.0).fingerprint()

    (tmp_path / "b.mp4").write_bytes(film.read_bytes())
    assert fingerprint(film) == fingerprint(tmp_path / "b.mp4")
    write_images(tmp_path / "in", ["a.jpg", "b.jpg"])
    one = fingerprint(tmp_path / "in")
    write_images(tmp_path / "in", ["b.jpg", "a.jpg"])
    assert fingerprint(tmp_path / "in") != one
