"""Build an index from the store, and let an approximate one go live only when it finds what it should.

Runs in any thread: nothing here touches an index that is being searched.
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

GRAPH_CHUNK_ROWS = 512  # entries added to a graph between two looks at the stop sign: up to 3 s at 512-d
JUDGES, NEIGHBOURS = 500, 10  # entries of the collection that are kept out of the graph to judge it; how many nearest
RECALL_BATCH = 50


@dataclass(frozen=True)
class BuiltIndex:
    """An index of what the store held at ``index.revision``; ``note`` tells why it is not of the kind asked for."""

    index: VectorIndex
    note: str = ""


def check_index_filters(dim: int) -> None:
    """Try the filters of every kind that is built here; raises StartupError when one does not look at them."""
    half = HalfIndex(dim, lambda keys: (keys, np.empty((0, dim), np.float32))).codes
    check_filters(
        {
            "flat": (faiss.IndexFlatIP(dim), faiss.SearchParameters),
            "flat-fp16": (half, faiss.SearchParameters),
            "hnsw": (empty_graph(dim), faiss.SearchParametersHNSW),  # type: ignore[attr-defined]
        }
    )


def build_index(feed: FeatureReader, kind: IndexKind, ladder: IndexPolicy, stop: Event) -> BuiltIndex:
    """Read a collection and index it; an approximate index that misses too much gives way to an exact one.

    Raises:
        CollectionNotFoundError: it was deleted meanwhile.
        UnavailableError: ``stop`` was set.
    """
    started = time.monotonic()
    built = _graph_or_scan(feed, ladder, stop) if kind == "hnsw" else BuiltIndex(build_scan(feed, kind, stop))
    log.info(
        "index built collection=%s kind=%s entries=%d seconds=%.2f",
        feed.collection.name,
        built.index.kind,
        len(built.index),
        time.monotonic() - started,
    )
    return built


def build_scan(feed: FeatureReader, kind: IndexKind, stop: Event) -> FlatIndex | HalfIndex:
    """An exact index; float16 for every kind but ``flat``, in pieces, so that no float32 copy of all is ever held."""
    dim = feed.space.dim
    index = FlatIndex(dim) if kind == "flat" else HalfIndex(dim, feed.vectors)
    index.revision = feed.revision()
    for keys, features in feed.pieces(stop):
        index.add(keys, features)
    return index


def _graph_or_scan(feed: FeatureReader, ladder: IndexPolicy, stop: Event) -> BuiltIndex:
    files = None if ladder.folder is None else GraphFiles(ladder.folder)
    kept = None if files is None else files.load(feed.collection, feed.space)
    faiss.omp_set_num_threads(max(1, cores() // 2))  # of this thread: searches want the other half
    if kept is not None:
        index = _load_graph(feed, kept, stop)
        if index is not None and not ladder.worn(index) and not measure_recall(index, ladder, stop):
            return BuiltIndex(index)
        assert files is not None
        files.delete(feed.collection, feed.space)
    index = _build_graph(feed, ladder, stop)
    note = measure_recall(index, ladder, stop)
    if note:
        return BuiltIndex(_to_half(index), note)
    if files is not None:
        files.save(
            feed.collection, feed.space, GraphSegment(index.sealed.rows.keys.copy(), index.graph, index.revision)
        )
    return BuiltIndex(index)


def _build_graph(feed: FeatureReader, ladder: IndexPolicy, stop: Event) -> GraphIndex:
    """A new graph over everything but the latest entries, which are the tail, and judge the graph."""
    graph, late = empty_graph(feed.space.dim), HalfIndex(feed.space.dim, feed.vectors)
    held, revision, count = [np.empty(0, np.int64)], feed.revision(), feed.count()
    sealed = count - min(JUDGES, count // 2, ladder.tail_max // 2)
    for keys, features in feed.pieces(stop):
        room = max(0, sealed - graph.ntotal)
        for start in range(0, min(room, len(keys)), GRAPH_CHUNK_ROWS):
            if stop.is_set():
                break
            graph.add(features[start : min(start + GRAPH_CHUNK_ROWS, room)])
        held.append(keys[:room])
        late.add(keys[room:], features[room:])
    index = GraphIndex(graph, np.concatenate(held), np.empty(0, np.int64), feed.vectors)
    index.recent, index.revision = late, revision
    return index


def _load_graph(feed: FeatureReader, kept: GraphSegment, stop: Event) -> GraphIndex | None:
    """A kept graph over rows read anew; what was deleted since is a row of zeros, what came since is the tail.

    Returns:
        None when entries came among the kept ones, which a graph cannot take in.
    """
    sealed, late = HalfIndex(feed.space.dim, feed.vectors), HalfIndex(feed.space.dim, feed.vectors)
    revision, gone, done = feed.revision(), [np.empty(0, np.int64)], 0
    last = kept.keys[-1] if len(kept.keys) else -1
    for keys, features in feed.pieces(stop):
        late.add(keys[keys > last], features[keys > last])
        keys, features = keys[keys <= last], features[keys <= last]
        until = int(np.searchsorted(kept.keys, keys[-1], "right")) if len(keys) else done
        expected = kept.keys[done:until]
        if not np.isin(keys, expected).all():
            return None
        gone.append(_append_rows(sealed.codes, expected, keys, features))
        done = until
    gone.append(
        _append_rows(sealed.codes, kept.keys[done:], np.empty(0, np.int64), np.empty((0, feed.space.dim), np.float32))
    )
    kept.graph.storage, kept.graph.own_fields = sealed.codes, False
    index = GraphIndex(kept.graph, kept.keys, np.concatenate(gone), feed.vectors)
    index.sealed.codes = sealed.codes  # owned by Python, where a graph that was built owns its rows itself
    index.recent, index.revision = late, revision
    return index


def _append_rows(codes: faiss.IndexScalarQuantizer, expected: Keys, keys: Keys, features: Feature) -> Keys:
    """Append a row for each of ``expected``, zeros where there is none; returns those."""
    there = np.isin(expected, keys)
    for start in range(0, len(expected), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        rows = np.zeros((len(expected[part]), codes.d), np.float32)
        rows[there[part]] = features[np.isin(keys, expected[part])]
        codes.add(rows)
    return expected[~there]


def _to_half(index: GraphIndex) -> HalfIndex:
    """The rows of a graph that is given up, as an exact index."""
    half, late = index.sealed, index.recent
    half.codes = faiss.clone_index(half.codes)  # type: ignore[assignment]  # the graph owns the other
    if late.rows.filled:
        half.codes.add(late.codes.reconstruct_n(0, late.rows.filled))  # float16 there and back is the same
        half.rows.append(late.rows.keys)
    half.revision = index.revision
    return half


def measure_recall(index: GraphIndex, ladder: IndexPolicy, stop: Event) -> str:
    """Walk to the neighbours of entries that are not in the graph, as widely as needed.

    An entry in the graph would be an easy question: on random 512-d rows a graph that found 97 % of the neighbours
    of its own found 67 % of others'.

    Returns:
        Why the graph is refused, or nothing.
    """
    chosen = np.sort(np.random.default_rng(0).permutation(index.recent.rows.live_keys)[:JUDGES])
    recall = 1.0
    for ef in EF_SEARCH:
        index.ef, hits, wanted = ef, 0, 0
        for start in range(0, len(chosen), RECALL_BATCH):
            if stop.is_set():
                return "the gallery is closing"
            _, features = index.vectors(chosen[start : start + RECALL_BATCH])
            if not len(features):
                continue
            sought, walked = index.sealed.search(features, NEIGHBOURS), index.walk(features, NEIGHBOURS)
            for (true, _), (found, _) in zip(sought, walked, strict=True):
                hits, wanted = hits + len(np.intersect1d(true, found)), wanted + len(true)
        recall = hits / wanted if wanted else 1.0
        if recall >= ladder.min_recall or not wanted:
            log.info("graph accepted recall_at_10=%.3f ef=%d searched=%d", recall, ef, len(chosen))
            return ""
    return (
        f"the graph found {recall:.3f} of the 10 nearest of {len(chosen)} of the collection's own entries, "
        f"{ladder.min_recall:.2f} is asked: it is scanned instead"
    )
