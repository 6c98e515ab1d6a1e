"""`resight bundle`: verify, show, diff, sign, keygen, and their errors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from serving import DIM, SPEC, embed_by_hand, graph, weights
from tiny import resight_here, the_error

from resight.bundle.bundle import Bundle, Graph, open_bundle, write_bundle
from resight.bundle.diff import compare_features, flatten
from resight.bundle.manifest import MANIFEST_FILE, SIGNATURE_FILE, space_id, to_json
from resight.bundle.probes import Parity, make_probes
from resight.bundle.signing import generate_key, verify
from resight.calibration import Calibration

CALIBRATION = Calibration(
    midpoint=0.5,
    slope=16.0,
    accept=0.95,
    reject=0.05,
    false_accept_share=0.001,
    false_reject_share=0.05,
    positives=4321,
    negatives=87654,
    positive_source="one track",
    negative_source="two tracks at one time",
    error=0.0123,
)


def run_bundle(*arguments: object) -> str:
    done = resight_here("bundle", *arguments)
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def write(path: Path, seed: int = 0, **changes: Any) -> None:
    fields: dict[str, Any] = {
        "name": path.name,
        "space_id": space_id(weights(seed).tobytes(), SPEC, DIM),
        "image": SPEC,
        "graphs": [Graph(graph(seed), Parity(1e-7, 0.9999999))],
        "probes": make_probes(SPEC, lambda pixels: embed_by_hand(pixels, seed)),
        "weights_licence": "CC0-1.0",
        "training": {"recipe": {"name": "purify", "eps": 0.45}, "stage": "student", "epoch": 7},
        "versions": {"torch": "2.14"},
    }
    write_bundle(path, **(fields | changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of two models, one of them exported twice, and a key. Read only."""
    root = tmp_path_factory.mktemp("bundles")
    write(root / "lobby", evaluation={"market": {"mAP": 0.51234, "rank1": 0.75}})
    write(root / "again")
    write(root / "other", seed=1)
    generate_key(root / "site.key")
    return root


@pytest.fixture
def lobby(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "lobby", tmp_path / "copy"))


def rewrite(folder: Path, data: bytes | None = None, **changes: Any) -> Bundle:
    """A bundle with altered content and matching hashes."""
    manifest = open_bundle(folder).manifest
    if data is not None:
        (folder / "model.onnx").write_bytes(data)
        entry = dataclasses.replace(manifest.artefacts[0], sha256=hashlib.sha256(data).hexdigest())
        changes["artefacts"] = (entry,)
    (folder / MANIFEST_FILE).write_bytes(to_json(dataclasses.replace(manifest, **changes)))
    return open_bundle(folder)


