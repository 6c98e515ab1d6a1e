"""The command line: processes, exit codes, JSON files, and errors of one sentence."""

from __future__ import annotations

import fcntl
import json
import shutil
import socket
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import draw_site, resight, resight_here, the_error

from resight.encoder.checkpoint import INDEX_FILE, MODEL_FILE, load_checkpoint
from resight.training.store.datasets import Site

pytestmark = pytest.mark.long

COMMANDS = ["demo", "ingest", "collect", "adapt", "evaluate", "judge", "export", "serve", "search", "verify", "doctor"]
GROUPS = {
    "gallery": [
        *["create", "list", "enrol", "get", "entries", "delete", "update", "erase", "stats", "drop"],
        *["confirm", "reject", "feedback", "statistics", "figures"],
    ],
    "snapshot": ["create", "list", "verify", "restore"],
    "models": ["list", "load", "activate", "unload", "migrate", "activate-space", "adapt", "shadow"],
    "token": ["create", "list", "revoke"],
    "bundle": ["verify", "show", "diff", "keygen", "sign"],
    "cycle": ["init", "once", "run", "status", "history", "rollback", "demo"],
}


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    grouped = [f"{group} {name}" for group, names in GROUPS.items() for name in names]
    names = [*COMMANDS, *grouped, *GROUPS, "builtin-weights", ""]
    found = {name: resight_here(*name.split(), "--help") for name in names}
    assert all(done.returncode == 0 for done in found.values())
    return {name: done.stdout for name, done in found.items()}


def test_every_command_explains_itself_with_an_example(helps: dict[str, str]) -> None:
    for name, text in helps.items():
        if name and name not in GROUPS:
            assert "Example: " in text and f"resight {name}" in text, name


def test_the_lists_of_commands_are_complete(helps: dict[str, str]) -> None:
    for group, names in (("", [*COMMANDS, *GROUPS]), *GROUPS.items()):
        rows = helps[group].partition("Commands")[2].splitlines()
        assert [row.split()[1] for row in rows if row.startswith("│ ") and row[2] != " "] == names


def test_the_script_is_main() -> None:
    (script,) = entry_points(group="console_scripts", name="resight")
    assert script.value == "resight.cli:main"


