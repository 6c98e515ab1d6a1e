"""The exact float32 faiss index of a small collection, and the tuning of faiss's scan to this machine.

Rows are in order of their keys, so a key's row is found by bisection and ties are returned in order of enrolment. Not
thread-safe: one thread owns it.

`tune_faiss` measures for half a second at start how faiss scans fastest here. faiss >= 1.14.2 splits a single query
over OpenMP threads and uses matrix products only for large batches; both defaults were chosen on many-core servers. On
few cores splitting took 3.5-8 times the CPU time, and matrix products were faster from 4-8 queries on (100 k x 512,
64 queries: 8.1 -> 1.3 ms each).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import faiss
import numpy as np
from numpy.typing import NDArray

from resight.arrays import Feature
from resight.service.index.base import (
    MAX_FETCH,
    SPARE_CANDIDATES,
    Candidates,
    best_candidates,
    no_candidates,
)
from resight.service.storage.reads import Keys

# With a selector faiss does not use matrix products, so for a batch the few selected rows are copied instead; above
# 15 % of all rows the copy costs more than it saves.
GATHER_SHARE = 0.15
# The copy pays off from so many queries on, about where matrix products become faster.
GATHER_QUERIES = 6
# faiss's sums differ from ours in the last bits, so rows this close to the last one could belong before it.
TIE_TOLERANCE = 1e-5


class FlatIndex:
    """A `resight.service.index.base.VectorIndex` that scans float32 features. Removal is immediate."""

    kind, approximate, tail, tombstones = "flat", False, 0, 0

    def __init__(self, dim: int) -> None:
        self._flat = faiss.IndexFlatIP(dim)
        self._keys: Keys = np.empty(0, np.int64)
        self.revision = -1

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def nbytes(self) -> int:
        """Memory in bytes: features and keys."""
        return len(self) * (4 * self._flat.d + 8)

    def add(self, keys: Keys, features: Feature) -> bool:
        """Append features, float32 (N, D) unit rows; see `resight.service.index.base.VectorIndex.add`."""
        last = self._keys[-1] if len(self._keys) else -1
        new = keys > last
        if not np.isin(keys[~new], self._keys).all():
            return False
        if new.any():
            self._flat.add(np.ascontiguousarray(features[new]))
            self._keys = np.concatenate([self._keys, keys[new]])
        return True

    def remove(self, keys: Keys) -> None:
        """Remove entries; unknown keys are no error."""
        rows = self._rows(keys)
        if len(rows):
            self._flat.remove_ids(faiss.IDSelectorBatch(rows))
            self._keys = np.delete(self._keys, rows)

    def _rows(self, keys: Keys) -> NDArray[np.int64]:
        """The rows of keys; unknown keys are left out."""
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
        """Those of ``keys`` that are present, ascending, and a copy of their features, float32 (N, D)."""
        rows = self._rows(np.sort(keys))
        return self._keys[rows], self._vectors()[rows]

    def search(self, queries: Feature, k: int, *, among: Keys | None = None, exact: bool = True) -> list[Candidates]:
        """The k nearest entries of each query, always exact; see `resight.service.index.base.VectorIndex.search`.

        The similarity of a pair does not depend on the other queries or rows of the search.
        """
        rows = None if among is None else self._rows(among)
        count = len(self) if rows is None else len(rows)
        if not count:
            return no_candidates(queries)
        if rows is not None and len(queries) > GATHER_QUERIES and count <= GATHER_SHARE * len(self):
            gathered = faiss.IndexFlatIP(self._flat.d)
            gathered.add(np.ascontiguousarray(self._vectors()[rows]))
            near = self._fetch(gathered, queries, k, count, None)
            return [self._exact(query, rows[found], k) for query, found in zip(queries, near, strict=True)]
        selector = None if rows is None else self._selector(rows)
        near = self._fetch(self._flat, queries, k, count, selector)
        return [self._exact(query, found, k) for query, found in zip(queries, near, strict=True)]

    def _selector(self, rows: NDArray[np.int64]) -> faiss.IDSelector:
        """A bitmap of rows: ten times as fast to test as a set of row numbers."""
        chosen = np.zeros(len(self), bool)
        chosen[rows] = True
        bits = np.packbits(chosen, bitorder="little")
        return faiss.IDSelectorBitmap(bits)  # type: ignore[call-arg,arg-type]  # faiss types its C++ signature only

    def _fetch(
        self, index: faiss.IndexFlatIP, queries: Feature, k: int, count: int, selector: faiss.IDSelector | None
    ) -> list[NDArray[np.int64]]:
        """Rows of ``index`` with the k nearest of each query, and all that may tie with the last one."""
        parameters = faiss.SearchParameters()
        if selector is not None:
            parameters.sel = selector
        fetch = min(k + SPARE_CANDIDATES, count)
        while True:
            similarities, rows = index.search(queries, fetch, params=parameters)
            settled = fetch >= min(count, max(MAX_FETCH, k)) or bool(
                (similarities[:, -1] < similarities[:, k - 1] - TIE_TOLERANCE).all()
            )
            if settled:
                return [found[found >= 0] for found in rows]
            fetch = min(fetch * 4, count)

    def _exact(self, query: Feature, rows: NDArray[np.int64], k: int) -> Candidates:
        rows = np.sort(rows)
        return best_candidates(query, self._keys[rows], self._vectors()[rows], k)


log = logging.getLogger(__name__)

TUNING_BUDGET_S = 0.5
TUNING_ROWS = 8192  # 16 MB at 512-d: larger than the cores' private caches, like a real gallery
TUNING_QUERIES = (2, 3, 4, 6, 8, 12, 16, 24)
NO_MATRIX_PRODUCTS = 2**31 - 1  # faiss's threshold is a C int
# A split query must be this much faster to be worth it: concurrent requests need the other cores too.
SPLIT_GAIN = 0.6


@dataclass(frozen=True)
class FaissTuning:
    """OpenMP threads per search, and the number of queries from which matrix products are faster."""

    threads: int = 1
    blas_queries: int = 6  # default without tuning: the middle of the results on 2 to 8 cores

    def apply(self, dim: int) -> None:
        """Configure faiss for the calling thread. The BLAS threshold is process-wide, so only one thread searches."""
        faiss.omp_set_num_threads(self.threads)
        faiss.cvar.distance_compute_blas_threshold = self.blas_queries * dim


@cache
def tune_faiss(dim: int, *, budget_s: float = TUNING_BUDGET_S) -> FaissTuning:
    """Time exact searches both ways on random rows, once per process; each thread calls `FaissTuning.apply`.

    Args:
        dim: length of the features to be searched.
        budget_s: approximate duration.
    """
    started = time.perf_counter()
    rows = np.random.default_rng(0).standard_normal((TUNING_ROWS, dim), np.float32)
    index = faiss.IndexFlatIP(dim)
    index.add(rows)
    share_s = budget_s / (2 + len(TUNING_QUERIES))

    def single_query_s(threads: int) -> float:
        faiss.omp_set_num_threads(threads)
        faiss.cvar.distance_compute_blas_threshold = NO_MATRIX_PRODUCTS
        return _best_s(lambda: index.search(rows[:1], 10), share_s)

    cores = faiss.omp_get_max_threads()
    threads = cores if cores > 1 and single_query_s(cores) < SPLIT_GAIN * single_query_s(1) else 1
    faiss.omp_set_num_threads(threads)
    found = FaissTuning(
        threads, next((count for count in TUNING_QUERIES if _products_are_faster(index, rows[:count], share_s)), 32)
    )
    found.apply(dim)
    log.info(
        "search tuned omp_threads=%d blas_queries=%d dim=%d seconds=%.2f",
        found.threads,
        found.blas_queries,
        dim,
        time.perf_counter() - started,
    )
    return found


def _products_are_faster(index: faiss.IndexFlatIP, queries: Feature, limit_s: float) -> bool:
    times = []
    for threshold in (NO_MATRIX_PRODUCTS, 0):
        faiss.cvar.distance_compute_blas_threshold = threshold
        times.append(_best_s(lambda: index.search(queries, 10), limit_s / 2))
    return times[1] < times[0]


def _best_s(run: Callable[[], object], limit_s: float) -> float:
    """The duration of the fastest run within the time limit, out of at least two: the first one warms up."""
    best, stop = float("inf"), time.perf_counter() + limit_s
    done = 0
    while done < 2 or time.perf_counter() < stop:
        started = time.perf_counter()
        run()
        best, done = min(best, time.perf_counter() - started), done + 1
    return best
