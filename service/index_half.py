"""Larger collections in half the memory: float16 rows scanned by faiss, ordered by the stored float32 features.

The rounding of a similarity has a bound, so candidates are fetched until nothing nearer can be missing:
this index is exact. A removed row stays as a tombstone until the index is built anew.
"""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

from resight.service.candidates import MAX_FETCH, SPARE, Near, Truth, nothing, scored
from resight.service.half_scan import scan_blocks, worthwhile
from resight.service.index_gpu import GpuScan
from resight.service.reads import Keys
from resight.service.runtime import Feature

# float16 keeps 11 bits, so a component is off by 2^-11 of itself at most and a product of unit vectors by as much
# (Cauchy-Schwarz); the rest is for numbers below 2^-14, which keep fewer bits, and for the sum's own rounding.
ROUNDING = 2.0**-11 + 3e-5


class Rows:
    """Which key stands in which row, and which rows are dead. Keys ascend, so a key is found by bisection."""

    def __init__(self) -> None:
        self._keys, self._dead = np.empty(1024, np.int64), np.zeros(1024, bool)
        self.filled = self.dead = 0

    @property
    def keys(self) -> Keys:
        """All keys, dead ones too: a view."""
        return self._keys[: self.filled]

    @property
    def alive(self) -> NDArray[np.bool_]:
        """Which rows are not dead."""
        return ~self._dead[: self.filled]

    @property
    def living(self) -> Keys:
        """A copy of the keys that are not dead."""
        return self.keys[self.alive]

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        return self._keys.nbytes + self._dead.nbytes

    def append(self, keys: Keys) -> None:
        """Add rows; the room doubles, so that many small additions stay cheap."""
        needed = self.filled + len(keys)
        if needed > len(self._keys):
            room = max(needed, 2 * len(self._keys))
            self._keys, self._dead = np.resize(self._keys, room), np.resize(self._dead, room)
        self._keys[self.filled : needed], self._dead[self.filled : needed] = keys, False
        self.filled = needed

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """The living rows of keys; those not held are left out."""
        rows = np.searchsorted(self.keys, keys)
        rows = rows[rows < self.filled]
        rows = rows[np.isin(self.keys[rows], keys)]
        return rows[~self._dead[rows]]

    def holds(self, keys: Keys) -> bool:
        """Whether each key has, or had, a row."""
        return bool(np.isin(keys, self.keys).all())

    def kill(self, rows: NDArray[np.int64]) -> None:
        """Bury rows that `find` gave."""
        rows = np.unique(rows)
        self._dead[rows] = True
        self.dead += len(rows)

    def selector(self, rows: NDArray[np.int64] | None) -> faiss.IDSelector | None:
        """One bit a row: these rows, or all that live; None when that is every row."""
        if rows is None and not self.dead:
            return None
        chosen = np.zeros(self.filled, bool) if rows is not None else self.alive
        if rows is not None:
            chosen[rows] = True
        bits = np.packbits(chosen, bitorder="little")
        return faiss.IDSelectorBitmap(bits)  # type: ignore[call-arg,arg-type]  # faiss types its C++ signature only


class HalfIndex:
    """A `resight.service.candidates.VectorIndex` of float16 rows.

    Args:
        dim: length of the features.
        truth: the float32 features in the store.
        codes: rows to begin with, whose keys are told to `adopt`; None = empty.
    """

    kind, approximate, tail = "flat-fp16", False, 0

    def __init__(self, dim: int, truth: Truth, codes: faiss.IndexScalarQuantizer | None = None) -> None:
        self.codes = codes or faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        self.rows = Rows()
        self.gpu: GpuScan | None = None
        self.revision = -1
        self._truth = truth

    def __len__(self) -> int:
        return self.rows.filled - self.rows.dead

    @property
    def tombstones(self) -> int:
        """Removed rows that still take room."""
        return self.rows.dead

    @property
    def nbytes(self) -> int:
        """Memory, in bytes."""
        return self.rows.filled * 2 * self.codes.d + self.rows.nbytes

    def add(self, keys: Keys, features: Feature) -> bool:
        """Append features; see `resight.service.candidates.VectorIndex.add`."""
        new = keys > (self.rows.keys[-1] if self.rows.filled else -1)
        if not self.rows.holds(keys[~new]):
            return False
        if new.any():
            self.codes.add(np.ascontiguousarray(features[new]))
            self.rows.append(keys[new])
        return True

    def remove(self, keys: Keys) -> None:
        """Bury entries; keys not held are no error."""
        self.rows.kill(self.rows.find(keys))

    def vectors(self, keys: Keys) -> tuple[Keys, Feature]:
        """From the store, whole."""
        return self._truth(keys)

    def search(self, queries: Feature, k: int, *, among: Keys | None = None, exact: bool = True) -> list[Near]:
        """The k nearest of each query, always exactly; see `resight.service.candidates.VectorIndex.search`."""
        rows = None if among is None else self.rows.find(among)
        count = len(self) if rows is None else len(rows)
        if not count:
            return nothing(queries)
        fetch = min(k + SPARE, count)
        while True:
            rounded, found, rounding = self._scan(queries, fetch, rows)
            near = scored(queries, [self.rows.keys[own[own >= 0]] for own in found], self._truth, k)
            if fetch >= min(count, max(MAX_FETCH, k)) or all(
                len(keys) == k and last + rounding < similarities[-1]
                for (keys, similarities), last in zip(near, rounded[:, -1], strict=True)
            ):
                return near
            fetch = min(fetch * 4, count)

    def _scan(
        self, queries: Feature, fetch: int, rows: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], float]:
        """Rounded similarities and rows (Q, fetch), on whatever is fastest, and how far off they may be."""
        selector = self.rows.selector(rows)
        parameters = faiss.SearchParameters()
        if selector is not None:
            parameters.sel = selector
        if self.gpu is not None and (selector is None or self.gpu.filters):
            return (*self.gpu.search(queries, fetch, params=parameters), self.gpu.rounding)
        if worthwhile(len(queries), fetch):
            chosen = np.flatnonzero(self.rows.alive) if rows is None and self.rows.dead else rows
            return (*scan_blocks(self.codes, queries, fetch, chosen), ROUNDING)
        return (*self.codes.search(queries, fetch, params=parameters), ROUNDING)
