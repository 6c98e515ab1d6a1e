"""k-reciprocal re-ranking of a test set (Zhong et al., CVPR 2017) with sparse matrices instead of (Q + G) x (Q + G).

    d*(q, g) = (1 - lambda) d_J(q, g) + lambda d(q, g)    (equation 12)

d is the squared Euclidean distance of unit features, each crop's divided by its largest, as in the authors' code;
d_J the Jaccard distance of k-reciprocal encodings. MSMT17's test would need 33 GiB for each dense matrix; here a crop
costs some tens of weights. The graph for clustering (`resight.neighbours.jaccard`) uses the same encoding with two
differences: there k1 counts the crop itself and distances are not divided.

All queries and the whole gallery affect every ranking, so metrics are those of a batch, not of single searches.

Letters: Q queries, G gallery rows, N = Q + G crops, D feature size, k1 neighbours besides the crop itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from resight.arrays import Floats
from resight.neighbours.reciprocal import Neighbours, normalize_and_expand, widened_sets

K1, K2, BALANCE = 20, 6, 0.3  # k1, k2 and lambda of the paper, section 4.2


@dataclass(frozen=True, eq=False)
class Reranking:
    """Re-ranked similarities, computed for a few queries at a time.

    Attributes:
        query: float32 (Q, D), unit rows.
        gallery: float32 (G, D), unit rows.
        farthest: float32 (N,), the squared distance from each crop to the one farthest from it, queries first.
        weights: CSR (N, N), the encodings V of equations 7 and 11; rows sum to 1.
        inverted: CSC (N, G'), the gallery's rows of ``weights`` by column.
        balance: lambda of equation 12.
    """

    query: Floats
    gallery: Floats
    farthest: Floats
    weights: sparse.csr_matrix
    inverted: sparse.csc_matrix
    balance: float

    def rows(self, queries: slice) -> Floats:
        """1 - d* of some queries to all gallery rows, float32 (q, G), 1 for the nearest possible."""
        start, stop, _ = queries.indices(len(self.query))
        shared = _shared(self.weights[start:stop], self.inverted)  # (q, G)
        jaccard = 1 - shared / (2 - shared)
        squared = 2 - 2 * (self.query[start:stop] @ self.gallery.T)
        distance = (1 - self.balance) * jaccard + self.balance * squared / self.farthest[start:stop, None]
        similarity: Floats = (1 - distance).astype(np.float32)
        return similarity


def rerank(
    query: Floats,
    gallery: Floats,
    near: Neighbours,
    farthest: Floats,
    *,
    k1: int = K1,
    k2: int = K2,
    balance: float = BALANCE,
) -> Reranking:
    """Encode queries and gallery together, ready to rank.

    Args:
        query: float32 (Q, D), unit rows.
        gallery: float32 (G, D), unit rows.
        near: k1 + 1 neighbours of each row of both, queries first (`search_neighbours`).
        farthest: float32 (Q + G,), their `farthest_distances`.
        k1: neighbours considered besides the crop itself.
        k2: rows averaged over, the crop itself included; 1 leaves it out.
        balance: lambda, the share of the original distance; 1 ranks by it alone.
    """
    closeness = widened_sets(np.concatenate([query, gallery]), near, k1 + 1, round(k1 / 2) + 1)
    closeness.data **= 1 / np.repeat(farthest, np.diff(closeness.indptr))  # exp(-d / farthest)
    weights = normalize_and_expand(closeness, near.indices[:, :k2]).weights
    return Reranking(query, gallery, farthest, weights, weights[len(query) :].tocsc(), balance)


def _shared(rows: sparse.csr_matrix, inverted: sparse.csc_matrix) -> NDArray[np.float64]:
    """sum_l min(V[q, l], V[g, l]) for a few queries and all gallery rows, dense (q, G)."""
    count, gallery = rows.shape[0], inverted.shape[0]
    lengths = np.diff(inverted.indptr)[rows.indices]  # how many gallery rows share each entry
    ends = np.cumsum(lengths)
    # Positions in the inverted lists, all runs one after the other.
    position = np.arange(lengths.sum()) - np.repeat(ends - lengths - inverted.indptr[rows.indices], lengths)
    least = np.minimum(np.repeat(rows.data, lengths), inverted.data[position])
    query = np.repeat(np.arange(count), np.diff(rows.indptr))
    cell = np.repeat(query * gallery, lengths) + inverted.indices[position]
    shared = np.bincount(cell, weights=least, minlength=count * gallery)
    return np.asarray(shared, np.float64).reshape(count, gallery)
