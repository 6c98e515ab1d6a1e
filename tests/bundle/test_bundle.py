"""Bundles: written atomically, read strictly, rejected for any altered byte, name, link or version."""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from resight.arrays import Pixels
from resight.bundle.bundle import Bundle, Graph, open_bundle, write_bundle
from resight.bundle.manifest import FileEntry, from_json, space_id, to_json
from resight.bundle.probes import Parity, check_probes, draw_jpegs, make_probes, measure_parity, to_npz
from resight.errors import AlreadyExistsError, BundleError
from resight.image import ImageSpec, decode, fit

SPEC = ImageSpec(32, 16)
DIM = 12
GRAPH = bytes(range(256)) * 8  # the reader treats graphs as bytes; tests/exporters use real ones


def embed(pixels: Pixels) -> NDArray[np.float32]:
    """A fake encoder: twelve pixel values, centred, as a unit vector."""
    flat = pixels.reshape(len(pixels), -1)[:, :: pixels[0].size // DIM][:, :DIM].astype(np.float32) - 127.5
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def write(path: Path, **changes: Any) -> Bundle:
    fields: dict[str, Any] = {
        "name": "test-site.1",
        "space_id": space_id(GRAPH, SPEC, DIM),
        "image": SPEC,
        "graphs": [Graph(GRAPH, Parity(1e-7, 0.9999999)), Graph(GRAPH[::-1], Parity(0.01, 0.998), "int8")],
        "probes": make_probes(SPEC, embed, count=5),
        "weights_licence": "CC0-1.0",
        "training": {"recipe": {"name": "purify", "eps": 0.45}, "store_fingerprint": "ab" * 32},
        "evaluation": {"mAP": 0.5, "people": "Zoë"},
        "versions": {"torch": "2.14"},
    }
    return write_bundle(path, **(fields | changes))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("bundles") / "original").path


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to modify; it opens, as every moved bundle must."""
    copy = tmp_path / "elsewhere" / "moved"
    shutil.copytree(original, copy)
    assert open_bundle(copy).manifest.name == "test-site.1"
    return copy


def test_written_data_is_read_back(original: Path) -> None:
    bundle = open_bundle(str(original))
    manifest = bundle.manifest
    assert (manifest.name, manifest.feature_dim, manifest.image) == ("test-site.1", DIM, SPEC)
    assert manifest.training == {"recipe": {"name": "purify", "eps": 0.45}, "store_fingerprint": "ab" * 32}
    assert manifest.evaluation == {"mAP": 0.5, "people": "Zoë"}
    assert [artefact.file for artefact in manifest.artefacts] == ["model.onnx", "model.int8.onnx"]
    assert manifest.artefacts[1].min_cosine == 0.998
    assert bundle.artefact() == original / "model.onnx"
    assert bundle.read() == GRAPH and bundle.read("int8") == GRAPH[::-1]
    assert from_json(to_json(manifest)) == manifest
    probes = bundle.probes()
    assert probes.jpegs == draw_jpegs(count=5)
    assert np.array_equal(probes.pixels, np.stack([fit(decode(jpeg), SPEC) for jpeg in probes.jpegs]))
    assert check_probes(probes, SPEC, embed, what="stand-in") == measure_parity(probes, embed)


def test_a_missing_form_is_named(original: Path) -> None:
    with pytest.raises(BundleError, match="no fp16 tensorrt graph, only fp32 onnx, int8 onnx"):
        open_bundle(original).artefact("fp16", "tensorrt")


def test_files_are_readable_by_the_service_user(original: Path) -> None:
    readable = stat.S_IRGRP & ~os.umask(os.umask(0o022))
    for path in (original, *original.iterdir()):
        assert path.stat().st_mode & readable == readable


@pytest.mark.parametrize("file", ["manifest.json", "model.onnx", "model.int8.onnx", "probes.npz"])
def test_any_flipped_byte_is_rejected_and_the_file_named(folder: Path, file: str) -> None:
    path = folder / file
    whole = path.read_bytes()
    for place in np.linspace(0, len(whole) - 1, 25).astype(int):
        for flip in (0x01, 0xFF):  # another letter, and invalid UTF-8
            damaged = bytearray(whole)
            damaged[place] ^= flip
            path.write_bytes(damaged)
            with pytest.raises(BundleError, match=file):
                open_bundle(folder)
    path.write_bytes(whole)
    open_bundle(folder)


@pytest.mark.parametrize("file", ["manifest.json", "model.onnx", "model.int8.onnx", "probes.npz"])
@pytest.mark.parametrize("harm", ["missing", "truncated", "longer", "empty", "symlink", "folder", "pipe"])
def test_an_altered_file_is_rejected(folder: Path, tmp_path: Path, file: str, harm: str) -> None:
    path = folder / file
    whole = path.read_bytes()
    path.unlink()
    if harm == "truncated":
        path.write_bytes(whole[:-1])
    elif harm == "longer":
        path.write_bytes(whole + b"\n")
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "symlink":  # to the same bytes: still rejected
        (tmp_path / "aside").write_bytes(whole)
        path.symlink_to(tmp_path / "aside")
    elif harm == "folder":
        path.mkdir()
    elif harm == "pipe":
        os.mkfifo(path)
    with pytest.raises(BundleError, match=file):
        open_bundle(folder)


def test_an_extra_file_is_rejected(folder: Path) -> None:
    (folder / "weights.pkl").write_bytes(b"")
    with pytest.raises(BundleError, match=r"'weights\.pkl' in .* is not in the manifest"):
        open_bundle(folder)


@pytest.mark.parametrize("kind", ["nothing", "file", "empty folder"])
def test_other_folders_are_rejected(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bundle"
    if kind == "file":
        path.write_text("")
    elif kind == "empty folder":
        path.mkdir()
    with pytest.raises(BundleError, match=r"resight export|manifest\.json is missing"):
        open_bundle(path)


def test_a_manifest_of_many_megabytes_is_not_read(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b" " * (1024 * 1024 + 1))
    with pytest.raises(BundleError, match=r"manifest\.json .* at most 1048576 bytes"):
        open_bundle(folder)


def test_probes_of_another_size_are_rejected(folder: Path) -> None:
    other = to_npz(make_probes(ImageSpec(64, 32), embed, count=2))
    entry = FileEntry("probes.npz", sha256(other).hexdigest())
    manifest = dataclasses.replace(open_bundle(folder).manifest, probes=entry)
    (folder / "manifest.json").write_bytes(to_json(manifest))
    (folder / "probes.npz").write_bytes(other)
    with pytest.raises(BundleError, match=r"probes\.npz: expected .*\(32, 16, 12\), found \(64, 32, 12\)"):
        open_bundle(folder).probes()


def test_reading_verifies_the_digest_again(folder: Path) -> None:
    bundle = open_bundle(folder)
    (folder / "model.onnx").write_bytes(GRAPH[::-1])
    with pytest.raises(BundleError, match=r"model\.onnx .* SHA-256"):
        bundle.read()


def test_writing_does_not_overwrite_without_replace(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    first = write(path)
    with pytest.raises(AlreadyExistsError, match=r"found .*bundle"):
        write(path, name="second")
    assert open_bundle(path).manifest == first.manifest
    write(path, name="second", replace=True)
    assert open_bundle(path).manifest.name == "second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]


def test_only_bundles_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("kept")
    with pytest.raises(AlreadyExistsError):
        write(tmp_path, replace=True)
    (tmp_path / "a").mkdir()
    write(tmp_path / "a")  # an empty folder is free
    with pytest.raises(AlreadyExistsError):
        write(tmp_path / "precious.txt", replace=True)
    assert (tmp_path / "precious.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"name": "No Good"}, "name"),
        ({"training": {"loss": float("nan")}}, "plain JSON"),
        ({"evaluation": {"path": Path("x")}}, "plain JSON"),
        ({"graphs": []}, "artefacts"),
        ({"graphs": [Graph(GRAPH, Parity(0.0, 1.0), "int8")]}, "fp32"),
        ({"image": ImageSpec(64, 32)}, "height, width"),
    ],
)
def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(BundleError, match=what):
        write(tmp_path / "bundle", **changes)
    assert list(tmp_path.iterdir()) == []


def test_the_space_id_depends_on_weights_image_and_dimension() -> None:
    ids = {
        space_id(GRAPH, SPEC, DIM),
        space_id(GRAPH[1:], SPEC, DIM),
        space_id(GRAPH, ImageSpec(32, 16, "bilinear"), DIM),
        space_id(GRAPH, ImageSpec(16, 32), DIM),
        space_id(GRAPH, SPEC, DIM + 1),
    }
    assert len(ids) == 5
    assert space_id(GRAPH, SPEC, DIM) == space_id(bytes(bytearray(GRAPH)), ImageSpec(32, 16), DIM)
