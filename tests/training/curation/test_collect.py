"""Collecting the crops of a run: balance, complete tracks, replay, held-out crops, refusals and interruption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from drawn_nights import NIGHT_S, add_night, end_of
from tiny import environment, resight_here, the_error

from resight.errors import SiteError
from resight.training.curation.collect import RECORD_FILE, CollectResult, CollectSettings, collect
from resight.training.judging.candidate import open_evaluation_crops
from resight.training.store import copying as copying_module
from resight.training.store.copying import open_all_splits
from resight.training.store.crops import CropStore, open_store
from resight.training.store.growing import GrowingStore
from resight.training.store.links import read_links, write_links

pytestmark = pytest.mark.long

TRACKS = {"door": 7, "hall": 6, "yard": 20}  # the yard is busy: more than twice the median, which is 7
NIGHT = 33 * 4  # crops
SETTINGS = CollectSettings(since_s=end_of(1), min_crops=100, retention_days=30)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three nights. Read only: tests that change it copy it."""
    root = tmp_path_factory.mktemp("nights") / "crops"
    for night in range(3):
        add_night(root, night, TRACKS)
    return root


@pytest.fixture
def state(drawn: Path, tmp_path: Path) -> Path:
    shutil.copytree(drawn, tmp_path / "crops")
    return tmp_path


def run(
    source: Path, into: Path, settings: CollectSettings = SETTINGS, *, reference: Path | None = None
) -> CollectResult:
    return collect(source, into, settings, reference=reference, now_s=end_of(2))


def tracks(store: CropStore) -> set[int]:
    return set(store.tracks.tolist())


def test_new_crops_are_balanced_and_older_ones_replayed(drawn: Path, tmp_path: Path) -> None:
    found = run(drawn, tmp_path / "site")
    site = open_store(tmp_path / "site")
    whole = open_all_splits(tmp_path / "site")
    assert found.outcome == "ready" and found.reasons == () and found.until_s < end_of(2)
    assert set(site) == {"train", "gallery"}
    new = whole.times_s > SETTINGS.since_s
    yard = whole.cameras == whole.camera_names.index("yard")
    assert (new & yard).sum() == 2 * 7 * 4 and (new & ~yard).sum() == (7 + 6) * 4
    assert (~new).sum() / len(whole) == pytest.approx(0.3, abs=0.02)
    assert (site["gallery"].times_s > SETTINGS.since_s).all()
    assert found.crops["new"] == NIGHT and found.crops["passed_over"] == 6 * 4
    assert found.crops["train"] == len(site["train"]) and found.crops["held_out"] == len(site["gallery"])
    assert found.crops["replayed"] == (~new).sum()
    for name, counts in found.cameras.items():
        own = {split: int((part.cameras == part.camera_names.index(name)).sum()) for split, part in site.items()}
        assert (counts["train"], counts["held_out"]) == (own["train"], own["gallery"])
        offered = new & (whole.cameras == whole.camera_names.index(name))
        assert counts["held_out"] / offered.sum() == pytest.approx(0.2, abs=0.15)


def test_tracks_are_complete_and_files_and_rows_equal_the_source(drawn: Path, tmp_path: Path) -> None:
    run(drawn, tmp_path / "site")
    source, site = open_all_splits(drawn), open_store(tmp_path / "site")
    assert not tracks(site["train"]) & tracks(site["gallery"])
    number = {path: row for row, path in enumerate(source.paths)}
    for part in site.values():
        rows = [number[path] for path in part.paths]
        assert rows == sorted(rows)  # in the order of the source
        assert (
            part.tracks.tolist() == source.tracks[rows].tolist()
            and part.times_s.tolist() == source.times_s[rows].tolist()
        )
        assert [part.camera_names[c] for c in part.cameras] == [source.camera_names[c] for c in source.cameras[rows]]
        assert all((part.root / path).samefile(source.root / path) for path in part.paths)
        taken = tracks(part)
        assert set(part.tracks.tolist()) == taken
        assert len(part) == sum(int((source.tracks == one).sum()) for one in taken)


