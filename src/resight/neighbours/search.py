"""Exact nearest neighbours by cosine similarity, among all crops or by camera. The package's only user of torch.

The (N, N) similarities are visited in tiles. They are symmetric, so those above the diagonal are computed once and
serve their rows and their columns: half the multiplications of a plain search. In a tile, groups of columns are
skipped if their largest similarity does not exceed that of the row's worst neighbour so far.

Letters: N crops, D feature size, k neighbours, T columns of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from resight.arrays import Floats, Ints
from resight.neighbours.reciprocal import NO_NEIGHBOUR, Neighbours

SELF_SIMILARITY = 2.0  # above any cosine, so that a crop ranks before its duplicates
GROUP = 32  # columns per maximum; 64 takes 15 % more time besides the products, 128 70 % more
TILE = 2048  # rows of a tile: enough for the multiplication to run at full speed
ASPECT = 8  # columns per row of a tile: few steps, so that threads rarely wait for one another; 128 MiB


def nearest_neighbours(features: Floats, k: int, *, device: str = "cpu", chunk: int = TILE) -> Ints:
    """Exact k nearest rows by inner product, each row's own index first.

    Args:
        features: (N, D) unit rows.
        k: neighbours to find, itself included; capped at N.
        device: where the products are computed.
        chunk: rows of a tile; memory is about 10 x chunk x chunk floats.

    Returns:
        int64 (N, min(k, N)), nearest first.
    """
    return search_neighbours(features, k, device=device, chunk=chunk).indices


def search_neighbours(features: Floats, k: int, *, device: str = "cpu", chunk: int = TILE) -> Neighbours:
    """`nearest_neighbours` with the similarities it found."""
    best = _Best(len(features), min(k, len(features)), device)
    for rows, columns, similarity in _tiles(features, device, chunk):
        best.offer_both(rows, columns, similarity)
    return best.found()


def search_neighbours_by_camera(
    features: Floats, cameras: Ints, k_intra: int, k_inter: int, *, device: str = "cpu", chunk: int = TILE
) -> tuple[Neighbours, Neighbours]:
    """Exact nearest rows within each crop's camera and among all other cameras.

    Args:
        features: (N, D) unit rows.
        cameras: int64 (N,), any numbers.
        k_intra: neighbours of the same camera, the crop itself included and first.
        k_inter: neighbours of other cameras.
        device: where the products are computed.
        chunk: rows of a tile.

    Returns:
        Lists of width min(k_intra, N) and min(k_inter, N), filled up with `NO_NEIGHBOUR`.
    """
    n = len(features)
    numbers = torch.from_numpy(np.unique(cameras, return_inverse=True)[1]).to(device)
    intra, inter = _Best(n, min(k_intra, n), device), _Best(n, min(k_inter, n), device)
    for rows, columns, similarity in _tiles(features, device, chunk):
        same = numbers[rows, None] == numbers[None, columns]
        intra.offer_both(rows, columns, similarity.masked_fill(~same, -torch.inf))
        inter.offer_both(rows, columns, similarity.masked_fill_(same, -torch.inf))
    return intra.found(), inter.found()


def farthest_distances(features: Floats, *, device: str = "cpu", chunk: int = TILE) -> Floats:
    """Squared distance of each row to the row farthest from it, float32 (N,); 1 where all rows are the same.

    Args:
        features: (N, D) unit rows.
        device: where the products are computed.
        chunk: rows at a time; memory is chunk x N floats.
    """
    data = torch.from_numpy(np.ascontiguousarray(features, np.float32)).to(device)
    lowest = [(data[start : start + chunk] @ data.T).amin(dim=1) for start in range(0, len(data), chunk)]
    farthest = 2 - 2 * torch.cat(lowest)
    return torch.where(farthest > 0, farthest, 1).cpu().numpy()


def _tiles(features: Floats, device: str, height: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Similarities of some rows with the columns from their first on; a crop's own is `SELF_SIMILARITY`."""
    data = torch.from_numpy(np.ascontiguousarray(features, np.float32)).to(device)
    n = len(data)
    for start in range(0, n, height):
        rows = slice(start, min(start + height, n))
        for first in range(start, n, ASPECT * height):
            columns = slice(first, min(first + ASPECT * height, n))
            similarity = data[rows] @ data[columns].T
            if first == start:
                similarity[:, : len(similarity)].fill_diagonal_(SELF_SIMILARITY)
            yield rows, columns, similarity


