"""The exact faiss index of a small collection, in float32: derived from the store, never the truth.

Rows stand in order of their keys, so a key finds its row by bisection, and equal similarities are
answered in order of enrolment. Not thread-safe: one thread owns it.

Half a second at start: how this machine's faiss scans fastest, instead of numbers from another one.

faiss >= 1.14.2 splits a lone query over OpenMP threads and turns to matrix products late; both were chosen
on many-core servers. On few cores splitting took 3.5-8 times the CPU time, and products won from 4-8 queries
on (100 k x 512, 64 queries: 8.1 -> 1.3 ms each).
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

# A selector keeps faiss from using matrix products, so a batch gathers the few rows it may find instead; above
# 15 % of all rows the copy costs more than it saves.
GATHER_SHARE = 0.15
# From so many queries on the copy is worth it: about where matrix products begin to win (`resight.service.index.flat`).
GATHER_QUERIES = 6
# The scan's sums differ from ours in the last bits, so rows this near to the last one could stand before it.
TIE_TOLERANCE = 1e-5


class FlatIndex:
    """A `resight.service.index.base.VectorIndex`: float32 features, scanned. Removal is at once."""

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

    def search(self, queries: Feature, k: int, *, among: Keys | None = None, exact: bool = True) -> list[Candidates]:
        """The k nearest rows of each query, always exactly; see `resight.service.index.base.VectorIndex.search`.

        The similarity of a pair is the same whatever else is searched for or among.
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
TUNING_ROWS = 8192  # 16 MB at 512-d: more than the cores' own caches hold, as a real gallery is
TUNING_QUERIES = (2, 3, 4, 6, 8, 12, 16, 24)
NO_MATRIX_PRODUCTS = 2**31 - 1  # faiss's threshold is a C int
# A split query must be this much faster to be worth it: requests beside it want the other cores too.
SPLIT_GAIN = 0.6


@dataclass(frozen=True)
class FaissTuning:
    """What was found: OpenMP threads of a search, and from how many queries on matrix products win."""

    threads: int = 1
    blas_queries: int = 6  # in the middle of what was measured on 2 to 8 cores; for who does not tune

    def apply(self, dim: int) -> None:
        """Set faiss up for the calling thread. The threshold is the process's, so one thread searches."""
        faiss.omp_set_num_threads(self.threads)
        faiss.cvar.distance_compute_blas_threshold = self.blas_queries * dim


@cache
def tune_faiss(dim: int, *, budget_s: float = TUNING_BUDGET_S) -> FaissTuning:
    """Time exact searches both ways on random rows, once in a process; `FaissTuning.apply` is for each thread.

    Args:
        dim: length of the features to be searched.
        budget_s: about how long it may take.
    """
    started = time.perf_counter()
    rows = np.random.default_rng(0).standard_normal((TUNING_ROWS, dim), np.float32)
    index = faiss.IndexFlatIP(dim)
    index.add(rows)
    share_s = budget_s / (2 + len(TUNING_QUERIES))

    def lone(threads: int) -> float:
        faiss.omp_set_num_threads(threads)
        faiss.cvar.distance_compute_blas_threshold = NO_MATRIX_PRODUCTS
        return _best_s(lambda: index.search(rows[:1], 10), share_s)

    cores = faiss.omp_get_max_threads()
    threads = cores if cores > 1 and lone(cores) < SPLIT_GAIN * lone(1) else 1
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
    """The shortest of the runs that fit into a time, of at least two: the first one warms up."""
    best, stop = float("inf"), time.perf_counter() + limit_s
    done = 0
    while done < 2 or time.perf_counter() < stop:
        started = time.perf_counter()
        run()
        best, done = min(best, time.perf_counter() - started), done + 1
    return best
