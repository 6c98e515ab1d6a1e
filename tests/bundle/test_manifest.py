"""Manifests: read as written, rejected for any other key, type, name or number."""

from __future__ import annotations

import dataclasses
import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from resight.bundle.manifest import Artefact, FileEntry, Manifest, from_json, to_json
from resight.errors import BundleError
from resight.image import ImageSpec

MANIFEST = Manifest(
    name="test-site.1",
    space_id="0123456789abcdef" * 2,
    feature_dim=12,
    image=ImageSpec(32, 16),
    artefacts=(
        Artefact("model.onnx", "a" * 64, "fp32", "onnx", 1e-7, 0.9999999),
        Artefact("model.fp16.plan", "b" * 64, "fp16", "tensorrt", 0.01, 0.998),
    ),
    probes=FileEntry("probes.npz", "c" * 64),
    weights_licence="CC0-1.0",
    created="2026-01-02T03:04:05+00:00",
    training={"recipe": {"name": "purify", "eps": 0.45, "stages": ["teacher", "student"]}},
    evaluation={"mAP": 0.5, "people": "Zoë"},
    versions={"torch": "2.14"},
)


def spell(body: dict[str, Any]) -> bytes:
    """An independent implementation of canonical JSON."""
    return (json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def altered(**changes: Any) -> bytes:
    """A changed manifest with a valid digest; a key set to ``...`` is removed."""
    body = json.loads(to_json(MANIFEST)) | changes
    body = {key: value for key, value in body.items() if value is not ... and key != "manifest_sha256"}
    return spell(body | {"manifest_sha256": sha256(spell(body)).hexdigest()})


def test_written_data_is_read_back() -> None:
    assert from_json(to_json(MANIFEST)) == MANIFEST
    assert altered() == to_json(MANIFEST)


def test_every_altered_byte_is_detected() -> None:
    whole = to_json(MANIFEST)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x01  # most are still valid JSON: another letter, another digit, a tab for a space
        with pytest.raises(BundleError, match=r"manifest\.json was altered"):
            from_json(bytes(damaged))


def test_a_newer_schema_is_reported() -> None:
    with pytest.raises(BundleError, match="schema_version 3, this program reads 2"):
        from_json(altered(schema_version=3, a_new_key=1))


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
def test_values_out_of_range_are_rejected(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(BundleError, match=what):
        from_json(altered(**changes))


@pytest.mark.parametrize(
    "text",
    [b"", b"null", b"[]", b"{", b"{}\n", b"\xff\xfe", b"[" * 100_000, b'{\n  "a": NaN\n}\n', b'{\n  "a": 1e999\n}\n'],
    ids=["empty", "null", "list", "half", "nothing inside", "not UTF-8", "deep", "NaN", "infinite"],
)
def test_other_json_is_rejected(text: bytes) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json was altered or damaged"):
        from_json(text)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Path("x"), {1: 2, "a": 3}], ids=repr)
def test_values_that_json_cannot_represent_are_not_written(value: Any) -> None:
    with pytest.raises(BundleError, match="plain JSON"):
        to_json(dataclasses.replace(MANIFEST, training={"value": value}))


def test_every_manifest_field_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "bundle.md").read_text()
    for kind in (Manifest, Artefact, FileEntry, ImageSpec):
        for field in dataclasses.fields(kind):
            assert f"`{field.name}`" in page, f"{kind.__name__}.{field.name} is not in docs/bundle.md"
