"""Where models lie: a folder of bundles named by requests, and the file that remembers which were loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from resight.atomic import write_atomic
from resight.bundle import MAX_MANIFEST_BYTES
from resight.errors import FormatError, ModelNotFoundError, ReIDError, StartupError
from resight.manifest import MANIFEST_FILE, Manifest, from_json
from resight.sealed import read_plain

MODEL_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
MODELS_FILE = "models.json"
MAX_MODELS_FILE = 64 * 1024


def digest_of(path: Path) -> str:
    """SHA-256 of a bundle's manifest, in hexadecimal: it names every other file's.

    Raises:
        BundleError: there is none, or it is a link or too large.
    """
    return hashlib.sha256(read_plain(path / MANIFEST_FILE, MAX_MANIFEST_BYTES)).hexdigest()


class ModelRoot:
    """A folder whose sub-folders are bundles. Links are refused, so that a name cannot lead out of it.

    Raises:
        StartupError: there is no such folder.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise StartupError(f"folder of models {path} is not there: make it, or name another with --models")
        self.path = path.resolve()

    def names(self) -> list[str]:
        """Folders with a manifest, by name."""
        with os.scandir(self.path) as entries:
            found = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        return sorted(
            name for name in found if MODEL_ID.fullmatch(name) and (self.path / name / MANIFEST_FILE).exists()
        )

    def find(self, model_id: str) -> Path:
        """The folder of a model.

        Raises:
            ModelNotFoundError: no name of a model, no such folder, or a link.
        """
        path = self.path / model_id
        if not MODEL_ID.fullmatch(model_id) or path.is_symlink() or not path.is_dir():
            raise ModelNotFoundError(
                f"no model {model_id[:80]!r} here: a name is 1-63 of a-z 0-9 . _ -, of a folder (no link) under the "
                "server's folder of models; see ListModels",
                field="model_id",
                model=model_id[:80],
            )
        return path

    def manifest(self, path: Path) -> tuple[Manifest, str]:
        """What a bundle says of itself, with the SHA-256 of that; the other files are not looked at.

        Raises:
            BundleError: it cannot be read.
        """
        data = read_plain(path / MANIFEST_FILE, MAX_MANIFEST_BYTES)
        return from_json(data), hashlib.sha256(data).hexdigest()

    def told(self, error: ReIDError) -> str:
        """An error's text without the server's paths."""
        return str(error).replace(f"{self.path}{os.sep}", "").replace(str(self.path), "the folder of models")

    def without_path(self, error: ReIDError) -> ReIDError:
        """The same error for the other side."""
        told = type(error)(self.told(error), field=error.field)
        told.facts = error.facts
        return told


@dataclass(frozen=True)
class Remembered:
    """What was loaded when it was last noted.

    Attributes:
        bundle: SHA-256 of the manifest of the bundle that the server was started with; empty = nothing was noted.
        active: the active model.
        loaded: the others of the root.
    """

    bundle: str = ""
    active: str = ""
    loaded: tuple[str, ...] = ()


class ModelMemory:
    """``models.json`` of a data folder, written whole and at once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / MODELS_FILE

    def read(self) -> Remembered:
        """What was noted; nothing where there is no file.

        Raises:
            FormatError: it is damaged.
        """
        if not self.path.exists():
            return Remembered()
        try:
            told = json.loads(read_plain(self.path, MAX_MODELS_FILE))
            found = Remembered(told["bundle"], told["active"], tuple(told["loaded"]))
            if not all(isinstance(text, str) for text in (found.bundle, found.active, *found.loaded)):
                raise TypeError("not text")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise FormatError(
                f"{self.path} is damaged ({error}): remove it, and the server begins with its --bundle"
            ) from error
        return found

    def write(self, noted: Remembered) -> None:
        """Note it; a server that starts reads the old or the new one."""
        text = json.dumps({"bundle": noted.bundle, "active": noted.active, "loaded": list(noted.loaded)})
        write_atomic(self.path, text.encode(), mode=0o600)
