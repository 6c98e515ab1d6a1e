"""The gallery commands against a real server."""

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import typer
from serving import ServerProcess, jpeg, make_bundle
from typer.testing import CliRunner, Result

from resight.cli.gallery import gallery
from resight.cli.search import search, verify
from resight.errors import CollectionNotEmptyError, EntryNotFoundError, InputError, UnavailableError

app = typer.Typer()
app.command()(search)
app.command()(verify)
app.add_typer(gallery, name="gallery")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("cli")
    process = ServerProcess(make_bundle(folder / "bundle").path, folder / "data")
    yield process.wait_ready()
    assert process.end() == 0


@pytest.fixture
def run(server, monkeypatch):
    monkeypatch.setenv("RESIGHT_SERVER", server)
    monkeypatch.setenv("COLUMNS", "160")

    def invoke(*arguments: str, fails: bool = False) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        if not fails:
            assert result.exit_code == 0, (result.output, result.exception)
        return result

    return invoke


@pytest.fixture
def crops(tmp_path: Path) -> Path:
    folder = tmp_path / "crops"
    folder.mkdir()
    for person in range(4):
        for shot in range(2):
            (folder / f"p{person}-{shot}.jpg").write_bytes(jpeg(person, shot))
    return folder


def test_create_enrol_search_and_drop(run, crops, tmp_path):
    assert "created lobby" in run("gallery", "create", "lobby", "--ttl", "30d", "--keep-crops").output
    assert "enrolled 8 of 8" in run("gallery", "enrol", "lobby", crops, "--camera", "door").output
    run("gallery", "enrol", "lobby", crops / "p1-0.jpg", "--camera", "hall", "--subject", "anna", "--replace")
    answer = tmp_path / "answer.json"
    shown = run("search", crops / "p1-1.jpg", "--collection", "lobby", "--top-k", "2", "--json", answer).output
    assert "p1-1.jpg" in shown and "p1-0.jpg" in shown and "anna" in shown
    hits = json.loads(answer.read_text())["hits"]
    assert [hit["entry"]["entry_id"] for hit in hits] == ["p1-1.jpg", "p1-0.jpg"]
    run("search", crops / "p1-1.jpg", "--collection", "lobby", "--exclude-camera", "door", "--json", answer)
    assert [hit["entry"]["camera_id"] for hit in json.loads(answer.read_text())["hits"]] == ["hall"]
    assert "30 days" in run("gallery", "list").output
    assert "anna" in run("gallery", "get", "lobby", "p1-0.jpg").output
    listed = tmp_path / "entries.json"
    run("gallery", "entries", "lobby", "--camera", "door", "--limit", "3", "--json", listed)
    assert [entry["entry_id"] for entry in json.loads(listed.read_text())] == ["p0-0.jpg", "p0-1.jpg", "p1-1.jpg"]
    assert "would delete 7" in run("gallery", "delete", "lobby", "--camera", "door", "--dry-run").output
    assert "deleted 1" in run("gallery", "delete", "lobby", "--subject", "anna").output
    assert "deleted 2" in run("gallery", "delete", "lobby", "p0-0.jpg", "p0-1.jpg").output
    assert isinstance(run("gallery", "drop", "lobby", fails=True).exception, CollectionNotEmptyError)
    assert "dropped lobby" in run("gallery", "drop", "lobby", "--force").output


def test_a_bad_crop_is_reported_and_the_others_are_enrolled(run, crops):
    (crops / "text.jpg").write_text("not a picture")
    run("gallery", "create", "hall", "--keep-forever")
    result = run("gallery", "enrol", "hall", crops, fails=True)
    assert result.exit_code == 1
    assert "enrolled 8 of 9" in result.output and "text.jpg" in result.output and "cannot be decoded" in result.output
    run("gallery", "drop", "hall", "--force")


def test_failures_are_errors_of_resight(run, tmp_path):
    run("gallery", "create", "yard", "--keep-forever")
    for arguments, kind in (
        (("gallery", "create", "other"), InputError),
        (("gallery", "create", "other", "--ttl", "soon"), InputError),
        (("gallery", "get", "yard", "nobody"), EntryNotFoundError),
        (("gallery", "delete", "yard"), InputError),
        (("gallery", "delete", "yard", "a", "--camera", "b"), InputError),
        (("gallery", "enrol", "yard", tmp_path), InputError),
        (("search", tmp_path / "missing.jpg", "--collection", "yard"), InputError),
        (("gallery", "list", "--server", "127.0.0.1:1"), UnavailableError),
    ):
        result = run(*arguments, fails=True)
        assert result.exit_code == 1 and type(result.exception) is kind, (arguments, result.exception)
    run("gallery", "drop", "yard")


def test_every_command_shows_an_example(run):
    import_module("resight.cli.main")  # where every file of commands adds its own
    commands = [
        ("search",),
        ("verify",),
        *(("gallery", c.name or c.callback.__name__) for c in gallery.registered_commands),
    ]
    assert len(commands) == 17
    for command in commands:
        assert "Example:" in run(*command, "--help").output


def test_changing_erasing_and_counting(run, crops):
    run("gallery", "create", "changed", "--ttl", "1h")
    run("gallery", "enrol", "changed", crops, "--subject", "anna")
    assert (
        "changed p0-0.jpg" in run("gallery", "update", "changed", "p0-0.jpg", "--subject", "bo", "--ttl", "2d").output
    )
    run("gallery", "update", "changed", "--ttl", "3d", "--max-entries", "8", "--keep-crops")
    assert type(run("gallery", "enrol", "changed", crops, fails=True).exception) is SystemExit  # all there, and full
    for bad in (("changed", "e", "--max-entries", "3"), ("changed", "--subject", "x"), ("changed",)):
        assert isinstance(run("gallery", "update", *bad, fails=True).exception, InputError)
    assert "live_entries" in run("gallery", "stats", "changed").output
    assert "erased 7 entries" in run("gallery", "erase", "anna", "--reason", "asked").output
    assert "1" in run("gallery", "stats", "changed").output
    run("gallery", "drop", "changed", "--force")


def test_searching_a_track_by_person_and_comparing(run, crops, tmp_path):
    run("gallery", "create", "tracks", "--ttl", "1h")
    for person in range(4):
        files = sorted(crops.glob(f"p{person}-*"))
        run("gallery", "enrol", "tracks", *files, "--subject", f"p{person}")
    out = tmp_path / "found.json"
    arguments = ("--collection", "tracks", "--group-by", "subject", "--rerank", "--json", out)
    run("search", crops / "p1-0.jpg", "--shots", crops / "p1-1.jpg", *arguments)
    found = json.loads(out.read_text())
    assert found["hits"][0]["entry"]["subject_id"] == "p1" and len(found["hits"]) == 4
    assert found["shots_used"] == 2
    output = run("verify", crops / "p1-0.jpg", crops / "p1-1.jpg", "--collection", "tracks").output
    assert output.startswith("similarity 0.9")