def test_overlapping_tracks_are_held_out_together(drawn: Path, tmp_path: Path) -> None:
    """Each track overlaps the previous one; with random selection two thirds would be held out alone."""
    from resight.training.store.track_pairs import draw_track_pairs

    run(drawn, tmp_path / "site", replace(SETTINGS, hold_out=0.3))
    back = open_store(tmp_path / "site")["gallery"]
    assert draw_track_pairs(back, seed=0).overlaps >= len(tracks(back)) / 2 - 1


def test_the_selection_is_reproducible_and_depends_on_the_seed(drawn: Path, tmp_path: Path) -> None:
    first = run(drawn, tmp_path / "a")
    again = run(drawn, tmp_path / "b")
    other = run(drawn, tmp_path / "c", replace(SETTINGS, seed=1))
    assert first == again and first.crops["train"] != 0 and other.outcome == "ready"
    stores = [open_store(tmp_path / name) for name in "abc"]
    assert stores[0]["train"].fingerprint == stores[1]["train"].fingerprint != stores[2]["train"].fingerprint
    assert stores[0]["gallery"].paths == stores[1]["gallery"].paths != stores[2]["gallery"].paths


def test_a_repeated_call_returns_the_first_result_although_the_source_has_grown(state: Path) -> None:
    first = run(state / "crops", state / "site")
    inode = (state / "site").stat().st_ino
    add_night(state / "crops", 3, TRACKS)
    assert run(state / "crops", state / "site") == first and (state / "site").stat().st_ino == inode
    with pytest.raises(SiteError, match=r"other settings \(seed 0, now 5\)"):
        run(state / "crops", state / "site", replace(SETTINGS, seed=5))
    (state / "site" / RECORD_FILE).unlink()
    with pytest.raises(SiteError, match="was not created by collect"):
        run(state / "crops", state / "site")


def test_too_few_new_crops_are_skipped_and_nothing_is_written(drawn: Path, tmp_path: Path) -> None:
    found = run(drawn, tmp_path / "site", replace(SETTINGS, min_crops=133))
    assert (
        found.outcome == "skipped" and "132 usable new crops" in found.reasons[0] and not (tmp_path / "site").exists()
    )
    none = run(drawn, tmp_path / "site", replace(SETTINGS, since_s=end_of(2)))
    assert none.outcome == "skipped" and none.until_s == end_of(2) and none.crops["new"] == 0
    empty = run(tmp_path / "nowhere", tmp_path / "site")
    assert empty.outcome == "skipped" and "no crops" in empty.reasons[0] and not list(tmp_path.iterdir())


def test_a_dead_camera_is_excluded_reported_and_replayed_from_earlier_nights(state: Path) -> None:
    add_night(state / "crops", 3, TRACKS, dead=("hall",))
    found = run(state / "crops", state / "site", replace(SETTINGS, since_s=end_of(2)))
    whole = open_all_splits(state / "site")
    hall = whole.cameras == whole.camera_names.index("hall")
    assert found.outcome == "ready" and "camera hall" in found.reasons[0] and found.crops["unsound"] == 6 * 4
    assert hall.any() and (whole.times_s[hall] < end_of(2)).all()


def test_a_bad_night_is_refused_and_does_not_affect_later_ones(state: Path) -> None:
    add_night(state / "crops", 3, TRACKS, one=True)
    poisoned = replace(SETTINGS, since_s=end_of(2))
    found = collect(state / "crops", state / "site", poisoned, reference=None, now_s=end_of(3))
    assert found.outcome == "refused" and any("repeat one of another track" in reason for reason in found.reasons)
    assert not (state / "site").exists()
    add_night(state / "crops", 4, TRACKS)
    for since in (end_of(2), end_of(3)):  # the bad night as a new one, and as an older one for replay
        into = state / f"site-{since}"
        found = collect(state / "crops", into, replace(SETTINGS, since_s=since), reference=None, now_s=end_of(4))
        assert found.outcome == "ready"
        times = open_all_splits(into).times_s
        assert not ((times > end_of(2)) & (times < end_of(3))).any()
        assert bool(found.reasons) == (since == end_of(2))


