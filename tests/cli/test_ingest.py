"""`resight ingest`: footage with given boxes, a live camera, a gallery, and invalid options."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rtsp import rtsp_camera
from serving import ServerProcess, jpeg, make_bundle
from tiny import environment, resight_here, the_error
from walkers import CROSSING, Walker, shots, write_boxes, write_film

from resight.client import Client, NewEntry
from resight.training.store.crops import open_store
from resight.training.store.links import read_links

FRAMES = 75


@pytest.fixture(scope="module")
def footage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("footage")
    write_film(folder / "a.mp4", CROSSING, FRAMES)
    write_boxes(folder / "a.jsonl", CROSSING, FRAMES)
    write_film(folder / "b.mp4", (Walker(0, 30, 250, 10),), 40)
    write_boxes(folder / "b.jsonl", (Walker(0, 30, 250, 10),), 40, tracks=True)
    return folder


def test_two_files_become_one_store_with_a_page_and_figures(footage: Path, tmp_path: Path) -> None:
    call = [
        *["ingest", footage / "a.mp4", footage / "b.mp4", "--camera", "door", "--into", tmp_path / "s"],
        *["--detections", footage / "a.jsonl", "--detections", footage / "b.jsonl"],
        *["--montage", tmp_path / "t.html", "--json", tmp_path / "f.json"],
    ]
    done = resight_here(*call)
    assert done.returncode == 0, done.stderr
    expected = json.loads((tmp_path / "f.json").read_text())
    assert [one["status"] for one in expected["sources"]] == ["done", "done"] and expected["total"]["tracks"] == 4
    store = open_store(tmp_path / "s")["train"]
    assert len(store) == expected["total"]["crops"] and store.camera_names == ("door",)
    assert "4 of them are shown" in (tmp_path / "t.html").read_text()
    again = resight_here(*call)
    assert again.returncode == 0 and again.stderr.count("was already ingested: skipped") == 2
    expected = json.loads((tmp_path / "f.json").read_text())
    assert (
        expected["total"]["crops"] == 0
        and expected["total"]["skipped"] == 2
        and len(open_store(tmp_path / "s")["train"]) == len(store)
    )


@pytest.mark.parametrize(
    "options, expected",
    [
        (["a.mp4"], "camera '': expected 1 to 63 letters"),
        (["--camera", "door"], "expected either sources or --from-gallery COLLECTION"),
        (["a.mp4", "--from-gallery", "lobby"], "expected either sources or --from-gallery COLLECTION"),
        (["none.mp4", "--camera", "door"], "no footage at"),
        (["a.mp4", "b.mp4", "--camera", "door", "--start", "2026-03-01T22:00:00Z"], "one --start for 2 sources"),
        (["a.mp4", "--camera", "door", "--start", "2026-03-01T22:00:00"], "has no time zone"),
        (["a.mp4", "--camera", "door", "--duration", "60"], "--duration is for live streams"),
        (["a.mp4", "b.mp4", "--camera", "door", "--detections", "a.jsonl"], "1 files of --detections for 2 sources"),
        (
            ["a.mp4", "--camera", "door", "--tracks", "given"],
            "--tracks given: expected own, or given with --detections",
        ),
        (["a.mp4", "--camera", "door", "--tracks", "given", "--detections", "a.jsonl"], "a.jsonl has no tracks"),
        (["a.mp4", "rtsp://h/x", "--camera", "door"], "a live stream does not end"),
        (["a.mp4", "--camera", "door", "--detector", "eyes"], "no detector 'eyes'"),
        (["a.mp4", "--camera", "door", "--montage", "t.png"], "--montage"),
        (["a.mp4", "--camera", "door", "--device", "toaster"], "cannot compute on device"),
    ],
)
def test_invalid_options_end_in_one_sentence(footage: Path, tmp_path: Path, options: list[str], expected: str) -> None:
    names = [
        str(footage / option) if (footage / option).exists() or option == "none.mp4" else option for option in options
    ]
    done = resight_here("ingest", *names, "--into", tmp_path / "s")
    assert done.returncode == 1 and expected in the_error(done)


def test_one_unreadable_file_does_not_stop_the_others(footage: Path, tmp_path: Path) -> None:
    (tmp_path / "torn.mp4").write_bytes((footage / "a.mp4").read_bytes()[:3000])
    boxes = ["--detections", footage / "a.jsonl"] * 2
    call = ["ingest", tmp_path / "torn.mp4", footage / "a.mp4", "--camera", "door", "--into", tmp_path / "s", *boxes]
    done = resight_here(*call, "--json", tmp_path / "f.json")
    assert done.returncode == 0 and "torn.mp4 cannot be read as video" in " ".join(done.stderr.split())
    expected = json.loads((tmp_path / "f.json").read_text())
    assert [one["status"] for one in expected["sources"]] == ["done", "failed"] and expected["total"]["failed"] == 1
    assert len(open_store(tmp_path / "s")["train"]) == expected["total"]["crops"] > 0


@pytest.mark.slow
def test_a_live_stream_stops_on_a_signal_and_keeps_its_crops(tmp_path: Path) -> None:
    images = list(shots((Walker(0, 60, 10, 250),), 60))
    with rtsp_camera(images, fps=10) as camera:
        code = (
            "import sys\n"
            "from resight.training.ingest import detector as detect\n"
            "from resight.training.ingest.boxes import make_boxes\n"
            "class Middle:\n    identity = {'detector': 'test'}\n"
            "    def find(self, frame): return make_boxes([[100, 40, 160, 160]], [0.9])\n"
            "detect.open_detector = lambda *a, **k: Middle()\n"
            "from resight.cli.main import main; sys.argv[0] = 'resight'; main()"
        )
        command = [
            sys.executable,
            "-c",
            code,
            "ingest",
            camera.url("u:s3cret@"),
            "--camera",
            "gate",
            "--into",
            str(tmp_path / "s"),
        ]
        process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 60
        while "PLAY" not in camera.requests and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(3)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    store = open_store(tmp_path / "s")["train"]
    assert len(store) >= 1 and set(store.tracks.tolist()) == {0} and abs(store.times_s[0] - time.time()) < 120
    assert "s3cret" not in stderr and b"s3cret" not in (tmp_path / "s" / "ingest.sqlite3").read_bytes()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    process = ServerProcess(make_bundle(folder / "tiny").path, folder / "data")
    process.wait_ready()
    yield process
    assert process.end() == 0, process.log.read_text()


def test_crops_of_a_gallery_are_imported_and_removed_with_it(server: ServerProcess, tmp_path: Path) -> None:
    address = server.wait_ready()
    root = tmp_path / "s"
    call = ["ingest", "--from-gallery", "lobby", "--server", address, "--into", root, "--json", tmp_path / "f.json"]
    missing = resight_here(*call)
    assert missing.returncode == 1 and "lobby" in the_error(missing)
    seen = datetime(2026, 3, 1, 22, tzinfo=UTC)
    with Client(address) as client:
        client.create_collection("lobby", ttl=timedelta(days=3), keep_crops=True)
        for number in range(6):
            entry = NewEntry(
                jpeg(number // 2, number),
                f"e{number}",
                camera_id=f"cam{number % 2}",
                track_id=f"t{number // 4}",
                capture_time=seen + timedelta(seconds=number),
            )
            client.enrol("lobby", entry)
        client.confirm("lobby", "e0", "e1")
        client.reject("lobby", "e0", "e2")
        done = resight_here(*call, "--montage", tmp_path / "t.jpg")
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "f.json").read_text())["gallery"]["added"] == 6 and (tmp_path / "t.jpg").is_file()
        store = open_store(root)["train"]
        row = {path.removeprefix("gallery/lobby/").removesuffix("_00.jpg"): row for row, path in enumerate(store.paths)}
        assert sorted(row) == [f"e{number}" for number in range(6)]
        assert store.read(row["e4"]) == jpeg(2, 4) and store.times_s[row["e5"]] == seen.timestamp() + 5
        tracks = [int(store.tracks[row[f"e{number}"]]) for number in range(6)]
        assert tracks[0] == tracks[2] and tracks[1] == tracks[3] and len(set(tracks)) == 4
        assert {pair.same for pair in read_links(root)} == {True, False}
        client.delete_entry("lobby", "e1")
        assert resight_here(*call).returncode == 0
        assert sorted(path[14:16] for path in open_store(root)["train"].paths) == ["e0", "e2", "e3", "e4", "e5"]
        assert [pair.same for pair in read_links(root)] == [False]
        client.delete_collection("lobby", force=True)
    gone = resight_here(*call)
    assert gone.returncode == 1 and "removed 5 crops of lobby" in gone.stderr
    assert open_store(root) == {} and not list(root.rglob("*.jpg"))