def test_a_sound_bundle_is_verified_step_by_step(made: Path, tmp_path: Path) -> None:
    output = run_bundle("verify", made / "lobby", "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["verified"] is True
    steps = {row["step"]: (row["result"], row["found"]) for row in found["steps"]}
    assert list(steps)[:4] == ["files", "signature", "graph", "probes on cpu"]
    assert steps["files"][0] == "ok" and steps["files"][1].startswith("3 files, ")
    assert steps["signature"][0] == "skipped" and "none" in steps["signature"][1]
    assert steps["probes on cpu"][0] == "ok" and "model.onnx reproduces 16 golden images" in steps["probes on cpu"][1]
    assert all(row["found"] in output for row in found["steps"])
    assert "is verified" in output


def not_installed() -> Any:
    return mock.patch.dict(sys.modules, {"onnxruntime": None})


def test_without_a_runtime_the_rest_is_verified(made: Path, tmp_path: Path) -> None:
    with not_installed():
        output = run_bundle("verify", made / "lobby", "--json", tmp_path / "found.json")
        assert "onnxruntime is not installed" in output
        steps = json.loads((tmp_path / "found.json").read_text())["steps"]
        results = [(row["step"], row["result"]) for row in steps]
        assert results == [("files", "ok"), *((step, "skipped") for step in ("signature", "graph", "probes"))]
        assert "cosine" not in run_bundle("diff", made / "lobby", made / "other")
        for command in (["verify", made / "lobby"], ["diff", made / "lobby", made / "other"]):
            assert "--runtime needs onnxruntime" in the_error(resight_here("bundle", *command, "--runtime"))


@pytest.mark.parametrize("file", ["manifest.json", "model.onnx", "probes.npz"])
def test_an_altered_file_is_named(lobby: Path, tmp_path: Path, file: str) -> None:
    whole = (lobby / file).read_bytes()
    (lobby / file).write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    done = resight_here("bundle", "verify", lobby, "--json", tmp_path / "found.json")
    assert file in the_error(done) and "refused" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["verified"] is False and [row["result"] for row in found["steps"]] == ["failed"]


def test_a_graph_with_other_features_is_named(made: Path, lobby: Path) -> None:
    rewrite(lobby, (made / "other" / "model.onnx").read_bytes())
    said = the_error(resight_here("bundle", "verify", lobby))
    assert "model.onnx" in said and "other features" in said
    output = run_bundle("verify", lobby, "--no-runtime")
    assert "not run: --no-runtime" in output


def test_an_invalid_graph_is_refused_before_a_runtime_loads_it(lobby: Path, tmp_path: Path) -> None:
    rewrite(lobby, b"\x08\x09 no graph at all")
    done = resight_here("bundle", "verify", lobby, "--json", tmp_path / "found.json")
    assert "model.onnx" in the_error(done)
    steps = json.loads((tmp_path / "found.json").read_text())["steps"]
    assert [(row["step"], row["result"]) for row in steps][-1] == ("graph", "failed")


def test_a_bundle_is_signed_and_verified_with_its_key(made: Path, lobby: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in lobby.iterdir()}
    public = (made / "site.key.pub").read_text().splitlines()[1]
    assert the_error(resight_here("bundle", "verify", lobby, "--key", public)).count("not signed") == 1
    assert public in run_bundle("sign", lobby, "--key", made / "site.key", "--json", tmp_path / "signed.json")
    assert json.loads((tmp_path / "signed.json").read_text())["signer"] == public
    after = {path.name: path.read_bytes() for path in lobby.iterdir()}
    assert after.keys() == before.keys() | {SIGNATURE_FILE}
    assert [name for name in before if before[name] != after[name]] == [MANIFEST_FILE]
    assert "bundle lobby space" in verify(after[MANIFEST_FILE], after[SIGNATURE_FILE], public)
    assert "not known to be trusted" in run_bundle("verify", lobby, "--no-runtime")
    for key in (public, made / "site.key.pub"):
        assert "a key you trust" in run_bundle("verify", lobby, "--no-runtime", "--key", key)
    stranger = generate_key(tmp_path / "stranger.key")
    said = the_error(resight_here("bundle", "verify", lobby, "--no-runtime", "--key", stranger))
    assert MANIFEST_FILE in said and public in said and stranger in said
    run_bundle("verify", lobby, "--no-runtime", "--key", stranger, "--key", public)  # one of them is enough
    run_bundle("sign", lobby, "--key", tmp_path / "stranger.key")
    assert open_bundle(lobby).manifest.signer == stranger


def test_every_flipped_byte_of_the_signature_is_refused(made: Path, lobby: Path) -> None:
    run_bundle("sign", lobby, "--key", made / "site.key")
    path = lobby / SIGNATURE_FILE
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x20]) + whole[place + 1 :])
        assert SIGNATURE_FILE in the_error(resight_here("bundle", "verify", lobby, "--no-runtime"))
    path.unlink()
    assert f"{SIGNATURE_FILE} is missing" in the_error(resight_here("bundle", "show", lobby))


def test_a_reformatted_manifest_loses_its_signature(made: Path, lobby: Path) -> None:
    """All hashes match again: only the signature detects it."""
    run_bundle("sign", lobby, "--key", made / "site.key")
    manifest = dataclasses.replace(open_bundle(lobby).manifest, weights_licence="MIT")
    (lobby / MANIFEST_FILE).write_bytes(to_json(manifest))
    assert "manifest.json is not the file that" in the_error(resight_here("bundle", "verify", lobby))


