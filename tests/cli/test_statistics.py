"""`resight models shadow` and `resight gallery statistics` against a real server."""

import json
import time

import pytest
from serving import ServerProcess, jpeg, make_bundle
from typer.testing import CliRunner, Result

from resight.cli.main import app
from resight.client import Client, NewEntry
from resight.errors import InputError, SpaceMismatchError


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    for seed, name in enumerate(("a", "b")):
        make_bundle(folder / "models" / name, seed=seed)
    process = ServerProcess(folder / "models" / "a", folder / "data", "--models", str(folder / "models"))
    found = process.wait_ready()
    with Client(found) as client:
        client.wait(client.load_model("b"))
        client.create_collection("lobby", unlimited_retention=True, keep_crops=True)
        client.enrol_batch("lobby", [NewEntry(jpeg(n), f"e{n}") for n in range(4)])
    yield found
    assert process.end() == 0


@pytest.fixture
def run(address, monkeypatch):
    monkeypatch.setenv("RESIGHT_SERVER", address)
    monkeypatch.setenv("COLUMNS", "160")

    def invoke(*words: object) -> Result:
        result = CliRunner().invoke(app, [str(word) for word in words])
        if result.exception is not None:
            raise result.exception
        return result

    return invoke


def test_a_shadow_is_started_shown_and_stopped(run, address, tmp_path):
    with pytest.raises(SpaceMismatchError, match="migrate it"):
        run("models", "shadow", "lobby", "b")
    run("models", "migrate", "lobby", "--to", "b")
    begun = run("models", "shadow", "lobby", "b", "--sample", "1", "--for", "1h", "--max-searches", "9").output
    assert "b compared with a, running, 0 of 0 sampled" in begun and "infer_p50_ms" not in begun
    with Client(address) as client:
        for n in range(2):
            client.search("lobby", jpeg(n))
        for _ in range(1000):
            if client.get_shadow("lobby").figures.answered == 2:
                break
            time.sleep(0.01)
    shown = run("models", "shadow", "lobby", "--json", tmp_path / "shadow.json").output
    result = json.loads((tmp_path / "shadow.json").read_text())
    assert (result["state"], result["max_searches"], result["figures"]["answered"]) == ("running", 9, 2)
    assert "2 of 2 sampled" in shown and "infer_p50_ms" in shown and result["figures"]["top1_agreement"] == 1.0
    assert "stopped" in run("models", "shadow", "lobby", "--stop").output


def test_statistics_and_their_deprecated_name_figures(run, address, tmp_path):
    with Client(address) as client:
        before = sum(one.searches for one in client.search_statistics("lobby"))
        client.search("lobby", jpeg(3))
    shown = run("gallery", "statistics", "lobby", "--last", "1h", "--json", tmp_path / "statistics.json").output
    (result,) = json.loads((tmp_path / "statistics.json").read_text())
    assert result["searches"] == before + 1 and result["active"] and "tiny-0" in shown and "mean_cosine" in shown
    assert shown in run("gallery", "figures", "lobby", "--last", "1h").output
    assert "eprecated" in run("gallery", "figures", "--help").output
    run("gallery", "statistics", "lobby", "--space", "ff" * 16)
    with pytest.raises(InputError, match="such as 30d"):
        run("gallery", "statistics", "lobby", "--last", "soon")
