"""Build an index from the store; an approximate one is used only if its measured recall is high enough.

Can run in any thread: nothing here touches an index that is being searched.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from threading import Event

import faiss
import numpy as np

from resight.arrays import Feature
from resight.machine import cores
from resight.service.index.base import CHUNK_ROWS, FeatureReader, IndexKind, IndexPolicy, VectorIndex, check_filters
from resight.service.index.flat import FlatIndex
from resight.service.index.graph import EF_SEARCH, GraphFiles, GraphIndex, GraphSegment, empty_graph
from resight.service.index.half import HalfIndex
from resight.service.storage.reads import Keys

log = logging.getLogger(__name__)

GRAPH_CHUNK_ROWS = 512  # entries added to a graph between two checks of ``stop``: up to 3 s at 512-d
RECALL_QUERIES = 500  # entries of the collection that are left out of the graph, as queries to measure its recall
NEIGHBOURS = 10  # the k of the measured recall at k
RECALL_BATCH = 50  # queries


@dataclass(frozen=True)
class BuiltIndex:
    """An index of the store's content at ``index.revision``; ``note``: why it is not of the requested kind."""

    index: VectorIndex
    note: str = ""


def check_index_filters(dim: int) -> None:
    """Check the filters of every kind built here; raises StartupError when one ignores them."""
    half = HalfIndex(dim, lambda keys: (keys, np.empty((0, dim), np.float32))).codes
    check_filters(
        {
            "flat": (faiss.IndexFlatIP(dim), faiss.SearchParameters),
            "flat-fp16": (half, faiss.SearchParameters),
            "hnsw": (empty_graph(dim), faiss.SearchParametersHNSW),  # type: ignore[attr-defined]
        }
    )


def build_index(reader: FeatureReader, kind: IndexKind, policy: IndexPolicy, stop: Event) -> BuiltIndex:
    """Read a collection and index it; an approximate index of too low recall is replaced by an exact one.

    Raises:
        CollectionNotFoundError: it was deleted in the meantime.
        UnavailableError: ``stop`` was set.
    """
    started = time.monotonic()
    built = _graph_or_scan(reader, policy, stop) if kind == "hnsw" else BuiltIndex(build_scan(reader, kind, stop))
    log.info(
        "index built collection=%s kind=%s entries=%d seconds=%.2f",
        reader.collection.name,
        built.index.kind,
        len(built.index),
        time.monotonic() - started,
    )
    return built


def build_scan(reader: FeatureReader, kind: IndexKind, stop: Event) -> FlatIndex | HalfIndex:
    """An exact index, float16 for every kind but ``flat``; read in chunks, so that float32 rows never fill memory."""
    dim = reader.space.dim
    index = FlatIndex(dim) if kind == "flat" else HalfIndex(dim, reader.vectors)
    index.revision = reader.revision()
    for keys, features in reader.chunks(stop):
        index.add(keys, features)
    return index


