"""DBSCAN on a sparse graph of distances.

Letters: N crops, K clusters.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from resight.training.neighbours import Ints

OUTLIER = -1


def scan(graph: sparse.csr_matrix, eps: float, min_samples: int) -> Ints:
    """DBSCAN (Ester et al. 1996) on a sparse graph; distances not stored count as longer than any eps.

    Clusters are the connected components of core crops, numbered by their first core crop; a border crop joins
    the lowest-numbered cluster that reaches it. These are scikit-learn's labels to the bit, without its list of
    neighbours per crop in Python, which takes most of its time.

    Args:
        graph: symmetric CSR (N, N) of distances, diagonal stored.
        eps: radius, included.
        min_samples: crops within the radius, itself counted, that make a core crop.

    Returns:
        int64 (N,), 0..K-1, -1 for outliers.
    """
    n = graph.shape[0]
    near = graph.data <= eps
    row = np.repeat(np.arange(n), np.diff(graph.indptr))[near]
    column = graph.indices[near]
    core = np.bincount(row, minlength=n) >= min_samples
    linked = core[row] & core[column]
    links = sparse.coo_matrix((np.ones(linked.sum(), np.int8), (row[linked], column[linked])), (n, n))
    component = connected_components(links, directed=False)[1]
    _, first, cluster_of = np.unique(component[core], return_index=True, return_inverse=True)
    labels = np.full(n, n, np.int64)  # n: above any cluster
    labels[core] = np.argsort(np.argsort(first))[cluster_of]
    border = ~core[row] & core[column]
    np.minimum.at(labels, row[border], labels[column[border]])
    labels[labels == n] = OUTLIER
    return labels
