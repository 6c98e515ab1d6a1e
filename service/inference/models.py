"""The models of a server: loaded beside the active one, switched at once, freed when the last request ends.

A model is a bundle in a folder of the model root; a request names it, never a path. Loading verifies every byte and
signature, treats the graph as hostile, runs the probes and warms up, all in a thread, and changes nothing until it has
succeeded. A request leases the model it begins with and ends on it. A file in the data folder remembers which models
were loaded.
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

    def public_message(self, error: ReIDError) -> str:
        """An error's text without the server's paths."""
        return str(error).replace(f"{self.path}{os.sep}", "").replace(str(self.path), "the folder of models")

    def without_path(self, error: ReIDError) -> ReIDError:
        """The same error for the other side."""
        told = type(error)(self.public_message(error), field=error.field)
        told.facts = error.facts
        return told


@dataclass(frozen=True)
class SavedModels:
    """What was loaded when it was last noted.

    Attributes:
        bundle: SHA-256 of the manifest of the bundle that the server was started with; empty = nothing was noted.
        active: the active model.
        loaded: the others of the root.
    """

    bundle: str = ""
    active: str = ""
    loaded: tuple[str, ...] = ()


class ModelsFile:
    """``models.json`` of a data folder, written whole and at once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / MODELS_FILE

    def read(self) -> SavedModels:
        """What was noted; nothing where there is no file.

        Raises:
            FormatError: it is damaged.
        """
        if not self.path.exists():
            return SavedModels()
        try:
            told = json.loads(read_plain(self.path, MAX_MODELS_FILE))
            found = SavedModels(told["bundle"], told["active"], tuple(told["loaded"]))
            if not all(isinstance(text, str) for text in (found.bundle, found.active, *found.loaded)):
                raise TypeError("not text")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise FormatError(
                f"{self.path} is damaged ({error}): remove it, and the server begins with its --bundle"
            ) from error
        return found

    def write(self, noted: SavedModels) -> None:
        """Note it; a server that starts reads the old or the new one."""
        text = json.dumps({"bundle": noted.bundle, "active": noted.active, "loaded": list(noted.loaded)})
        write_atomic(self.path, text.encode(), mode=0o600)


log = logging.getLogger(__name__)


class ModelState(StrEnum):
    """As ``ModelState`` in model.proto."""

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
    """One loaded model. Embed with it between `lease` and its end.

    Attributes:
        sha256: of the manifest, which names every other file's.
    """

    def __init__(self, model_id: str, bundle: Bundle, runtime: Runtime, embedder: Embedder) -> None:
        self.model_id, self.manifest, self.space = model_id, bundle.manifest, space_of_manifest(bundle.manifest)
        self.sha256 = manifest_digest(bundle.path)
        self.provider, self.max_batch, self.min_cosine = runtime.provider, runtime.max_batch, runtime.min_cosine
        self._runtime: Runtime | None = runtime
        self._embedder, self._leases, self._pins, self._retired = embedder, 0, 0, False

    @property
    def freed(self) -> bool:
        """Whether its memory was given back."""
        return self._runtime is None

    @property
    def pinned(self) -> bool:
        """Whether something that lasts needs it."""
        return self._pins > 0

    @contextlib.contextmanager
    def lease(self, *, pin: bool = False) -> Iterator[LoadedModel]:
        """Keep it alive within the block; with ``pin`` it cannot be unloaded either."""
        self._leases += 1
        self._pins += pin
        try:
            yield self
        finally:
            self._leases -= 1
            self._pins -= pin
            self._free()

    def retire(self) -> None:
        """Free it as soon as nobody uses it."""
        self._retired = True
        self._free()

    def _free(self) -> None:
        if self._retired and not self._leases and self._runtime is not None:
            self._runtime = None
            log.info("freed model=%s sha256=%s", self.model_id, self.sha256[:12])

    async def embed(
        self, crops: Sequence[bytes], deadline: float, *, priority: Priority = Priority.INTERACTIVE
    ) -> list[Embedded | ReIDError]:
        """Embed crops, as `Embedder.embed` does. Only its lessees may."""
        assert self._runtime is not None
        return await self._embedder.embed(self._runtime, crops, deadline, priority=priority)


