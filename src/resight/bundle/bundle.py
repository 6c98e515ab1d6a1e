"""The bundle: a folder with one model ready to serve, and the probes to check it with.

``exporters`` write bundles, the service reads them; they share nothing else. The format is specified in
``docs/bundle.md``. Needs numpy and Pillow only.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resight.bundle.manifest import (
    MANIFEST_FILE,
    SIGNATURE_FILE,
    Artefact,
    FileEntry,
    Manifest,
    from_json,
    to_json,
)
from resight.bundle.probes import MAX_PROBES_BYTES, PROBES_FILE, Parity, Probes, from_npz, to_npz
from resight.bundle.signing import MAX_SIGNATURE_BYTES, PrivateKey, sign, verify
from resight.calibration import Calibration
from resight.errors import AlreadyExistsError, BundleError
from resight.files import check_digest, read_plain, read_verified, replace_folder, temporary_folder
from resight.image import ImageSpec

MAX_MANIFEST_BYTES = 1024 * 1024
MAX_ARTEFACT_BYTES = 2**31 - 1  # the limit of protobuf, and therefore of ONNX


@dataclass(frozen=True)
class Graph:
    """One runnable form of a model, to be written to a bundle."""

    data: bytes
    parity: Parity
    precision: str = "fp32"
    runtime: str = "onnx"

    @property
    def file(self) -> str:
        """``model.onnx``, ``model.int8.onnx``, ``model.int8.tensorrt.onnx``; programs find it through the manifest."""
        parts = ["model"]
        if self.precision != "fp32":
            parts.append(self.precision)
        if self.runtime != "onnx":
            parts.append(self.runtime)
        return ".".join((*parts, "onnx"))


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
        """The path of one runnable form. Prefer `read` if a library accepts bytes."""
        return self.path / self.find(precision, runtime).file

    def read(self, precision: str = "fp32", runtime: str = "onnx") -> bytes:
        """The bytes of one runnable form, verified again in case the file changed since it was checked.

        Raises:
            BundleError: no such form, or the file changed since the bundle was opened.
        """
        return self._read(self.find(precision, runtime), MAX_ARTEFACT_BYTES)

    def probes(self) -> Probes:
        """The golden images and their features.

        Raises:
            BundleError: damaged, or not of the manifest's image and feature size.
        """
        probes = from_npz(self._read(self.manifest.probes, MAX_PROBES_BYTES))
        expected = (self.manifest.image.height, self.manifest.image.width, self.manifest.feature_dim)
        found = (*probes.pixels.shape[1:3], probes.features.shape[1])
        if found != expected:
            raise BundleError(
                f"{self.manifest.probes.file}: expected height, width and feature length {expected}, found {found}: "
                "export the bundle again"
            )
        return probes

    def _read(self, entry: FileEntry, limit: int) -> bytes:
        return read_verified(self.path / entry.file, entry.sha256, limit)


def require_free_folder(path: Path, *, replace: bool) -> None:
    """Check that a new bundle may be written to a folder, before anything is computed.

    Args:
        path: folder of the new bundle.
        replace: whether an existing bundle may be replaced.

    Raises:
        AlreadyExistsError: ``path`` exists.
    """
    if path.exists() and any(path.iterdir() if path.is_dir() else [path]):
        if not replace:
            raise AlreadyExistsError(
                f"expected a new folder for the bundle, found {path}: choose another, remove it, or replace the bundle "
                "with --replace"
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
    calibration: Calibration | None = None,
    key: PrivateKey | None = None,
    replace: bool = False,
) -> Bundle:
    """Write a bundle next to ``path``, flush it, rename it into place and open it.

    Args:
        path: the folder to create.
        name: 1-63 of ``a-z 0-9 . _ -``.
        space_id: from `space_id`.
        image: the graphs' input size and resize filter.
        graphs: the runnable forms, including fp32 ONNX.
        probes: golden images with torch's features; their length decides ``feature_dim``.
        weights_licence: of the initial weights.
        training: JSON-able provenance.
        evaluation: JSON-able measurements.
        versions: of the libraries used.
        calibration: of similarities, fitted on the site's crops.
        key: signs the manifest.
        replace: whether an existing folder at ``path`` is replaced; it must be a bundle or empty.

    Raises:
        AlreadyExistsError: ``path`` exists.
        BundleError: a field is out of range, two graphs share a name, or the written bundle cannot be opened.
        OSError: writing failed; ``path`` is unchanged.
    """
    require_free_folder(path, replace=replace)
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
        calibration=calibration,
        signer=key.public if key else "",
    )
    with temporary_folder(path) as temp:
        for file, data in files.items():
            (temp / file).write_bytes(data)
        _seal(temp, manifest, key)
        replace_folder(temp, path)
    return Bundle(path, manifest)


def is_bundle(path: Path) -> bool:
    """Whether a folder looks like a bundle (it may still be damaged)."""
    return (path / MANIFEST_FILE).is_file()


def open_bundle(path: Path | str, *, trusted_keys: Collection[str] = ()) -> Bundle:
    """Verify every byte of a bundle and open it.

    Args:
        path: the folder.
        trusted_keys: minisign public keys (their base64 lines); if given, the signature must be by one of them.
            Without any, a signature must still match the manifest's own ``signer``.

    Raises:
        BundleError: not a bundle, another schema, a missing, added, linked, too large or altered file, or a missing
            or wrong signature; the message names the file.
    """
    path = Path(path)
    if not path.is_dir():
        raise BundleError(
            f"expected a bundle folder at {path}, found {'a file' if path.exists() else 'nothing'}: "
            "make one with `resight export CHECKPOINT --out BUNDLE`"
        )
    data = read_plain(path / MANIFEST_FILE, MAX_MANIFEST_BYTES)
    manifest = from_json(data)
    expected = {MANIFEST_FILE, manifest.probes.file, *(artefact.file for artefact in manifest.artefacts)}
    if manifest.signer:
        expected.add(SIGNATURE_FILE)
        verify(data, read_plain(path / SIGNATURE_FILE, MAX_SIGNATURE_BYTES), manifest.signer)
    if trusted_keys and manifest.signer not in trusted_keys:
        raise BundleError(
            f"{MANIFEST_FILE} in {path} is {f'signed by {manifest.signer}' if manifest.signer else 'not signed'}, "
            f"expected a signature by one of {', '.join(sorted(trusted_keys))}: have it signed with "
            "`resight bundle sign`, or trust its signer"
        )
    extra = sorted(entry.name for entry in path.iterdir() if entry.name not in expected)
    if extra:
        raise BundleError(f"{extra[0]!r} in {path} is not in the manifest: remove it or export the bundle again")
    check_digest(path / manifest.probes.file, manifest.probes.sha256, MAX_PROBES_BYTES)
    for artefact in manifest.artefacts:
        check_digest(path / artefact.file, artefact.sha256, MAX_ARTEFACT_BYTES)
    return Bundle(path, manifest)


def sign_bundle(path: Path, key: PrivateKey) -> Bundle:
    """Sign a verified bundle; the folder is replaced as a whole, so a crash leaves it either unsigned or signed.

    Raises:
        BundleError: the bundle is damaged.
        OSError: writing failed; the bundle is unchanged.
    """
    manifest = replace(open_bundle(path).manifest, signer=key.public)
    with temporary_folder(path) as temp:
        for entry in (manifest.probes, *manifest.artefacts):
            shutil.copyfile(path / entry.file, temp / entry.file, follow_symlinks=False)
        _seal(temp, manifest, key)
        replace_folder(temp, path)
    return open_bundle(path)


def _seal(folder: Path, manifest: Manifest, key: PrivateKey | None) -> None:
    """Write the manifest and its signature, then open the bundle to verify it."""
    data = to_json(manifest)
    (folder / MANIFEST_FILE).write_bytes(data)
    if key is not None:
        comment = f"bundle {manifest.name} space {manifest.space_id} created {manifest.created}"
        (folder / SIGNATURE_FILE).write_bytes(sign(data, key, comment))
    open_bundle(folder).probes()
