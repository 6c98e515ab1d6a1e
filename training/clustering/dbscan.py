"""DBSCAN on a sparse graph of distances.

Letters: N crops, K clusters.

Clusters held to links: what somebody has confirmed stays together, what was rejected comes apart.

Constrained DBSCAN (C-DBSCAN: Ruiz, Spiliopoulou and Menasalvas, RSFDGrC 2007) lets links act before and after
density is looked at. Here: must-linked crops are at distance 0 and crops of cannot-linked people out of reach when
density is computed; then clusters with a must-link between them are united, and a cluster that still holds two people
who are not one is built up again, nearest crops first, without ever joining two such (agglomeration under
constraints: Davidson and Ravi, PKDD 2005; single linkage, as density is). docs/results.md shows what it brings.

Letters: N crops, L links, G groups of must-linked crops, K clusters, M members of a cluster, U of their groups.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.cluster.hierarchy import DisjointSet
from scipy.sparse.csgraph import connected_components

from resight.arrays import Ints
from resight.training.store.links import Links

OUTLIER = -1


def dbscan(graph: sparse.csr_matrix, eps: float, min_samples: int) -> Ints:
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


class LinkConstraints:
    """Links between the crops of one clustering.

    Args:
        links: free of contradictions, as `links_of` gives them.
        count: N.
    """

    def __init__(self, links: Links, count: int) -> None:
        self._links, self._count = links, count
        self._group = links.groups(count)
        self._tied = np.bincount(self._group)[self._group] > 1  # crops with a must-link
        self._must = links.rows[links.same]
        self._foes = self._group[links.rows[~links.same]]  # groups that are two persons: (., 2)
        clash = self._foes[self._foes[:, 0] == self._foes[:, 1]]
        assert not len(clash), "links contradict each other"

    def __len__(self) -> int:
        return len(self._links)

    def violated(self, labels: Ints) -> int:
        """How many links labels (N,) do not obey: one person in no common cluster, or two in one."""
        one, other = labels[self._links.rows.T]
        together = (one == other) & (one != OUTLIER)
        return int((together != self._links.same).sum())

    def bend(self, graph: sparse.csr_matrix) -> sparse.csr_matrix:
        """The graph with must-linked pairs 0 apart and without edges between groups that are two persons.

        Args:
            graph: symmetric CSR (N, N) of distances; left as it is.
        """
        edges = graph.tocoo()
        must = np.concatenate([self._must, self._must[:, ::-1]])
        lost = self._between_foes(edges.row, edges.col)
        lost |= np.isin(edges.row.astype(np.int64) * self._count + edges.col, must[:, 0] * self._count + must[:, 1])
        row, column = (
            np.concatenate([ends[~lost], new]) for ends, new in zip((edges.row, edges.col), must.T, strict=True)
        )
        data = np.concatenate([edges.data[~lost], np.zeros(len(must), graph.dtype)])
        bent = sparse.coo_matrix((data, (row, column)), graph.shape).tocsr()
        bent.sort_indices()
        return bent

    def _between_foes(self, rows: Ints, columns: Ints) -> NDArray[np.bool_]:
        """Which pairs of crops belong to two groups that are two persons: (P,)."""
        involved = np.isin(self._group, self._foes)
        lost: NDArray[np.bool_] = involved[rows] & involved[columns]
        pairs = np.sort(np.stack([self._group[rows[lost]], self._group[columns[lost]]], 1), axis=1)
        foes = np.sort(self._foes, axis=1)
        lost[lost] = np.isin(pairs[:, 0] * self._count + pairs[:, 1], foes[:, 0] * self._count + foes[:, 1])
        return lost

    def force(self, labels: Ints, graph: sparse.csr_matrix) -> Ints:
        """The nearest labels that obey every link.

        Clusters with a must-link between them become one; so do linked outliers. A cluster with cannot-links falls
        into its groups, which are joined again along the shortest edges, but for those that would join two persons.
        What is left alone by this is an outlier.

        Args:
            labels: int64 (N,), -1 for outliers.
            graph: what `bend` gave.

        Returns:
            int64 (N,), numbered by first crop.
        """
        return _renumbered(self._parted(self._united(labels), graph))

    def _united(self, labels: Ints) -> Ints:
        """One label for each group."""
        if not len(self._must):
            return labels
        labels = labels.copy()
        alone = np.flatnonzero(self._tied & (labels == OUTLIER))
        labels[alone] = labels.max(initial=OUTLIER) + 1 + np.arange(len(alone))
        count = int(labels.max(initial=OUTLIER)) + 1
        one, other = labels[self._must.T]
        graph = sparse.coo_matrix((np.ones(len(one), bool), (one, other)), (count, count))
        joined = connected_components(graph, directed=False)[1]
        inliers = labels != OUTLIER
        labels[inliers] = joined[labels[inliers]]
        return labels

    def _parted(self, labels: Ints, graph: sparse.csr_matrix) -> Ints:
        """No two foes in one cluster."""
        out = labels.copy()
        home = np.full(self._count, OUTLIER, np.int64)
        home[self._group] = labels  # united: one label a group
        own, others = home[self._foes.T]
        clash = (own == others) & (own != OUTLIER)
        for label in np.unique(own[clash]):
            members = np.flatnonzero(labels == label)
            parts = self._part(members, self._foes[clash & (own == label)], graph)
            sizes = np.bincount(parts)
            out[members] = np.where(sizes[parts] > 1, out.max() + 1 + parts, OUTLIER)
        return out

    def _part(self, members: Ints, foes: Ints, graph: sparse.csr_matrix) -> Ints:
        """Which part each crop of a cluster goes to: (M,), from 0. Kruskal's algorithm that passes foes by."""
        group, unit = np.unique(self._group[members], return_inverse=True)
        edges = graph[members][:, members].tocoo()
        one, other = unit[edges.row], unit[edges.col]
        nearest = np.lexsort((other, one, edges.data))
        nearest = nearest[one[nearest] < other[nearest]]  # each edge once, none within a unit
        parts = DisjointSet(range(len(group)))
        apart: dict[int, set[int]] = {number: set() for number in range(len(group))}  # of roots: which are foes
        for a, b in np.searchsorted(group, foes).tolist():
            apart[a].add(b)
            apart[b].add(a)
        for a, b in zip(one[nearest].tolist(), other[nearest].tolist(), strict=True):
            roots = parts[a], parts[b]
            if roots[0] == roots[1] or roots[1] in apart[roots[0]]:
                continue
            parts.merge(a, b)
            kept = parts[a]
            gone = roots[0] if kept == roots[1] else roots[1]
            for foe in apart.pop(gone):
                apart[foe].remove(gone)
                apart[foe].add(kept)
                apart[kept].add(foe)
        root = np.array([parts[number] for number in range(len(group))])
        return np.unique(root[unit], return_inverse=True)[1].astype(np.int64)


def _renumbered(labels: Ints) -> Ints:
    """The same clusters as 0..K-1 in the order of their first crops; outliers stay."""
    inliers = np.flatnonzero(labels != OUTLIER)
    _, first, inverse = np.unique(labels[inliers], return_index=True, return_inverse=True)
    out = np.full(len(labels), OUTLIER, np.int64)
    out[inliers] = np.argsort(np.argsort(first))[inverse]
    return out
