import asyncio

import pytest
from stores import count_entries, create_collection, enrolment, open_gallery
from typer.testing import CliRunner

from resight.cli.main import app
from resight.errors import InputError, StartupError, StoreError
from resight.service.storage import writes
from resight.service.storage.data_folder import DataFolder


def run(*arguments: str) -> str:
    found = CliRunner().invoke(app, ["snapshot", *arguments], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


@pytest.fixture
def data(tmp_path):
    async def fill(count: int) -> None:
        lobby = await create_collection(store)
        for number in range(count):
            await store.write(writes.enrol, lobby, enrolment(number))

    folder = tmp_path / "gallery"
    folder.mkdir()
    (folder / "tenants" / "acme").mkdir(parents=True)
    for place, count in ((folder, 3), (folder / "tenants" / "acme", 5)):
        with open_gallery(place) as store:
            asyncio.run(fill(count))
    return folder


def count(place) -> int:
    with open_gallery(place) as store:
        return asyncio.run(count_entries(store))


def test_a_snapshot_is_created_listed_verified_and_restored(data):
    assert "monday" in run("create", "monday", "--data", str(data)) and "3 entries" in run("list", "--data", str(data))
    acme = ("--data", str(data), "--tenant", "acme")
    assert "5 entries" in run("create", *acme)
    assert len(run("list", *acme).splitlines()) == 1 and len(run("list", "--data", str(data)).splitlines()) == 1
    with open_gallery(data) as store:
        asyncio.run(store.erase(writes.delete_collection, "lobby", force=True))
    assert "sha256" in run("verify", "monday", "--data", str(data))
    assert "0 entries of erased subjects" in run("restore", "monday", "--data", str(data))
    assert (count(data), count(data / "tenants" / "acme")) == (3, 5)


def test_a_running_server_keeps_its_gallery(data):
    run("create", "monday", "--data", str(data))
    with DataFolder(data):
        for command in ("create", "restore"):
            with pytest.raises(StartupError, match="held by process"):
                run(command, "monday", "--data", str(data))
        assert "monday" in run("verify", "monday", "--data", str(data))


def test_missing_folders_and_snapshots_are_named(data, tmp_path):
    with pytest.raises(InputError, match="no gallery in"):
        run("list", "--data", str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="tenant's name"):
        run("list", "--data", str(data), "--tenant", "../x")
    with pytest.raises(StoreError, match="no snapshot friday"):
        run("restore", "friday", "--data", str(data))
    assert not (tmp_path / "nowhere").exists()