def test_expired_crops_and_crops_of_the_reference_are_not_collected(drawn: Path, tmp_path: Path) -> None:
    whole = open_all_splits(drawn)
    reserved = whole.subset(np.flatnonzero((whole.times_s > end_of(1)) & (whole.tracks % 5 == 0))[::2])  # half of each
    GrowingStore(tmp_path / "reference")
    from resight.training.store.crops import write_store

    write_store(tmp_path / "reference", replace(reserved, root=tmp_path / "reference"), ["train"] * len(reserved))
    found = run(drawn, tmp_path / "site", replace(SETTINGS, retention_days=1.0), reference=tmp_path / "reference")
    taken = open_all_splits(tmp_path / "site")
    assert found.crops["expired"] == 2 * NIGHT and (taken.times_s > end_of(2) - NIGHT_S).all()
    assert not tracks(reserved) & tracks(taken) and found.crops["in_reference"] == 4 * len(tracks(reserved))


def test_links_are_copied_and_their_tracks_are_in_one_split(state: Path) -> None:
    source = open_all_splits(state / "crops")
    new = np.flatnonzero(source.times_s > end_of(1))
    old = np.flatnonzero(source.times_s <= end_of(1))
    rng = np.random.default_rng(0)
    ends = rng.choice(new, (5, 2), replace=False)
    pairs = [(source.paths[a], source.paths[b], index % 2 == 0) for index, (a, b) in enumerate(ends)]
    pairs.append((source.paths[old[0]], source.paths[old[10]], True))
    write_links(state / "crops", [*pairs, (source.paths[0], "crops/gone.jpg", True)])
    found = run(state / "crops", state / "site", replace(SETTINGS, hold_out=0.4))
    assert {tuple(pair) for pair in read_links(state / "site")} == set(pairs) and found.crops["links"] == len(pairs)
    split_of = {path: split for split, part in open_store(state / "site").items() for path in part.paths}
    assert all(split_of[one] == split_of[other] for one, other, _ in pairs)
    held = [pair for pair in pairs if split_of[pair[0]] == "gallery"]
    judged = open_evaluation_crops(state / "site").linked
    assert judged is not None and all(split_of[path] == "gallery" for path in judged.store.paths)
    assert 0 < len(held) == len(judged.same) < len(pairs)


def test_max_crops_is_a_limit_shared_by_the_cameras(drawn: Path, tmp_path: Path) -> None:
    found = run(drawn, tmp_path / "site", replace(SETTINGS, max_crops=80))
    whole = open_all_splits(tmp_path / "site")
    assert 64 < len(whole) <= 80 and found.outcome == "ready"
    counts = np.bincount(whole.cameras)
    assert np.ptp(counts) <= 2 * 8  # a scene of two tracks, of tonight and of earlier


def test_crops_without_tracks_and_times_use_the_times_of_their_files(tmp_path: Path) -> None:
    from PIL import Image

    from resight.training.store.crops import UNKNOWN, write_store

    rng = np.random.default_rng(0)
    paths = []
    for number in range(120):
        path = tmp_path / "crops" / f"c{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = rng.integers(30, 226, (8, 4, 3), np.uint8)
        Image.fromarray(small).resize((32, 64), Image.Resampling.BICUBIC).save(path)
        os.utime(path, (end_of(number % 3), end_of(number % 3)))
        paths.append(path.relative_to(tmp_path).as_posix())
    unknown = np.full(120, UNKNOWN)
    write_store(
        tmp_path,
        CropStore(tmp_path, tuple(paths), np.arange(120) % 2, ("c0", "c1"), np.full(120, np.nan), unknown, unknown),
        ["train"] * 120,
    )
    settings = replace(SETTINGS, since_s=end_of(1) + 1, min_crops=10, retention_days=2.0, replay=0.0)
    found = run(tmp_path, tmp_path / "out", settings)
    assert found.outcome == "ready" and found.crops["new"] == 40 and found.crops["expired"] == 0
    assert run(tmp_path, tmp_path / "less", replace(settings, retention_days=1.5)).crops["expired"] == 40


