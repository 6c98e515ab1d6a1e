"""Atomic writes, also under kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from resight.files import replace_folder, temporary_folder, write_atomic

WRITER = """
import sys
from pathlib import Path
from resight.files import replace_folder, temporary_folder, write_atomic
folder, file = Path(sys.argv[1]), Path(sys.argv[2])
round = 0
while True:
    round += 1
    with temporary_folder(folder) as temp:
        for name in ("a", "b", "c"):
            (temp / name).write_text(str(round) * 1000)
        replace_folder(temp, folder)
    write_atomic(file, (str(round) * 1000).encode())
    print(round, flush=True)
"""


def test_a_file_is_replaced_and_readable_by_others(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode == plain.stat().st_mode
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["figures.json", "plain"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "inside").write_text("kept")
    with pytest.raises(OSError):
        write_atomic(taken, b"a file cannot replace a folder")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]
    assert (taken / "inside").read_text() == "kept"


def test_a_folder_is_replaced(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "bundle"
    for text in ("old", "new"):
        with temporary_folder(final) as temp:
            (temp / "sub").mkdir()
            (temp / "sub" / "file").write_text(text)
            replace_folder(temp, final)
    assert (final / "sub" / "file").read_text() == "new"
    assert [entry.name for entry in final.parent.iterdir()] == ["bundle"]


def test_a_block_that_raises_leaves_the_old_folder(tmp_path: Path) -> None:
    final = tmp_path / "bundle"
    final.mkdir()
    (final / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), temporary_folder(final) as temp:
        (temp / "file").write_text("half")
        raise KeyboardInterrupt
    assert (final / "file").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]


def test_a_failed_rename_restores_the_old_folder(tmp_path: Path) -> None:
    final, missing = tmp_path / "bundle", tmp_path / "missing"
    final.mkdir()
    (final / "file").write_text("old")
    with pytest.raises(OSError):
        replace_folder(missing, final)
    assert (final / "file").read_text() == "old"


def test_killed_writers_leave_complete_files_and_folders(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    for round_ in range(6):
        command = [sys.executable, "-c", WRITER, str(folder), str(file)]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        writer.stdout.readline()  # one complete round is acknowledged
        time.sleep(0.003 * round_)
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
        whole = folder if folder.exists() else tmp_path / ".folder.old"  # killed between the two renames
        contents = {path.read_text() for path in (whole / "a", whole / "b", whole / "c")}
        assert len(contents) == 1
        for text in (contents.pop(), file.read_text()):
            assert text and text == text[: len(text) // 1000] * 1000