@pytest.mark.skipif(shutil.which("minisign") is None, reason="the program minisign is not installed")
def test_minisign_verifies_a_signed_bundle(made: Path, lobby: Path) -> None:
    run_bundle("sign", lobby, "--key", made / "site.key")
    command: list[str | Path] = ["minisign", "-V", "-m", lobby / MANIFEST_FILE, "-p", made / "site.key.pub"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "Trusted comment: bundle lobby space" in done.stdout


def test_keys_are_made_with_and_without_a_passphrase(lobby: Path, tmp_path: Path) -> None:
    output = run_bundle("keygen", tmp_path / "plain.key", "--json", tmp_path / "key.json")
    public = json.loads((tmp_path / "key.json").read_text())["public"]
    assert public in output and public in (tmp_path / "plain.key.pub").read_text()
    assert stat.S_IMODE((tmp_path / "plain.key").stat().st_mode) == 0o600
    assert "plain.key" in the_error(resight_here("bundle", "keygen", tmp_path / "plain.key"))
    with mock.patch.dict(os.environ, {"RESIGHT_KEY_PASSPHRASE": "correct horse"}):
        run_bundle("keygen", tmp_path / "locked.key", "--passphrase")
        run_bundle("sign", lobby, "--key", tmp_path / "locked.key")
    assert b"ENCRYPTED" in (tmp_path / "locked.key").read_bytes()
    with mock.patch.dict(os.environ, {"RESIGHT_KEY_PASSPHRASE": "battery"}):
        assert "passphrase" in the_error(resight_here("bundle", "sign", lobby, "--key", tmp_path / "locked.key"))
    (tmp_path / "plain.key").chmod(0o644)
    assert "chmod 600" in the_error(resight_here("bundle", "sign", lobby, "--key", tmp_path / "plain.key"))


def test_a_passphrase_is_prompted_for_unless_it_is_in_the_environment(lobby: Path, tmp_path: Path) -> None:
    """A separate process whose standard input is a terminal."""
    for command, typed in (
        (["keygen", tmp_path / "k", "--passphrase"], "s3cret\ns3cret\n"),
        (["sign", lobby, "--key", tmp_path / "k"], "s3cret\n"),
    ):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "resight", "bundle", *map(str, command)],
            input=typed,
            capture_output=True,
            text=True,
            start_new_session=True,  # without a terminal the prompt reads standard input
        )
        assert done.returncode == 0, done.stderr
    assert open_bundle(lobby).manifest.signer


def test_show_prints_the_whole_manifest(made: Path, lobby: Path, tmp_path: Path) -> None:
    rewrite(lobby, calibration=CALIBRATION)
    output = run_bundle("show", lobby, "--json", tmp_path / "shown.json")
    manifest = open_bundle(lobby).manifest
    flat = " ".join(output.split())
    for words in (
        "bundle lobby", manifest.space_id, str(DIM), f"64 x 32 (height x width), {SPEC.filter}", "CC0-1.0", "purify",
        "student, 7", manifest.created, "torch 2.14", "not signed", "model.onnx", "fp32", "MiB", "market.mAP", "0.5123",
        "4321 pairs", "0.100% of pairs of two persons", "similarity 0.684 (probability 0.950",
        "0.316 (probability 0.050", "87654 of two (two tracks at one time)",
    ):  # fmt: skip
        assert words in flat, words
    shown = json.loads((tmp_path / "shown.json").read_text())
    assert shown["calibration"] == CALIBRATION.to_json()
    assert shown["artefacts"]["model.onnx"]["bytes"] == (lobby / "model.onnx").stat().st_size
    assert "not calibrated" in run_bundle("show", made / "again")


def test_control_sequences_and_markup_are_escaped(lobby: Path) -> None:
    rewrite(
        lobby,
        weights_licence="\x1b]0;owned\x07 [bold red]MIT[/bold red] [/nothing]",
        training={"recipe": ["no", "dictionary"], "initial_weights": "a word", "stage": {"\x1b[2J": 1}, "epoch": None},
        evaluation={"\x1b[31mmAP": "[/]", "many": "x" * 100_000},
        versions={"[blink]torch": "\x9b31m"},
    )
    for command in (["show", lobby], ["diff", lobby, lobby], ["verify", lobby]):
        output = run_bundle(*command)
        assert "\x1b" not in output and "\x9b" not in output and "\x07" not in output and len(output) < 50_000
    assert "[bold red]MIT[/bold red] [/nothing]" in run_bundle("show", lobby)


def test_two_exports_of_one_model_are_comparable(made: Path, tmp_path: Path) -> None:
    output = run_bundle("diff", made / "lobby", made / "again", "--json", tmp_path / "diff.json")
    found = json.loads((tmp_path / "diff.json").read_text())
    assert found["comparable"] is True and "both have the same embedding space" in output
    assert found["fields"].keys() - {"created"} == {"evaluation.market.mAP", "evaluation.market.rank1", "name"}
    assert found["fields"]["name"] == {"a": "lobby", "b": "again"}
    (figures,) = found["probes"]
    assert (figures["precision"], figures["probes"]) == ("fp32", 16)
    assert figures["mean_cosine"] == pytest.approx(1.0, abs=1e-6) and figures["max_similarity_change"] < 1e-6
    same = run_bundle("diff", made / "lobby", made / "lobby", "--no-runtime")
    assert "the manifests are equal" in same and "cosine" not in same


def test_two_models_are_not_comparable(made: Path, tmp_path: Path) -> None:
    output = run_bundle("diff", made / "lobby", made / "other", "--json", tmp_path / "diff.json")
    found = json.loads((tmp_path / "diff.json").read_text())
    assert found["comparable"] is False and "different embedding spaces" in output
    assert {"space_id", "artefacts.model.onnx.sha256", "probes.sha256"} <= found["fields"].keys()
    first, second = (open_bundle(made / name).probes() for name in ("lobby", "other"))
    cosines = [float(np.dot(a, b)) for a, b in zip(first.features, second.features, strict=True)]
    (figures,) = found["probes"]
    assert figures["mean_cosine"] == pytest.approx(np.mean(cosines), abs=1e-4)
    assert figures["min_cosine"] == pytest.approx(min(cosines), abs=1e-4)


