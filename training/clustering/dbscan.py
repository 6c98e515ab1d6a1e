"""DBSCAN on a sparse distance graph, with must-links and cannot-links as constraints.

Constrained DBSCAN (C-DBSCAN: Ruiz, Spiliopoulou and Menasalvas, RSFDGrC 2007) applies links before and after the
density is computed. Before: must-linked crops get distance 0, and edges between cannot-linked groups are removed.
After: clusters with a must-link between them are merged, and a cluster that still contains a cannot-link is rebuilt
by single linkage, nearest crops first, without joining cannot-linked groups (constrained agglomeration: Davidson and
Ravi, PKDD 2005). docs/results.md reports the effect.

Letters: N crops, L links, G groups of must-linked crops, K clusters, M members of a cluster.
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
    """DBSCAN (Ester et al. 1996) on a sparse graph; distances not stored count as larger than any eps.

    Clusters are the connected components of core crops, numbered by their first core crop; a border crop joins
    the lowest-numbered cluster that reaches it. The labels are identical to scikit-learn's, which spends most of its
    time on a Python list of neighbours per crop.

    Args:
        graph: symmetric CSR (N, N) of distances, diagonal stored.
        eps: radius, inclusive.
        min_samples: crops within the radius, including itself, that make a core crop.

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
        links: free of contradictions, as returned by `links_of`.
        count: N.
    """

    def __init__(self, links: Links, count: int) -> None:
        self._links, self._count = links, count
        self._group = links.groups(count)
        self._has_must_link = np.bincount(self._group)[self._group] > 1
        self._must = links.rows[links.same]
        self._cannot = self._group[links.rows[~links.same]]  # pairs of groups: (., 2)
        contradictions = self._cannot[self._cannot[:, 0] == self._cannot[:, 1]]
        assert not len(contradictions), "links contradict each other"

    def __len__(self) -> int:
        return len(self._links)

    def count_violated(self, labels: Ints) -> int:
        """Number of links that labels (N,) violate."""
        one, other = labels[self._links.rows.T]
        together = (one == other) & (one != OUTLIER)
        return int((together != self._links.same).sum())

    def adjust_graph(self, graph: sparse.csr_matrix) -> sparse.csr_matrix:
        """The graph with distance 0 for must-links and without edges between cannot-linked groups.

        Args:
            graph: symmetric CSR (N, N) of distances; not modified.
        """
        edges = graph.tocoo()
        must = np.concatenate([self._must, self._must[:, ::-1]])
        removed = self._between_cannot_linked(edges.row, edges.col)
        removed |= np.isin(edges.row.astype(np.int64) * self._count + edges.col, must[:, 0] * self._count + must[:, 1])
        row, column = (
            np.concatenate([ends[~removed], new]) for ends, new in zip((edges.row, edges.col), must.T, strict=True)
        )
        data = np.concatenate([edges.data[~removed], np.zeros(len(must), graph.dtype)])
        adjusted = sparse.coo_matrix((data, (row, column)), graph.shape).tocsr()
        adjusted.sort_indices()
        return adjusted

    def _between_cannot_linked(self, rows: Ints, columns: Ints) -> NDArray[np.bool_]:
        """Which pairs of crops belong to two cannot-linked groups: (P,)."""
        involved = np.isin(self._group, self._cannot)
        found: NDArray[np.bool_] = involved[rows] & involved[columns]
        pairs = np.sort(np.stack([self._group[rows[found]], self._group[columns[found]]], 1), axis=1)
        cannot = np.sort(self._cannot, axis=1)
        found[found] = np.isin(pairs[:, 0] * self._count + pairs[:, 1], cannot[:, 0] * self._count + cannot[:, 1])
        return found

    def repair_labels(self, labels: Ints, graph: sparse.csr_matrix) -> Ints:
        """Similar labels that satisfy every link.

        Clusters with a must-link between them are merged, as are linked outliers. A cluster with cannot-links is
        split into its groups, which are joined again along the shortest edges except for those that would join two
        persons. Crops that remain alone become outliers.

        Args:
            labels: int64 (N,), -1 for outliers.
            graph: result of `adjust_graph`.

        Returns:
            int64 (N,), numbered by first crop.
        """
        return _renumber(self._split_cannot_linked(self._merge_must_linked(labels), graph))

    def _merge_must_linked(self, labels: Ints) -> Ints:
        """Give all crops of a group the same label."""
        if not len(self._must):
            return labels
        labels = labels.copy()
        linked_outliers = np.flatnonzero(self._has_must_link & (labels == OUTLIER))
        labels[linked_outliers] = labels.max(initial=OUTLIER) + 1 + np.arange(len(linked_outliers))
        count = int(labels.max(initial=OUTLIER)) + 1
        one, other = labels[self._must.T]
        graph = sparse.coo_matrix((np.ones(len(one), bool), (one, other)), (count, count))
        merged = connected_components(graph, directed=False)[1]
        inliers = labels != OUTLIER
        labels[inliers] = merged[labels[inliers]]
        return labels

    def _split_cannot_linked(self, labels: Ints, graph: sparse.csr_matrix) -> Ints:
        """Split the clusters that contain a cannot-link."""
        out = labels.copy()
        group_label = np.full(self._count, OUTLIER, np.int64)
        group_label[self._group] = labels  # after merging, a group has one label
        own, others = group_label[self._cannot.T]
        violated = (own == others) & (own != OUTLIER)
        for label in np.unique(own[violated]):
            members = np.flatnonzero(labels == label)
            parts = self._split_cluster(members, self._cannot[violated & (own == label)], graph)
            sizes = np.bincount(parts)
            out[members] = np.where(sizes[parts] > 1, out.max() + 1 + parts, OUTLIER)
        return out

    def _split_cluster(self, members: Ints, cannot: Ints, graph: sparse.csr_matrix) -> Ints:
        """Part of each crop of a cluster: (M,), from 0. Kruskal's algorithm, skipping cannot-linked groups."""
        group, unit = np.unique(self._group[members], return_inverse=True)
        edges = graph[members][:, members].tocoo()
        one, other = unit[edges.row], unit[edges.col]
        nearest = np.lexsort((other, one, edges.data))
        nearest = nearest[one[nearest] < other[nearest]]  # each edge once, none within a unit
        parts = DisjointSet(range(len(group)))
        excluded: dict[int, set[int]] = {number: set() for number in range(len(group))}  # cannot-linked roots of a root
        for a, b in np.searchsorted(group, cannot).tolist():
            excluded[a].add(b)
            excluded[b].add(a)
        for a, b in zip(one[nearest].tolist(), other[nearest].tolist(), strict=True):
            roots = parts[a], parts[b]
            if roots[0] == roots[1] or roots[1] in excluded[roots[0]]:
                continue
            parts.merge(a, b)
            new_root = parts[a]
            old_root = roots[0] if new_root == roots[1] else roots[1]
            for other in excluded.pop(old_root):
                excluded[other].remove(old_root)
                excluded[other].add(new_root)
                excluded[new_root].add(other)
        root = np.array([parts[number] for number in range(len(group))])
        return np.unique(root[unit], return_inverse=True)[1].astype(np.int64)


def _renumber(labels: Ints) -> Ints:
    """Number clusters 0..K-1 in the order of their first crops; outliers remain -1."""
    inliers = np.flatnonzero(labels != OUTLIER)
    _, first, inverse = np.unique(labels[inliers], return_index=True, return_inverse=True)
    out = np.full(len(labels), OUTLIER, np.int64)
    out[inliers] = np.argsort(np.argsort(first))[inverse]
    return out
