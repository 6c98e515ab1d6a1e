"""Who is near whom: exact nearest neighbours and the k-reciprocal Jaccard weights, all sparse.

The re-ranking distance of Zhong et al. (CVPR 2017) in the form SpCL, Cluster Contrast, LP and O2CAP
use for clustering: J = 1 wherever two encodings do not overlap, so nothing N x N is ever stored.

Letters: N crops, D feature size, k1 neighbours, R rank list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

EXPANSION_OVERLAP = 2 / 3  # Zhong et al. 2017, equation 6: a neighbour's set joins when 2/3 of it agrees


@dataclass(frozen=True)
class ReciprocalEncoding:
    """The rows V[i] of one view: which crops i is k-reciprocal to, and how much. CSR (N, N), rows sum to 1."""

    weights: sparse.csr_matrix

    def __len__(self) -> int:
        return int(self.weights.shape[0])


def nearest(features: Floats, k: int, *, device: str = "cpu", chunk: int = 2048) -> Ints:
    """Exact k nearest rows by inner product, each row's own index first.

    Args:
        features: (N, D) unit rows.
        k: neighbours to find, itself included; capped at N.
        device: where the products are computed.
        chunk: rows at a time, so that memory is chunk x N floats.

    Returns:
        int64 (N, min(k, N)), nearest first.
    """
    data = torch.from_numpy(features).to(device)
    k = min(k, len(features))
    found = np.empty((len(features), k), np.int64)
    for start in range(0, len(features), chunk):
        rows = data[start : start + chunk]
        similarity = rows @ data.T  # (chunk, N)
        own = torch.arange(len(rows), device=device)
        similarity[own, own + start] = 2.0  # above any cosine: a duplicate never takes the first place
        found[start : start + chunk] = similarity.topk(k, dim=1).indices.cpu().numpy()
    return found


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
    ranks = nearest(features, k1, device=device)
    full = _reciprocal(ranks)
    half = _reciprocal(ranks[:, : round(k1 / 2) + 1])
    overlap = full.multiply(full @ half.T).tocsr()  # |N(c, k1/2) & N(i, k1)| for each c in N(i, k1)
    size = np.diff(half.indptr)
    overlap.data = (overlap.data > EXPANSION_OVERLAP * size[overlap.indices]).astype(np.float32)
    overlap.eliminate_zeros()
    widened = (full + overlap @ half).tocsr()
    widened.sort_indices()
    weights = _softmax_rows(widened, features)
    if k2 > 1:
        weights = _neighbour_mean(ranks[:, :k2]) @ weights
    weights.sort_indices()
    return ReciprocalEncoding(weights)


def _membership(columns: Ints) -> sparse.csr_matrix:
    """Boolean CSR (N, N), row i holding the entries of columns[i]."""
    n, k = columns.shape
    indptr = np.arange(0, n * k + 1, k)
    return sparse.csr_matrix((np.ones(n * k, np.float32), columns.ravel(), indptr), shape=(n, n))


def _reciprocal(ranks: Ints) -> sparse.csr_matrix:
    """J is in row i when each is in the other's list."""
    listed = _membership(ranks)
    return listed.multiply(listed.T).tocsr()


def _neighbour_mean(ranks: Ints) -> sparse.csr_matrix:
    """The operator that averages rows over each row's listed neighbours."""
    return _membership(ranks) / np.float32(ranks.shape[1])


def _softmax_rows(sets: sparse.csr_matrix, features: Floats, chunk: int = 1 << 18) -> sparse.csr_matrix:
    """V[i, j] = softmax over row i's set of -(2 - 2 <x_i, x_j>)."""
    rows = np.repeat(np.arange(sets.shape[0]), np.diff(sets.indptr))
    similarity = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        similarity[part] = np.einsum("ed,ed->e", features[rows[part]], features[sets.indices[part]])
    weights = np.exp(2 * similarity - 2)  # at most e^0: no overflow to guard against
    totals = np.add.reduceat(weights, sets.indptr[:-1])  # every row holds at least itself
    return sparse.csr_matrix((weights / np.repeat(totals, np.diff(sets.indptr)), sets.indices, sets.indptr), sets.shape)


def jaccard_graph(
    views: Sequence[ReciprocalEncoding], weights: Sequence[float], *, max_distance: float, chunk: int = 256
) -> sparse.csr_matrix:
    """Fuse the Jaccard distances of several views and keep the short ones.

    d_ij = sum_v w_v (1 - s / (2 - s)), s = sum_l min(V_v[i, l], V_v[j, l]); see `methods` of LP (fused
    distance 0.70 / 0.15 / 0.15). Views are fused before pruning, as the papers fuse dense matrices.

    Args:
        views: one encoding per view, all of the same N crops.
        weights: one weight per view, summing to 1.
        max_distance: longest distance kept, below 1.
        chunk: rows at a time, so that memory is chunk x N floats.

    Returns:
        CSR (N, N) float32 of distances in [0, max_distance], symmetric, zeros on the diagonal stored.
    """
    blocks = [_rows_within(block, start, max_distance) for start, block in _similarity_blocks(views, weights, chunk)]
    return sparse.vstack(blocks, format="csr")


def _similarity_blocks(
    views: Sequence[ReciprocalEncoding], weights: Sequence[float], chunk: int
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Dense (chunk, N) blocks of the fused similarity 1 - d, made through inverted lists."""
    n = len(views[0])
    inverted = [view.weights.tocsc() for view in views]
    for start in range(0, n, chunk):
        stop = min(start + chunk, n)
        fused = np.zeros((stop - start, n))
        for view, columns, weight in zip(views, inverted, weights, strict=True):
            overlap = _overlap_block(view.weights[start:stop], columns)
            fused += weight * overlap / (2.0 - overlap)
        yield start, fused


def _overlap_block(rows: sparse.csr_matrix, columns: sparse.csc_matrix) -> NDArray[np.float64]:
    """m_ij = sum_l min(V[i, l], V[j, l]) for a few rows i and all j, dense (rows, N)."""
    count, n = rows.shape
    row_of = np.repeat(np.arange(count), np.diff(rows.indptr))
    lengths = np.diff(columns.indptr)[rows.indices]  # how many j share each entry l
    first = columns.indptr[rows.indices]
    ends = np.cumsum(lengths)
    # Positions in the inverted lists, all runs one after the other.
    position = np.arange(ends[-1]) - np.repeat(ends - lengths - first, lengths)
    shared = np.minimum(np.repeat(rows.data, lengths), columns.data[position])
    cell = np.repeat(row_of * n, lengths) + columns.indices[position]
    overlap = np.asarray(np.bincount(cell, weights=shared, minlength=count * n), np.float64)
    return overlap.reshape(count, n)


def _rows_within(similarity: NDArray[np.float64], start: int, max_distance: float) -> sparse.csr_matrix:
    """CSR rows of the distances up to the limit; the diagonal is exactly 0 and stored."""
    rows, columns = np.nonzero(similarity >= 1.0 - max_distance)
    distance = np.clip(1.0 - similarity[rows, columns], 0.0, None).astype(np.float32)
    distance[columns == rows + start] = 0.0
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(similarity)))])
    return sparse.csr_matrix((distance, columns, indptr), shape=similarity.shape)
