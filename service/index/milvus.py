"""Milvus as another finder of candidates, for galleries beyond one machine; SQLite stays the truth.

Only keys and features go there, one Milvus collection for each of ours and each space. Expiry, filters, tenants and
similarities are the store's word, as for every index; exact searches read the store's own features, slowly.
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
WRITE_ROWS = 1000  # of one message: 2 MB at 512-d, far below Milvus' 64 MB
MAX_LIMIT = 16_384  # Milvus' own largest topK
OVERFETCH = 2
# pymilvus pings every 10 s even while nothing is called. gRPC's servers take that, more than twice in 5 minutes, for an
# attack (GOAWAY, too_many_pings); milvus-lite and many proxies have this default. A call ends after TIMEOUT_S anyway.
CHANNEL_OPTIONS = {"grpc.keepalive_permit_without_calls": False}


def connect_milvus(address: str, token: str = "") -> MilvusClient:
    """A client of ``milvus://HOST:PORT``, ``https://…`` or, for milvus-lite, of a file.

    Raises:
        StartupError: pymilvus is not installed, or nothing answers there.
    """
    try:
        from pymilvus import MilvusClient
    except ImportError as error:
        raise StartupError(f"gallery {address} needs pymilvus: install resight[milvus]") from error
    uri = f"http://{address.removeprefix(SCHEME)}" if address.startswith(SCHEME) else address
    try:
        return MilvusClient(uri=uri, token=token, timeout=TIMEOUT_S, grpc_options=CHANNEL_OPTIONS)
    except Exception as error:  # pymilvus raises grpc's, its own and plain ones
        raise StartupError(
            f"Milvus at {address} cannot be reached ({type(error).__name__}): start it or use --gallery embedded"
        ) from error


def collection_name(store: Store, place: str = "") -> str:
    """A Milvus collection's name; without a place, what those of one data folder begin with."""
    folder, own = (
        hashlib.blake2b(part, key=store.key[:64], digest_size=12).hexdigest() for part in (b"", place.encode())
    )
    return f"resight_{folder}_{own if place else ''}"


def drop_stale_collections(client: MilvusClient, store: Store, keep: Collection[str]) -> None:
    """Remove this data folder's Milvus collections but those to keep: their own was deleted while Milvus was away."""
    with _translate_errors():
        for name in client.list_collections():
            if name.startswith(collection_name(store)) and name not in keep:
                log.info("a Milvus collection without an owner is removed name=%s", name)
                client.drop_collection(name)


@contextlib.contextmanager
def _translate_errors() -> Iterator[None]:
    from pymilvus.exceptions import MilvusException

    try:
        yield
    except MilvusException as error:
        raise UnavailableError(
            f"Milvus did not answer (code {error.code}): nothing is lost, searches work again when it is back",
            retry_after_s=1.0,
        ) from error


class MilvusIndex:
    """A `resight.service.index.base.VectorIndex` on another machine.

    Args:
        client: of `connect_milvus`.
        feed: of the store; also names the Milvus collection, so that two data folders never share one.
    """

    kind, approximate, tail, tombstones = "milvus", True, 0, 0

    def __init__(self, client: MilvusClient, feed: FeatureReader) -> None:
        self._client, self._feed = client, feed
        self.name = collection_name(feed.store, f"{feed.collection.key}/{feed.space.space_id}")
        self._rows = Rows()
        self.revision = -1

    def __len__(self) -> int:
        return self._rows.filled - self._rows.dead

    @property
    def nbytes(self) -> int:
        """Memory here, in bytes: keys only."""
        return self._rows.nbytes

    def reconcile(self, stop: Event) -> None:
        """Bring Milvus to what the store holds, whatever it held: missing features go there, others are deleted.

        Raises:
            UnavailableError: Milvus does not answer, or ``stop`` was set.
        """
        self.revision = self._feed.revision()
        with _translate_errors():
            self._create()
            there = self._keys_there()
        held = [np.empty(0, np.int64)]
        for keys, features in self._feed.pieces(stop):
            missing = ~np.isin(keys, there)
            self._upsert(keys[missing], features[missing])
            held.append(keys)
        self._rows = Rows()
        self._rows.append(np.concatenate(held))
        self._delete(there[~np.isin(there, self._rows.keys)])

    def _create(self) -> None:
        from pymilvus import DataType

        if self._client.has_collection(self.name):
            self._client.load_collection(self.name)
            return
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("key", DataType.INT64, is_primary=True)
        schema.add_field("feature", DataType.FLOAT_VECTOR, dim=self._feed.space.dim)
        index = self._client.prepare_index_params()
        index.add_index("feature", index_type="AUTOINDEX", metric_type="IP")
        # Strong: a caller finds what it has enrolled; Milvus' default lets a search lag behind.
        self._client.create_collection(self.name, schema=schema, index_params=index, consistency_level="Strong")

    def _keys_there(self) -> Keys:
        found, after = [np.empty(0, np.int64)], -1
        while True:  # by key, and not by its iterator, which stops at an offset of 16384 on some versions
            rows = self._client.query(self.name, filter=f"key > {after}", output_fields=["key"], limit=MAX_LIMIT)
            if not rows:
                return np.unique(np.concatenate(found))
            found.append(np.array([row["key"] for row in rows], np.int64))
            after = int(found[-1].max())

    def add(self, keys: Keys, features: Feature) -> bool:
        """Send features there; see `resight.service.index.base.VectorIndex.add`."""
        new = keys > (self._rows.keys[-1] if self._rows.filled else -1)
        if not self._rows.contains(keys[~new]):
            return False
        self._upsert(keys[new], features[new])
        self._rows.append(keys[new])
        return True

    def remove(self, keys: Keys) -> None:
        """Take entries out there; Milvus frees their room when it compacts."""
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
        """From the store, whole."""
        return self._feed.vectors(keys)

    def search(self, queries: Feature, k: int, *, among: Keys | None = None, exact: bool = False) -> list[Candidates]:
        """The k nearest of each query; see `resight.service.index.base.VectorIndex.search`."""
        if among is not None:
            return self._compared(queries, k, among[np.isin(among, self._rows.live_keys)])
        if exact or OVERFETCH * k + SPARE_CANDIDATES > MAX_LIMIT:
            return self._compared(queries, k, self._rows.live_keys)
        if not len(self):
            return no_candidates(queries)
        with _translate_errors():
            answers: Any = self._client.search(
                self.name,
                data=list(queries),
                anns_field="feature",
                limit=OVERFETCH * k + SPARE_CANDIDATES,
                output_fields=["key"],
                search_params={"metric_type": "IP"},
                consistency_level="Strong",
            )
        candidates = [np.unique(np.array([hit["key"] for hit in hits], np.int64)) for hits in answers]
        return rescore_candidates(queries, candidates, self._feed.vectors, k)

    def _compared(self, queries: Feature, k: int, keys: Keys) -> list[Candidates]:
        """Every one of some keys, by the features in the store, in pieces."""
        parts = [no_candidates(queries)]
        for start in range(0, len(keys), CHUNK_ROWS):
            piece = FlatIndex(self._feed.space.dim)
            piece.add(*self._feed.vectors(keys[start : start + CHUNK_ROWS]))
            parts.append(piece.search(queries, k))
            parts = [merge_candidates(parts, k)]
        return parts[0]
