"""Bundles: written whole, read strictly, refused for any byte, name, link or version that is not as written."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import stat
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from resight import manifest as manifest_module
from resight.bundle import (
    Artefact,
    Bundle,
    Graph,
    Manifest,
    Parity,
    Probes,
    check_probes,
    open_bundle,
    space_id,
    write_bundle,
)
from resight.errors import AlreadyExistsError, BundleError
from resight.image import ImageSpec, Pixels, decode, fit
from resight.manifest import FileEntry, from_json, to_json
from resight.probes import draw_jpegs, from_npz, make_probes, measure_parity, to_npz

SPEC = ImageSpec(32, 16)
DIM = 12
GRAPH = bytes(range(256)) * 8  # the reader treats graphs as bytes; tests/exporters use real ones


def embed(pixels: Pixels) -> NDArray[np.float32]:
    """A stand-in encoder: twelve pixel values, centred, as a unit vector."""
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
    """A copy to do harm to; it opens, as every moved bundle must."""
    copy = tmp_path / "elsewhere" / "moved"
    shutil.copytree(original, copy)
    assert open_bundle(copy).manifest.name == "test-site.1"
    return copy


def rewrite(folder: Path, **changes: Any) -> None:
    """Alter the manifest as somebody would who knows how to sign it."""
    body = json.loads((folder / "manifest.json").read_bytes())
    body.pop("manifest_sha256")
    body |= changes
    body = {key: value for key, value in body.items() if value is not ...}
    digest = sha256(manifest_module._spell(body)).hexdigest()
    (folder / "manifest.json").write_bytes(manifest_module._spell(body | {"manifest_sha256": digest}))


def test_what_was_written_is_read(original: Path) -> None:
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


def test_a_form_that_is_not_there_is_named(original: Path) -> None:
    with pytest.raises(BundleError, match="no fp16 tensorrt graph, only fp32 onnx, int8 onnx"):
        open_bundle(original).artefact("fp16", "tensorrt")


def test_files_are_readable_by_the_service_user(original: Path) -> None:
    readable = stat.S_IRGRP & ~os.umask(os.umask(0o022))
    for path in (original, *original.iterdir()):
        assert path.stat().st_mode & readable == readable


@pytest.mark.parametrize("file", ["manifest.json", "model.onnx", "model.int8.onnx", "probes.npz"])
def test_any_flipped_byte_is_refused_and_the_file_named(folder: Path, file: str) -> None:
    path = folder / file
    whole = path.read_bytes()
    places = range(len(whole)) if file == "manifest.json" else np.linspace(0, len(whole) - 1, 25).astype(int)
    for place in places:
        for flip in (0x01, 0x20, 0xFF):  # 0x20 changes the case of a letter, 0xFF breaks UTF-8
            damaged = bytearray(whole)
            damaged[place] ^= flip
            path.write_bytes(damaged)
            with pytest.raises(BundleError, match=file):
                open_bundle(folder)
    path.write_bytes(whole)
    open_bundle(folder)


@pytest.mark.parametrize("file", ["manifest.json", "model.onnx", "model.int8.onnx", "probes.npz"])
@pytest.mark.parametrize("harm", ["missing", "truncated", "longer", "empty", "symlink", "folder", "pipe"])
def test_a_file_that_is_not_as_written_is_refused(folder: Path, tmp_path: Path, file: str, harm: str) -> None:
    path = folder / file
    whole = path.read_bytes()
    path.unlink()
    if harm == "truncated":
        path.write_bytes(whole[:-1])
    elif harm == "longer":
        path.write_bytes(whole + b"\n")
    elif harm == "empty":
        path.write_bytes(b"")
    elif harm == "symlink":  # to the very same bytes: still refused
        (tmp_path / "aside").write_bytes(whole)
        path.symlink_to(tmp_path / "aside")
    elif harm == "folder":
        path.mkdir()
    elif harm == "pipe":
        os.mkfifo(path)
    with pytest.raises(BundleError, match=file):
        open_bundle(folder)


def test_an_extra_file_is_refused(folder: Path) -> None:
    (folder / "weights.pkl").write_bytes(b"")
    with pytest.raises(BundleError, match=r"'weights\.pkl' in .* is not in the manifest"):
        open_bundle(folder)


@pytest.mark.parametrize("kind", ["nothing", "file", "empty folder"])
def test_what_is_no_bundle_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "bundle"
    if kind == "file":
        path.write_text("")
    elif kind == "empty folder":
        path.mkdir()
    with pytest.raises(BundleError, match=r"resight export|manifest\.json is missing"):
        open_bundle(path)


def test_a_newer_schema_says_so(folder: Path) -> None:
    rewrite(folder, schema_version=2, a_new_key=1)
    with pytest.raises(BundleError, match="schema_version 2, this program reads 1"):
        open_bundle(folder)


ENTRY = {"file": "model.onnx", "sha256": "0" * 64, "precision": "fp32", "runtime": "onnx"}
GOOD = ENTRY | {"max_abs_diff": 0.0, "min_cosine": 1.0}


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"surprise": 1}, "unknown.*surprise"),
        ({"space_id": ...}, "missing.*space_id"),
        ({"space_id": "short"}, "space_id: expected 32 hex digits"),
        ({"name": "../up"}, "name: expected 1-63"),
        ({"name": "Site"}, "name: expected 1-63"),
        ({"name": "a" * 64}, "name: expected 1-63"),
        ({"name": 7}, "name"),
        ({"feature_dim": True}, "feature_dim"),
        ({"feature_dim": 0}, "feature_dim"),
        ({"feature_dim": 10**9}, "feature_dim"),
        ({"feature_dim": 12.0}, "feature_dim"),
        ({"image": {"height": 1, "width": 16, "filter": "bicubic"}}, "image sides"),
        ({"image": {"height": 32, "width": 16, "filter": "nearest"}}, "image filter"),
        ({"image": {"height": 32, "width": 16}}, "image.*missing.*filter"),
        ({"image": [32, 16]}, "image: expected an object"),
        ({"artefacts": []}, "artefacts"),
        ({"artefacts": {"0": GOOD}}, "artefacts: expected a list"),
        ({"artefacts": [ENTRY]}, "artefacts.*missing"),
        ({"artefacts": [GOOD | {"file": "/etc/passwd"}]}, "file: expected 1-63"),
        ({"artefacts": [GOOD | {"file": "../model.onnx"}]}, "file: expected 1-63"),
        ({"artefacts": [GOOD | {"file": "a/b.onnx"}]}, "file: expected 1-63"),
        ({"artefacts": [GOOD | {"file": ".hidden"}]}, "file: expected 1-63"),
        ({"artefacts": [GOOD | {"file": "manifest.json"}]}, "each file once"),
        ({"artefacts": [GOOD, GOOD]}, "each file once"),
        ({"artefacts": [GOOD | {"sha256": "0" * 63}]}, "64 hex digits"),
        ({"artefacts": [GOOD | {"precision": "int4"}]}, "precision"),
        ({"artefacts": [GOOD | {"precision": "int8"}]}, "an fp32 ONNX graph"),
        ({"artefacts": [GOOD | {"runtime": "pickle"}]}, "runtime"),
        ({"artefacts": [GOOD | {"min_cosine": 2.0}]}, "parity"),
        ({"artefacts": [GOOD | {"max_abs_diff": 0}]}, "max_abs_diff"),
        ({"probes": {"file": "probes.npz"}}, "probes.*missing"),
        ({"probes": {"file": "..", "sha256": "0" * 64}}, "file: expected 1-63"),
        ({"training": []}, "training"),
        ({"created": None}, "created"),
    ],
)
def test_a_manifest_out_of_its_bounds_is_refused(folder: Path, changes: dict[str, Any], what: str) -> None:
    rewrite(folder, **changes)
    with pytest.raises(BundleError, match=what):
        open_bundle(folder)


@pytest.mark.parametrize(
    "text",
    [b"", b"null", b"[]", b"{", b"{}\n", b"\xff\xfe", b"[" * 100_000, b'{\n  "a": NaN\n}\n', b'{\n  "a": 1e999\n}\n'],
    ids=["empty", "null", "list", "half", "nothing inside", "not UTF-8", "deep", "NaN", "infinite"],
)
def test_a_manifest_that_is_no_manifest_is_refused(folder: Path, text: bytes) -> None:
    (folder / "manifest.json").write_bytes(text)
    with pytest.raises(BundleError, match=r"manifest\.json was altered or damaged"):
        open_bundle(folder)


def test_a_manifest_of_many_megabytes_is_not_read(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b" " * (1024 * 1024 + 1))
    with pytest.raises(BundleError, match=r"manifest\.json .* at most 1048576 bytes"):
        open_bundle(folder)


def test_reading_checks_again(folder: Path) -> None:
    bundle = open_bundle(folder)
    (folder / "model.onnx").write_bytes(GRAPH[::-1])
    with pytest.raises(BundleError, match=r"model\.onnx .* SHA-256"):
        bundle.read()


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def compressed() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, pixels=np.zeros((1, 999, 999, 3), np.uint8), features=np.eye(1, dtype=np.float32))
    return buffer.getvalue()


BYTES = np.zeros(4, np.uint8)
PIXELS = np.zeros((1, 32, 16, 3), np.uint8)
FEATURES = np.eye(1, DIM, dtype=np.float32)
BAD_PROBES = {
    "no archive": lambda: b"PK\x03\x04 and nothing more",
    "Python objects": lambda: npz(pixels=PIXELS, features=FEATURES, jpeg_0=np.array([{}], dtype=object)),
    "compressed": compressed,
    "missing jpeg": lambda: npz(pixels=PIXELS, features=FEATURES),
    "other names": lambda: npz(pixels=PIXELS, features=FEATURES, jpeg_1=BYTES),
    "jpeg of floats": lambda: npz(pixels=PIXELS, features=FEATURES, jpeg_0=np.zeros(4)),
    "float pixels": lambda: npz(pixels=PIXELS.astype(np.float32), features=FEATURES, jpeg_0=BYTES),
    "channels first": lambda: npz(pixels=PIXELS.transpose(0, 3, 1, 2), features=FEATURES, jpeg_0=BYTES),
    "double features": lambda: npz(pixels=PIXELS, features=FEATURES.astype(np.float64), jpeg_0=BYTES),
    "features not unit": lambda: npz(pixels=PIXELS, features=FEATURES * 2, jpeg_0=BYTES),
    "NaN features": lambda: npz(pixels=PIXELS, features=FEATURES * np.nan, jpeg_0=BYTES),
    "too few features": lambda: npz(pixels=PIXELS, features=FEATURES[:0], jpeg_0=BYTES),
}


@pytest.mark.parametrize("kind", BAD_PROBES)
def test_bad_probes_are_refused(kind: str) -> None:
    with pytest.raises(BundleError, match=r"probes\.npz"):
        from_npz(BAD_PROBES[kind]())


def test_probes_of_another_size_are_refused(folder: Path) -> None:
    other = to_npz(make_probes(ImageSpec(64, 32), embed, count=2))
    (folder / "probes.npz").write_bytes(other)
    rewrite(folder, probes={"file": "probes.npz", "sha256": sha256(other).hexdigest()})
    with pytest.raises(BundleError, match=r"probes\.npz: expected .*\(32, 16, 12\), found \(64, 32, 12\)"):
        open_bundle(folder).probes()


def test_probes_catch_a_runtime_that_differs(original: Path) -> None:
    bundle = open_bundle(original)
    probes = bundle.probes()
    wrong = {
        "min cosine": lambda pixels: embed(255 - pixels),
        "other features": lambda pixels: embed(pixels) * np.float32(0.5),  # forgot to normalise
        "at batch size 7": lambda pixels: embed(pixels)[:1],  # ignores all but the first of a batch
        "expected finite": lambda pixels: embed(pixels) * np.float32(np.nan),
    }
    for message, run in wrong.items():
        with pytest.raises(BundleError, match=message):
            check_probes(probes, SPEC, run, what="model.onnx")


def test_probes_catch_another_resize(original: Path) -> None:
    probes = open_bundle(original).probes()
    other = np.stack([fit(decode(jpeg), ImageSpec(32, 16, "bilinear")) for jpeg in probes.jpegs])
    swapped = Probes(probes.jpegs, other, embed(other))
    with pytest.raises(BundleError, match="becomes other pixels here"):
        check_probes(swapped, SPEC, embed, what="model.onnx")


def test_probes_exercise_the_resize_both_ways() -> None:
    """At the standard size every filter difference must show, or the check above means nothing."""
    sizes = {decode(jpeg).shape[:2] for jpeg in draw_jpegs()}
    assert any(height < 256 and width < 128 for height, width in sizes)
    assert any(height > 256 and width > 128 for height, width in sizes)
    differences = [
        np.abs(fit(decode(jpeg), ImageSpec()).astype(int) - fit(decode(jpeg), ImageSpec(filter="bilinear"))).mean()
        for jpeg in draw_jpegs()
    ]
    assert max(differences) > 2.0


def test_writing_never_overwrites_unasked(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    first = write(path)
    with pytest.raises(AlreadyExistsError, match=r"found .*bundle"):
        write(path, name="second")
    assert open_bundle(path).manifest == first.manifest
    write(path, name="second", replace=True)
    assert open_bundle(path).manifest.name == "second"
    assert [entry.name for entry in tmp_path.iterdir()] == ["bundle"]


def test_replace_gives_way_to_bundles_only(tmp_path: Path) -> None:
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
def test_nothing_is_left_of_a_bundle_that_cannot_be(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(BundleError, match=what):
        write(tmp_path / "bundle", **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_space_is_named_by_what_decides_the_vectors() -> None:
    ids = {
        space_id(GRAPH, SPEC, DIM),
        space_id(GRAPH[1:], SPEC, DIM),
        space_id(GRAPH, ImageSpec(32, 16, "bilinear"), DIM),
        space_id(GRAPH, ImageSpec(16, 32), DIM),
        space_id(GRAPH, SPEC, DIM + 1),
    }
    assert len(ids) == 5
    assert space_id(GRAPH, SPEC, DIM) == space_id(bytes(bytearray(GRAPH)), ImageSpec(32, 16), DIM)


def test_every_manifest_field_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "bundle.md").read_text()
    for kind in (Manifest, Artefact, FileEntry, ImageSpec):
        for field in dataclasses.fields(kind):
            assert f"`{field.name}`" in page, f"{kind.__name__}.{field.name} is not in docs/bundle.md"
