"""The k-reciprocal Jaccard distance between crops, all sparse.

The re-ranking distance of Zhong et al. (CVPR 2017) in the form SpCL, Cluster Contrast, LP and O2CAP
use for clustering, and the camera-aware form of Chen et al. (CVPR 2024). J = 1 wherever two encodings do
not overlap, and most that do overlap too little to matter: nothing N x N is ever stored.

Letters: N crops, D feature size, k1 and k2 neighbours, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from operator import add

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from resight.arrays import Floats, Ints
from resight.neighbours.search import (
    NO_NEIGHBOUR,
    Neighbours,
    search_neighbours,
    search_neighbours_by_camera,
)

EXPANSION_OVERLAP = 2 / 3  # Zhong et al. 2017, equation 6: a neighbour's set joins when 2/3 of it agrees
BOUND_SLACK = 1e-4  # far above the rounding of a bound in float32, far below any difference between distances
BLOCK_ROWS = 8192  # rows encoded at a time: at most 8,192 x 30 x 16 products, 32 MiB
INVERTED_LISTS = 16  # inverted lists made anew: each time shorter, a share of 1/16 of all products is wasted
GATHER_FLOATS = 1 << 20  # features gathered at a time: 4 MiB, so that they stay in the cache


@dataclass(frozen=True)
class ReciprocalEncoding:
    """The rows V[i] of one view: which crops i is k-reciprocal to, and how much. CSR (N, N), rows sum to 1."""

    weights: sparse.csr_matrix

    def __len__(self) -> int:
        return int(self.weights.shape[0])


def encode_reciprocal(features: Floats, *, k1: int, k2: int, device: str = "cpu") -> ReciprocalEncoding:
    """Weights over k-reciprocal neighbours (methods of LP, O2CAP, Cluster Contrast, SpCL).

    Reciprocal sets of k1 entries are widened by the half-size sets (round(k1/2) + 1 entries) of their
    members that agree with them in more than two thirds; V[i] is the softmax of -||x_i - x_j||^2 over the
    widened set, then averaged over the first k2 neighbours (local query expansion).

    Args:
        features: float32 (N, D), unit rows.
        k1: neighbours considered, itself included (30 in LP, 20 in O2CAP).
        k2: neighbours averaged over (6 in both); 1 leaves it out.
        device: where neighbours are searched.
    """
    return encode_neighbours(features, search_neighbours(features, k1, device=device), k1=k1, k2=k2)


def encode_neighbours(features: Floats, near: Neighbours, *, k1: int, k2: int) -> ReciprocalEncoding:
    """`encode_reciprocal` with its k1 neighbours already found."""
    sets = _widened(_reciprocal(near, k1), _reciprocal(near, round(k1 / 2) + 1), features)
    return _expanded(sets, near.indices[:, :k2])


def encode_camera_aware(
    features: Floats,
    cameras: Ints,
    *,
    k1_intra: int,
    k1_inter: int,
    k2_intra: int,
    k2_inter: int,
    device: str = "cpu",
) -> ReciprocalEncoding:
    """Camera-aware weights (CA-Jaccard, sections 3.3 and 3.4, with the list lengths of its released code).

    Neighbours are ranked within the crop's camera and among all other cameras, and are reciprocal when each is
    in the other's list of that kind: people from other cameras are never crowded out by the crop's own. The sets
    are not widened. V[i] is the softmax of -||x_i - x_j||^2 over both sets, then averaged over the first
    neighbours of both kinds. Lists are short where a camera, or all others, have too few crops.

    Args:
        features: float32 (N, D), unit rows.
        cameras: int64 (N,), any numbers.
        k1_intra: neighbours of the same camera considered, the crop itself not counted.
        k1_inter: neighbours of other cameras considered; the released code takes one more.
        k2_intra: neighbours of the same camera averaged over, the crop itself counted.
        k2_inter: neighbours of other cameras averaged over.
        device: where neighbours are searched.
    """
    lengths = max(k1_intra + 1, k2_intra), max(k1_inter + 1, k2_inter)
    intra, inter = search_neighbours_by_camera(features, cameras, *lengths, device=device)
    sets = _reciprocal(intra, k1_intra + 1) + _reciprocal(inter, k1_inter + 1)
    return _expanded(sets, np.hstack([intra.indices[:, :k2_intra], inter.indices[:, :k2_inter]]))


def _listed(indices: Ints, values: Floats | None = None) -> sparse.csr_matrix:
    """CSR (N, N), row i holding the entries of indices[i] that are somebody; ones where no values are given."""
    filled = indices != NO_NEIGHBOUR
    data = np.ones(np.count_nonzero(filled), np.float32) if values is None else values[filled]
    indptr = np.concatenate([[0], np.cumsum(np.count_nonzero(filled, axis=1))])
    return sparse.csr_matrix((data, indices[filled], indptr), shape=(len(indices), len(indices)))


def _reciprocal(near: Neighbours, k: int) -> sparse.csr_matrix:
    """J is in row i, with exp(-||x_i - x_j||^2), when each is among the other's first k."""
    indices = near.indices[:, :k]
    closeness = np.exp(2 * near.similarity[:, :k] - 2)  # at most e^0: no overflow to guard against
    return _listed(indices, closeness).multiply(_listed(indices).T).tocsr()


