"""The manifest of a bundle: its model, its files and their provenance.

The file is canonical JSON and contains the SHA-256 of its own body, so that any changed byte is detected. That protects
against damage and mix-ups; against forgery there is a signature by the key in ``signer``. The format is specified in
``docs/bundle.md``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NoReturn

from resight.calibration import Calibration
from resight.errors import BundleError
from resight.image import ImageSpec

SCHEMA_VERSION = 2  # 2: calibration and signer added, TensorRT engines removed
MANIFEST_FILE = "manifest.json"
SIGNATURE_FILE = "manifest.json.minisig"
MAX_ARTEFACTS = 16
MAX_FEATURE_DIM = 8192  # the widest encoder of the field has 2048
PRECISIONS = ("fp32", "fp16", "int8")
RUNTIMES = ("onnx", "tensorrt")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SPACE_ID = re.compile(r"[0-9a-f]{32}")
_SIGNER = re.compile(r"[A-Za-z0-9+/]{56}")  # 42 bytes: algorithm, key id, key


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: its name in the folder and its SHA-256 in hex."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Artefact(FileEntry):
    """One runnable form of the model: an ONNX graph, for onnxruntime or for TensorRT to build an engine of.

    ``max_abs_diff`` and ``min_cosine`` compare its features of the probes with torch's in fp32: the
    largest difference of a component and the smallest cosine similarity of a row, the worst over batch
    sizes 1 and 7.
    """

    precision: str
    runtime: str
    max_abs_diff: float
    min_cosine: float


@dataclass(frozen=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        name: of the model; 1-63 of ``a-z 0-9 . _ -``.
        space_id: of the embedding space; only features of the same space are comparable.
        feature_dim: D, the length of a feature.
        image: the size and filter `resight.image.fit` needs.
        artefacts: the runnable forms; one of them is fp32 ONNX.
        probes: the golden images and their features.
        weights_licence: licence of the initial weights.
        training: recipe, config, crop store fingerprint, epoch.
        evaluation: measurements; may be empty.
        created: time of export, ISO 8601 in UTC.
        versions: of the libraries used for the export.
        calibration: similarity to probability on the site's crops; None if not fitted.
        signer: minisign public key (its base64 line) whose signature is in `SIGNATURE_FILE`; empty = unsigned.
    """

    name: str
    space_id: str
    feature_dim: int
    image: ImageSpec
    artefacts: tuple[Artefact, ...]
    probes: FileEntry
    weights_licence: str
    created: str
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    calibration: Calibration | None = None
    signer: str = ""
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        check_name(self.name, "name")
        if not _SPACE_ID.fullmatch(self.space_id):
            _refuse("space_id", "32 hex digits", self.space_id)
        if not 1 <= self.feature_dim <= MAX_FEATURE_DIM:
            _refuse("feature_dim", f"1..{MAX_FEATURE_DIM}", self.feature_dim)
        if not 1 <= len(self.artefacts) <= MAX_ARTEFACTS:
            _refuse("artefacts", f"1..{MAX_ARTEFACTS} entries", len(self.artefacts))
        for entry in (*self.artefacts, self.probes):
            check_name(entry.file, "file")
            if not _SHA256.fullmatch(entry.sha256):
                _refuse(f"sha256 of {entry.file}", "64 hex digits", entry.sha256)
        for artefact in self.artefacts:
            _check_artefact(artefact)
        if self.signer and not _SIGNER.fullmatch(self.signer):
            _refuse("signer", "a minisign public key of 56 base64 characters, or nothing", self.signer)
        files = [MANIFEST_FILE, SIGNATURE_FILE, self.probes.file, *(artefact.file for artefact in self.artefacts)]
        if len(set(files)) != len(files):
            _refuse("file names", "each file once", ", ".join(files))
        if not any((a.precision, a.runtime) == ("fp32", "onnx") for a in self.artefacts):
            _refuse("artefacts", "an fp32 ONNX graph among them", [a.file for a in self.artefacts])


def check_name(name: str, what: str) -> None:
    """Reject a name that is not safe as a file name.

    Raises:
        BundleError: not 1-63 characters of ``a-z 0-9 . _ -`` beginning with a letter or digit.
    """
    if not _NAME.fullmatch(name):
        _refuse(what, "1-63 of a-z 0-9 . _ - beginning with a letter or digit", name)


