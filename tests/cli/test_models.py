"""The model commands against a real server."""

import json
import subprocess
import sys

import pytest
from serving import ServerProcess, jpeg, make_bundle

from resight.client import Client, NewEntry


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("lobby-1", "lobby-2")):
        make_bundle(folder / "models" / name, seed=seed)
    make_bundle(folder / "models" / "bad", seed=2, probes_of=7)
    process = ServerProcess(folder / "models" / "lobby-1", folder / "data", "--models", str(folder / "models"))
    process.wait_ready()
    yield process
    assert process.end() == 0


def models(server: ServerProcess, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "resight", "models", *words, "--server", server.wait_ready()]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_site_moves_to_a_new_model_from_the_command_line(server, tmp_path):
    with Client(server.wait_ready()) as client:
        client.create_collection("lobby", unlimited_retention=True, keep_crops=True)
        client.enrol_batch("lobby", [NewEntry(jpeg(n), f"e{n}") for n in range(20)])
        old = client.collection("lobby").space_id
        assert "loaded lobby-2" in models(server, "load", "lobby-2").stdout
        moved = models(server, "migrate", "lobby", "--to", "lobby-2", "--auto-activate")
        assert moved.returncode == 0, moved.stderr
        assert "20 of 20 entries" in moved.stdout and "activated true" in moved.stdout
        assert "lobby-2 is active" in models(server, "activate", "lobby-2", "--expected", "lobby-1").stdout
        assert client.search("lobby", jpeg(3), top_k=1).hits[0].entry.entry_id == "e3"
        back = models(server, "activate-space", "lobby", old)
        assert back.returncode == 0 and old in back.stdout
        assert client.collection("lobby").space_id == old
    assert models(server, "list", "--json", str(tmp_path / "models.json")).returncode == 0
    listed = json.loads((tmp_path / "models.json").read_text())
    assert [(one["model_id"], one["state"]) for one in listed] == [
        ("bad", "available"), ("lobby-1", "ready"), ("lobby-2", "ready"),
    ]  # fmt: skip
    assert "unloaded lobby-1" in models(server, "unload", "lobby-1").stdout


def test_failures_end_in_one_sentence(server):
    for words, message in (
        (("load", "bad"), "other features"),
        (("load", "nothing"), "no model"),
        (("unload", "nothing"), "not loaded"),
        (("migrate", "nothing", "--to", "lobby-2"), ""),
    ):
        ended = models(server, *words)
        assert ended.returncode == 1 and "error:" in ended.stderr and message in ended.stderr, words
