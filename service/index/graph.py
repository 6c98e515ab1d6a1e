"""The index of the largest collections: an immutable HNSW graph over float16 rows, plus a scanned tail of newer rows.

faiss's HNSW does not support removal, and adding takes milliseconds per entry. So the graph is built in the background
and never changed: removed entries become tombstones, and new ones are searched exactly in the tail.

`GraphFiles` saves graphs, so that a restart need not rebuild them. The files are a private cache with keys and links,
but no features: those are only in the database, where a deletion erases them. A file with any inconsistency is deleted,
and the graph is built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np

from resight.arrays import Feature
from resight.errors import FormatError
from resight.service.index.base import (
    SPARE_CANDIDATES,
    Candidates,
    FeatureLookup,
    merge_candidates,
    no_candidates,
    rescore_candidates,
)
from resight.service.index.half import HalfIndex
from resight.service.records import Collection, Space
from resight.service.storage.reads import Keys

# M and efConstruction of the design's measurements (100 k x 512: recall@10 1.0 on clustered features).
LINKS, EF_CONSTRUCTION = 32, 200
EF_SEARCH = (64, 128, 256, 512)  # tried in turn until the recall is high enough
OVERFETCH = 2  # to make up for float16 rounding and tombstones


def empty_graph(dim: int) -> faiss.IndexHNSWSQ:
    """An empty graph, which stores float16 rows."""
    rounded = faiss.ScalarQuantizer.QT_fp16
    graph = faiss.IndexHNSWSQ(dim, rounded, LINKS, faiss.METRIC_INNER_PRODUCT)  # type: ignore[arg-type]
    graph.hnsw.efConstruction = EF_CONSTRUCTION
    graph.is_trained = True  # float16 needs no training, which the wrapper does not know
    return graph


class GraphIndex:
    """A `resight.service.index.base.VectorIndex` that searches a graph; exact search scans its rows instead.

    Args:
        graph: over the features of ``keys``, in their order.
        keys: of the graph's rows, ascending.
        deleted: those of ``keys`` that remain in the graph only for its links.
        lookup: reads the float32 features from the store.
    """

    kind, approximate = "hnsw", True

    def __init__(self, graph: faiss.IndexHNSWSQ, keys: Keys, deleted: Keys, lookup: FeatureLookup) -> None:
        self.graph, self.ef = graph, EF_SEARCH[0]
        codes = faiss.downcast_index(graph.storage)
        self.sealed = HalfIndex(graph.d, lookup, codes)  # type: ignore[arg-type]  # an IndexScalarQuantizer
        self.sealed.rows.append(keys)
        self.sealed.remove(deleted)
        self.recent = HalfIndex(graph.d, lookup)
        self._lookup = lookup
        self.revision = -1

    def __len__(self) -> int:
        return len(self.sealed) + len(self.recent)

    @property
    def tail(self) -> int:
        """Number of rows outside the graph."""
        return self.recent.rows.filled

    @property
    def tombstones(self) -> int:
        """Number of removed rows that still use memory."""
        return self.sealed.tombstones + self.recent.tombstones

    @property
    def nbytes(self) -> int:
        """Memory in bytes: rows, and the links as faiss stores them (4 bytes each, 2 M on the lowest level)."""
        return self.sealed.nbytes + self.recent.nbytes + 4 * int(self.graph.hnsw.neighbors.size())  # type: ignore[attr-defined]

    def add(self, keys: Keys, features: Feature) -> bool:
        """Append to the tail; see `resight.service.index.base.VectorIndex.add`."""
        new = keys > (self.sealed.rows.keys[-1] if self.sealed.rows.filled else -1)
        return self.sealed.rows.contains_all(keys[~new]) and self.recent.add(keys[new], features[new])

    def remove(self, keys: Keys) -> None:
        """Turn entries into tombstones; unknown keys are no error."""
        self.sealed.remove(keys)
        self.recent.remove(keys)

    def vectors(self, keys: Keys) -> tuple[Keys, Feature]:
        """Those of ``keys`` that the store has, and their float32 features."""
        return self._lookup(keys)

    def search(self, queries: Feature, k: int, *, among: Keys | None = None, exact: bool = False) -> list[Candidates]:
        """The k nearest entries of each query; see `resight.service.index.base.VectorIndex.search`."""
        if exact or among is not None:
            parts = [part.search(queries, k, among=among) for part in (self.sealed, self.recent)]
        else:
            parts = [self.search_graph(queries, k), self.recent.search(queries, k)]
        return merge_candidates(parts, k)

    def search_graph(self, queries: Feature, k: int) -> list[Candidates]:
        """The k nearest entries of each query that the graph finds, without the tail."""
        fetch = min(OVERFETCH * k + SPARE_CANDIDATES, len(self.sealed))
        if not fetch:
            return no_candidates(queries)
        # bounded_queue stays on: without it faiss 1.15 ignores the selector (issue #5504).
        parameters = faiss.SearchParametersHNSW(efSearch=max(self.ef, fetch))  # type: ignore[attr-defined]
        selector = self.sealed.rows.selector(None)
        if selector is not None:
            parameters.sel = selector
        _, found = self.graph.search(queries, fetch, params=parameters)
        return rescore_candidates(queries, [self.sealed.rows.keys[own[own >= 0]] for own in found], self._lookup, k)


log = logging.getLogger(__name__)

GRAPH_FOLDER = "index"
MAGIC, FORMAT = b"RSGTSEG\n", 1
MAX_HEADER = 4096  # bytes; a typical one has 400


class GraphSegment(NamedTuple):
    """A graph without its rows, the keys of the rows in their order, and the revision at which they were read."""

    keys: Keys
    graph: faiss.IndexHNSWSQ
    revision: int


class GraphFiles:
    """The graph files of one gallery, in the sub-folder `GRAPH_FOLDER` of its folder; created when first needed."""

    def __init__(self, data: Path) -> None:
        self._folder = data / GRAPH_FOLDER

    def _path(self, collection: Collection, space: Space) -> Path:
        name = hashlib.sha256(space.space_id.encode()).hexdigest()[:16]  # a space id may not be a valid file name
        return self._folder / f"{collection.key}-{name}.graph"

    def save(self, collection: Collection, space: Space, segment: GraphSegment) -> None:
        """Write a graph atomically. On a full disk it is not saved, and the next start takes longer."""
        writer = faiss.VectorIOWriter()
        faiss.write_index(segment.graph, writer, faiss.IO_FLAG_SKIP_STORAGE)
        body = segment.keys.astype("<i8").tobytes() + faiss.vector_to_array(writer.data).tobytes()
        header = json.dumps(_header(collection, space, segment.keys, segment.revision) | {"sha256": _digest(body)})
        path = self._path(collection, space)
        temporary = path.with_suffix(".tmp")
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(MAGIC + len(header).to_bytes(4, "little") + header.encode() + body)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            log.warning("the graph of %s is not saved (%s); the next start builds it again", collection.name, error)
            with contextlib.suppress(OSError):
                temporary.unlink()

    def load(self, collection: Collection, space: Space) -> GraphSegment | None:
        """The saved graph of a collection in a space, or None; an invalid file is deleted."""
        path = self._path(collection, space)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            with os.fdopen(descriptor, "rb") as file:
                return _read(file.read(), collection, space)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, FormatError) as error:
            log.warning("the saved graph of %s is deleted and built again: %s", collection.name, error)
            self.delete(collection, space)
            return None

    def delete(self, collection: Collection, space: Space | None = None) -> None:
        """Delete a collection's graph in one space, or in all."""
        found = [self._path(collection, space)] if space else list(self._folder.glob(f"{collection.key}-*.graph"))
        for path in found:
            with contextlib.suppress(OSError):
                path.unlink()


