"""One model of a server: what it is, and a lease for as long as a request uses it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from resight.bundle import Bundle
from resight.errors import ReIDError
from resight.manifest import Manifest
from resight.service.embedder import Embedded, Embedder
from resight.service.entries import Space
from resight.service.lanes import Priority
from resight.service.model_root import digest_of
from resight.service.runtime import Runtime

log = logging.getLogger(__name__)


class ModelState(StrEnum):
    """As ``ModelState`` in model.proto."""

    AVAILABLE = "available"
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


def space_of(manifest: Manifest) -> Space:
    """The space of a bundle's features."""
    return Space(
        manifest.space_id, manifest.name, manifest.feature_dim, manifest.created, calibration=manifest.calibration
    )


class Model:
    """One loaded model. Embed with it between `lease` and its end.

    Attributes:
        sha256: of the manifest, which names every other file's.
    """

    def __init__(self, model_id: str, bundle: Bundle, runtime: Runtime, embedder: Embedder) -> None:
        self.model_id, self.manifest, self.space = model_id, bundle.manifest, space_of(bundle.manifest)
        self.sha256 = digest_of(bundle.path)
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
    def lease(self, *, pin: bool = False) -> Iterator[Model]:
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
class ModelInfo:
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
    loaded: Model | None = None
    active: bool = False
    problem: str = ""