def space_id(weights: bytes, image: ImageSpec, feature_dim: int) -> str:
    """Id of an embedding space: a hash of everything its features depend on: weights, image spec and feature length.

    Args:
        weights: the bytes or a digest of all parameters of the global head's path.
        image: height, width and filter.
        feature_dim: D.

    Returns:
        32 hex digits (128 bits of SHA-256).
    """
    digest = hashlib.sha256(b"resight-space-1\0")
    digest.update(f"{sorted(asdict(image).items())} {feature_dim}\0".encode())
    digest.update(weights)
    return digest.hexdigest()[:32]


def to_json(manifest: Manifest) -> bytes:
    """Serialise a manifest to canonical JSON with the SHA-256 of its body.

    Raises:
        BundleError: training, evaluation or versions hold values that JSON cannot represent, such as NaN or a path.
    """
    try:
        body = asdict(manifest)
        if manifest.calibration is not None:
            body["calibration"] = manifest.calibration.to_json()
        return _canonical_json(body | {"manifest_sha256": hashlib.sha256(_canonical_json(body)).hexdigest()})
    except (TypeError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{MANIFEST_FILE}: training, evaluation and versions must be plain JSON values, found: {error}"
        ) from error


def from_json(data: bytes) -> Manifest:
    """Parse the output of `to_json`; anything else is rejected.

    Raises:
        BundleError: not JSON, altered, another schema version, a missing or unknown key, or a value out of range.
    """
    try:
        body = json.loads(data)
        if not isinstance(body, dict) or _canonical_json(body) != data:
            raise ValueError("not canonical JSON")
        stated = body.pop("manifest_sha256", None)
        if stated != hashlib.sha256(_canonical_json(body)).hexdigest():
            raise ValueError("its manifest_sha256 does not match")
    except (ValueError, RecursionError) as error:
        raise BundleError(
            f"{MANIFEST_FILE} was altered or damaged ({error}): copy the bundle again or export it again"
        ) from error
    version = body.get("schema_version")
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{MANIFEST_FILE} has schema_version {version!r}, this program reads {SCHEMA_VERSION}: "
            "use the resight that wrote it, or export the checkpoint with this one"
        )
    try:
        image = ImageSpec(**_typed(ImageSpec, body.get("image"), "image"))
    except ValueError as error:
        raise BundleError(f"{MANIFEST_FILE}: {error}: export the bundle again") from error
    artefacts = body.get("artefacts")
    if not isinstance(artefacts, list):
        _refuse("artefacts", "a list", artefacts)
    body["artefacts"] = tuple(Artefact(**_typed(Artefact, entry, "artefacts")) for entry in artefacts)
    if body.get("calibration") is not None:
        body["calibration"] = Calibration.from_json(body["calibration"])
    body["probes"] = FileEntry(**_typed(FileEntry, body.get("probes"), "probes"))
    return Manifest(**_typed(Manifest, body | {"image": image}, "the manifest"))


_KINDS: dict[str, type] = {"str": str, "int": int, "float": float}


def _typed(kind: Any, body: Any, where: str) -> dict[str, Any]:
    """Check that a JSON object has exactly the fields of a dataclass, each of its type."""
    if not isinstance(body, dict):
        _refuse(where, "an object", body)
    annotations = {entry.name: str(entry.type) for entry in fields(kind)}
    if set(body) != set(annotations):
        missing, unknown = sorted(set(annotations) - set(body)), sorted(set(body) - set(annotations))
        _refuse(where, f"the keys {', '.join(sorted(annotations))}", f"missing {missing}, unknown {unknown}")
    for key, value in body.items():
        annotation = annotations[key]
        expected = _KINDS.get(annotation, dict if annotation.startswith("dict") else None)
        if expected is not None and type(value) is not expected:
            _refuse(f"{where}.{key}", annotation, value)
    return body


def _check_artefact(artefact: Artefact) -> None:
    if artefact.precision not in PRECISIONS:
        _refuse(f"precision of {artefact.file}", " | ".join(PRECISIONS), artefact.precision)
    if artefact.runtime not in RUNTIMES:
        _refuse(f"runtime of {artefact.file}", " | ".join(RUNTIMES), artefact.runtime)
    if not (math.isfinite(artefact.max_abs_diff) and -1.0 <= artefact.min_cosine <= 1.0 + 1e-6):
        found = (artefact.max_abs_diff, artefact.min_cosine)
        _refuse(f"parity of {artefact.file}", "a finite difference and a cosine in [-1, 1]", found)


def _canonical_json(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _refuse(what: str, expected: str, found: object) -> NoReturn:
    raise BundleError(
        f"{MANIFEST_FILE}: {what}: expected {expected}, found {str(found)[:200]!r}: export the bundle again"
    )


GRAPH_INPUT, GRAPH_OUTPUT = "images", "features"
