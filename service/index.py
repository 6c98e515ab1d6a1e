"""The exact faiss index of a small collection, in float32: derived from the store, never the truth.

Rows stand in order of their keys, so a key finds its row by bisection, and equal similarities are
answered in order of enrolment. Not thread-safe: one thread owns it.
"""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

from resight.service.candidates import MAX_FETCH, SPARE, Near, best, nothing
from resight.service.reads import Keys
from resight.service.runtime import Feature

# A selector keeps faiss from using matrix products, so a batch gathers the few rows it may find instead; above
# 15 % of all rows the copy costs more than it saves.
GATHER_SHARE = 0.15
# From so many queries on the copy is worth it: about where matrix products begin to win (`resight.service.tune`).
GATHER_QUERIES = 6
# The scan's sums differ from ours in the last bits, so rows this near to the last one could stand before it.
TIE = 1e-5


class ExactIndex:
    """A `resight.service.candidates.VectorIndex`: float32 features, scanned. Removal is at once."""

    kind, approximate, tail, tombstones = "flat", False, 0, 0

    def __init__(self, dim: int) -> None:
        self._flat = faiss.IndexFlatIP(dim)
        self._keys: Keys = np.empty(0, np.int64)
        self.revision = -1

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def nbytes(self) -> int:
        """Memory, in bytes: features and keys."""
        return len(self) * (4 * self._flat.d + 8)

    def add(self, keys: Keys, features: Feature) -> bool:
        """Append features, float32 (N, D) unit rows; see `resight.service.candidates.VectorIndex.add`."""
        last = self._keys[-1] if len(self._keys) else -1
        new = keys > last
        if not np.isin(keys[~new], self._keys).all():
            return False
        if new.any():
            self._flat.add(np.ascontiguousarray(features[new]))
            self._keys = np.concatenate([self._keys, keys[new]])
        return True

    def remove(self, keys: Keys) -> None:
        """Take entries out; keys not held are no error."""
        rows = self._rows(keys)
        if len(rows):
            self._flat.remove_ids(faiss.IDSelectorBatch(rows))
            self._keys = np.delete(self._keys, rows)

    def _rows(self, keys: Keys) -> NDArray[np.int64]:
        """Where keys stand; those not held are left out."""
        rows = np.searchsorted(self._keys, keys)
        rows = rows[rows < len(self._keys)]
        return rows[np.isin(self._keys[rows], keys)]

    def _vectors(self) -> Feature:
        """All features, float32 (N, D): a view into faiss, valid until the next add or remove."""
        if not len(self):
            return np.empty((0, self._flat.d), np.float32)
        flat = faiss.rev_swig_ptr(self._flat.get_xb(), len(self) * self._flat.d)
        view: Feature = flat.reshape(len(self), self._flat.d)
        return view

    def vectors(self, keys: Keys) -> tuple[Keys, Feature]:
        """A copy of the features of those of ``keys`` that are held, float32 (N, D); ascending."""
        rows = self._rows(np.sort(keys))
        return self._keys[rows], self._vectors()[rows]

    def search(self, queries: Feature, k: int, *, among: Keys | None = None, exact: bool = True) -> list[Near]:
        """The k nearest rows of each query, always exactly; see `resight.service.candidates.VectorIndex.search`.

        The similarity of a pair is the same whatever else is searched for or among.
        """
        rows = None if among is None else self._rows(among)
        count = len(self) if rows is None else len(rows)
        if not count:
            return nothing(queries)
        if rows is not None and len(queries) > GATHER_QUERIES and count <= GATHER_SHARE * len(self):
            gathered = faiss.IndexFlatIP(self._flat.d)
            gathered.add(np.ascontiguousarray(self._vectors()[rows]))
            near = self._fetch(gathered, queries, k, count, None)
            return [self._exact(query, rows[found], k) for query, found in zip(queries, near, strict=True)]
        selector = None if rows is None else self._selector(rows)
        near = self._fetch(self._flat, queries, k, count, selector)
        return [self._exact(query, found, k) for query, found in zip(queries, near, strict=True)]

    def _selector(self, rows: NDArray[np.int64]) -> faiss.IDSelector:
        """One bit a row: ten times as fast to ask as a set of numbers."""
        chosen = np.zeros(len(self), bool)
        chosen[rows] = True
        bits = np.packbits(chosen, bitorder="little")
        return faiss.IDSelectorBitmap(bits)  # type: ignore[call-arg,arg-type]  # faiss types its C++ signature only

    def _fetch(
        self, index: faiss.IndexFlatIP, queries: Feature, k: int, count: int, selector: faiss.IDSelector | None
    ) -> list[NDArray[np.int64]]:
        """Rows of ``index`` that hold the k nearest of each query, with all that may tie with the last one."""
        parameters = faiss.SearchParameters()
        if selector is not None:
            parameters.sel = selector
        fetch = min(k + SPARE, count)
        while True:
            similarities, rows = index.search(queries, fetch, params=parameters)
            settled = fetch >= min(count, max(MAX_FETCH, k)) or bool(
                (similarities[:, -1] < similarities[:, k - 1] - TIE).all()
            )
            if settled:
                return [found[found >= 0] for found in rows]
            fetch = min(fetch * 4, count)

    def _exact(self, query: Feature, rows: NDArray[np.int64], k: int) -> Near:
        rows = np.sort(rows)
        return best(query, self._keys[rows], self._vectors()[rows], k)
