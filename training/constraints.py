"""Clusters held to links: what somebody has confirmed stays together, what was rejected comes apart.

Constrained DBSCAN (C-DBSCAN: Ruiz, Spiliopoulou and Menasalvas, RSFDGrC 2007) lets links act before and after
density is looked at. Here: must-linked crops are at distance 0 and crops of cannot-linked people out of reach when
density is computed; then clusters with a must-link between them are united, and a cluster that still holds two people
who are not one is parted between them.

Letters: N crops, D feature size, L links, G groups of must-linked crops, K clusters, A anchors.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse.csgraph import connected_components

from resight.training.dbscan import OUTLIER
from resight.training.links import Links
from resight.training.neighbours import Floats, Ints

FOES = 10.0  # distance of two anchors that must not meet: above any 1 - cosine, which ends at 2
MEETING = 5.0  # between the two: complete linkage stops at the first merge that would join foes


class Constraints:
    """Links between the crops of one clustering, and the features that decide where links leave a choice.

    Args:
        links: free of contradictions, as `links_of` gives them.
        views: float32 (N, D) unit rows and the weight of each, summing to 1.
    """

    def __init__(self, links: Links, views: Sequence[tuple[Floats, float]]) -> None:
        self._links, self._views, self._count = links, views, len(views[0][0])
        self._group = links.groups(self._count)
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

    def force(self, labels: Ints) -> Ints:
        """The nearest labels that obey every link.

        Clusters with a must-link between them become one; so do linked outliers. In a cluster with cannot-links the
        groups these name are anchors: they are agglomerated, nearest first, as far as no two of them are two persons,
        and every other crop, or group of must-linked ones, goes to the nearest anchor. What is left alone by this is
        an outlier.

        Args:
            labels: int64 (N,), -1 for outliers.

        Returns:
            int64 (N,), numbered by first crop.
        """
        return _numbered(self._parted(self._united(labels)))

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

    def _parted(self, labels: Ints) -> Ints:
        """No two foes in one cluster."""
        out = labels.copy()
        home = np.full(len(self._group), OUTLIER, np.int64)
        home[self._group] = labels  # united: one label a group
        own, others = home[self._foes.T]
        clash = (own == others) & (own != OUTLIER)
        for label in np.unique(own[clash]):
            members = np.flatnonzero(labels == label)
            parts = self._part(members, self._foes[clash & (own == label)])
            sizes = np.bincount(parts)
            out[members] = np.where(sizes[parts] > 1, out.max() + 1 + parts, OUTLIER)
        return out

    def _part(self, members: Ints, foes: Ints) -> Ints:
        """Which part each crop of a cluster goes to: (M,), from 0."""
        unit, of_unit = np.unique(self._group[members], return_inverse=True)
        features = self._fused(members)
        sums = sparse.csr_matrix((np.ones(len(members), np.float32), (of_unit, np.arange(len(members)))))
        means = (sums @ features) / np.bincount(of_unit)[:, None]  # (U, D): their products are average linkage
        anchors = np.searchsorted(unit, np.unique(foes))
        side = _sides(means[anchors] @ means[anchors].T, np.searchsorted(unit[anchors], foes))
        near = np.stack([self._nearness(features, of_unit, anchors[side == part]) for part in range(side.max() + 1)], 1)
        near = (sums @ near) / np.bincount(of_unit)[:, None]  # (U, parts)
        chosen = near.argmax(1)
        chosen[anchors] = side
        return np.asarray(chosen[of_unit], np.int64)

    def _nearness(self, features: Floats, of_unit: Ints, anchors: Ints) -> Floats:
        """Similarity of each crop to the nearest crop of some anchors: (M,)."""
        return np.asarray((features @ features[np.isin(of_unit, anchors)].T).max(1), np.float32)

    def _fused(self, rows: Ints) -> Floats:
        """Unit rows whose inner products are the weighed sums of the views' cosines."""
        return np.concatenate([np.float32(weight**0.5) * view[rows] for view, weight in self._views], 1)


def _sides(similarity: Floats, foes: Ints) -> Ints:
    """Agglomerate A anchors by complete linkage until only foes are left to be joined: int64 (A,), from 0."""
    distance = (1 - similarity).astype(np.float64)
    distance[foes[:, 0], foes[:, 1]] = distance[foes[:, 1], foes[:, 0]] = FOES
    condensed = distance[np.triu_indices(len(distance), 1)].clip(0)
    return _numbered(fcluster(linkage(condensed, "complete"), MEETING, "distance"))


def _numbered(labels: Ints) -> Ints:
    """The same clusters as 0..K-1 in the order of their first crops; outliers stay."""
    inliers = np.flatnonzero(labels != OUTLIER)
    _, first, inverse = np.unique(labels[inliers], return_index=True, return_inverse=True)
    out = np.full(len(labels), OUTLIER, np.int64)
    out[inliers] = np.argsort(np.argsort(first))[inverse]
    return out
