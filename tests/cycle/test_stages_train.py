"""What the first stages tell the commands: every key of a camera, and what a source that fails does."""

from __future__ import annotations

from pathlib import Path

import pytest
from cycles import write_site
from typer.main import get_command

from resight.cli import app
from resight.cycle import stages_train
from resight.cycle.site_file import load_site
from resight.cycle.work import Work
from resight.errors import ReIDError

CAMERAS = """
[[camera]]
name = "door"
source = "door/*.mp4"
fps = 2.5
detections = "boxes/*.txt"
tracks = "given"
crops_per_track = 3
min_height = 40
[[camera]]
name = "hall"
source = "hall.mkv"
start = 2026-03-01T22:00:00+01:00
detector = "yolo.onnx"
[[camera]]
name = "gate"
source = "rtsp://10.0.0.7/live"
seconds = 60.0
detector = "ssdlite"
detector_weights = "ssdlite.pth"
[[camera]]
name = "yard"
source = "yard/*.mp4"
[[gallery]]
collection = "lobby"
"""


def work(folder: Path, cameras: str) -> Work:
    path = write_site(folder, "127.0.0.1:1")
    path.write_text(path.read_text() + cameras)
    site = load_site(path)
    made = Work(site, 1, 0.0)
    made.folder.path.mkdir(parents=True, exist_ok=True)
    return made


def test_every_key_of_a_camera_is_told_as_the_command_takes_it(tmp_path: Path) -> None:
    for name in ("door/b.mp4", "door/a.mp4", "boxes/b.txt", "boxes/a.txt", "hall.mkv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    made = work(tmp_path, CAMERAS)
    command = get_command(app).commands["ingest"]  # type: ignore[attr-defined]
    told = {}
    for name, words in stages_train._sources(made).items():
        if words:
            told[name] = command.make_context("ingest", [str(word) for word in words], resilient_parsing=False).params
    assert set(told) == {"door", "hall", "gate", "gallery-lobby"}  # nothing is recorded in the yard
    assert all(one["into"] == made.layout.crops for one in told.values())
    door, hall, gate = told["door"], told["hall"], told["gate"]
    assert door["sources"] == [str(tmp_path / "door" / name) for name in ("a.mp4", "b.mp4")]
    assert [path.name for path in door["detections"]] == ["a.txt", "b.txt"]  # each beside its film
    assert (door["camera"], door["fps"], door["tracks"], door["crops_per_track"]) == ("door", 2.5, "given", 3)
    assert door["min_height"] == 40 and door["start"] is None and door["duration"] is None
    assert (hall["start"], hall["detector"]) == ("2026-03-01T22:00:00+01:00", str(tmp_path / "yolo.onnx"))
    assert (gate["duration"], gate["detector"], gate["detector_weights"].name) == (60.0, "ssdlite", "ssdlite.pth")
    assert (told["gallery-lobby"]["from_gallery"], told["gallery-lobby"]["server"]) == ("lobby", "127.0.0.1:1")


def test_a_source_that_fails_stops_no_other_and_all_that_fail_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "hall.mkv").write_text("no film")
    camera = "[[camera]]\nname = '{}'\nsource = '{}'\nstart = 2026-03-01T22:00:00+01:00\n"
    hall = camera.format("hall", "hall.mkv")
    done = stages_train.ingest(work(tmp_path, hall + camera.format("yard", "yard/*.mp4")))
    assert done.verdict == "done" and "hall.mkv" in done.reasons[0]
    assert done.figures["sources"] == {"yard": "nothing there"} and list(done.figures["failed"]) == ["hall"]
    with pytest.raises(ReIDError, match=r"hall\.mkv"):
        stages_train.ingest(work(tmp_path, hall))
