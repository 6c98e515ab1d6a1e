"""The first stages: the options that they pass to commands for each camera, and a source that fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from cycles import write_site
from typer.main import get_command

from resight.cli.main import app
from resight.cycle import stages
from resight.cycle.site import load_site
from resight.cycle.stages import StageContext
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


def stage_context(folder: Path, cameras: str) -> StageContext:
    path = write_site(folder, "127.0.0.1:1")
    path.write_text(path.read_text() + cameras)
    site = load_site(path)
    context = StageContext(site, 1, 0.0, lambda words: app(words, standalone_mode=False))
    context.folder.path.mkdir(parents=True, exist_ok=True)
    return context


def test_every_key_of_a_camera_becomes_an_option_of_ingest(tmp_path: Path) -> None:
    for name in ("door/b.mp4", "door/a.mp4", "boxes/b.txt", "boxes/a.txt", "hall.mkv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    context = stage_context(tmp_path, CAMERAS)
    command = get_command(app).commands["ingest"]  # type: ignore[attr-defined]
    params = {}
    for name, words in stages._ingest_arguments(context).items():
        if words:
            params[name] = command.make_context("ingest", [str(word) for word in words], resilient_parsing=False).params
    assert set(params) == {"door", "hall", "gate", "gallery-lobby"}  # there are no files of the yard
    assert all(one["into"] == context.layout.crops for one in params.values())
    door, hall, gate = params["door"], params["hall"], params["gate"]
    assert door["sources"] == [str(tmp_path / "door" / name) for name in ("a.mp4", "b.mp4")]
    assert [path.name for path in door["detections"]] == ["a.txt", "b.txt"]  # next to its video
    assert (door["camera"], door["fps"], door["tracks"], door["crops_per_track"]) == ("door", 2.5, "given", 3)
    assert door["min_height"] == 40 and door["start"] is None and door["duration"] is None
    assert (hall["start"], hall["detector"]) == ("2026-03-01T22:00:00+01:00", str(tmp_path / "yolo.onnx"))
    assert (gate["duration"], gate["detector"], gate["detector_weights"].name) == (60.0, "ssdlite", "ssdlite.pth")
    assert (params["gallery-lobby"]["from_gallery"], params["gallery-lobby"]["server"]) == ("lobby", "127.0.0.1:1")


def test_one_failed_source_does_not_stop_the_others_and_if_all_fail_the_run_stops(tmp_path: Path) -> None:
    (tmp_path / "hall.mkv").write_text("no film")
    camera = "[[camera]]\nname = '{}'\nsource = '{}'\nstart = 2026-03-01T22:00:00+01:00\n"
    hall = camera.format("hall", "hall.mkv")
    done = stages.ingest(stage_context(tmp_path, hall + camera.format("yard", "yard/*.mp4")))
    assert done.verdict == "done" and "hall.mkv" in done.reasons[0]
    assert done.figures["sources"] == {"yard": "nothing there"} and list(done.figures["failed"]) == ["hall"]
    with pytest.raises(ReIDError, match=r"hall\.mkv"):
        stages.ingest(stage_context(tmp_path, hall))
