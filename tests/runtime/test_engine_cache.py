import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from resight.errors import StartupError
from resight.runtime.engine import SECRET_FILE, EngineCache, default_folder

KEY = b"gpu and graph"


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "cache" / "engines")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_stored_files_are_loaded_and_private(cache):
    assert cache.load("a.plan", KEY) is None
    cache.store("a.plan", KEY, b"engine")
    assert EngineCache(cache.folder).load("a.plan", KEY) == b"engine"
    assert mode(cache.folder) == 0o700
    with cache.lock():
        assert {mode(path) for path in cache.folder.iterdir()} == {0o600}
    assert {path.name for path in cache.folder.iterdir()} == {"a.plan", "lock", "secret"}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def of_another_key(cache, path):
    assert cache.load("a.plan", b"another GPU") is None
    cache.store("a.plan", b"another GPU", b"engine")


def of_another_name(cache, path):
    cache.store("b.plan", KEY, b"engine")
    (cache.folder / "b.plan").rename(path)


def of_another_machine(cache, path):
    other = EngineCache(cache.folder.parent / "other")
    other.store("a.plan", KEY, b"engine")
    path.write_bytes((other.folder / "a.plan").read_bytes())


def a_link(cache, path):
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


HARMS = {
    "first byte": lambda cache, path: flip(path, 0),
    "seal": lambda cache, path: flip(path, 20),
    "last byte": lambda cache, path: flip(path, -1),
    "cut short": lambda cache, path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda cache, path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda cache, path: path.write_bytes(b""),
    "bare engine": lambda cache, path: path.write_bytes(b"engine"),
    "open to others": lambda cache, path: path.chmod(0o644),
    "another key": of_another_key,
    "another name": of_another_name,
    "another machine": of_another_machine,
    "link": a_link,
    "dangling link": lambda cache, path: (path.unlink(), path.symlink_to("nowhere")),
    "folder": lambda cache, path: (path.unlink(), path.mkdir()),
    "pipe": lambda cache, path: (path.unlink(), os.mkfifo(path, 0o600)),
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS)
def test_files_with_a_wrong_seal_are_not_loaded_and_logged(cache, harm, caplog):
    cache.store("a.plan", KEY, b"engine")
    harm(cache, cache.folder / "a.plan")
    caplog.clear()
    assert cache.load("a.plan", KEY) is None
    assert "rebuilt" in caplog.text


def test_a_folder_open_to_others_is_rejected(tmp_path):
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(StartupError, match=r"mode 0700.*found drwxr-xr-x.*executable"):
        EngineCache(tmp_path / "open")


def test_a_linked_folder_is_rejected(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(StartupError, match="mode 0700"):
        EngineCache(tmp_path / "link")


def test_a_folder_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="--engine-cache"):
        EngineCache(tmp_path / "file" / "engines")


@pytest.mark.parametrize("harm", ["short", "open", "link"])
def test_a_foreign_secret_is_rejected(cache, harm):
    path = cache.folder / SECRET_FILE
    if harm == "short":
        path.write_bytes(b"x")
    elif harm == "open":
        path.chmod(0o640)
    else:
        path.rename(cache.folder.parent / "moved")
        path.symlink_to(cache.folder.parent / "moved")
    with pytest.raises(StartupError, match=r"secret.*remove the folder"):
        EngineCache(cache.folder)


def test_two_processes_do_not_build_at_once(cache):
    code = (
        "import sys, time; from pathlib import Path; from resight.runtime.engine import EngineCache\n"
        "with EngineCache(Path(sys.argv[1])).lock():\n"
        "    print('held', flush=True); sys.stdin.readline(); (Path(sys.argv[1]) / 'built').write_text('')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, cache.folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        other.stdin.write("\n")
        other.stdin.flush()
        with cache.lock():  # waits for the other process
            assert (cache.folder / "built").exists()
        assert other.wait(30) == 0


def test_an_unchanged_sealed_folder_is_kept(cache, caplog):
    with cache.sealed_folder("lib", KEY) as folder:
        (folder / "one.engine").write_bytes(b"1")
    with cache.sealed_folder("lib", KEY) as folder:
        assert [path.name for path in folder.iterdir()] == ["one.engine"]
        assert mode(folder / "one.engine") == 0o600
        (folder / "two.engine").write_bytes(b"2")
    with cache.sealed_folder("lib", KEY) as folder:
        assert len(list(folder.iterdir())) == 2
    assert "emptied" not in caplog.text


FOLDER_HARMS = {
    "added": lambda folder: (folder / "planted.engine").write_bytes(b"x"),
    "altered": lambda folder: (folder / "one.engine").write_bytes(b"x"),
    "linked": lambda folder: (folder / "l").symlink_to("one.engine"),
    "nested": lambda folder: (folder / "sub").mkdir(),
    "unsealed": lambda folder: folder.with_name("lib.seal").unlink(),
    "moved": lambda folder: (folder.rename(folder.with_name("away")), folder.symlink_to("away")),
}


@pytest.mark.parametrize("harm", FOLDER_HARMS.values(), ids=FOLDER_HARMS)
def test_a_changed_sealed_folder_is_emptied(cache, harm):
    with cache.sealed_folder("lib", KEY) as folder:
        (folder / "one.engine").write_bytes(b"1")
        (folder / "one.engine").chmod(0o600)
    harm(folder)
    with cache.sealed_folder("lib", KEY) as folder:
        assert list(folder.iterdir()) == [] and not folder.is_symlink()


def test_a_folder_is_not_sealed_after_an_error(cache):
    with pytest.raises(RuntimeError), cache.sealed_folder("lib", KEY) as folder:
        (folder / "half.engine").write_bytes(b"1")
        raise RuntimeError
    with cache.sealed_folder("lib", KEY) as folder:
        assert list(folder.iterdir()) == []


def test_the_default_folder_follows_xdg(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_folder() == Path("/somewhere/resight/engines")
    monkeypatch.setenv("XDG_CACHE_HOME", "not-absolute")
    monkeypatch.setenv("HOME", "/home/me")
    assert default_folder() == Path("/home/me/.cache/resight/engines")
