"""The bundle: a folder with one model, ready to serve, that proves itself.

``exporters`` write it, the service reads it, and nothing else passes between them. The format is
specified in ``docs/bundle.md``; needs numpy and Pillow only.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from resight.atomic import replace_folder, temporary_folder
from resight.errors import AlreadyExistsError, BundleError
from resight.image import ImageSpec
from resight.manifest import MANIFEST_FILE, SCHEMA_VERSION, Artefact, FileEntry, Manifest, from_json, to_json
from resight.probes import MAX_PROBES_BYTES, PROBES_FILE, Parity, Probes, check_probes, from_npz, to_npz

__all__ = [
    "SCHEMA_VERSION",
    "Artefact",
    "Bundle",
    "Graph",
    "Manifest",
    "Parity",
    "Probes",
    "check_probes",
    "is_bundle",
    "open_bundle",
    "require_room",
    "space_id",
    "write_bundle",
]

MAX_MANIFEST_BYTES = 1024 * 1024
MAX_ARTEFACT_BYTES = 2**31 - 1  # protobuf, and so ONNX, ends there
_CHUNK = 1024 * 1024


@dataclass(frozen=True)
class Graph:
    """One runnable form of a model on its way into a bundle."""

    data: bytes
    parity: Parity
    precision: str = "fp32"
    runtime: str = "onnx"

    @property
    def file(self) -> str:
        """``model.onnx``, ``model.int8.onnx``, ``model.fp16.plan``: a label for people; readers go by the manifest."""
        middle = "" if (self.precision, self.runtime) == ("fp32", "onnx") else f".{self.precision}"
        return f"model{middle}.{'onnx' if self.runtime == 'onnx' else 'plan'}"


@dataclass(frozen=True)
class Bundle:
    """A verified bundle. ``path`` is its folder."""

    path: Path
    manifest: Manifest

    def find(self, precision: str = "fp32", runtime: str = "onnx") -> Artefact:
        """The manifest's entry of one runnable form.

        Raises:
            BundleError: the bundle has no such form.
        """
        for artefact in self.manifest.artefacts:
            if (artefact.precision, artefact.runtime) == (precision, runtime):
                return artefact
        found = ", ".join(f"{a.precision} {a.runtime}" for a in self.manifest.artefacts)
        raise BundleError(
            f"bundle {self.manifest.name} has no {precision} {runtime} graph, only {found}: "
            "choose one of these or export it"
        )

    def artefact(self, precision: str = "fp32", runtime: str = "onnx") -> Path:
        """The path of one runnable form. `read` is safer where a library takes bytes."""
        return self.path / self.find(precision, runtime).file

    def read(self, precision: str = "fp32", runtime: str = "onnx") -> bytes:
        """The bytes of one runnable form, verified again, so that what was checked is what runs.

        Raises:
            BundleError: no such form, or the file changed since the bundle was opened.
        """
        return _read_entry(self.path, self.find(precision, runtime), MAX_ARTEFACT_BYTES)

    def probes(self) -> Probes:
        """The golden images and their features.

        Raises:
            BundleError: damaged, or not of the manifest's image and feature size.
        """
        probes = from_npz(_read_entry(self.path, self.manifest.probes, MAX_PROBES_BYTES))
        expected = (self.manifest.image.height, self.manifest.image.width, self.manifest.feature_dim)
        found = (*probes.pixels.shape[1:3], probes.features.shape[1])
        if found != expected:
            raise BundleError(
                f"{self.manifest.probes.file}: expected height, width and feature length {expected}, found {found}: "
                "export the bundle anew"
            )
        return probes


def space_id(weights: bytes, image: ImageSpec, feature_dim: int) -> str:
    """Name an embedding space by what decides the vectors: weights, image spec and feature length.

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


def require_room(path: Path, *, replace: bool) -> None:
    """Refuse a folder that a new bundle must not take; worth asking before anything is computed.

    Args:
        path: folder of the bundle to be.
        replace: whether a bundle already there gives way.

    Raises:
        AlreadyExistsError: something stands at ``path``.
    """
    if path.exists() and any(path.iterdir() if path.is_dir() else [path]):
        if not replace:
            raise AlreadyExistsError(
                f"expected a new folder for the bundle, found {path}: choose another, remove it, or let a bundle give "
                "way with --replace"
            )
        if not is_bundle(path):
            raise AlreadyExistsError(f"expected a bundle to replace, found {path}: choose another folder or remove it")