def test_bundles_without_images_or_precisions_in_common(made: Path, lobby: Path, tmp_path: Path) -> None:
    probes = open_bundle(lobby).probes()
    fewer = dataclasses.replace(probes, jpegs=probes.jpegs[:3], pixels=probes.pixels[:3], features=probes.features[:3])
    write(tmp_path / "fewer", probes=fewer)
    run_bundle("diff", lobby, tmp_path / "fewer", "--json", tmp_path / "diff.json")
    assert json.loads((tmp_path / "diff.json").read_text())["probes"][0]["probes"] == 3
    inverted = 255 - probes.pixels
    write(tmp_path / "none", probes=dataclasses.replace(probes, pixels=inverted, features=embed_by_hand(inverted)))
    assert "they share no golden image" in run_bundle("diff", lobby, tmp_path / "none")
    bilinear = dataclasses.replace(SPEC, filter="bilinear" if SPEC.filter == "bicubic" else "bicubic")
    write(tmp_path / "sharper", image=bilinear)
    assert "image sizes or filters differ" in run_bundle("diff", lobby, tmp_path / "sharper")


def test_every_shared_precision_is_compared_and_verified(made: Path, tmp_path: Path) -> None:
    """The same graph in place of the quantised ones: a reader follows the manifest."""
    forms = [Graph(graph(0), Parity(1e-7, 0.9999999)), Graph(graph(0), Parity(0.01, 0.998), "int8")]
    for_gpus = Graph(graph(0), Parity(0.01, 0.998), "int8", "tensorrt")
    write(tmp_path / "a", graphs=[*forms, for_gpus])
    write(tmp_path / "b", graphs=forms)
    output = run_bundle("verify", tmp_path / "a")
    assert "model.int8.onnx reproduces" in output and "model.int8.tensorrt.onnx is for TensorRT" in output
    run_bundle("diff", tmp_path / "a", tmp_path / "b", "--json", tmp_path / "diff.json")
    assert [one["precision"] for one in json.loads((tmp_path / "diff.json").read_text())["probes"]] == ["fp32", "int8"]
    run_bundle("diff", tmp_path / "a", made / "lobby", "--json", tmp_path / "diff.json")
    assert [one["precision"] for one in json.loads((tmp_path / "diff.json").read_text())["probes"]] == ["fp32"]


def test_a_damaged_bundle_is_neither_shown_nor_compared_nor_signed(made: Path, lobby: Path) -> None:
    (lobby / "model.onnx").unlink()
    for command in (["show", lobby], ["diff", made / "other", lobby], ["sign", lobby, "--key", made / "site.key"]):
        assert "model.onnx is missing" in the_error(resight_here("bundle", *command))
    assert not (lobby / SIGNATURE_FILE).exists()


def test_features_are_measured_as_a_loop_would() -> None:
    rng = np.random.default_rng(5)
    first, second = (rng.normal(size=(6, 9)).astype(np.float32) for _ in range(2))
    first, second = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (first, second))
    found = compare_features("fp32", first, second)
    cosines = [float(np.dot(first[i], second[i])) for i in range(6)]
    changes = [
        abs(float(np.dot(first[i], first[j]) - np.dot(second[i], second[j]))) for i in range(6) for j in range(i + 1, 6)
    ]
    assert found.mean_cosine == pytest.approx(np.mean(cosines), abs=1e-6)
    assert found.min_cosine == pytest.approx(min(cosines), abs=1e-6)
    assert found.mean_similarity_change == pytest.approx(np.mean(changes), abs=1e-6)
    assert found.max_similarity_change == pytest.approx(max(changes), abs=1e-6)
    rotation = np.linalg.qr(rng.normal(size=(9, 9)))[0].astype(np.float32)
    turned = compare_features("fp32", first, first @ rotation)  # another space, equivalent features
    assert turned.max_similarity_change < 1e-5 and turned.mean_cosine is not None and turned.mean_cosine < 0.9
    shorter = compare_features("int8", first, second[:, :4])
    assert shorter.mean_cosine is None and shorter.min_cosine is None and shorter.max_similarity_change > 0
    assert compare_features("fp32", first[:1], second[:1]).max_similarity_change == 0.0


def test_trees_are_flattened() -> None:
    assert flatten({"a": {"b": [7, {"c": None}]}, "d": {}, "e": []}) == {"a.b.0": 7, "a.b.1.c": None}
