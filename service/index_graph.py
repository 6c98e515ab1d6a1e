"""The largest collections: a graph over sealed float16 rows, a scanned tail for what came since, tombstones.

A graph cannot be taken out of (faiss's HNSW has no removal) and adding to it takes milliseconds an entry, so it
is built in the background and never changed; what changes is small and searched exactly beside it.
"""

from __future__ import annotations

import faiss

from resight.service.candidates import SPARE, Near, Truth, merged, nothing, scored
from resight.service.index_half import HalfIndex
from resight.service.reads import Keys
from resight.service.runtime import Feature

# M and efConstruction of the design's measurements (100 k x 512: recall@10 1.0 on clustered features).
LINKS, EF_CONSTRUCTION = 32, 200
EF_SEARCH = (64, 128, 256, 512)  # tried in turn until the recall is good enough
OVERFETCH = 2  # float16 and tombstones both cost a few places


def empty_graph(dim: int) -> faiss.IndexHNSWSQ:
    """A graph to add features to, with float16 rows of its own."""
    rounded = faiss.ScalarQuantizer.QT_fp16
    graph = faiss.IndexHNSWSQ(dim, rounded, LINKS, faiss.METRIC_INNER_PRODUCT)  # type: ignore[arg-type]
    graph.hnsw.efConstruction = EF_CONSTRUCTION
    graph.is_trained = True  # float16 needs no training, which the wrapper does not know
    return graph


class GraphIndex:
    """A `resight.service.candidates.VectorIndex` that walks a graph; exact when told to be.

    Args:
        graph: over the features of ``keys``, in their order.
        keys: of the sealed rows, ascending.
        gone: those of them that are in the graph only for its links.
        truth: the float32 features in the store.
    """

    kind, approximate = "hnsw", True

    def __init__(self, graph: faiss.IndexHNSWSQ, keys: Keys, gone: Keys, truth: Truth) -> None:
        self.graph, self.ef = graph, EF_SEARCH[0]
        codes = faiss.downcast_index(graph.storage)
        self.sealed = HalfIndex(graph.d, truth, codes)  # type: ignore[arg-type]  # an IndexScalarQuantizer
        self.sealed.rows.append(keys)
        self.sealed.remove(gone)
        self.recent = HalfIndex(graph.d, truth)
        self._truth = truth
        self.revision = -1

    def __len__(self) -> int:
        return len(self.sealed) + len(self.recent)

    @property
    def tail(self) -> int:
        """Rows that came after the graph was sealed."""
        return self.recent.rows.filled

    @property
    def tombstones(self) -> int:
        """Removed rows that still take room."""
        return self.sealed.tombstones + self.recent.tombstones

    @property
    def nbytes(self) -> int:
        """Memory, in bytes: rows, and the links as faiss stores them (4 bytes each, 2 M on the lowest level)."""
        return self.sealed.nbytes + self.recent.nbytes + 4 * int(self.graph.hnsw.neighbors.size())  # type: ignore[attr-defined]

    def add(self, keys: Keys, features: Feature) -> bool:
        """Append to the tail; see `resight.service.candidates.VectorIndex.add`."""
        new = keys > (self.sealed.rows.keys[-1] if self.sealed.rows.filled else -1)
        return self.sealed.rows.holds(keys[~new]) and self.recent.add(keys[new], features[new])

    def remove(self, keys: Keys) -> None:
        """Bury entries; keys not held are no error."""
        self.sealed.remove(keys)
        self.recent.remove(keys)

    def vectors(self, keys: Keys) -> tuple[Keys, Feature]:
        """From the store, whole."""
        return self._truth(keys)

    def search(self, queries: Feature, k: int, *, among: Keys | None = None, exact: bool = False) -> list[Near]:
        """The k nearest of each query; see `resight.service.candidates.VectorIndex.search`."""
        if exact or among is not None:
            parts = [part.search(queries, k, among=among) for part in (self.sealed, self.recent)]
        else:
            parts = [self.walk(queries, k), self.recent.search(queries, k)]
        return merged(parts, k)

    def walk(self, queries: Feature, k: int) -> list[Near]:
        """The k nearest of each query that the graph finds, without the tail."""
        fetch = min(OVERFETCH * k + SPARE, len(self.sealed))
        if not fetch:
            return nothing(queries)
        # bounded_queue stays on: without it faiss 1.15 does not look at the selector (issue #5504).
        parameters = faiss.SearchParametersHNSW(efSearch=max(self.ef, fetch))  # type: ignore[attr-defined]
        selector = self.sealed.rows.selector(None)
        if selector is not None:
            parameters.sel = selector
        _, found = self.graph.search(queries, fetch, params=parameters)
        return scored(queries, [self.sealed.rows.keys[own[own >= 0]] for own in found], self._truth, k)
