"""The models of a server: loading next to the active one, activation, and unloading after the last request.

A model is a bundle folder in the model root; requests refer to it by name, never by path. Loading verifies checksums
and signature, checks the untrusted graph, runs the probes and warms up, all in a thread, and changes nothing until it
has succeeded. A request leases the model it starts with and keeps it to its end. ``models.json`` in the data folder
records the loaded models across restarts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from resight.bundle.bundle import MAX_MANIFEST_BYTES, Bundle, open_bundle
from resight.bundle.manifest import MANIFEST_FILE, Manifest, from_json
from resight.bundle.signing import load_public_keys
from resight.errors import (
    BundleError,
    ConflictError,
    FormatError,
    ModelInUseError,
    ModelNotFoundError,
    ModelNotReadyError,
    ReIDError,
    SpaceMismatchError,
    StartupError,
)
from resight.files import read_plain, write_atomic
from resight.runtime.base import Runtime
from resight.runtime.providers import open_runtime
from resight.service.inference.embedder import Embedded, Embedder
from resight.service.inference.priority_queue import Priority
from resight.service.records import Space
from resight.service.settings import Settings

MODEL_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
MODELS_FILE = "models.json"
MAX_MODELS_FILE = 64 * 1024


def manifest_digest(path: Path) -> str:
    """SHA-256 of a bundle's manifest, in hexadecimal; the manifest has the hashes of all other files.

    Raises:
        BundleError: it is missing, a link, or too large.
    """
    return hashlib.sha256(read_plain(path / MANIFEST_FILE, MAX_MANIFEST_BYTES)).hexdigest()


class ModelRoot:
    """A folder whose sub-folders are bundles. Links are rejected, so that a name cannot point outside.

    Raises:
        StartupError: the folder does not exist.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise StartupError(f"model folder {path} does not exist: create it, or pass another one with --models")
        self.path = path.resolve()

    def names(self) -> list[str]:
        """Names of the sub-folders with a manifest, sorted."""
        with os.scandir(self.path) as entries:
            found = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        return sorted(
            name for name in found if MODEL_ID.fullmatch(name) and (self.path / name / MANIFEST_FILE).exists()
        )

    def find(self, model_id: str) -> Path:
        """The folder of a model.

        Raises:
            ModelNotFoundError: an invalid name, no such folder, or a link.
        """
        path = self.path / model_id
        if not MODEL_ID.fullmatch(model_id) or path.is_symlink() or not path.is_dir():
            raise ModelNotFoundError(
                f"there is no model {model_id[:80]!r}: a model is a folder (no link) in the server's model folder, its "
                "name 1-63 characters a-z 0-9 . _ -; see ListModels",
                field="model_id",
                model=model_id[:80],
            )
        return path

    def manifest(self, path: Path) -> tuple[Manifest, str]:
        """The manifest of a bundle and its SHA-256; the other files are not read.

        Raises:
            BundleError: it cannot be read.
        """
        data = read_plain(path / MANIFEST_FILE, MAX_MANIFEST_BYTES)
        return from_json(data), hashlib.sha256(data).hexdigest()

    def public_message(self, error: ReIDError) -> str:
        """The message of an error without the server's paths, for clients."""
        return str(error).replace(f"{self.path}{os.sep}", "").replace(str(self.path), "the model folder")

    def without_path(self, error: ReIDError) -> ReIDError:
        """A copy of an error with its `public_message`."""
        public = type(error)(self.public_message(error), field=error.field)
        public.facts = error.facts
        return public


@dataclass(frozen=True)
class SavedModels:
    """The content of ``models.json``.

    Attributes:
        bundle: SHA-256 of the manifest of the server's ``--bundle``; empty = nothing was saved.
        active: name of the active model.
        loaded: names of the other loaded models.
    """

    bundle: str = ""
    active: str = ""
    loaded: tuple[str, ...] = ()