def _graph_or_scan(reader: FeatureReader, policy: IndexPolicy, stop: Event) -> BuiltIndex:
    """The saved graph if it is still good, else a new one, else a scan if the new one's recall is too low."""
    files = None if policy.folder is None else GraphFiles(policy.folder)
    saved = None if files is None else files.load(reader.collection, reader.space)
    faiss.omp_set_num_threads(max(1, cores() // 2))  # of this thread: the other half is left to searches
    if saved is not None:
        index = _load_graph(reader, saved, stop)
        if index is not None and not policy.rebuild_reason(index) and not measure_recall(index, policy, stop):
            return BuiltIndex(index)
        assert files is not None
        files.delete(reader.collection, reader.space)
    index = _build_graph(reader, policy, stop)
    note = measure_recall(index, policy, stop)
    if note:
        return BuiltIndex(_to_half(index), note)
    if files is not None:
        files.save(
            reader.collection, reader.space, GraphSegment(index.sealed.rows.keys.copy(), index.graph, index.revision)
        )
    return BuiltIndex(index)


def _build_graph(reader: FeatureReader, policy: IndexPolicy, stop: Event) -> GraphIndex:
    """A new graph over all but the latest entries; those are the tail, and the queries to measure the recall."""
    graph, tail = empty_graph(reader.space.dim), HalfIndex(reader.space.dim, reader.vectors)
    graph_keys, revision, count = [np.empty(0, np.int64)], reader.revision(), reader.count()
    sealed = count - min(RECALL_QUERIES, count // 2, policy.tail_max // 2)
    for keys, features in reader.chunks(stop):
        room = max(0, sealed - graph.ntotal)
        for start in range(0, min(room, len(keys)), GRAPH_CHUNK_ROWS):
            if stop.is_set():
                break
            graph.add(features[start : min(start + GRAPH_CHUNK_ROWS, room)])
        graph_keys.append(keys[:room])
        tail.add(keys[room:], features[room:])
    index = GraphIndex(graph, np.concatenate(graph_keys), np.empty(0, np.int64), reader.vectors)
    index.recent, index.revision = tail, revision
    return index


def _load_graph(reader: FeatureReader, saved: GraphSegment, stop: Event) -> GraphIndex | None:
    """A saved graph with rows read from the store; entries deleted since are rows of zeros, new ones are the tail.

    Returns:
        None when entries were added between the saved keys: a graph cannot take them in.
    """
    sealed, tail = HalfIndex(reader.space.dim, reader.vectors), HalfIndex(reader.space.dim, reader.vectors)
    revision, deleted, done = reader.revision(), [np.empty(0, np.int64)], 0
    last = saved.keys[-1] if len(saved.keys) else -1
    for keys, features in reader.chunks(stop):
        tail.add(keys[keys > last], features[keys > last])
        keys, features = keys[keys <= last], features[keys <= last]
        until = int(np.searchsorted(saved.keys, keys[-1], "right")) if len(keys) else done
        expected = saved.keys[done:until]
        if not np.isin(keys, expected).all():
            return None
        deleted.append(_append_rows(sealed.codes, expected, keys, features))
        done = until
    no_keys, no_features = np.empty(0, np.int64), np.empty((0, reader.space.dim), np.float32)
    deleted.append(_append_rows(sealed.codes, saved.keys[done:], no_keys, no_features))
    saved.graph.storage, saved.graph.own_fields = sealed.codes, False
    index = GraphIndex(saved.graph, saved.keys, np.concatenate(deleted), reader.vectors)
    index.sealed.codes = sealed.codes  # owned by Python; a newly built graph owns its rows itself
    index.recent, index.revision = tail, revision
    return index


def _append_rows(codes: faiss.IndexScalarQuantizer, expected: Keys, keys: Keys, features: Feature) -> Keys:
    """Append a row for each key of ``expected``, zeros for those missing from ``keys``; returns the missing ones."""
    present = np.isin(expected, keys)
    for start in range(0, len(expected), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        rows = np.zeros((len(expected[part]), codes.d), np.float32)
        rows[present[part]] = features[np.isin(keys, expected[part])]
        codes.add(rows)
    return expected[~present]


def _to_half(index: GraphIndex) -> HalfIndex:
    """The rows of a rejected graph as an exact index."""
    half, tail = index.sealed, index.recent
    half.codes = faiss.clone_index(half.codes)  # type: ignore[assignment]  # the graph owns the original
    if tail.rows.filled:
        half.codes.add(tail.codes.reconstruct_n(0, tail.rows.filled))  # float16 to float32 and back is lossless
        half.rows.append(tail.rows.keys)
    half.revision = index.revision
    return half


def measure_recall(index: GraphIndex, policy: IndexPolicy, stop: Event) -> str:
    """Measure the recall at `NEIGHBOURS` of entries outside the graph, and set ``ef`` as high as it takes.

    Entries in the graph would be too easy as queries: on random 512-d rows a graph that found 97 % of their neighbours
    found 67 % of those of other queries.

    Returns:
        Why the graph is rejected; empty = accepted.
    """
    chosen = np.sort(np.random.default_rng(0).permutation(index.recent.rows.live_keys)[:RECALL_QUERIES])
    recall = 1.0
    for ef in EF_SEARCH:
        index.ef, hits, expected = ef, 0, 0
        for start in range(0, len(chosen), RECALL_BATCH):
            if stop.is_set():
                return "the gallery is closing"
            _, features = index.vectors(chosen[start : start + RECALL_BATCH])
            if not len(features):
                continue
            exact, approximate = index.sealed.search(features, NEIGHBOURS), index.search_graph(features, NEIGHBOURS)
            for (true, _), (found, _) in zip(exact, approximate, strict=True):
                hits, expected = hits + len(np.intersect1d(true, found)), expected + len(true)
        recall = hits / expected if expected else 1.0
        if recall >= policy.min_recall or not expected:
            log.info("graph accepted recall_at_10=%.3f ef=%d searched=%d", recall, ef, len(chosen))
            return ""
    return (
        f"the graph found {recall:.3f} of the 10 nearest of {len(chosen)} of the collection's own entries, at least "
        f"{policy.min_recall:.2f} is required: a scan is used instead"
    )