@pytest.fixture(scope="module")
def made(tiny_site: Site, tiny_init: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the results of adapt, evaluate, export and evaluate."""
    folder = tmp_path_factory.mktemp("cli")
    model, bundle, figures = folder / "model", folder / "model.bundle", folder / "made" / "for it"
    for name, command in {
        "adapt": [
            *["adapt", "--site", tiny_site.root, "--init", tiny_init, "--recipe", "purify", "--out", model],
            *["--epochs", 1, "--iters", 2, "--seed", 4, "--device", "cpu"],
        ],
        "evaluate": ["evaluate", "--model", model, "--site", tiny_site.root, "--plot", figures / "plot.png"],
        "export": ["export", model, "--out", bundle],
        "evaluate-bundle": ["evaluate", "--model", bundle, "--site", tiny_site.root],
        "evaluate-extras": ["evaluate", "--model", bundle, "--site", tiny_site.root, "--flip", "--rerank"],
    }.items():
        done = resight_here(*command, "--json", figures / f"{name}.json")
        assert done.returncode == 0, f"{command}: {done.stderr}"
    return folder


def read_json(made: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((made / "made" / "for it" / f"{name}.json").read_text()))


def test_adapt_writes_its_last_epoch(made: Path) -> None:
    found = load_checkpoint(made / "model").provenance
    assert read_json(made, "adapt")["last_epoch"] == found.history[-1]
    assert (found.stage, found.epoch, found.recipe["seed"]) == ("student", 0, 4)
    assert (made / "model-teacher" / INDEX_FILE).is_file() and (made / "model-log" / "epochs.jsonl").is_file()


def test_a_bundle_measures_as_its_checkpoint(made: Path) -> None:
    checkpoint, bundle = read_json(made, "evaluate"), read_json(made, "evaluate-bundle")
    assert list(checkpoint)[:6] == ["mAP", "rank1", "rank5", "rank10", "mINP", "valid_queries"]
    assert 0 < checkpoint["mAP"] <= 100 and checkpoint["valid_queries"] == 18
    assert bundle["mAP"] == pytest.approx(checkpoint["mAP"], abs=0.1)


def test_evaluate_writes_scores_and_settings(made: Path, tiny_site: Site) -> None:
    plain, extras = read_json(made, "evaluate"), read_json(made, "evaluate-extras")
    assert plain["settings"] == {
        **{"model": str(made / "model"), "site": str(tiny_site.root), "device": "cpu", "flip": False, "rerank": None}
    }
    assert (extras["settings"]["flip"], extras["settings"]["rerank"]["k1"]) == (True, 20)
    assert len(plain["camera_pairs"]) == 9 and plain["open_set"]["nonmated_searches"] == 18
    assert extras["mAP"] != plain["mAP"]
    assert (made / "made" / "for it" / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_evaluate_shows_every_table(made: Path, tiny_site: Site) -> None:
    shown = resight_here("evaluate", "--model", made / "model", "--site", tiny_site.root).stdout
    for word in ("mAP", "rank-10", "valid queries", "FPIR", "TPIR, rank 1", "cannot resolve it", "cam2", "query rows"):
        assert word in shown, shown


def test_export_writes_its_parity(made: Path) -> None:
    (artefact,) = read_json(made, "export")["artefacts"]
    assert artefact["min_cosine"] >= 0.9999


def adapting(site: object, init: object, out: Path, *rest: object) -> list[object]:
    return ["adapt", "--site", site, "--init", init, "--out", out, "--epochs", 1, "--iters", 1, *rest]


@pytest.fixture(scope="module")
def bad(
    made: Path, tiny_site: Site, tiny_init: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """Every invalid input by name, and the valid ones it is combined with."""
    folder = tmp_path_factory.mktemp("bad")
    good = {"init": tiny_init, "site": tiny_site.root, "bundle": made / "model.bundle"}
    inputs = lay_out_bad_inputs(folder, made, tiny_site)
    with TakenPort() as listen, HeldFolder(folder / "held") as held:
        yield inputs | good | {"listen": listen, "held": held}


def lay_out_bad_inputs(folder: Path, made: Path, tiny_site: Site) -> dict[str, Any]:
    (folder / "empty").mkdir()
    crop = (tiny_site.root / tiny_site.train.paths[0]).read_bytes()
    (folder / "nameless").mkdir()
    (folder / "nameless" / "anna.jpg").write_bytes(crop)
    for number in range(12):
        text = folder / "text" / "door" / f"{number}.jpg"
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text("not an image")
        few = folder / "few" / "door" / f"{number}.jpg"
        few.parent.mkdir(parents=True, exist_ok=True)
        if number < 5:
            few.write_bytes(crop)
    alone = draw_site(folder / "alone", cameras=1)
    shutil.copytree(made / "model.bundle", folder / "flipped.bundle")
    flip(folder / "flipped.bundle" / "model.onnx")
    shutil.copytree(made / "model", folder / "flipped-model")
    flip(folder / "flipped-model" / MODEL_FILE, at=0)
    shutil.copytree(made / "model", folder / "stranger")
    index = json.loads((folder / "stranger" / INDEX_FILE).read_text())
    index["encoder"]["backbone"] = "resnet18"
    (folder / "stranger" / INDEX_FILE).write_text(json.dumps(index))
    torch.save({"some.weight": torch.zeros(3)}, folder / "other.pth")
    (folder / "junk.pth").write_bytes(b"junk")
    (folder / "junk.onnx").write_bytes(b"junk")
    (folder / "taken").mkdir()
    (folder / "taken" / "letter").write_text("dear")
    return {path.name: path for path in folder.iterdir()} | {"missing": folder / "missing", "alone": alone.root}


def flip(path: Path, *, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


class TakenPort:
    """A loopback port in use."""

    def __enter__(self) -> str:
        self._socket = socket.create_server(("127.0.0.1", 0))
        return f"127.0.0.1:{self._socket.getsockname()[1]}"

    def __exit__(self, *error: object) -> None:
        self._socket.close()


class HeldFolder:
    """A data folder locked like by a running server."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self._path = path

    def __enter__(self) -> Path:
        self._lock = (self._path / "lock").open("w")
        self._lock.write("4242\n")
        self._lock.flush()
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        return self._path

    def __exit__(self, *error: object) -> None:
        self._lock.close()


def measuring(model: object, site: object, *rest: object) -> list[object]:
    return ["evaluate", "--model", model, "--site", site, *rest]


def serving(bundle: object, data: object, listen: str = "127.0.0.1:0") -> list[object]:
    return ["serve", "--bundle", bundle, "--data", data, "--listen", listen]


CASES: dict[str, Callable[[dict[str, Any], Path], list[object]]] = {
    "adapt missing": lambda bad, out: adapting(bad["missing"], bad["init"], out),
    "adapt empty": lambda bad, out: adapting(bad["empty"], bad["init"], out),
    "adapt nameless": lambda bad, out: adapting(bad["nameless"], bad["init"], out),
    "adapt text": lambda bad, out: adapting(bad["text"], bad["init"], out),
    "adapt few": lambda bad, out: adapting(bad["few"], bad["init"], out),
    "adapt recipe": lambda bad, out: adapting(bad["site"], bad["init"], out, "--recipe", "purifi"),
    "adapt device": lambda bad, out: adapting(bad["site"], bad["init"], out, "--device", "gpu[0]"),
    "adapt init": lambda bad, out: adapting(bad["site"], "buildin", out),
    "adapt other": lambda bad, out: adapting(bad["site"], bad["other.pth"], out),
    "adapt junk.pth": lambda bad, out: adapting(bad["site"], bad["junk.pth"], out),
    "adapt junk.onnx": lambda bad, out: adapting(bad["site"], bad["junk.onnx"], out),
    "adapt stranger": lambda bad, out: adapting(bad["site"], bad["stranger"], out),
    "adapt taken": lambda bad, out: adapting(bad["site"], bad["init"], bad["taken"]),
    "evaluate missing": lambda bad, out: measuring(bad["init"], bad["missing"]),
    "evaluate alone": lambda bad, out: measuring(bad["init"], bad["alone"]),
    "evaluate plot": lambda bad, out: measuring(bad["init"], bad["site"], "--plot", out),
    "evaluate flipped": lambda bad, out: measuring(bad["flipped.bundle"], bad["site"]),
    "evaluate flipped-model": lambda bad, out: measuring(bad["flipped-model"], bad["site"]),
    "evaluate stranger": lambda bad, out: measuring(bad["stranger"], bad["site"]),
    "export missing": lambda bad, out: ["export", bad["missing"], "--out", out],
    "export stranger": lambda bad, out: ["export", bad["stranger"], "--out", out],
    "export taken": lambda bad, out: ["export", bad["init"], "--out", bad["taken"]],
    "serve flipped": lambda bad, out: serving(bad["flipped.bundle"], out),
    "serve missing": lambda bad, out: serving(bad["missing"], out),
    "serve port": lambda bad, out: serving(bad["bundle"], out, bad["listen"]),
    "serve held": lambda bad, out: serving(bad["bundle"], bad["held"]),
    "demo missing": lambda bad, out: ["demo", "--site", bad["missing"], "--init", bad["init"], "--out", out],
    "demo alone": lambda bad, out: ["demo", "--site", bad["alone"], "--init", bad["init"], "--out", out],
    "search file": lambda bad, out: ["search", bad["missing"], "--collection", "x", "--server", bad["listen"]],
}


@pytest.mark.parametrize(
    "case, words",
    [
        ("adapt missing", ["no site at", "expected a crop store", "Market-1501"]),
        ("adapt empty", ["empty", "has no JPEG", "expected a crop store"]),
        ("adapt nameless", ["anna.jpg", "camera", "sub-folder"]),
        ("adapt text", ["none of the 12 crops", "expected JPEG"]),
        ("adapt few", ["5 usable crops are too few", "at least 8"]),
        ("adapt recipe", ["unknown recipe 'purifi'", "did you mean 'purify'", "supervised"]),
        ("adapt device", ["device 'gpu[0]'", "expected cpu, or cuda"]),
        ("adapt init", ["'buildin'", "expected 'builtin'"]),
        ("adapt other", ["other.pth", "missing", "unexpected"]),
        ("adapt junk.pth", ["junk.pth", "torch.save"]),
        ("adapt junk.onnx", ["junk.onnx", "ONNX"]),
        ("adapt stranger", ["resnet18", "missing", "unexpected"]),
        ("adapt taken", ["taken exists", "--out"]),
        ("evaluate missing", ["no site at", "expected a crop store"]),
        ("evaluate alone", ["camera"]),
        ("evaluate plot", ["has no image suffix", ".png"]),
        ("evaluate flipped", ["flipped.bundle", "model.onnx", "SHA-256"]),
        ("evaluate flipped-model", ["model.safetensors is damaged"]),
        ("evaluate stranger", ["resnet18", "missing", "unexpected"]),
        ("export missing", ["missing is not a checkpoint", "resight adapt"]),
        ("export stranger", ["resnet18", "missing", "unexpected"]),
        ("export taken", ["taken", "--replace"]),
        ("serve flipped", ["flipped.bundle", "model.onnx", "SHA-256"]),
        ("serve missing", ["missing", "bundle"]),
        ("serve port", ["cannot listen on 127.0.0.1:", "--listen"]),
        ("serve held", ["held by process 4242", "--data"]),
        ("demo missing", ["no site at", "expected a crop store"]),
        ("demo alone", ["camera"]),
        ("search file", ["missing", "cannot be read"]),
    ],
)
def test_bad_input_ends_in_one_sentence(bad: dict[str, Any], tmp_path: Path, case: str, words: list[str]) -> None:
    message = the_error(resight_here(*CASES[case](bad, tmp_path / "out")))
    for word in words:
        assert word in message, message
    if case.startswith(("adapt", "export")):
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", ["adapt stranger", "serve flipped"])
def test_a_process_ends_with_the_same_sentence(bad: dict[str, Any], tmp_path: Path, case: str) -> None:
    command = CASES[case](bad, tmp_path / "out")
    assert the_error(resight(*command)) == the_error(resight_here(*command))


def test_usage_errors_come_from_the_parser() -> None:
    done = resight_here("adapt", "--site", "x", "--out", "y", "--epochs", "0")
    assert done.returncode == 2 and "--epochs" in done.stderr and "Traceback" not in done.stderr