@dataclass(frozen=True)
class ModelStatus:
    """A model as it stands. What is not loaded has a manifest that was read, not verified.

    Attributes:
        manifest: None when it cannot be read.
        loaded: None unless READY.
        problem: why it is FAILED.
    """

    model_id: str
    state: ModelState
    manifest: Manifest | None = None
    sha256: str = ""
    loaded: LoadedModel | None = None
    active: bool = False
    problem: str = ""


class ModelHost:
    """All models of one server. Everything but the loading itself happens in the event loop's thread.

    Args:
        embedder: runs them.
        settings: names the bundle to begin with, the root, the keys and the provider.
        folder: remembers which models were loaded.
    """

    def __init__(self, embedder: Embedder, settings: Settings, folder: Path) -> None:
        self._embedder, self._settings = embedder, settings
        self._root = None if settings.models is None else ModelRoot(settings.models)
        self._keys = load_public_keys(settings.trusted_keys)
        self._memory = ModelsFile(folder)
        self._loaded: dict[str, LoadedModel] = {}
        self._failed: dict[str, str] = {}
        self._loading, self._one, self._noting = "", asyncio.Lock(), asyncio.Lock()
        self._active, self._bundle, self._first = "", "", ""  # names, and the manifest it was started with

    @property
    def active(self) -> LoadedModel:
        """The model that embeds what names none."""
        return self._loaded[self._active]

    @property
    def root(self) -> ModelRoot:
        """The folder of models; raises ModelNotFoundError where the server has none."""
        if self._root is None:
            raise ModelNotFoundError("this server has no folder of models: start it with --models FOLDER")
        return self._root

    async def start(self) -> None:
        """Load the bundle of the settings, and what was loaded and active when the server stopped.

        A model that was loaded and cannot be any more is told as FAILED; one that was active is an error.

        Raises:
            BundleError: the bundle, or the model that was active, does not prove itself.
            StartupError: the provider cannot be started, or the bundle has the name of another one in the root.
        """
        path = self._settings.bundle
        first = await asyncio.to_thread(self._open, "", path)
        own = self._root is not None and path.resolve().parent == self._root.path
        first.model_id = path.resolve().name if own else first.manifest.name
        if self._root is not None and not own and (self._root.path / first.model_id).exists():
            raise StartupError(
                f"bundle {path} is called {first.model_id}, and so is another one in {self._root.path}: give the "
                "latter to --bundle, or rename its folder"
            )
        self._loaded[first.model_id] = first
        self._active, self._bundle, self._first = first.model_id, first.model_id, first.sha256
        memory = self._memory.read()
        for model_id in memory.loaded if self._root is not None else ():
            if model_id not in self._loaded:
                with contextlib.suppress(ReIDError):
                    await self._load(model_id)
        if memory.active and memory.bundle == first.sha256:  # else another bundle was named since: that counts
            if memory.active not in self._loaded:
                raise BundleError(
                    f"model {memory.active} was active when the server stopped and cannot be loaded now "
                    f"({self._failed.get(memory.active, 'there is no folder of models')}): put it right, or remove "
                    f"{self._memory.path} to begin with {path}"
                )
            self._active = memory.active
        if memory != SavedModels():  # what was named last is what counts
            await self._remember()
        log.info("models loaded=%s active=%s", ",".join(sorted(self._loaded)), self._active)

    @contextlib.contextmanager
    def lease(self, model_id: str = "", *, pin: bool = False) -> Iterator[LoadedModel]:
        """A model by name, empty = the active one, for the time of the block.

        Raises:
            ModelNotFoundError: none of that name is loaded.
            ModelNotReadyError: it is being loaded.
        """
        with self._find(model_id or self._active).lease(pin=pin) as found:
            yield found

    def model_of_space(self, space_id: str) -> LoadedModel | None:
        """A loaded model whose features are of a space, the active one before others."""
        loaded = sorted(self._loaded.values(), key=lambda model: model.model_id != self._active)
        return next((model for model in loaded if model.space.space_id == space_id), None)

    @contextlib.contextmanager
    def lease_space(self, space: Space, *, collection: str) -> Iterator[LoadedModel]:
        """A model that embeds into a collection's space, for the time of the block.

        Raises:
            SpaceMismatchError: none is loaded.
        """
        found = self.model_of_space(space.space_id)
        if found is None:
            now = self.active.space
            raise SpaceMismatchError(
                f"collection {collection} holds features of model {space.model_id} (space {space.space_id}), this "
                f"server embeds with {now.model_id} (space {now.space_id}): serve that model, load it beside, migrate "
                "the collection, or enrol the crops in a new one",
                field="collection_id",
                expected_space_id=space.space_id,
                found_space_id=now.space_id,
            )
        with found.lease():
            yield found

    def status(self, model_id: str) -> ModelStatus:
        """One model as it stands.

        Raises:
            ModelNotFoundError: neither loaded nor in the root.
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
        """A loaded model as it stands."""
        name = model.model_id
        state = ModelState.LOADING if self._loading == name else ModelState.READY
        problem = self._failed.get(name, "")  # of a newer bundle under the same name
        return ModelStatus(name, state, model.manifest, model.sha256, model, name == self._active, problem)

    def names(self) -> list[str]:
        """All models, loaded or in the root, by name."""
        return sorted({*self._loaded, *(self._root.names() if self._root is not None else ())})

    async def load(self, model_id: str) -> LoadedModel:
        """Load a model of the root beside the others, or the newer bundle under the name of a loaded one.

        Raises:
            ModelNotFoundError: no such folder.
            BundleError: it does not prove itself; what was loaded stays.
            ModelInUseError: it would change the space of the active model, or of one a migration needs.
            StartupError: the provider has no room for it.
        """
        async with self._one:
            model = await self._load(model_id)
            await self._remember()
            return model

    async def _load(self, model_id: str) -> LoadedModel:
        path, self._loading = self.root.find(model_id), model_id
        try:
            old = self._loaded.get(model_id)
            if old is not None and old.sha256 == await asyncio.to_thread(manifest_digest, path):
                return old
            new = await asyncio.to_thread(self._open, model_id, path)
            if old is not None and old.space.space_id != new.space.space_id:
                self._check_idle(old, "load the new one under another name")
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
        """Let a loaded model embed what names none; returns it and the one before.

        Raises:
            ModelNotFoundError: it is not loaded.
            ConflictError: another than ``expected`` is active.
        """
        if expected and expected != self._active:
            raise ConflictError(
                f"model {self._active} is active, expected {expected}: somebody switched first",
                field="expected_current_model_id",
                active_model_id=self._active,
            )
        found, previous = self._find(model_id), self.active
        self._active = model_id
        await self._remember()
        log.info("model %s is active, %s was", model_id, previous.model_id)
        return found, previous

    async def unload(self, model_id: str) -> LoadedModel:
        """Let a model go; its memory is free when the last request that began with it has ended.

        Raises:
            ModelNotFoundError: it is not loaded.
            ModelInUseError: it is the active one, or a migration or a shadow needs it.
        """
        gone = self._find(model_id)
        self._check_idle(gone, "unload it then")
        del self._loaded[model_id]
        gone.retire()
        await self._remember()
        return gone

    def _find(self, model_id: str) -> LoadedModel:
        if model_id in self._loaded:
            return self._loaded[model_id]
        if model_id == self._loading:
            raise ModelNotReadyError(f"model {model_id} is being loaded: try again in a moment", field="model_id")
        raise ModelNotFoundError(
            f"model {model_id!r} is not loaded, only {', '.join(sorted(self._loaded))}: load it first, or see "
            "ListModels",
            field="model_id",
            model=model_id,
        )

    def _check_idle(self, model: LoadedModel, then: str) -> None:
        if model.model_id == self._active:
            raise ModelInUseError(f"model {model.model_id} is active: activate another one, and {then}")
        if model.pinned:
            raise ModelInUseError(
                f"a migration or a shadow needs model {model.model_id}: wait for it or cancel it, and {then}"
            )

    async def _remember(self) -> None:
        others = tuple(sorted(name for name in self._loaded if name != self._bundle))
        noted = SavedModels(self._first, self._active, others)
        async with self._noting:
            await asyncio.to_thread(self._memory.write, noted)

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