def is_intact(path: Path) -> bool:
    """Whether a saved graph matches its checksum; reads the file only, and never deletes it."""
    try:
        data = path.read_bytes()
        start = len(MAGIC) + 4
        length = int.from_bytes(data[len(MAGIC) : start], "little")
        header = json.loads(data[start : start + length])
        return data[: len(MAGIC)] == MAGIC and bool(header["sha256"] == _digest(data[start + length :]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _header(collection: Collection, space: Space, keys: Keys, revision: int) -> dict[str, object]:
    """The expected header, without the digest of the body."""
    return {
        "format": FORMAT,
        "collection": collection.key,
        "space_id": space.space_id,
        "dim": space.dim,
        "max_rev": revision,
        "count": len(keys),
        "ids_sha256": _digest(keys.astype("<i8").tobytes()),
        "faiss": faiss.__version__,
    }


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _read(data: bytes, collection: Collection, space: Space) -> GraphSegment:
    """Parse a graph file.

    Raises:
        FormatError: it is damaged, of another format, or of another collection, space or version of faiss.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise FormatError(f"it does not begin with {MAGIC!r}")
    start = len(MAGIC) + 4
    length = int.from_bytes(data[len(MAGIC) : start], "little")
    if not 0 < length <= MAX_HEADER:
        raise FormatError(f"a header of {length} bytes, at most {MAX_HEADER} expected")
    header, body = json.loads(data[start : start + length]), data[start + length :]
    if header.pop("sha256") != _digest(body):  # before faiss reads a byte of it
        raise FormatError("its checksum does not match")
    count, revision = int(header["count"]), int(header["max_rev"])
    keys = np.frombuffer(body, "<i8", count).astype(np.int64)
    if header != _header(collection, space, keys, revision):
        raise FormatError(f"its header {header} is of another collection, space or version of faiss")
    graph = faiss.deserialize_index(np.frombuffer(body, np.uint8, offset=8 * count))
    if not isinstance(graph, faiss.IndexHNSWSQ) or graph.d != space.dim or graph.ntotal != count:
        raise FormatError(f"it holds a {type(graph).__name__}, expected a graph of {count} rows of {space.dim}")
    if count and not bool((np.diff(keys) > 0).all()):
        raise FormatError("its keys are not in ascending order")
    return GraphSegment(keys, graph, revision)
