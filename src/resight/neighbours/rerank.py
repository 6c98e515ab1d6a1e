"""k-reciprocal re-ranking of a test (Zhong et al., CVPR 2017), sparse: nothing (Q + G) x (Q + G) is ever stored.

    d*(q, g) = (1 - lambda) d_J(q, g) + lambda d(q, g)    (equation 12)

d is the squared Euclidean distance of unit features, each crop's divided by its largest, as in the authors' code;
d_J the Jaccard distance of k-reciprocal encodings. MSMT17's test would need 33 GiB for each dense matrix; here a crop
costs some tens of weights. `resight.neighbours.search` has the same encoding in the form clustering uses: k1 counts
the crop itself and distances are not divided.

All queries and the whole gallery take part in every ranking, so these are figures of a batch, not of single searches.

Letters: Q queries, G gallery rows, N = Q + G crops, D feature size, k1 neighbours beside the crop itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from resight.arrays import Floats, Ints
from resight.neighbours.search import nearest_neighbours

K1, K2, BALANCE = 20, 6, 0.3  # k1, k2 and lambda of the paper, section 4.2
EXPANSION_OVERLAP = 2 / 3  # equation 5: the half-size set of a member joins when 2/3 of it agrees
BLOCK_ROWS = 1024  # crops at a time: 1024 x 93,820 crops of MSMT17's test are 370 MiB


@dataclass(frozen=True, eq=False)
class Reranking:
    """Re-ranked similarities, computed for a few queries at a time.

    Attributes:
        query: float32 (Q, D), unit rows.
        gallery: float32 (G, D), unit rows.
        farthest: float32 (N,), the squared distance from each crop to the one farthest from it, queries first.
        weights: CSR (N, N), the encodings V of equations 7 and 11; rows sum to 1.
        inverted: CSC (N, G'), the gallery's rows of ``weights`` as lists: who has an entry.
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
    query: Floats, gallery: Floats, *, k1: int = K1, k2: int = K2, balance: float = BALANCE, device: str = "cpu"
) -> Reranking:
    """Encode queries and gallery together, ready to rank.

    Args:
        query: float32 (Q, D), unit rows.
        gallery: float32 (G, D), unit rows.
        k1: neighbours considered beside the crop itself.
        k2: rows averaged over, the crop itself included; 1 leaves it out.
        balance: lambda, the share of the original distance; 1 ranks by it alone.
        device: where neighbours are searched.
    """
    features = np.concatenate([query, gallery])
    ranks = nearest_neighbours(features, k1 + 1, device=device)
    farthest = _farthest(features, device)
    members = _members(ranks, k1)
    weights = _encode(members, features, farthest)
    if k2 > 1:
        weights = (_listed(ranks[:, :k2]) @ weights).tocsr() / np.float32(min(k2, ranks.shape[1]))
    return Reranking(query, gallery, farthest, weights, weights[len(query) :].tocsc(), balance)


def _listed(columns: Ints) -> sparse.csr_matrix:
    """CSR (N, N) of ones, row i holding the entries of columns[i]."""
    n, k = columns.shape
    return sparse.csr_matrix((np.ones(n * k, np.float32), columns.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))


def _members(ranks: Ints, k1: int) -> sparse.csr_matrix:
    """R*(i, k1), equations 3 to 5: mutual neighbours, widened by the half-size sets of members that agree in 2/3."""
    full, half = (
        listed.multiply(listed.T).tocsr() for listed in (_listed(ranks), _listed(ranks[:, : round(k1 / 2) + 1]))
    )
    size = np.diff(half.indptr)
    blocks = []
    for start in range(0, len(ranks), BLOCK_ROWS):  # in blocks: the sets' products are several times their size
        part = full[start : start + BLOCK_ROWS]
        overlap = part.multiply(part @ half.T).tocsr()  # |R(c, k1/2) & R(i, k1)| for each member c
        overlap.data = (overlap.data > EXPANSION_OVERLAP * size[overlap.indices]).astype(np.float32)
        overlap.eliminate_zeros()
        blocks.append(part + overlap @ half)
    return sparse.vstack(blocks, format="csr")


def _encode(members: sparse.csr_matrix, features: Floats, farthest: Floats) -> sparse.csr_matrix:
    """V[i, j] = exp(-d(i, j)) over the members of i, made to sum to 1 (equation 7)."""
    rows = np.repeat(np.arange(len(features)), np.diff(members.indptr))
    squared = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), BLOCK_ROWS * 64):
        part = slice(start, start + BLOCK_ROWS * 64)
        squared[part] = 2 - 2 * np.einsum("ed,ed->e", features[rows[part]], features[members.indices[part]])
    raw = np.exp(-squared / farthest[rows])
    totals = np.add.reduceat(raw, members.indptr[:-1])  # every row holds at least its own crop
    return sparse.csr_matrix((raw / totals[rows], members.indices, members.indptr), shape=members.shape)


def _farthest(features: Floats, device: str) -> Floats:
    """Squared distance of each crop to the farthest one, float32 (N,); 1 where all crops are the same."""
    data = torch.from_numpy(features).to(device)
    lowest = [(data[start : start + BLOCK_ROWS] @ data.T).amin(dim=1) for start in range(0, len(data), BLOCK_ROWS)]
    farthest = 2 - 2 * torch.cat(lowest)
    return torch.where(farthest > 0, farthest, 1).cpu().numpy()


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
