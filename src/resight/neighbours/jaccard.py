"""The Jaccard distance between k-reciprocal encodings of crops, as a sparse graph of the near pairs.

The re-ranking distance of Zhong et al. (CVPR 2017) in the form that SpCL, Cluster Contrast, LP and O2CAP use for
clustering. J = 1 for pairs whose encodings do not overlap, and most others are too far to matter: no dense N x N matrix
is stored.

Letters: N crops, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from operator import add

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from resight.arrays import Ints
from resight.machine import threads
from resight.neighbours.reciprocal import ReciprocalEncoding, pattern

BOUND_SLACK = 1e-4  # far above the rounding errors of a float32 bound, far below any difference between distances
INVERTED_LISTS = 16  # inverted lists rebuilt: each time shorter; 1/16 of all products is wasted


def jaccard_graph(
    views: Sequence[ReciprocalEncoding], weights: Sequence[float], *, max_distance: float, chunk: int = 1 << 22
) -> sparse.csr_matrix:
    """Fuse the Jaccard distances of several views and keep the short ones.

    d_ij = sum_v w_v (1 - m / (2 - m)), m = sum_l min(V_v[i, l], V_v[j, l]); see `methods` of LP (fused
    distance 0.70 / 0.15 / 0.15). Views are fused before pruning, as the papers fuse dense matrices.

    Since min(a, b) <= sqrt(a b), m is at most the Bhattacharyya coefficient of the two rows: one sparse
    product bounds all pairs, and m itself is computed only for pairs that can be near enough, once for both
    (i, j) and (j, i). Blocks of rows are worked on side by side: scipy's products release the interpreter lock.

    Args:
        views: one encoding per view, all of the same N crops.
        weights: one weight per view, summing to 1.
        max_distance: longest distance kept, below 1.
        chunk: entries of products a thread holds at a time, 8 bytes each.

    Returns:
        CSR (N, N) float32 of distances in [0, max_distance], symmetric, zeros on the diagonal stored.
    """
    n = len(views[0])
    pairs = _Pairs(views, weights, max_distance, chunk)
    spans = list(_spans(pairs.costs(), chunk))
    size = -(-len(spans) // INVERTED_LISTS)
    blocks: list[tuple[Ints, Ints, NDArray[np.float64]]] = []
    with ThreadPoolExecutor(threads()) as pool:
        for at in range(0, len(spans), size):
            pairs.leave_out(spans[at][0])
            blocks += pool.map(pairs.near, spans[at : at + size])
    blocks += [(j, i, distance) for i, j, distance in blocks]
    blocks.append((np.arange(n), np.arange(n), np.zeros(n)))
    i, j, distance = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    graph = sparse.coo_matrix((distance.astype(np.float32), (i, j)), shape=(n, n)).tocsr()
    graph.sort_indices()
    return graph


class _Pairs:
    """Finds the pairs i < j whose fused distance is short, some rows i at a time."""

    def __init__(
        self, views: Sequence[ReciprocalEncoding], weights: Sequence[float], max_distance: float, chunk: int
    ) -> None:
        self.views = [view.weights for view in views]
        self.weights = weights
        self.least = 1.0 - max_distance
        self.chunk = chunk
        self.roots = [view.sqrt() for view in self.views]
        self.leave_out(0)

    def costs(self) -> NDArray[np.float64]:
        """Products the bounds of each row take, at most: (N,)."""
        return np.asarray(
            sum(pattern(root) @ np.bincount(root.indices, minlength=root.shape[0]) for root in self.roots)
        )

    def leave_out(self, rows: int) -> None:
        """Compare only with later crops; the first `rows` are already done."""
        self.first = rows
        self.later = [root[rows:].T.tocsr() for root in self.roots]  # (N, N - rows)

    def near(self, span: tuple[int, int]) -> tuple[Ints, Ints, NDArray[np.float64]]:
        """Rows, columns and distances of the near pairs of rows start <= i < stop."""
        rows, columns = self.candidates(*span)
        similarity = np.zeros(len(rows))
        for view, weight in zip(self.views, self.weights, strict=True):
            overlap = _overlap(view, rows, columns, self.chunk)
            similarity += weight * overlap / (2.0 - overlap)
        near = similarity >= self.least
        return rows[near], columns[near], np.clip(1.0 - similarity[near], 0.0, None)

    def candidates(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """The pairs of these rows that may be near, by the bound on m."""
        bounds = []
        for root, later, weight in zip(self.roots, self.later, self.weights, strict=True):
            coefficient = root[start:stop] @ later
            coefficient.data *= np.float32(weight) / (2 - coefficient.data)
            bounds.append(coefficient)
        bound = reduce(add, bounds).tocoo()
        rows, columns = bound.row + start, bound.col + self.first
        near = (bound.data >= self.least - BOUND_SLACK) & (rows < columns)
        return rows[near], columns[near]


def _spans(costs: NDArray[np.float64], limit: int) -> Iterator[tuple[int, int]]:
    """Consecutive (start, stop) of rows whose costs sum to at most `limit`, or of one row."""
    ends = np.cumsum(costs)
    start = 0
    while start < len(costs):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + limit, side="right")))
        yield start, stop
        start = stop


def _overlap(weights: sparse.csr_matrix, rows: Ints, columns: Ints, chunk: int) -> NDArray[np.float64]:
    """m_ij = sum_l min(V[i, l], V[j, l]) of P pairs."""
    found = np.empty(len(rows))
    lengths = np.diff(weights.indptr)
    for start, stop in _spans(lengths[rows] + lengths[columns], chunk):
        shared = weights[rows[start:stop]].minimum(weights[columns[start:stop]])
        found[start:stop] = shared.sum(axis=1, dtype=np.float64).ravel()
    return found