class ModelsFile:
    """``models.json`` of a data folder, written atomically."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / MODELS_FILE

    def read(self) -> SavedModels:
        """The saved models; empty if there is no file.

        Raises:
            FormatError: it is damaged.
        """
        if not self.path.exists():
            return SavedModels()
        try:
            content = json.loads(read_plain(self.path, MAX_MODELS_FILE))
            found = SavedModels(content["bundle"], content["active"], tuple(content["loaded"]))
            if not all(isinstance(text, str) for text in (found.bundle, found.active, *found.loaded)):
                raise TypeError("expected strings")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise FormatError(f"{self.path} is damaged ({error}): remove it to start with --bundle only") from error
        return found

    def write(self, saved: SavedModels) -> None:
        """Replace the file atomically."""
        text = json.dumps({"bundle": saved.bundle, "active": saved.active, "loaded": list(saved.loaded)})
        write_atomic(self.path, text.encode(), mode=0o600)


log = logging.getLogger(__name__)


class ModelState(StrEnum):
    """``ModelState`` of model.proto."""

    AVAILABLE = "available"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


def space_of_manifest(manifest: Manifest) -> Space:
    """The space of a bundle's features."""
    return Space(
        manifest.space_id, manifest.name, manifest.feature_dim, manifest.created, calibration=manifest.calibration
    )


class LoadedModel:
    """A loaded model. Use `embed` only within `lease`.

    Attributes:
        sha256: of the manifest.
    """

    def __init__(self, model_id: str, bundle: Bundle, runtime: Runtime, embedder: Embedder) -> None:
        self.model_id, self.manifest, self.space = model_id, bundle.manifest, space_of_manifest(bundle.manifest)
        self.sha256 = manifest_digest(bundle.path)
        self.provider, self.max_batch, self.min_cosine = runtime.provider, runtime.max_batch, runtime.min_cosine
        self._runtime: Runtime | None = runtime
        self._embedder, self._leases, self._pins, self._retired = embedder, 0, 0, False

    @property
    def freed(self) -> bool:
        """Whether its memory was released."""
        return self._runtime is None

    @property
    def pinned(self) -> bool:
        """Whether a migration or a shadow uses it."""
        return self._pins > 0

    @contextlib.contextmanager
    def lease(self, *, pin: bool = False) -> Iterator[LoadedModel]:
        """Keep its memory within the block; with ``pin`` it cannot be unloaded either."""
        self._leases += 1
        self._pins += pin
        try:
            yield self
        finally:
            self._leases -= 1
            self._pins -= pin
            self._free()

    def retire(self) -> None:
        """Free its memory as soon as there are no leases."""
        self._retired = True
        self._free()

    def _free(self) -> None:
        if self._retired and not self._leases and self._runtime is not None:
            self._runtime = None
            log.info("freed model=%s sha256=%s", self.model_id, self.sha256[:12])

    async def embed(
        self, crops: Sequence[bytes], deadline: float, *, priority: Priority = Priority.INTERACTIVE
    ) -> list[Embedded | ReIDError]:
        """Embed crops, see `Embedder.embed`; requires a `lease`."""
        assert self._runtime is not None
        return await self._embedder.embed(self._runtime, crops, deadline, priority=priority)


@dataclass(frozen=True)
class ModelStatus:
    """State of a model. The manifest of a model that is not loaded was read, but not verified.

    Attributes:
        manifest: None if it cannot be read.
        loaded: None if the model is not loaded.
        problem: why the last attempt to load it failed.
    """

    model_id: str
    state: ModelState
    manifest: Manifest | None = None
    sha256: str = ""
    loaded: LoadedModel | None = None
    active: bool = False
    problem: str = ""