def _widened(full: sparse.csr_matrix, half: sparse.csr_matrix, features: Floats) -> sparse.csr_matrix:
    """`full` with the half-size sets of those members whose sets agree with it."""
    blocks = []
    members, halves = _pattern(full), _pattern(half)
    for start in range(0, len(features), BLOCK_ROWS):
        base = members[start : start + BLOCK_ROWS]
        agreeing = base.multiply(base @ halves).tocsr()  # |H(c) & N(i)| for each c in N(i); H is symmetric
        agreeing.data = (agreeing.data > EXPANSION_OVERLAP * np.diff(half.indptr)[agreeing.indices]).astype(np.float32)
        agreeing.eliminate_zeros()
        joined = _pattern(agreeing @ halves)
        added = (joined - joined.multiply(base)).tocoo()
        added.eliminate_zeros()
        added.data = np.exp(2 * _cosines(features, added.row + start, added.col) - 2)
        blocks.append(full[start : start + BLOCK_ROWS] + added.tocsr())
    return sparse.vstack(blocks, format="csr")


def _pattern(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """Ones where an entry is stored."""
    return sparse.csr_matrix((np.ones_like(matrix.data), matrix.indices, matrix.indptr), matrix.shape)


def _cosines(features: Floats, rows: Ints, columns: Ints) -> Floats:
    """<x_i, x_j> of P pairs."""
    found = np.empty(len(rows), np.float32)
    chunk = max(1, GATHER_FLOATS // features.shape[1])
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        found[part] = np.einsum("pd,pd->p", features[rows[part]], features[columns[part]])
    return found


def _expanded(sets: sparse.csr_matrix, expansion: Ints) -> ReciprocalEncoding:
    """Rows made to sum to 1, then averaged over the rows listed in `expansion` (N, k2)."""
    totals = np.add.reduceat(sets.data, sets.indptr[:-1])  # every row holds at least itself
    weights = sparse.csr_matrix((sets.data / np.repeat(totals, np.diff(sets.indptr)), sets.indices, sets.indptr))
    if expansion.shape[1] > 1:
        shares = 1 / np.count_nonzero(expansion != NO_NEIGHBOUR, axis=1, keepdims=True)
        weights = _listed(expansion, np.broadcast_to(shares, expansion.shape).astype(np.float32)) @ weights
    weights.sort_indices()
    return ReciprocalEncoding(weights)


def jaccard_graph(
    views: Sequence[ReciprocalEncoding], weights: Sequence[float], *, max_distance: float, chunk: int = 1 << 22
) -> sparse.csr_matrix:
    """Fuse the Jaccard distances of several views and keep the short ones.

    d_ij = sum_v w_v (1 - m / (2 - m)), m = sum_l min(V_v[i, l], V_v[j, l]); see `methods` of LP (fused
    distance 0.70 / 0.15 / 0.15). Views are fused before pruning, as the papers fuse dense matrices.

    Since min(a, b) <= sqrt(a b), m is at most the Bhattacharyya coefficient of the two rows: one sparse
    product bounds all pairs, and m itself is computed only for those that can be near enough, once for both
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
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for at in range(0, len(spans), size):
            pairs.leave_out(spans[at][0])
            blocks += threads.map(pairs.near, spans[at : at + size])
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
            sum(_pattern(root) @ np.bincount(root.indices, minlength=root.shape[0]) for root in self.roots)
        )

    def leave_out(self, rows: int) -> None:
        """Compare with later crops only: the first `rows` have had their turn."""
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
