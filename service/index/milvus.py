"""Milvus as an index for galleries beyond one machine; SQLite remains the source of truth.

Only keys and features are sent to Milvus, into one Milvus collection per collection and space. Expiry, filters, tenants
and similarities are decided by the store, as for every index; exact searches read the features from the store, which is
slow.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Collection, Iterator
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np

from resight.arrays import Feature
from resight.errors import StartupError, UnavailableError
from resight.service.index.base import (
    CHUNK_ROWS,
    SPARE_CANDIDATES,
    Candidates,
    FeatureReader,
    merge_candidates,
    no_candidates,
    rescore_candidates,
)
from resight.service.index.flat import FlatIndex
from resight.service.index.half import Rows
from resight.service.storage.reads import Keys
from resight.service.storage.store import Store

if TYPE_CHECKING:
    from pymilvus import MilvusClient

log = logging.getLogger(__name__)

SCHEME = "milvus://"
TIMEOUT_S = 10.0
WRITE_ROWS = 1000  # per message: 2 MB at 512-d, far below Milvus' limit of 64 MB
MAX_LIMIT = 16_384  # Milvus' maximum topK
OVERFETCH = 2
# pymilvus pings every 10 s even when idle. gRPC servers treat more than two such pings in 5 minutes as an attack
# (GOAWAY, too_many_pings); milvus-lite and many proxies have this default. A call ends after TIMEOUT_S anyway.
CHANNEL_OPTIONS = {"grpc.keepalive_permit_without_calls": False}


def connect_milvus(address: str, token: str = "") -> MilvusClient:
    """A client for ``milvus://HOST:PORT``, ``https://…`` or, with milvus-lite, a file.

    Raises:
        StartupError: pymilvus is not installed, or Milvus cannot be reached.
    """
    try:
        from pymilvus import MilvusClient
    except ImportError as error:
        raise StartupError(f"gallery {address} needs pymilvus: install resight[milvus]") from error
    uri = f"http://{address.removeprefix(SCHEME)}" if address.startswith(SCHEME) else address
    try:
        return MilvusClient(uri=uri, token=token, timeout=TIMEOUT_S, grpc_options=CHANNEL_OPTIONS)
    except Exception as error:  # pymilvus raises grpc's, its own and built-in exceptions
        raise StartupError(
            f"Milvus at {address} cannot be reached ({type(error).__name__}): start it or use --gallery embedded"
        ) from error


def collection_name(store: Store, place: str = "") -> str:
    """The name of a Milvus collection; without ``place``, the common prefix of those of one data folder."""
    folder, own = (
        hashlib.blake2b(part, key=store.key[:64], digest_size=12).hexdigest() for part in (b"", place.encode())
    )
    return f"resight_{folder}_{own if place else ''}"


def drop_stale_collections(client: MilvusClient, store: Store, keep: Collection[str]) -> None:
    """Remove this data folder's Milvus collections except ``keep``: ours were deleted while Milvus was unreachable."""
    with _translate_errors():
        for name in client.list_collections():
            if name.startswith(collection_name(store)) and name not in keep:
                log.info("removing an unused Milvus collection name=%s", name)
                client.drop_collection(name)


@contextlib.contextmanager
def _translate_errors() -> Iterator[None]:
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except MilvusException as error:
        raise UnavailableError(
            f"Milvus failed (code {error.code}): nothing is lost, searches work again when it is available",
            retry_after_s=1.0,
        ) from error