class ModelHost:
    """The models of a server. Everything except loading runs in the event loop's thread.

    Args:
        embedder: runs the models.
        settings: with bundle, model root, trusted keys and provider.
        folder: data folder, for ``models.json``.
    """

    def __init__(self, embedder: Embedder, settings: Settings, folder: Path) -> None:
        self._embedder, self._settings = embedder, settings
        self._root = None if settings.models is None else ModelRoot(settings.models)
        self._keys = load_public_keys(settings.trusted_keys)
        self._saved_file = ModelsFile(folder)
        self._loaded: dict[str, LoadedModel] = {}
        self._failed: dict[str, str] = {}
        self._loading, self._load_lock, self._save_lock = "", asyncio.Lock(), asyncio.Lock()
        self._active, self._bundle = "", ""  # model names
        self._bundle_sha256 = ""

    @property
    def active(self) -> LoadedModel:
        """The default model."""
        return self._loaded[self._active]

    @property
    def root(self) -> ModelRoot:
        """The model root; raises ModelNotFoundError if the server has none."""
        if self._root is None:
            raise ModelNotFoundError("this server has no model folder: start it with --models FOLDER")
        return self._root

    async def start(self) -> None:
        """Load the bundle of the settings, and the models that were loaded when the server stopped.

        A previously loaded model that cannot be loaded is reported as FAILED; for the active one it is an error.

        Raises:
            BundleError: the bundle, or the previously active model, fails verification.
            StartupError: the provider cannot be started, or a different bundle in the root has the same name.
        """
        path = self._settings.bundle
        first = await asyncio.to_thread(self._open, "", path)
        own = self._root is not None and path.resolve().parent == self._root.path
        first.model_id = path.resolve().name if own else first.manifest.name
        if self._root is not None and not own and (self._root.path / first.model_id).exists():
            raise StartupError(
                f"bundle {path} has the name {first.model_id}, like another one in {self._root.path}: pass the latter "
                "as --bundle, or rename its folder"
            )
        self._loaded[first.model_id] = first
        self._active, self._bundle, self._bundle_sha256 = first.model_id, first.model_id, first.sha256
        saved = self._saved_file.read()
        for model_id in saved.loaded if self._root is not None else ():
            if model_id not in self._loaded:
                with contextlib.suppress(ReIDError):
                    await self._load(model_id)
        if saved.active and saved.bundle == first.sha256:  # otherwise --bundle was changed, and takes precedence
            if saved.active not in self._loaded:
                raise BundleError(
                    f"model {saved.active} was active when the server stopped and cannot be loaded now "
                    f"({self._failed.get(saved.active, 'the server has no model folder')}): repair it, or remove "
                    f"{self._saved_file.path} to start with {path}"
                )
            self._active = saved.active
        if saved != SavedModels():  # --bundle takes precedence: record it
            await self._save()
        log.info("models loaded=%s active=%s", ",".join(sorted(self._loaded)), self._active)

    @contextlib.contextmanager
    def lease(self, model_id: str = "", *, pin: bool = False) -> Iterator[LoadedModel]:
        """Lease a model by name (empty = the active one) within the block.

        Raises:
            ModelNotFoundError: it is not loaded.
            ModelNotReadyError: it is being loaded.
        """
        with self._find(model_id or self._active).lease(pin=pin) as found:
            yield found

    def model_of_space(self, space_id: str) -> LoadedModel | None:
        """A loaded model with a given space, preferably the active one."""
        loaded = sorted(self._loaded.values(), key=lambda model: model.model_id != self._active)
        return next((model for model in loaded if model.space.space_id == space_id), None)

    @contextlib.contextmanager
    def lease_space(self, space: Space, *, collection: str) -> Iterator[LoadedModel]:
        """Lease a model of a collection's space within the block.

        Raises:
            SpaceMismatchError: no model of the space is loaded.
        """
        found = self.model_of_space(space.space_id)
        if found is None:
            active = self.active.space
            raise SpaceMismatchError(
                f"collection {collection} has features of model {space.model_id} (space {space.space_id}), this server "
                f"embeds with {active.model_id} (space {active.space_id}): serve that model, load it too, migrate the "
                "collection, or enrol the crops in a new one",
                field="collection_id",
                expected_space_id=space.space_id,
                found_space_id=active.space_id,
            )
        with found.lease():
            yield found

    def status(self, model_id: str) -> ModelStatus:
        """State of a model.

        Raises:
            ModelNotFoundError: it is neither loaded nor in the root.
        """
        if (loaded := self._loaded.get(model_id)) is not None:
            return self.status_of(loaded)
        if self._loading == model_id:
            return ModelStatus(model_id, ModelState.LOADING)
        path = self.root.find(model_id)
        try:
            manifest, sha256 = self.root.manifest(path)
        except BundleError as error:
            return ModelStatus(model_id, ModelState.FAILED, problem=self.root.public_message(error))
        problem = self._failed.get(model_id, "")
        return ModelStatus(
            model_id, ModelState.FAILED if problem else ModelState.AVAILABLE, manifest, sha256, problem=problem
        )

    def status_of(self, model: LoadedModel) -> ModelStatus:
        """State of a loaded model."""
        name = model.model_id
        state = ModelState.LOADING if self._loading == name else ModelState.READY
        problem = self._failed.get(name, "")  # of a newer bundle under the same name
        return ModelStatus(name, state, model.manifest, model.sha256, model, name == self._active, problem)

    def names(self) -> list[str]:
        """Names of all models, loaded or in the root, sorted."""
        return sorted({*self._loaded, *(self._root.names() if self._root is not None else ())})

    async def load(self, model_id: str) -> LoadedModel:
        """Load a model of the root, or reload one whose bundle has changed.

        Raises:
            ModelNotFoundError: there is no such folder.
            BundleError: it fails verification; the loaded models are unchanged.
            ModelInUseError: the new bundle has another space, and the model is active or pinned.
            StartupError: the provider cannot load it, for example for lack of memory.
        """
        async with self._load_lock:
            model = await self._load(model_id)
            await self._save()
            return model

    async def _load(self, model_id: str) -> LoadedModel:
        path, self._loading = self.root.find(model_id), model_id
        try:
            old = self._loaded.get(model_id)
            if old is not None and old.sha256 == await asyncio.to_thread(manifest_digest, path):
                return old
            new = await asyncio.to_thread(self._open, model_id, path)
            if old is not None and old.space.space_id != new.space.space_id:
                self._check_idle(old, "or load the new bundle under another name")
        except ReIDError as error:
            self._failed[model_id] = self.root.public_message(error)
            log.error("model %s cannot be loaded: %s", model_id, error)
            raise self.root.without_path(error) from error
        finally:
            self._loading = ""
        self._failed.pop(model_id, None)
        self._loaded[model_id] = new
        if old is not None:
            old.retire()
        return new

    async def activate(self, model_id: str, *, expected: str = "") -> tuple[LoadedModel, LoadedModel]:
        """Make a loaded model the default; returns it and the previous one.

        Raises:
            ModelNotFoundError: it is not loaded.
            ConflictError: the active model is not ``expected``.
        """
        if expected and expected != self._active:
            raise ConflictError(
                f"model {self._active} is active, expected {expected}: another caller switched first",
                field="expected_current_model_id",
                active_model_id=self._active,
            )
        found, previous = self._find(model_id), self.active
        self._active = model_id
        await self._save()
        log.info("model %s activated, previously %s", model_id, previous.model_id)
        return found, previous

    async def unload(self, model_id: str) -> LoadedModel:
        """Unload a model; its memory is freed when the last request that uses it has ended.

        Raises:
            ModelNotFoundError: it is not loaded.
            ModelInUseError: it is active, or a migration or a shadow uses it.
        """
        unloaded = self._find(model_id)
        self._check_idle(unloaded, "then unload it")
        del self._loaded[model_id]
        unloaded.retire()
        await self._save()
        return unloaded

    def _find(self, model_id: str) -> LoadedModel:
        if model_id in self._loaded:
            return self._loaded[model_id]
        if model_id == self._loading:
            raise ModelNotReadyError(f"model {model_id} is being loaded: retry later", field="model_id")
        raise ModelNotFoundError(
            f"model {model_id!r} is not loaded (loaded: {', '.join(sorted(self._loaded))}): load it first, or see "
            "ListModels",
            field="model_id",
            model=model_id,
        )

    def _check_idle(self, model: LoadedModel, action: str) -> None:
        if model.model_id == self._active:
            raise ModelInUseError(f"model {model.model_id} is active: activate another one, {action}")
        if model.pinned:
            raise ModelInUseError(
                f"a migration or a shadow uses model {model.model_id}: wait for it or cancel it, {action}"
            )

    async def _save(self) -> None:
        others = tuple(sorted(name for name in self._loaded if name != self._bundle))
        saved = SavedModels(self._bundle_sha256, self._active, others)
        async with self._save_lock:
            await asyncio.to_thread(self._saved_file.write, saved)

    def _open(self, model_id: str, path: Path) -> LoadedModel:
        bundle, settings = open_bundle(path, trusted_keys=self._keys), self._settings
        runtime = open_runtime(
            bundle,
            provider=settings.provider,
            precision=settings.precision,
            max_batch=settings.batch,
            threads=settings.inference_threads,
            device_id=settings.device_id,
            engine_cache=settings.engine_cache,
        )
        return LoadedModel(model_id, bundle, runtime, self._embedder)