def test_a_missing_crop_is_skipped(state: Path) -> None:
    gone = open_all_splits(state / "crops").paths[-1]
    (state / "crops" / gone).unlink()
    assert run(state / "crops", state / "site", replace(SETTINGS, max_crops=20_000)).outcome == "ready"
    assert gone not in open_all_splits(state / "site").paths


def test_crops_are_copied_if_the_disk_cannot_link(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def across(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(copying_module.os, "link", across)
    run(drawn, tmp_path / "site")
    part = open_store(tmp_path / "site")["train"]
    copied, original = part.root / part.paths[0], drawn / part.paths[0]
    assert not copied.samefile(original) and copied.read_bytes() == original.read_bytes()
    assert copied.stat().st_mtime == pytest.approx(original.stat().st_mtime, abs=1e-3)


@pytest.mark.slow
def test_a_killed_collect_leaves_nothing_half_and_the_next_one_is_whole(state: Path) -> None:
    whole = run(state / "crops", state / "whole")
    command = [
        sys.executable,
        "-m",
        "resight",
        "collect",
        "--from",
        state / "crops",
        "--into",
        state / "run" / "site",
    ]
    command += ["--since", str(SETTINGS.since_s), "--min-crops", "100", "--retention", "30", "--now", str(end_of(2))]
    killed = 0
    for delay in (0.0, 0.03, 0.1):  # after the first file exists
        child = subprocess.Popen(list(map(str, command)), env=environment(), stdout=subprocess.DEVNULL)
        while child.poll() is None and not list((state / "run").glob(".site.*/crops")):
            time.sleep(0.001)
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        if not (state / "run" / "site").exists():
            continue
        assert open_all_splits(state / "run" / "site").paths == open_all_splits(state / "whole").paths
    assert killed
    done = resight_here(*command[3:], "--json", state / "f.json")
    report = json.loads((state / "f.json").read_text())
    assert done.returncode == 0 and report["outcome"] == "ready" and report["cameras"] == whole.cameras
    assert [path.name for path in (state / "run").iterdir()] == ["site"]
    assert open_all_splits(state / "run" / "site").fingerprint == open_all_splits(state / "whole").fingerprint


def test_the_command_reports_skips_purges_and_freezes(state: Path) -> None:
    common = [
        "collect",
        "--from",
        state / "crops",
        "--into",
        state / "site",
        "--now",
        end_of(2),
        "--json",
        state / "f.json",
    ]
    few = resight_here(*common, "--since", end_of(1))
    report = json.loads((state / "f.json").read_text())
    assert (few.returncode, report["outcome"], report["purged"]) == (0, "skipped", 0)
    assert "132 usable new crops: expected at least 500" in report["reasons"][0]
    done = resight_here(*common, "--since", end_of(1), "--min-crops", 100, "--retention", 1.9, "--purge")
    report = json.loads((state / "f.json").read_text())
    assert (done.returncode, report["outcome"], report["purged"]) == (0, "ready", NIGHT)
    assert "yard" in done.stdout and "ready: " in done.stdout and len(open_all_splits(state / "crops")) == 2 * NIGHT
    assert not (state / "crops" / "crops" / "door" / "0").exists()
    frozen = resight_here(
        "collect", "--freeze", state / "site", "--reference", state / "reference", "--json", state / "f.json"
    )
    report = json.loads((state / "f.json").read_text())
    assert (frozen.returncode, report["outcome"]) == (0, "frozen")
    assert set(open_all_splits(state / "reference").paths) == set(open_store(state / "site")["gallery"].paths)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--from", "x"], "expected --from STORE and --into SITE"),
        (["--from", "x", "--into", "y", "--purge"], "--purge needs --retention"),
        (["--freeze", "x"], "needs --reference"),
        (["--freeze", "x", "--reference", "y", "--from", "z"], "neither --from nor --into"),
    ],
)
def test_incompatible_options_are_refused(arguments: list[str], words: str) -> None:
    assert words in the_error(resight_here("collect", *arguments))
