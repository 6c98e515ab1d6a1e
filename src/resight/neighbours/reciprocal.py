"""k-reciprocal encodings of crops, sparse: the core of the Jaccard graph and of re-ranking.

Zhong, Zheng, Cao and Li, "Re-ranking Person Re-identification with k-reciprocal Encoding", CVPR 2017, equations 1 to 7
and 11. Neighbour lists come from `resight.neighbours.search`; nothing here loads torch, and nothing N x N is stored.

Letters: N crops, D feature size, k neighbours, P pairs. A crop is the first neighbour of itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from resight.arrays import Floats, Ints

NO_NEIGHBOUR = -1  # fills the list of a crop that has fewer than k neighbours
EXPANSION_OVERLAP = 2 / 3  # equation 5: the half-size set of a member joins when 2/3 of it agrees
BLOCK_ROWS = 8192  # rows encoded at a time: at most 8,192 x 30 x 16 products, 32 MiB
GATHER_FLOATS = 1 << 20  # features gathered at a time: 4 MiB, so that they stay in the cache


@dataclass(frozen=True)
class Neighbours:
    """The nearest crops of each crop, nearest first.

    Attributes:
        indices: int64 (N, k), `NO_NEIGHBOUR` where there are no more.
        similarity: float32 (N, k), cosines; 0 where there is no neighbour.
    """

    indices: Ints
    similarity: Floats


@dataclass(frozen=True)
class ReciprocalEncoding:
    """The rows V[i] of one view: which crops i is k-reciprocal to, and how much. CSR (N, N), rows sum to 1."""

    weights: sparse.csr_matrix

    def __len__(self) -> int:
        return int(self.weights.shape[0])


def encode_reciprocal(features: Floats, near: Neighbours, *, k1: int, k2: int) -> ReciprocalEncoding:
    """Weights over k-reciprocal neighbours, as LP, O2CAP, Cluster Contrast and SpCL use them for clustering.

    V[i] is the softmax of -||x_i - x_j||^2 over the widened set of i, averaged over the first k2 neighbours (local
    query expansion).

    Args:
        features: float32 (N, D), unit rows.
        near: at least k1 neighbours of each row, or all of them.
        k1: neighbours considered, the crop itself included (30 in LP, 20 in O2CAP).
        k2: neighbours averaged over (6 in both); 1 leaves it out.
    """
    closeness = widened_sets(features, near, k1, round(k1 / 2) + 1)
    return normalize_and_expand(closeness, near.indices[:, :k2])


def encode_camera_aware(
    intra: Neighbours, inter: Neighbours, *, k1_intra: int, k1_inter: int, k2_intra: int, k2_inter: int
) -> ReciprocalEncoding:
    """Camera-aware weights (CA-Jaccard, sections 3.3 and 3.4, with the list lengths of its released code).

    Neighbours are ranked within the crop's camera and among all other cameras, and are reciprocal when each is
    in the other's list of that kind: people from other cameras are never crowded out by the crop's own. The sets
    are not widened. V[i] is the softmax of -||x_i - x_j||^2 over both sets, then averaged over the first
    neighbours of both kinds. Lists are short where a camera, or all others, have too few crops.

    Args:
        intra: `camera_list_lengths` neighbours of the same camera, the crop itself first.
        inter: as many of other cameras.
        k1_intra: neighbours of the same camera considered, the crop itself not counted.
        k1_inter: neighbours of other cameras considered; the released code takes one more.
        k2_intra: neighbours of the same camera averaged over, the crop itself counted.
        k2_inter: neighbours of other cameras averaged over.
    """
    closeness = reciprocal_sets(intra, k1_intra + 1) + reciprocal_sets(inter, k1_inter + 1)
    return normalize_and_expand(closeness, np.hstack([intra.indices[:, :k2_intra], inter.indices[:, :k2_inter]]))


def camera_list_lengths(k1_intra: int, k1_inter: int, k2_intra: int, k2_inter: int) -> tuple[int, int]:
    """Neighbours of the same camera (the crop itself included) and of others that `encode_camera_aware` reads."""
    return max(k1_intra + 1, k2_intra), max(k1_inter + 1, k2_inter)


def reciprocal_sets(near: Neighbours, k: int) -> sparse.csr_matrix:
    """Equations 2 and 3: j is in row i when each is among the other's first k. CSR (N, N) of exp(-||x_i - x_j||^2)."""
    indices = near.indices[:, :k]
    closeness = np.exp(2 * near.similarity[:, :k] - 2)  # above 0, so that no product drops a pair
    return neighbour_matrix(indices, closeness).multiply(neighbour_matrix(indices).T).tocsr()


def widened_sets(features: Floats, near: Neighbours, k: int, k_half: int) -> sparse.csr_matrix:
    """Equations 4 and 5: the sets of k, with the sets of k_half of those members whose sets agree with them.

    Returns:
        CSR (N, N) of exp(-||x_i - x_j||^2).
    """
    full, half = reciprocal_sets(near, k), reciprocal_sets(near, k_half)
    blocks = []
    members, halves = pattern(full), pattern(half)
    for start in range(0, len(features), BLOCK_ROWS):
        base = members[start : start + BLOCK_ROWS]
        agreeing = base.multiply(base @ halves).tocsr()  # |H(c) & N(i)| for each c in N(i); H is symmetric
        agreeing.data = (agreeing.data > EXPANSION_OVERLAP * np.diff(half.indptr)[agreeing.indices]).astype(np.float32)
        agreeing.eliminate_zeros()
        joined = pattern(agreeing @ halves)
        added = (joined - joined.multiply(base)).tocoo()
        added.eliminate_zeros()
        added.data = np.exp(2 * _cosines(features, added.row + start, added.col) - 2)
        blocks.append(full[start : start + BLOCK_ROWS] + added.tocsr())
    return sparse.vstack(blocks, format="csr")


def normalize_and_expand(closeness: sparse.csr_matrix, expansion: Ints) -> ReciprocalEncoding:
    """Rows divided by their sums (equation 7), then averaged over the rows listed in `expansion` (equation 11).

    Args:
        closeness: CSR (N, N), positive; every row holds at least its own crop.
        expansion: int64 (N, k2), `NO_NEIGHBOUR` where there are fewer.
    """
    totals = np.add.reduceat(closeness.data, closeness.indptr[:-1])
    shares = closeness.data / np.repeat(totals, np.diff(closeness.indptr))
    weights = sparse.csr_matrix((shares, closeness.indices, closeness.indptr), closeness.shape)
    if expansion.shape[1] > 1:
        parts = 1 / np.count_nonzero(expansion != NO_NEIGHBOUR, axis=1, keepdims=True)
        weights = neighbour_matrix(expansion, np.broadcast_to(parts, expansion.shape).astype(np.float32)) @ weights
    weights.sort_indices()
    return ReciprocalEncoding(weights)


def neighbour_matrix(indices: Ints, values: Floats | None = None) -> sparse.csr_matrix:
    """CSR (N, N), row i holding the neighbours in indices[i]; ones where no values are given."""
    filled = indices != NO_NEIGHBOUR
    data = np.ones(np.count_nonzero(filled), np.float32) if values is None else values[filled]
    indptr = np.concatenate([[0], np.cumsum(np.count_nonzero(filled, axis=1))])
    return sparse.csr_matrix((data, indices[filled], indptr), shape=(len(indices), len(indices)))


def pattern(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
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
