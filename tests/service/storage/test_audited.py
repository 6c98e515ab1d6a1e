"""Every call that changes entries, spaces or models writes an audit row; failed calls write none."""

from datetime import timedelta

import pytest
from serving import ServerProcess, jpeg, make_bundle

from resight.client import Client, NewEntry
from resight.errors import ReIDError


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audited")
    for seed, name in enumerate(("a", "b")):
        make_bundle(folder / "models" / name, seed=seed)
    process = ServerProcess(folder / "models" / "a", folder / "data", "--models", str(folder / "models"))
    try:
        with Client(process.wait_ready()) as made:
            yield made
    finally:
        assert process.end() == 0, process.log.read_text()


def rows(client: Client) -> list[tuple[str, str, int, str]]:
    """Method, collection, count and reason, the oldest first."""
    found = sorted(client.audit_events(), key=lambda row: row.time)
    assert {row.principal for row in found} <= {"anonymous"}
    return [(row.method, row.collection, row.affected, row.reason) for row in found]


def test_each_call_on_entries_writes_one_row_with_their_number(client):
    client.create_collection("hall", ttl=timedelta(days=1), max_entries=5)
    before = len(rows(client))
    client.enrol("hall", NewEntry(jpeg(0), "e0"))
    outcomes = client.enrol_batch("hall", [NewEntry(jpeg(n), f"e{n}") for n in range(4)])  # the first exists already
    assert sum(isinstance(one, ReIDError) for one in outcomes) == 1
    client.update_entry("hall", "e1", subject_id="anna")
    for refused in (
        lambda: client.enrol("nowhere", NewEntry(jpeg(0))),
        lambda: client.update_entry("hall", "nobody", subject_id="anna"),
    ):
        with pytest.raises(ReIDError):
            refused()
    assert rows(client)[before:] == [
        ("GalleryService.EnrollEntry", "hall", 1, ""),
        ("GalleryService.BatchEnrollEntries", "hall", 3, ""),
        ("GalleryService.UpdateEntry", "hall", 1, ""),
    ]
    with pytest.raises(ReIDError):
        client.enrol("hall", NewEntry(jpeg(0), "e0"))
    assert rows(client)[before + 3 :] == [("GalleryService.EnrollEntry", "hall", 0, "")]  # nothing was enrolled


def test_calls_on_models_and_spaces_write_rows(client):
    client.create_collection("lobby", unlimited_retention=True, keep_crops=True)
    client.enrol_batch("lobby", [NewEntry(jpeg(n)) for n in range(3)])
    before, old = len(rows(client)), client.collection("lobby").space_id
    client.wait(client.load_model("b"))
    client.wait(client.migrate("lobby", "b"))
    client.start_shadow("lobby", "b")
    shadow = client.start_shadow("lobby", "b", sample=0.5)  # continues the running one: no row
    client.stop_shadow("lobby")
    client.activate_space("lobby", shadow.space_id)
    client.activate_model("b")
    client.activate_model("a")
    client.activate_space("lobby", old)
    for refused in (
        lambda: client.activate_space("lobby", "ff" * 16),
        lambda: client.activate_model("c"),
        lambda: client.unload_model("a"),
        lambda: client.migrate("lobby", "a"),
        lambda: client.start_shadow("lobby", "b"),
        lambda: client.load_model("c"),
    ):
        with pytest.raises(ReIDError):
            refused()
    client.unload_model("b")
    assert rows(client)[before:] == [
        ("ModelService.LoadModel", "", 0, "model b"),
        ("ModelService.MigrateCollection", "lobby", 3, "model b"),
        ("ModelService.StartShadow", "lobby", 0, "model b"),
        ("ModelService.StopShadow", "lobby", 0, "model b"),
        ("ModelService.ActivateSpace", "lobby", 3, f"space {shadow.space_id}"),
        ("ModelService.ActivateModel", "", 0, "model b"),
        ("ModelService.ActivateModel", "", 0, "model a"),
        ("ModelService.ActivateSpace", "lobby", 3, f"space {old}"),
        ("ModelService.UnloadModel", "", 0, "model b"),
    ]