def write_bundle(
    path: Path,
    *,
    name: str,
    space_id: str,
    image: ImageSpec,
    graphs: Sequence[Graph],
    probes: Probes,
    weights_licence: str,
    training: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    replace: bool = False,
) -> Bundle:
    """Write a bundle beside ``path``, flush it, rename it into place and open it.

    Args:
        path: the folder to make.
        name: 1-63 of ``a-z 0-9 . _ -``.
        space_id: from `space_id`.
        image: what the graphs take.
        graphs: the runnable forms, fp32 ONNX among them.
        probes: golden images with torch's features; their length decides ``feature_dim``.
        weights_licence: of the initial weights.
        training: JSON-able provenance.
        evaluation: JSON-able figures.
        versions: of the libraries used.
        replace: whether a folder already at ``path`` gives way; it must be a bundle or empty.

    Raises:
        AlreadyExistsError: something stands at ``path``.
        BundleError: a field is out of range, two graphs share a name, or what was written does not open.
        OSError: the disk refused; ``path`` is as it was.
    """
    require_room(path, replace=replace)
    files = {graph.file: graph.data for graph in graphs} | {PROBES_FILE: to_npz(probes)}
    digests = {file: hashlib.sha256(data).hexdigest() for file, data in files.items()}
    manifest = Manifest(
        name=name,
        space_id=space_id,
        feature_dim=probes.features.shape[1],
        image=image,
        artefacts=tuple(
            Artefact(g.file, digests[g.file], g.precision, g.runtime, g.parity.max_abs_diff, g.parity.min_cosine)
            for g in graphs
        ),
        probes=FileEntry(PROBES_FILE, digests[PROBES_FILE]),
        weights_licence=weights_licence,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        training=dict(training),
        evaluation=dict(evaluation or {}),
        versions=dict(versions or {}),
    )
    with temporary_folder(path) as temp:
        for file, data in (files | {MANIFEST_FILE: to_json(manifest)}).items():
            (temp / file).write_bytes(data)
        open_bundle(temp).probes()
        replace_folder(temp, path)
    return Bundle(path, manifest)


def is_bundle(path: Path) -> bool:
    """Whether a folder looks like a bundle (it may still be damaged)."""
    return (path / MANIFEST_FILE).is_file()


def open_bundle(path: Path | str) -> Bundle:
    """Open a bundle after every byte of it has been verified.

    Raises:
        BundleError: not a bundle, of another schema, or a file missing, added, linked, too large or altered;
            the message names the file.
    """
    path = Path(path)
    if not path.is_dir():
        raise BundleError(
            f"expected a bundle folder at {path}, found {'a file' if path.exists() else 'nothing'}: "
            "make one with `resight export CHECKPOINT --out BUNDLE`"
        )
    manifest = from_json(_read(path / MANIFEST_FILE, MAX_MANIFEST_BYTES))
    expected = {MANIFEST_FILE, manifest.probes.file, *(artefact.file for artefact in manifest.artefacts)}
    extra = sorted(entry.name for entry in path.iterdir() if entry.name not in expected)
    if extra:
        raise BundleError(f"{extra[0]!r} in {path} is not in the manifest: remove it or export the bundle anew")
    _read_entry(path, manifest.probes, MAX_PROBES_BYTES)
    for artefact in manifest.artefacts:
        _check_digest(path / artefact.file, artefact.sha256)
    return Bundle(path, manifest)


def _read_entry(folder: Path, entry: FileEntry, limit: int) -> bytes:
    data = _read(folder / entry.file, limit)
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        _refuse_altered(folder / entry.file)
    return data


def _check_digest(path: Path, sha256: str) -> None:
    """Hash a large file piece by piece."""
    digest = hashlib.sha256()
    with _open_plain(path, MAX_ARTEFACT_BYTES) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        _refuse_altered(path)


def _read(path: Path, limit: int) -> bytes:
    with _open_plain(path, limit) as file:
        return file.read(limit + 1)


def _open_plain(path: Path, limit: int) -> BinaryIO:
    """Open a regular file of limited size; links, devices and pipes are refused, not followed."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError as error:
        raise BundleError(f"{path.name} is missing from {path.parent}: copy the bundle again") from error
    except OSError as error:
        reason = "is a symbolic link" if path.is_symlink() else f"cannot be read ({error.strerror})"
        raise BundleError(
            f"{path.name} in {path.parent} {reason}, expected a readable regular file: copy it here"
        ) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
        os.close(descriptor)
        raise BundleError(
            f"{path.name} in {path.parent}: expected a regular file of at most {limit} bytes, found "
            f"{stat.filemode(status.st_mode)} of {status.st_size} bytes: export the bundle anew"
        )
    return os.fdopen(descriptor, "rb")


def _refuse_altered(path: Path) -> NoReturn:
    raise BundleError(
        f"{path.name} in {path.parent} is not the file that was exported (its SHA-256 differs from the manifest's): "
        "copy the bundle again or export it anew"
    )