class _Best:
    """The k best columns of each row among the tiles offered so far."""

    def __init__(self, n: int, k: int, device: str) -> None:
        self.k = k
        self.values = torch.full((n, k), -torch.inf, device=device)
        self.indices = torch.full((n, k), NO_NEIGHBOUR, device=device)

    def offer_both(self, rows: slice, columns: slice, similarity: Tensor) -> None:
        """Let a tile serve its rows and those of its columns that come after them."""
        height, width = similarity.shape
        if height % GROUP or width % GROUP:  # the last tiles of a row and of a column
            similarity = F.pad(similarity, (0, -width % GROUP, 0, -height % GROUP), value=-torch.inf)
        self._offer(rows, columns.start, similarity[:height])
        later = slice(max(rows.stop, columns.start), columns.stop)
        if later.start < later.stop:
            self._offer(later, rows.start, similarity[:, later.start - columns.start : width].T)

    def _offer(self, rows: slice, first: int, similarity: Tensor) -> None:
        """Merge columns `first`, `first` + 1, ... of some rows; similarity is (rows, T)."""
        values, indices = self.values[rows], self.indices[rows]
        row, column, better = _better(similarity, values[:, -1], self.k)
        found, places = _pad_rows(row, better, column + first, len(values))
        values, order = torch.cat([values, found], 1).topk(self.k, dim=1)
        self.values[rows] = values
        self.indices[rows] = torch.cat([indices, places], 1).gather(1, order)

    def found(self) -> Neighbours:
        """The lists as arrays."""
        values = self.values.cpu().numpy()
        return Neighbours(self.indices.cpu().numpy(), np.where(np.isfinite(values), np.minimum(values, 1), 0))


def _better(similarity: Tensor, worst: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and value of all entries that may enter their row's k best, row by row.

    An entry has to exceed the worst neighbour so far, and to reach the k-th largest of the groups' maxima: the
    groups before it hold k entries that do.
    """
    maxima = _group_maxima(similarity)
    bound = torch.nextafter(worst, torch.full_like(worst, torch.inf))  # the lowest number where a list is short
    if maxima.shape[1] >= k:
        bound = torch.maximum(bound, maxima.topk(k, dim=1, sorted=False).values.amin(1))
    row, group = (maxima >= bound[:, None]).nonzero(as_tuple=True)
    near = similarity.view(len(similarity), -1, GROUP)[row, group]  # (E, GROUP)
    pick, within = (near >= bound[row, None]).nonzero(as_tuple=True)
    return row[pick], group[pick] * GROUP + within, near[pick, within]


def _group_maxima(similarity: Tensor) -> Tensor:
    """Largest value of each GROUP columns: (rows, T / GROUP)."""
    if similarity.is_contiguous():
        return similarity.view(len(similarity), -1, GROUP).amax(2)
    return similarity.T.view(-1, GROUP, len(similarity)).amax(1).T  # torch reduces a transposed view 20 times slower


def _pad_rows(row: Tensor, values: Tensor, columns: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Entries sorted by row as dense (count, longest) tables, -inf and `NO_NEIGHBOUR` where a row has fewer."""
    lengths = torch.bincount(row, minlength=count)
    position = torch.arange(len(row), device=row.device) - (lengths.cumsum(0) - lengths)[row]
    shape = (count, int(lengths.max()))
    table = torch.full(shape, -torch.inf, device=row.device)
    places = torch.full(shape, NO_NEIGHBOUR, device=row.device)
    table[row, position] = values
    places[row, position] = columns
    return table, places