class MilvusIndex:
    """A `resight.service.index.base.VectorIndex` in Milvus.

    Args:
        client: from `connect_milvus`.
        reader: its store's key is part of the Milvus collection's name, so that two data folders never share one.
    """

    kind, approximate, tail, tombstones = "milvus", True, 0, 0

    def __init__(self, client: MilvusClient, reader: FeatureReader) -> None:
        self._client, self._reader = client, reader
        self.name = collection_name(reader.store, f"{reader.collection.key}/{reader.space.space_id}")
        self._rows = Rows()
        self.revision = -1

    def __len__(self) -> int:
        return self._rows.filled - self._rows.deleted

    @property
    def nbytes(self) -> int:
        """Memory of this process in bytes: keys only."""
        return self._rows.nbytes

    def reconcile(self, stop: Event) -> None:
        """Make Milvus' content equal to the store's: send missing features and delete those without an entry.

        Raises:
            UnavailableError: Milvus failed, or ``stop`` was set.
        """
        self.revision = self._reader.revision()
        with _translate_errors():
            self._create()
            existing = self._existing_keys()
        stored = [np.empty(0, np.int64)]
        for keys, features in self._reader.chunks(stop):
            missing = ~np.isin(keys, existing)
            self._upsert(keys[missing], features[missing])
            stored.append(keys)
        self._rows = Rows()
        self._rows.append(np.concatenate(stored))
        self._delete(existing[~np.isin(existing, self._rows.keys)])

    def _create(self) -> None:
        from pymilvus import DataType

        if self._client.has_collection(self.name):
            self._client.load_collection(self.name)
            return
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("key", DataType.INT64, is_primary=True)
        schema.add_field("feature", DataType.FLOAT_VECTOR, dim=self._reader.space.dim)
        index = self._client.prepare_index_params()
        index.add_index("feature", index_type="AUTOINDEX", metric_type="IP")
        # Strong: a caller finds what it has just enrolled; with Milvus' default a search may lag behind.
        self._client.create_collection(self.name, schema=schema, index_params=index, consistency_level="Strong")

    def _existing_keys(self) -> Keys:
        found, after = [np.empty(0, np.int64)], -1
        while True:  # not with Milvus' iterator, which stops at an offset of 16384 in some versions
            rows = self._client.query(self.name, filter=f"key > {after}", output_fields=["key"], limit=MAX_LIMIT)
            if not rows:
                return np.unique(np.concatenate(found))
            found.append(np.array([row["key"] for row in rows], np.int64))
            after = int(found[-1].max())

    def add(self, keys: Keys, features: Feature) -> bool:
        """Send features to Milvus; see `resight.service.index.base.VectorIndex.add`."""
        new = keys > (self._rows.keys[-1] if self._rows.filled else -1)
        if not self._rows.contains_all(keys[~new]):
            return False
        self._upsert(keys[new], features[new])
        self._rows.append(keys[new])
        return True

    def remove(self, keys: Keys) -> None:
        """Delete entries in Milvus, which frees their space when it compacts."""
        rows = self._rows.find(keys)
        self._delete(self._rows.keys[rows])
        self._rows.mark_deleted(rows)

    def _upsert(self, keys: Keys, features: Feature) -> None:
        with _translate_errors():
            for start in range(0, len(keys), WRITE_ROWS):
                part = slice(start, start + WRITE_ROWS)
                pairs = zip(keys[part].tolist(), features[part], strict=True)
                self._client.upsert(self.name, [{"key": key, "feature": feature} for key, feature in pairs])

    def _delete(self, keys: Keys) -> None:
        with _translate_errors():
            for start in range(0, len(keys), WRITE_ROWS):
                self._client.delete(self.name, ids=keys[start : start + WRITE_ROWS].tolist())

    def drop(self) -> None:
        """Remove the Milvus collection."""
        with _translate_errors():
            self._client.drop_collection(self.name)

    def vectors(self, keys: Keys) -> tuple[Keys, Feature]:
        """Those of ``keys`` that the store has, and their float32 features."""
        return self._reader.vectors(keys)

    def search(self, queries: Feature, k: int, *, among: Keys | None = None, exact: bool = False) -> list[Candidates]:
        """The k nearest entries of each query; see `resight.service.index.base.VectorIndex.search`."""
        if among is not None:
            return self._search_exactly(queries, k, among[np.isin(among, self._rows.live_keys)])
        if exact or OVERFETCH * k + SPARE_CANDIDATES > MAX_LIMIT:
            return self._search_exactly(queries, k, self._rows.live_keys)
        if not len(self):
            return no_candidates(queries)
        with _translate_errors():
            results: Any = self._client.search(
                self.name,
                data=list(queries),
                anns_field="feature",
                limit=OVERFETCH * k + SPARE_CANDIDATES,
                output_fields=["key"],
                search_params={"metric_type": "IP"},
                consistency_level="Strong",
            )
        candidates = [np.unique(np.array([hit["key"] for hit in hits], np.int64)) for hits in results]
        return rescore_candidates(queries, candidates, self._reader.vectors, k)

    def _search_exactly(self, queries: Feature, k: int, keys: Keys) -> list[Candidates]:
        """The k nearest among ``keys``, by the features in the store, read in chunks."""
        parts = [no_candidates(queries)]
        for start in range(0, len(keys), CHUNK_ROWS):
            chunk = FlatIndex(self._reader.space.dim)
            chunk.add(*self._reader.vectors(keys[start : start + CHUNK_ROWS]))
            parts.append(chunk.search(queries, k))
            parts = [merge_candidates(parts, k)]
        return parts[0]
